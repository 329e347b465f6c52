"""What a shard's log consists of, and what replicas say to one another about it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgpack

from gostore.core.errors import Corrupt

COMMAND: Final = 0
"""Kind of an entry: a command of the state machine."""
CONFIGURATION: Final = 1
"""Kind of an entry: from here on these replicas hold the shard."""


class LogEntry(NamedTuple):
    term: int
    index: int  # type: ignore[assignment]  # tuple.index is not missed here
    kind: int
    payload: bytes


class Point(NamedTuple):
    """A place in a log: the entry with this index has this term. Two logs that share a point are equal up to it."""

    index: int  # type: ignore[assignment]
    term: int


class Run(NamedTuple):
    """The entries ``first`` .. ``last`` have the same term."""

    term: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Promise:
    """Not to follow a generation below this one; and who wanted to start it, with which replicas.

    ``quorum``: so many of ``planned`` must hold the whole log before this generation may acknowledge anything.
    """

    generation: int
    primary: str
    planned: tuple[str, ...]
    quorum: int

    def to_wire(self) -> list[Any]:
        return [self.generation, self.primary, list(self.planned), self.quorum]

    @classmethod
    def from_wire(cls, wire: Any) -> Promise:
        generation, primary, planned, quorum = wire
        return cls(int(generation), str(primary), tuple(planned), int(quorum))


PROMISES_MAX: Final = 64
"""Plans that a replica remembers; beyond that the oldest are taken together, which can only make a recovery wait."""


def remember(promises: tuple[Promise, ...], promise: Promise) -> tuple[Promise, ...]:
    """The promises of a replica, after another one; in the order of their generations.

    Each may be the only trace of a generation that began elsewhere, so none is forgotten for a newer one; but of those
    with the same plan the newest says as much as all of them.
    """
    plan = (sorted(promise.planned), promise.quorum)
    same = [made for made in promises if (sorted(made.planned), made.quorum) == plan]
    kept = [made for made in promises if made not in same]
    newest = max((*same, promise), key=lambda made: made.generation)
    if len(kept) >= PROMISES_MAX:
        first, second = kept[:2]
        planned = tuple(dict.fromkeys((*first.planned, *second.planned)))
        quorum = min(first.quorum, second.quorum)
        kept[:2] = [Promise(second.generation, second.primary, planned, quorum)]
    # A replay may meet the same promise again, behind a newer one.
    return tuple(sorted((*kept, newest), key=lambda made: made.generation))


@dataclass(frozen=True, slots=True)
class Configuration:
    """Who holds the shard. ``index``, ``generation``: of the entry that says so.

    ``copies_min``: a write needs so many members; it never falls.
    """

    members: tuple[str, ...]
    copies_min: int
    index: int = 0
    generation: int = 0

    def to_wire(self) -> list[Any]:
        return [list(self.members), self.copies_min, self.index, self.generation]

    @classmethod
    def from_wire(cls, wire: Any) -> Configuration:
        members, copies_min, index, generation = wire
        return cls(tuple(members), int(copies_min), int(index), int(generation))


def common_point(mine: Iterable[Run], theirs: Iterable[Run]) -> Point | None:
    """The last point that two logs share, as far as their runs tell; None when they do not meet."""
    by_term = {run.term: run for run in mine}
    for run in sorted(theirs, reverse=True):
        own = by_term.get(run.term)
        if own is not None:
            index = min(own.last, run.last)
            if index >= max(own.first, run.first):
                return Point(index, run.term)
    return None


def entries_to_wire(entries: Iterable[LogEntry]) -> tuple[list[list[int]], bytes]:
    """Heads (term, index, kind, size) and the payloads, one after the other."""
    heads, payloads = [], []
    for entry in entries:
        heads.append([entry.term, entry.index, entry.kind, len(entry.payload)])
        payloads.append(entry.payload)
    return heads, b"".join(payloads)


def entries_from_wire(heads: Iterable[Any], data: bytes) -> Iterator[LogEntry]:
    offset = 0
    for term, index, kind, size in heads:
        yield LogEntry(term, index, kind, bytes(data[offset : offset + size]))
        offset += size
    if offset != len(data):
        raise Corrupt(f"{len(data)} bytes of entries; their heads say {offset}")


def pack_members(members: tuple[str, ...], copies_min: int) -> bytes:
    """The payload of a configuration entry."""
    payload: bytes = msgpack.packb([list(members), copies_min], use_bin_type=True)
    return payload


def unpack_members(entry: LogEntry) -> Configuration:
    """The configuration that an entry of that kind makes."""
    members, copies_min = msgpack.unpackb(entry.payload)
    return Configuration(tuple(members), int(copies_min), entry.index, entry.term)

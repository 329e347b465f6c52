"""A log without a leader: commands in the order of their time stamps, whatever the order in which they arrive. Pure.

An entry is known by its *origin* (one life of one node) and its *number* there, from 1 on without gaps. So what a
replica holds is told by one number for each origin, a *version vector*, and what another one lacks follows from it
(Parker et al., "Detection of Mutual Inconsistency in Distributed Systems", IEEE TSE 1983; as used by Terry et al.,
"Managing Update Conflicts in Bayou", SOSP 1995, section 4.3). Two logs with the same vector are equal.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgpack

from gostore.core.errors import Corrupt

Vector = Mapping[str, int]

BATCH_SIZE_BYTES_MAX: Final = 256 * 1024
"""Entries sent in one message (one larger entry goes alone)."""
BATCH_ENTRIES_MAX: Final = 1024


class Stamped(NamedTuple):
    """Ordered by ``stamp``, a hybrid logical time; equal ones by origin and number."""

    stamp: int
    origin: str
    number: int
    payload: bytes

    @property
    def name(self) -> tuple[str, int]:
        return self.origin, self.number


class StampedLog:
    """``entries`` in the order of their stamps. ``vector``: origin -> the number of entries that are here."""

    def __init__(self) -> None:
        self.entries: list[Stamped] = []
        self.size_bytes = 0
        self._by_origin: dict[str, list[Stamped]] = {}

    @property
    def vector(self) -> dict[str, int]:
        return {origin: len(entries) for origin, entries in self._by_origin.items()}

    def count(self, origin: str) -> int:
        return len(self._by_origin.get(origin, ()))

    def is_next(self, entry: Stamped) -> bool:
        """Whether it can be added: it is not here, and the one before it of the same origin is."""
        return entry.number == self.count(entry.origin) + 1

    def add(self, entry: Stamped) -> int:
        """The place that it takes among the entries. Only for one that :meth:`is_next`."""
        assert self.is_next(entry), f"entry {entry.number} of {entry.origin} after {self.count(entry.origin)}"
        self._by_origin.setdefault(entry.origin, []).append(entry)
        self.size_bytes += len(entry.payload)
        place = bisect(self.entries, entry)
        self.entries.insert(place, entry)
        return place

    def covers(self, vector: Vector) -> bool:
        """Whether everything that ``vector`` counts is here."""
        return all(self.count(origin) >= number for origin, number in vector.items())

    def lacking(self, vector: Vector) -> list[Stamped]:
        """What somebody with this vector does not have; as much as fits into a message, each origin in its order."""
        found: list[Stamped] = []
        size = 0
        for origin, entries in self._by_origin.items():
            for entry in entries[vector.get(origin, 0) :]:
                size += len(entry.payload)
                if found and (size > BATCH_SIZE_BYTES_MAX or len(found) >= BATCH_ENTRIES_MAX):
                    return found
                found.append(entry)
        return found


def to_wire(entries: Iterable[Stamped]) -> tuple[list[list[Any]], bytes]:
    """Heads (stamp, origin, number, size) and the payloads, one after the other."""
    heads, payloads = [], []
    for entry in entries:
        heads.append([entry.stamp, entry.origin, entry.number, len(entry.payload)])
        payloads.append(entry.payload)
    return heads, b"".join(payloads)


def from_wire(heads: Iterable[Any], data: bytes) -> Iterator[Stamped]:
    """Raises ``Corrupt`` when heads and data are not of the same length."""
    offset = 0
    for stamp, origin, number, size in heads:
        yield Stamped(int(stamp), str(origin), int(number), bytes(data[offset : offset + size]))
        offset += size
    if offset != len(data):
        raise Corrupt(f"{len(data)} bytes of entries; their heads say {offset}")


def pack_entry(entry: Stamped) -> bytes:
    """As it lies on the disk."""
    packed: bytes = msgpack.packb(list(entry), use_bin_type=True)
    return packed


def unpack_entry(packed: bytes) -> Stamped:
    """Raises ``Corrupt``."""
    try:
        stamp, origin, number, payload = msgpack.unpackb(packed)
        return Stamped(int(stamp), str(origin), int(number), bytes(payload))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Corrupt(f"an entry of a quorum's log cannot be read: {error}") from error

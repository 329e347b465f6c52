"""What the replicas of a group say to one another, and the entries of their log. Pure.

A message names neither its group nor its sender nor its receiver: the driver's frame does. Every message has a *term*.
``to_wire`` gives a list for msgpack; :func:`message_from_wire` refuses with ``ValueError`` whatever ``to_wire`` of a
working replica cannot have made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, Final, NamedTuple

from gostore.consensus.configuration import Configuration
from gostore.consensus.tunables import APPEND_ENTRIES_MAX, CHUNK_SIZE_BYTES_MAX

COMMAND: Final = 0
"""Kind of an entry: a command of the state machine."""
CONFIGURATION: Final = 1
"""Kind of an entry: a packed :class:`Configuration`."""
NOOP: Final = 2
"""Kind of an entry: a leader's first one. With it, everything before is committed (Raft, 5.4.2 and 8)."""

_payload = itemgetter(3)

NUMBER_MAX: Final = (1 << 63) - 1


class Entry(NamedTuple):
    term: int
    index: int  # type: ignore[assignment]  # tuple.index is not missed here
    kind: int
    payload: bytes


class Point(NamedTuple):
    """A place in a log: the entry with this index has this term. Two logs that share a point are equal up to it."""

    index: int  # type: ignore[assignment]
    term: int


ORIGIN: Final = Point(0, 0)
"""Before the first entry of any log."""


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= NUMBER_MAX:
        raise ValueError(f"not a number of the protocol: {value!r:.50}")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"not a flag: {value!r:.50}")
    return value


def _point(value: Any) -> Point:
    index, term = value
    return Point(_number(index), _number(term))


def _bytes(value: Any, size_max: int | None = None) -> bytes:
    if not isinstance(value, bytes) or (size_max is not None and len(value) > size_max):
        raise ValueError(f"not bytes, or more than {size_max}: {value!r:.50}")
    return value


@dataclass(frozen=True, slots=True)
class Vote:
    """May I lead in this term? ``last``: the candidate's last entry.

    ``pre``: nobody's term changes yet, I only ask whether I would win (Ongaro: "Consensus: Bridging Theory and
    Practice", 2014, section 9.6). ``transfer``: the leader itself told me to, so do not protect it.
    """

    TAG: ClassVar[int] = 1
    term: int
    last: Point
    pre: bool = False
    transfer: bool = False

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, list(self.last), self.pre, self.transfer]

    @classmethod
    def from_fields(cls, term: Any, last: Any, pre: Any, transfer: Any) -> Vote:
        return cls(_number(term), _point(last), _flag(pre), _flag(transfer))


@dataclass(frozen=True, slots=True)
class VoteReply:
    """``term``: the one that was asked about when granted, the voter's own when not."""

    TAG: ClassVar[int] = 2
    term: int
    granted: bool
    pre: bool = False

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.granted, self.pre]

    @classmethod
    def from_fields(cls, term: Any, granted: Any, pre: Any) -> VoteReply:
        return cls(_number(term), _flag(granted), _flag(pre))


@dataclass(frozen=True, slots=True)
class Append:
    """``entries`` follow ``previous``, without a gap. ``commit``: the leader's commit index."""

    TAG: ClassVar[int] = 3
    term: int
    previous: Point
    entries: tuple[Entry, ...]
    commit: int

    def to_wire(self) -> list[Any]:
        entries = [[entry.term, entry.kind, entry.payload] for entry in self.entries]
        return [self.TAG, self.term, list(self.previous), entries, self.commit]

    @classmethod
    def from_fields(cls, term: Any, previous: Any, entries: Any, commit: Any) -> Append:
        point = _point(previous)
        if not isinstance(entries, list) or len(entries) > APPEND_ENTRIES_MAX:
            raise ValueError(f"not a list of at most {APPEND_ENTRIES_MAX} entries")
        found, before = [], point.term
        _number(term)
        for index, (own, kind, payload) in enumerate(entries, point.index + 1):
            if type(own) is not int or not before <= own <= term or own == 0:
                raise ValueError(f"entry {index} of term {own!r:.50} after term {before}, sent in term {term}")
            before = own
            if type(kind) is not int or not 0 <= kind <= NUMBER_MAX or type(payload) is not bytes:
                raise ValueError(f"entry {index} is of kind {kind!r:.50} and holds {payload!r:.50}")
            if kind == CONFIGURATION and not Configuration.unpack(payload).voters:
                raise ValueError(f"entry {index} is a configuration without voters")
            found.append(Entry(own, index, kind, payload))
        if before > term:
            raise ValueError(f"it follows term {before} and is sent in term {term}")
        return cls(term, point, tuple(found), _number(commit))


@dataclass(frozen=True, slots=True)
class AppendReply:
    """The log here is the leader's up to ``match``, on the medium."""

    TAG: ClassVar[int] = 4
    term: int
    match: int

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.match]

    @classmethod
    def from_fields(cls, term: Any, match: Any) -> AppendReply:
        return cls(_number(term), _number(match))


@dataclass(frozen=True, slots=True)
class AppendReject:
    """What was sent behind ``rejected`` does not fit: that point is not in this log.

    ``hint``: the last place here that may be in the leader's log, as its term is not above that of the rejected point.
    """

    TAG: ClassVar[int] = 5
    term: int
    rejected: int
    hint: Point

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.rejected, list(self.hint)]

    @classmethod
    def from_fields(cls, term: Any, rejected: Any, hint: Any) -> AppendReject:
        return cls(_number(term), _number(rejected), _point(hint))


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """I still lead. ``commit``: what is committed of what the receiver is known to hold.

    ``round``: counts up in a term; an answer to one proves that the receiver followed nobody newer when it came. 0: no
    answer is wanted. ``quiet``: there is nothing to do; stop your timer if you hold and know all of it.
    """

    TAG: ClassVar[int] = 6
    term: int
    commit: int
    round: int = 0
    quiet: bool = False

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.commit, self.round, self.quiet]

    @classmethod
    def from_fields(cls, term: Any, commit: Any, number: Any, quiet: Any) -> Heartbeat:
        return cls(_number(term), _number(commit), _number(number), _flag(quiet))


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """``quiet``: the timer here has been stopped."""

    TAG: ClassVar[int] = 7
    term: int
    round: int
    quiet: bool = False

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.round, self.quiet]

    @classmethod
    def from_fields(cls, term: Any, number: Any, quiet: Any) -> HeartbeatReply:
        return cls(_number(term), _number(number), _flag(quiet))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part ``number`` (from 0) of snapshot ``snapshot`` (a number of the leader's own in its term).

    The snapshot is the state after the entry ``point``, with the configuration in force there. The last chunk is
    ``done`` and has no data.
    """

    TAG: ClassVar[int] = 8
    term: int
    snapshot: int
    point: Point
    configuration: Configuration
    number: int
    data: bytes
    done: bool

    def to_wire(self) -> list[Any]:
        configuration = self.configuration.to_wire()
        return [
            self.TAG, self.term, self.snapshot, list(self.point), configuration, self.number, self.data, self.done,
        ]  # fmt: skip

    @classmethod
    def from_fields(
        cls, term: Any, snapshot: Any, point: Any, configuration: Any, number: Any, data: Any, done: Any
    ) -> Chunk:
        found, at = Configuration.from_wire(configuration), _point(point)
        if not found.voters or at.index == 0 or not 0 < at.term <= _number(term):
            raise ValueError(f"not the point of a snapshot, or without voters: {at}, term {term}, {found}")
        if _flag(done) and data != b"":
            raise ValueError("the end of a snapshot with data")
        piece = _bytes(data, CHUNK_SIZE_BYTES_MAX)
        return cls(term, _number(snapshot), at, found, _number(number), piece, done)


@dataclass(frozen=True, slots=True)
class ChunkReply:
    """All chunks below ``wanted`` are on the medium; 0: begin (again)."""

    TAG: ClassVar[int] = 9
    term: int
    snapshot: int
    wanted: int

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.snapshot, self.wanted]

    @classmethod
    def from_fields(cls, term: Any, snapshot: Any, wanted: Any) -> ChunkReply:
        return cls(_number(term), _number(snapshot), _number(wanted))


@dataclass(frozen=True, slots=True)
class TimeoutNow:
    """You have everything: stand at once (Ongaro 2014, section 3.10)."""

    TAG: ClassVar[int] = 10
    term: int

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term]

    @classmethod
    def from_fields(cls, term: Any) -> TimeoutNow:
        return cls(_number(term))


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A follower asks for a read index. ``number``: of its own, never used again by any of its lives."""

    TAG: ClassVar[int] = 11
    term: int
    number: int

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.number]

    @classmethod
    def from_fields(cls, term: Any, number: Any) -> ReadRequest:
        return cls(_number(term), _number(number))


@dataclass(frozen=True, slots=True)
class ReadReply:
    """``index``: apply that much and read; None: not from me, ask again."""

    TAG: ClassVar[int] = 12
    term: int
    number: int
    index: int | None

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term, self.number, self.index]

    @classmethod
    def from_fields(cls, term: Any, number: Any, index: Any) -> ReadReply:
        return cls(_number(term), _number(number), None if index is None else _number(index))


@dataclass(frozen=True, slots=True)
class Stale:
    """You speak in an old term; this is mine."""

    TAG: ClassVar[int] = 13
    term: int

    def to_wire(self) -> list[Any]:
        return [self.TAG, self.term]

    @classmethod
    def from_fields(cls, term: Any) -> Stale:
        return cls(_number(term))


Message = (
    Vote | VoteReply | Append | AppendReply | AppendReject | Heartbeat | HeartbeatReply | Chunk | ChunkReply
    | TimeoutNow | ReadRequest | ReadReply | Stale
)  # fmt: skip

MESSAGES: Final[tuple[type[Message], ...]] = (
    Vote, VoteReply, Append, AppendReply, AppendReject, Heartbeat, HeartbeatReply, Chunk, ChunkReply, TimeoutNow,
    ReadRequest, ReadReply, Stale,
)  # fmt: skip

_BY_TAG: Final = {kind.TAG: kind for kind in MESSAGES}


def message_from_wire(wire: Any) -> Message:
    """Raises ``ValueError`` on anything that ``to_wire`` of a working replica did not make."""
    match wire:
        case [int(tag), *fields] if tag in _BY_TAG:
            make: Any = _BY_TAG[tag].from_fields
            try:
                message: Message = make(*fields)
            except (ValueError, TypeError) as error:
                raise ValueError(f"not a {_BY_TAG[tag].__name__}: {error}") from error
            if message.term == 0:
                raise ValueError(f"a {_BY_TAG[tag].__name__} of term 0")
            return message
    raise ValueError(f"not a message of the protocol: {wire!r:.100}")


def size_of(entries: Iterable[Entry]) -> int:
    """Their payloads, in bytes."""
    return sum(map(len, map(_payload, entries)))

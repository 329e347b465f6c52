"""The key-value interface: what a service (fs, say) or a client is given of db, and nothing more.

A container holds objects: a key (a string; keys sort by code point, which is also the order of their UTF-8 bytes) and
any nested value (null, boolean, integer, float, string, bytes, arrays, maps with string keys). Objects are spread over
shards; where a container names a ``separator``, the shard is that of the part of the key before the first separator, so
that all keys ``"<directory>/..."`` live together.

Every object has a *version*: the index in its shard's log of the commit that wrote it, so versions of one shard only
grow. Version 0 means absent. A transaction is optimistic: it tells :meth:`KeyValue.commit` what it read (points and
ranges, with the versions it saw) and what it writes; the commit happens as a whole if nothing of what was read has
changed or is locked, and otherwise raises ``Conflict`` and changes nothing. ``gostore.core.transaction`` keeps these
lists for you.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from gostore.core.errors import BadRequest

Value = Any
"""None, bool, int (64 bit), float, str, bytes, list of these, or dict from str to these."""

Path = tuple[str | int, ...]
"""Accessors from the root of a value inwards: a name walks into a map, a number into an array."""

Operation = Literal["set", "delete", "add"]
OPERATIONS: tuple[Operation, ...] = ("set", "delete", "add")

SCAN_LIMIT_MAX = 1024
"""Entries one scan may return. Larger: fewer round trips; smaller: smaller answers and shorter turns of the loop."""


def path_from_wire(wire: Any) -> Path:
    """Raises ``BadRequest`` unless ``wire`` is a sequence of strings and integers."""
    if wire == []:  # most often
        return ()
    if isinstance(wire, (list, tuple)) and all(
        isinstance(part, (str, int)) and not isinstance(part, bool) for part in wire
    ):
        return tuple(wire)
    raise BadRequest(f"path = {wire!r:.100}: expected an array of names and numbers")


class PointRead(NamedTuple):
    """``key`` had ``version`` when it was read; 0: it was absent. Also the way to write "only if absent"."""

    container: str
    key: str
    version: int = 0

    def to_wire(self) -> list[Any]:
        return ["p", self.container, self.key, self.version]


@dataclass(frozen=True, slots=True)
class RangeRead:
    """The keys ``start <= key < end`` of one shard were ``count`` entries, the newest of ``version_max`` (0: none).

    The two numbers are an exact fingerprint, because versions only grow: whatever is set raises the greatest version,
    and what is deleted lowers the count. ``end`` may be None: no upper bound.
    """

    container: str
    start: str
    end: str | None
    shard: int
    count: int
    version_max: int

    def to_wire(self) -> list[Any]:
        return ["r", self.container, self.start, self.end, self.shard, self.count, self.version_max]


Read = PointRead | RangeRead


def read_from_wire(wire: Any) -> Read:
    """Raises ``BadRequest`` on anything that ``to_wire`` did not make."""
    match wire:
        case ["p", str(container), str(key), int(version)] if version >= 0:
            return PointRead(container, key, version)
        case ["r", str(container), str(start), (str() | None) as end, int(shard), int(count), int(newest)]:
            return RangeRead(container, start, end, shard, count, newest)
    raise BadRequest(
        f"not a read: {wire!r:.200}; expected ['p', container, key, version] "
        "or ['r', container, start, end, shard, count, version_max]"
    )


class Write(NamedTuple):
    """One change. With an empty path it concerns the whole object, otherwise the place inside it.

    ``set`` stores ``value`` (creating what is missing on the way), ``delete`` removes (absent is fine), ``add`` adds
    the number ``value`` to the number that is there (absent counts as 0). Places are evaluated when the commit is
    applied, so two blind ``add`` never conflict.
    """

    operation: Operation
    container: str
    key: str
    value: Value = None
    path: Path = ()

    def to_wire(self) -> list[Any]:
        return [self.operation, self.container, self.key, list(self.path), self.value]

    @classmethod
    def from_wire(cls, wire: Any) -> Write:
        """Raises ``BadRequest`` on anything that :meth:`to_wire` did not make."""
        match wire:
            case [("set" | "delete" | "add") as operation, str(container), str(key), path, value]:
                return cls(operation, container, key, value, path_from_wire(path))
        raise BadRequest(
            f"not a write: {wire!r:.200}; expected ['set' | 'delete' | 'add', container, key, path, value]"
        )


class RequestId(NamedTuple):
    """Names one commit of one client for ever; the log keeps its outcome, so that a retry is applied once.

    ``settled_below``: the client waits for none of its commits with a smaller number any more; so none of them, should
    it still be on its way, is executed from now on, and their outcomes need not be kept (Ongaro 2014, 6.3). 0: it does
    not say, and only the latest outcomes are kept. :class:`RequestIds` counts that.
    """

    client: str
    sequence: int
    settled_below: int = 0

    def to_wire(self) -> list[Any]:
        return [self.client, self.sequence, self.settled_below]

    @classmethod
    def from_wire(cls, wire: Any) -> RequestId:
        match wire:
            case [str(client), int(sequence)] if client and sequence >= 0:
                return cls(client, sequence)
            case [str(client), int(sequence), int(settled)] if client and sequence >= settled >= 0:
                return cls(client, sequence, settled)
        raise BadRequest(
            f"request_id = {wire!r:.100}: expected [client, sequence] or [client, sequence, first sequence not settled]"
        )


class RequestIds:
    """The request ids of one client, whose name nobody else ever has, and which of them it still waits for."""

    def __init__(self, client: str) -> None:
        self.client = client
        self._last = 0
        self._open: dict[int, None] = {}  # ascending

    def new(self) -> RequestId:
        """It is waited for until :meth:`settle`."""
        self._last += 1
        self._open[self._last] = None
        return RequestId(self.client, self._last, next(iter(self._open)))

    def settle(self, request: RequestId) -> None:
        """Its outcome is known, or nobody will ask for it again."""
        self._open.pop(request.sequence, None)


@dataclass(frozen=True, slots=True)
class Versioned:
    """The answer to a read: the value, the object's version (0: absent), and whether the path led anywhere.

    ``shard`` and ``index`` say which state was read: that of this shard after this index of its log.
    """

    value: Value
    version: int
    found: bool
    shard: int
    index: int

    def to_wire(self) -> list[Any]:
        return [self.value, self.version, self.found, self.shard, self.index]

    @classmethod
    def from_wire(cls, wire: Any) -> Versioned:
        value, version, found, shard, index = wire
        return cls(value, version, found, shard, index)


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    value: Value
    version: int


@dataclass(frozen=True, slots=True)
class Page:
    """The answer to a scan, in key order.

    ``next_start``: where to go on, None at the end. ``ranges``: what was read, ready to be given to ``commit``.
    ``snapshot``: shard -> index of the state that was read there.
    """

    entries: tuple[Entry, ...]
    next_start: str | None
    ranges: tuple[RangeRead, ...] = ()
    snapshot: Mapping[int, int] = field(default_factory=dict)

    def to_wire(self) -> list[Any]:
        return [
            [[entry.key, entry.value, entry.version] for entry in self.entries],
            self.next_start,
            [read.to_wire() for read in self.ranges],
            [[shard, index] for shard, index in self.snapshot.items()],
        ]

    @classmethod
    def from_wire(cls, wire: Any) -> Page:
        entries, next_start, ranges, snapshot = wire
        reads = (read_from_wire(read) for read in ranges)
        return cls(
            tuple(Entry(*entry) for entry in entries),
            next_start,
            tuple(read for read in reads if isinstance(read, RangeRead)),
            {shard: index for shard, index in snapshot},
        )


@dataclass(frozen=True, slots=True)
class Change:
    """What a commit did to one object, as a watch tells it (``gostore.client.watch``).

    ``version``: the index of the commit in the log of ``shard``; so versions of one shard only grow.
    ``deleted``: the object was removed, and ``value`` is None.
    """

    container: str
    key: str
    version: int
    shard: int
    value: Value = None
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit happened. ``versions``: shard -> the version that everything written there now has."""

    versions: Mapping[int, int]

    @property
    def version(self) -> int:
        """The version of what was written, when that was in one shard (else the greatest of them; 0: no write)."""
        return max(self.versions.values(), default=0)

    def to_wire(self) -> list[Any]:
        return [[shard, index] for shard, index in self.versions.items()]

    @classmethod
    def from_wire(cls, wire: Any) -> Committed:
        return cls({shard: index for shard, index in wire})


class KeyValue(Protocol):
    """db, as anybody may use it: in a node's own process (fs) or over the wire (clients).

    All raise ``NotFound`` for an unknown container, ``Unavailable`` (definite) when a shard has no working primary
    within the time, ``Timeout`` (indefinite) when no answer came. ``timeout_s``: None means the configured one, or what
    remains of the call that is being served.
    """

    async def create_container(
        self, name: str, *, separator: str | None = None, replication: str | None = None
    ) -> None:
        """Idempotent for the same options; ``AlreadyExists`` for others."""
        ...

    async def containers(self) -> dict[str, dict[str, Any]]:
        """Name -> options, sorted by name."""
        ...

    async def get(
        self,
        container: str,
        key: str,
        path: Path = (),
        *,
        snapshot: Mapping[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Versioned:
        """Read one object or a place in it. Absent is no error: see ``version`` and ``found``.

        With a ``snapshot`` (shard -> index) the state of that index is read; ``Conflict`` when it is no longer kept.
        """
        ...

    async def scan(
        self,
        container: str,
        prefix: str = "",
        *,
        start: str = "",
        end: str | None = None,
        limit: int = SCAN_LIMIT_MAX,
        snapshot: Mapping[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Page:
        """Up to ``limit`` entries with ``prefix`` and ``start <= key < end``, in key order.

        One shard when the prefix contains the container's separator (or all keys with that prefix share a shard),
        otherwise all of them. Go on with ``start=page.next_start``.
        """
        ...

    async def commit(
        self,
        reads: Iterable[Read],
        writes: Sequence[Write],
        *,
        request_id: RequestId | None = None,
        repeated: bool = False,
        timeout_s: float | None = None,
    ) -> Committed:
        """Validate the reads and perform the writes, all or nothing; durable on the replicas when it returns.

        Raises ``Conflict`` (definite: nothing happened, run the transaction again), ``WrongType``, ``TooLarge``,
        ``BadRequest``. Give a ``request_id`` to repeat a commit whose outcome you do not know: it is applied once. Say
        that it is ``repeated`` then: so a failure, also a ``Conflict``, is told as definite only when it is one of all
        attempts, and a request that is so old that its outcome is kept no longer raises ``Forgotten``.
        """
        ...


def prefix_end(prefix: str) -> str | None:
    """The smallest string greater than every string with ``prefix``; None when there is none.

    Surrogates are skipped, because they are no characters of a key.
    """
    for position in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[position])
        if code < 0x10FFFF:
            following = 0xE000 if 0xD7FF <= code < 0xE000 else code + 1
            return prefix[:position] + chr(following)
    return None

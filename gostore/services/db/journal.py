"""The durable side of one replica of one shard: its log, its snapshots and its promises, as records in the node's log.

Theory of operation
===================

The node's write-ahead log numbers the records of a group by *position*. A replica needs more than its entries there: it
also truncates, promises generations and installs snapshots. So a position is only that, and an entry carries its own
index. The records of a group, in the order in which they are replayed:

``ENTRY``      one entry of the shard's log; its index follows that of the last one, or it repeats one that is known
``TRUNCATE``   the entries from this index on are void
``PROMISE``    the replica will not follow any generation below this one
``BEGIN``      a snapshot starts: (index, term) of its last entry, the configuration there, whether it *resets* the log
``PIECE``      a part of it; entries may lie between the pieces
``END``        it is complete: from here on it stands for all entries up to its index

A snapshot is a *compaction* of what the replica has applied, or was *installed* from another replica (then it resets
the log, as nothing of it is known to fit). When ``END`` is on the medium, all positions below ``BEGIN`` are dropped;
what of them is still needed (entries after the snapshot's index, the promises) is written again right behind ``BEGIN``.
A snapshot without ``END`` was interrupted, and is skipped by the replay: nothing was dropped for it.

In memory are the entries that are not applied, and a window of applied ones for replicas that lag a little.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgpack

from gostore.core.errors import Corrupt, NotSupported
from gostore.services.db.entries import (
    CONFIGURATION,
    Configuration,
    LogEntry,
    Point,
    Promise,
    Run,
    remember,
    unpack_members,
)
from gostore.storage.wal import Wal

ENTRY, TRUNCATE, PROMISE, BEGIN, PIECE, END = range(6)

HEAD_FIELDS: Final = 4
"""Of a ``BEGIN``. A later format has more of them, by which it is recognised."""

WINDOW_ENTRIES_MAX: Final = 1024
"""Applied entries kept in memory for lagging replicas; whoever lags more gets a snapshot."""
WINDOW_SIZE_BYTES_MAX: Final = 512 * 1024

_INDEX = struct.Struct("<Q")
_ENTRY = struct.Struct("<QB")


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


class Journal:
    """The log of one replica. Changes are durable after ``wal.sync()``, and not before.

    ``start``: the point before the first entry in memory. ``restore`` is given the pieces of the snapshot at opening.
    Raises ``Corrupt`` for records that do not follow from one another.
    """

    def __init__(self, wal: Wal, group: int, restore: Callable[[list[bytes]], None]) -> None:
        self._wal = wal
        self._group = group
        self.start = Point(0, 0)
        self._entries: deque[LogEntry] = deque()
        self._window_size = 0
        self._configurations: list[Configuration] = []
        self.promises: tuple[Promise, ...] = ()
        self.size_since_snapshot = 0
        self.entries_since_snapshot = 0
        self._snapshot_position = 0
        self._installing: tuple[Point, Configuration | None] = (Point(0, 0), None)
        self._replay(restore)

    # what there is

    @property
    def last(self) -> Point:
        return Point(self._entries[-1].index, self._entries[-1].term) if self._entries else self.start

    @property
    def configuration(self) -> Configuration | None:
        """The latest one in the log, committed or not."""
        return self._configurations[-1] if self._configurations else None

    def configuration_at(self, index: int) -> Configuration | None:
        """The one in force at an applied index."""
        found = [configuration for configuration in self._configurations if configuration.index <= index]
        return found[-1] if found else None

    @property
    def promise(self) -> Promise | None:
        """The newest one."""
        return self.promises[-1] if self.promises else None

    @property
    def empty(self) -> bool:
        return self.last.index == 0

    def term(self, index: int) -> int | None:
        """None when the entry is not in memory (and is not the one before)."""
        if index == self.start.index:
            return self.start.term
        place = index - self.start.index - 1
        return self._entries[place].term if 0 <= place < len(self._entries) else None

    def entry(self, index: int) -> LogEntry:
        return self._entries[index - self.start.index - 1]

    def runs(self) -> list[Run]:
        """The terms of what is in memory, the point before it included; in order."""
        runs = [Run(self.start.term, self.start.index, self.start.index)]
        for entry in self._entries:
            if entry.term == runs[-1].term:
                runs[-1] = runs[-1]._replace(last=entry.index)
            else:
                runs.append(Run(entry.term, entry.index, entry.index))
        return runs

    # changes

    def append(self, entry: LogEntry) -> None:
        """Raises what the node's log raises (``Unavailable``, ``TooLarge``); then nothing is changed."""
        assert entry.index == self.last.index + 1, f"entry {entry.index} after {self.last.index}"
        self._write(ENTRY, _ENTRY.pack(entry.index, entry.kind) + entry.payload, entry.term)
        self._take(entry)

    def _take(self, entry: LogEntry) -> None:
        self._entries.append(entry)
        self._window_size += len(entry.payload)
        self.size_since_snapshot += len(entry.payload)
        self.entries_since_snapshot += 1
        if entry.kind == CONFIGURATION:
            self._configurations.append(unpack_members(entry))

    def truncate(self, index: int) -> None:
        """Drop the entries from ``index`` on."""
        if index <= self.last.index:
            self._write(TRUNCATE, _INDEX.pack(index))
            self._drop_from(index)

    def _drop_from(self, index: int) -> None:
        while self._entries and self._entries[-1].index >= index:
            self._window_size -= len(self._entries.pop().payload)
        while self._configurations and self._configurations[-1].index >= index:
            self._configurations.pop()

    def make_promise(self, promise: Promise) -> None:
        if self.promise != promise:
            self._write(PROMISE, _pack(promise.to_wire()))
            self.promises = remember(self.promises, promise)

    def trim(self, applied: int) -> None:
        """Forget applied entries beyond the window; they stay in the node's log until the next snapshot."""
        while (
            self._entries
            and self._entries[0].index <= applied
            and (len(self._entries) > WINDOW_ENTRIES_MAX or self._window_size > WINDOW_SIZE_BYTES_MAX)
        ):
            entry = self._entries.popleft()
            self._window_size -= len(entry.payload)
            self.start = Point(entry.index, entry.term)
        while len(self._configurations) > 1 and self._configurations[1].index <= applied:
            del self._configurations[0]

    # snapshots

    def begin_compaction(self, at: Point) -> None:
        """A snapshot of the applied state at ``at`` follows: :meth:`add_piece` and :meth:`end_snapshot`."""
        self._begin(at, self.configuration_at(at.index), reset=False)
        for entry in self._entries:
            if entry.index > at.index:
                self._write(ENTRY, _ENTRY.pack(entry.index, entry.kind) + entry.payload, entry.term)

    def begin_installation(self, at: Point, configuration: Configuration | None) -> None:
        """A snapshot from elsewhere follows; at its end the log consists of it alone."""
        self._begin(at, configuration, reset=True)
        self._installing = (at, configuration)

    def _begin(self, at: Point, configuration: Configuration | None, *, reset: bool) -> None:
        self._snapshot_position = self._wal.last_index(self._group) + 1
        found = None if configuration is None else configuration.to_wire()
        self._write(BEGIN, _pack([at.index, at.term, found, reset]))
        for promise in self.promises:
            self._write(PROMISE, _pack(promise.to_wire()))

    def add_piece(self, piece: bytes) -> None:
        self._write(PIECE, piece)

    async def end_snapshot(self, *, reset: bool) -> None:
        """The snapshot is complete; returns when it is on the medium and what it replaces is dropped."""
        position = self._snapshot_position
        self._write(END, b"")
        if reset:
            self._reset(*self._installing)
        self.size_since_snapshot = 0
        self.entries_since_snapshot = 0
        await self._wal.sync()
        self._wal.truncate_prefix(self._group, position)

    def _reset(self, at: Point, configuration: Configuration | None) -> None:
        self.start = at
        self._entries.clear()
        self._window_size = 0
        self._configurations = [] if configuration is None else [configuration]

    async def clear(self) -> None:
        """Forget everything but the promises: this node holds the shard no longer."""
        self._begin(Point(0, 0), None, reset=True)
        self._installing = (Point(0, 0), None)
        await self.end_snapshot(reset=True)

    def _write(self, kind: int, payload: bytes, term: int = 0) -> None:
        self._wal.append(self._group, term, self._wal.last_index(self._group) + 1, payload, kind)

    # replay

    def _replay(self, restore: Callable[[list[bytes]], None]) -> None:
        replay = _Replay(self)
        for record in self._wal.records(self._group):
            replay.take(record.kind, record.term, record.payload)
        replay.finish(restore)


class _Replay:
    """Builds a journal from its records."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._first = True
        self._begun: tuple[Point, Configuration | None, bool] | None = None
        self._pieces: list[bytes] = []
        self._complete: list[bytes] | None = None
        self._needs_end = False

    def take(self, kind: int, term: int, payload: bytes) -> None:
        journal = self._journal
        if kind == ENTRY:
            index, entry_kind = _ENTRY.unpack_from(payload)
            self._entry(LogEntry(term, index, entry_kind, payload[_ENTRY.size :]))
        elif kind == TRUNCATE:
            journal._drop_from(_INDEX.unpack(payload)[0])
        elif kind == PROMISE:
            journal.promises = remember(journal.promises, Promise.from_wire(msgpack.unpackb(payload)))
        elif kind == BEGIN:
            self._begin(payload)
        elif kind == PIECE and self._begun is not None:
            self._pieces.append(payload)
        elif kind == END and self._begun is not None:
            self._end()
        else:
            raise Corrupt(f"group {journal._group}: a record of kind {kind} where none can be")
        self._first = False

    def _entry(self, entry: LogEntry) -> None:
        journal = self._journal
        if entry.index <= journal.last.index:
            known = journal.term(entry.index)
            if known is not None and known != entry.term:
                raise Corrupt(f"group {journal._group}: entry {entry.index} has two terms, {known} and {entry.term}")
            return
        if entry.index != journal.last.index + 1:
            raise Corrupt(f"group {journal._group}: entry {entry.index} follows {journal.last.index}")
        journal._take(entry)

    def _begin(self, payload: bytes) -> None:
        head = msgpack.unpackb(payload)
        if len(head) != HEAD_FIELDS:
            raise NotSupported(
                f"the log of group {self._journal._group} has a head of {len(head)} fields; this release reads "
                f"{HEAD_FIELDS}: run the release that wrote it"
            )
        index, term, found, reset = head
        configuration = None if found is None else Configuration.from_wire(found)
        self._begun = (Point(index, term), configuration, reset)
        self._pieces = []
        if self._first and not reset:
            # What was before is dropped, so the snapshot is complete, and entries behind it follow its index.
            self._journal._reset(Point(index, term), configuration)
            self._needs_end = True

    def _end(self) -> None:
        assert self._begun is not None
        point, configuration, reset = self._begun
        journal = self._journal
        if reset:
            journal._reset(point, configuration)
        elif point.index > journal.start.index:
            kept = [entry for entry in journal._entries if entry.index > point.index]
            journal._reset(point, configuration)
            for entry in kept:
                journal._take(entry)
        journal.entries_since_snapshot = len(journal._entries)
        journal.size_since_snapshot = sum(len(entry.payload) for entry in journal._entries)
        self._complete, self._pieces, self._begun = self._pieces, [], None
        self._needs_end = False

    def finish(self, restore: Callable[[list[bytes]], None]) -> None:
        if self._needs_end:
            raise Corrupt(f"group {self._journal._group}: it begins with a snapshot that has no end")
        if self._complete is not None and self._journal.start.index > 0:
            restore(self._complete)

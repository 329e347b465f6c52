"""The durable side of one replica: hard state, entries and snapshots of its group, as records in the node's log.

Theory of operation
===================

The node's log numbers the records of a group by *position*; an entry carries its own index, because there are other
records too. In the order in which they are replayed:

``ENTRY``      one entry; its index follows that of the last one, or it repeats one that is known
``TRUNCATE``   the entries from this index on are void
``HARD``       term, vote and a hint at what is committed
``BEGIN``      a snapshot of the state that this replica has applied starts; or, at index 0, a group is founded
``PIECE``      a part of it; other records may lie between
``END``        it is complete: it stands for all entries up to its index
``INSTALL``    a snapshot of the leader starts, and voids one that is not complete
``PART``       a part of it
``INSTALLED``  it is complete: it stands for everything

``BEGIN`` and ``INSTALL`` carry the version of this format, the point of the snapshot, the configuration there, the hard
state, and the *tomb* (see :meth:`Journal.clear`). When ``END`` is on the medium, all positions below ``BEGIN`` are
dropped; what of them is needed (entries after the snapshot, some before it for replicas that lag, a snapshot of the
leader that is not complete) is written again right behind ``BEGIN``. ``INSTALLED`` does the same to what is below
``INSTALL``. A ``BEGIN`` without ``END`` was interrupted, and is skipped by the replay: nothing was dropped for it.

Of the entries only their positions are in memory, eight bytes each.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from gostore.consensus.configuration import NOBODY, Configuration
from gostore.consensus.messages import CONFIGURATION, ORIGIN, Entry, Point
from gostore.consensus.pieces import pieces_of
from gostore.consensus.ready import HardState, Restored
from gostore.core.errors import Corrupt, NotSupported
from gostore.storage.wal import Record, Wal

FORMAT: Final = 1
"""Of the records. A log that begins with another one is refused."""

ENTRY, TRUNCATE, HARD, BEGIN, PIECE, END, INSTALL, PART, INSTALLED = range(9)

TAIL_SIZE_BYTES_MAX: Final = 256 * 1024
"""Applied entries that are kept in front of a new snapshot, so that a replica that lags a little needs none."""

_INDEX: Final = struct.Struct("<Q")
_ENTRY: Final = struct.Struct("<QB")


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


@dataclass(slots=True, eq=False)
class Opening:
    """A snapshot that is being written; ``position`` of its first record."""

    position: int
    point: Point
    configuration: Configuration
    parts: list[bytes] = field(default_factory=list)
    tail: int = 0  # index of the first entry that is kept


class Journal:
    """The log of one replica. Changes are durable after ``wal.sync()``, and not before.

    ``start``: the point of the latest complete snapshot, and ``configuration`` in force there; ``first`` .. ``last``:
    the indices of the entries that there are (``first`` may be below ``start``). Opening raises ``Corrupt`` for records
    that do not follow from one another, ``NotSupported`` for another format.
    """

    def __init__(self, wal: Wal, group: int) -> None:
        self._wal = wal
        self.group = group
        self.hard = HardState()
        self.start = ORIGIN
        self.configuration = NOBODY
        self.tomb = ORIGIN
        self.first = 1
        self.size_since_snapshot = 0
        self._positions = array("Q")
        self._compaction: Opening | None = None
        self._installation: Opening | None = None
        self._drop_to = 0
        self._state: list[bytes] = []
        # Of the entries that were found at the opening: (first index, term) for each change of term; configurations.
        self._runs: list[tuple[int, int]] = []
        self._configurations: list[tuple[int, Configuration]] = []
        self._next = wal.last_index(group) + 1  # nobody else writes into this group
        if not self.empty:
            self._replay()

    # what there is

    @property
    def empty(self) -> bool:
        """Nothing was ever written: this replica has promised nothing."""
        return self._wal.last_index(self.group) == 0

    @property
    def last(self) -> int:
        return self.first + len(self._positions) - 1

    @property
    def entries_since_snapshot(self) -> int:
        return max(0, self.last - self.start.index)

    def entries(self, first: int, last: int) -> Iterator[Entry]:
        """The entries ``first`` .. ``last``, read from the log. Raises ``Corrupt``."""
        assert first >= self.first, f"entry {first}: the first one is {self.first}"
        index = first
        while index <= last:
            position = self._positions[index - self.first]
            for record in self._wal.records(self.group, position):
                if record.index != position:
                    continue
                yield _entry(record)
                index += 1
                if index > last or self._positions[index - self.first] < position:
                    break
                position = self._positions[index - self.first]

    def restored(self) -> Restored:
        """What the core begins with, at the opening or after :meth:`clear`: before anything is appended."""
        start = self.start
        runs = [run for run in self._runs if run[1] > start.term]
        configurations = [made for made in self._configurations if made[0] > start.index]
        return Restored(self.hard, start, self.configuration, max(self.last, start.index), runs, configurations)

    def standing(self) -> Iterator[Entry]:
        """The entries behind the snapshot, read from the log. Raises ``Corrupt``."""
        return self.entries(self.start.index + 1, self.last)

    def take_state(self) -> list[bytes]:
        """The pieces of the snapshot at ``start`` that were found at the opening; none: the initial state."""
        state, self._state = self._state, []
        return state

    # changes

    def found(self, configuration: Configuration) -> None:
        """Begin the log of a group whose first members are these; of nobody: of a replica that will be told."""
        assert self.empty
        self.configuration = configuration
        self._open(BEGIN, ORIGIN, configuration)

    def write_hard(self, hard: HardState) -> None:
        self.hard = hard
        self._write(HARD, _pack([hard.term, hard.vote, hard.commit]))

    def append(self, entries: Iterable[Entry]) -> None:
        """Raises what the node's log raises (``Unavailable``, ``TooLarge``); then nothing is changed."""
        records, size, last = [], 0, self.last
        for entry in entries:
            assert entry.index == last + 1, f"entry {entry.index} behind {last}"
            records.append(_entry_record(entry))
            size += len(entry.payload)
            last = entry.index
        self._positions.extend(self._write_all(records))
        self.size_since_snapshot += size

    def truncate(self, index: int) -> None:
        """Void the entries from ``index`` on."""
        if index <= self.last:
            self._write(TRUNCATE, _INDEX.pack(index))
            self._drop_from(index)

    def _drop_from(self, index: int) -> None:
        del self._positions[max(0, index - self.first) :]
        while self._runs and self._runs[-1][0] >= index:
            self._runs.pop()
        while self._configurations and self._configurations[-1][0] >= index:
            self._configurations.pop()

    # snapshots of this replica's own

    def begin_compaction(self, point: Point, configuration: Configuration, tail_max: int) -> Opening:
        """A snapshot of the applied state at ``point`` follows: :meth:`add_piece` and :meth:`end_compaction`.

        ``tail_max``: so many entries before it are kept at most. Raises what the node's log raises: then no snapshot
        of this replica's own is open, and nothing else has changed; what was written is skipped by the replay.
        """
        tail, size = point.index + 1, 0
        kept = list(self.entries(max(self.first, point.index - tail_max + 1), self.last))
        for entry in reversed([entry for entry in kept if entry.index <= point.index]):
            size += len(entry.payload)
            if size > TAIL_SIZE_BYTES_MAX:
                break
            tail = entry.index
        self._compaction = None  # the record voids one that is open
        compaction = self._open(BEGIN, point, configuration)
        compaction.tail = tail
        entries, installation = kept[len(kept) - (self.last - tail + 1) :], self._installation
        records = [_entry_record(entry) for entry in entries]
        if installation is not None:
            records.append((0, INSTALL, self._head(installation.point, installation.configuration)))
            records += [(0, PART, part) for part in installation.parts]
        # All or none: behind an INSTALL with some of its parts, the next one to come would not follow the last. And not
        # in one with BEGIN: the first that waits for the disk is taken at any size.
        written = self._write_all(records)
        self._compaction = compaction
        self._positions[tail - self.first :] = array("Q", written[: len(entries)])
        if installation is not None:
            installation.position = written[len(entries)]
        return compaction

    def is_open(self, compaction: Opening) -> bool:
        """False when a snapshot of the leader has taken its place meanwhile."""
        return self._compaction is compaction

    def add_piece(self, piece: bytes) -> None:
        self._write(PIECE, piece)

    def end_compaction(self) -> int:
        """It is complete. When that is on the medium, :meth:`drop` to the position that this returns."""
        assert self._compaction is not None
        compaction, self._compaction = self._compaction, None
        self._write(END, b"")
        self._compacted(compaction)
        return compaction.position

    def _compacted(self, compaction: Opening) -> None:
        self.start, self.configuration = compaction.point, compaction.configuration
        gone = bisect_left(self._positions, compaction.position)
        self.first = self.first + gone if len(self._positions) > gone else self.start.index + 1
        del self._positions[:gone]
        self.size_since_snapshot = 0

    # snapshots of the leader

    def begin_installation(self, point: Point, configuration: Configuration) -> None:
        self._installation = self._open(INSTALL, point, configuration)

    def add_part(self, part: bytes) -> None:
        assert self._installation is not None
        self._write(PART, part)
        self._installation.parts.append(part)

    def give_up_installation(self) -> None:
        """Nothing more of it will come: keep it no longer."""
        self._installation = None

    def end_installation(self) -> list[bytes]:
        """It stands for everything; returns its pieces. :meth:`take_drop` tells what may go when that is synced."""
        assert self._installation is not None
        pieces = pieces_of(self._installation.parts)
        self._write(INSTALLED, b"")
        self._drop_to = self._installation.position
        self._install(self._installation)
        return pieces

    def _install(self, installation: Opening) -> None:
        self._installation = self._compaction = None
        self.start, self.configuration = installation.point, installation.configuration
        self.first = self.start.index + 1
        self._positions = array("Q")
        self._runs, self._configurations = [], []
        self.size_since_snapshot = 0

    def clear(self, hard: HardState, tomb: Point) -> None:
        """Forget everything but the term. ``tomb``: the last point that was here.

        A replica without its log must not vote before it holds that much again (see :mod:`.group`).
        """
        self.hard, self.tomb = hard, tomb
        self.begin_installation(ORIGIN, NOBODY)
        self.end_installation()

    # dropping

    def take_drop(self) -> int:
        """The position to which :meth:`drop` may go when what is written now is synced; 0: nowhere."""
        position, self._drop_to = self._drop_to, 0
        return position

    def drop(self, position: int) -> None:
        self._wal.truncate_prefix(self.group, position)

    def _open(self, kind: int, point: Point, configuration: Configuration) -> Opening:
        return Opening(self._write(kind, self._head(point, configuration)), point, configuration)

    def _head(self, point: Point, configuration: Configuration) -> bytes:
        hard = [self.hard.term, self.hard.vote, self.hard.commit]
        return _pack([FORMAT, list(point), configuration.to_wire(), hard, list(self.tomb)])

    def _write(self, kind: int, payload: bytes) -> int:
        return self._write_all([(0, kind, payload)])[0]

    def _write_all(self, records: Sequence[tuple[int, int, bytes]]) -> range:
        """(term, kind, payload) of each; returns their positions. If it raises, none is written."""
        begin = self._next
        self._wal.append_all(self.group, begin, records)
        self._next += len(records)
        return range(begin, self._next)

    # replay

    def _replay(self) -> None:
        replay = _Replay(self)
        for record in self._wal.records(self.group):
            replay.take(record)
        position, self._state = replay.finish()
        self.drop(position)


class _Replay:
    """Builds a journal from its records."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._first: Opening | None = None  # the record at the front, until it is complete
        self._began = False
        self._keep_from = 0
        self._state: list[bytes] = []

    def take(self, record: Record) -> None:
        journal, kind, payload = self._journal, record.kind, record.payload
        if not self._began and kind not in (BEGIN, INSTALL):
            raise self._wrong(f"it begins with a record of kind {kind}")
        if self._first is not None and self._first is journal._installation and kind in (ENTRY, TRUNCATE, PIECE, END):
            return  # it belonged to what the snapshot in front is about to replace
        if kind == ENTRY:
            self._entry(record)
        elif kind == TRUNCATE:
            journal._drop_from(_INDEX.unpack(payload)[0])
        elif kind == HARD:
            journal.hard = HardState(*msgpack.unpackb(payload))
        elif kind in (BEGIN, INSTALL):
            self._begin(record)
        elif kind == PIECE and journal._compaction is not None:
            journal._compaction.parts.append(payload)
        elif kind == PART and journal._installation is not None:
            journal._installation.parts.append(payload)
        elif kind == END and journal._compaction is not None:
            compaction, journal._compaction = journal._compaction, None
            self._complete(compaction)
            journal._compacted(compaction)
        elif kind == INSTALLED and journal._installation is not None:
            installation = journal._installation
            self._complete(installation)
            journal._install(installation)
        else:
            raise self._wrong(f"a record of kind {kind} where none can be")

    def _wrong(self, why: str) -> Corrupt:
        return Corrupt(f"the log of group {self._journal.group} is damaged: {why}")

    def _begin(self, record: Record) -> None:
        journal = self._journal
        head = msgpack.unpackb(record.payload)
        if not isinstance(head, list) or head[:1] != [FORMAT]:
            version = head[0] if isinstance(head, list) and head else head
            raise NotSupported(
                f"the log of group {journal.group} has format version {version!r:.20}; this release reads version "
                f"{FORMAT}: run the release that wrote it"
            )
        _, point, configuration, hard, tomb = head
        opening = Opening(record.index, Point(*point), Configuration.from_wire(configuration))
        journal.hard, journal.tomb = HardState(*hard), Point(*tomb)
        if not self._began:
            # What was before it is dropped, so it is complete; entries behind it may be older than its point.
            self._began = True
            journal.start, journal.configuration = opening.point, opening.configuration
            journal.first = opening.point.index + 1
            self._first = opening if opening.point != ORIGIN or record.kind == INSTALL else None
        if record.kind == INSTALL:
            journal._installation = opening
        elif opening.point != ORIGIN:
            journal._compaction = opening

    def _entry(self, record: Record) -> None:
        journal = self._journal
        index, kind = _ENTRY.unpack_from(record.payload)
        if not journal._positions and self._first is not None and 0 < index <= journal.start.index:
            journal.first = index
        place = index - journal.first
        if not 0 <= place <= len(journal._positions):
            raise self._wrong(f"entry {index} follows {journal.last}")
        if place == len(journal._positions):
            journal._positions.append(record.index)
            if index > journal.start.index:
                journal.size_since_snapshot += len(record.payload) - _ENTRY.size
            runs = journal._runs
            if not runs or runs[-1][1] != record.term:
                if runs and runs[-1][1] > record.term:
                    raise self._wrong(f"entry {index} of term {record.term} follows one of term {runs[-1][1]}")
                runs.append((index, record.term))
            if kind == CONFIGURATION:
                journal._configurations.append((index, Configuration.unpack(record.payload[_ENTRY.size :])))
            return
        known = journal._wal.term(journal.group, journal._positions[place])
        if known != record.term:
            raise self._wrong(f"entry {index} has two terms, {known} and {record.term}")
        journal._positions[place] = record.index

    def _complete(self, opening: Opening) -> None:
        try:
            self._state = pieces_of(opening.parts)
        except Corrupt as error:
            raise self._wrong(error.message) from None
        self._keep_from = opening.position
        if opening is self._first:
            self._first = None

    def finish(self) -> tuple[int, list[bytes]]:
        """The position of what is needed, and the state."""
        journal = self._journal
        if self._first is not None:
            raise self._wrong("it begins with a snapshot that has no end")
        # What was interrupted is begun anew; its sender has forgotten how far it was.
        journal._compaction = journal._installation = None
        if journal.last < journal.start.index:
            raise self._wrong(f"it ends at {journal.last}, before its snapshot at {journal.start.index}")
        return self._keep_from, self._state


def _entry_record(entry: Entry) -> tuple[int, int, bytes]:
    return entry.term, ENTRY, _ENTRY.pack(entry.index, entry.kind) + entry.payload


def _entry(record: Record) -> Entry:
    index, kind = _ENTRY.unpack_from(record.payload)
    return Entry(record.term, index, kind, record.payload[_ENTRY.size :])

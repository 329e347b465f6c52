"""The write-ahead log of a node: one log, many groups, one fdatasync for all that wait.

Theory of operation
===================

``append`` and the truncations put a record into a buffer and change the index in memory; nothing is on the disk yet.
``sync`` waits until all that was appended before it is on the medium. One task, the *flusher*, writes the whole buffer
as one batch, syncs the file, releases everybody whose records were in it, and takes the next batch: what is appended
while a sync runs shares the next one (group commit; DeWitt et al., "Implementation Techniques for Main Memory Database
Systems", SIGMOD 1984). So at most one batch is ever unsynced, and every record can state how much before it was safe,
which recovery needs (see :mod:`gostore.storage.segments`).

A write or sync that fails is the end of this log: the kernel may have dropped the pages and call the next sync a
success (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020). Nothing is tried again, all who
wait get an indefinite error, and the node stops (``env.fatal``).

A batch that fills its segment is followed by a *rotation*: the next segment is written under a temporary name, with an
outline of every group at its head, synced, renamed, and the directory synced; only then is it written to.

Segments are deleted from the oldest on, one by one, each deletion on the medium before the next, so that what remains
is always a row without gaps. The *cleaner* does it: a segment without live entries goes at once. A group that is never
truncated would pin its segment, and with it all later ones; so when the log is larger than ``GARBAGE_FACTOR`` times
what lives in it, and some slack, the live entries of the oldest segment are written again at the end, synced, and it
goes too. That is a log-structured cleaner in its simplest order (Rosenblum and Ousterhout, "The Design and
Implementation of a Log-Structured File System", SOSP 1991); as half of what it passes over is garbage, it frees at
least as much as it copies.

Payloads stay on the disk, except those in the buffer; what was written lately is in the page cache, which is better at
keeping it than a second cache here would be.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Self

from gostore.config import KIB, MIB, StorageConfig
from gostore.core.errors import Corrupt, NotFound, TooLarge, Unavailable
from gostore.core.ports import File
from gostore.env import Env
from gostore.storage import segments
from gostore.storage.files import SegmentFiles
from gostore.storage.index import BUFFERED, GroupIndex, LogIndex, location_of, place_of
from gostore.storage.segments import RECORD_SIZE_BYTES, Head, RawRecord, Scan

# Bytes appended and not yet written. Larger: longer bursts are taken while the disk stalls; smaller: less memory.
PENDING_SIZE_BYTES_MAX: Final = 64 * MIB
# The log may grow to this multiple of its live bytes, and by some segments, before live entries are moved. Larger:
# fewer bytes are written twice; smaller: less space is used.
GARBAGE_FACTOR: Final = 2
SLACK_SEGMENTS: Final = 2
# Records the cleaner looks at, and bytes it moves, before others get their turn.
CLEAN_RECORDS_MAX: Final = 256
CLEAN_SIZE_BYTES_MAX: Final = 1 * MIB

# With nothing to write for so long, a note tells that all is on the medium. Shorter: less is in doubt after a power
# cut; longer: a lone writer is disturbed less by it. Seconds.
NOTE_AFTER_S: Final = 0.05

_WRITE_SIZE_BYTES: Final = 1 * MIB
_READ_SIZE_BYTES: Final = 256 * KIB


class Record(NamedTuple):
    """An entry of a group, as it was appended."""

    group: int
    term: int
    index: int  # type: ignore[assignment]  # tuple.index is not missed here
    kind: int
    payload: bytes


class _Segment:
    __slots__ = ("head", "name", "size")

    def __init__(self, name: str, head: Head, size: int) -> None:
        self.name = name
        self.head = head
        self.size = size

    @property
    def filled(self) -> int:
        """Bytes behind the outlines."""
        return self.size - self.head.start


class Wal:
    """Made by :meth:`open`. Indices of a group are consecutive; terms and kinds are the caller's own."""

    def __init__(self, env: Env, config: StorageConfig, directory: str) -> None:
        self._env = env
        self._config = config
        self._files = SegmentFiles(env.disk, directory)
        self._index = LogIndex()
        self._segments: dict[int, _Segment] = {}  # in the order of their numbers
        self._buffer: list[RawRecord] = []
        self._buffer_size = 0
        self._taken = 0  # of the buffer: they are being written
        self._written = 0  # records written, and so the number of the buffer's first
        self._synced = 0  # records synced
        self._synced_size = 0  # of the current segment, in bytes
        self._noted = True  # the current segment ends with a note of that
        self._note_timer: asyncio.TimerHandle | None = None
        self._flushed_s = 0.0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._failed: str | None = None
        self._closing = False
        self._dirty = asyncio.Event()
        self._garbage = asyncio.Event()
        self._flusher: asyncio.Task[Any] | None = None
        self._cleaner: asyncio.Task[Any] | None = None
        self._statistics = dict.fromkeys(("records", "bytes", "syncs", "copied", "deleted", "torn_bytes"), 0)

    # opening and closing

    @classmethod
    async def open(cls, env: Env, config: StorageConfig, directory: str = "wal") -> Self:
        """Recover what is there, or begin a log. All that is found is on the medium when this returns.

        Raises ``Corrupt`` for damage in the middle (file and offset are named), ``NotSupported`` for another format
        version, ``Unavailable`` when the disk fails.
        """
        wal = cls(env, config, directory)
        try:
            await wal._recover()
        except OSError as error:
            wal._files.close()
            wal._fail("opening the log", error)
            raise wal._unusable() from error
        except BaseException:
            wal._files.close()
            raise
        wal._flusher = env.tasks.start(wal._flush_forever(), name="wal-flusher")
        wal._cleaner = env.tasks.start(wal._clean_forever(), name="wal-cleaner")
        wal._garbage.set()
        return wal

    async def close(self) -> None:
        """Sync what was appended and end; call it while the node's tasks still run. A second call does nothing."""
        if self._cleaner is not None:
            self._cleaner.cancel()
            await asyncio.wait([self._cleaner])
        self._closing = True
        self._dirty.set()
        if self._flusher is not None:
            await asyncio.wait([self._flusher])
        self._files.close()

    async def _recover(self) -> None:
        numbers = await self._files.find()
        for number in numbers:
            await self._replay(number, last=number == numbers[-1])
            await asyncio.sleep(0)  # others have their turn
        if (missing := self._index.missing()) is not None:
            why = f"or one before it is gone: entry {missing[1]} of group {missing[0]} is nowhere"
            raise segments.damaged(self._files.name(numbers[0]), 0, why)
        if numbers:
            await self._end_tail()
        else:
            await self._begin(1, [])
        self._env.events.publish(
            "wal_recovered",
            records=sum(entries.next - entries.first for entries in self._index.groups.values()),
            segments=len(self._segments),
            torn_bytes=self._statistics["torn_bytes"],
        )

    async def _replay(self, number: int, *, last: bool) -> None:
        name, oldest = self._files.name(number), not self._segments
        if not oldest and number - 1 not in self._segments:
            raise segments.damaged(self._files.name(number - 1), 0, "as it is missing")
        file = self._files.open(number)
        if last:
            # What a node that was killed wrote and did not sync is good once it is on the medium, and only then. What
            # a failed sync left in the page cache looks the same and will never get there.
            await file.sync()
            file.drop_cache()
        head = segments.decode_head(name, file.read(0, segments.HEAD_SIZE_BYTES))
        if head.number != number:
            raise segments.damaged(name, 0, f"it is segment {head.number} under another name")
        scan = Scan(name, head, file.read, file.size(), last=last)
        replay = self._index.replay
        for offset, record in scan:
            try:
                replay(record, location_of(number, offset), oldest=oldest)
            except ValueError as error:
                raise segments.damaged(name, offset, f"it does not follow from what is before: {error}") from None
        self._segments[number] = _Segment(name, head, scan.end)
        self._statistics["torn_bytes"] += scan.torn

    async def _end_tail(self) -> None:
        """Cut off what is torn, and vouch for the rest."""
        file, size = self._current_file(), self._current.size
        if file.size() > size:
            file.truncate(size)
            # Before anything is written there: what was cut off must not come back between new records.
            await file.sync()
        self._synced_size, self._noted = size, False
        await self._note_synced()

    # appending

    def append(self, group: int, term: int, index: int, payload: bytes, kind: int = 0) -> None:
        """Add an entry; it is durable after the next :meth:`sync`. A group's first entry may have any index.

        Raises ``ValueError`` for an index that is not the next one, ``TooLarge``, and ``Unavailable`` when too much
        waits for the disk or the log has failed; in each case nothing was appended.
        """
        self.append_all(group, index, ((term, kind, bytes(payload)),))

    def append_all(self, group: int, index: int, entries: Sequence[tuple[int, int, bytes]]) -> None:
        """:meth:`append` of each (term, kind, payload), from ``index`` on; all of them or, if it raises, none."""
        size, size_max = 0, self._config.record_size_bytes_max
        for term, kind, payload in entries:
            if len(payload) > size_max:
                raise TooLarge(f"an entry of {len(payload)} bytes; at most {size_max} fit into the log")
            _check_range(group, term, index, kind)
            size += RECORD_SIZE_BYTES + len(payload)
        self._check_room(size - RECORD_SIZE_BYTES)
        place = BUFFERED | (self._written + len(self._buffer))
        append, buffer = self._index.append, self._buffer
        for term, kind, payload in entries:
            append(group, term, index, len(payload), place)
            buffer.append(RawRecord(segments.ENTRY, group, term, index, kind, payload))
            index += 1
            place += 1
        self._buffer_size += size

    def truncate_suffix(self, group: int, index: int) -> None:
        """Void the entries from ``index`` on; it is durable after the next :meth:`sync`.

        Raises ``ValueError`` when ``index`` is below the first one, ``Unavailable`` as :meth:`append`.
        """
        entries = self._index.groups.get(group)
        if entries is None or index >= entries.next:
            return
        if index < entries.first:
            raise ValueError(f"group {group} begins at {entries.first}: nothing before it can be voided")
        self._check_room(0)
        self._push(RawRecord(segments.SUFFIX, group, 0, index, 0, b""))
        self._index.drop_suffix(group, index)
        self._garbage.set()

    def truncate_prefix(self, group: int, index: int) -> None:
        """Drop the entries below ``index``, as they are in a snapshot; it is durable after the next :meth:`sync`.

        An ``index`` beyond the end drops all, and the next entry is ``index``. Raises ``Unavailable`` as
        :meth:`append`.
        """
        _check_range(group, 0, index, 0)
        entries = self._index.groups.get(group)
        if entries is not None and index <= entries.first:
            return
        self._check_room(0)
        self._push(RawRecord(segments.PREFIX, group, 0, index, 0, b""))
        self._index.drop_prefix(group, index)
        self._garbage.set()

    async def sync(self) -> None:
        """Return when all that was appended before the call is on the medium.

        Raises ``Unavailable`` (indefinite: it may be there or not) when the disk has failed; the node is stopping then.
        """
        if self._failed is not None:
            raise self._unusable(definite=False)
        number = self._written + len(self._buffer)
        if self._synced >= number:
            return
        # A future of its own, so that one cancelled caller takes nobody with it.
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((number, future))
        self._dirty.set()
        await future

    def _check_room(self, length: int) -> None:
        """Raises ``Unavailable`` when the log has failed or too much waits for the disk."""
        if self._failed is not None:
            raise self._unusable()
        if self._buffer and self._buffer_size + RECORD_SIZE_BYTES + length > PENDING_SIZE_BYTES_MAX:
            raise Unavailable(f"{self._buffer_size} bytes wait for the disk of {self._env.name}: try again later")

    def _push(self, record: RawRecord) -> None:
        self._buffer.append(record)
        self._buffer_size += RECORD_SIZE_BYTES + len(record.payload)

    # writing

    async def _flush_forever(self) -> None:
        try:
            while self._buffer or not self._closing:
                await self._dirty.wait()
                self._dirty.clear()
                while self._buffer:
                    await self._flush()
                if self._note_timer is None:
                    await self._note_synced()
            # A clean end leaves no doubt about the last batch.
            await self._note_synced()
            await self._current_file().sync()
        except Exception as error:
            # Without a flusher the node is as good as stopped, whatever ended it.
            self._fail("writing the log", error)
            if not isinstance(error, OSError):
                raise
        finally:
            if self._note_timer is not None:
                self._note_timer.cancel()
            # Failed, cancelled or closed: nobody will serve those who wait.
            self._failed = self._failed or "it is closed"
            while self._waiting:
                _, future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(self._unusable(definite=False))

    async def _flush(self) -> None:
        """Write the buffer as one batch, sync it, release who waits for it; rotate when the segment is full."""
        segment = self._current
        # What is appended while this waits comes behind it in the buffer; what is written can be read there until then.
        records = self._taken = len(self._buffer)
        parts, size = self._encode(segment)
        # With this batch all is written: what the groups are at this moment is what the log will say.
        full = segment.filled + size >= self._config.segment_size_bytes_max
        outlines = self._index.outlines() if full else []
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await self._current_file().write(parts, sync=True)
        self._settle(segment, records, size)
        number = self._synced = self._written
        self._synced_size = segment.size
        self._flushed_s = loop.time()
        if self._note_timer is None:
            self._note_timer = loop.call_at(self._flushed_s + NOTE_AFTER_S, self._on_idle)
        self._statistics["syncs"] += 1
        self._statistics["records"] += records
        self._statistics["bytes"] += size
        while self._waiting and self._waiting[0][0] <= number:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
        if self._env.events.active:
            self._env.events.publish("wal_sync", records=records, bytes=size, duration_s=loop.time() - begun)
        if full:
            await self._begin(segment.head.number + 1, outlines)
            self._garbage.set()

    def _encode(self, segment: _Segment) -> tuple[list[bytes], int]:
        """The buffer as it will stand in the segment, and its size in bytes."""
        written: list[bytes] = []
        parts: list[bytes | memoryview] = []
        begin = offset = segment.size
        unwritten, mark, synced = offset, segment.head.mark, self._synced_size
        for record in self._buffer:
            parts += (segments.record_header(mark, offset, synced, record), record.payload)
            offset += RECORD_SIZE_BYTES + len(record.payload)
            if offset - unwritten >= _WRITE_SIZE_BYTES:
                written.append(b"".join(parts))
                parts.clear()
                unwritten = offset
        written.append(b"".join(parts))
        return written, offset - begin

    def _settle(self, segment: _Segment, records: int, size: int) -> None:
        """The first ``records`` of the buffer have been written: note where each entry came to lie."""
        # An entry may have been truncated while it was in the buffer.
        location = location_of(segment.head.number, segment.size)
        self._index.settle(self._buffer[:records], BUFFERED | self._written, location)
        segment.size += size
        self._noted = False
        self._written += records
        del self._buffer[:records]
        self._taken = 0
        self._buffer_size -= size

    def _on_idle(self) -> None:
        """It is time for the note, unless more was written meanwhile."""
        loop, due_s = asyncio.get_running_loop(), self._flushed_s + NOTE_AFTER_S
        self._note_timer = None
        if loop.time() < due_s:
            self._note_timer = loop.call_at(due_s, self._on_idle)
        else:
            self._dirty.set()

    async def _note_synced(self) -> None:
        """Leave the evidence that all of the current segment is on the medium; it need not get there itself."""
        segment = self._current
        if self._noted or self._synced_size != segment.size:
            return
        note = RawRecord(segments.SYNCED, 0, 0, 0, 0, b"")
        header = segments.record_header(segment.head.mark, segment.size, segment.size, note)
        await self._current_file().write([header], sync=False)
        segment.size += RECORD_SIZE_BYTES
        self._noted = True

    async def _begin(self, number: int, outlines: list[RawRecord]) -> None:
        """Make the next segment and let it be the current one, once it is all on the medium."""
        # Never zero: a search for the mark would stop at every empty sector.
        mark = self._env.rng.getrandbits(32) | 0x8000_0001
        head = await self._files.create(number, mark, outlines)
        self._segments[number] = _Segment(self._files.name(number), head, head.start)
        self._synced_size = head.start
        self._noted = True

    # reading

    def first_index(self, group: int) -> int:
        """Of the oldest entry; one above :meth:`last_index` when there is none (1 for a group never used)."""
        entries = self._index.groups.get(group)
        return 1 if entries is None else entries.first

    def last_index(self, group: int) -> int:
        """Of the newest entry; one below :meth:`first_index` when there is none (0 for a group never used)."""
        entries = self._index.groups.get(group)
        return 0 if entries is None else entries.next - 1

    def groups(self) -> list[int]:
        """The groups that were ever used, sorted."""
        return sorted(self._index.groups)

    def term(self, group: int, index: int) -> int:
        """The term of an entry, from memory. Raises ``NotFound``."""
        return self._find(group, index).term(index)

    def entry(self, group: int, index: int) -> Record:
        """One entry, synced or not. Raises ``NotFound``, and ``Corrupt`` when it cannot be read back."""
        entries = self._find(group, index)
        location = entries.location(index)
        if location & BUFFERED:
            return self._buffered(location)
        number, offset = place_of(location)
        return self._decode(number, offset, self._read(number, offset, RECORD_SIZE_BYTES + entries.length(index)))

    def records(self, group: int, start: int | None = None) -> Iterator[Record]:
        """All entries of a group in order, synced or not, from index ``start`` on.

        The log may change between two steps: what was dropped is left out, what was appended follows. Raises
        ``Corrupt`` as :meth:`entry`.
        """
        index = self.first_index(group) if start is None else start
        number, base, block = 0, 0, memoryview(b"")
        record_at, groups = segments.record_at, self._index.groups
        while (entries := groups.get(group)) is not None and index < entries.next:
            index = max(index, entries.first)
            location = entries.location(index)
            index += 1
            if location & BUFFERED:
                yield self._buffered(location)
                continue
            segment, offset = place_of(location)
            head = self._segments[segment].head
            record = None
            if segment == number and offset >= base:
                record = record_at(head, offset, block, offset - base)
            if record is None:
                size = RECORD_SIZE_BYTES + entries.length(index - 1)
                number, base = segment, offset
                block = memoryview(self._read(number, base, max(size, _READ_SIZE_BYTES)))
                record = record_at(head, offset, block)
                if record is None:
                    raise self._unreadable(segment, offset)
            _, _, term, found, kind, payload = record
            yield Record(group, term, found, kind, bytes(payload))

    def statistics(self) -> dict[str, int]:
        """Since the opening: records, bytes, syncs, copied, deleted (segments), torn_bytes; and what there is now."""
        return {
            **self._statistics,
            "groups": len(self._index.groups),
            "segments": len(self._segments),
            "size_bytes": sum(segment.size for segment in self._segments.values()),
            "live_bytes": sum(self._index.live.values()),
            "buffered": len(self._buffer) - self._taken,
        }

    def _find(self, group: int, index: int) -> GroupIndex:
        entries = self._index.find(group, index)
        if entries is None:
            raise NotFound(
                f"no entry {index} in group {group}: it has {self.first_index(group)} to {self.last_index(group)}"
            )
        return entries

    def _buffered(self, location: int) -> Record:
        _, group, term, index, kind, payload = self._buffer[(location ^ BUFFERED) - self._written]
        return Record(group, term, index, kind, bytes(payload))

    def _decode(self, number: int, offset: int, data: bytes | memoryview) -> Record:
        record = segments.record_at(self._segments[number].head, offset, data)
        if record is None:
            raise self._unreadable(number, offset)
        return Record(record.group, record.term, record.index, record.kind, bytes(record.payload))

    def _unreadable(self, number: int, offset: int) -> Corrupt:
        return segments.damaged(self._segments[number].name, offset, "which was good before")

    def _read(self, number: int, offset: int, size: int) -> bytes:
        try:
            return self._files.open(number).read(offset, size)
        except OSError as error:
            raise segments.damaged(self._files.name(number), offset, f"it cannot be read: {error.strerror}") from error

    # cleaning

    async def _clean_forever(self) -> None:
        try:
            while self._failed is None:
                await self._garbage.wait()
                self._garbage.clear()
                while (victim := self._victim()) is not None:
                    await self._clean(victim)
        except (OSError, Corrupt) as error:
            self._fail("cleaning the log", error)
        except Unavailable:
            return  # the flusher has said why

    def _victim(self) -> _Segment | None:
        """The oldest segment when it should go."""
        oldest = next(iter(self._segments.values()))
        if oldest is self._current:
            return None
        size = sum(segment.filled for segment in self._segments.values())
        live = sum(self._index.live.values())
        slack = SLACK_SEGMENTS * self._config.segment_size_bytes_max
        empty = not self._index.live.get(oldest.head.number)
        return oldest if empty or size > GARBAGE_FACTOR * live + slack else None

    async def _clean(self, victim: _Segment) -> None:
        number = victim.head.number
        if self._index.live.get(number):
            await self._move_entries(victim)
        # Not before the copies, and the truncations that made the rest garbage, are on the medium.
        await self.sync()
        self._index.live.pop(number, None)
        del self._segments[number]
        await self._files.remove(number)
        self._statistics["deleted"] += 1

    async def _move_entries(self, victim: _Segment) -> None:
        number, seen, moved = victim.head.number, 0, 0
        # A handle of its own: the others may be closed while this waits.
        with contextlib.closing(self._files.open_own(number)) as file:
            for offset, record in Scan(victim.name, victim.head, file.read, victim.size, last=False):
                seen += 1
                if seen % CLEAN_RECORDS_MAX == 0:
                    await asyncio.sleep(0)
                # The cleaner has nothing to tell a caller, so it may wait where append refuses.
                size = RECORD_SIZE_BYTES + len(record.payload)
                if moved + size > CLEAN_SIZE_BYTES_MAX or self._buffer_size + size > PENDING_SIZE_BYTES_MAX:
                    await self.sync()
                    moved = 0
                if self._index.holds(record, location_of(number, offset)):
                    copy = record._replace(type=segments.COPY, payload=bytes(record.payload))
                    self._index.relocate(copy, BUFFERED | (self._written + len(self._buffer)))
                    self._push(copy)
                    moved += size
                    self._statistics["copied"] += 1

    @property
    def _current(self) -> _Segment:
        return self._segments[next(reversed(self._segments))]

    def _current_file(self) -> File:
        return self._files.open(self._current.head.number)

    def _unusable(self, *, definite: bool = True) -> Unavailable:
        return Unavailable(f"the log of {self._env.name} takes nothing more: {self._failed}", definite=definite)

    def _fail(self, what: str, error: Exception) -> None:
        if self._failed is None:
            self._failed = f"{what} failed: {error}"
            self._env.events.publish("disk_failed", what=what, error=str(error))
            self._env.fatal(f"{self._failed}; it is not tried again, as what was not synced may be gone already")


def _check_range(group: int, term: int, index: int, kind: int) -> None:
    if not (0 <= group < 1 << 32 and 0 <= term < 1 << 64 and 0 <= index < 1 << 63 and 0 <= kind < 1 << 16):
        raise ValueError(f"group {group}, term {term}, index {index}, kind {kind}: out of the log's range")

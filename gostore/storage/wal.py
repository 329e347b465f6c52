"""The write-ahead log of a node: one log, many groups, one fdatasync for all that wait.

Theory of operation
===================

``append`` and the truncations put a record into a buffer and change the index in memory; nothing is on the disk yet.
``sync`` waits until all that was appended before it is on the medium. One task, the *flusher*, writes the whole buffer
as one batch, syncs the file, releases everybody whose records were in it, and takes the next batch: what is appended
while a sync runs shares the next one (group commit; DeWitt et al., "Implementation Techniques for Main Memory Database
Systems", SIGMOD 1984, section 5.2). So at most one batch is ever unsynced, and every record can state how much before
it was safe, which recovery needs (see :mod:`gostore.storage.segments`).

A write or sync that fails is the end of this log: the kernel may have dropped the pages and call the next sync a
success (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020). Nothing is tried again, all who
wait get an indefinite error, and the node stops (``env.fatal``).

A batch that fills its segment is followed by a *rotation*: the next segment is written under a temporary name, with an
outline of every group at its head, synced, renamed, and the directory synced; only then it is written to.

Segments are deleted from the oldest on, one by one, each deletion on the medium before the next, so that what remains
is always a row without gaps. The *cleaner* does it: a segment without live entries goes at once. Otherwise a group that
is never truncated would pin it, and with it all later ones; so when the log is larger than ``GARBAGE_FACTOR`` times what
lives in it (and some slack), the live entries of the oldest segment are written again at the end, synced, and it goes
too. That is a log-structured cleaner in its simplest order (Rosenblum and Ousterhout, SOSP 1991, section 3); at least
half of what it passes over is garbage, so an entry's bytes are written twice on average at most.

Payloads stay on the disk, except those in the buffer and the most recent ones (``RECENT_SIZE_BYTES_MAX``).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self

from gostore.config import KIB, MIB, StorageConfig
from gostore.core.errors import Corrupt, GoStoreError, NotFound, TooLarge, Unavailable
from gostore.core.ports import File
from gostore.env import Env
from gostore.storage import segments
from gostore.storage.groups import MISSING, GroupIndex
from gostore.storage.segments import RECORD_SIZE_BYTES, Head, RawRecord, Scan

# Bytes appended and not yet written. Larger: longer bursts are taken while the disk stalls; smaller: less memory.
PENDING_SIZE_BYTES_MAX: Final = 64 * MIB
# Payloads kept for those who read what was just appended (replication does); per node.
RECENT_SIZE_BYTES_MAX: Final = 2 * MIB
# Files of old segments kept open for reading.
HANDLES_MAX: Final = 8
# The log may grow to this multiple of its live bytes, and by some segments, before live entries are moved. Larger:
# fewer bytes are written twice; smaller: less space is used.
GARBAGE_FACTOR: Final = 2
SLACK_SEGMENTS: Final = 2
# Records the cleaner looks at, and bytes it moves, before others get their turn.
CLEAN_RECORDS_MAX: Final = 256
CLEAN_SIZE_BYTES_MAX: Final = 1 * MIB

_WRITE_SIZE_BYTES: Final = 1 * MIB
_READ_SIZE_BYTES: Final = 256 * KIB
_NAME: Final = re.compile(r"(\d{10})\.wal")
_TEMPORARY: Final = "next.tmp"

# A location is segment number << 32 | offset, or, with this bit, the number of a record that is still in the buffer.
_BUFFERED: Final = 1 << 63
_OFFSET_BITS: Final = 32
_OFFSET: Final = (1 << _OFFSET_BITS) - 1


class Record(NamedTuple):
    """An entry of a group, as it was appended."""

    group: int
    term: int
    index: int  # type: ignore[assignment]  # tuple.index is not missed here
    kind: int
    payload: bytes


class _Segment:
    __slots__ = ("head", "live", "name", "size")

    def __init__(self, name: str, head: Head, size: int) -> None:
        self.name = name
        self.head = head
        self.size = size
        self.live = 0
        """Bytes of entries that are still needed."""

    @property
    def filled(self) -> int:
        """Bytes behind the outlines."""
        return self.size - self.head.start


class Wal:
    """Made by :meth:`open`. Indices of a group are consecutive; terms and kinds are the caller's own."""

    def __init__(self, env: Env, config: StorageConfig, directory: str) -> None:
        self._env = env
        self._config = config
        self._directory = directory
        self._groups: dict[int, GroupIndex] = {}
        self._segments: dict[int, _Segment] = {}  # in the order of their numbers
        self._handles: dict[int, File] = {}
        self._buffer: list[RawRecord] = []
        self._buffer_size = 0
        self._written = 0  # records written, and so the number of the buffer's first
        self._synced = 0  # records synced
        self._synced_size = 0  # of the current segment, in bytes
        self._noted = True  # the current segment ends with a note of that
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._recent: dict[int, bytes] = {}
        self._recent_size = 0
        self._failed: str | None = None
        self._dirty = asyncio.Event()
        self._garbage = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []
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
            wal._fail("opening the log", error)
            raise wal._unusable() from error
        wal._tasks = [
            env.tasks.start(wal._flush_forever(), name="wal-flusher"),
            env.tasks.start(wal._clean_forever(), name="wal-cleaner"),
        ]
        wal._garbage.set()
        return wal

    async def close(self) -> None:
        """Sync what was appended and stop; call it while the node's tasks still run. A second call does nothing."""
        if self._failed is None:
            with contextlib.suppress(Unavailable):
                await self.sync()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._failed is None:
            try:
                # A clean end leaves no doubt about the last batch.
                self._note_synced()
                await self._current_file().sync()
            except OSError as error:
                self._fail("closing the log", error)
        self._failed = self._failed or "the log is closed"
        for file in self._handles.values():
            file.close()
        self._handles.clear()

    async def _recover(self) -> None:
        disk = self._env.disk
        disk.mkdir(self._directory)
        numbers: list[int] = []
        for name in disk.listdir(self._directory):
            if name.endswith(".tmp"):
                disk.remove(f"{self._directory}/{name}")
            elif (match := _NAME.fullmatch(name)) is not None:
                numbers.append(int(match[1]))
        # A node that was killed may have left names and bytes that only the page cache knows: nobody may rely on them
        # before they are on the medium.
        parent = self._directory.rpartition("/")[0]
        await disk.sync_dir(parent)
        await disk.sync_dir(self._directory)
        for number in numbers:
            self._replay(number, last=number == numbers[-1])
            await asyncio.sleep(0)  # others have their turn
        for group, index in self._groups.items():
            if (missing := index.missing()) is not None:
                raise segments.damaged(self._name(numbers[0]), 0, f"or one before is gone: no entry {group}/{missing}")
        if not numbers:
            await self._begin(1, [])
        else:
            await self._end_tail()
        self._env.events.publish(
            "wal_recovered",
            records=sum(index.next - index.first for index in self._groups.values()),
            segments=len(self._segments),
            torn_bytes=self._statistics["torn_bytes"],
        )

    def _replay(self, number: int, *, last: bool) -> None:
        name = self._name(number)
        oldest = not self._segments
        if not oldest and number - 1 not in self._segments:
            raise segments.damaged(self._name(number - 1), 0, "as it is missing")
        file = self._handle(number)
        head = segments.decode_head(name, file.read(0, segments.HEAD_SIZE_BYTES))
        if head.number != number:
            raise segments.damaged(name, 0, f"it is segment {head.number} under another name")
        segment = self._segments[number] = _Segment(name, head, file.size())
        scan = Scan(name, head, file.read, segment.size, last=last)
        for offset, record in scan:
            try:
                self._apply(segment, offset, record, oldest=oldest)
            except ValueError as error:
                raise segments.damaged(name, offset, f"it does not follow from what is before: {error}") from None
        segment.size = scan.end
        self._statistics["torn_bytes"] += scan.torn

    def _apply(self, segment: _Segment, offset: int, record: RawRecord, *, oldest: bool) -> None:
        """Do again what a record says. Raises ``ValueError`` when it does not fit."""
        type_, group, term, at, _, payload = record
        index = self._groups.get(group)
        location = segment.head.number << _OFFSET_BITS | offset
        if type_ == segments.ENTRY:
            if index is None:
                index = self._groups[group] = GroupIndex(at)
            if at != index.next:
                raise ValueError(f"entry {group}/{at} comes where {index.next} is expected")
            index.append(term, location, len(payload))
            segment.live += RECORD_SIZE_BYTES + len(payload)
        elif type_ == segments.OUTLINE:
            if oldest and index is None:
                self._groups[group] = GroupIndex.from_outline(at, payload)
            elif index is None or (index.first, index.outline()) != (at, payload):
                raise ValueError(f"group {group} should hold what its outline says")
        elif type_ == segments.PREFIX:
            self._drop_prefix(group, at)
        elif index is None or (type_ != segments.SYNCED and not index.first <= at < index.next):
            if type_ != segments.SYNCED:
                raise ValueError(f"there is no entry {group}/{at}")
        elif type_ == segments.SUFFIX:
            self._forget(index.drop_suffix(at))
        elif type_ == segments.COPY:
            self._forget([(index.location(at), index.length(at))])
            index.relocate(at, location, len(payload))
            segment.live += RECORD_SIZE_BYTES + len(payload)

    async def _end_tail(self) -> None:
        """Cut a torn tail off and make the rest of the last segment durable."""
        file = self._current_file()
        size = self._current.size
        if file.size() > size:
            file.truncate(size)
        # Before anything is written behind it: what was cut off must not come back between new records.
        await file.sync()
        self._synced_size = size
        self._noted = False
        self._note_synced()

    # appending

    def append(self, group: int, term: int, index: int, payload: bytes, kind: int = 0) -> None:
        """Add an entry; it is durable after the next :meth:`sync`. A group's first entry may have any index.

        Raises ``ValueError`` for an index that is not the next one, ``TooLarge``, and ``Unavailable`` when too much
        waits for the disk or the log has failed; in each case nothing was appended.
        """
        if len(payload) > self._config.record_size_bytes_max:
            raise TooLarge(
                f"an entry of {len(payload)} bytes; at most {self._config.record_size_bytes_max} fit into the log"
            )
        entries = self._groups.get(group)
        if entries is not None and index != entries.next:
            raise ValueError(f"entry {index} of group {group} cannot follow entry {entries.next - 1}")
        if not (0 <= group < 1 << 32 and 0 <= term < 1 << 64 and 0 <= index < 1 << 63 and 0 <= kind < 1 << 16):
            raise ValueError(f"entry {group}/{term}/{index} of kind {kind} does not fit the format")
        number = self._push(RawRecord(segments.ENTRY, group, term, index, kind, bytes(payload)))
        if entries is None:
            entries = self._groups[group] = GroupIndex(index)
        entries.append(term, _BUFFERED | number, len(payload))

    def truncate_suffix(self, group: int, index: int) -> None:
        """Void the entries from ``index`` on; it is durable after the next :meth:`sync`.

        Raises ``ValueError`` when ``index`` is below the first one, ``Unavailable`` as :meth:`append`.
        """
        entries = self._groups.get(group)
        if entries is None or index >= entries.next:
            return
        if index < entries.first:
            raise ValueError(f"group {group} begins at {entries.first}: nothing before it can be voided")
        self._push(RawRecord(segments.SUFFIX, group, 0, index, 0, b""))
        self._forget(entries.drop_suffix(index))
        self._garbage.set()

    def truncate_prefix(self, group: int, index: int) -> None:
        """Drop the entries below ``index``: they are in a snapshot. Durable after the next :meth:`sync`.

        An ``index`` beyond the end drops all, and the next entry is ``index``. Raises ``Unavailable`` as :meth:`append`.
        """
        entries = self._groups.get(group)
        if entries is not None and index <= entries.first:
            return
        self._push(RawRecord(segments.PREFIX, group, 0, index, 0, b""))
        self._drop_prefix(group, index)
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

    def _push(self, record: RawRecord) -> int:
        """Put a record into the buffer; returns its number."""
        if self._failed is not None:
            raise self._unusable()
        size = RECORD_SIZE_BYTES + len(record.payload)
        if self._buffer and self._buffer_size + size > PENDING_SIZE_BYTES_MAX:
            raise Unavailable(f"{self._buffer_size} bytes wait for the disk of {self._env.name}: try again later")
        self._buffer.append(record)
        self._buffer_size += size
        return self._written + len(self._buffer) - 1

    def _drop_prefix(self, group: int, index: int) -> None:
        entries = self._groups.get(group)
        if entries is None:
            self._groups[group] = GroupIndex(index)
        else:
            self._forget(entries.drop_prefix(index))

    def _forget(self, gone: list[tuple[int, int]]) -> None:
        for location, length in gone:
            # Neither MISSING nor a buffered record counts anywhere yet.
            if not location & _BUFFERED:
                self._segments[location >> _OFFSET_BITS].live -= RECORD_SIZE_BYTES + length

    # writing

    async def _flush_forever(self) -> None:
        try:
            while True:
                await self._dirty.wait()
                self._dirty.clear()
                while self._buffer:
                    await self._flush()
                self._note_synced()
        except OSError as error:
            self._fail("writing the log", error)
        finally:
            # Cancelled or failed: nobody will serve those who wait.
            self._failed = self._failed or "the log is closed"
            while self._waiting:
                _, future = self._waiting.popleft()
                if not future.done():
                    future.set_exception(self._unusable(definite=False))

    async def _flush(self) -> None:
        """Write the buffer as one batch, sync it, release who waits for it; rotate when the segment is full."""
        segment, file = self._current, self._current_file()
        records, size = len(self._buffer), segment.size
        self._write(segment, file)
        # All written and nothing buffered: this is the moment at which the groups are what the log says.
        outlines = self._outlines() if segment.filled >= self._config.segment_size_bytes_max else None
        number, size = self._written, segment.size - size
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await file.sync()
        self._synced, self._synced_size = number, segment.size
        self._statistics["syncs"] += 1
        self._statistics["records"] += records
        self._statistics["bytes"] += size
        while self._waiting and self._waiting[0][0] <= number:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
        if self._env.events.active:
            self._env.events.publish("wal_sync", records=records, bytes=size, duration_s=loop.time() - begun)
        if outlines is not None:
            await self._begin(segment.head.number + 1, outlines)
            self._garbage.set()

    def _write(self, segment: _Segment, file: File) -> None:
        """Hand the buffer to the page cache and note where each entry came to lie."""
        parts: list[bytes | memoryview] = []
        offset, unwritten, mark, synced = segment.size, 0, segment.head.mark, self._synced_size
        base = segment.head.number << _OFFSET_BITS
        for number, record in enumerate(self._buffer, self._written):
            parts += (segments.record_header(mark, offset, synced, record), record.payload)
            size = RECORD_SIZE_BYTES + len(record.payload)
            if record.type in (segments.ENTRY, segments.COPY):
                self._settle(segment, record, _BUFFERED | number, base | offset)
            offset += size
            unwritten += size
            if unwritten >= _WRITE_SIZE_BYTES:
                file.append(b"".join(parts))
                parts.clear()
                unwritten = 0
        file.append(b"".join(parts))
        segment.size = offset
        self._noted = False
        self._written += len(self._buffer)
        self._buffer = []
        self._buffer_size = 0

    def _settle(self, segment: _Segment, record: RawRecord, buffered: int, location: int) -> None:
        """An entry leaves the buffer, unless it was truncated in there."""
        entries = self._groups[record.group]
        if not entries.first <= record.index < entries.next or entries.location(record.index) != buffered:
            return
        size = len(record.payload)
        entries.relocate(record.index, location, size)
        segment.live += RECORD_SIZE_BYTES + size
        if record.type == segments.ENTRY and size <= RECENT_SIZE_BYTES_MAX:
            self._recent[location] = bytes(record.payload)
            self._recent_size += size
            while self._recent_size > RECENT_SIZE_BYTES_MAX:
                self._recent_size -= len(self._recent.pop(next(iter(self._recent))))

    def _note_synced(self) -> None:
        """Leave the evidence that all of the current segment is on the medium; it need not get there itself."""
        segment = self._current
        if self._noted or self._synced_size != segment.size:
            return
        note = RawRecord(segments.SYNCED, 0, 0, 0, 0, b"")
        self._current_file().append(segments.record_header(segment.head.mark, segment.size, segment.size, note))
        segment.size += RECORD_SIZE_BYTES
        self._noted = True

    def _outlines(self) -> list[RawRecord]:
        return [
            RawRecord(segments.OUTLINE, group, 0, index.first, 0, index.outline())
            for group, index in sorted(self._groups.items())
        ]

    async def _begin(self, number: int, outlines: list[RawRecord]) -> None:
        """Make the next segment and let it be the current one, once it is all on the medium."""
        disk, name, temporary = self._env.disk, self._name(number), f"{self._directory}/{_TEMPORARY}"
        start = segments.HEAD_SIZE_BYTES + sum(RECORD_SIZE_BYTES + len(record.payload) for record in outlines)
        # Never zero: a search for the mark would stop at every empty sector.
        head = Head(number, self._env.rng.getrandbits(32) | 0x8000_0001, start)
        parts: list[bytes | memoryview] = [segments.encode_head(head)]
        offset = segments.HEAD_SIZE_BYTES
        for record in outlines:
            parts += (segments.record_header(head.mark, offset, 0, record), record.payload)
            offset += RECORD_SIZE_BYTES + len(record.payload)
        file = disk.open(temporary, create=True)
        self._handles[number] = file
        file.append(b"".join(parts))
        await file.sync()
        disk.rename(temporary, name)
        await disk.sync_dir(self._directory)
        self._segments[number] = _Segment(name, head, start)
        self._synced_size = start
        self._noted = True

    # reading

    def first_index(self, group: int) -> int:
        """Of the oldest entry; one above :meth:`last_index` when there is none (1 for a group never used)."""
        entries = self._groups.get(group)
        return 1 if entries is None else entries.first

    def last_index(self, group: int) -> int:
        """Of the newest entry; one below :meth:`first_index` when there is none (0 for a group never used)."""
        entries = self._groups.get(group)
        return 0 if entries is None else entries.next - 1

    def groups(self) -> list[int]:
        """The groups that were ever used, sorted."""
        return sorted(self._groups)

    def term(self, group: int, index: int) -> int:
        """The term of an entry, from memory. Raises ``NotFound``."""
        return self._entries(group, index).term(index)

    def entry(self, group: int, index: int) -> Record:
        """One entry, synced or not. Raises ``NotFound``, and ``Corrupt`` when it cannot be read back."""
        entries = self._entries(group, index)
        location = entries.location(index)
        if (buffered := self._buffered(location)) is not None:
            return buffered
        size = RECORD_SIZE_BYTES + entries.length(index)
        number, offset = location >> _OFFSET_BITS, location & _OFFSET
        return self._decode(number, offset, self._read(number, offset, size))

    def records(self, group: int, start: int | None = None) -> Iterator[Record]:
        """All entries of a group in order, synced or not, from index ``start`` on.

        The log may change between two steps: what was dropped is left out, what was appended follows. Raises
        ``Corrupt`` as :meth:`entry`.
        """
        index = self.first_index(group) if start is None else start
        number, base, block = 0, 0, memoryview(b"")
        while (entries := self._groups.get(group)) is not None and index < entries.next:
            index = max(index, entries.first)
            location = entries.location(index)
            record = self._buffered(location)
            if record is None:
                size = RECORD_SIZE_BYTES + entries.length(index)
                offset = location & _OFFSET
                if number != location >> _OFFSET_BITS or not base <= offset <= base + len(block) - size:
                    number, base = location >> _OFFSET_BITS, offset
                    block = memoryview(self._read(number, base, max(size, _READ_SIZE_BYTES)))
                record = self._decode(number, offset, block[offset - base : offset - base + size])
            yield record
            index += 1

    def statistics(self) -> dict[str, int]:
        """Since the opening: records, bytes, syncs, copied, deleted (segments), torn_bytes; and what there is now."""
        return {
            **self._statistics,
            "groups": len(self._groups),
            "segments": len(self._segments),
            "size_bytes": sum(segment.size for segment in self._segments.values()),
            "live_bytes": sum(segment.live for segment in self._segments.values()),
            "buffered": len(self._buffer),
        }

    def _entries(self, group: int, index: int) -> GroupIndex:
        entries = self._groups.get(group)
        if entries is None or not entries.first <= index < entries.next:
            raise NotFound(
                f"no entry {index} in group {group}: it has {self.first_index(group)} to {self.last_index(group)}"
            )
        return entries

    def _buffered(self, location: int) -> Record | None:
        """The entry when it is in memory."""
        if not location & _BUFFERED:
            return None
        _, group, term, index, kind, payload = self._buffer[(location ^ _BUFFERED) - self._written]
        return Record(group, term, index, kind, bytes(payload))

    def _decode(self, number: int, offset: int, data: bytes | memoryview) -> Record:
        segment = self._segments[number]
        record = segments.record_at(segment.head, offset, data)
        if record is None:
            raise segments.damaged(segment.name, offset, "which was good before")
        return Record(record.group, record.term, record.index, record.kind, bytes(record.payload))

    def _read(self, number: int, offset: int, size: int) -> bytes:
        try:
            return self._handle(number).read(offset, size)
        except OSError as error:
            raise segments.damaged(self._name(number), offset, f"it cannot be read: {error.strerror}") from error

    # cleaning

    async def _clean_forever(self) -> None:
        try:
            while True:
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
        live = sum(segment.live for segment in self._segments.values())
        slack = SLACK_SEGMENTS * self._config.segment_size_bytes_max
        return oldest if not oldest.live or size > GARBAGE_FACTOR * live + slack else None

    async def _clean(self, victim: _Segment) -> None:
        number = victim.head.number
        if victim.live:
            await self._move_entries(victim)
        # Not before the copies, and the truncations that made the rest garbage, are on the medium.
        await self.sync()
        if number in self._handles:
            self._handles.pop(number).close()
        del self._segments[number]
        self._env.disk.remove(victim.name)
        await self._env.disk.sync_dir(self._directory)
        self._statistics["deleted"] += 1

    async def _move_entries(self, victim: _Segment) -> None:
        number, seen, moved = victim.head.number, 0, 0
        # A handle of its own: the others may be closed while this waits.
        with contextlib.closing(self._env.disk.open(victim.name)) as file:
            for offset, record in Scan(victim.name, victim.head, file.read, victim.size, last=False):
                seen += 1
                if seen % CLEAN_RECORDS_MAX == 0:
                    await asyncio.sleep(0)
                if self._is_live(record, number << _OFFSET_BITS | offset):
                    moved += self._move(victim, record)
                if moved >= CLEAN_SIZE_BYTES_MAX:
                    await self.sync()
                    moved = 0

    def _is_live(self, record: RawRecord, location: int) -> bool:
        if record.type not in (segments.ENTRY, segments.COPY):
            return False
        entries = self._groups[record.group]
        return entries.first <= record.index < entries.next and entries.location(record.index) == location

    def _move(self, victim: _Segment, record: RawRecord) -> int:
        """Append a copy of a live entry; returns its size."""
        size = len(record.payload)
        number = self._push(record._replace(type=segments.COPY, payload=bytes(record.payload)))
        self._groups[record.group].relocate(record.index, _BUFFERED | number, size)
        victim.live -= RECORD_SIZE_BYTES + size
        self._statistics["copied"] += 1
        return RECORD_SIZE_BYTES + size

    # files and failures

    def _name(self, number: int) -> str:
        return f"{self._directory}/{number:010d}.wal"

    @property
    def _current(self) -> _Segment:
        return self._segments[next(reversed(self._segments))]

    def _current_file(self) -> File:
        return self._handle(self._current.head.number)

    def _handle(self, number: int) -> File:
        file = self._handles.pop(number, None)
        if file is None:
            file = self._env.disk.open(self._name(number))
        self._handles[number] = file  # the most recent is last
        if len(self._handles) > HANDLES_MAX:
            current = next(reversed(self._segments), number)
            oldest = next(other for other in self._handles if other not in (number, current))
            self._handles.pop(oldest).close()
        return file

    def _unusable(self, *, definite: bool = True) -> Unavailable:
        return Unavailable(f"the log of {self._env.name} takes nothing more: {self._failed}", definite=definite)

    def _fail(self, what: str, error: OSError | GoStoreError) -> None:
        if self._failed is None:
            self._failed = f"{what} failed: {error}"
            self._env.events.publish("disk_failed", what=what, error=str(error))
            self._env.fatal(f"{self._failed}; it is not tried again, as what was not synced may be gone already")

"""One replica of a shard, whatever its role: its log, what of it is committed and applied, and its snapshots."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gostore.comm import Reply
from gostore.core.errors import Fenced, GoStoreError, NotFound, Unavailable
from gostore.services.db.entries import (
    COMMAND,
    Configuration,
    LogEntry,
    Point,
    Promise,
    Run,
    common_point,
    entries_from_wire,
    entries_to_wire,
)
from gostore.services.db.journal import Journal
from gostore.services.db.recovery import Report
from gostore.services.db.replication import Group

BATCH_SIZE_BYTES_MAX: Final = 256 * 1024
"""Entries sent in one message (one larger entry goes alone). Larger: fewer messages; smaller: shorter turns."""

BATCH_ENTRIES_MAX: Final = 1024

COMPACTION_SIZE_BYTES: Final = 4 * 1024 * 1024
"""The state is written as a snapshot when the log since the last one is larger than this, and than the state itself:
then at most as many bytes go into snapshots as into entries."""

COMPACTION_ENTRIES: Final = 20_000
"""Or so many entries, which bounds the replay after a restart; only if they weigh a quarter of the state."""

SNAPSHOTS_OPEN_MAX: Final = 4
"""Snapshots being read by others at a time, per shard; each keeps the values of its moment in memory."""

PIECE_TIMEOUT_S: Final = 5.0
GAP_WAIT_S: Final = 0.25
"""A message that overtook another waits so long for it before it is refused."""


@dataclass(slots=True)
class _Outgoing:
    pieces: Iterator[bytes]
    number: int = -1
    piece: bytes = b""
    done: bool = False


class Replica:
    """``committed`` and ``applied`` are indices of the shard's log; they never fall."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.journal = Journal(group.wal, 1 + group.shard, group.machine.restore)
        self.applied = self.committed = self.journal.start.index
        self.waiters: dict[int, asyncio.Future[Any]] = {}
        self.installing = False
        self._grown = asyncio.Event()
        self._snapshots = asyncio.Lock()
        self._compacting = False
        self._outgoing: OrderedDict[int, _Outgoing] = OrderedDict()
        self._outgoing_next = 0

    # generations

    @property
    def generation(self) -> int:
        """The one that was promised; 0: none."""
        promise = self.journal.promise
        return 0 if promise is None else promise.generation

    def check(self, generation: int, primary: str) -> None:
        """Raises ``Fenced`` when a newer generation was promised, or the same one to another primary."""
        promise = self.journal.promise
        if promise is None or (generation, primary) == (promise.generation, promise.primary):
            return
        if generation <= promise.generation:
            raise Fenced(
                f"shard {self.group.shard}: {self.group.name} follows generation {promise.generation} of "
                f"{promise.primary}, and not {generation} of {primary}",
                generation=promise.generation,
            )

    async def promise(self, promise: Promise) -> Report:
        """Follow this generation and none below; returns what is held. All of it is on the medium then."""
        self.check(promise.generation, promise.primary)
        before = tuple(made for made in self.journal.promises if made != promise)
        self.journal.make_promise(promise)
        await self.group.wal.sync()
        self.check(promise.generation, promise.primary)
        return Report(self.journal.last, self.journal.configuration, before)

    # the log

    def batch(self, start: int) -> list[LogEntry]:
        """Entries from index ``start`` on, as many as fit into a message."""
        found: list[LogEntry] = []
        size = 0
        for index in range(start, min(self.journal.last.index, start + BATCH_ENTRIES_MAX - 1) + 1):
            entry = self.journal.entry(index)
            size += len(entry.payload)
            if found and size > BATCH_SIZE_BYTES_MAX:
                break
            found.append(entry)
        return found

    async def accept(self, previous: Point, entries: Iterable[LogEntry]) -> bool:
        """Append what follows ``previous``, replacing what differs; durable when true is returned.

        False: the logs do not meet at ``previous``.
        """
        await self._wait_for(previous.index)
        if self.installing or self.journal.term(previous.index) != previous.term:
            return False
        for entry in entries:
            if entry.index <= self.journal.last.index:
                if self.journal.term(entry.index) in (entry.term, None):
                    continue  # known; None: applied long ago
                if entry.index <= self.committed:
                    return False
                self.truncate(entry.index)
            self.journal.append(entry)
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()
        await self.group.wal.sync()
        return True

    async def _wait_for(self, index: int) -> None:
        """Messages are sent in order, and may arrive in another one."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + GAP_WAIT_S
        while index > self.journal.last.index and not self.installing:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._grown.wait()
            except TimeoutError:
                return

    def truncate(self, index: int) -> None:
        """Void uncommitted entries from ``index`` on."""
        assert index > self.committed, f"entry {index} is committed"
        self.journal.truncate(index)
        self.fail_waiters(f"entry {index} and later ones were dropped by a new primary", start=index)

    def fail_waiters(self, why: str, start: int = 0) -> None:
        for index in [index for index in self.waiters if index >= start]:
            future = self.waiters.pop(index)
            if not future.done():
                future.set_exception(Unavailable(f"shard {self.group.shard}: {why}", definite=False))

    def advance(self, committed: int) -> None:
        """Apply everything up to ``committed``, as far as it is here."""
        self.committed = max(self.committed, min(committed, self.journal.last.index))
        machine, journal = self.group.machine, self.journal
        while self.applied < self.committed:
            index = self.applied + 1
            entry = journal.entry(index)
            outcome = None
            try:
                if entry.kind == COMMAND:
                    outcome = machine.apply(index, entry.payload)
                else:
                    machine.skip(index)
            except Exception as error:
                # Every replica would stumble over it, and whoever skipped it would differ from the others.
                self.group.env.fatal(f"shard {self.group.shard}: entry {index} cannot be applied: {error}")
                raise
            self.applied = index
            waiter = self.waiters.pop(index, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(outcome)
        journal.trim(self.applied)
        self._consider_compaction()

    # snapshots

    def _consider_compaction(self) -> None:
        journal, state = self.journal, self.group.machine.size_bytes
        due = journal.size_since_snapshot > max(COMPACTION_SIZE_BYTES, state) or (
            journal.entries_since_snapshot > COMPACTION_ENTRIES and journal.size_since_snapshot > state // 4
        )
        if due and not self._compacting and not self.installing:
            self._compacting = True
            self.group.env.tasks.start(self._compact(), name=f"db-compact-{self.group.shard}")

    async def _compact(self) -> None:
        try:
            async with self._snapshots:
                term = self.journal.term(self.applied)
                assert term is not None
                pieces = self.group.machine.snapshot()
                self.journal.begin_compaction(Point(self.applied, term))
                for piece in pieces:
                    self.journal.add_piece(piece)
                    await self.group.wal.sync()
                await self.journal.end_snapshot(reset=False)
        except GoStoreError as error:
            self.group.env.log.warning("shard %d: its snapshot was given up: %s", self.group.shard, error)
        finally:
            self._compacting = False

    def open_snapshot(self) -> tuple[int, Point, Configuration | None]:
        """Freeze the applied state for somebody who reads it with :meth:`piece`."""
        self._outgoing_next += 1
        self._outgoing[self._outgoing_next] = _Outgoing(self.group.machine.snapshot())
        while len(self._outgoing) > SNAPSHOTS_OPEN_MAX:
            self._outgoing.popitem(last=False)
        term = self.journal.term(self.applied)
        assert term is not None
        configuration = self.journal.configuration_at(self.applied)
        return self._outgoing_next, Point(self.applied, term), configuration

    def piece(self, number: int, piece: int) -> Reply:
        """The pieces of a frozen state, one after the other; the value says whether this was the last."""
        outgoing = self._outgoing.get(number)
        if outgoing is None or piece not in (outgoing.number, outgoing.number + 1):
            raise NotFound(f"shard {self.group.shard}: snapshot {number} is not open at piece {piece}: begin again")
        if piece > outgoing.number:
            outgoing.piece = next(outgoing.pieces, b"")
            outgoing.number, outgoing.done = piece, not outgoing.piece
            if outgoing.done:
                del self._outgoing[number]
        return Reply(outgoing.done, outgoing.piece)

    async def install(self, source: str, number: int, at: Point, configuration: Configuration | None) -> int:
        """Replace everything by a snapshot that ``source`` keeps open; durable at return. Returns its size in bytes.

        Raises ``Fenced`` when another generation was promised meanwhile, and whatever the transfer raises.
        """
        promise = self.journal.promise
        if at.index < self.committed:
            self.group.env.log.error(
                "shard %d: %s gives a state of index %d to this node, which had committed %d: what is between was lost "
                "by two views of the cluster that did not know of one another",
                self.group.shard, source, at.index, self.committed,
            )  # fmt: skip
        async with self._snapshots:
            self.installing = True
            try:
                self.journal.begin_installation(at, configuration)
                pieces: list[bytes] = []
                while True:
                    message = ["piece", number, len(pieces)]
                    reply: Reply = await self.group.send(source, message, b"", PIECE_TIMEOUT_S)
                    if reply.value:
                        break
                    pieces.append(bytes(reply.data))
                    self.journal.add_piece(pieces[-1])
                    await self.group.wal.sync()
                if self.journal.promise != promise:
                    raise Fenced(f"shard {self.group.shard}: another generation began during a snapshot")
                self.group.machine.restore(pieces)
                self.applied = self.committed = at.index
                self.fail_waiters("the log was replaced by a snapshot")
                await self.journal.end_snapshot(reset=True)
            finally:
                self.installing = False
        size = sum(map(len, pieces))
        self._synced_from(source, size)
        return size

    async def clear(self) -> None:
        """Forget everything but the promises."""
        async with self._snapshots:
            self.group.machine.restore([])
            self.applied = self.committed = 0
            self.fail_waiters("this node holds it no longer")
            await self.journal.clear()

    # taking over from another replica

    def give(self, runs: Sequence[Run]) -> Reply:
        """What another replica lacks whose log looks like ``runs``: entries, or a snapshot if these are not here."""
        point = common_point(self.journal.runs(), runs)
        if point is None:
            number, at, configuration = self.open_snapshot()
            found = None if configuration is None else configuration.to_wire()
            return Reply(["snapshot", number, list(at), found])
        heads, data = entries_to_wire(self.batch(point.index + 1))
        return Reply(["entries", list(point), heads, list(self.journal.last)], data)

    async def pull(self, source: str) -> None:
        """Make this log equal to that of ``source``; durable at return."""
        runs, size, promise = self.journal.runs(), 0, self.journal.promise
        while True:
            if self.journal.promise != promise:
                raise Fenced(f"shard {self.group.shard}: another generation began while it was taken over")
            message = ["pull", self.generation, self.group.name, [list(run) for run in runs]]
            reply: Reply = await self.group.send(source, message, b"", PIECE_TIMEOUT_S)
            match reply.value:
                case ["snapshot", int(number), [int(index), int(term)], found]:
                    configuration = None if found is None else Configuration.from_wire(found)
                    await self.install(source, number, Point(index, term), configuration)
                case ["entries", [int(index), int(_)], _, _] if index < self.committed:
                    runs = []  # what was applied here is not in that log: begin from nothing
                    continue
                case ["entries", [int(index), int(_)], [*heads], [int(last), int(last_term)]]:
                    self.truncate(index + 1)
                    for entry in entries_from_wire(heads, bytes(reply.data)):
                        self.journal.append(entry)
                    size += len(reply.data)
                    await self.group.wal.sync()
                    if self.journal.last == Point(last, last_term):
                        if size:
                            self._synced_from(source, size)
                        return
            runs = self.journal.runs()

    def _synced_from(self, source: str, size: int) -> None:
        self.group.env.events.publish(
            "shard_synced", shard=self.group.shard, generation=self.generation, source=source, bytes=size
        )

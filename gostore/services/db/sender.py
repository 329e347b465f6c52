"""The stream from a primary to one backup: batches of entries, several on their way, acknowledged when synced there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from gostore.core.errors import Fenced, GoStoreError, Unavailable
from gostore.services.db.entries import Configuration, Point, Promise, Run, common_point, entries_to_wire
from gostore.services.db.recovery import Report
from gostore.services.db.replica import Replica

PIPELINE_MAX: Final = 4
"""Batches on their way to one backup. More hide a longer round trip; each is at most one batch in memory."""

APPEND_TIMEOUT_S: Final = 2.0
INSTALL_TIMEOUT_S: Final = 120.0
"""A snapshot must be transferred in this time; it begins anew otherwise."""

COMMIT_NOTICE_S: Final = 0.05
"""With nothing else to send, a backup learns so much later what is committed. It only shortens a later take-over."""

PAUSE_S: Final = (0.02, 1.0)
"""Before a backup that failed to answer is tried again: from, doubling, to."""


def report_from_wire(wire: Any) -> tuple[Report, list[Run], int]:
    """(what a replica holds, the runs of its log, what it has committed)."""
    match wire:
        case [[int(index), int(term)], configuration, [*promises], [*runs], int(committed)]:
            return (
                Report(
                    Point(index, term),
                    None if configuration is None else Configuration.from_wire(configuration),
                    tuple(map(Promise.from_wire, promises)),
                ),
                [Run(*map(int, run)) for run in runs],
                committed,
            )
    raise Unavailable(f"not the report of a replica: {wire!r:.200}")


class Sender:
    """Keeps one backup equal to the primary's log. ``progress`` is called whenever ``match`` or ``matched`` changed.

    ``match``: the log is known to be on the backup's medium up to this index. ``matched``: it follows entry by entry.
    """

    def __init__(
        self,
        replica: Replica,
        promise: Promise,
        name: str,
        progress: Callable[[], None],
        fenced: Callable[[Fenced], None],
    ) -> None:
        self.name = name
        self.match = 0
        self.matched = False
        self._replica = replica
        self._promise = promise
        self._progress = progress
        self._fenced = fenced
        self._wake = asyncio.Event()
        self._next = 0
        self._in_flight = 0
        self._told = 0
        self._error: GoStoreError | None = None
        group = replica.group
        self._task = group.env.tasks.start(self._run(), name=f"db-send-{group.shard}-{name}")
        self._stopped = False

    def wake(self) -> None:
        """There are new entries, or more is committed."""
        self._wake.set()

    def stop(self) -> None:
        self._stopped = True
        self._task.cancel()

    async def _run(self) -> None:
        pause_s = PAUSE_S[0]
        while True:
            try:
                await self._meet()
                pause_s = PAUSE_S[0]
                await self._stream()
            except Fenced as error:
                self._fenced(error)
                return
            except GoStoreError as error:
                self._replica.group.env.log.debug("shard %d: %s: %s", self._replica.group.shard, self.name, error)
            self.matched = False
            await asyncio.sleep(pause_s * self._replica.group.env.rng.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, PAUSE_S[1])

    async def _meet(self) -> None:
        """Find where the backup's log and this one part, or give it a snapshot."""
        replica, journal = self._replica, self._replica.journal
        reply = await replica.group.send(self.name, ["promise", self._promise.to_wire()], b"", APPEND_TIMEOUT_S)
        _, runs, committed = report_from_wire(reply.value)
        point = common_point(journal.runs(), runs)
        if point is None or point.index < committed or journal.term(point.index) is None:
            point = await self._install()
        self._next = point.index + 1
        self._told = 0
        self._error = None
        self.match = point.index
        self.matched = True
        self._progress()

    async def _install(self) -> Point:
        number, at, configuration = self._replica.open_snapshot()
        found = None if configuration is None else configuration.to_wire()
        message = ["install", self._promise.generation, self._promise.primary, number, list(at), found]
        await self._replica.group.send(self.name, message, b"", INSTALL_TIMEOUT_S)
        if self._replica.journal.term(at.index) != at.term:
            raise Unavailable(f"{self.name}: so much was written during its snapshot that it lags again")
        return at

    async def _stream(self) -> None:
        replica, journal = self._replica, self._replica.journal
        while True:
            if self._error is not None:
                raise self._error
            while self._in_flight < PIPELINE_MAX and self._next <= journal.last.index:
                self._send_batch()
            self._wake.clear()
            try:
                async with asyncio.timeout(COMMIT_NOTICE_S if self._told < replica.committed else None):
                    await self._wake.wait()
            except TimeoutError:
                if not self._in_flight and self._told < replica.committed:
                    self._send_batch()

    def _send_batch(self) -> None:
        """The next entries, possibly none; with what is committed."""
        replica, journal = self._replica, self._replica.journal
        term = journal.term(self._next - 1)
        if term is None:
            raise Unavailable(f"{self.name} lags more than what is kept of the log")
        entries = replica.batch(self._next)
        heads, data = entries_to_wire(entries)
        committed = replica.committed
        message = [
            "append", self._promise.generation, self._promise.primary, [self._next - 1, term], committed, heads,
        ]  # fmt: skip
        self._next += len(entries)
        self._in_flight += 1
        last = self._next - 1
        name = f"db-append-{replica.group.shard}-{self.name}"
        replica.group.env.tasks.start(self._deliver(message, data, last, committed), name=name)

    async def _deliver(self, message: list[object], data: bytes, last: int, committed: int) -> None:
        try:
            reply = await self._replica.group.send(self.name, message, data, APPEND_TIMEOUT_S)
            if self._stopped:
                return
            if not reply.value:
                raise Unavailable(f"{self.name}: its log does not meet entry {last}")
            self._told = max(self._told, committed)
            if last > self.match:
                self.match = last
                self._progress()
        except GoStoreError as error:
            self._error = error
        finally:
            self._in_flight -= 1
            self._wake.set()

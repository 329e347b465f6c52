"""One generation at its primary: from the log that was taken over to a served shard.

A generation begins when ``start_quorum`` of the planned replicas hold the whole log. Then a configuration entry with
these members is appended; when all of them have it, everything before is committed too, and the shard is served. Other
planned replicas become members one by one, each by a configuration entry of its own, as soon as they follow the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from gostore.core.errors import Fenced, GoStoreError, Timeout, Unavailable
from gostore.services.db.entries import (
    COMMAND,
    CONFIGURATION,
    LogEntry,
    Promise,
    pack_members,
)
from gostore.services.db.recovery import start_quorum
from gostore.services.db.replica import Replica
from gostore.services.db.sender import Sender

PROPOSALS_MAX: Final = 4096
"""Commands of one shard that may wait for their commit; more are refused as unavailable."""


class Leadership:
    """See the module. ``changed`` is called when a configuration is committed (then it serves), and at the end."""

    def __init__(self, replica: Replica, promise: Promise, copies_min: int, changed: Callable[[], None]) -> None:
        self.replica = replica
        self.promise = promise
        self.planned = promise.planned
        self.members: tuple[str, ...] = ()
        self.copies_min = copies_min
        self.serving = False
        self.ended: Fenced | None = None
        self._changed = changed
        self._begun = 0  # index of the first configuration of this generation
        self._configured = 0  # index of the latest one
        self._announced = 0  # index of the latest committed one that others were told of
        self._durable = 0
        self._flushing = False
        self._senders: dict[str, Sender] = {}

    @property
    def settled(self) -> bool:
        return (
            self.serving and sorted(self.members) == sorted(self.planned) and self.replica.committed >= self._configured
        )

    def start(self) -> None:
        """The log here is the one taken over, and on the medium."""
        self._durable = self.replica.journal.last.index
        self.plan(self.planned)
        self._progress()

    def plan(self, planned: tuple[str, ...]) -> None:
        """These should hold the shard; those that do not yet are brought up to date."""
        self.planned = planned
        for name in (*planned, *self.members):
            if name != self.replica.group.name and name not in self._senders:
                self._senders[name] = Sender(self.replica, self.promise, name, self._progress, self.end)
        self._grow()

    def end(self, why: Fenced) -> None:
        """Another generation rules, or this node stops."""
        if self.ended is None:
            self.ended = why
            self.serving = False
            for sender in self._senders.values():
                sender.stop()
            self._changed()

    # proposals

    async def propose(self, payload: bytes, deadline_s: float) -> Any:
        replica, shard = self.replica, self.replica.group.shard
        if len(self.members) < self.copies_min:
            raise Unavailable(
                f"shard {shard}: {len(self.members)} of the {self.copies_min} copies that a write needs are there: "
                "start nodes again, or try again when it is copied"
            )
        if len(replica.waiters) >= PROPOSALS_MAX:
            raise Unavailable(f"shard {shard}: {PROPOSALS_MAX} commands wait for their commit: try again later")
        index = self._append(COMMAND, payload)
        future = replica.waiters[index] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout_at(deadline_s):
                return await future
        except TimeoutError:
            raise Timeout(f"shard {shard}: entry {index} was not acknowledged by {', '.join(self.members)} in time: it "
                          "may still be; repeat it with its request id") from None  # fmt: skip
        finally:
            if replica.waiters.get(index) is future:
                del replica.waiters[index]

    def _append(self, kind: int, payload: bytes) -> int:
        journal = self.replica.journal
        index = journal.last.index + 1
        journal.append(LogEntry(self.promise.generation, index, kind, payload))
        for sender in self._senders.values():
            sender.wake()
        if not self._flushing:
            self._flushing = True
            self.replica.group.env.tasks.start(self._flush(), name=f"db-flush-{self.replica.group.shard}")
        return index

    async def _flush(self) -> None:
        """The primary's own copy: synced while the backups sync theirs."""
        try:
            while self.ended is None and self._durable < self.replica.journal.last.index:
                last = self.replica.journal.last.index
                await self.replica.group.wal.sync()
                if self.ended is None:
                    self._durable = last
                    self._progress()
        except GoStoreError as error:
            self.replica.group.env.log.warning("shard %d: %s", self.replica.group.shard, error)
        finally:
            self._flushing = False

    # progress

    def _match(self, name: str) -> int:
        if name == self.replica.group.name:
            return self._durable
        sender = self._senders.get(name)
        return 0 if sender is None else sender.match

    def _progress(self) -> None:
        """More is durable somewhere: begin, commit or grow."""
        if self.ended is not None:
            return
        if not self._begun:
            self._begin()
            return
        committed = min(self._match(name) for name in self.members)
        if committed >= self._begun and committed > self.replica.committed:
            self.replica.advance(committed)
            for sender in self._senders.values():
                sender.wake()
            if not self.serving:
                self.serving = True
                self.replica.group.machine.serving()
        if self._announced < self._configured <= self.replica.committed:
            self._announced = self._configured
            self._changed()
        self._grow()

    def _following(self) -> tuple[str, ...]:
        """The planned replicas that follow the log, this node included."""
        return tuple(
            name for name in self.planned
            if name == self.replica.group.name or ((sender := self._senders.get(name)) is not None and sender.matched)
        )  # fmt: skip

    def _begin(self) -> None:
        last = self.replica.journal.last.index
        holders = tuple(name for name in self._following() if self._match(name) >= last)
        if len(holders) >= start_quorum(len(self.planned), self.copies_min):
            self._begun = self._configure(holders)

    def _grow(self) -> None:
        """Make members of those that follow by now, one configuration after the other."""
        if not self.serving or self.replica.committed < self._configured:
            return
        following = self._following()
        missing = [name for name in self.planned if name not in self.members and name in following]
        if missing:
            self._configure(tuple(name for name in self.planned if name in self.members or name in missing) + tuple(
                name for name in self.members if name not in self.planned
            ))  # fmt: skip

    def _configure(self, members: tuple[str, ...]) -> int:
        group = self.replica.group
        self.members = members
        self._configured = self._append(CONFIGURATION, pack_members(members, self.copies_min))
        if group.env.events.active:
            group.env.events.publish(
                "shard_primary", shard=group.shard, generation=self.promise.generation, replicas=list(members)
            )
        return self._configured

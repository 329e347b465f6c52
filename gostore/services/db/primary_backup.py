"""The replication policy ``primary_backup``, a lesson: one primary orders, all backups acknowledge.

Theory of operation
===================

The first of a shard's owners in the cluster's view is its *primary*. It appends a command to its log, sends it to all
backups at once, syncs its own log meanwhile, and acknowledges when *every member* of the current configuration has
synced it (Alsberg and Day, "A Principle for Resilient Sharing of Distributed Resources", ICSE 1976; with generations
and reconfiguration as in Lin et al., "PacificA", MSR-TR-2008-25). So each member alone has everything that was ever
acknowledged, and reads at the primary need no messages.

When the view changes the first owner, or a member is lost, the primary starts a new *generation*
(epoch x 1000 + attempt). It asks the replicas to *promise* not to follow an older one, takes over the most advanced log
(see ``recovery``: from whom it may), brings enough of the planned replicas up to date, and begins
(see ``leadership``). What was in the log that it took over is committed by this, whether it had been acknowledged or
not; the tails of others are truncated. Requests wait for all this as long as their deadline allows.

What it teaches. Who is primary is decided by the view alone. A primary that was deposed and does not know it cannot
*write* any more, because a backup that promised to another refuses it (``Fenced``); but it still *reads* from its own
state, which may be stale. And where two views do not know of one another, there may be two primaries. Raft's terms and
quorums exist to exclude both.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from gostore.cluster.members import NodeState
from gostore.cluster.view import View
from gostore.comm import Reply
from gostore.core.errors import BadRequest, Fenced, GoStoreError, NotOwner, Unavailable
from gostore.services.db.entries import COMMAND, Configuration, Point, Promise, Run, entries_from_wire
from gostore.services.db.leadership import Leadership
from gostore.services.db.recovery import Report, Verdict, judge, start_quorum
from gostore.services.db.replica import Replica
from gostore.services.db.replication import Group, ShardStatus, together
from gostore.services.db.sender import report_from_wire

GENERATIONS_PER_EPOCH: Final = 1000

ASK_TIMEOUT_S: Final = 1.0
"""For the promise of one replica; whoever is silent is asked again in the next attempt."""

PAUSE_S: Final = (0.02, 1.0)
"""Between attempts to take over: from, doubling, to. A new view ends the pause."""

RETIRE_PAUSE_S: Final = (0.5, 30.0)
"""Between questions of a former replica whether its copy is still needed: from, doubling, to."""


class PrimaryBackup:
    """See the page above."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._replica = Replica(group)
        self._leadership: Leadership | None = None
        self._owners: tuple[str, ...] = ()
        self._obstacle = "no view of the cluster yet"
        self._look = asyncio.Event()
        self._changed = asyncio.Event()
        self._retiring = False
        self._heard = 0  # the newest generation that somebody refused to leave

    async def start(self) -> None:
        self._group.env.tasks.start(self._lead_forever(), name=f"db-lead-{self._group.shard}")

    # who serves

    def on_view(self, view: View) -> None:
        owners = self._group.owners(view)
        if owners == self._owners and self._leadership is None and not self._leads():
            return
        self._owners = owners
        self._look.set()
        self._notify()
        self._retire_if_former()

    def _leads(self) -> bool:
        return self._owners[:1] == (self._group.name,)

    def _notify(self) -> None:
        """Wake everybody who waits for a change of role."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _serving(self, deadline_s: float) -> Leadership:
        while True:
            if not self._leads():
                owner = self._owners[0] if self._owners else None
                raise NotOwner(f"shard {self._group.shard}: its primary is {owner}", owner=owner)
            if self._leadership is not None and self._leadership.serving:
                return self._leadership
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._changed.wait()
            except TimeoutError:
                raise Unavailable(
                    f"shard {self._group.shard} is being taken over by {self._group.name}: {self._obstacle}"
                ) from None

    async def propose(self, payload: bytes, deadline_s: float) -> Any:
        leadership = await self._serving(deadline_s)
        return await leadership.propose(payload, deadline_s)

    async def read_barrier(self, deadline_s: float) -> None:
        await self._serving(deadline_s)

    # taking over

    async def _lead_forever(self) -> None:
        pause_s = PAUSE_S[0]
        while True:
            if not self._leads() or not self._needs_generation():
                pause_s = PAUSE_S[0]
                await self._look.wait()
                self._look.clear()
                continue
            try:
                await self._take_over()
                self._obstacle = "its replicas are being brought up to date"
            except GoStoreError as error:
                self._obstacle = error.message
                self._group.env.log.info("%s: %s", self._group.name, error.message)
                self._retire_if_former()  # what it had taken over when the view changed
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S[1])

    async def _pause(self, pause_s: float) -> None:
        """Until a new view, or for a while."""
        try:
            async with asyncio.timeout(pause_s * self._group.env.rng.uniform(0.5, 1.0)):
                await self._look.wait()
        except TimeoutError:
            pass
        self._look.clear()

    def _needs_generation(self) -> bool:
        """Is the current generation, if any, unable to go on, or can it be replaced by the planned one?"""
        leadership = self._leadership
        if leadership is None or leadership.ended is not None:
            return True
        members = leadership.members or leadership.planned
        superfluous = [name for name in members if name not in self._owners]
        if not superfluous:
            leadership.plan(self._owners)
            return False
        online = self._group.view().online
        lost = any(name not in online for name in superfluous)
        if not lost and leadership.serving:
            # Those who come are copied to while those who go still serve; then the members change at once.
            leadership.plan(self._owners)
            lost = all(name in leadership.members for name in self._owners)
        return lost or not leadership.serving

    async def _take_over(self) -> None:
        """Start a generation. Raises :class:`GoStoreError` that says what is in the way."""
        group, replica, owners = self._group, self._replica, self._owners
        before, self._leadership = self._leadership, None
        if before is not None:
            # Those who wait for its entries go on waiting: the log stays, and they are committed by what follows.
            before.end(Fenced(f"shard {group.shard}: {group.name} starts another generation"))
        configuration = replica.journal.configuration
        known = max(replica.generation, replica.journal.last.term, self._heard)
        generation = max(group.view().epoch * GENERATIONS_PER_EPOCH, known + 1)
        copies_min = max(min(group.copies_min, len(owners)), configuration.copies_min if configuration else 1)
        promise = Promise(generation, group.name, owners, start_quorum(len(owners), copies_min))
        reports = {group.name: await replica.promise(promise)}
        verdict = await self._ask(promise, reports)
        if verdict.waits:
            raise Unavailable(
                f"shard {group.shard} waits for {', '.join(verdict.waits)}: {verdict.why}; start them again"
            )
        if verdict.source is not None and verdict.source != group.name:
            await replica.pull(verdict.source)
        if self._owners != owners or replica.generation != generation:
            raise Unavailable(f"shard {group.shard}: the view changed while it was taken over")
        configuration = replica.journal.configuration
        if configuration is not None:
            copies_min = max(copies_min, configuration.copies_min)
        self._leadership = Leadership(replica, promise, copies_min, self._on_leadership)
        self._leadership.start()

    async def _ask(self, promise: Promise, reports: dict[str, Report]) -> Verdict:
        """Collect promises from all who may know something, until the answers allow a verdict."""
        view = self._group.view()
        # A member that is joining for the first time cannot hold anything.
        everybody = [
            name
            for name, member in view.members.items()
            if member.state not in (NodeState.LEFT, NodeState.JOINING) or name in promise.planned
        ]
        asked = {self._group.name: True}
        while True:
            candidates = dict.fromkeys(promise.planned)
            for name in sorted(reports):
                report = reports[name]
                candidates.update(dict.fromkeys(report.configuration.members if report.configuration else ()))
                for made in report.promises:
                    candidates.update(dict.fromkeys(made.planned))
            if not any(report.configuration for report in reports.values()):
                candidates.update(dict.fromkeys(everybody))
            todo = [name for name in candidates if name not in asked and self._reachable(view, name)]
            verdict = judge(self._group.name, reports, everybody, promise.generation)
            if not todo:
                return verdict
            asked.update(dict.fromkeys(todo, True))
            await together(
                self._group.env,
                f"db-ask-{self._group.shard}",
                (self._ask_one(name, promise, reports) for name in todo),
            )
            if self._heard >= promise.generation:
                raise Fenced(f"shard {self._group.shard}: generation {self._heard} was promised to another primary")

    def _reachable(self, view: View, name: str) -> bool:
        member = view.members.get(name)
        return member is not None and member.state not in (NodeState.LEFT, NodeState.OFFLINE)

    async def _ask_one(self, name: str, promise: Promise, reports: dict[str, Report]) -> None:
        try:
            reply = await self._group.send(name, ["promise", promise.to_wire()], b"", ASK_TIMEOUT_S)
            reports[name] = report_from_wire(reply.value)[0]
        except Fenced as error:
            self._heard = max(self._heard, int(error.details.get("generation", 0)))
        except GoStoreError as error:
            self._group.env.log.debug("shard %d: %s does not promise: %s", self._group.shard, name, error.message)

    def _on_leadership(self) -> None:
        """It began to serve, grew, or ended."""
        leadership = self._leadership
        if leadership is not None and leadership.ended is not None:
            self._replica.fail_waiters(f"{self._group.name} is no longer its primary: {leadership.ended.message}")
        self._look.set()
        self._notify()

    # messages of other replicas

    async def handle(self, source: str, message: list[Any], data: bytes) -> Reply:
        replica = self._replica
        match message:
            case ["append", int(generation), str(primary), [int(index), int(term)], int(committed), [*heads]]:
                return await self._append(generation, primary, Point(index, term), committed, heads, data)
            case ["promise", wire]:
                return await self._promise(Promise.from_wire(wire))
            case ["pull", int(generation), str(primary), [*runs]]:
                self._follow(generation, primary)
                return replica.give([Run(*map(int, run)) for run in runs])
            case ["piece", int(number), int(piece)]:
                return replica.piece(number, piece)
            case ["install", int(generation), str(primary), int(number), [int(index), int(term)], found]:
                self._follow(generation, primary)
                configuration = None if found is None else Configuration.from_wire(found)
                try:
                    return Reply(await replica.install(source, number, Point(index, term), configuration))
                finally:
                    self._retire_if_former()
            case ["settled", int(generation)]:
                leadership = self._leadership
                if leadership is not None and leadership.promise.generation < generation:
                    # The former replica cannot let go of its copy for an older generation than it has promised.
                    self._heard = max(self._heard, generation)
                    leadership.end(Fenced(f"{source} has promised generation {generation}"))
                if leadership is None or not leadership.settled or not self._leads():
                    return Reply(None)
                return Reply([leadership.promise.to_wire(), list(leadership.members)])
        raise BadRequest(f"shard {self._group.shard}: no message of primary_backup: {message!r:.100}")

    def _follow(self, generation: int, primary: str) -> None:
        """Raises ``Fenced`` unless exactly this generation was promised."""
        self._replica.check(generation, primary)
        if generation != self._replica.generation:
            raise Unavailable(f"{self._group.name} was not asked for its promise to generation {generation}")

    async def _promise(self, promise: Promise) -> Reply:
        replica = self._replica
        replica.check(promise.generation, promise.primary)
        self._depose(promise)
        report = await replica.promise(promise)
        configuration = None if report.configuration is None else report.configuration.to_wire()
        before = [made.to_wire() for made in report.promises]
        runs = [list(run) for run in replica.journal.runs()]
        return Reply([list(report.last), configuration, before, runs, replica.committed])

    def _depose(self, promise: Promise) -> None:
        """Another generation is promised here: the one that this node leads, if any, is over."""
        leadership = self._leadership
        if leadership is not None and leadership.promise != promise:
            leadership.end(Fenced(f"{promise.primary} started generation {promise.generation}"))

    async def _append(
        self, generation: int, primary: str, previous: Point, committed: int, heads: list[Any], data: bytes
    ) -> Reply:
        replica = self._replica
        self._follow(generation, primary)
        try:
            if not await replica.accept(previous, entries_from_wire(heads, data)):
                return Reply(False)
            # A newer generation may have truncated it while it was synced.
            self._follow(generation, primary)
        finally:
            self._retire_if_former()  # also when it has: what was appended is here
        replica.advance(min(committed, previous.index + len(heads)))
        return Reply(True)

    # leaving

    def _retire_if_former(self) -> None:
        """A copy that is no longer wanted here: also one that a primary with an older view has just sent."""
        if self._group.name not in self._owners and not self._replica.journal.empty and not self._retiring:
            self._retiring = True
            self._group.env.tasks.start(self._retire(), name=f"db-retire-{self._group.shard}")

    async def _retire(self) -> None:
        """Drop the copy of a shard that others hold by now."""
        pause_s = RETIRE_PAUSE_S[0]
        try:
            while self._group.name not in self._owners and not self._replica.journal.empty:
                if self._owners and await self._dismissed(self._owners[0]):
                    await self._replica.clear()
                    return
                await asyncio.sleep(pause_s * self._group.env.rng.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, RETIRE_PAUSE_S[1])
        finally:
            self._retiring = False

    async def _dismissed(self, primary: str) -> bool:
        """Does the primary serve a generation, complete and not older than any known here, without this node?"""
        try:
            reply = await self._group.send(primary, ["settled", self._replica.generation], b"", ASK_TIMEOUT_S)
            if reply.value is None:
                return False
            promise = Promise.from_wire(reply.value[0])
            if self._group.name in reply.value[1] or promise.generation < self._replica.generation:
                return False
            # So that a later recovery learns from this node that the generation exists.
            self._depose(promise)
            await self._replica.promise(promise)
        except GoStoreError as error:
            self._group.env.log.debug("shard %d is kept: %s", self._group.shard, error.message)
            return False
        return self._group.name not in self._owners and self._replica.generation == promise.generation

    # what others see

    @property
    def role(self) -> str:
        leadership = self._leadership
        if self._leads():
            return "primary" if leadership is not None and leadership.serving else "recovering"
        return "idle" if self._replica.journal.empty else "backup"

    @property
    def primary(self) -> str | None:
        return self._owners[0] if self._owners else None

    def unapplied(self) -> list[tuple[int, bytes | None]]:
        journal, first = self._replica.journal, self._replica.applied + 1
        entries = [journal.entry(index) for index in range(first, journal.last.index + 1)]
        return [(entry.index, entry.payload if entry.kind == COMMAND else None) for entry in entries]

    def status(self) -> ShardStatus:
        leadership, configuration, role = self._leadership, self._replica.journal.configuration, self.role
        return ShardStatus(
            self._group.shard,
            role,
            self.primary,
            self._replica.generation,
            configuration.members if configuration is not None else (),
            self._owners,
            self._replica.journal.last.index,
            self._replica.committed,
            role == "primary" and leadership is not None and leadership.settled,
            {"obstacle": self._obstacle} if role == "recovering" else {},
        )

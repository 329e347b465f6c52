"""One group at one node: what is asked of it, and what its core's work means to those who wait. See :mod:`.groups`.

    group = groups.open(number, "shard 3", machine)   # replays what is there
    group.begin(("n1", "n2", "n3"))                   # its founders; () where it is told by the leader; later: nothing
    group.campaign()                                  # at the first of the founders
    outcome = await group.propose(payload, deadline_s)
    await group.read_barrier(deadline_s)              # then this node's machine may be read, linearizably
    await group.change(voters, learners, deadline_s)
    group.on_change = ...                             # role, term, leader, configuration; it serves; or holds anything

Deadlines are loop times. ``NotOwner`` (``details["owner"]``: the leader, or None) is definite, ``Unavailable`` is
unless it says otherwise, ``Timeout`` is indefinite: what was proposed may still be applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from gostore.consensus.configuration import Configuration
from gostore.consensus.journal import Journal
from gostore.consensus.messages import COMMAND, CONFIGURATION, NOOP, Entry, Message, Point, Vote
from gostore.consensus.pieces import FRAGMENT_SIZE_BYTES_MAX, fragments
from gostore.consensus.raft import Raft
from gostore.consensus.ready import FOLLOWER, LEADER, HardState, ReadState, Ready, Snapshot, Status
from gostore.core.errors import GoStoreError, NotOwner, Timeout, Unavailable

if TYPE_CHECKING:
    from gostore.consensus.groups import Groups

EARLY_MAX: Final = 16
"""Peers whose question for a vote is kept until the group begins here."""

READERS_MAX: Final = 4096
"""Reads that share one question for an index; more are refused as unavailable."""

PROPOSALS_MAX: Final = 4096
"""Commands of one group that may wait for their commit at one node; more are refused as unavailable."""


SUCCESSOR_TIMEOUTS: Final = 3.0
"""Election time-outs in which a successor is usually found and has committed what it inherits; whoever waits for a
deposed leader is told after them that nobody knows. Larger: fewer doubts; smaller: a command is repeated elsewhere
sooner."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """When a group writes its state as a snapshot, and drops its log.

    ``size_bytes`` of entries since the last one, and more than the state weighs: then at most as many bytes go into
    snapshots as into entries. Or so many ``entries``, which bounds the replay after a restart, if they weigh a quarter
    of the state.
    """

    size_bytes: int = 4 * 1024 * 1024
    entries: int = 20_000

    @property
    def tail_entries(self) -> int:
        """Kept in front of a snapshot, so that a replica that lags a little needs none."""
        return min(256, self.entries // 4)


class StateMachine(Protocol):
    """What the log is for. All are synchronous: nothing else runs meanwhile."""

    @property
    def size_bytes(self) -> int:
        """About what a snapshot weighs."""
        ...

    def apply(self, index: int, payload: bytes) -> Any:
        """Execute a committed entry; returns the outcome for whoever proposed it. An exception stops the node."""
        ...

    def skip(self, index: int) -> None:
        """A committed entry of the group's own."""
        ...

    def snapshot(self) -> Iterator[bytes]:
        """The state of this moment, in pieces of any size, whatever is applied meanwhile."""
        ...

    def restore(self, pieces: list[bytes]) -> None:
        """Become the state of a snapshot; an empty list means the initial state."""
        ...


class Group:
    """Made by :meth:`Groups.open`. ``applied``: the index up to which the machine is. ``on_change``: see the module."""

    def __init__(self, groups: Groups, number: int, name: str, machine: StateMachine, compaction: Compaction) -> None:
        self.number = number
        self.name = name
        self.machine = machine
        self.on_change: Callable[[], None] = lambda: None
        self.journal = Journal(groups.wal, number)
        self.applied = self.journal.start.index
        self.armed_s = float("inf")
        """When the driver's timer will look at it."""
        self.raft: Raft | None = None
        self._groups = groups
        self._env = groups.env
        self._loop = asyncio.get_running_loop()
        self._now_s = groups.time_s
        self._compaction = compaction
        self._served = 0  # the latest term in which this node began to serve
        self._waiters: dict[int, tuple[int, asyncio.Future[Any]]] = {}
        self._reads: dict[int, list[asyncio.Future[None]]] = {}
        self._read_number = 0
        self._gathering: list[asyncio.Future[None]] | None = None
        self._changed = asyncio.Event()
        self._compacting = False
        self._installing_term = 0
        self._early: dict[str, Vote] = {}
        self.snapshots_installed = 0
        if state := self.journal.take_state():
            machine.restore(state)
        if not self.journal.empty:
            self._start()

    def __repr__(self) -> str:
        return f"<Group {self.number} {self.name!r} {self.status}>"

    def _start(self) -> None:
        self.raft = Raft(
            self._env.name, self.journal.restored(), self, self._groups.tunables, self._env.rng, self._now_s()
        )

    def ready(self) -> Ready | None:
        """The work that there is now, as :meth:`Raft.ready`."""
        self._gathering = None  # whoever reads from now on may come too late for the round that is sent now
        return None if self.raft is None else self.raft.ready(self._now_s())

    # what there is

    @property
    def begun(self) -> bool:
        """It takes part; until :meth:`begin` a new one does not."""
        return self.raft is not None

    @property
    def status(self) -> Status:
        return Status(FOLLOWER, 0, None) if self.raft is None else self.raft.status

    @property
    def role(self) -> str:
        return FOLLOWER if self.raft is None else self.raft.role

    @property
    def leader(self) -> str | None:
        return None if self.raft is None else self.raft.leader

    @property
    def serves(self) -> bool:
        """It leads, and everything that may have been acknowledged before is applied."""
        return self.raft is not None and self.raft.role == LEADER and self._served == self.raft.term

    @property
    def configuration(self) -> Configuration:
        """In force here: the latest in the log, committed or not."""
        return Configuration() if self.raft is None else self.raft.configuration

    @property
    def settled(self) -> bool:
        """The configuration in force is committed, and no change of it is under way."""
        raft = self.raft
        return raft is not None and raft.log.configuration_index <= self.applied and not raft.configuration.joint

    @property
    def dismissed(self) -> bool:
        """This node is no member, as far as it can know.

        A replica that is catching up passes configurations of the past, from before it was added: they say nothing.
        """
        raft = self.raft
        if raft is None or raft.lags or not self.settled:
            return False
        return bool(raft.configuration.voters) and self._env.name not in raft.configuration.members

    @property
    def committed(self) -> int:
        return 0 if self.raft is None else self.raft.log.committed

    @property
    def last(self) -> Point:
        return self.journal.start if self.raft is None else self.raft.log.last

    def caught_up(self, name: str) -> bool:
        """Whether a learner may become a voter; false when this node does not lead."""
        return self.raft is not None and self.raft.caught_up(name)

    @property
    def quiet(self) -> bool:
        """Everybody is up to date, and no timer runs."""
        return self.raft is not None and self.raft.asleep

    @property
    def snapshot_index(self) -> int:
        """Up to which the latest snapshot stands for the log."""
        return self.journal.start.index

    def statistics(self) -> dict[str, Any]:
        """For views: as :meth:`Raft.statistics`, and ``snapshot``: the index of the latest one; ``installed``: how many
        came from a leader since the start; ``size_bytes``: about what one weighs. Of a follower that is being sent one
        there is ``sent_bytes``: what it has acknowledged.
        """
        found = {} if self.raft is None else self.raft.statistics()
        for follower in found.get("followers", {}).values():
            if "chunk" in follower:
                follower["sent_bytes"] = follower["chunk"] * FRAGMENT_SIZE_BYTES_MAX
        return {
            **found, "applied": self.applied, "snapshot": self.snapshot_index, "installed": self.snapshots_installed,
            "size_bytes": self.machine.size_bytes,
        }  # fmt: skip

    # what is asked of it

    def begin(self, founders: Sequence[str]) -> None:
        """Take part. ``founders``: the first voters of the group, if this node is one of them; otherwise nobody.

        Every founder must be given the same ones, and nobody who lost its log may be given any. A second call, or one
        for a group that has a log, does nothing.
        """
        if self.raft is None and self.journal.empty:
            self.journal.found(Configuration(tuple(founders)))
            self._start()
            self._groups.mark(self)
            early, self._early = self._early, {}
            for source, vote in early.items():
                self.receive(source, vote)

    def _core(self) -> Raft:
        if self.raft is None:
            raise NotOwner(f"{self.name}: {self._env.name} does not take part yet", owner=None)
        return self.raft

    async def propose(self, payload: bytes, deadline_s: float) -> Any:
        """Commit and apply one command; returns its outcome. Raises as the module says, and ``TooLarge``."""
        raft = self._core()
        if len(self._waiters) >= PROPOSALS_MAX:
            raise Unavailable(f"{self.name}: {PROPOSALS_MAX} commands wait for their commit: try again later")
        point = raft.propose((payload,), self._now_s())
        future = self._loop.create_future()
        self._waiters[point.index] = (point.term, future)
        self._groups.mark(self)
        self._groups.deadlines.add(future, deadline_s, self._not_committed, point.index)
        try:
            return await future
        finally:
            if self._waiters.get(point.index, (0, None))[1] is future:
                del self._waiters[point.index]

    async def propose_all(self, payloads: Sequence[bytes], deadline_s: float) -> list[Any]:
        """As :meth:`propose` of each in this order, with nothing in between; of one that failed there is its error.

        Raises only when none of them was proposed.
        """
        raft = self._core()
        if len(self._waiters) + len(payloads) > PROPOSALS_MAX:
            raise Unavailable(f"{self.name}: {len(self._waiters)} commands wait for their commit: try again later")
        point = raft.propose(payloads, self._now_s())
        futures: list[asyncio.Future[Any]] = []
        for index in range(point.index, point.index + len(payloads)):
            future = self._loop.create_future()
            futures.append(future)
            self._waiters[index] = (point.term, future)
        self._groups.mark(self)
        # They are applied in their order: what is not told when the last one is, never will be.
        self._groups.deadlines.add(futures[-1], deadline_s, self._not_committed, point.index + len(futures) - 1)
        try:
            await asyncio.wait((futures[-1],))
        finally:
            for index, future in enumerate(futures, point.index):
                if self._waiters.get(index, (0, None))[1] is future:
                    del self._waiters[index]
        return [
            (future.exception() or future.result()) if future.done() else self._not_committed(index)
            for index, future in enumerate(futures, point.index)
        ]

    def _not_committed(self, index: int) -> Timeout:
        return Timeout(
            f"{self.name}: entry {index} was not committed in time by {self.configuration}: it may still be; repeat it "
            "with its request id"
        )

    async def read_barrier(self, deadline_s: float) -> None:
        """Return when this node's machine may be read; at a follower too. All errors are definite.

        Those who ask before the core hands out its work again are one reader to it.
        """
        gathering = self._gathering
        if gathering is None:
            number = self._read_number + 1
            self._core().read(number, self._now_s())
            self._read_number = number
            gathering = self._gathering = self._reads[number] = []
            self._groups.mark(self)
        elif len(gathering) >= READERS_MAX:
            raise Unavailable(f"{self.name}: {READERS_MAX} reads wait for their index: try again later")
        future: asyncio.Future[None] = self._loop.create_future()
        gathering.append(future)
        self._groups.deadlines.add(future, deadline_s, self._not_confirmed)
        await future

    def _not_confirmed(self) -> Unavailable:
        return Unavailable(
            f"{self.name}: no quorum of {self.configuration} confirmed in time that {self.leader} leads: try again"
        )

    async def change(self, voters: Sequence[str], learners: Sequence[str], deadline_s: float) -> None:
        """Change the members; returns when that is committed. See :meth:`Raft.change` for what is refused.

        Raises ``Timeout`` (indefinite) when it is not committed in time, or this node leads no longer.
        """
        raft = self._core()
        point = raft.change(voters, learners, self._now_s())
        self._groups.mark(self)
        while not (self.settled and self.applied >= point.index):
            if raft is not self.raft or raft.role != LEADER or raft.term != point.term:
                raise Timeout(f"{self.name}: {self._env.name} leads no longer: the change may still be committed")
            await self.wait_changed(deadline_s)

    async def wait_changed(self, deadline_s: float) -> None:
        """Until ``on_change`` is called the next time. Raises ``Timeout``."""
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._changed.wait()
        except TimeoutError:
            raise Timeout(f"{self.name}: nothing has changed in time; it is {self.status}") from None

    def transfer(self, to: str | None = None) -> str:
        """Begin to hand the lead over; returns to whom. Raises as :meth:`Raft.transfer`; ``on_change`` tells more."""
        successor = self._core().transfer(to, self._now_s())
        self._groups.mark(self)
        return successor

    def campaign(self) -> bool:
        """Stand now. False when this node leads already, or has no vote."""
        if self.raft is None or not self.raft.campaign(self._now_s()):
            return False
        self._groups.mark(self)
        return True

    def wake(self, suspected: str) -> None:
        """A member is suspected: if it is the leader, look for another one."""
        if self.raft is not None and self.raft.leader == suspected and self.raft.role == FOLLOWER:
            self.raft.wake(self._now_s(), leader_suspected=True)
            self._groups.mark(self)

    def stir(self) -> None:
        """If it is quiet: look whether the leader still lives; or, at the leader, whether it still has a quorum."""
        if self.raft is not None and (self.raft.quiet or self.raft.role == LEADER):
            self.raft.wake(self._now_s())
            self._groups.mark(self)

    async def clear(self) -> None:
        """Forget the log and the state, as a committed configuration is without this node. Durable at return.

        What is kept is the term, one higher, so that nobody takes an answer of before for one of after, and the *tomb*,
        the last point of the log: as long as this node holds less than that, it grants no votes. For a replica that
        lags behind its removal may still count them.
        """
        raft = self._core()
        tomb = max(raft.log.last, self.journal.tomb, key=lambda point: (point.term, point.index))
        self.raft = None  # messages are dropped meanwhile, and what waits for the medium is not reported
        self.journal.clear(HardState(raft.term + 1, None, 0), tomb)
        position = self.journal.take_drop()
        self.machine.restore([])
        self.applied = 0
        self.fail("this node is no longer a member")
        await self._groups.wal.sync()
        self.journal.drop(position)
        self._start()
        self._groups.mark(self)
        self._notify()

    # Storage, for the core

    def entries(self, first: int, last: int) -> Iterator[Entry]:
        return self.journal.entries(first, last)

    def snapshot(self) -> Snapshot | None:
        point, configuration = self._here()
        return Snapshot(point, configuration, fragments(self.machine.snapshot()))

    def _here(self) -> tuple[Point, Configuration]:
        """What has been applied, and the configuration there."""
        assert self.raft is not None
        term = self.raft.log.term(self.applied)
        assert term is not None, f"entry {self.applied} is not in the log"
        return Point(self.applied, term), self.raft.configuration_at(self.applied)

    # what the driver does

    def receive(self, source: str, message: Message) -> None:
        """Raises ``Corrupt`` as :meth:`Raft.receive`.

        The first founder stands as soon as it knows of the group, which may be before the others do. Its question is
        kept: if it were lost, the new group would be without a leader for an election time-out.
        """
        raft = self.raft
        if raft is None:
            if isinstance(message, Vote) and self.journal.empty and len(self._early) < EARLY_MAX:
                self._early[source] = message
            return
        if isinstance(message, Vote) and self._is_buried(raft):
            return
        raft.receive(source, message, self._now_s())
        self._groups.mark(self)

    def _is_buried(self, raft: Raft) -> bool:
        tomb, last = self.journal.tomb, raft.log.last
        return (last.term, last.index) < (tomb.term, tomb.index)

    def write(self, ready: Ready) -> None:
        """What must be on the medium, in its order."""
        journal = self.journal
        if ready.hard_state is not None:
            journal.write_hard(ready.hard_state)
        for chunk in ready.chunks:
            if chunk.number == 0:
                self._installing_term = chunk.term
                journal.begin_installation(chunk.point, chunk.configuration)
            if chunk.done:
                self._install(chunk.point)
            else:
                journal.add_part(chunk.data)
        if ready.truncate_from is not None:
            journal.truncate(ready.truncate_from)
        journal.append(ready.entries)

    def _install(self, point: Point) -> None:
        pieces = self.journal.end_installation()
        self.machine.restore(pieces)
        self.applied = point.index
        self.snapshots_installed += 1
        self._fail_waiters("the log was replaced by a snapshot", upto=point.index)
        self._env.events.publish(
            "raft_snapshot", group=self.name, index=point.index, term=point.term, bytes=sum(map(len, pieces))
        )

    def apply(self, ready: Ready) -> None:
        """What is committed, and what may be read; then whoever watches is told of a change."""
        changed = ready.status is not None or bool(ready.chunks and ready.chunks[-1].done)
        changed = changed or bool(ready.entries and ready.entries[0].index == 1)
        for entry in ready.committed:
            outcome = None
            if entry.kind == COMMAND:
                outcome = self.machine.apply(entry.index, entry.payload)
            else:
                self.machine.skip(entry.index)
            self.applied = entry.index
            if entry.kind != COMMAND:
                changed = self._applied_own(entry) or changed
            if entry.index in self._waiters:
                self._resolve(entry, outcome)
        for read in ready.reads:
            self._answer(read)
        if ready.status is not None:
            if ready.status.role == LEADER:
                self._env.events.publish("raft_leader", group=self.name, term=ready.status.term, leader=self._env.name)
            else:
                self._hasten()
        if self.raft is not None and self.raft.term > self._installing_term:
            self.journal.give_up_installation()  # the core has forgotten how far it was
        if changed:
            self._notify()
        if ready.committed:
            self._consider_compaction()

    def _applied_own(self, entry: Entry) -> bool:
        """An entry of the group's own; whether that is a change."""
        raft = self.raft
        assert raft is not None
        leads = raft.role == LEADER
        if entry.kind == NOOP:
            self._served = entry.term
            return leads and entry.term == raft.term
        if entry.kind == CONFIGURATION and leads:
            made = Configuration.unpack(entry.payload)
            self._env.events.publish(
                "raft_configuration", group=self.name, index=entry.index, voters=list(made.voters),
                learners=list(made.learners), outgoing=list(made.outgoing),
            )  # fmt: skip
        return True

    def _hasten(self) -> None:
        """This node does not lead: what it had taken as a leader will be committed by its successor soon, or never."""
        until_s = self._now_s() + SUCCESSOR_TIMEOUTS * self._groups.tunables.election_timeout_s
        for index, (_, future) in self._waiters.items():
            self._groups.deadlines.add(future, until_s, self._not_committed, index)

    def _resolve(self, entry: Entry, outcome: Any) -> None:
        term, future = self._waiters.pop(entry.index)
        if future.done():
            return
        if term == entry.term:
            future.set_result(outcome)
        else:
            future.set_exception(
                NotOwner(f"{self.name}: entry {entry.index} was lost with the lead: ask again", owner=self.leader)
            )

    def _answer(self, read: ReadState) -> None:
        for future in self._reads.pop(read.context, ()):
            if future.done():
                continue
            if read.index is not None:
                future.set_result(None)
            else:
                future.set_exception(NotOwner(f"{self.name}: the lead has changed: ask again", owner=self.leader))

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self.on_change()

    def fail(self, why: str) -> None:
        """Whoever waits here waits in vain."""
        self._fail_waiters(why)
        reads, self._reads, self._gathering = self._reads, {}, None
        for future in (future for futures in reads.values() for future in futures):
            if not future.done():
                future.set_exception(Unavailable(f"{self.name}: {why}"))

    def _fail_waiters(self, why: str, upto: int | None = None) -> None:
        for index in [index for index in self._waiters if upto is None or index <= upto]:
            _, future = self._waiters.pop(index)
            if not future.done():
                future.set_exception(Unavailable(f"{self.name}: {why}: it may have happened", definite=False))

    # compaction

    def _consider_compaction(self) -> None:
        journal, compaction = self.journal, self._compaction
        state = self.machine.size_bytes
        due = journal.size_since_snapshot > max(compaction.size_bytes, state) or (
            journal.entries_since_snapshot > compaction.entries and journal.size_since_snapshot > state // 4
        )
        if due and not self._compacting and self.applied > journal.start.index:
            self._compacting = True
            self._env.tasks.start(self._compact(), name=f"raft-compact-{self.number}")

    async def _compact(self) -> None:
        """Write the applied state as a snapshot, and let go of the log before it."""
        journal, wal = self.journal, self._groups.wal
        try:
            if self.raft is None:
                return
            raft, pieces = self.raft, fragments(self.machine.snapshot())
            compaction = journal.begin_compaction(*self._here(), self._compaction.tail_entries)
            for piece in pieces:
                journal.add_piece(piece)
                await wal.sync()
                if not journal.is_open(compaction):
                    return
            position = journal.end_compaction()
            # With the journal, or the core would ask it for what it has let go of.
            if self.raft is raft and raft.log.start.index < compaction.tail:
                raft.compact(max(compaction.tail - 1, raft.log.start.index))
            await wal.sync()
            journal.drop(position)
        except GoStoreError as error:
            self._env.log.warning("%s: its snapshot was given up: %s", self.name, error)
        finally:
            self._compacting = False

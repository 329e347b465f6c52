"""The replication policy ``raft``: the replicas of a shard are a consensus group.

Theory of operation
===================

A command is committed when a majority of the group has it on the medium, whoever the others are and whatever they
believe (:mod:`gostore.consensus`). Reads at the leader are linearizable: a majority confirms that it still leads. So no
view of the cluster is needed for safety: the view says who *should* hold the shard and who is to be asked first.

*Founding.* ``View.founders``, decided once with the first members, says with which voters each group begins. The first
of them stands at once; nobody else ever begins a group.

*Who leads* may be any voter; whoever asks another one is told (``NotOwner``). A leader that is declared offline is
replaced by the first online voter of the preference list, which stands at once. When all replicas are in their places,
the leader hands over to the first owner of the ring, so that the leads are spread as the keys are.

*Moving.* The leader compares the group's configuration with the ring and moves one replica at a time (:mod:`.moves`);
a node moves a few shards at a time. A replica that is no longer a member forgets its copy: it learns that from its own
log, or, if it was away, from the leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from gostore.cluster.members import NodeState
from gostore.cluster.view import View
from gostore.comm import Reply
from gostore.consensus.ready import LEADER
from gostore.core.errors import BadRequest, GoStoreError, NotOwner
from gostore.services.db.moves import Move, next_move, plan
from gostore.services.db.replication import Group, ShardStatus, declare

GROUPS_FROM: Final = 1 << 17
"""Numbers of the shards' groups in the node's log; below are those of others."""

CHANGE_TIMEOUT_S: Final = 5.0
"""For one change of the members to be committed."""

LOOK_S: Final = 0.1
"""So often a leader looks whether a learner, or its successor, has caught up."""

PAUSE_S: Final = (0.1, 5.0)
"""After a move or a hand-over that failed: from, doubling, to. A new view ends it."""

ASK_TIMEOUT_S: Final = 1.0
ASK_PAUSE_S: Final = (0.5, 4.0)
"""Between questions of a replica off the ring whether it is still a member: from, doubling, to. A new view ends it."""

GONE: Final = (NodeState.OFFLINE, NodeState.LEFT)


class RaftReplication:
    """See the page above."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._raft = group.groups.open(
            GROUPS_FROM + group.shard, f"shard {group.shard}", group.machine, group.compaction
        )
        self._raft.on_change = self._on_change
        self._owners: tuple[str, ...] = ()
        self._look = asyncio.Event()
        self._viewed = asyncio.Event()
        self._served = 0  # the term in which the machine was told that it serves
        self._obstacle = ""
        self._clearing = self._retiring = False

    async def start(self) -> None:
        self._group.env.tasks.start(self._place_forever(), name=f"db-place-{self._group.shard}")

    # the cluster

    def on_view(self, view: View) -> None:
        self._owners = self._group.owners(view)
        viewed, self._viewed = self._viewed, asyncio.Event()
        viewed.set()
        self._begin(view)
        leader = self._raft.leader
        if leader is not None and self._is_gone(view, leader):
            self._raft.wake(leader)
            online = (name for name in self._planned() if name in view.online)
            if next(online, None) == self._group.name:
                self._raft.campaign()
        self._retire_if_former()
        self._look.set()

    def _begin(self, view: View) -> None:
        if self._raft.begun or not view.founders:
            return
        shard, me = self._group.shard, self._group.name
        # A node that was told of more shards than the cluster was born with has nobody to found them with.
        founders = view.founders[shard] if shard < len(view.founders) else ()
        self._raft.begin(founders if me in founders else ())
        if founders[:1] == (me,):
            self._raft.campaign()

    @staticmethod
    def _is_gone(view: View, name: str) -> bool:
        member = view.members.get(name)
        return member is None or member.state in GONE

    def _planned(self) -> tuple[str, ...]:
        return plan(self._group.view(), self._owners, self._raft.configuration.voters)

    def _on_change(self) -> None:
        raft = self._raft
        if raft.serves:
            if self._served != raft.status.term:
                self._served = raft.status.term
                self._group.machine.serving()
            self._publish()
        if raft.dismissed:
            self._clear()
        self._retire_if_former()
        self._look.set()

    def _publish(self) -> None:
        events, raft = self._group.env.events, self._raft
        if events.active and raft.settled:
            events.publish(
                "shard_primary", shard=self._group.shard, generation=raft.status.term,
                replicas=[self._group.name, *(n for n in raft.configuration.voters if n != self._group.name)],
            )  # fmt: skip

    # what is asked of it

    @property
    def primary(self) -> str | None:
        """The leader, as far as this replica knows, and the view does not know better."""
        leader = self._raft.leader
        return None if leader is None or self._is_gone(self._group.view(), leader) else leader

    def _refer(self, error: NotOwner) -> NotOwner:
        """Whoever was sent here has met a replica that may be quiet behind a dead leader: it looks."""
        self._raft.stir()
        return error

    async def propose(self, payload: bytes, deadline_s: float) -> Any:
        try:
            return await self._raft.propose(payload, deadline_s)
        except NotOwner as error:
            error.details["owner"] = self.primary
            raise self._refer(error) from None

    async def propose_all(self, payloads: Sequence[bytes], deadline_s: float) -> list[Any]:
        """Several at once; see :meth:`Group.propose_all`."""
        try:
            told = await self._raft.propose_all(payloads, deadline_s)
        except NotOwner as error:
            error.details["owner"] = self.primary
            raise self._refer(error) from None
        for one in told:
            if isinstance(one, NotOwner):
                one.details["owner"] = self.primary
        return told

    async def read_barrier(self, deadline_s: float) -> None:
        if self._raft.role != LEADER:
            leader = self.primary
            raise self._refer(NotOwner(f"shard {self._group.shard}: its leader is {leader}", owner=leader))
        await self._raft.read_barrier(deadline_s)

    async def handle(self, source: str, message: list[Any], data: bytes) -> Reply:
        if message == ["members"]:
            raft = self._raft
            if not (raft.serves and raft.settled):
                return Reply([raft.leader, 0, []])
            return Reply([raft.leader, raft.status.term, list(raft.configuration.members)])
        raise BadRequest(f"shard {self._group.shard}: no message of raft: {message!r:.100}")

    # moving

    async def _place_forever(self) -> None:
        pause_s = PAUSE_S[0]
        while True:
            await self._look.wait()
            self._look.clear()
            try:
                while await self._place():
                    pause_s = PAUSE_S[0]
            except GoStoreError as error:
                self._obstacle = error.message
                self._group.env.log.info("shard %d: %s", self._group.shard, error.message)
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S[1])
                self._look.set()

    async def _pause(self, pause_s: float) -> None:
        """Until something changes, or for a while."""
        self._look.clear()
        try:
            async with asyncio.timeout(pause_s * self._group.env.rng.uniform(0.5, 1.0)):
                await self._look.wait()
        except TimeoutError:
            pass

    async def _place(self) -> bool:
        """One step towards what the ring wants, if this node leads; whether there may be another one."""
        raft, first = self._raft, self._successor()
        if self._move() is None and (first is None or not raft.caught_up(first)):
            if first is None and not (raft.serves and raft.configuration.learners):
                return False
            await self._pause(LOOK_S)
            return True
        async with self._group.moves:
            # Looked at again: it may have waited for its turn.
            move = self._move()
            if move is not None:
                await raft.change(move.voters, move.learners, self._now_s() + CHANGE_TIMEOUT_S)
            elif (first := self._successor()) is not None and raft.caught_up(first):
                raft.transfer(first)
                await raft.wait_changed(self._now_s() + CHANGE_TIMEOUT_S)
        return True

    def _move(self) -> Move | None:
        raft, view = self._raft, self._group.view()
        if not (raft.serves and raft.settled):
            return None
        return next_move(raft.configuration, self._planned(), self._group.name, view.online, raft.caught_up)

    def _successor(self) -> str | None:
        """The first owner, when the members are as they should be and it is not this node that comes first."""
        raft = self._raft
        if not (raft.serves and raft.settled) or raft.configuration.learners:
            return None
        first = next(iter(self._planned()), self._group.name)
        online = first in self._group.view().online and first in raft.configuration.voters
        return first if online and first != self._group.name else None

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    # leaving

    def _holds(self) -> bool:
        return self._raft.begun and self._raft.last.index > 0

    def _clear(self) -> None:
        if not self._clearing and self._holds():
            self._clearing = True
            self._group.env.tasks.start(self._clear_now(), name=f"db-clear-{self._group.shard}")

    async def _clear_now(self) -> None:
        try:
            await self._raft.clear()
        finally:
            self._clearing = False

    def _is_former(self) -> bool:
        """It holds a copy off the ring, and does not lead."""
        return self._holds() and self._group.name not in self._owners and self._raft.role != LEADER

    def _retire_if_former(self) -> None:
        if self._is_former() and not self._retiring:
            self._retiring = True
            self._group.env.tasks.start(self._retire(), name=f"db-retire-{self._group.shard}")

    async def _retire(self) -> None:
        """Whoever was removed while it was away is not told: it asks, until it has nothing or is wanted again."""
        pause_s = ASK_PAUSE_S[0]
        try:
            while self._is_former():
                viewed = self._viewed
                try:
                    async with asyncio.timeout(pause_s * self._group.env.rng.uniform(0.5, 1.0)):
                        await viewed.wait()
                    pause_s = ASK_PAUSE_S[0]
                except TimeoutError:
                    pass
                for name in self._owners:
                    if await self._dismissed(name):
                        self._clear()
                        break
                pause_s = min(2 * pause_s, ASK_PAUSE_S[1])
        finally:
            self._retiring = False

    async def _dismissed(self, name: str) -> bool:
        """Does it lead, in no older term than this replica's, a committed configuration without this node?"""
        raft, last = self._raft, self._raft.last
        try:
            reply = await self._group.send(name, ["members"], b"", ASK_TIMEOUT_S)
        except GoStoreError as error:
            self._group.env.log.debug("shard %d is kept: %s", self._group.shard, error.message)
            return False
        match reply.value:
            case [_, int(term), [*members]]:
                current = term >= raft.status.term and raft.last == last
                return current and bool(members) and self._group.name not in members
        self._group.env.log.warning("%s answers what is no list of members: %.100r", name, reply.value)
        return False

    # what others see

    @property
    def role(self) -> str:
        raft, core = self._raft, self._raft.raft
        if core is None:
            return "idle"
        if core.role == LEADER:
            return "primary" if raft.serves else "recovering"
        return "backup" if self._holds() or self._group.name in raft.configuration.members else "idle"

    def unapplied(self) -> list[tuple[int, bytes | None]]:
        """Nothing: what is committed is known everywhere soon."""
        return []

    def status(self) -> ShardStatus:
        raft, role, planned = self._raft, self.role, self._planned()
        configuration = raft.configuration
        settled = raft.settled and not configuration.learners and sorted(configuration.voters) == sorted(planned)
        details = {
            "leader": raft.leader,
            "role_in_term": raft.role,
            "quiet": raft.quiet,
            "learners": list(configuration.learners),
            "outgoing": list(configuration.outgoing),
            "snapshot": raft.snapshot_index,
        }
        if role == "recovering":
            details["obstacle"] = "its first entry is not committed yet"
        elif role == "backup" and self.primary is None:
            details["obstacle"] = "no leader is known"
        elif self._obstacle and not settled:
            details["obstacle"] = self._obstacle
        return ShardStatus(
            self._group.shard,
            role,
            raft.leader,
            raft.status.term,
            configuration.voters,
            planned,
            raft.last.index,
            raft.committed,
            role == "primary" and settled,
            details,
        )


declare(RaftReplication)

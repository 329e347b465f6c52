"""Membership as a service: performs the effects of the pure cores, in one order for all who watch.

Four cores work here: ``swim`` finds who does not answer, ``masters`` decides, the masters' Raft group *commits*, and
``gossip`` spreads what was committed. The view changes in two ways only, both at once and without a wait in between: an
event that continues it is applied, or a whole view that is newer is adopted. Either comes from the group, at a master,
or from another member. Watchers are called synchronously then.

How the leader of the group comes to its decisions is in ``leader``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from gostore.cluster import (
    DEFAULT_POLICY,
    Member,
    MemberChange,
    NodeState,
    RingCache,
    RingSpec,
    View,
    Watchers,
    changes_between,
)
from gostore.comm import Call, Endpoint, remote, service
from gostore.config import NodeConfig
from gostore.consensus.groups import Groups
from gostore.core.address import Address
from gostore.core.errors import AlreadyExists, BadRequest, GoStoreError, NotOwner, PolicyError, Timeout, Unavailable
from gostore.core.slots import PolicySource
from gostore.env import Env
from gostore.services.cls import gossip, masters, swim
from gostore.services.cls.admission import Admission, Patience, all_offline
from gostore.services.cls.detection import Detection
from gostore.services.cls.gossip import Item
from gostore.services.cls.history import History, mark_of_disk
from gostore.services.cls.leader import Leader
from gostore.services.cls.machine import Machine
from gostore.services.cls.masters import Depart, Install, Join, NodeEvent
from gostore.services.cls.waiters import Waiters
from gostore.storage import Wal

MASTERS_GROUP: Final = 1 << 16
"""Number of the masters' group in the node's log: below those of the shards."""

LEAVE_TIMEOUT_S: Final = 60.0
"""What a leaving node holds must have been given away by then."""

HAND_OVER_TIMEOUT_S: Final = 2.0
"""A master that goes waits so long until another one leads, and until it has lost its vote."""

ASK_PAUSE_S: Final = 0.1
"""Between two tries to reach the master while there is none."""


@service("cls")
class ClsService:
    """One node's membership. Register it with the endpoint, call :meth:`start`; it is also comm's resolver.

    ``groups`` drives the masters' group; it is started before. ``policy``: the placement that a new cluster starts
    with, ``None`` for the default. ``cache``: shared by the nodes of one process. ``rest_port`` and ``weight`` may be
    set before :meth:`start`.
    """

    def __init__(
        self,
        env: Env,
        endpoint: Endpoint,
        wal: Wal,
        groups: Groups,
        config: NodeConfig,
        policy: PolicySource | None = None,
        *,
        cache: RingCache | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.env = env
        self.name = env.name
        self.endpoint = endpoint
        self.config = config
        self.policy = policy
        self.rest_port = 0
        self.weight = 1.0
        self.cache = cache or RingCache()
        self.drains: list[Callable[[], Awaitable[None]]] = []
        """Awaited by :meth:`leave` between leaving and left: what this node holds must be elsewhere then."""
        tokens = config.ring.tokens_per_node
        rings = {"global": RingSpec(config.ring.replicas, tokens), "masters": RingSpec(config.cls.masters_max, tokens)}
        self.view = View(config.cluster, 0, {}, rings, cache=self.cache)
        self.watchers = Watchers(self._watcher_failed)
        self.is_member = False
        """Whether this node is in its view, alive, in its present incarnation."""
        self._history = History(wal)
        self._admission = Admission(self, patience or Patience())
        self._leader = Leader(self)
        self.running = False
        self._detection = Detection(self)
        self._waiters = Waiters(self.name)
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._groups = groups
        self._machine = Machine(self.view, self._committed)
        self.group = groups.open(MASTERS_GROUP, "masters", self._machine)
        self.group.on_change = self._leader.wake
        self._disk = ""
        self._ready = False
        self._expelled = False
        self._unsynced = False

    # Life

    async def start(self) -> None:
        """Return when this node is a member: joining, connecting or online (``node_ready`` tells the last).

        Without anything saved and without contacts it starts a cluster. After a restart of the whole cluster it waits,
        for as long as it takes, for a quorum of the masters. Raises :class:`AlreadyExists` when the name is taken,
        :class:`Unavailable` when a new node finds nobody, :class:`Corrupt` for a damaged log.
        """
        await self._detection.begin()
        self._disk = mark_of_disk(self.env)
        saved = self._history.load(self.cache)
        if saved is not None:
            self._install(all_offline(saved), (), ())
        self.running = True
        self.background("leader", self._leader.run())
        self._detection.arm()
        await self._admission.enter(saved)

    async def stop(self) -> None:
        """End without a word: to the others this node is dead, and will be found so."""
        self.running = self.is_member = False
        self._detection.stop()
        error = Unavailable(f"{self.name} has stopped")
        self._leader.stop(error)
        for task in tuple(self._busy.values()):
            task.cancel()
            await asyncio.wait([task])
        self._waiters.stop(error)

    async def leave(self, timeout_s: float = LEAVE_TIMEOUT_S) -> None:
        """Go for good: hand over, leave the rings, give away what is held (:attr:`drains`), and be forgotten.

        Raises :class:`BadRequest` for the last online node, and what the master or a drain raises.
        """
        await self._hand_over()
        await self._depart(NodeState.LEAVING)
        async with asyncio.timeout(timeout_s):
            for drain in self.drains:
                await drain()
        await self._wait_group(lambda: not self._votes and self.group.leader != self.name)
        await self._depart(NodeState.LEFT)

    async def disconnect(self) -> None:
        """Announce that this node stops and will be back: it leaves the rings now, not when it is found dead."""
        await self._hand_over()
        await self._depart(NodeState.DISCONNECTING)

    async def _depart(self, state: NodeState) -> None:
        epoch = await self._ask_master("depart", self.incarnation, state.value)
        if state is not NodeState.LEFT:  # who has left is told nothing any more
            await self.wait_view(lambda view: view.epoch >= epoch, self.config.comm.timeout_s)

    async def _hand_over(self) -> None:
        """Let another master lead, if there is one that can."""
        here = [name for name in self.group.configuration.voters if name != self.name and name in self.view.online]
        if self.leads and here:
            try:
                self.group.transfer()
            except GoStoreError as error:
                self.env.log.info("%s could not hand over: %s", self.name, error)
            await self._wait_group(lambda: self.group.leader not in (self.name, None))

    async def _wait_group(self, condition: Callable[[], bool]) -> None:
        """Until it holds for the masters' group; for a while only, as the cluster goes on all the same."""
        deadline_s = self.now_s() + HAND_OVER_TIMEOUT_S
        try:
            while not condition():
                await self.group.wait_changed(deadline_s)
        except Timeout as error:
            self.env.log.info("%s goes without waiting longer: %s", self.name, error)

    async def _ask_master(self, function: str, *args: Any) -> int:
        """The epoch that the master answers. Asks again while there is none."""
        deadline_s = self.now_s() + self.config.comm.timeout_s
        while True:
            try:
                return int((await self.endpoint.call(self.acting_master() or self.name, "cls", function, *args)).value)
            except (NotOwner, Unavailable):
                if self.now_s() >= deadline_s or not self.running:
                    raise
            await asyncio.sleep(ASK_PAUSE_S)

    # What others in this node use

    @property
    def incarnation(self) -> int:
        """This node's own: at least that of its endpoint, higher after refutations."""
        return self._detection.swim.incarnation

    @property
    def tunables(self) -> swim.Tunables:
        return self._detection.tunables

    @property
    def leads(self) -> bool:
        """Whether this node may decide: it leads the masters' group, and knows all that was committed before."""
        return self.running and self.group.serves

    @property
    def is_master(self) -> bool:
        return self.leads and self.view.master == self.name

    @property
    def committed(self) -> View:
        """At the leader: the latest view there is."""
        return self._machine.view

    @property
    def _votes(self) -> bool:
        return self.group.configuration.is_voter(self.name)

    def acting_master(self) -> str | None:
        """Who leads, or knows who does, as seen from here; ``None`` while the masters look for a leader."""
        if self.group.leader is not None:
            return self.group.leader
        if self._votes and self.name in self.view.masters:
            return None
        suspected = self._detection.swim.in_status(swim.SUSPECT, swim.DEAD)
        hints = (self.view.master, *self.view.masters)
        return next((name for name in hints if name not in (None, self.name) and name not in suspected), None)

    def next_group(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """At the leader: the next step of the masters' group towards the seats; ``None``: it is there."""
        configuration = self.group.configuration
        return masters.next_group(self.committed, configuration.voters, configuration.learners, self.suspected())

    def found_dead(self) -> dict[str, int]:
        """name -> incarnation of members that this node found dead and the master has not declared so."""
        return self._detection.swim.in_status(swim.DEAD)

    def address(self, name: str) -> Address | None:
        """comm's resolver: where a member is, the latest that is known; ``None`` for strangers and those who left."""
        member = self.view.members.get(name)
        return member.address if member is not None and member.state is not NodeState.LEFT else None

    def suspected(self) -> list[str]:
        """Members that are suspected here, or found dead and not yet declared so by the master."""
        return sorted(self._detection.swim.in_status(swim.SUSPECT, swim.DEAD)) if self.is_member else []

    def unsettled(self) -> list[str]:
        """What this node sees that will not stay so, in words: suspicions, and seats that nobody votes from."""
        found = [f"suspects {name}" for name in self.suspected()]
        if self.leads and (self.next_group() is not None or not self.group.settled):
            voters = self.group.configuration.voters
            missing = [name for name in self.view.masters if name not in voters]
            found.append(
                f"changes the masters' group of {', '.join(voters)}; missing: {', '.join(missing) or 'nobody'}"
            )
        return found

    def statistics(self) -> dict[str, Any]:
        """``messages`` sent by cls, the counts of both cores, the epoch and the rings built."""
        return {"epoch": self.view.epoch, "rings_built": self.cache.built, **self._detection.statistics()}

    async def wait_view(self, predicate: Callable[[View], bool], timeout_s: float) -> View:
        """The first view, from the present one on, for which ``predicate`` holds. Raises :class:`Timeout`."""
        return await self._waiters.wait(lambda: self.view, predicate, timeout_s)

    async def wait_member(self) -> None:
        """Until this node is a member, for as long as it takes."""
        await self._waiters.wait(lambda: self.view, lambda view: self.is_member, None)

    async def set_placement(self, policy: PolicySource | None) -> int:
        """Replace the placement of the global ring on all nodes (``None``: by the default); the epoch of the change.

        Raises :class:`PolicyError` when the class does not fit the slot; nothing changes then.
        """
        epoch = await self._ask_master("install_placement", (policy or DEFAULT_POLICY).to_wire())
        await self.wait_view(lambda view: view.epoch >= epoch, self.config.comm.timeout_s)
        return epoch

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    # Remote functions: membership

    @remote
    async def join(
        self, call: Call, address: list[Any], rest_port: int, incarnation: int, weight: float, disk: str
    ) -> list[Any]:
        """A node asks to be a member; the answer is ``[master, view]``."""
        try:
            where = Address.from_wire(address)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        if where.host in ("0.0.0.0", "::", ""):  # noqa: S104
            # It listens everywhere; what others can reach is where its packets come from.
            where = Address(call.source_address.host, where.tcp_port, where.udp_port)
        join = Join(
            name=call.source, address=where, rest_port=rest_port, incarnation=incarnation, weight=weight, disk=disk
        )
        await self._leader.decide(call, join)
        return [self.name, self.view.to_wire()]

    def join_request(self) -> Join:
        """That of this node."""
        return Join(
            name=self.name,
            address=self.endpoint.address,
            rest_port=self.rest_port,
            incarnation=self.incarnation,
            weight=self.weight,
            disk=self._disk,
        )

    @property
    def is_gone(self) -> bool:
        """Whether this node has left for good, in this life."""
        me = self.view.members.get(self.name)
        return me is not None and me.state is NodeState.LEFT and me.incarnation >= self.endpoint.incarnation

    def refused_itself(self, error: GoStoreError) -> None:
        """This node leads, and may not be a member as it is."""
        if isinstance(error, AlreadyExists):
            error = self._admission.refused(error)
        if isinstance(error, AlreadyExists | BadRequest):
            self.env.fatal(f"cannot join again: {error.message}")

    @remote
    async def depart(self, call: Call, incarnation: int, state: str) -> int:
        """A member announces that it disconnects, leaves or has left; the answer is the epoch."""
        departures = (NodeState.DISCONNECTING, NodeState.LEAVING, NodeState.LEFT)
        if state not in departures:
            raise BadRequest(f"state = {state!r}: allowed are {', '.join(departures)}")
        return await self._leader.decide(call, Depart(call.source, incarnation, NodeState(state)))

    @remote
    async def install_placement(self, call: Call, policy: dict[str, Any]) -> int:
        """Another placement for all, ``{"name", "source"}``; the answer is the epoch from which it rules."""
        self._leader.require(call)
        try:
            source = PolicySource.from_wire(policy)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        if source != DEFAULT_POLICY:
            self.cache.placement_class(source)
        return await self._leader.decide(call, Install(source))

    @remote
    async def state(self, call: Call, epoch: int) -> dict[str, Any]:
        """``master``: who leads as seen from here; ``view``: this node's, when it is newer than ``epoch``."""
        newer = self.is_member and self.view.epoch > epoch
        return {"master": self.acting_master(), "view": self.view.to_wire() if newer else None}

    @remote
    async def last_call(self, call: Call) -> bool:
        """The master is about to declare this node dead; whether it is a member and lives."""
        return self.is_member

    # Remote functions: gossip and probes, one way

    @remote
    def event(self, call: Call, items: list[Any]) -> None:
        """Events of the master, ``[epoch, event, path]`` each."""
        if self.running and (news := self._detection.news(items)):
            self._receive(call.source, news)

    @remote
    def ping(self, call: Call, seq: int, epoch: int, rumours: list[Any]) -> None:
        self._detection.probed(call.source, swim.PING, seq, epoch, rumours)

    @remote
    def ack(self, call: Call, seq: int, epoch: int, rumours: list[Any]) -> None:
        self._detection.probed(call.source, swim.ACK, seq, epoch, rumours)

    @remote
    def nack(self, call: Call, seq: int, epoch: int, rumours: list[Any]) -> None:
        self._detection.probed(call.source, swim.NACK, seq, epoch, rumours)

    @remote
    def ping_req(self, call: Call, seq: int, epoch: int, rumours: list[Any], target: str) -> None:
        self._detection.probed(call.source, swim.PING_REQ, seq, epoch, rumours, target)

    @remote
    def report(self, call: Call, name: str, incarnation: int) -> None:
        """A member suspects another; told to the master directly, so that it need not wait for the rumour."""
        self._detection.told_of(call.source, name, incarnation)

    # Background work

    def look_again(self) -> None:
        """Somebody was found dead, which concerns the leader."""
        self._leader.wake()

    def look_for_leaders(self, suspected: str) -> None:
        """The groups that it leads should not wait for it; and if we are cut off ourselves, we lead no more."""
        self._groups.wake(suspected)
        if self.leads:
            self.group.stir()

    def vouch(self, name: str) -> None:
        """A member that was found dead has answered the last call."""
        self._detection.perform(self._detection.swim.vouch(name))

    def rise(self, above: int) -> None:
        """Come back in an incarnation above this one."""
        self._detection.rise(above)

    def rejoin_if_expelled(self) -> None:
        if self._expelled:
            self.background("rejoin", self._admission.again())

    def background(self, what: str, work: Any) -> asyncio.Task[None] | None:
        """Run something that must not run twice at a time; ``None``: it runs already, or nothing does any more.

        When a callback for the end of the task is called, it may run again.
        """
        if not self.running or what in self._busy:
            work.close()
            return None
        task = self._busy[what] = self.env.tasks.start(work, name=f"cls-{what}")
        task.add_done_callback(lambda _: self._busy.pop(what, None))
        return task

    # Following

    def _committed(self, event: NodeEvent | None, view: View) -> None:
        """The masters' group, of which this node is one, has come to this view, by this event or as a whole."""
        if not self.running or view.epoch <= self.view.epoch:
            return
        if event is None or not masters.fits(self.view, event):
            self.adopt(view, view.master or self.name)
        elif event.master == self.name:
            self._apply(event, (self.name,))
        else:
            self._receive(event.master, [Item(event, (event.master,))])
        if event is not None and event.master == self.name:
            self._detection.gossip.publish(event, len(view.members), self.now_s())
            self._detection.arm()

    def _receive(self, source: str, items: Sequence[Item[NodeEvent]]) -> None:
        members, version = len(self.view.members), self.view.version
        self._follow(self._detection.gossip.receive(source, items, version, members, self.now_s()))
        self._detection.arm()

    def _follow(self, effects: Sequence[gossip.Deliver[NodeEvent] | gossip.Pull]) -> None:
        """Apply events in order, or ask for the whole."""
        for effect in effects:
            match effect:
                case gossip.Deliver(event, path):
                    self._apply(event, path)
                case gossip.Pull(source):
                    self.pull(source)

    def _apply(self, event: NodeEvent, path: Sequence[str]) -> None:
        changes, view = masters.changes_of(self.view, event), masters.apply(self.view, event)
        self._history.append_event(event, view)
        self._install(view, changes, path)
        self._sync_soon()

    def pull(self, source: str) -> None:
        self.background("pull", self._pull_from(source))

    async def _pull_from(self, source: str) -> None:
        try:
            reply = await self.endpoint.call(source, "cls", "state", self.view.epoch)
            if (wire := reply.value.get("view")) is not None:
                self.adopt(View.from_wire(wire, self.cache), source)
        except (GoStoreError, ValueError, AttributeError) as error:
            # The next probe that shows a newer view brings another source.
            self.env.log.info("%s could not pull the state from %s: %s", self.name, source, error)

    def adopt(self, view: View, source: str) -> None:
        """Take over a whole view, if it is newer than ours; ``source``: who gave it."""
        if not self.running or view.version <= self.view.version or view.cluster != self.view.cluster:
            return
        changes = changes_between(self.view, view)
        self._history.append_view(view)
        self._install(view, changes, (source, self.name))
        self._follow(self._detection.gossip.adopted(view.version, len(view.members), self.now_s()))
        self._sync_soon()
        self._detection.arm()

    def _sync_soon(self) -> None:
        """A member's copy of the history need not be durable before it acts: what it loses it is told again."""
        self._unsynced = True
        self.background("sync", self._sync())

    async def _sync(self) -> None:
        while self._unsynced:
            self._unsynced = False
            await self._history.sync()

    def _install(self, view: View, changes: Sequence[MemberChange], path: Sequence[str]) -> None:
        old, self.view = self.view, view
        self.endpoint.epoch = view.epoch
        self._judge_own(view.members.get(self.name))
        for change in changes:
            self._track(change.new)
        # What an epoch made of a member is its last state in it; those in between were never anybody's view.
        for change in {change.name: change for change in changes}.values():
            if change.state_changed:
                self.env.events.publish(
                    "member", member=change.name, state=change.new.state.value, epoch=view.epoch, path=list(path)
                )
        if path:  # what was loaded from the disk is no news, and no view of the cluster: everybody is offline in it
            self.env.events.publish("view", epoch=view.epoch, online=list(view.online))
        if view.master != old.master and view.master is not None:
            self.env.events.publish("master", member=view.master, epoch=view.epoch)
        if view.policy != old.policy:
            self._try_policy(view)
        self.watchers.notify(old, view, changes)
        if not self._ready and self.is_member and self.name in view.online:
            self._ready = True
            self.env.events.publish("node_ready", epoch=view.epoch)
        self._waiters.tell(view)
        self._leader.wake()

    def _track(self, member: Member) -> None:
        self._detection.track(member)
        if member.state is NodeState.LEFT and member.name != self.name:
            # Not at once: the answer to its farewell may have to be sent again.
            asyncio.get_running_loop().call_later(self.config.comm.timeout_s, self._forget, member.name)

    def _forget(self, name: str) -> None:
        member = self.view.members.get(name)
        if self.running and (member is None or member.state is NodeState.LEFT):
            self.endpoint.forget(name)

    def _judge_own(self, me: Member | None) -> None:
        """Are we a member, in this life? One that was expelled joins again."""
        was_member, mine = self.is_member, self.incarnation
        here = me is not None and me.address.tcp_port == self.endpoint.address.tcp_port
        self.is_member = me is not None and me.live and here and self.endpoint.incarnation <= me.incarnation <= mine
        if self.is_member:
            self._expelled = False
        elif was_member and me is not None and me.live and me.incarnation > mine:
            self.env.fatal(f"another node has taken the name {self.name}: it is at {me.address}")
        elif was_member and me is not None and me.state is not NodeState.LEFT:
            self.env.log.warning("%s was taken for dead; it joins again", self.name)
            self.rise(me.incarnation)
            self._expelled = True

    def _try_policy(self, view: View) -> None:
        name = view.policy.name if view.policy is not None else self.cache.default.__name__
        try:
            view.ring()
        except PolicyError as error:
            self.env.log.error("%s: %s", self.name, error)
            self.env.events.publish("policy_failed", slot="placement", name=name, error=error.message)
        else:
            self.env.events.publish("policy_installed", slot="placement", name=name)

    def _watcher_failed(self, error: BaseException) -> None:
        self.env.log.error("%s: a watcher of the view failed", self.name, exc_info=error)
        self.env.events.publish("task_failed", task="watcher", error=f"{type(error).__name__}: {error}")

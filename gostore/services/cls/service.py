"""Membership as a service: performs the effects of the pure cores, in one order for all who watch.

Three cores work here: ``swim`` finds who does not answer, ``masters`` decides, ``gossip`` spreads what was decided. The
view changes in two ways only, and both hold ``_lock``: the master *commits* an event (it is in the log and synced
before it takes effect), and everybody *follows* (applies events in the order of their epochs, or adopts a whole view
that is newer). Watchers are called synchronously then.

All decisions of the master are committed by :meth:`ClsService.commit`; how it comes to them is in ``leader``.
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
from gostore.core.address import Address
from gostore.core.errors import (
    BadRequest,
    Fenced,
    GoStoreError,
    PolicyError,
    Unavailable,
)
from gostore.core.slots import PolicySource
from gostore.env import Env
from gostore.services.cls import gossip, masters, swim
from gostore.services.cls.admission import Admission, Patience, all_offline
from gostore.services.cls.detection import Detection
from gostore.services.cls.history import History
from gostore.services.cls.leader import Leader
from gostore.services.cls.masters import Depart, Install, Join, NodeEvent
from gostore.services.cls.waiters import Waiters
from gostore.storage import Wal

LEAVE_TIMEOUT_S: Final = 60.0
"""What a leaving node holds must have been given away by then."""


@service("cls")
class ClsService:
    """One node's membership. Register it with the endpoint, call :meth:`start`; it is also comm's resolver.

    ``policy``: the placement that a new cluster starts with, ``None`` for the default. ``cache``: shared by the nodes
    of one process. ``rest_port`` and ``weight`` may be set before :meth:`start`.
    """

    def __init__(
        self,
        env: Env,
        endpoint: Endpoint,
        wal: Wal,
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
        self.view = View(config.cluster, 0, {}, rings, None, 0, self.cache)
        self.watchers = Watchers(self._watcher_failed)
        self.is_member = False
        """Whether this node is in its view, alive, in its present incarnation."""
        self._history = History(wal)
        self._admission = Admission(self, patience or Patience())
        self.lock = asyncio.Lock()
        """Held by whoever changes the view."""
        self._leader = Leader(self)
        self.running = False
        self._detection = Detection(self)
        self._waiters = Waiters(self.name)
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._saved: View | None = None
        self._ready = False
        self._expelled = False
        self._unsynced = False

    # Life

    async def start(self) -> None:
        """Return when this node is a member: joining, connecting or online (``node_ready`` tells the last).

        Without anything saved and without contacts it starts a cluster. After a restart of the whole cluster it waits,
        for as long as it takes, for a quorum of those who were online. Raises :class:`AlreadyExists` when the name is
        taken, :class:`Unavailable` when a new node finds nobody, :class:`Corrupt` for a damaged log.
        """
        await self._detection.begin()
        self._saved = self._history.load(self.cache)
        if self._saved is not None:
            self._install(all_offline(self._saved), (), ())
        self.running = True
        self.background("leader", self._leader.run())
        self._detection.arm()
        await self._admission.enter(self._saved)

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
        """Go for good: leave the rings, give away what is held (:attr:`drains`), and be forgotten.

        Raises :class:`BadRequest` for the last online node, and what the master or a drain raises.
        """
        await self._depart(NodeState.LEAVING)
        async with asyncio.timeout(timeout_s):
            for drain in self.drains:
                await drain()
        await self._depart(NodeState.LEFT)

    async def disconnect(self) -> None:
        """Announce that this node stops and will be back: it leaves the rings now, not when it is found dead."""
        await self._depart(NodeState.DISCONNECTING)

    async def _depart(self, state: NodeState) -> None:
        master = self.acting_master() or self.name
        epoch = (await self.endpoint.call(master, "cls", "depart", self.incarnation, state.value)).value
        if state is not NodeState.LEFT:  # who has left is told nothing any more
            await self.wait_view(lambda view: view.epoch >= epoch, self.config.comm.timeout_s)

    # What others in this node use

    @property
    def incarnation(self) -> int:
        """This node's own: at least that of its endpoint, higher after refutations."""
        return self._detection.swim.incarnation

    @property
    def tunables(self) -> swim.Tunables:
        return self._detection.tunables

    @property
    def is_master(self) -> bool:
        return self.is_member and self.view.master == self.name

    def acting_master(self) -> str | None:
        """Who leads as seen from here: the first of the masters ring that was not found dead."""
        return masters.acting_master(self.view, self.found_dead())

    def found_dead(self) -> dict[str, int]:
        """name -> incarnation of members that this node found dead and the master has not declared so."""
        return self._detection.swim.in_status(swim.DEAD)

    def answered_lately(self) -> list[str]:
        """Members that answered a probe of this node so lately that nobody can have declared it dead since."""
        lately_s = self.tunables.suspicion_s(len(self.view.online))
        return self._detection.swim.answered_since(self.now_s() - lately_s)

    def address(self, name: str) -> Address | None:
        """comm's resolver: where a member is, the latest that is known; ``None`` for strangers and those who left."""
        member = self.view.members.get(name)
        return member.address if member is not None and member.state is not NodeState.LEFT else None

    def suspected(self) -> list[str]:
        """Members that are suspected here, or found dead and not yet declared so by the master."""
        return sorted(self._detection.swim.in_status(swim.SUSPECT, swim.DEAD)) if self.is_member else []

    def statistics(self) -> dict[str, Any]:
        """``messages`` sent by cls, the counts of both cores, the epoch and the rings built."""
        return {"epoch": self.view.epoch, "rings_built": self.cache.built, **self._detection.statistics()}

    async def wait_view(self, predicate: Callable[[View], bool], timeout_s: float) -> View:
        """The first view, from the present one on, for which ``predicate`` holds. Raises :class:`Timeout`."""
        return await self._waiters.wait(lambda: self.view, predicate, timeout_s)

    async def set_placement(self, policy: PolicySource | None) -> int:
        """Replace the placement of the global ring on all nodes (``None``: by the default); the epoch of the change.

        Raises :class:`PolicyError` when the class does not fit the slot; nothing changes then.
        """
        wire = (policy or DEFAULT_POLICY).to_wire()
        master = self.acting_master() or self.name
        epoch = int((await self.endpoint.call(master, "cls", "install_placement", wire)).value)
        await self.wait_view(lambda view: view.epoch >= epoch, self.config.comm.timeout_s)
        return epoch

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    # Remote functions: membership

    @remote
    async def join(self, call: Call, address: list[Any], rest_port: int, incarnation: int, weight: float) -> list[Any]:
        """A node asks to be a member; the answer is ``[master, view]``."""
        try:
            where = Address.from_wire(address)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        if where.host in ("0.0.0.0", "::", ""):  # noqa: S104
            # It listens everywhere; what others can reach is where its packets come from.
            where = Address(call.source_address.host, where.tcp_port, where.udp_port)
        join = Join(name=call.source, address=where, rest_port=rest_port, incarnation=incarnation, weight=weight)
        await self._leader.decide(call, join)
        return [self.name, self.view.to_wire()]

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
    async def state(self, call: Call, epoch: int, digest: int) -> dict[str, Any]:
        """How this node is, with its view when that is newer than (epoch, digest)."""
        view = self.view if self.is_member else self._saved
        newer = view is not None and view.version > (epoch, digest)
        return {
            "name": self.name,
            "member": self.is_member,
            "master": self.acting_master() if self.is_member else None,
            "view": view.to_wire() if view is not None and newer else None,
        }

    @remote
    async def roll_call(self, call: Call, epoch: int, digest: int) -> list[Any]:
        """The master asks who is there; the answer is ``[epoch, digest, whether this node is a member]``."""
        if self.is_member:
            self._detection.heard(call.source, epoch, digest)
            return [*self.view.version, True]
        if self._saved is None:
            raise Unavailable(f"{self.name} is not a member yet")
        return [*self._saved.version, False]

    # Remote functions: gossip and probes, one way

    @remote
    async def event(self, call: Call, items: list[Any]) -> None:
        """Events of the master, ``[epoch, digest, event, path]`` each."""
        if not self.running or not (news := self._detection.news(items)):
            return
        async with self.lock:
            members = len(self.view.members)
            self._follow(self._detection.gossip.receive(call.source, news, self.view.version, members, self.now_s()))
        self._detection.arm()

    @remote
    def ping(self, call: Call, seq: int, epoch: int, digest: int, rumours: list[Any]) -> None:
        self._detection.probed(call.source, swim.PING, seq, epoch, digest, rumours)

    @remote
    def ack(self, call: Call, seq: int, epoch: int, digest: int, rumours: list[Any]) -> None:
        self._detection.probed(call.source, swim.ACK, seq, epoch, digest, rumours)

    @remote
    def ping_req(self, call: Call, seq: int, epoch: int, digest: int, rumours: list[Any], target: str) -> None:
        self._detection.probed(call.source, swim.PING_REQ, seq, epoch, digest, rumours, target)

    @remote
    def report(self, call: Call, name: str, incarnation: int) -> None:
        """A member suspects another; told to the master directly, so that it need not wait for the rumour."""
        self._detection.told_of(name, incarnation)

    # Background work

    def look_again(self) -> None:
        """Somebody was found dead: this may be the leader's turn."""
        self._leader.wake()

    def vouch(self, name: str) -> None:
        """A member that was found dead has answered the roll call."""
        self._detection.perform(self._detection.swim.vouch(name))

    def rise(self, above: int) -> None:
        """Come back in an incarnation above this one."""
        self._detection.rise(above)

    def rejoin_if_expelled(self) -> None:
        if self._expelled:
            self.background("rejoin", self._admission.again())

    def background(self, what: str, work: Any) -> None:
        """Run something that must not run twice at a time."""
        if not self.running or what in self._busy:
            work.close()
            return
        task = self._busy[what] = self.env.tasks.start(work, name=f"cls-{what}")
        task.add_done_callback(lambda _: self._busy.pop(what, None))

    # Following

    def _follow(self, effects: Sequence[gossip.Deliver[NodeEvent] | gossip.Pull]) -> None:
        """Under the lock: apply events in order, or ask for the whole."""
        for effect in effects:
            match effect:
                case gossip.Deliver(event, path):
                    changes, view = masters.changes_of(self.view, event), masters.apply(self.view, event)
                    self._history.append_event(event, view)
                    self._install(view, changes, path)
                    self._sync_soon()
                case gossip.Pull(source):
                    self.pull(source)

    def pull(self, source: str) -> None:
        self.background("pull", self._pull_from(source))

    async def _pull_from(self, source: str) -> None:
        try:
            reply = await self.endpoint.call(source, "cls", "state", *self.view.version)
            if (wire := reply.value.get("view")) is not None:
                await self.adopt(View.from_wire(wire, self.cache), source)
        except (GoStoreError, ValueError, AttributeError) as error:
            # The next probe that shows a newer view brings another source.
            self.env.log.info("%s could not pull the state from %s: %s", self.name, source, error)

    async def adopt(self, view: View, source: str) -> None:
        """Take over a whole view, if it is newer than ours; ``source``: who gave it."""
        async with self.lock:
            if view.version <= self.view.version or view.cluster != self.view.cluster or not self.running:
                return
            changes = changes_between(self.view, view)
            self._history.append_view(view)
            self._install(view, changes, (source, self.name))
            self._follow(self._detection.gossip.adopted(view.version, len(view.members), self.now_s()))
            self._sync_soon()
        self._detection.arm()

    def _sync_soon(self) -> None:
        """A follower's copy of the history need not be durable before it acts: what it loses it is told again."""
        self._unsynced = True
        self.background("sync", self._sync())

    async def _sync(self) -> None:
        while self._unsynced:
            self._unsynced = False
            await self._history.sync()

    async def commit(self, event: NodeEvent, base: View | None = None) -> None:
        """Under the lock: the one way in which a decision of the master takes effect.

        ``base``: the view that the event continues when that is not ours, but what was saved of it.
        """
        view = masters.apply(base or self.view, event)
        changes = changes_between(self.view, view) if base else masters.changes_of(self.view, event)
        self._history.append_event(event, view)
        await self._history.sync()
        self._install(view, changes, (self.name,))
        self._detection.gossip.publish(event, len(view.members), self.now_s())
        self._detection.arm()

    async def commit_first(self, event: NodeEvent, base: View) -> None:
        """The event by which this node begins to lead: the birth of a cluster, or its return.

        Raises :class:`Fenced` when somebody else led on meanwhile.
        """
        async with self.lock:
            if self.view.version > base.version or not self.running:
                raise Fenced(f"{self.name} is at epoch {self.view.epoch}; event {event.epoch} comes too late")
            if self._saved is None or base.version != self._saved.version:
                self._history.append_view(base)
            await self.commit(event, base)

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
        elif was_member and (me is None or me.state is not NodeState.LEFT):
            self.env.log.warning("%s was taken for dead; it joins again", self.name)
            self.rise(me.incarnation if me is not None else 0)
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

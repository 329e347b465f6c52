"""The driver of the failure detector and of gossip: one timer, casts out, effects performed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gostore.cluster import Member, NodeState
from gostore.core.errors import BadRequest
from gostore.services.cls import gossip, swim
from gostore.services.cls.gossip import Gossip, Item
from gostore.services.cls.history import INCARNATIONS_LEFT_MIN, reserve_incarnations
from gostore.services.cls.masters import NodeEvent
from gostore.services.cls.swim import Message, Rumour, Swim

if TYPE_CHECKING:
    from gostore.services.cls.service import ClsService


def to_wire(item: Item[NodeEvent]) -> list[Any]:
    """``[epoch, event, path]``: the epoch stands in front, so that a duplicate need not be read."""
    return [item.event.epoch, item.event.to_wire(), list(item.path)]


def from_wire(wire: Any) -> Item[NodeEvent]:
    """Raises ``ValueError`` on anything that :func:`to_wire` did not make."""
    match wire:
        case [int(epoch), event, [*path]] if all(isinstance(name, str) for name in path):
            item = Item(NodeEvent.from_wire(event), tuple(path))
            if item.event.epoch == epoch:
                return item
    raise ValueError(f"not an event on its way: {wire!r:.200}")


class Detection:
    """The part of one node's membership that talks all the time, a little."""

    def __init__(self, cls: ClsService) -> None:
        env, profile = cls.env, cls.config.cls.profile
        self.tunables = swim.PROFILES[profile]
        self.swim = Swim(cls.name, cls.endpoint.incarnation, self.tunables, env.rng, 0.0)
        self.gossip: Gossip[NodeEvent] = Gossip(cls.name, gossip.PROFILES[profile], env.rng)
        self._cls = cls
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0  # uvloop gives a handle without `when()` for a time that has passed
        self._ceiling = 0
        self._messages = 0

    async def begin(self) -> None:
        """Raises as :func:`reserve_incarnations`."""
        self.swim.begin(self._cls.now_s())
        self._ceiling = await reserve_incarnations(self._cls.env, self.swim.incarnation)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def statistics(self) -> dict[str, int]:
        found = {"messages": self._messages}
        found.update({f"swim_{key}": count for key, count in self.swim.counts.items()})
        found["swim_health"] = self.swim.health
        found.update({f"gossip_{key}": count for key, count in self.gossip.counts.items()})
        return found

    def arm(self) -> None:
        """One timer for both cores; to be called after each of them was given something."""
        if not self._cls.running:
            return
        due_s = min(self.swim.due_s, self.gossip.due_s)
        if self._timer is None or due_s < self._timer_due_s:
            self.stop()
            self._timer = asyncio.get_running_loop().call_at(due_s, self._on_timer)
            self._timer_due_s = due_s

    def _on_timer(self) -> None:
        self._timer = None
        cls, now_s = self._cls, self._cls.now_s()
        cls.rejoin_if_expelled()
        if self.swim.due_s <= now_s:
            self.perform(self.swim.tick(now_s))
        if self.gossip.due_s <= now_s:
            live = [name for name, member in cls.view.members.items() if member.live and name != cls.name]
            for effect in self.gossip.tick(live, now_s):
                match effect:
                    case gossip.Tell(to, items):
                        self._cast(to, "event", [to_wire(item) for item in items])
                    case gossip.Pull(source):
                        cls.pull(source)
        self.arm()

    def probed(self, source: str, kind: str, seq: int, epoch: int, rumours: list[Any], target: str = "") -> None:
        """A probe, or an answer to one, came in. Raises :class:`BadRequest`.

        Only a member answers, and refutes: who merely bears a member's name (it restarted and is not back yet, or is
        another node that wants this name) must not speak for it.
        """
        if not self._cls.is_member:
            return
        try:
            message = Message(kind, seq, target, tuple(Rumour.from_wire(rumour) for rumour in rumours))
        except ValueError as error:
            raise BadRequest(str(error)) from None
        self.perform(self.swim.receive(source, message, self._cls.now_s()))
        self.gossip.heard(source, epoch, self._cls.view.epoch, self._cls.now_s())
        self.arm()

    def news(self, items: Sequence[Any]) -> list[Item[NodeEvent]]:
        """What of the items that came in was not seen yet. Raises :class:`BadRequest`."""
        try:
            return [from_wire(wire) for wire in items if not self.gossip.is_duplicate(wire[0])]
        except (ValueError, TypeError, IndexError) as error:
            raise BadRequest(f"event: {error}") from None

    def told_of(self, source: str, name: str, incarnation: int) -> None:
        """A peer told us, as the master, that it suspects a member."""
        if self._cls.running:
            self.perform(self.swim.hear(Rumour(name, swim.SUSPECT, incarnation, (source,)), self._cls.now_s()))
            self.arm()

    def track(self, member: Member) -> None:
        """Keep the detector at what the view says."""
        if member.name == self._cls.name:
            return
        if member.live:
            self.swim.add(member.name, member.incarnation)
        else:
            self.swim.remove(member.name, lost=member.state is NodeState.OFFLINE)

    def rise(self, above: int) -> None:
        """This node comes back in an incarnation above this one."""
        self.swim.rise(above)
        self._extend_incarnations()

    def perform(self, effects: Sequence[swim.Effect]) -> None:
        """What the detector wants done."""
        cls, events = self._cls, self._cls.env.events
        for effect in effects:
            match effect:
                case swim.Send(to, message):
                    rumours = [rumour.to_wire() for rumour in message.rumours]
                    target = (message.target,) if message.kind == swim.PING_REQ else ()
                    self._cast(to, message.kind, message.seq, cls.view.epoch, rumours, *target)
                case swim.Suspected(name, incarnation, first_hand):
                    events.publish("suspect", member=name, incarnation=incarnation)
                    cls.look_for_leaders(name)
                    master = cls.acting_master()
                    if first_hand and master is not None and master not in (cls.name, name):
                        self._cast(master, "report", name, incarnation)
                case swim.Cleared(name, incarnation):
                    events.publish("refute", member=name, incarnation=incarnation)
                case swim.Refuted(incarnation):
                    events.publish("refute", member=cls.name, incarnation=incarnation)
                    self._extend_incarnations()
                case swim.Died():
                    cls.look_again()

    def _cast(self, to: str, function: str, *args: Any) -> None:
        self._messages += 1
        self._cls.endpoint.cast(to, "cls", function, *args)

    def _extend_incarnations(self) -> None:
        if self._ceiling - self.swim.incarnation < INCARNATIONS_LEFT_MIN:
            self._cls.background("incarnations", self._reserve())

    async def _reserve(self) -> None:
        self._ceiling = await reserve_incarnations(self._cls.env, self.swim.incarnation)

"""Dissemination of the master's events to all. Pure: items and the time go in, effects come out.

Theory of operation
===================
Demers et al.: "Epidemic Algorithms for Replicated Database Maintenance" (PODC 1987). Two of its mechanisms:

*Rumour mongering* (1.4) is quick. Whoever learns a new event tells it to ``fanout`` others at once, and to as many
again every period, until it was told a number of times logarithmic in the members; then interest is lost. An item
carries the *path* it took, the names of all who passed it on, for the eye of whoever studies it (and its last hops are
not told what they told). An event that was seen is a duplicate and goes no further.

*Anti-entropy* (1.3) is sure. Every probe carries the epoch of the sender's view. Who hears of a later one than its
own, and does not get there by rumours within ``patience_s``, *pulls* the whole state.

Only what the masters have committed is spread, so there is one event of an epoch. Events take effect in order. One that
comes too early is held until its predecessors are here. One whose number would fit, but which does not continue what is
here (a view that was read from the disk, and is none of the running cluster), makes a member pull.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from gostore.core.ports import Rng

Version = tuple[int, int]
"""(epoch, digest) of a view: the digest of a view that was only read from the disk is 0."""

SEEN_MAX: Final = 1024
"""Events remembered to know duplicates; many more than are under way at a time."""

HELD_MAX: Final = 64
"""Events that came too early; beyond, the latest is dropped (a pull brings it back)."""

QUEUE_MAX: Final = 256
"""Events being told; beyond, the oldest is told no further."""

PATH_MAX: Final = 32
"""Names kept of a path, the first ones. A path is about log(members) long."""


class Numbered(Protocol):
    """An event: it turns the view of version (epoch - 1, previous) into that of (epoch, digest)."""

    @property
    def epoch(self) -> int: ...
    @property
    def previous(self) -> int: ...
    @property
    def digest(self) -> int: ...


E = TypeVar("E", bound=Numbered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunables:
    """Time constants in seconds, counts without a unit."""

    period_s: float
    """Between two tellings. The last of n members hears of an event after about ``log(n) / log(fanout + 1)`` hops; the
    first hop of each member waits for nothing, so the period matters when messages are lost."""
    fanout: int = 3
    """Members told per period. More: fewer hops, more duplicates."""
    retransmit: float = 2.0
    """An event is told ``retransmit x ln(members + 1)`` times by each. With c tellings a member misses it with about
    e^-c; anti-entropy finds those."""
    items_per_message_max: int = 16
    """About 150 bytes each for one member's change: 16 are a datagram of 2.4 kB."""
    patience_s: float
    """Wait for rumours before pulling the state. About two periods: a pull costs the whole state."""

    def tellings(self, members: int) -> int:
        return math.ceil(self.retransmit * math.log(members + 1))


PROFILES: Final[dict[str, Tunables]] = {
    "fast": Tunables(period_s=0.1, patience_s=0.2),
    "lan": Tunables(period_s=0.2, patience_s=0.5),
}


@dataclass(frozen=True, slots=True)
class Item(Generic[E]):
    """An event on its way; ``path``: who passed it on, the master first."""

    event: E
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deliver(Generic[E]):
    """Apply this event now; ``path`` ends with this member."""

    event: E
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tell(Generic[E]):
    to: str
    items: tuple[Item[E], ...]


@dataclass(frozen=True, slots=True)
class Pull:
    """Ask ``source`` for the whole state, which is later than ours."""

    source: str


class _Queued(Generic[E]):
    __slots__ = ("item", "left")

    def __init__(self, item: Item[E], left: int) -> None:
        self.item = item
        self.left = left


class Gossip(Generic[E]):
    """The dissemination of one member. Call :meth:`tick` at :attr:`due_s`."""

    def __init__(self, name: str, tunables: Tunables, rng: Rng) -> None:
        self.name = name
        self.tunables = tunables
        self._rng = rng
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._held: dict[int, tuple[Item[E], str]] = {}
        self._queue: dict[int, _Queued[E]] = {}
        self._turn: list[str] = []
        self._tell_s = math.inf
        self._told_s = -math.inf
        self._behind: tuple[int, str] | None = None
        self._pull_s = math.inf
        self.counts = dict.fromkeys(("told", "delivered", "duplicates", "stale", "held", "unfit", "pulls"), 0)

    def publish(self, event: E, members: int, now_s: float) -> None:
        """Spread an event of our own, which is applied here already. ``members``: how many there are to tell."""
        self._is_new(event.epoch)
        self._enqueue(Item(event, (self.name,)), members, now_s)

    def is_duplicate(self, epoch: int) -> bool:
        """Whether this event was seen already; one that was is counted, and need not be received."""
        seen = epoch in self._seen
        self.counts["duplicates"] += seen
        return seen

    def receive(
        self, source: str, items: Sequence[Item[E]], version: Version, members: int, now_s: float
    ) -> list[Deliver[E] | Pull]:
        """What arrived from ``source``; ``version`` is that of our view. Deliveries are in the order to apply them."""
        effects: list[Deliver[E] | Pull] = []
        for item in sorted(items, key=lambda item: item.event.epoch):
            event = item.event
            if not self._is_new(event.epoch):
                self.counts["duplicates"] += 1
            elif event.epoch <= version[0]:
                self.counts["stale"] += 1
            elif event.epoch > version[0] + 1:
                self._hold(item, source, now_s)
            elif event.previous == version[1]:
                version = self._deliver(item, members, now_s, effects)
            else:
                effects.append(self._give_back(event, source))
        self._release(version, members, now_s, effects)
        return effects

    def heard(self, source: str, theirs: int, ours: int, now_s: float) -> None:
        """A probe or its answer said at which epoch ``source`` is."""
        if theirs > ours and (self._behind is None or theirs > self._behind[0]):
            if self._behind is None:
                self._pull_s = now_s + self.tunables.patience_s
            self._behind = (theirs, source)

    def adopted(self, version: Version, members: int, now_s: float) -> list[Deliver[E] | Pull]:
        """Our view came as a whole: what was held and follows it is delivered."""
        effects: list[Deliver[E] | Pull] = []
        self._release(version, members, now_s, effects)
        return effects

    @property
    def due_s(self) -> float:
        """When :meth:`tick` is to be called next; infinity when there is nothing to do."""
        return min(self._tell_s, self._pull_s)

    def tick(self, peers: Sequence[str], now_s: float) -> list[Tell[E] | Pull]:
        """``peers``: whom to tell, without ourselves."""
        effects: list[Tell[E] | Pull] = []
        if self._pull_s <= now_s:
            self._pull_s = math.inf
            if self._behind is not None:
                effects.append(Pull(self._behind[1]))
                self.counts["pulls"] += 1
                self._behind = None
        if self._tell_s <= now_s:
            effects += self._tell(peers)
            self._told_s = now_s
            self._tell_s = now_s + self.tunables.period_s if self._queue else math.inf
        return effects

    def _is_new(self, epoch: int) -> bool:
        if epoch in self._seen:
            return False
        self._seen[epoch] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)
        return True

    def _hold(self, item: Item[E], source: str, now_s: float) -> None:
        self.counts["held"] += 1
        self._held[item.event.epoch] = (item, source)
        if len(self._held) > HELD_MAX:
            dropped = self._held.pop(max(self._held))[0].event
            self._seen.pop(dropped.epoch, None)
        self.heard(source, item.event.epoch, 0, now_s)

    def _give_back(self, event: E, source: str) -> Pull:
        """It does not continue what is here: the whole is pulled. It may come again."""
        self.counts["unfit"] += 1
        self._seen.pop(event.epoch, None)
        self._behind = None
        return Pull(source)

    def _deliver(self, item: Item[E], members: int, now_s: float, effects: list[Deliver[E] | Pull]) -> Version:
        event = item.event
        self.counts["delivered"] += 1
        passed_on = Item(event, (*item.path[: PATH_MAX - 1], self.name))
        effects.append(Deliver(event, passed_on.path))
        self._enqueue(passed_on, members, now_s)
        return event.epoch, event.digest

    def _release(self, version: Version, members: int, now_s: float, effects: list[Deliver[E] | Pull]) -> None:
        """Deliver what was held and follows now; forget what was overtaken."""
        while (found := self._held.pop(version[0] + 1, None)) is not None:
            item, source = found
            if item.event.previous != version[1]:
                effects.append(self._give_back(item.event, source))
                break
            version = self._deliver(item, members, now_s, effects)
        for epoch in [epoch for epoch in self._held if epoch <= version[0]]:
            del self._held[epoch]
        if self._behind is not None and self._behind[0] <= version[0]:
            self._behind, self._pull_s = None, math.inf

    def _enqueue(self, item: Item[E], members: int, now_s: float) -> None:
        if len(self._queue) >= QUEUE_MAX:
            del self._queue[next(iter(self._queue))]
        self._queue[item.event.epoch] = _Queued(item, self.tunables.tellings(members))
        self._tell_s = now_s

    def _tell(self, peers: Sequence[str]) -> list[Tell[E]]:
        effects: list[Tell[E]] = []
        for to in self._targets(peers):
            waiting = [q for q in self._queue.values() if to not in q.item.path[-2:]]
            waiting.sort(key=lambda q: q.left, reverse=True)
            chosen = waiting[: self.tunables.items_per_message_max]
            if chosen:
                effects.append(Tell(to, tuple(q.item for q in chosen)))
                self.counts["told"] += len(chosen)
            for queued in chosen:
                queued.left -= 1
                if queued.left <= 0:
                    del self._queue[queued.item.event.epoch]
        if not effects:
            # Nobody is left who did not tell us: the items have no one to go to.
            self._queue.clear()
        return effects

    def _targets(self, peers: Sequence[str]) -> list[str]:
        """The next of a shuffled round of all peers: a small cluster is told completely before anybody twice."""
        known = frozenset(peers)
        targets: list[str] = []
        for _ in range(2):
            while self._turn and len(targets) < self.tunables.fanout:
                name = self._turn.pop()
                if name in known and name not in targets:
                    targets.append(name)
            if len(targets) < min(self.tunables.fanout, len(known)):
                self._turn = list(peers)
                self._rng.shuffle(self._turn)
        return targets

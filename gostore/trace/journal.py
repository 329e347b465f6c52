"""The journal: the events of all nodes in one place, with every gap known.

Nodes send their events in batches, each of which says which sequence numbers it covers (``gostore.core.events``). The
journal checks that the batches of one subscription and node follow each other; where they do not, or where a node died
with events in its buffer, it notes a :class:`Gap`. A view does not mind; a check that finds gaps answers "unknown".

Order: ``recent`` and iteration follow arrival, the queries the hybrid logical stamps, which respect causality.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from gostore.core.errors import BadRequest, Timeout
from gostore.core.events import KINDS, Event
from gostore.core.twins import Runner, SyncTwins, sync_twin

EVENTS_KEPT_MAX: Final = 200_000
"""The oldest are dropped beyond this. More: a longer past to look at; each takes about half a kilobyte."""

GAPS_KEPT_MAX: Final = 10_000

Where = Callable[[Event], bool]


@dataclass(frozen=True, slots=True)
class Gap:
    """Events of a node with ``after < seq <= upto`` that the journal may lack; ``upto`` None: nobody knows how many."""

    node: str
    incarnation: int
    after: int
    upto: int | None
    reason: str


@dataclass(slots=True)
class _Feed:
    """How far one subscription at one node has been delivered."""

    incarnation: int
    upto: int


class Journal(SyncTwins):
    """Collects, keeps and answers. ``runner``: where waiting happens; the loop on which batches are delivered."""

    def __init__(self, runner: Runner, *, kept_max: int = EVENTS_KEPT_MAX) -> None:
        self._runner = runner
        # Reading from another thread is safe: a deque of values is appended to and copied in one step each.
        self._events: deque[Event] = deque(maxlen=kept_max)
        self._gaps: deque[Gap] = deque(maxlen=GAPS_KEPT_MAX)
        self._feeds: dict[tuple[str, str], _Feed] = {}
        self._subscribers: dict[int, Callable[[Event], None]] = {}
        self._last_subscriber = 0
        self.position = 0
        """How many events have arrived so far; a mark to wait or to ask from."""
        self.sampled = 0
        """Message events that the nodes left out because of a subscription's rate."""

    # arriving

    def begin(self, subscription: str, node: str, incarnation: int, seq: int) -> None:
        """A subscription began at a node after its event ``seq``."""
        feed = self._feeds.get((subscription, node))
        if feed is None or feed.incarnation < incarnation:
            self._feeds[subscription, node] = _Feed(incarnation, seq)

    def deliver(
        self, subscription: str, node: str, incarnation: int, after: int, upto: int, sampled: int, events: list[Any]
    ) -> None:
        """Take a batch: every wanted event with ``after < seq <= upto``. What was delivered before is not taken again.

        Raises :class:`BadRequest` for what is no batch.
        """
        try:
            batch = [Event.from_wire(wire) for wire in events]
        except ValueError as error:
            raise BadRequest(str(error)) from None
        feed = self._feeds.get((subscription, node))
        if feed is not None and incarnation < feed.incarnation:
            return
        if feed is None or feed.incarnation < incarnation:
            feed = self._feeds[subscription, node] = _Feed(incarnation, after)
        if after > feed.upto:
            self._gaps.append(Gap(node, incarnation, feed.upto, after, "the node's buffer was full"))
        for event in batch:
            if event.seq > feed.upto:
                self.append(event)
        if upto > feed.upto:
            self.sampled += sampled
            feed.upto = upto

    def ended(self, node: str, reason: str) -> None:
        """The node is gone, and with it what it had not sent: a gap of unknown size in each of its subscriptions."""
        for (_, name), feed in list(self._feeds.items()):
            if name == node:
                self._gaps.append(Gap(node, feed.incarnation, feed.upto, None, reason))
        self._feeds = {key: feed for key, feed in self._feeds.items() if key[1] != node}

    def append(self, event: Event) -> None:
        """Take one event that happened here, such as a fault."""
        self._events.append(event)
        self.position += 1
        for subscriber in tuple(self._subscribers.values()):
            subscriber(event)

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call back for every event from now on, on the client's loop; it must not block. Returns what ends it."""
        self._last_subscriber += 1
        key = self._last_subscriber
        self._subscribers[key] = callback
        return lambda: self._subscribers.pop(key, None) and None

    # asking

    @property
    def gaps(self) -> tuple[Gap, ...]:
        return tuple(self._gaps)

    @property
    def forgotten(self) -> int:
        """Events that made room for newer ones."""
        return self.position - len(self._events)

    @property
    def complete(self) -> bool:
        """Whether all that was subscribed to is here: no gap, nothing sampled, nothing forgotten."""
        return not self._gaps and not self.sampled and not self.forgotten

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))

    def recent(self, count: int = 20, *, kinds: Iterable[str] | None = None, node: str | None = None) -> list[Event]:
        """The last ``count`` that arrived, oldest first."""
        wanted = _check_kinds(kinds)
        found: list[Event] = []
        for event in reversed(tuple(self._events)):
            if len(found) >= count:
                break
            if (wanted is None or event.kind in wanted) and node in (None, event.node):
                found.append(event)
        return found[::-1]

    def of_kind(self, *kinds: str, node: str | None = None, where: Where | None = None) -> list[Event]:
        """All of some kinds, in the order of their stamps. Raises :class:`BadRequest` for an unknown kind."""
        wanted = _check_kinds(kinds)
        found = [e for e in self if wanted is not None and e.kind in wanted and node in (None, e.node)]
        return sorted((e for e in found if where is None or where(e)), key=lambda e: (e.stamp, e.node, e.seq))

    def counts(self) -> dict[str, int]:
        """How many of each kind, the most frequent first."""
        return dict(Counter(event.kind for event in self).most_common())

    async def wait_for(
        self,
        *kinds: str,
        node: str | None = None,
        where: Where | None = None,
        since: int | None = None,
        timeout_s: float = 10.0,
    ) -> Event:
        """The first event of one of these kinds, of this node, for which ``where`` is true.

        ``since``: an earlier value of :attr:`position`; by default only what comes from now on counts. Take the
        position before you cause what you wait for. Raises :class:`Timeout` that says what did come.
        """
        wanted = _check_kinds(kinds)
        start = self.position if since is None else since
        arrived: asyncio.Future[Event] = asyncio.get_running_loop().create_future()

        def look(event: Event) -> None:
            fits = (wanted is None or event.kind in wanted) and node in (None, event.node)
            if fits and (where is None or where(event)) and not arrived.done():
                arrived.set_result(event)

        unsubscribe = self.subscribe(look)
        try:
            for event in tuple(self._events)[max(start - self.forgotten, 0) :]:
                look(event)
            async with asyncio.timeout(timeout_s):
                return await arrived
        except TimeoutError:
            seen = Counter(event.kind for event in tuple(self._events)[max(start - self.forgotten, 0) :])
            came = ", ".join(f"{kind} {count}" for kind, count in seen.most_common(8)) or "nothing"
            what = " or ".join(kinds) or "any event"
            raise Timeout(f"no {what}{f' of {node}' if node else ''} within {timeout_s:g} s; came: {came}") from None
        finally:
            unsubscribe()

    wait_for_sync = sync_twin(wait_for)

    def statistics(self) -> dict[str, int]:
        return {
            "events": self.position,
            "kept": len(self._events),
            "forgotten": self.forgotten,
            "sampled": self.sampled,
            "gaps": len(self._gaps),
        }

    def __repr__(self) -> str:
        return "Journal()" if self.complete else "Journal(incomplete)"


def _check_kinds(kinds: Iterable[str] | None) -> frozenset[str] | None:
    if kinds is None:
        return None
    wanted = frozenset(kinds)
    for kind in sorted(wanted):
        if kind not in KINDS:
            raise BadRequest(f"there is no kind of event {kind!r}; there are {', '.join(sorted(KINDS))}")
    return wanted or None

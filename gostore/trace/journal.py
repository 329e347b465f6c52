"""The journal: the events of all nodes in one place, with every gap known.

Nodes send their events in batches, each of which says which sequence numbers it covers (``gostore.core.events``). The
journal checks that the batches of one subscription and node follow each other; where they do not, or where a node died
with events in its buffer, it notes a :class:`Gap`. A view does not mind; a check that finds gaps answers "unknown".

Order: ``recent``, iteration and files follow arrival; ``of_kind`` the hybrid logical stamps; ``select`` and ``table``
causal stamp order (:mod:`gostore.trace.causality`), which also holds where a wall clock was set back.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from gostore.core.errors import BadRequest, NotSupported, Timeout
from gostore.core.events import CATEGORIES, KINDS, Event
from gostore.core.twins import Runner, SyncTwins, sync_twin
from gostore.trace import files, tables
from gostore.trace.causality import Causality

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


class _Nowhere:
    """The runner of a journal that was read from a file."""

    async def run(self, coroutine: Coroutine[Any, Any, Any], /) -> NoReturn:
        self.run_sync(coroutine)

    def run_sync(self, coroutine: Coroutine[Any, Any, Any], /) -> NoReturn:
        coroutine.close()
        raise NotSupported("nothing more comes into a journal that was read from a file: ask it, do not wait")


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
        self._causality: tuple[int, Causality] | None = None
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

    # causality

    def causality(self) -> Causality:
        """What happened before what among the events that are here now; kept until the next event arrives."""
        position = self.position
        if self._causality is None or self._causality[0] != position:
            self._causality = (position, Causality(self))
        return self._causality[1]

    def happens_before(self, a: Event, b: Event) -> bool:
        """Whether ``a`` happened before ``b``, by program order, messages and causes.

        False also where the events between them were not collected: watch the category ``message``, completely.
        Raises :class:`BadRequest` for an event that is not here (any more).
        """
        return self.causality().happens_before(a, b)

    def causal_past(self, event: Event) -> list[Event]:
        """All that happened before ``event``, without itself, in causal stamp order. Raises :class:`BadRequest`."""
        return self.causality().past(event)

    def select(
        self,
        *kinds: str,
        nodes: Iterable[str] | None = None,
        categories: Iterable[str] | None = None,
        since_s: float | None = None,
        until_s: float | None = None,
    ) -> list[Event]:
        """The events of some kinds, nodes and categories with ``since_s <= time_s <= until_s``; None: no limit.

        In causal stamp order. Raises :class:`BadRequest` for a kind or category that does not exist.
        """
        events = self.causality().events
        return [events[place] for place in self._places(kinds, nodes, categories, since_s, until_s)]

    def table(
        self,
        *kinds: str,
        nodes: Iterable[str] | None = None,
        categories: Iterable[str] | None = None,
        since_s: float | None = None,
        until_s: float | None = None,
    ) -> Any:
        """The same as a ``pandas.DataFrame``, one event a row.

        The index, ``order``, is the place in causal stamp order among all events of the journal. Columns: ``stamp``,
        ``time_s``, ``node``, ``seq``, ``kind``, ``category``, ``id`` and ``cause`` ((node, number), or None), then the
        fields of the kinds in it (``docs/events.md``). Raises :class:`BadRequest`, and :class:`NotSupported` when
        pandas is not installed.
        """
        return tables.table(self.causality(), self._places(kinds, nodes, categories, since_s, until_s))

    def _places(
        self,
        kinds: tuple[str, ...],
        nodes: Iterable[str] | None,
        categories: Iterable[str] | None,
        since_s: float | None,
        until_s: float | None,
    ) -> list[int]:
        wanted_kinds = _check_kinds(kinds)
        wanted = None if categories is None else frozenset(categories)
        for category in sorted(wanted or ()):
            if category not in CATEGORIES:
                raise BadRequest(f"there is no category {category!r}; there are {', '.join(CATEGORIES)}")
        named = None if nodes is None else frozenset(nodes)
        return [
            place
            for place, event in enumerate(self.causality().events)
            if (wanted_kinds is None or event.kind in wanted_kinds)
            and (named is None or event.node in named)
            and (wanted is None or event.category in wanted)
            and (since_s is None or event.time_s >= since_s)
            and (until_s is None or event.time_s <= until_s)
        ]

    # files

    def save(self, path: str | Path) -> None:
        """Write the journal, with its gaps, as JSON lines (:mod:`gostore.trace.files`). Raises ``OSError``."""
        events = tuple(self._events)
        gaps = [[gap.node, gap.incarnation, gap.after, gap.upto, gap.reason] for gap in self._gaps]
        header = {"events": len(events), "position": self.position, "sampled": self.sampled, "gaps": gaps}
        files.write(Path(path), header, events)

    @classmethod
    def load(cls, path: str | Path) -> Journal:
        """Read what :meth:`save` wrote; a journal to ask, into which nothing more comes.

        Raises :class:`BadRequest` that names file, line and what was expected there, and ``OSError``.
        """
        header, events = files.read(Path(path))
        journal = cls(_Nowhere(), kept_max=max(len(events), 1))
        journal._events.extend(events)
        journal._gaps.extend(Gap(*gap) for gap in header["gaps"])
        journal.position, journal.sampled = max(header["position"], len(events)), header["sampled"]
        return journal

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

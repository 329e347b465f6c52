"""What happened before what: Lamport's relation over the events of a journal, and vector clocks derived from it.

Lamport: "Time, Clocks, and the Ordering of Events in a Distributed System" (CACM 21(7), 1978), section "The Partial
Ordering": an event is after the one before it on its node (program order, also across a restart, as the disk stays),
and after its cause: a receive after its send, a reaction after what it reacts to. Fidge (1988) and Mattern (1989): the
vector clock of an event counts, for each node, how many of its events are in the past. Nothing of this travels between
nodes; it is worked out from the events.

The relation is as good as the journal. An event that was not collected takes its edges with it, so "not before" means
"not shown to be before" in a journal of which :attr:`~gostore.trace.journal.Journal.complete` is false, or which
lacks the category ``message``.

The numbers of events begin anew in every life of a node, so a cause may name events of several lives. The latest that
can be meant, by its stamp and by what a message is, is meant.

An order of all events that respects the relation ("causal stamp order") follows the stamps; where a wall clock was set
back or ran more than ``DRIFT_MS_MAX`` ahead, and stamps contradict the relation, the relation wins.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Final

from gostore.core.errors import BadRequest
from gostore.core.events import Event

NONE: Final = -1

Key = tuple[str, int, int, float]
"""(node, sequence number, stamp, loop time): which event of a journal it is, over all lives of the node."""


class Causality:
    """The relation over ``events``, which are given in any order; doubled ones count once.

    ``events``: the same in causal stamp order, (stamp, node, sequence number) where the relation leaves it open. Takes
    about n log n steps and some 200 bytes for each event.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        lines = _lines(events)
        causes = _Causes(lines)
        self.events: list[Event] = []
        self._index: dict[Key, int] = {}
        self._program: list[int] = []
        self._cause: list[int] = []
        self._merge(lines, causes)

    def _merge(self, lines: dict[str, list[Event]], causes: _Causes) -> None:
        """Take the earliest head of all nodes' lines whose cause has been taken, until all are taken."""
        at = dict.fromkeys(lines, 0)
        before = dict.fromkeys(lines, NONE)
        ready: list[tuple[int, str, int]] = []
        blocked: dict[Key, list[str]] = {}

        def offer(node: str) -> None:
            if at[node] == len(lines[node]):
                return
            event = lines[node][at[node]]
            cause = causes.of(event)
            if cause is None or key_of(cause) in self._index:
                heapq.heappush(ready, (event.stamp, node, event.seq))
            else:
                blocked.setdefault(key_of(cause), []).append(node)

        for node in lines:
            offer(node)
        while ready or blocked:
            if not ready:
                # Each waits for another: no run does this, but a damaged file can. The earliest loses its cause.
                stuck = min((lines[node][at[node]].stamp, node) for nodes in blocked.values() for node in nodes)[1]
                causes.forget(lines[stuck][at[stuck]])
                blocked = {key: kept for key, nodes in blocked.items() if (kept := [n for n in nodes if n != stuck])}
                offer(stuck)
            node = heapq.heappop(ready)[1]
            event = lines[node][at[node]]
            cause, index = causes.of(event), len(self.events)
            self._index[key_of(event)] = index
            self.events.append(event)
            self._program.append(before[node])
            self._cause.append(NONE if cause is None else self._index[key_of(cause)])
            before[node] = index
            at[node] += 1
            for waiting in (node, *blocked.pop(key_of(event), ())):
                offer(waiting)

    def __len__(self) -> int:
        return len(self.events)

    def position(self, event: Event) -> int:
        """The event's place in causal stamp order, from 0. Raises :class:`BadRequest` when it is not among them."""
        found = self._index.get(key_of(event))
        if found is None:
            raise BadRequest(
                f"event {event.seq} of {event.node} ({event.kind}) is not in this journal; it may have gone"
            )
        return found

    def cause(self, event: Event) -> Event | None:
        """The recorded event that caused this one: of a receive its send."""
        index = self._cause[self.position(event)]
        return None if index == NONE else self.events[index]

    def past(self, event: Event) -> list[Event]:
        """All that happened before the event, without itself, in causal stamp order."""
        return [self.events[index] for index in sorted(self._walk(self.position(event), NONE)[1:])]

    def happens_before(self, a: Event, b: Event) -> bool:
        """Whether ``a`` happened before ``b``. Neither before the other: they are concurrent, as far as is known."""
        first, last = self.position(a), self.position(b)
        return first < last and first in self._walk(last, first)

    def _walk(self, start: int, stop: int) -> list[int]:
        """``start`` and what is before it, no further back than ``stop``."""
        seen, found = bytearray(start + 1), [start]
        seen[start] = 1
        for index in found:  # grows while it is read
            for before in (self._program[index], self._cause[index]):
                if before >= max(stop, 0) and not seen[before]:
                    seen[before] = 1
                    found.append(before)
        return found

    def clocks(self) -> Iterator[tuple[Event, dict[str, int]]]:
        """Each event, in causal stamp order, with its vector clock: node -> events of that node up to this one.

        A node of whose events none is in the past is left out. Takes (events x nodes) steps.
        """
        uses: dict[int, int] = {}
        for index in self._cause:
            if index != NONE:
                uses[index] = uses.get(index, 0) + 1
        latest: dict[str, dict[str, int]] = {}
        kept: dict[int, dict[str, int]] = {}
        for index, event in enumerate(self.events):
            clock = dict(latest.get(event.node, ()))
            cause = self._cause[index]
            if cause != NONE:
                for node, count in kept[cause].items():
                    if count > clock.get(node, 0):
                        clock[node] = count
                uses[cause] -= 1
                if not uses[cause]:
                    del kept[cause]
            clock[event.node] = clock.get(event.node, 0) + 1
            latest[event.node] = clock
            if index in uses:
                kept[index] = clock
            yield event, clock


class _Causes:
    """Finds the event that a cause means, by the name it has there."""

    def __init__(self, lines: dict[str, list[Event]]) -> None:
        self._named: dict[tuple[str, int], list[Event]] = {}
        self._forgotten: dict[Key, None] = {}
        for line in lines.values():
            for event in line:
                self._named.setdefault(event.id, []).append(event)

    def of(self, event: Event) -> Event | None:
        if event.cause is None or key_of(event) in self._forgotten:
            return None
        found = self._named.get(event.cause)
        if found is None:
            return None
        if event.node == event.cause[0]:
            # Of its own node it is one that came earlier; an event is not its own cause, whatever a file says.
            earlier = [e for e in found if (e.time_s, e.seq) < (event.time_s, event.seq)]
            return earlier[-1] if earlier else None
        if event.kind == "recv":
            found = [e for e in found if _is_send_of(e, event)]
        by_stamp = [e for e in found if e.stamp < event.stamp]
        by_time = [e for e in found if e.time_s <= event.time_s]
        fitting = by_stamp or by_time
        return fitting[-1] if fitting else None

    def forget(self, event: Event) -> None:
        """Let this event have no cause."""
        self._forgotten[key_of(event)] = None


def _is_send_of(send: Event, recv: Event) -> bool:
    """Whether it may be: a send of another life of the sender has the same number, but tells of another message."""
    ours, theirs = recv.data, send.data
    # To nobody in particular goes what is for whoever is at an address.
    return theirs.get("to") in (recv.node, "") and all(
        ours.get(name) == theirs.get(name) for name in ("frame", "function", "request", "bytes")
    )


def key_of(event: Event) -> Key:
    return (event.node, event.seq, event.stamp, event.time_s)


def _lines(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Node -> its events in program order: loop time goes on over all lives of a node, sequence numbers do not."""
    seen: dict[Key, None] = {}
    lines: dict[str, list[Event]] = {}
    for event in events:
        if key_of(event) not in seen:
            seen[key_of(event)] = None
            lines.setdefault(event.node, []).append(event)
    for line in lines.values():
        # At one time by their numbers: some loops count in milliseconds, and two subscriptions bring two batches.
        line.sort(key=lambda event: (event.time_s, event.seq))
    return {node: lines[node] for node in sorted(lines)}

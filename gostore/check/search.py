"""Is there an order of these operations that explains every result? One key, one object.

Theory of operation
-------------------
A history is linearizable when every operation can be given one moment between its invocation and its return so that
the results are those of the operations one after the other at these moments (Herlihy & Wing, "Linearizability", TOPLAS
1990). The search tries orders (Wing & Gong, "Testing and verifying concurrent objects", JPDC 1993) and remembers where
it has been (Lowe, "Testing for linearizability", CCPE 2017), as Porcupine does.

*Required* operations are sorted by their return. A configuration is ``(first, mask, state, used)``: all required
operations before ``first`` have been placed, of those behind it the ones in ``mask`` (bit i is operation ``first + i``,
so masks stay as short as the history is concurrent), the object is in ``state``, and of the open operations ``used``
many of each class. The next operation may be any that was invoked before ``first`` returned, for otherwise ``first``
would have to be placed after it. The history is linearizable when all required operations have been placed.

*Open* operations (unknown outcome) may be placed anywhere after their invocation or nowhere, so nothing ever waits for
them. Those that ask the same form a class: they can be told apart by their invocation only, so the earliest is used
first, and a number says all. A configuration that has used fewer, all else being equal, can do whatever the other can:
the other is dropped.

*Optional* operations are required ones whose constraint was lifted: placed within their interval with any result, or
not at all. Every order of the original history is one of the lifted history, so when the lifted one has no order, the
original has none. The explanation of a failure (``gostore.check.counterexample``) lives by that.

Three more cuts. Where results tell in which order operations follow each other (versions that only grow), only the
lowest of them is tried. An operation that only reads and fits the state *now* is placed at once, with no alternative:
any order that places it later stays an order when it is moved here. An open or optional operation that does not change
the state is not placed: it may as well happen later or never.

The problem is NP-complete (Gibbons & Korach 1997), so a :class:`Budget` bounds steps and memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from gostore.check.history import Operation, Outcome
from gostore.check.models import REFUSED, Call, Model, State

STEPS_MAX: Final = 2_000_000
"""Steps of the model for one key. A million takes about two seconds; what is harder is answered "unknown"."""

MEMORY_BYTES_MAX: Final = 512 << 20
"""About what the configurations of one search may take."""

_CONFIGURATION_BYTES: Final = 400
"""A configuration in the memory and on the stack, without the state's own size (measured with tracemalloc)."""

Configuration = tuple[int, int, State, tuple[int, ...]]
"""(first, mask, state, used)"""


@dataclass(slots=True)
class Budget:
    """How much a search may take. It is used up by what runs under it."""

    steps: int = STEPS_MAX
    memory_bytes: int = MEMORY_BYTES_MAX

    def part(self, steps: int) -> Budget:
        """A smaller one for a part of the work."""
        return Budget(min(self.steps, steps), self.memory_bytes)


@dataclass(frozen=True, slots=True)
class Item:
    """A required or optional operation of a search, with its interval of positions. ``dropped``: as if it were not."""

    operation: Operation
    call: Call
    invoked: int
    returned: int
    optional: bool = False
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class OpenClass:
    """Open operations that ask the same; ``invoked`` is sorted."""

    call: Call
    invoked: tuple[int, ...]


class Found(Enum):
    ORDER = "an order exists"
    NONE = "no order exists"
    OUT_OF_BUDGET = "nobody knows"


@dataclass(slots=True)
class Problem:
    """The operations of one key, ready to be searched. ``items`` are sorted by their return."""

    model: Model
    items: Sequence[Item]
    open: Sequence[OpenClass]

    @classmethod
    def of(cls, model: Model, operations: Sequence[Operation]) -> Problem:
        """Drops what surely did not happen and open reads. Raises :class:`BadRequest` for what the model lacks."""
        items: list[Item] = []
        unknown: list[Operation] = []
        for operation in operations:
            if operation.outcome is Outcome.OK:
                assert operation.returned is not None
                items.append(Item(operation, model.call(operation), operation.invoked, operation.returned))
            elif operation.outcome is Outcome.INFO:
                unknown.append(operation)
        items.sort(key=lambda item: item.returned)
        return cls(model, items, open_classes((model.call(o), o.invoked) for o in unknown))

    @property
    def start(self) -> Configuration:
        return (0, 0, self.model.initial, (0,) * len(self.open))


def open_classes(calls: Iterable[tuple[Call, int]]) -> list[OpenClass]:
    """Group (call, invoked) by what they ask; those that only read say nothing and are dropped."""
    groups: dict[Call, list[int]] = {}
    for call, invoked in calls:
        if not call.reads:
            groups.setdefault(call, []).append(invoked)
    return [OpenClass(call, tuple(sorted(invoked))) for call, invoked in groups.items()]


class Search:
    """One run over a problem, from some configurations to the point where ``upto`` required operations are placed."""

    def __init__(self, problem: Problem, budget: Budget, *, upto: int | None = None, every: bool = False) -> None:
        self.model = problem.model
        self.items = problem.items
        self.open = problem.open
        self.upto = len(problem.items) if upto is None else upto
        self.every = every
        """Go on after the first order, to collect in :attr:`ends` every configuration that can be met at ``upto``."""
        self.ends: list[Configuration] = []
        self.deepest = 0
        """The operations before this one have an order; whether it can join them, this search did not find."""
        self._budget = budget
        self._seen: dict[tuple[int, int, State], list[tuple[int, ...]]] = {}
        self._windows: dict[int, list[int]] = {}
        self._earliest_behind = self._suffix_minima()

    def _suffix_minima(self) -> list[int]:
        """For each position the earliest invocation of the items from there on."""
        minima = [item.invoked for item in self.items] + [sys.maxsize]
        for index in range(len(self.items) - 1, -1, -1):
            minima[index] = min(minima[index], minima[index + 1])
        return minima

    def _window(self, first: int) -> list[int]:
        """The items behind ``first`` that were invoked before it returned."""
        window = self._windows.get(first)
        if window is None:
            window, returned, index = [], self.items[first].returned, first + 1
            while self._earliest_behind[index] < returned:
                if self.items[index].invoked < returned:
                    window.append(index)
                index += 1
            self._windows[first] = window
            self._budget.memory_bytes -= 100 + 8 * len(window)
        return window

    def run(self, starts: Sequence[Configuration]) -> Found:
        stack = [start for start in reversed(starts) if self._new(start)]
        while stack:
            configuration = self._place_reads(*stack.pop())
            first = configuration[0]
            self.deepest = max(self.deepest, first)
            if first >= self.upto:
                self.ends.append(configuration)
                if self.every:
                    continue
                return Found.ORDER
            if self._budget.steps <= 0 or self._budget.memory_bytes <= 0:
                return Found.OUT_OF_BUDGET
            stack.extend(successor for successor in reversed(self._successors(configuration)) if self._new(successor))
        return Found.ORDER if self.ends else Found.NONE

    def _new(self, configuration: Configuration) -> bool:
        """Whether nothing as good has been met; if so it is remembered."""
        first, mask, state, used = configuration
        known = self._seen.setdefault((first, mask, state), [])
        for other in known:
            if all(a <= b for a, b in zip(other, used, strict=True)):
                return False
        known.append(used)
        self._budget.memory_bytes -= _CONFIGURATION_BYTES + sys.getsizeof(state)
        return True

    def _place_reads(self, first: int, mask: int, state: State, used: tuple[int, ...]) -> Configuration:
        """Place every read that fits the state now."""
        step = self.model.step
        items = self.items
        placed = True
        while placed and first < self.upto:
            placed = False
            for index in (first, *self._window(first)):
                bit = 1 << (index - first)
                item = items[index]
                if item.call.reads and not mask & bit:
                    self._budget.steps -= 1
                    if item.dropped or step(state, item.call) == state:
                        mask |= bit
                        placed = True
            first, mask = _normal(first, mask)
        return (first, mask, state, used)

    def _successors(self, configuration: Configuration) -> list[Configuration]:
        """What may come next; the most promising first: what must return soonest, and open operations last."""
        first, mask, state, used = configuration
        step = self.model.step
        items = self.items
        found: list[Configuration] = []
        waiting = [i for i in (first, *self._window(first)) if not mask >> (i - first) & 1]
        rank = min((items[i].call.rank for i in waiting if items[i].call.rank), default=0)
        for index in waiting:
            bit = 1 << (index - first)
            item = items[index]
            if item.call.rank > rank:
                continue
            self._budget.steps -= 1
            after = step(state, item.call)
            if item.optional:
                if index == first:
                    found.append((*_normal(first, mask | bit), state, used))
                if after == state:
                    continue
            if after is not REFUSED:
                found.append((*_normal(first, mask | bit), after, used))
        returned = items[first].returned
        for number, group in enumerate(self.open):
            count = used[number]
            if count < len(group.invoked) and group.invoked[count] < returned:
                self._budget.steps -= 1
                after = step(state, group.call)
                if after is not REFUSED and after != state:
                    found.append((first, mask, after, (*used[:number], count + 1, *used[number + 1 :])))
        return found


def _normal(first: int, mask: int) -> tuple[int, int]:
    """Move ``first`` behind the placed operations that stand there."""
    ones = (~mask & (mask + 1)).bit_length() - 1
    return first + ones, mask >> ones

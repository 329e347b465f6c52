"""Why a history is not linearizable, in as few operations as possible.

Three steps, each of which keeps the failure and is sound: whatever order the whole history had, the smaller problem
would have one, too.

1. *The shortest prefix* that ends with a return and has no order. What returned later counts as open. The operation
   that the search never placed is where to begin; as prefixes of what has an order have one, halving finds the end.
2. *The latest start.* At a quiescent cut everything required has returned before anything that follows is invoked. All
   states that the object can have there are enumerated; when they are few, the past is replaced by them. (Horn &
   Kroening, "Faster linearizability checking via P-compositionality", FORTE 2015, cut by key; this cuts by time.)
3. *Lifting.* Operation by operation (in halves first, as in Zeller & Hildebrandt, "Simplifying and isolating
   failure-inducing input", TSE 2002) the constraint is lifted: a read is dropped, anything else becomes optional, which
   means that it may have happened within its interval, with any result, or not at all. Operations whose lifting keeps
   the failure do not matter; those that are left are the counterexample. Lifting more never removes an order, so one
   pass leaves a set of which no member can be spared.

Steps 2 and 3 use searches with a budget. One that runs out counts as "may have an order", so the result is right in any
case, and :attr:`Counterexample.minimal` says whether it is minimal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from gostore.check.history import Operation, Outcome
from gostore.check.models import Model, show_operation, show_value
from gostore.check.search import Budget, Configuration, Found, Item, Problem, Search, open_classes

EXPLAIN_STEPS_MAX: Final = 300_000
"""Steps of the model for one explanation, about a second."""

PROBE_STEPS_MIN: Final = 2_000
PROBE_STEPS_EACH: Final = 50
"""Steps for one question on the way: so many, and so many more for each operation that it is about."""

CUTS_MAX: Final = 8
"""Quiescent cuts that are tried, from the latest. More: a longer way back to the operation that was forgotten."""

STATES_MAX: Final = 3
"""States at the start of a window that a reader can keep in mind."""

COLUMNS_MAX: Final = 90
"""Width of the time line; more moments than fit are squeezed."""


@dataclass(frozen=True, slots=True)
class Counterexample:
    """No order of ``operations`` explains their results.

    ``states``: what the object can have held before them, in words. ``others``: how many further operations run in the
    same window; they do not matter: whether and when each of them happened, there is no order. ``minimal``: without any
    one of ``operations`` there would be an order, as far as anything was searched.
    """

    key: Any
    operations: tuple[Operation, ...]
    states: tuple[str, ...]
    others: int
    minimal: bool

    def text(self) -> str:
        """A time line of the operations, and what it means."""
        name = "" if self.key is None else f"key {show_value(self.key)}: "
        count = len(self.operations)
        these = "this operation" if count == 1 else f"these {count} operations"
        lines = [f"{name}no order of {these} explains every result", f"  before: {' or '.join(self.states)}"]
        lines += [f"  {line}" for line in time_line(self.operations)]
        if self.others:
            lines.append(
                f"  Others in this window that make no difference, whether or not they happened: {self.others}."
            )
        if not self.minimal:
            lines.append("  The search for a smaller set ran out of steps.")
        return "\n".join(lines)

    __str__ = text


def explain(key: Any, problem: Problem, stuck: int, budget: Budget) -> Counterexample:
    """``stuck``: the first required operation that the exhausted search never placed (:attr:`Search.deepest`)."""
    left = budget.part(EXPLAIN_STEPS_MAX)
    problem = _shortest_prefix(problem, stuck, left)
    best: Counterexample | None = None
    for cut in _cuts(problem.items):
        starts = _starts(problem, cut, left)
        states = tuple(dict.fromkeys(problem.model.show(state) for _, _, state, _ in starts))
        if not starts or (cut and len(states) > STATES_MAX):
            continue
        kept, minimal = _lift(problem, cut, starts, left)
        operations = tuple(sorted((problem.items[i].operation for i in kept), key=lambda o: o.invoked))
        found = Counterexample(key, operations, states, len(problem.items) - cut - len(kept), minimal)
        if cut == 0 or any(not problem.items[i].call.reads for i in kept):
            # A read alone beside a state convinces nobody: look back until the operation shows that it contradicts.
            return found if best is None or len(operations) <= len(best.operations) + 3 else best
        best = best or found
    assert best is not None, "the cut at 0 always answers"
    return best


def _probe_steps(operations: int) -> int:
    return PROBE_STEPS_MIN + PROBE_STEPS_EACH * operations


def _shortest_prefix(problem: Problem, stuck: int, left: Budget) -> Problem:
    low, high = stuck, len(problem.items) - 1
    while low < high:
        # Mostly it ends where the search got stuck; it ends later when the results of later operations were to blame.
        middle = stuck if low == stuck else (low + high) // 2
        prefix = _prefix(problem, middle)
        if _probe(prefix, [prefix.start], middle, left) is Found.NONE:
            high = middle
        else:
            low = middle + 1
    return _prefix(problem, high)


def _probe(problem: Problem, starts: Sequence[Configuration], operations: int, left: Budget) -> Found:
    """Search with a part of the budget."""
    part = left.part(_probe_steps(operations))
    before = part.steps
    found = Search(problem, part).run(starts)
    left.steps -= before - part.steps
    return found


def _prefix(problem: Problem, last: int) -> Problem:
    """The problem as it stood when ``last`` returned; what ran then is open, and what it was told later unknown."""
    end = problem.items[last].returned
    running = [item for item in problem.items[last + 1 :] if item.invoked < end]
    opened = [(group.call, invoked) for group in problem.open for invoked in group.invoked if invoked < end]
    lifted = [_optional(problem.model, item) for item in running if not item.call.reads]
    classes = open_classes([*opened, *((item.call, item.invoked) for item in lifted)])
    return Problem(problem.model, problem.items[: last + 1], classes)


def _cuts(items: Sequence[Item]) -> Iterator[int]:
    """Quiescent cuts, the latest first, and 0."""
    earliest, tried = items[-1].invoked, 0
    for cut in range(len(items) - 1, 0, -1):
        earliest = min(earliest, items[cut].invoked)
        if items[cut - 1].returned < earliest:
            yield cut
            tried += 1
            if tried == CUTS_MAX:
                break
    yield 0


def _starts(problem: Problem, cut: int, left: Budget) -> list[Configuration]:
    """Every configuration at the cut; none when there was no time to find out."""
    if cut == 0:
        return [problem.start]
    probe = left.part(_probe_steps(cut))
    before = probe.steps
    search = Search(problem, probe, upto=cut, every=True)
    found = search.run([problem.start])
    left.steps -= before - probe.steps
    return list(dict.fromkeys(search.ends)) if found is Found.ORDER else []


def _lift(problem: Problem, cut: int, starts: Sequence[Configuration], left: Budget) -> tuple[list[int], bool]:
    """The items of the window whose constraints suffice for the failure, and whether every question was answered."""
    kept = list(range(cut, len(problem.items)))
    answered = True
    size = len(kept)
    while size:
        at = 0
        while at < len(kept):
            trial = kept[:at] + kept[at + size :]
            found = _probe(_lifted(problem, cut, trial), starts, len(problem.items) - cut, left)
            if found is Found.NONE:
                kept = trial
            else:
                answered = answered and (size > 1 or found is Found.ORDER)
                at += size
        size //= 2
    return kept, answered


def _lifted(problem: Problem, cut: int, kept: Sequence[int]) -> Problem:
    """The problem with the constraints of the window lifted, but for those of the items ``kept``."""
    items = list(problem.items[:cut])
    keep = frozenset(kept)
    for index in range(cut, len(problem.items)):
        item = problem.items[index]
        if index in keep:
            items.append(item)
        elif not item.call.reads:
            items.append(_optional(problem.model, item))
    return Problem(problem.model, items, problem.open)


def _optional(model: Model, item: Item) -> Item:
    call = model.call(replace(item.operation, outcome=Outcome.INFO, result=None))
    return replace(item, call=call, optional=True)


def time_line(operations: Sequence[Operation]) -> list[str]:
    """A line for each operation: process, what it was, and a bar from invocation to return (open ones have no end)."""
    moments = sorted(m for o in operations for m in (o.invoked, o.returned) if m is not None)
    scale = min(3.0, COLUMNS_MAX / max(len(moments), 1))
    column = {moment: int(rank * scale) for rank, moment in enumerate(moments)}
    end = int(len(moments) * scale)
    whats = [show_operation(operation) for operation in operations]
    who = max((len(str(o.process)) for o in operations), default=0)
    wide = max((len(what) for what in whats), default=0)
    lines = []
    for operation, what in zip(operations, whats, strict=True):
        start = column[operation.invoked]
        if operation.outcome is Outcome.OK and operation.returned is not None:
            bar = "├" + "─" * max(column[operation.returned] - start - 1, 0) + "┤"
        else:
            bar = "├" + "─" * (end - start) + "…"
        lines.append(f"{operation.process!s:>{who}}  {what:<{wide}}  {' ' * start}{bar}{_times(operation)}")
    return lines


def _times(operation: Operation) -> str:
    if operation.invoked_s is None:
        return ""
    end = "" if operation.returned_s is None else f"{operation.returned_s:.3f}"
    return f"   {operation.invoked_s:.3f}..{end} s"

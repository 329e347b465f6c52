"""Why a history is not linearizable, in as few operations as possible.

Three steps, each of which keeps the failure and is sound: whatever order the whole history had, the smaller problem
would have one, too.

1. *The shortest prefix* that ends with a return and has no order. What returned later counts as open. The operation
   that the search never placed is where to begin; as prefixes of what has an order have one, halving finds the end.
2. *The latest start.* At a quiescent cut everything required has returned before anything that follows is invoked. All
   states that the object can have there are enumerated; when they are few, the past is replaced by them. (Horn &
   Kroening, "Faster linearizability checking via P-compositionality", FORTE 2015, cut by key; this cuts by time.) In
   long histories that never come to rest the cut is made in the middle of things: the configurations there then say
   which of the running operations have been placed.
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

EXPLAIN_STEPS_MIN: Final = 300_000
EXPLAIN_EACH: Final = 3
"""Steps of the model for one explanation: about a second, or so many times what the verdict took."""

PROBE_STEPS_MIN: Final = 2_000
PROBE_STEPS_EACH: Final = 50
"""Steps for one question on the way: so many, and so many more for each operation that it is about."""

CUTS_MAX: Final = 8
"""Quiescent cuts that are tried, from the latest. More: a longer way back to the operation that was forgotten."""

WINDOW_MAX: Final = 128
"""Operations in a window between two moments of rest; a longer one is cut somewhere."""

STATES_MAX: Final = 3
"""States at the start of a window that a reader can keep in mind."""

SHOWN_MAX: Final = 30
"""Operations in a text; of a larger counterexample these are the last."""

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
        if count > SHOWN_MAX:
            lines.append(f"  ... and {count - SHOWN_MAX} operations before these")
        lines += [f"  {line}" for line in time_line(self.operations[-SHOWN_MAX:])]
        if self.others:
            lines.append(
                f"  Others in this window that make no difference, whether or not they happened: {self.others}."
            )
        if not self.minimal:
            lines.append("  The search for a smaller set ran out of steps.")
        return "\n".join(lines)

    __str__ = text


def explain(key: Any, problem: Problem, stuck: int, budget: Budget) -> Counterexample:
    """``stuck``: the first required operation that the exhausted search never placed (:attr:`Search.deepest`).

    ``budget`` bounds the explanation; without any, all operations of the prefix are the counterexample.
    """
    problem = _shortest_prefix(problem, stuck, budget)
    best: Counterexample | None = None
    for cut in _cuts(problem.items):
        if best is not None and len(problem.items) - cut > WINDOW_MAX:
            break
        starts = _starts(problem, cut, budget)
        states = tuple(dict.fromkeys(problem.model.show(state) for _, _, state, _ in starts))
        if not starts or (cut and len(states) > STATES_MAX):
            continue
        kept, minimal = _lift(problem, cut, starts, budget)
        operations = tuple(sorted((problem.items[i].operation for i in kept), key=lambda o: o.invoked))
        found = Counterexample(key, operations, states, len(problem.items) - cut - len(kept), minimal)
        if any(not problem.items[i].call.reads for i in kept):
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
    """Search with a part of the budget; building the problem costs, too."""
    left.steps -= operations // 4
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
    """Where a window may begin: quiescent cuts, the latest first; in a long history any; and 0."""
    count = len(items)
    earliest, tried = items[-1].invoked, 0
    for cut in range(count - 1, max(count - WINDOW_MAX, 0), -1):
        earliest = min(earliest, items[cut].invoked)
        if items[cut - 1].returned < earliest and tried < CUTS_MAX:
            yield cut
            tried += 1
    if count > WINDOW_MAX:
        size = 4
        while size <= WINDOW_MAX:
            yield count - size
            size *= 2
    yield 0


def _starts(problem: Problem, cut: int, left: Budget) -> list[Configuration]:
    """Every configuration at the cut; none when there was no time to find out."""
    if cut == 0:
        return [problem.start]
    probe = left.part(left.steps // 3)
    before = probe.steps
    search = Search(problem, probe, upto=cut, every=True)
    found = search.run([problem.start])
    left.steps -= before - probe.steps
    return list(dict.fromkeys(search.ends)) if found is Found.ORDER else []


def _lift(problem: Problem, cut: int, starts: Sequence[Configuration], left: Budget) -> tuple[list[int], bool]:
    """The items of the window whose constraints suffice for the failure, and whether every question was answered."""
    window = problem.items[cut:]
    lifted = [_lifted(problem.model, item) for item in window]
    starts = [(first - cut, mask, state, used) for first, mask, state, used in starts]
    kept = list(range(len(window)))
    answered = True
    size = len(kept)
    while size:
        at = 0
        while at < len(kept):
            if left.steps <= 0:
                return [cut + i for i in kept], False
            trial = kept[:at] + kept[at + size :]
            items = lifted.copy()
            for index in trial:
                items[index] = window[index]
            found = _probe(Problem(problem.model, items, problem.open), starts, len(window), left)
            if found is Found.NONE:
                kept = trial
            else:
                answered = answered and (size > 1 or found is Found.ORDER)
                at += size
        size //= 2
    return [cut + i for i in kept], answered


def _lifted(model: Model, item: Item) -> Item:
    """The item without its constraint."""
    if item.call.reads:
        return replace(item, call=replace(item.call, rank=0), dropped=True)
    return _optional(model, item)


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

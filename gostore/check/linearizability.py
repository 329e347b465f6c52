"""Linearizability of a history, key by key.

A history is linearizable when that of each object is (locality: Herlihy & Wing 1990, theorem 1), so every key is judged
alone; ``gostore.check.search`` tells how. A key that takes more than the budget is "unknown", never "fine".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from gostore.check.counterexample import EXPLAIN_EACH, EXPLAIN_STEPS_MIN, Counterexample, explain
from gostore.check.history import History, Operation
from gostore.check.models import Frozen, Model, freeze, model_named, show_value
from gostore.check.search import MEMORY_BYTES_MAX, STEPS_MAX, Budget, Found, Problem, Search

EXPLAINED_MAX: Final = 16
"""Keys whose failure is explained; the others are only counted."""


class Verdict(StrEnum):
    LINEARIZABLE = "linearizable"
    NOT = "not"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class KeyVerdict:
    """One key: ``steps`` are steps of the model; the first that are not linearizable have a ``counterexample``."""

    key: Any
    verdict: Verdict
    operations: int
    steps: int
    counterexample: Counterexample | None = None


@dataclass(frozen=True, slots=True)
class Linearizability:
    """The judgement of a history."""

    verdict: Verdict
    model: str
    operations: int
    keys: tuple[KeyVerdict, ...]

    @property
    def steps(self) -> int:
        return sum(key.steps for key in self.keys)

    @property
    def fine(self) -> bool:
        return self.verdict is Verdict.LINEARIZABLE

    def figures(self) -> dict[str, Any]:
        """For reports: how much was done, and which keys are to blame."""
        bad = [key.key for key in self.keys if key.verdict is Verdict.NOT]
        return {"keys": len(self.keys), "steps": self.steps, "keys_not": bad}

    def text(self) -> str:
        """The verdict, and for each key that is not linearizable or unknown the reason."""
        says = {Verdict.LINEARIZABLE: "linearizable", Verdict.NOT: "not linearizable", Verdict.UNKNOWN: "unknown"}
        silent = sum(key.verdict is Verdict.NOT and key.counterexample is None for key in self.keys)
        lines = [f"{says[self.verdict]}: {self.operations} operations on {len(self.keys)} keys ({self.model})"]
        for key in self.keys:
            if key.counterexample is not None:
                lines.append(key.counterexample.text())
            elif key.verdict is Verdict.UNKNOWN:
                name = show_value(key.key)
                lines.append(f"key {name}: no answer within {key.steps:,} steps; a larger budget may give one")
        if silent:
            lines.append(f"{silent} more keys are not linearizable")
        return "\n".join(lines)

    __str__ = text


def check_linearizable(
    history: History | Iterable[Operation],
    model: Model | str | None = None,
    *,
    steps_max: int = STEPS_MAX,
    memory_bytes_max: int = MEMORY_BYTES_MAX,
) -> Linearizability:
    """Judge a history. ``model``: by default the history's own. The bounds are for each key.

    Raises :class:`gostore.core.errors.BadRequest` for an unknown model and for an operation that the model lacks.
    """
    if model is None:
        model = history.model if isinstance(history, History) else "register"
    model = model_named(model) if isinstance(model, str) else model
    keys: dict[Frozen, list[Operation]] = {}
    count = 0
    for operation in history:
        keys.setdefault(freeze(operation.key), []).append(operation)
        count += 1
    verdicts: list[KeyVerdict] = []
    explained = 0
    for operations in keys.values():
        budget = Budget(steps_max, memory_bytes_max)
        verdicts.append(check_key(model, operations, budget, explained=explained < EXPLAINED_MAX))
        explained += verdicts[-1].counterexample is not None
    found = [key.verdict for key in verdicts]
    overall = next((v for v in (Verdict.NOT, Verdict.UNKNOWN) if v in found), Verdict.LINEARIZABLE)
    return Linearizability(overall, model.name, count, tuple(verdicts))


def check_key(model: Model, operations: list[Operation], budget: Budget, *, explained: bool = True) -> KeyVerdict:
    """Judge the operations of one key, at least one."""
    key = operations[0].key
    problem = Problem.of(model, operations)
    given = budget.steps
    search = Search(problem, budget)
    found = search.run([problem.start])
    steps = given - budget.steps
    if found is Found.ORDER:
        return KeyVerdict(key, Verdict.LINEARIZABLE, len(operations), steps)
    if found is Found.OUT_OF_BUDGET:
        return KeyVerdict(key, Verdict.UNKNOWN, len(operations), steps)
    effort = Budget(max(EXPLAIN_STEPS_MIN, EXPLAIN_EACH * steps), budget.memory_bytes)
    why = explain(key, problem, search.deepest, effort) if explained else None
    return KeyVerdict(key, Verdict.NOT, len(operations), steps, why)

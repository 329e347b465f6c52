"""What a lab's ``checks.py`` uses to declare its checks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

CheckFunction = Callable[[Any, random.Random], None]
"""Is given the student's class and a seeded source of randomness; raises ``AssertionError`` with a message."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    points: int
    hint: str
    function: CheckFunction


def check(*, points: int, hint: str) -> Callable[[CheckFunction], CheckFunction]:
    """Mark a function of ``checks.py`` as a check worth ``points``; ``hint`` is shown when it fails."""

    def mark(function: CheckFunction) -> CheckFunction:
        function.gostore_check = (points, hint)  # type: ignore[attr-defined]
        return function

    return mark


def checks_of(module: ModuleType) -> list[Check]:
    """The checks of a module, in the order of their definition."""
    return [
        Check(name, value.gostore_check[0], value.gostore_check[1], value)
        for name, value in vars(module).items()
        if callable(value) and hasattr(value, "gostore_check")
    ]

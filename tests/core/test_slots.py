from __future__ import annotations

from collections.abc import Iterator

import pytest

from gostore.core.errors import PolicyError
from gostore.core.slots import SLOTS, PolicySource, Slot, declare_slot, load_policy


class Default:
    def pick(self, items: list[int]) -> int:
        return items[0]


def check(cls: type) -> None:
    assert cls().pick([3, 1]) in (3, 1), "pick must return one of the items"


@pytest.fixture(autouse=True)
def slot() -> Iterator[Slot]:
    yield declare_slot(Slot("picking", Default, ("pick",), check, "which item is taken"))
    del SLOTS["picking"]


def test_a_policy_is_compiled_checked_and_used() -> None:
    cls = load_policy(
        "picking", PolicySource("Last", "class Last:\n    def pick(self, items):\n        return items[-1]\n")
    )
    assert cls().pick([1, 2]) == 2


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("class Mine:\n    def pick(self, items)\n        return 1\n", ["line 2", "SyntaxError", "def pick"]),
        ("class Mine:\n    def pick(self, items):\n        return items[9]\n", ["line 3", "IndexError", "items[9]"]),
        ("class Mine:\n    def pick(self, items):\n        return 9\n", ["must return one of the items"]),
        ("class Mine:\n    def choose(self, items):\n        return 1\n", ["lacks pick"]),
        ("class Other:\n    pass\n", ["defines no class"]),
        ("raise SystemExit\n", ["SystemExit", "line 1"]),
    ],
)
def test_a_broken_policy_is_refused_with_its_line(source: str, parts: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy("picking", PolicySource("Mine", source))
    for part in parts:
        assert part in caught.value.message


def test_an_unknown_slot_names_those_that_exist() -> None:
    with pytest.raises(PolicyError, match="picking"):
        load_policy("pikking", PolicySource("Mine", ""))


def test_a_slot_is_declared_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        declare_slot(Slot("picking", Default, (), check, ""))

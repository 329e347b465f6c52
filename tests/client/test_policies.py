"""What travels with a class, and what is refused by name."""

from __future__ import annotations

import collections as c
import math
import sys
import types
from bisect import bisect
from typing import Any

import pytest

from gostore.client.policies import policy_source
from gostore.core.errors import PolicyError
from gostore.core.slots import SLOTS, PolicySource, Slot, declare_slot, load_policy

SALT = b"salt"
TABLE = {"a": [1, 2.5, float("inf")], "b": (None, True)}
HANDLE = object()


def helper(value: int) -> int:
    return deeper(value) + 1


def deeper(value: int) -> int:
    return value * FACTOR


FACTOR = 3


class Base:
    def base(self) -> str:
        return "base"


class Everything(Base):
    """Uses one thing of every kind."""

    table = TABLE

    def owners(self, key: bytes, other: UnknownAnnotation = None) -> list[Any]:  # type: ignore[name-defined]  # noqa: F821
        found: UnknownAnnotation = [helper(2), math.floor(2.5), bisect([1, 2], 1), c.Counter("aa")["a"]]  # type: ignore[name-defined]  # noqa: F821
        return [*found, SALT, self.base(), self.table["a"][2]]


@pytest.fixture(autouse=True)
def _slot() -> Any:
    slot = Slot("tested", object, ("owners",), lambda cls: None, "for these tests")
    declare_slot(slot)
    yield
    del SLOTS["tested"]


def elsewhere(policy: PolicySource) -> type:
    """As a node gets it: from the wire, with nothing around it."""
    return load_policy("tested", PolicySource.from_wire(policy.to_wire()))


def test_a_class_takes_along_what_it_uses() -> None:
    cls = elsewhere(policy_source(Everything))
    assert cls().owners(b"") == [7, 2, 1, 2, b"salt", "base", math.inf]
    assert cls is not Everything


def test_a_class_made_in_a_function_takes_its_variables() -> None:
    step = 4

    class Closed:
        def owners(self) -> int:
            return step + helper(1)

    assert elsewhere(policy_source(Closed))().owners() == 8


def test_unknown_name_is_named() -> None:
    class Wrong:
        def owners(self) -> Any:
            return misspelt  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(PolicyError, match="Wrong uses 'misspelt', which is not defined"):
        policy_source(Wrong)


def test_what_cannot_travel_is_named_with_its_type() -> None:
    class Wrong:
        def owners(self) -> Any:
            return HANDLE

    with pytest.raises(PolicyError, match="Wrong uses 'HANDLE', a object, which cannot travel"):
        policy_source(Wrong)


def test_module_that_only_we_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = types.ModuleType("secret_module")
    monkeypatch.setitem(sys.modules, "secret_module", secret)

    class Wrong:
        def owners(self) -> Any:
            return secret.answer

    with pytest.raises(PolicyError, match="'secret' of the module 'secret_module', which the nodes cannot import"):
        policy_source(Wrong)


def test_no_class_and_no_source_are_refused() -> None:
    with pytest.raises(PolicyError, match="give the class itself"):
        policy_source(Everything())  # type: ignore[arg-type]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("class Typed:\n    def owners(self): pass", namespace)
    with pytest.raises(PolicyError, match="source of Typed cannot be found"):
        policy_source(namespace["Typed"])


def notebook_cell(source: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run text as a notebook does: in ``__main__``, which has no file, its lines known to linecache."""
    import linecache

    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    name = "/tmp/ipykernel_1/42.py"
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(keepends=True), name))
    exec(compile(source, name, "exec"), main.__dict__)
    return main.__dict__


CELL = """import hashlib
from dataclasses import dataclass

@dataclass
class Span:
    start: int

def digest(key):
    return hashlib.sha256(key).hexdigest()

# a comment

class MyRing:
    def owners(self, key):
        return Span(3).start, digest(key)[:4]

    def wrong(self):
        return 1 / 0
"""


def test_a_notebook_cell_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = notebook_cell(CELL, monkeypatch)["MyRing"]
    policy = policy_source(cls)
    assert elsewhere(policy)().owners(b"") == (3, "e3b0")
    assert policy.first_line == 13


def test_errors_name_the_line_of_the_students_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = notebook_cell(CELL, monkeypatch)["MyRing"]
    monkeypatch.setitem(SLOTS, "tested", Slot("tested", object, (), lambda cls: cls().wrong(), ""))
    with pytest.raises(PolicyError) as caught:
        elsewhere(policy_source(cls))
    assert caught.value.message.endswith(
        "MyRing, line 18: ZeroDivisionError: division by zero\n    18 |         return 1 / 0"
    )


def test_an_error_in_a_helper_shows_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = notebook_cell(CELL, monkeypatch)["MyRing"]
    monkeypatch.setitem(SLOTS, "tested", Slot("tested", object, (), lambda cls: cls().owners(1), ""))
    with pytest.raises(PolicyError) as caught:
        elsewhere(policy_source(cls))
    assert "in what it uses: TypeError" in caught.value.message
    assert "|     return hashlib.sha256(key).hexdigest()" in caught.value.message


class _TooFar:
    def __init__(self, nodes, replicas, tokens_per_node):  # type: ignore[no-untyped-def]
        self.names = sorted(nodes)

    def owners(self, key):  # type: ignore[no-untyped-def]
        return self.names[len(self.names) + 5]


class _Twice(_TooFar):
    def owners(self, key):  # type: ignore[no-untyped-def]
        return (self.names[0], self.names[0])


@pytest.mark.parametrize(("cls", "part"), [(_TooFar, "self.names[len(self.names) + 5]"), (_Twice, "twice")])
def test_a_policy_that_does_not_fit_is_refused_before_anything_runs(cls: type, part: str) -> None:
    import gostore as gs

    with pytest.raises(PolicyError) as caught:
        gs.launch(2, placement=cls)
    assert part in caught.value.message

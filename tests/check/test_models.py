"""The sequential specifications, one step at a time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gostore.check.history import History, Operation
from gostore.check.models import MODELS, REFUSED, SHOWN_MAX, freeze, model_named, show_operation, show_value, thaw
from gostore.core.errors import BadRequest

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def operation(kind: str, argument: Any = None, result: Any = None, *, known: bool = True) -> Operation:
    history = History("any")
    made = history.invoke("c", kind, "x", argument)
    if known:
        history.ok(made, result)
    return made


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_thaw_undoes_freeze(value: object) -> None:
    frozen = freeze(value)
    hash(frozen)
    assert repr(thaw(frozen)) == repr(value) or thaw(frozen) == value  # maps come back in another order


def test_freeze_keeps_apart_what_python_calls_equal() -> None:
    kinds = [1, 1.0, True, "1", [1], ["array", 1], {"1": 1}, None, 0, False, [], {}]
    assert len({freeze(value) for value in kinds}) == len(kinds)
    assert freeze([1, {"a": 2}]) == freeze((1, {"a": 2}))
    with pytest.raises(BadRequest, match="set"):
        freeze({1, 2})


def run(model: str, *operations: Operation) -> list[str]:
    """The states in words; stops where an operation is refused."""
    of = model_named(model)
    state, shown = of.initial, []
    for each in operations:
        state = of.step(state, of.call(each))
        if state is REFUSED:
            return [*shown, "refused"]
        shown.append(of.show(state))
    return shown


def test_register() -> None:
    assert run("register", operation("read"), operation("write", 1), operation("read", result=1)) == [
        "nothing",
        "1",
        "1",
    ]
    assert run("register", operation("write", 1), operation("read", result=True)) == ["1", "refused"]
    assert run("register", operation("cas", [None, 2], True), operation("cas", [1, 3], False)) == ["2", "2"]
    assert run("register", operation("cas", [1, 2], True)) == ["refused"]
    assert run("register", operation("cas", [None, 2], False)) == ["refused"]
    unknown = operation("cas", [None, 2], known=False)
    assert run("register", unknown, unknown) == ["2", "2"]


def test_key_value() -> None:
    assert run("key_value", operation("get", result=""), operation("append", "a"), operation("append", "b")) == [
        '""', '"a"', '"ab"',
    ]  # fmt: skip
    assert run("key_value", operation("append", "a"), operation("put", "c"), operation("get", result="a")) == [
        '"a"', '"c"', "refused",
    ]  # fmt: skip


def test_object_versions_only_grow() -> None:
    assert run("object", operation("set", 5, 3), operation("get", result=[5, 3])) == ["5 (version 3)", "5 (version 3)"]
    assert run("object", operation("set", 5, 3), operation("set", 6, 3)) == ["5 (version 3)", "refused"]
    assert run("object", operation("set", 5, 3), operation("delete", None, 4), operation("get", result=[None, 0])) == [
        "5 (version 3)", "absent (after version 4)", "absent (after version 4)",
    ]  # fmt: skip
    assert run("object", operation("set", 5, 3), operation("delete", None, 4), operation("set", 6, 4))[-1] == "refused"


def test_a_read_teaches_the_version_of_an_unknown_write() -> None:
    unknown = operation("set", 6, known=False)
    seen = operation("get", result=[6, 9])
    assert run("object", unknown, operation("get", result=[6, None]), seen, seen) == [
        "6 (a version above 0)", "6 (a version above 0)", "6 (version 9)", "6 (version 9)",
    ]  # fmt: skip
    assert run("object", unknown, seen, operation("get", result=[6, 10]))[-1] == "refused"
    assert run("object", operation("set", 5, 9), unknown, seen)[-1] == "refused"


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ("register", operation("get")),
        ("register", operation("cas", 1, True)),
        ("register", operation("cas", [1, 2], None)),
        ("key_value", operation("append", 1)),
        ("key_value", operation("get", result=3)),
        ("object", operation("get", result=3)),
        ("object", operation("set", 1, "new")),
    ],
)
def test_an_operation_that_the_model_lacks(model: str, wrong: Operation) -> None:
    with pytest.raises(BadRequest, match="operation 0 of process c: .* expected"):
        MODELS[model].call(wrong)
    with pytest.raises(BadRequest, match="register, key_value, object"):
        model_named("queue")


def test_words() -> None:
    assert show_operation(operation("cas", [1, 2], True)) == "cas [1, 2] -> True"
    assert show_operation(operation("write", 1, known=False)) == "write 1 -> ?"
    assert show_operation(operation("read")) == "read -> nothing"
    shown = show_value("a" * 500 + "z")
    assert len(shown) == SHOWN_MAX
    assert shown.endswith('z"')

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import BadRequest, GoStoreError, TooLarge, WrongType
from gostore.core.keyvalue import Operation, Path
from gostore.core.values import MISSING, add_at, delete_at, pack, set_at, unpack
from gostore.services.db import values as values_module
from gostore.services.db.values import Room, Step, evaluate, read_packed

SIZE = 1 << 20
documents = st.dictionaries(st.sampled_from("abc"), st.integers(-99, 99) | st.none() | st.text(max_size=3), max_size=3)


def packed(value: Any) -> bytes:
    return pack(value, SIZE)


def one(before: bytes | None, operation: Operation, path: Path, operand: bytes, size: int = SIZE) -> bytes | None:
    return evaluate(before, [(operation, path, operand)], size, Room(size))


@given(st.none() | documents.map(packed), st.text(max_size=5))
def test_set_of_the_whole_object_replaces_it(before: bytes | None, value: str) -> None:
    assert one(before, "set", (), packed(value)) == packed(value)
    assert one(before, "delete", (), packed(None)) is None


@given(documents, st.sampled_from("abc"), st.integers(0, 9))
def test_places_are_evaluated_in_the_stored_object(document: dict[str, Any], name: str, value: int) -> None:
    after = one(packed(document), "set", (name,), packed(value))
    assert unpack(after) == {**document, name: value}
    after = one(packed(document), "delete", (name,), packed(None))
    assert unpack(after) == {key: document[key] for key in document if key != name}


def test_absent_objects() -> None:
    assert one(None, "delete", ("a",), packed(None)) is None
    assert unpack(one(None, "add", ("a", 1), packed(3)) or b"") == {"a": [None, 3]}
    assert unpack(one(packed(4), "add", (), packed(3)) or b"") == 7
    assert read_packed(None, ("a",)) == (None, False)
    assert read_packed(packed({"a": None}), ("a",)) == (None, True)
    assert read_packed(packed({"a": None}), ("b",)) == (None, False)


def test_an_object_cannot_outgrow_its_limit_by_parts() -> None:
    before = packed({"a": "x" * 60})
    with pytest.raises(TooLarge):
        one(before, "set", ("b",), packed("y" * 60), 100)
    with pytest.raises(TooLarge):
        one(None, "set", (), packed("y" * 200), 100)


def test_wrong_type() -> None:
    with pytest.raises(WrongType):
        one(packed([1]), "set", ("a",), packed(1))
    with pytest.raises(WrongType):
        read_packed(packed([1]), ("a",))


nested = st.recursive(
    st.none() | st.integers(-9, 9) | st.floats() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)
paths = st.lists(st.sampled_from(["a", "b", 0, 1, 3]), max_size=3).map(tuple)
numbers = st.integers(-9, 9) | st.sampled_from([1 << 63, float("inf"), float("-inf"), 0.5])
steps = st.lists(
    st.tuples(st.just("set"), paths, nested)
    | st.tuples(st.just("delete"), paths, st.none())
    | st.tuples(st.just("add"), paths, numbers),
    max_size=6,
)


def in_turn(before: bytes | None, writes: list[Step]) -> bytes | None:
    """Unpacked, checked and packed again for every single write."""
    for operation, path, operand in writes:
        root = MISSING if before is None else unpack(before)
        if operation == "delete":
            root = MISSING if not path or root is MISSING else delete_at(root, path)
        else:
            write = set_at if operation == "set" else add_at
            root = write(None if root is MISSING else root, path, unpack(operand))
        before = None if root is MISSING else packed(root)
    return before


@given(st.none() | documents, steps)
def test_many_writes_come_to_what_one_after_the_other_does(before: Any, writes: list[tuple[Any, Any, Any]]) -> None:
    """Also the refusals: whatever is wrong with a write is so even when a later one removes it."""
    start = None if before is None else packed(before)
    wire: list[Step] = []
    for operation, path, value in writes:
        try:
            wire.append((operation, path, packed(value)))
        except BadRequest:
            return  # not a number: it never gets so far
    given = list(wire)
    try:
        expected: Any = in_turn(start, wire)
    except GoStoreError as error:
        expected = error.code
    try:
        found: Any = evaluate(start, wire, SIZE, Room(SIZE))
    except GoStoreError as error:
        found = error.code
    assert found == expected
    assert wire == given


def test_an_object_is_unpacked_and_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    before = packed({"a": list(range(1000))})
    for name in ("unpack", "pack_checked"):
        called = getattr(values_module, name)
        counted = lambda value, *more, name=name, called=called: calls.append(name) or called(value, *more)  # noqa: E731
        monkeypatch.setattr(values_module, name, counted)
    after = evaluate(before, [("add", ("a", place), packed(1)) for place in range(100)], SIZE, Room(SIZE))
    assert unpack(after or b"") == {"a": [*range(1, 101), *range(100, 1000)]}
    assert calls.count("unpack") == 101  # the object, and what is added each time
    assert calls.count("pack_checked") == 1


def test_the_size_is_that_at_the_end() -> None:
    big = packed("x" * 60)
    writes: list[Step] = [("set", ("a",), big), ("set", ("b",), big), ("delete", ("a",), packed(None))]
    assert evaluate(None, writes, 100, Room(100)) == packed({"b": "x" * 60})
    with pytest.raises(TooLarge, match="at most 100"):
        evaluate(None, writes[:2], 100, Room(100))


def test_nothing_is_created_that_cannot_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "set_at", lambda *_: pytest.fail("it was created"))
    with pytest.raises(TooLarge, match="more than 4194240 bytes packed; at most 1048576"):
        one(None, "set", (65535,) * 64, packed(1))
    monkeypatch.undo()
    assert len(one(None, "set", (65535,) * 15 + (0,), packed(1)) or b"") > 15 * 65535
    with pytest.raises(WrongType):
        one(packed({"a": 1}), "set", ("a", *(65535,) * 20), packed(1))


def test_what_one_transaction_changes_inside_objects_is_bounded() -> None:
    filled = ("a", *(65535,) * 15)
    writes: list[Step] = [("add", filled, packed(1)), ("delete", ("a",), packed(None))]
    assert evaluate(None, writes * 10, SIZE, Room(SIZE)) == packed({})
    with pytest.raises(TooLarge, match="make several of it"):
        evaluate(None, writes * 20, SIZE, Room(SIZE))
    room, document = Room(SIZE), packed(["x" * 1_000_000])
    for _ in range(16):
        evaluate(document, [("set", (0,), packed(1))], SIZE, room)
    with pytest.raises(TooLarge, match="make several of it"):
        evaluate(document, [("set", (0,), packed(1))], SIZE, room)


def test_a_nesting_that_is_too_deep_is_refused_where_it_is_made() -> None:
    for depth, operation in ((64, "set"), (64, "add"), (65, "delete")):
        with pytest.raises(BadRequest):
            one(packed({}), operation, ("a",) * depth, packed(1))  # type: ignore[arg-type]
    assert one(packed({}), "set", ("a",) * 63, packed("x")) is not None
    with pytest.raises(BadRequest, match="nested"):
        one(packed({}), "set", ("a",) * 63, packed(["x"]))

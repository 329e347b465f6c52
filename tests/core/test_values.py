from __future__ import annotations

import copy
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import BadRequest, TooLarge, WrongType
from gostore.core.keyvalue import Path, prefix_end
from gostore.core.values import (
    ARRAY_INDEX_MAX,
    DEPTH_MAX,
    MISSING,
    add_at,
    check_path,
    check_text,
    delete_at,
    get_at,
    pack,
    padding,
    set_at,
    unpack,
)

names = st.sampled_from(["a", "b", "c"])
paths = st.lists(names | st.integers(0, 3), max_size=4).map(tuple)
leaves = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    leaves | st.binary(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3)
)


@given(values)
def test_packing_keeps_the_value(value: Any) -> None:
    assert unpack(pack(value, 1 << 20)) == value


@given(values, paths, values)
def test_what_was_set_is_read(root: Any, path: Path, value: Any) -> None:
    try:
        after = set_at(copy.deepcopy(root), path, value)
    except WrongType:
        with pytest.raises(WrongType):
            # Something of the wrong kind stands on the way: reading stumbles over it as well.
            get_at(root, path)
        return
    found = get_at(after, path)
    assert found == value
    assert type(found) is type(value)


@given(values, paths, paths, values)
def test_setting_touches_nothing_beside_the_path(root: Any, path: Path, other: Path, value: Any) -> None:
    """Where the paths part, what was there stays; a gap is filled with null."""
    if path[: len(other)] == other or other[: len(path)] == path:
        return
    try:
        before = get_at(root, other)
        after = get_at(set_at(copy.deepcopy(root), path, value), other)
    except WrongType:
        return
    assert after == before or (before is MISSING and after is None)


@given(values, paths)
def test_what_was_deleted_is_gone(root: Any, path: Path) -> None:
    try:
        before = get_at(root, path)
        after = delete_at(copy.deepcopy(root), path)
    except WrongType:
        return
    if not path:
        assert after is None
    elif before is MISSING:
        assert after == root
    elif isinstance(path[-1], str):
        assert get_at(after, path) is MISSING
    else:
        kept = list(get_at(root, path[:-1]))
        del kept[path[-1]]
        assert get_at(after, path[:-1]) == kept


@given(st.integers(-(1 << 62), 1 << 62), st.integers(-(1 << 62), 1 << 62), paths)
def test_add_is_arithmetic(first: int, second: int, path: Path) -> None:
    root = add_at(add_at(None, path, first), path, second)
    assert get_at(root, path) == first + second


def test_a_number_makes_an_array_and_a_name_a_map() -> None:
    assert set_at(None, ("users", 2, "name"), "Ann") == {"users": [None, None, {"name": "Ann"}]}


@pytest.mark.parametrize(
    ("root", "path", "said"),
    [
        ([1], ("a",), "accessor 'a' needs a map, but the root is an array"),
        ({"a": {}}, ("a", 0), "accessor 0 needs an array, but .a is a map"),
        ({"a": [7]}, ("a", 0, "b"), "accessor 'b' needs a map, but .a[0] is an integer"),
        (True, (0,), "the root is a boolean"),
    ],
)
def test_wrong_type_says_what_was_met(root: Any, path: Path, said: str) -> None:
    for attempt in (
        lambda: get_at(root, path),
        lambda: set_at(copy.deepcopy(root), path, 1),
        lambda: delete_at(copy.deepcopy(root), path),
        lambda: add_at(copy.deepcopy(root), path, 1),
    ):
        with pytest.raises(WrongType) as caught:
            attempt()
        assert said in caught.value.message


def test_add_refuses_what_is_no_number() -> None:
    with pytest.raises(WrongType, match="add needs a number, but .a is a string"):
        add_at({"a": "x"}, ("a",), 1)
    with pytest.raises(WrongType, match="not a boolean"):
        add_at(None, (), True)
    with pytest.raises(BadRequest, match="64 bits"):
        add_at((1 << 64) - 1, (), 1)
    with pytest.raises(BadRequest, match="not a number"):
        add_at(float("inf"), (), float("-inf"))


@given(values, paths.filter(bool))
def test_padding_is_what_is_filled_with_null(root: Any, path: Path) -> None:
    def nulls(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (value is None) + sum(map(nulls, inner))

    expected = padding(root, path)
    try:
        replaced = get_at(root, path)
        after = set_at(copy.deepcopy(root), path, 1)
    except WrongType:
        return
    if replaced is MISSING:
        on_the_way = any(get_at(root, path[:depth]) is None for depth in range(len(path)))
        assert nulls(after) - nulls(root) == expected - on_the_way
    else:
        assert expected == 0


def test_values_are_bounded() -> None:
    deep: Any = None
    for _ in range(DEPTH_MAX):
        deep = [deep]
    with pytest.raises(BadRequest, match="deep"):
        pack(deep, 1 << 20)
    assert unpack(pack(deep[0], 1 << 20)) == deep[0]
    with pytest.raises(TooLarge, match="at most 10"):
        pack("x" * 100, 10)
    for value in ({1: 2}, object(), 1 << 64, float("nan"), "\ud800", {"a": {1}}):
        with pytest.raises(BadRequest):
            pack(value, 1 << 20)


def test_paths_are_bounded() -> None:
    check_path(("a", ARRAY_INDEX_MAX))
    for path in ((-1,), (ARRAY_INDEX_MAX + 1,), ("a",) * (DEPTH_MAX + 1)):
        with pytest.raises(BadRequest):
            check_path(path)


def test_keys_are_text() -> None:
    check_text("key", "ä" * 8, 16)
    with pytest.raises(TooLarge, match="17 bytes"):
        check_text("key", "ä" * 8 + "x", 16)
    with pytest.raises(BadRequest):
        check_text("key", "", 16)
    with pytest.raises(BadRequest, match="UTF-8"):
        check_text("key", "\udcff", 16)


@given(st.text(min_size=1), st.text())
def test_prefix_end_bounds_the_prefix(prefix: str, other: str) -> None:
    end = prefix_end(prefix)
    assert end is None or prefix + other < end
    if other >= prefix and not other.startswith(prefix):
        assert end is None or other >= end


def test_packed_values_are_plain_msgpack() -> None:
    assert msgpack.unpackb(pack({"a": [1, b"x"]}, 100)) == {"a": [1, b"x"]}

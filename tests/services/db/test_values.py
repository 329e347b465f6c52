from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import TooLarge, WrongType
from gostore.core.values import pack, unpack
from gostore.services.db.values import evaluate, read_packed

SIZE = 1 << 20
documents = st.dictionaries(st.sampled_from("abc"), st.integers(-99, 99) | st.none() | st.text(max_size=3), max_size=3)


def packed(value: Any) -> bytes:
    return pack(value, SIZE)


@given(st.none() | documents.map(packed), st.text(max_size=5))
def test_set_of_the_whole_object_replaces_it(before: bytes | None, value: str) -> None:
    assert evaluate(before, "set", (), packed(value), SIZE) == packed(value)
    assert evaluate(before, "delete", (), packed(None), SIZE) is None


@given(documents, st.sampled_from("abc"), st.integers(0, 9))
def test_places_are_evaluated_in_the_stored_object(document: dict[str, Any], name: str, value: int) -> None:
    after = evaluate(packed(document), "set", (name,), packed(value), SIZE)
    assert unpack(after) == {**document, name: value}
    after = evaluate(packed(document), "delete", (name,), packed(None), SIZE)
    assert unpack(after) == {key: document[key] for key in document if key != name}


def test_absent_objects() -> None:
    assert evaluate(None, "delete", ("a",), packed(None), SIZE) is None
    assert unpack(evaluate(None, "add", ("a", 1), packed(3), SIZE) or b"") == {"a": [None, 3]}
    assert unpack(evaluate(packed(4), "add", (), packed(3), SIZE) or b"") == 7
    assert read_packed(None, ("a",)) == (None, False)
    assert read_packed(packed({"a": None}), ("a",)) == (None, True)
    assert read_packed(packed({"a": None}), ("b",)) == (None, False)


def test_an_object_cannot_outgrow_its_limit_by_parts() -> None:
    before = packed({"a": "x" * 60})
    with pytest.raises(TooLarge):
        evaluate(before, "set", ("b",), packed("y" * 60), 100)
    with pytest.raises(TooLarge):
        evaluate(None, "set", (), packed("y" * 200), 100)


def test_wrong_type() -> None:
    with pytest.raises(WrongType):
        evaluate(packed([1]), "set", ("a",), packed(1), SIZE)
    with pytest.raises(WrongType):
        read_packed(packed([1]), ("a",))

"""``Transaction``: what its owner gives it is looked at before anything is copied or kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from gostore.core.errors import BadRequest
from gostore.core.keyvalue import Page, Versioned
from gostore.core.transaction import Transaction


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


class Nothing:
    """A store in which nothing is."""

    async def get(self, container: str, key: str, **_: Any) -> Versioned:
        return Versioned(None, 0, False, 0, 1)

    async def scan(self, container: str, prefix: str, **_: Any) -> Page:
        return Page((), None, (), {0: 1})


def begin() -> Transaction:
    return Transaction(Nothing())  # type: ignore[arg-type]


cycle: list[Any] = []
cycle.append(cycle)

WRITES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: t.set("c", "k", nested(2000)), "nested more than 64"),
    (lambda t: t.set("c", "k", cycle), "nested more than 64"),
    (lambda t: t.set("c", "k", (n for n in ())), "a generator cannot be stored"),
    (lambda t: t.set("c", "k", {"f": print}), "cannot be stored"),
    (lambda t: t.set("c", "k", {1: 2}), "keys of a map are strings"),
    (lambda t: t.set("c", "k", 1 << 70), "integer"),
    (lambda t: t.add("c", "k", 1 << 70), "integer"),
    (lambda t: t.add("c", "k", nested(2000)), "nested more than 64"),
    (lambda t: t.set("c", [], 1), "key: expected a string, not an array"),
    (lambda t: t.set("c", nested(2000), 1), "key: expected a string, not an array"),
    (lambda t: t.set(None, "k", 1), "container: expected a string, not null"),
    (lambda t: t.delete("c", {}), "key: expected a string, not a map"),
    (lambda t: t.add("c", 5, 1), "key: expected a string, not an integer"),
    (lambda t: t.set("c", "k", 1, (1.5,)), "path: an accessor is a name or a number, not a float"),
    (lambda t: t.set("c", "k", 1, (True,)), "path: an accessor .* not a boolean"),
    (lambda t: t.set("c", "k", 1, None), "path: expected a list or tuple"),
    (lambda t: t.delete("c", "k", "name"), "path: expected a list or tuple .* not a string"),
    (lambda t: t.set("c", "k", 1, (-1,)), "array positions"),
]

READS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: t.get("c", []), "key: expected a string, not an array"),
    (lambda t: t.get({}, "k"), "container: expected a string, not a map"),
    (lambda t: t.get("c", "k", 5), "path: expected a list or tuple"),
    (lambda t: t.get("c", "k", (None,)), "path: an accessor is a name or a number, not null"),
    (lambda t: t.exists("c", {}), "key: expected a string"),
    (lambda t: t.scan(7), "container: expected a string"),
    (lambda t: t.scan("c", 5), "prefix: expected a string, not an integer"),
    (lambda t: t.scan("c", start=b"a"), "start: expected a string, not bytes"),
    (lambda t: t.scan("c", end=5), "end: expected a string"),
    (lambda t: t.scan("c", limit="5"), "limit: expected an integer, not a string"),
]


@pytest.mark.parametrize(("write", "says"), WRITES)
def test_a_write_that_cannot_be_is_refused_and_not_kept(write: Callable[[Any], Any], says: str) -> None:
    transaction = begin()
    with pytest.raises(BadRequest, match=says):
        write(transaction)
    assert transaction.writes == ()


@pytest.mark.parametrize(("read", "says"), READS)
def test_a_read_that_cannot_be_is_refused(read: Callable[[Any], Any], says: str) -> None:
    async def run() -> None:
        transaction = begin()
        with pytest.raises(BadRequest, match=says):
            await read(transaction)
        assert transaction.reads == ()

    asyncio.run(run())


def test_what_was_written_is_a_copy_and_read_as_it_will_be_stored() -> None:
    async def run() -> None:
        transaction = begin()
        given = {"list": [1], "pair": (1, (2,)), "bytes": [bytearray(b"a"), memoryview(b"b")], "none": None}
        transaction.set("c", "k", given)
        given["list"] = "changed"
        given["pair"] = None  # type: ignore[assignment]
        stored = {"list": [1], "pair": [1, [2]], "bytes": [b"a", b"b"], "none": None}
        found = await transaction.get("c", "k")
        assert found == stored
        found["list"].append("mine")
        assert await transaction.get("c", "k", ("list",)) == [1]
        transaction.set("c", "k", 3, ("pair", 1, 0))
        assert await transaction.get("c", "k", ["pair"]) == [1, [3]]
        assert [entry.value for entry in await transaction.scan("c", limit=5)] == [{**stored, "pair": [1, [3]]}]

    asyncio.run(run())

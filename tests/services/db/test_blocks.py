from __future__ import annotations

from typing import Any

import pytest

from gostore.core.blocks import BLOCK_STEPS_MAX, Block, run_block, var
from gostore.core.errors import BadRequest, WrongType
from gostore.core.transaction import Transaction


def run(store: Any, interleave: Any, steps: list[Any]) -> Any:
    async def main() -> Any:
        transaction = Transaction(store)
        results = await run_block(transaction, steps)
        await transaction.commit()
        return results

    return interleave([main()], lambda n: 0)[0]


def test_variables_and_several_results(machine_store: Any, interleave: Any) -> None:
    store = machine_store(2)
    block = (
        Block()
        .let("bonus", {"amount": [5, 10]})
        .set("t", "ann", {"balance": 1})
        .get("before", "t", "ann", ("balance",))
        .add("t", "ann", var("bonus", "amount", 1), ("balance",))
        .get("after", "t", "ann")
        .let("copy", var("after"))
        .set("t", "bob", var("after", "balance"))
        .delete("t", "cid")
        .get("nobody", "t", "cid")
        .result("before", "copy", "nobody")
    )
    assert run(store, interleave, block.to_wire()) == [1, {"balance": 11}, None]
    again = Block().let("who", "bob").get("x", "t", var("who")).delete("t", var("who")).result("x")
    assert run(store, interleave, again.to_wire()) == [11]
    assert run(store, interleave, Block().get("x", "t", "bob").result("x").to_wire()) == [None]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([["jump", 1]], "operation 0 of the block"),
        (
            [["let", "a", ["value", 1]], ["let", "b", ["var", "c", []]]],
            "operation 1 .*'c' was not set before; set are a",
        ),
        ([["get", "a", "t", ["value", 7], []]], "a key is a string"),
        ([["let", "a", 7]], "neither"),
        ([["set", "t", ["value", "k"], [[]], ["value", 1]]], "path"),
        ([["return", []]] * (BLOCK_STEPS_MAX + 1), "at most"),
    ],
)
def test_a_wrong_block_says_where(machine_store: Any, interleave: Any, steps: list[Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        run(machine_store(1), interleave, steps)


def test_a_block_that_fails_changes_nothing(machine_store: Any, interleave: Any) -> None:
    store = machine_store(1)
    with pytest.raises(WrongType):
        run(store, interleave, Block().set("t", "a", 1).add("t", "a", 1, ("x",)).to_wire())
    assert run(store, interleave, Block().get("a", "t", "a").result("a").to_wire()) == [None]

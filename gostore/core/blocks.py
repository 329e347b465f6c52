"""The original's transaction blocks: a list of operations with variables, executed at a node as one transaction.

    block = Block()
    block.let("bonus", 10)
    block.get("before", "accounts", "alice", ("balance",))
    block.add("accounts", "alice", var("bonus"), ("balance",))
    block.get("after", "accounts", "alice", ("balance",))
    block.result("before", "after")

A block travels in one message, so a transaction costs one round trip; the node runs it again on a conflict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from gostore.core.errors import BadRequest
from gostore.core.keyvalue import Value, path_from_wire
from gostore.core.transaction import Transaction
from gostore.core.values import MISSING, check_path, get_at

BLOCK_STEPS_MAX = 1024
"""Operations of one block. A longer one would keep a node busy for one client."""


@dataclass(frozen=True, slots=True)
class Variable:
    """Stands for the value of a variable, or for a place in it."""

    name: str
    path: tuple[str | int, ...] = ()


def var(name: str, *path: str | int) -> Variable:
    """``var("a", "x", 0)`` is what is at ``.x[0]`` of the variable ``a``."""
    return Variable(name, path)


class Block:
    """Operations in the order in which they were added. Every method returns the block."""

    def __init__(self) -> None:
        self._steps: list[list[Any]] = []

    def let(self, variable: str, value: Value | Variable) -> Self:
        """Set a variable."""
        return self._add("let", variable, _operand(value))

    def get(self, variable: str, container: str, key: str | Variable, path: Sequence[str | int] = ()) -> Self:
        """Set a variable to an object, or a place in one; null when nothing is there."""
        return self._add("get", variable, container, _operand(key), list(path))

    def set(self, container: str, key: str | Variable, value: Value | Variable, path: Sequence[str | int] = ()) -> Self:
        return self._add("set", container, _operand(key), list(path), _operand(value))

    def add(
        self, container: str, key: str | Variable, amount: Value | Variable, path: Sequence[str | int] = ()
    ) -> Self:
        return self._add("add", container, _operand(key), list(path), _operand(amount))

    def delete(self, container: str, key: str | Variable, path: Sequence[str | int] = ()) -> Self:
        return self._add("delete", container, _operand(key), list(path))

    def result(self, *variables: str) -> Self:
        """What the block returns: the values of these variables, in this order. The last ``result`` counts."""
        return self._add("return", list(variables))

    def _add(self, *step: Any) -> Self:
        self._steps.append(list(step))
        return self

    def to_wire(self) -> list[Any]:
        return [list(step) for step in self._steps]


def _operand(value: Value | Variable) -> list[Any]:
    return ["var", value.name, list(value.path)] if isinstance(value, Variable) else ["value", value]


async def run_block(transaction: Transaction, steps: Sequence[Any]) -> list[Value]:
    """Execute the steps of :meth:`Block.to_wire` in a transaction (which the caller commits); returns the results.

    Raises ``BadRequest`` that names the step, for one that cannot be read or uses a variable that was never set.
    """
    if len(steps) > BLOCK_STEPS_MAX:
        raise BadRequest(f"a block of {len(steps)} operations; at most {BLOCK_STEPS_MAX} are allowed")
    variables: dict[str, Value] = {}
    results: list[str] = []
    for number, step in enumerate(steps):
        try:
            results = await _run_step(transaction, step, variables, results)
        except BadRequest as error:
            raise BadRequest(f"operation {number} of the block: {error.message}") from None
    return [_value(["var", name, []], variables) for name in results]


async def _run_step(transaction: Transaction, step: Any, variables: dict[str, Value], results: list[str]) -> list[str]:
    match step:
        case ["let", str(name), operand]:
            variables[name] = _value(operand, variables)
        case ["get", str(name), str(container), key, path]:
            variables[name] = await transaction.get(container, _key(key, variables), path_from_wire(path))
        case ["set", str(container), key, path, operand]:
            transaction.set(container, _key(key, variables), _value(operand, variables), path_from_wire(path))
        case ["add", str(container), key, path, operand]:
            transaction.add(container, _key(key, variables), _value(operand, variables), path_from_wire(path))
        case ["delete", str(container), key, path]:
            transaction.delete(container, _key(key, variables), path_from_wire(path))
        case ["return", [*names]] if all(isinstance(name, str) for name in names):
            return list(names)
        case _:
            raise BadRequest(f"{step!r:.200} is none of let, get, set, add, delete, return with its arguments")
    return results


def _value(operand: Any, variables: dict[str, Value]) -> Value:
    match operand:
        case ["value", value]:
            return value
        case ["var", str(name), path]:
            if name not in variables:
                raise BadRequest(f"the variable {name!r} was not set before; set are {', '.join(sorted(variables))}")
            accessors = path_from_wire(path)
            check_path(accessors)
            value = get_at(variables[name], accessors)
            return None if value is MISSING else value
    raise BadRequest(f"{operand!r:.100} is neither ['value', value] nor ['var', name, path]")


def _key(operand: Any, variables: dict[str, Value]) -> str:
    key = _value(operand, variables)
    if not isinstance(key, str):
        raise BadRequest(f"a key is a string, not {key!r:.50}")
    return key

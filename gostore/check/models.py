"""Sequential specifications: what one object does when its operations come one after the other.

A model steps from state to state. States are hashable; values of histories become so by :func:`freeze`, which also
keeps apart what Python calls equal (1, 1.0 and True). A step is deterministic: an operation in a state has one next
state, or it could not have given the result that it gave there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

from gostore.check.history import Operation, Outcome
from gostore.core.errors import BadRequest

State = Any
"""Hashable, and compared by equality."""

Frozen = Any
"""What :func:`freeze` makes: hashable."""


class Refused:
    """The type of :data:`REFUSED`: in this state the operation cannot have given its result."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "REFUSED"


REFUSED: Final = Refused()


@dataclass(frozen=True, slots=True)
class Call:
    """An operation as a model sees it; ``known`` false: nobody knows its result. ``reads``: it changes no object.

    Operations with a ``rank`` above 0 can only follow each other in the order of their ranks, whatever is between them.
    """

    kind: str
    argument: Frozen
    result: Frozen
    known: bool
    reads: bool
    rank: int = 0


class Model(Protocol):
    """The behaviour of one object; one instance serves all keys."""

    name: str
    initial: State

    def call(self, operation: Operation) -> Call:
        """Translate; raises :class:`BadRequest`, with what was expected, for an operation that the object lacks."""
        ...

    def step(self, state: State, call: Call) -> State | Refused:
        """The state after ``call``; :data:`REFUSED` when its result cannot be had in ``state``.

        A call with ``reads`` may refine the state (what is *known* of the object), never change the object.
        """
        ...

    def show(self, state: State) -> str:
        """A state in words."""
        ...


def freeze(value: Any) -> Frozen:
    """A hashable stand-in, equal for equal JSON values only. Raises :class:`BadRequest` for other values."""
    if value is None or isinstance(value, str | bytes) or type(value) is int:
        return value
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, float):
        return ("float", repr(value))
    if isinstance(value, list | tuple):
        return ("array", *(freeze(item) for item in value))
    if isinstance(value, dict):
        return ("map", *sorted((str(name), freeze(item)) for name, item in value.items()))
    raise BadRequest(f"{value!r:.100} is a {type(value).__name__}; a history holds JSON values and bytes")


def thaw(frozen: Frozen) -> Any:
    """The value of which :func:`freeze` made this."""
    if not isinstance(frozen, tuple):
        return frozen
    kind, *rest = frozen
    if kind == "array":
        return [thaw(item) for item in rest]
    if kind == "map":
        return {name: thaw(item) for name, item in rest}
    return float(rest[0]) if kind == "float" else rest[0]


def _expected(operation: Operation, what: str) -> BadRequest:
    return BadRequest(
        f"operation {operation.id} of process {operation.process}: {operation.kind} "
        f"{operation.argument!r:.60} -> {operation.result!r:.60}; expected {what}"
    )


class _Base:
    """What the models share: arguments and results are frozen, results of open operations are unknown."""

    name = ""
    initial: State = None

    def call(self, operation: Operation) -> Call:
        known = operation.outcome is Outcome.OK
        reads = self._check(operation, known)
        result = freeze(operation.result) if known else None
        rank = self._rank(operation) if known else 0
        return Call(operation.kind, freeze(operation.argument), result, known, reads, rank)

    def _check(self, operation: Operation, known: bool) -> bool:
        """Whether it only reads."""
        raise NotImplementedError

    def _rank(self, operation: Operation) -> int:
        return 0

    def show(self, state: State) -> str:
        return show_value(thaw(state))


class Register(_Base):
    """A register that begins as null: ``read`` -> value, ``write`` value, ``cas`` [expected, new] -> true or false."""

    name = "register"

    def _check(self, operation: Operation, known: bool) -> bool:
        match operation.kind, operation.argument, operation.result:
            case "read", _, _:
                return True
            case "write", _, _:
                return False
            case "cas", [_, _], True | False:
                return known and operation.result is False
            case "cas", [_, _], _ if not known:
                return False
        raise _expected(operation, "read, write VALUE, or cas [EXPECTED, NEW] with the result true or false")

    def step(self, state: State, call: Call) -> State | Refused:
        if call.kind == "read":
            return state if not call.known or call.result == state else REFUSED
        if call.kind == "write":
            return call.argument
        _, expected, new = call.argument
        if not call.known:
            return new if state == expected else state
        if call.reads:
            return REFUSED if state == expected else state
        return new if state == expected else REFUSED


class KeyValueText(_Base):
    """A key that begins as the empty string: ``get`` -> text, ``put`` text, ``append`` text."""

    name = "key_value"
    initial: State = ""

    def _check(self, operation: Operation, known: bool) -> bool:
        match operation.kind, operation.argument, operation.result:
            case "get", _, str():
                return True
            case "get", _, _ if not known:
                return True
            case (("put" | "append"), str(), _):
                return False
        raise _expected(operation, "get -> TEXT, put TEXT or append TEXT")

    def step(self, state: State, call: Call) -> State | Refused:
        if call.kind == "get":
            return state if not call.known or call.result == state else REFUSED
        if call.kind == "put":
            return call.argument
        return state + call.argument


UNKNOWN_VERSION: Final = -1


class StoredObject(_Base):
    """An object of db, absent at first: ``set`` value -> version, ``delete`` -> version, ``get`` -> [value, version].

    Versions only grow; 0 means absent. Where a client did not learn a version, null stands for it. The state is
    (value, version, greatest version that is known so far), so a read may teach what an unknown write was given.
    """

    name = "object"
    initial: State = (None, 0, 0)

    def _check(self, operation: Operation, known: bool) -> bool:
        match operation.kind, operation.result:
            case "get", [_, int() | None]:
                return True
            case "get", _ if not known:
                return True
            case (("set" | "delete"), int() | None):
                return False
        raise _expected(operation, "get -> [VALUE, VERSION], set VALUE -> VERSION or delete -> VERSION")

    def _rank(self, operation: Operation) -> int:
        """A version is written, then read, then replaced by a greater one."""
        if operation.kind == "get":
            version = operation.result[1]
            return 2 * version + 1 if version else 0
        return 2 * (operation.result or 0)

    def step(self, state: State, call: Call) -> State | Refused:
        value, version, floor = state
        if call.kind != "get":
            written = call.result or 0
            if written and written <= floor:
                return REFUSED
            floor = max(floor, written)
            return (None, 0, floor) if call.kind == "delete" else (call.argument, written or UNKNOWN_VERSION, floor)
        if not call.known:
            return state
        _, seen, seen_version = call.result
        if seen != value:
            return REFUSED
        if seen_version is None or seen_version == version:
            return state
        learns = version == UNKNOWN_VERSION and seen_version > floor
        return (value, seen_version, seen_version) if learns else REFUSED

    def show(self, state: State) -> str:
        value, version, floor = state
        if version == 0:
            return f"absent (after version {floor})" if floor else "absent"
        number = f"a version above {floor}" if version == UNKNOWN_VERSION else f"version {version}"
        return f"{show_value(thaw(value))} ({number})"


MODELS: Final[dict[str, Model]] = {model.name: model for model in (Register(), KeyValueText(), StoredObject())}


def model_named(name: str) -> Model:
    """Raises :class:`BadRequest` that lists the names."""
    if name not in MODELS:
        raise BadRequest(f"there is no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


SHOWN_MAX: Final = 60
"""Characters of a value in a text; of a longer one both ends are shown."""


def show_value(value: Any) -> str:
    if value is None:
        return "nothing"
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    half = SHOWN_MAX // 2
    return text if len(text) <= SHOWN_MAX else f"{text[: half - 1]}…{text[-half:]}"


def show_operation(operation: Operation) -> str:
    """An operation in words: ``cas [1, 2] -> True``; unknown results are shown as ``?``."""
    words = [operation.kind]
    if operation.argument is not None:
        words.append(show_value(operation.argument))
    if operation.outcome is not Outcome.OK:
        words.append("-> ?")
    elif operation.result is not None or operation.kind in ("read", "get"):
        words.append(f"-> {show_value(operation.result)}")
    return " ".join(words)

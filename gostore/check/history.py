"""Histories: what clients asked of a system and what they were told, in the order in which it happened.

An operation is invoked and, perhaps, returns. Its outcome is

* ``ok``: it happened and gave ``result``. A definite answer "no" (a compare-and-set that found another value) is a
  result, too;
* ``fail``: it surely did not happen, and the client learnt nothing from it;
* ``info``: nobody knows. It may take effect at any time after its invocation, even after the end of the history, or
  never; so it stays open for ever. An operation that never returned is ``info``.

The order of invocations and returns is that of the calls to :class:`History`: record everything that clients of one run
do in one history. Times are notes for the reader; no verdict depends on them.

File format, version 1: JSON lines. The first is a header, each further line an invocation or a return::

    {"gostore_history": 1, "model": "register"}
    {"type": "invoke", "id": 0, "process": "c1", "kind": "write", "key": "x", "argument": 3, "time_s": 0.25}
    {"type": "ok", "id": 0, "result": null, "time_s": 0.31}

``type`` is ``invoke``, ``ok``, ``fail`` or ``info``; ``id`` counts the invocations from 0; ``key``, ``argument``,
``result``, ``error`` and ``time_s`` may be left out (null). ``model`` names what the operations mean:
:data:`gostore.check.models.MODELS`, or ``transactions`` (:mod:`gostore.check.transactions`).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from gostore.core.errors import BadRequest, GoStoreError

T = TypeVar("T")

FORMAT: Final = 1
OPERATIONS_MAX: Final = 1_000_000
"""Operations in one history. Each takes about half a kilobyte of memory."""


class Outcome(StrEnum):
    OK = "ok"
    FAIL = "fail"
    INFO = "info"


@dataclass(slots=True)
class Operation:
    """One operation. ``invoked`` and ``returned`` are positions in the order of all invocations and returns."""

    id: int
    process: int | str
    kind: str
    key: Any
    argument: Any
    invoked: int
    invoked_s: float | None = None
    outcome: Outcome = Outcome.INFO
    result: Any = None
    error: str = ""
    returned: int | None = None
    returned_s: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the client has been told anything, if only that nobody knows."""
        return self.returned is not None


class History:
    """Records operations. ``model``: what they mean. ``now``: the clock for the times, e.g. the loop's ``time``.

    Not for several threads at once: the order of the calls is the order of the history.
    """

    def __init__(self, model: str, *, now: Callable[[], float] | None = None) -> None:
        self.model = model
        self.operations: list[Operation] = []
        self._now = now
        self._position = 0

    def __len__(self) -> int:
        return len(self.operations)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __repr__(self) -> str:
        return f"History({self.model!r}, {len(self)} operations)"

    def invoke(
        self, process: int | str, kind: str, key: Any = None, argument: Any = None, *, time_s: float | None = None
    ) -> Operation:
        """An operation begins. Raises :class:`BadRequest` when the history is full."""
        if len(self.operations) >= OPERATIONS_MAX:
            raise BadRequest(f"a history holds at most {OPERATIONS_MAX:,} operations; begin another one")
        operation = Operation(len(self), process, kind, key, argument, self._position, self._time_s(time_s))
        self._position += 1
        self.operations.append(operation)
        return operation

    def ok(self, operation: Operation, result: Any = None, *, time_s: float | None = None) -> None:
        """It happened, with this result. Raises :class:`BadRequest` when it has returned before (so do the others)."""
        self._finish(operation, Outcome.OK, result, "", time_s)

    def fail(self, operation: Operation, error: str = "", *, result: Any = None, time_s: float | None = None) -> None:
        """It surely did not happen. ``result``: what a transaction had read and would have written."""
        self._finish(operation, Outcome.FAIL, result, error, time_s)

    def info(self, operation: Operation, error: str = "", *, result: Any = None, time_s: float | None = None) -> None:
        """Nobody knows whether it happened, or will. ``result``: what a transaction had read and wanted to write."""
        self._finish(operation, Outcome.INFO, result, error, time_s)

    def raised(self, operation: Operation, error: BaseException) -> None:
        """It raised: ``fail`` for a definite error of ours, ``info`` for everything else (also a cancellation)."""
        definite = isinstance(error, GoStoreError) and error.definite
        self._finish(operation, Outcome.FAIL if definite else Outcome.INFO, None, f"{error!r:.200}", None)

    async def record(self, process: int | str, kind: str, key: Any, argument: Any, call: Awaitable[T]) -> T:
        """Await ``call`` as an operation; returns or raises what it does."""
        operation = self.invoke(process, kind, key, argument)
        try:
            result = await call
        except BaseException as error:
            self.raised(operation, error)
            raise
        self.ok(operation, result)
        return result

    def _finish(self, operation: Operation, outcome: Outcome, result: Any, error: str, time_s: float | None) -> None:
        if operation.finished:
            raise BadRequest(f"operation {operation.id} of process {operation.process} has returned before")
        operation.outcome, operation.result, operation.error = outcome, result, error
        operation.returned, operation.returned_s = self._position, self._time_s(time_s)
        self._position += 1

    def _time_s(self, given: float | None) -> float | None:
        return given if given is not None or self._now is None else self._now()

    def dump(self) -> Iterator[str]:
        """The lines of a file, each with its line end. Raises :class:`BadRequest` for a value that is not JSON."""
        yield _line({"gostore_history": FORMAT, "model": self.model})
        moments: list[tuple[int, Operation, bool]] = [(o.invoked, o, True) for o in self]
        moments += [(o.returned, o, False) for o in self if o.returned is not None]
        for _, o, begins in sorted(moments, key=lambda moment: moment[0]):
            if begins:
                line = {"type": "invoke", "id": o.id, "process": o.process, "kind": o.kind, "key": o.key}
                line |= {"argument": o.argument, "time_s": o.invoked_s}
            else:
                line = {"type": o.outcome.value, "id": o.id, "result": o.result, "time_s": o.returned_s}
                line |= {"error": o.error} if o.error else {}
            yield _line(line)

    @classmethod
    def load(cls, lines: Iterable[str], name: str = "history") -> History:
        """The history that :meth:`dump` wrote. Raises :class:`BadRequest` with name, line and what was expected."""
        numbered = enumerate(lines, 1)
        _, first = next(numbered, (1, ""))
        match _parse(first):
            case {"gostore_history": 1, "model": str(model)}:
                history = cls(model)
            case {"gostore_history": int(other)} if other != FORMAT:
                raise broken(name, 1, f"a history of format {FORMAT}; this one has format {other}", first)
            case _:
                raise broken(name, 1, '{"gostore_history": 1, "model": NAME}', first)
        for number, line in numbered:
            try:
                history._take(_parse(line))
            except BadRequest as error:
                raise broken(name, number, error.message, line) from None
        return history

    def _take(self, line: Any) -> None:
        """Raises :class:`BadRequest` that says what was expected."""
        match line:
            case {"type": "invoke", "id": int(number), "process": int() | str() as process, "kind": str(kind)}:
                if number != len(self):
                    raise BadRequest(f"the invocation with id {len(self)}, as they count from 0")
                self.invoke(process, kind, line.get("key"), line.get("argument"), time_s=_number(line.get("time_s")))
            case {"type": ("ok" | "fail" | "info") as outcome, "id": int(number)}:
                if not 0 <= number < len(self) or self.operations[number].finished:
                    raise BadRequest("the return of an operation that was invoked above and has not returned")
                error, time_s = str(line.get("error") or ""), _number(line.get("time_s"))
                self._finish(self.operations[number], Outcome(outcome), line.get("result"), error, time_s)
            case _:
                raise BadRequest('{"type": "invoke", "id", "process", "kind"} or {"type": "ok|fail|info", "id"}')


def broken(name: str, line: int, expected: str, found: str) -> BadRequest:
    """The error for a line that cannot be read."""
    return BadRequest(f"{name}:{line}: expected {expected}; found {found.strip()[:120]!r}", file=name, line=line)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise BadRequest("a number of seconds as time_s")


def _line(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise BadRequest(f"a history holds JSON values only, not {value!r:.200} ({error})") from None

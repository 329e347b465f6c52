"""Recording, writing and reading histories."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gostore.check import History, Outcome
from gostore.core.errors import BadRequest, Conflict, Timeout

HEADER = '{"gostore_history": 1, "model": "register"}'
INVOKE = '{"type": "invoke", "id": 0, "process": "c1", "kind": "read"}'


def test_order_is_that_of_the_calls() -> None:
    times = iter([0.5, 0.75, 1.0])
    history = History("register", now=lambda: next(times))
    first = history.invoke("c1", "write", "x", 1)
    second = history.invoke("c2", "read", "x")
    history.ok(first)
    assert (first.invoked, second.invoked, first.returned) == (0, 1, 2)
    assert (first.invoked_s, first.returned_s, second.returned_s) == (0.5, 1.0, None)
    assert second.outcome is Outcome.INFO, "what never returned is unknown"
    assert not second.finished
    with pytest.raises(BadRequest, match="returned before"):
        history.info(first)


def test_record_tells_definite_errors_from_others() -> None:
    history = History("register")

    async def answers() -> int:
        return 7

    async def raises(error: BaseException) -> int:
        raise error

    async def main() -> None:
        assert await history.record("c", "read", "x", None, answers()) == 7
        for error in (Conflict("no"), Timeout("perhaps"), RuntimeError("a bug"), asyncio.CancelledError()):
            with pytest.raises(type(error)):
                await history.record("c", "write", "x", 1, raises(error))

    asyncio.run(main())
    assert [o.outcome.value for o in history] == ["ok", "fail", "info", "info", "info"]
    assert history.operations[0].result == 7
    assert "perhaps" in history.operations[2].error


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def histories(draw: st.DrawFn) -> History:
    history = History(draw(st.sampled_from(["register", "object"])))
    running: list[Any] = []
    for _ in range(draw(st.integers(0, 12))):
        if running and draw(st.booleans()):
            operation = running.pop(draw(st.integers(0, len(running) - 1)))
            end = draw(st.sampled_from([history.ok, history.fail, history.info]))
            time_s = draw(st.none() | st.floats(0, 9))
            if end == history.ok:
                history.ok(operation, draw(json_values), time_s=time_s)
            else:
                end(operation, draw(st.text(max_size=5)), result=draw(json_values), time_s=time_s)
        else:
            process = draw(st.integers(0, 5) | st.text(max_size=3))
            running.append(history.invoke(process, "set", draw(json_values), draw(json_values)))
    return history


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_what_is_written_is_read_again(history: History) -> None:
    again = History.load(history.dump())
    assert again.model == history.model
    assert again.operations == history.operations


@pytest.mark.parametrize(
    ("lines", "number", "expected"),
    [
        ([], 1, "gostore_history"),
        (["nonsense"], 1, "gostore_history"),
        (['{"gostore_history": 2, "model": "register"}'], 1, "this one has format 2"),
        ([HEADER, "{"], 2, '"type"'),
        ([HEADER, ""], 2, '"type"'),
        ([HEADER, INVOKE.replace("0", "1")], 2, "id 0"),
        ([HEADER, '{"type": "ok", "id": 0}'], 2, "invoked above"),
        ([HEADER, '{"type": "ok", "id": -1}'], 2, "invoked above"),
        ([HEADER, INVOKE, '{"type": "ok", "id": 0}', '{"type": "info", "id": 0}'], 4, "has not returned"),
        ([HEADER, INVOKE, '{"type": "perhaps", "id": 0}'], 3, '"type"'),
        ([HEADER, INVOKE[:-1] + ', "time_s": "noon"}'], 2, "time_s"),
        ([HEADER, "[" * 100_000], 2, '"type"'),
    ],
)
def test_a_broken_line_is_named(lines: list[str], number: int, expected: str) -> None:
    with pytest.raises(BadRequest) as error:
        History.load(lines, "my.jsonl")
    assert error.value.message.startswith(f"my.jsonl:{number}: expected ")
    assert expected in error.value.message


@pytest.mark.parametrize("value", [b"bytes", float("nan"), object()])
def test_only_json_is_written(value: object) -> None:
    history = History("register")
    history.invoke("c", "write", "x", value)
    with pytest.raises(BadRequest, match="JSON values only"):
        list(history.dump())

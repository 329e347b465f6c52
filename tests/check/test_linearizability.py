"""The search against brute force, on histories that are right by construction, and at its bounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gostore.check import History, Operation, Outcome, Verdict, check_linearizable
from gostore.check.counterexample import explain, time_line
from gostore.check.models import MODELS, REFUSED
from gostore.check.search import Budget, Problem
from gostore.core.errors import BadRequest

# Objects written a second time, as plainly as possible: apply(state, kind, argument) -> (state, result).


def apply_register(state: Any, kind: str, argument: Any) -> tuple[Any, Any]:
    if kind == "read":
        return state, state
    if kind == "write":
        return argument, None
    return (argument[1], True) if state == argument[0] else (state, False)


def apply_text(state: str, kind: str, argument: Any) -> tuple[str, Any]:
    if kind == "get":
        return state, state
    return (argument if kind == "put" else state + argument), None


def apply_object(state: tuple[Any, int, int], kind: str, argument: Any) -> tuple[tuple[Any, int, int], Any]:
    """db: the version of a write is its index in the log, which other keys share."""
    value, version, index = state
    if kind == "get":
        return state, [value, version]
    if kind == "set":
        return (argument, index + 2, index + 2), index + 2
    return (None, 0, index + 3), index + 3


APPLY: dict[str, tuple[Any, Callable[[Any, str, Any], tuple[Any, Any]]]] = {
    "register": (None, apply_register),
    "key_value": ("", apply_text),
    "object": ((None, 0, 0), apply_object),
}


def brute(operations: Sequence[Operation], model: str, lifted: frozenset[int] = frozenset()) -> bool:
    """Whether some order of the operations explains the results: all orders of all subsets are tried.

    ``lifted``: ids whose operations may also be left out or have given any result.
    """
    required = [o for o in operations if o.outcome is Outcome.OK and o.id not in lifted]
    optional = [o for o in operations if o.outcome is Outcome.INFO or (o.outcome is Outcome.OK and o.id in lifted)]
    chosen = (more for count in range(len(optional) + 1) for more in combinations(optional, count))
    return any(explains(order, model, lifted) for more in chosen for order in permutations([*required, *more]))


def explains(order: Sequence[Operation], model: str, lifted: frozenset[int]) -> bool:
    state, apply = APPLY[model]
    for place, operation in enumerate(order):
        if any(o.outcome is Outcome.OK and (o.returned or 0) < operation.invoked for o in order[place + 1 :]):
            return False
        if model == "object":  # versions are what the log gave: here only the search is checked, not the model
            if operation.id in lifted:
                operation = replace(operation, outcome=Outcome.INFO, result=None)
            state = MODELS[model].step(state, MODELS[model].call(operation))
            if state is REFUSED:
                return False
            continue
        state, result = apply(state, operation.kind, operation.argument)
        if operation.outcome is Outcome.OK and operation.id not in lifted and result != operation.result:
            return False
    return True


CALLS = {
    "register": st.one_of(
        st.just(("read", None)),
        st.tuples(st.just("write"), st.integers(0, 2)),
        st.tuples(st.just("cas"), st.tuples(st.integers(0, 2), st.integers(0, 2)).map(list)),
    ),
    "key_value": st.one_of(
        st.just(("get", None)),
        st.tuples(st.sampled_from(["put", "append"]), st.sampled_from(["a", "b"])),
    ),
    "object": st.one_of(
        st.sampled_from([("get", None), ("delete", None)]),
        st.tuples(st.just("set"), st.sampled_from([1, [], {"n": 1}])),
    ),
}
RESULTS = {
    ("register", "read"): st.none() | st.integers(0, 2),
    ("register", "cas"): st.booleans(),
    ("object", "get"): st.tuples(st.sampled_from([None, 1, []]), st.none() | st.integers(0, 3)).map(list),
    ("object", "set"): st.none() | st.integers(1, 3),
    ("object", "delete"): st.none() | st.integers(1, 3),
    ("key_value", "get"): st.sampled_from(["", "a", "b", "ab", "ba", "aa", "aab"]),
}


def moments(draw: st.DrawFn, count: int, each: int) -> list[tuple[int, int]]:
    """A random interleaving of ``each`` moments (0, 1, ...) of ``count`` operations."""
    order = draw(st.permutations([number for number in range(count) for _ in range(each)]))
    seen = [0] * count
    found = []
    for number in order:
        found.append((number, seen[number]))
        seen[number] += 1
    return found


@st.composite
def arbitrary(draw: st.DrawFn, model: str) -> History:
    """Few operations with random intervals, outcomes and results: right or wrong."""
    history = History(model)
    count = draw(st.integers(1, 5))
    calls = [draw(CALLS[model]) for _ in range(count)]
    made: dict[int, Operation] = {}
    unknown = 0
    for number, moment in moments(draw, count, 2):
        kind, argument = calls[number]
        if moment == 0:
            made[number] = history.invoke(number, kind, "x", argument)
            continue
        outcome = draw(st.sampled_from(["ok", "ok", "ok", "ok", "info", "fail"]))
        if outcome == "ok" or (outcome == "info" and unknown == 2):
            history.ok(made[number], draw(RESULTS.get((model, kind), st.none())))
        elif outcome == "fail":
            history.fail(made[number])
        else:
            unknown += 1
            history.info(made[number])
    return history


@st.composite
def atomic(draw: st.DrawFn, model: str, count_max: int = 25) -> History:
    """What a truly atomic object answers: each operation happens at one moment within its interval, or, when its
    outcome is unknown, at one moment after its invocation or never."""
    history = History(model)
    state, apply = APPLY[model]
    count = draw(st.integers(1, count_max))
    calls = [draw(CALLS[model]) for _ in range(count)]
    fates = [draw(st.sampled_from(["ok", "ok", "ok", "late", "never"])) for _ in range(count)]
    made: dict[int, Operation] = {}
    results: dict[int, Any] = {}
    for number, moment in moments(draw, count, 3):
        kind, argument = calls[number]
        fate = fates[number]
        if moment == 0:
            made[number] = history.invoke(number, kind, "x", argument)
        elif (moment == 1 and fate == "ok") or (moment == 2 and fate == "late"):
            state, results[number] = apply(state, kind, argument)
        elif moment == 2 and fate == "ok":
            history.ok(made[number], results[number])
        elif moment == 1:
            history.info(made[number])
    return history


patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
every = pytest.mark.parametrize("model", list(APPLY))


@every
@patient
@given(data=st.data())
def test_an_atomic_object_is_linearizable(model: str, data: st.DataObject) -> None:
    history = data.draw(atomic(model))
    if model == "object":
        for operation in history:
            if operation.outcome is Outcome.OK and data.draw(st.booleans()):  # the client did not learn the version
                operation.result = [operation.result[0], None] if operation.kind == "get" else None
    result = check_linearizable(history)
    assert result.verdict is Verdict.LINEARIZABLE, result.text()


@every
@settings(patient, max_examples=150)
@given(data=st.data())
def test_agrees_with_brute_force(model: str, data: st.DataObject) -> None:
    history = data.draw(arbitrary(model))
    result = check_linearizable(history)
    assert (result.verdict is Verdict.LINEARIZABLE) == brute(list(history), model)
    assert_sound(history, result.keys[0].counterexample)


@every
@settings(patient, max_examples=100)
@given(data=st.data())
def test_agrees_with_brute_force_on_damaged_histories(model: str, data: st.DataObject) -> None:
    """One result of an atomic object's history is changed: closer to the border than random results."""
    history = data.draw(atomic(model, count_max=5))
    known = [o for o in history if o.outcome is Outcome.OK and (model, o.kind) in RESULTS]
    if known:
        damaged = data.draw(st.sampled_from(known))
        damaged.result = data.draw(RESULTS[model, damaged.kind])
    result = check_linearizable(history)
    assert (result.verdict is Verdict.LINEARIZABLE) == brute(list(history), model)
    assert_sound(history, result.keys[0].counterexample)


def assert_sound(history: History, counterexample: Any) -> None:
    """There is no order even if everything but the counterexample and what came before it is lifted."""
    if counterexample is None:
        return
    core = {o.id for o in counterexample.operations}
    begin = min(o.invoked for o in counterexample.operations)
    # A compare-and-set that was refused is known to have changed nothing: lifted, it is not there.
    there = [o for o in history if o.id in core or o.result is not False or (o.returned or begin) < begin]
    after = frozenset(o.id for o in there if o.id not in core and not (o.returned or begin) < begin)
    assert not brute(there, history.model, after)
    if counterexample.minimal:
        for spared in core:
            others = frozenset(o.id for o in there if o.id not in core or o.id == spared)
            assert brute(there, history.model, others), "it can be spared"


def record(model: str, *lines: str) -> History:
    """``"c1 write 3"`` invokes, ``"c1 ok"``, ``"c1 ok 3"``, ``"c1 info"`` return."""
    history = History(model)
    running: dict[str, Operation] = {}
    for line in lines:
        process, word, *rest = line.split()
        value: Any = int(rest[0]) if rest and rest[0].isdecimal() else rest[0] if rest else None
        if word == "ok":
            history.ok(running.pop(process), value)
        elif word in ("info", "fail"):
            getattr(history, word)(running.pop(process))
        else:
            running[process] = history.invoke(process, word, "x", value)
    return history


def verdict(*lines: str) -> str:
    return check_linearizable(record("register", *lines)).verdict.value


def test_an_unknown_write_may_happen_late_or_never() -> None:
    base = ("a write 1", "a ok", "b write 2", "b info")
    assert verdict(*base, "c read", "c ok 1", "c read", "c ok 2") == "linearizable"
    assert verdict(*base, "c read", "c ok 1", "c read", "c ok 1") == "linearizable"
    assert verdict(*base, "c read", "c ok 2", "c read", "c ok 1") == "not"
    assert verdict("c read", "c ok 2", *base) == "not", "not before it was invoked"


def test_a_failed_write_did_not_happen() -> None:
    assert verdict("b write 2", "b fail", "c read", "c ok 2") == "not"


def test_a_stale_read_is_shown_with_the_write_that_it_missed() -> None:
    noise = [line for n in range(20) for line in (f"n write {n}", f"m write {n + 50}", "m ok", "n ok")]
    history = record(
        "register", *noise, "a write 1", "a ok", "b write 2", "b ok", "c read", "c ok 1", "a write 7", "a ok"
    )
    result = check_linearizable(history)
    (key,) = result.keys
    assert key.counterexample is not None
    assert [(o.process, o.kind) for o in key.counterexample.operations] == [("b", "write"), ("c", "read")]
    assert result.text() == "\n".join(
        [
            "not linearizable: 44 operations on 1 keys (register)",
            'key "x": no order of these 2 operations explains every result',
            "  before: 1",
            "  b  write 2    ├──┤",
            "  c  read -> 1        ├──┤",
        ]
    )


def test_time_line_shows_open_ends_and_times() -> None:
    history = History("register")
    first = history.invoke("a", "write", "x", 1, time_s=0.5)
    second = history.invoke("bb", "read", "x", time_s=0.625)
    history.ok(second, 1, time_s=1.0)
    assert time_line([first, second]) == [
        " a  write 1 -> ?  ├─────────…   0.500.. s",
        "bb  read -> 1        ├──┤   0.625..1.000 s",
    ]


def test_keys_are_judged_alone() -> None:
    history = record("register", "a write 1", "a ok", "c read", "c ok 1")
    other = history.invoke("d", "read", ["y", 2])
    history.ok(other, 5)
    result = check_linearizable(history)
    assert result.verdict is Verdict.NOT
    assert [(key.key, key.verdict.value) for key in result.keys] == [("x", "linearizable"), (["y", 2], "not")]
    assert result.figures()["keys_not"] == [["y", 2]]


def hard(clients: int) -> History:
    """Concurrent appends, and a read that no order explains."""
    history = History("key_value")
    running = [history.invoke(n, "append", "x", chr(97 + n)) for n in range(clients)]
    for operation in running:
        history.ok(operation)
    history.ok(history.invoke("r", "get", "x"), "?")
    return history


def test_out_of_budget_is_unknown() -> None:
    assert check_linearizable(hard(4)).verdict is Verdict.NOT
    result = check_linearizable(hard(12), steps_max=5_000)
    assert result.verdict is Verdict.UNKNOWN
    assert result.steps < 6_000
    assert "no answer within" in result.text()
    assert check_linearizable(hard(12), memory_bytes_max=200_000).verdict is Verdict.UNKNOWN
    assert not result.fine


def test_one_key_that_is_wrong_outweighs_one_that_is_unknown() -> None:
    history = hard(12)
    history.ok(history.invoke("z", "get", "y"), "?")
    result = check_linearizable(history, steps_max=1_000)
    assert [key.verdict.value for key in result.keys] == ["unknown", "not"]
    assert result.verdict is Verdict.NOT


def test_many_keys_are_wrong() -> None:
    history = History("register")
    for number in range(40):
        history.ok(history.invoke("c", "read", number), 5)
    result = check_linearizable(history)
    assert sum(key.counterexample is not None for key in result.keys) == 16
    assert "24 more keys are not linearizable" in result.text()


def busy(count: int) -> tuple[History, Any]:
    """A register that four clients never leave alone, and its last value: there is no moment of rest in it."""
    rng = random.Random(5)
    history = History("register")
    state: Any = None
    running: list[tuple[Operation, Any]] = []
    for number in range(count):
        kind = rng.choice(["read", "write"])
        operation = history.invoke(number % 5, kind, "x", number if kind == "write" else None)
        if kind == "write":
            state = number
        running.append((operation, state if kind == "read" else None))
        while len(running) > 4:
            history.ok(*running.pop(rng.randrange(len(running))))
    history.invoke("open", "write", "x", -1)
    for operation, result in running:
        history.ok(operation, result)
    return history, state


def test_a_long_history_takes_steps_in_proportion() -> None:
    history, state = busy(5_000)
    history.ok(history.invoke("r", "read", "x"), state)
    result = check_linearizable(history)
    assert result.verdict is Verdict.LINEARIZABLE
    assert result.steps < 20 * len(history)


def test_a_long_history_without_rest_is_explained_in_a_window() -> None:
    history, _ = busy(600)
    history.ok(history.invoke("r", "read", "x"), 3)
    result = check_linearizable(history)
    counterexample = result.keys[0].counterexample
    assert counterexample is not None
    assert counterexample.operations[-1].result == 3
    assert len(counterexample.operations) < 10


def test_without_a_budget_the_whole_prefix_is_the_counterexample() -> None:
    history, _ = busy(100)
    history.ok(history.invoke("r", "read", "x"), 3)
    problem = Problem.of(MODELS["register"], list(history))
    shown = explain("x", problem, len(problem.items) - 1, Budget(0))
    assert (len(shown.operations), shown.minimal) == (101, False)
    assert "  ... and 71 operations before these" in shown.text()
    assert len(shown.text().splitlines()) == 34


def test_many_unknown_writes_stay_cheap() -> None:
    """A hundred time-outs on five values: what an open operation can do is counted by value, not by operation."""
    history = History("register")
    for number in range(100):
        history.info(history.invoke(number, "write", "x", number % 5))
        history.ok(history.invoke("r", "read", "x"), number % 5)
    history.ok(history.invoke("r", "read", "x"), 9)
    result = check_linearizable(history)
    assert result.verdict is Verdict.NOT
    assert result.steps < 50_000
    counterexample = result.keys[0].counterexample
    assert counterexample is not None
    assert [o.result for o in counterexample.operations] == [9]


@pytest.mark.parametrize("swap", [False, True])
def test_which_unknown_operation_was_used_matters(swap: bool) -> None:
    """Two unknown operations lead to the same state; only one of them can do so again later."""
    history = History("register")
    unknown = [("write", 1), ("cas", [None, 1])]
    for kind, argument in reversed(unknown) if swap else unknown:
        history.info(history.invoke("u", kind, "x", argument))
    for seen in (1, 2, 1):
        if seen == 2:
            history.ok(history.invoke("a", "write", "x", 2))
        history.ok(history.invoke("r", "read", "x"), seen)
    assert check_linearizable(history).verdict is Verdict.LINEARIZABLE
    history.ok(history.invoke("a", "write", "x", 2))
    history.ok(history.invoke("r", "read", "x"), 1)
    assert check_linearizable(history).verdict is Verdict.NOT


def test_object_versions() -> None:
    history = History("object")
    history.ok(history.invoke("a", "set", "k", {"n": 1}), 4)
    history.info(history.invoke("b", "set", "k", {"n": 2}))
    history.ok(history.invoke("c", "get", "k"), [{"n": 2}, 6])
    history.ok(history.invoke("c", "delete", "k"), 7)
    history.ok(history.invoke("c", "get", "k"), [None, 0])
    assert check_linearizable(history).verdict is Verdict.LINEARIZABLE
    history.ok(history.invoke("c", "get", "k"), [{"n": 2}, 6])
    assert check_linearizable(history).verdict is Verdict.NOT


def test_what_a_read_taught_is_not_forgotten() -> None:
    """The second read contradicts the first, not the write, whose version nobody was told."""
    history = History("object")
    history.info(history.invoke("a", "set", "k", 5))
    for version in (6, 7):
        history.ok(history.invoke("c", "get", "k"), [5, version])
    assert check_linearizable(history).verdict is Verdict.NOT


def test_empty_and_wrong_input() -> None:
    assert check_linearizable(History("register")).verdict is Verdict.LINEARIZABLE
    with pytest.raises(BadRequest, match="no model"):
        check_linearizable(History("stack"))

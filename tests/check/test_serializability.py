"""Anomalies by their textbook examples, and the graph against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gostore.check import History, Outcome, Transaction, check_serializable
from gostore.check.transactions import Access, transactions_of
from gostore.core.errors import BadRequest

Pairs = dict[str, int | None]


def txn(
    name: str,
    reads: Pairs | None = None,
    writes: Pairs | list[tuple[str, int | None]] | None = None,
    *,
    outcome: Outcome = Outcome.OK,
    span: tuple[int, int] = (0, 1000),
    ranges: tuple[tuple[str, str | None], ...] = (),
    deletes: tuple[str, ...] = (),
) -> Transaction:
    pairs = list((writes or {}).items()) if isinstance(writes, dict | None) else writes
    return Transaction(
        name,
        tuple(Access(key, version) for key, version in (reads or {}).items()),
        tuple(Access(key, version) for key, version in pairs),
        deletes,
        ranges,
        outcome,
        span[0],
        span[1],
    )


def anomalies(*transactions: Transaction, strict: bool = False) -> list[str]:
    return [anomaly.name for anomaly in check_serializable(transactions, strict=strict).anomalies]


def test_dirty_write_is_g0() -> None:
    assert anomalies(txn("A", writes={"x": 1, "y": 2}), txn("B", writes={"x": 2, "y": 1})) == ["G0"]


def test_aborted_read_is_g1a() -> None:
    aborted = txn("A", writes={"x": 1}, outcome=Outcome.FAIL)
    assert anomalies(aborted, txn("B", {"x": 1})) == ["G1a"]
    assert anomalies(aborted, txn("B", {"x": 1}, outcome=Outcome.FAIL)) == [], "an aborted reader may read anything"


def test_a_version_that_only_an_aborted_write_can_explain_is_g1a() -> None:
    aborted = txn("A", writes={"x": None}, outcome=Outcome.FAIL)
    assert anomalies(txn("W", writes={"x": 1}), aborted, txn("B", {"x": 2})) == ["G1a"]


def test_intermediate_read_is_g1b() -> None:
    assert anomalies(txn("A", writes=[("x", 1), ("x", 2)]), txn("B", {"x": 1})) == ["G1b", "G-single"]
    assert anomalies(txn("A", {"x": 1}, [("x", 1), ("x", 2)])) == [], "its own"


def test_circular_information_flow_is_g1c() -> None:
    assert anomalies(txn("A", {"y": 1}, {"x": 1}), txn("B", {"x": 1}, {"y": 1})) == ["G1c"]


def test_lost_update_is_g_single() -> None:
    assert anomalies(txn("A", {"x": 0}, {"x": 1}), txn("B", {"x": 0}, {"x": 2})) == ["G-single"]


def test_read_skew_is_g_single() -> None:
    assert anomalies(txn("A", writes={"x": 1, "y": 1}), txn("B", {"x": 1, "y": 0})) == ["G-single"]


def test_write_skew_is_g2() -> None:
    result = check_serializable([txn("A", {"x": 0, "y": 0}, {"x": 1}), txn("B", {"x": 0, "y": 0}, {"y": 1})])
    (anomaly,) = result.anomalies
    assert (anomaly.name, anomaly.transactions) == ("G2", ("A", "B"))
    assert anomaly.breaks == "serializability (PL-3)"
    assert result.text() == "\n".join(
        [
            "not serializable: 2 transactions, 2 dependencies",
            "G2, so this is not serializability (PL-3):",
            "  A is before B (rw): A read no y, before B wrote version 1",
            "  B is before A (rw): B read no x, before A wrote version 1",
        ]
    )


def test_long_fork_is_g2() -> None:
    """Two readers see two independent writes in opposite orders (Sovran et al., SOSP 2011)."""
    writers = [txn("A", writes={"x": 1}), txn("B", writes={"y": 1})]
    assert anomalies(*writers, txn("C", {"x": 1, "y": 0}), txn("D", {"x": 0, "y": 1})) == ["G2"]


def test_phantom_is_an_anti_dependency() -> None:
    """Both look for names from a to c, find none, and each adds one."""
    first = txn("A", writes={"a1": 1}, ranges=(("a", "c"),))
    second = txn("B", writes={"b1": 1}, ranges=(("a", None),))
    assert anomalies(first, second) == ["G2"]
    assert anomalies(first, txn("B", writes={"c1": 1}, ranges=(("a", None),))) == []


def test_duplicate_versions() -> None:
    assert anomalies(txn("A", writes={"x": 1}), txn("B", writes={"x": 1})) == ["duplicate version"]


def test_the_text_of_many_anomalies_is_short() -> None:
    lost = [txn(f"{name}{n}", {f"x{n}": 0}, {f"x{n}": v}) for n in range(30) for v, name in ((1, "A"), (2, "B"))]
    result = check_serializable(lost)
    assert len(result.anomalies) == 30
    assert "and 20 more anomalies" in result.text()


def test_several_anomalies_are_all_named() -> None:
    lost = [txn("A", {"x": 0}, {"x": 1}), txn("B", {"x": 0}, {"x": 2})]
    skew = [txn("C", {"p": 0, "q": 0}, {"p": 1}), txn("D", {"p": 0, "q": 0}, {"q": 1})]
    dirty = [txn("E", writes={"s": 1, "t": 2}), txn("F", writes={"s": 2, "t": 1})]
    assert anomalies(*lost, *skew, *dirty) == ["G0", "G-single", "G2"]


# strictness


def test_a_stale_read_is_serializable_but_not_strictly() -> None:
    write, read = txn("A", writes={"x": 1}, span=(0, 1)), txn("B", {"x": 0}, span=(2, 3))
    assert check_serializable([write, read]).fine
    result = check_serializable([write, read], strict=True)
    assert [a.name for a in result.anomalies] == ["G-single-realtime"]
    assert result.anomalies[0].breaks == "strict snapshot isolation"
    assert "A is before B (rt): A had returned before B was invoked" in result.text()
    assert check_serializable([write, txn("B", {"x": 0}, span=(0, 3))], strict=True).fine, "they overlap"


def test_an_unknown_transaction_may_happen_after_its_end() -> None:
    unknown = txn("U", writes={"x": None}, outcome=Outcome.INFO, span=(0, 1))
    late = [txn("A", {"x": 0}, span=(2, 3)), txn("B", {"x": 4}, span=(4, 5))]
    assert check_serializable([unknown, *late], strict=True).fine


def test_a_component_with_too_many_edges_is_named_by_any_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gostore.check.serializability.TRIES_MAX", 0)
    skew = [txn("A", {"x": 0, "y": 0}, {"x": 1}), txn("B", {"x": 0, "y": 0}, {"y": 1})]
    late = [txn("C", writes={"z": 1}, span=(0, 1)), txn("D", {"z": 0}, span=(2, 3))]
    assert anomalies(*skew) == ["G2"]
    assert anomalies(*late) == []
    assert anomalies(*late, strict=True) == ["G-single-realtime"]


def test_strict_names() -> None:
    def late(*names: Transaction) -> list[str]:
        return anomalies(*names, strict=True)

    assert late(txn("A", writes={"x": 2}, span=(0, 1)), txn("B", writes={"x": 1}, span=(2, 3))) == ["G0-realtime"]
    assert late(txn("A", {"x": 1}, span=(0, 1)), txn("B", writes={"x": 1}, span=(2, 3))) == ["G1c-realtime"]
    fork = [txn("A", writes={"x": 1}, span=(0, 1)), txn("B", writes={"y": 1}, span=(4, 5))]
    reader = txn("C", {"x": 0, "y": 1}, span=(0, 9))
    assert late(*fork, reader) == ["G-single-realtime"]
    assert late(txn("A", {"x": 0}, {"x": 1}), txn("B", {"x": 0}, {"x": 2})) == ["G-single"]


# what is not known


def test_an_unknown_transaction_counts_once_it_was_seen() -> None:
    unknown = txn("U", {"y": 0}, {"x": None}, outcome=Outcome.INFO)
    other = txn("B", {"x": 0}, {"y": 1})
    assert anomalies(unknown, other) == [], "it need not have happened"
    assert anomalies(unknown, other, txn("C", {"x": 5})) == ["G2"]


def test_doubts_are_unknown_never_fine() -> None:
    unknown = [txn(name, writes={"x": None}, outcome=Outcome.INFO) for name in "UV"]
    result = check_serializable([*unknown, txn("C", {"x": 5})])
    assert result.verdict.value == "unknown"
    assert "unknown outcome: U, V" in result.text()
    assert not result.fine
    nobody = check_serializable([txn("A", writes={"x": 1}), txn("C", {"x": 5})])
    assert (nobody.verdict.value, nobody.doubts) == (
        "unknown",
        ("version 5 of x was read, and nobody is known to have written it",),
    )
    deleted = check_serializable([txn("A", writes={"x": 1}, deletes=("x",)), txn("C", {"x": 0})])
    assert deleted.verdict.value == "unknown"
    assert check_serializable([txn("A", writes={"x": None})]).verdict.value == "unknown"


def test_what_was_there_before_is_no_doubt() -> None:
    assert check_serializable([txn("A", {"x": 7}), txn("B", {"x": 7}, {"x": 9})]).fine
    # U cannot have written what was read before U began; what was read later may be its, or older.
    unknown = txn("U", {"y": 0}, {"x": None}, outcome=Outcome.INFO, span=(5, 6))
    writer = txn("B", {"x": 7}, {"y": 1}, span=(1, 2))
    assert check_serializable([unknown, writer], strict=True).fine
    later = txn("C", {"x": 7}, {"y": 1}, span=(7, 8))
    assert check_serializable([unknown, later], strict=True).verdict.value == "unknown"


def test_an_unnamed_writer_can_still_be_part_of_a_cycle() -> None:
    unknown = [txn(name, writes={"x": None}, outcome=Outcome.INFO) for name in "UV"]
    result = check_serializable([*unknown, txn("A", {"x": 0}, {"x": 9}), txn("C", {"x": 5})])
    assert result.verdict.value == "not", "A's read of nothing missed version 5, whoever wrote it"


# histories


def test_from_a_history() -> None:
    history = History("transactions")
    first = history.invoke("a", "transaction")
    second = history.invoke("b", "transaction")
    history.invoke("c", "transaction")
    history.ok(first, {"reads": [["x", 0]], "writes": [["x", 4]], "deletes": ["y"], "ranges": [["a", None]]})
    history.info(second, "timed out", result={"writes": [["x", None]]})
    made = transactions_of(history)
    assert made[0] == txn(
        "T0", {"x": 0}, {"x": 4}, deletes=("y",), ranges=(("a", None),), span=(first.invoked, first.returned or 0)
    )
    assert (made[1].writes, made[1].outcome, made[2].writes) == ((Access("x", None),), Outcome.INFO, ())


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"reads": [["x", None]]}, "a read without a version"),
        ({"reads": [["x", -1]]}, "pairs"),
        ({"reads": 3}, "a list of reads"),
        ({"ranges": [["a"]]}, "pairs"),
        ({"read": []}, "expected a map"),
        ([1], "expected a map"),
    ],
)
def test_what_is_no_transaction(result: object, expected: str) -> None:
    history = History("transactions")
    history.ok(history.invoke("a", "transaction"), result)
    with pytest.raises(BadRequest, match=f"transaction T0: .*{expected}"):
        check_serializable(history)


# properties


@st.composite
def serial(draw: st.DrawFn) -> list[Transaction]:
    """Transactions one after the other, some unknown and some aborted, told in any order."""
    state: dict[str, int] = {}
    made = []
    for number in range(draw(st.integers(1, 12))):
        keys = draw(st.lists(st.sampled_from("pqrs"), unique=True, max_size=3))
        reads = {key: state.get(key, 0) for key in keys}
        written = draw(st.lists(st.sampled_from("pqrs"), unique=True, max_size=2))
        fate = draw(st.sampled_from(["ok", "ok", "ok", "happened", "never", "fail"]))
        if fate in ("ok", "happened"):
            state |= {key: number + 1 for key in written}
        writes = {key: number + 1 if fate == "ok" else None for key in written}
        outcome = {"ok": Outcome.OK, "fail": Outcome.FAIL}.get(fate, Outcome.INFO)
        ranges = (("p", "r"),) if all(state.get(key, 0) == reads.get(key, 0) for key in "pq") else ()
        made.append(txn(f"T{number}", reads, writes, outcome=outcome, ranges=ranges, span=(2 * number, 2 * number + 1)))
    return draw(st.permutations(made))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(serial())
def test_serial_histories_have_no_anomaly(transactions: list[Transaction]) -> None:
    assert anomalies(*transactions, strict=True) == []


@st.composite
def arbitrary(draw: st.DrawFn) -> list[Transaction]:
    """Few transactions that read any version and write in any order."""
    count = draw(st.integers(1, 5))
    writers = {key: draw(st.lists(st.integers(0, count - 1), unique=True, max_size=3)) for key in "xy"}
    order = draw(st.permutations([n for n in range(count) for _ in "ab"]))
    spans: dict[int, list[int]] = {n: [] for n in range(count)}
    for moment, number in enumerate(order):
        spans[number].append(moment)
    made = []
    for n in range(count):
        writes = {key: nodes.index(n) + 1 for key, nodes in writers.items() if n in nodes}
        reads = {}
        for key, nodes in writers.items():
            versions = [v for v in range(len(nodes) + 1) if v == 0 or nodes[v - 1] != n]
            if draw(st.booleans()):
                reads[key] = draw(st.sampled_from(versions))
        made.append(txn(f"T{n}", reads, writes, span=(spans[n][0], spans[n][1])))
    return made


def serializable(transactions: list[Transaction], *, strict: bool) -> bool:
    """Whether, in some order, everybody reads what is there and versions are installed one after the other."""
    for order in permutations(transactions):
        if strict and any(
            (later.returned or 0) < first.invoked for i, first in enumerate(order) for later in order[i:]
        ):
            continue
        state = {"x": 0, "y": 0}
        for t in order:
            if any(state[r.key] != r.version for r in t.reads) or any(w.version != state[w.key] + 1 for w in t.writes):
                break
            state |= {w.key: w.version or 0 for w in t.writes}
        else:
            return True
    return False


@pytest.mark.parametrize("strict", [False, True])
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(transactions=arbitrary())
def test_agrees_with_brute_force(strict: bool, transactions: list[Transaction]) -> None:
    result = check_serializable(transactions, strict=strict)
    assert result.fine == serializable(transactions, strict=strict), result.text()

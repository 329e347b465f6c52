"""What the judge of a run sees: sums of counters, wrong deaths, and what the cells tell."""

from __future__ import annotations

import random
from typing import Any

from gostore.check import Outcome, Serializable, check_serializable
from gostore.core.events import Event
from gostore.experiments.judge import DECLARED_S, _counters, _run_again, wrongly_declared
from gostore.experiments.workload import Attempt, Workload
from gostore.faults import Step


def workload() -> Workload:
    return Workload(None, random.Random(1), lambda: 0.0)  # type: ignore[arg-type]


def event(node: str, time_s: float, kind: str, **data: Any) -> Event:
    return Event(node, 1, kind, 0, time_s, None, data)


def offline(time_s: float) -> Event:
    return event("n1", time_s, "member", member="n3", state="offline", epoch=4, path=["n1"])


def test_a_member_that_lives_is_not_declared_offline() -> None:
    (wrong,) = wrongly_declared([offline(50.0), offline(51.0)], [])
    assert "n3 was declared offline at 50.000 s" in wrong
    assert wrongly_declared([offline(50.0)], [Step(1.0, 2.0, "pause", {"node": "n2"})]) == [], "it may be right then"
    assert wrongly_declared([offline(50.0)], [Step(1.0, 2.0, "kill", {"node": "n2"})]), "that was another one"


def test_a_member_that_ended_is_rightly_declared_offline() -> None:
    killed = event("testbed", 48.0, "fault", fault="kill", arguments={"node": "n3"})
    assert wrongly_declared([killed, offline(50.0)], []) == []
    assert wrongly_declared([killed, offline(48.1 + DECLARED_S)], []), "long after"
    for kind, data in (("node_stopping", {"reason": "disk"}), ("node_started", {"incarnation": 2})):
        assert wrongly_declared([event("n3", 48.0, kind, **data), offline(50.0)], []) == []


def test_an_addition_that_was_acknowledged_counts_once() -> None:
    load = workload()
    counter = load.counters["k0"]
    counter.added, counter.doubtful = 10, 5
    for final, right in ((9, False), (10, True), (12, True), (15, True), (16, False), (None, True)):
        counter.final = final
        assert (list(_counters(load)) == []) == right, final


def test_a_call_that_runs_twice_is_seen() -> None:
    load = workload()
    load.files.ok(load.files.invoke("c", "write", "f1", 7))
    load.files.ok(load.files.invoke("c", "write", "f1", None))
    load.files.info(load.files.invoke("c", "write", "f1", 8))
    write = event("n1", 1.0, "fs_write", path="/load/f1", size=1, version=1, chunks=0, duration_s=0.1)
    assert list(_run_again([write] * 2, load)) == []
    assert list(_run_again([write] * 3, load)) == ["at most once: /load/f1 was written 3 times by 2 calls"]


def attempt(
    load: Workload, reads: dict[str, tuple[int, int]], writes: dict[str, int], outcome: Outcome, **more: Any
) -> Attempt:
    number = len(load.cells)
    made = Attempt(number, "c", load._tick(), outcome=outcome, reads=reads, writes=writes, **more)
    made.returned = load._tick()
    load.cells.append(made)
    return made


def verdict(load: Workload) -> tuple[Serializable, list[str]]:
    judged = check_serializable(load.transactions(), strict=True)
    return judged.verdict, [anomaly.name for anomaly in judged.anomalies]


def test_cells_in_order_are_serializable() -> None:
    load = workload()
    attempt(load, {"p/0": (0, -1)}, {"p/0": 1}, Outcome.OK)
    attempt(load, {"p/0": (1, 0), "p/1": (0, -1)}, {"p/1": 1}, Outcome.OK)
    attempt(load, {"p/0": (1, 0), "p/1": (1, 1)}, {}, Outcome.OK, ranges=("p/",))
    assert verdict(load) == (Serializable.SERIALIZABLE, [])


def test_a_lost_update_is_seen() -> None:
    load = workload()
    attempt(load, {"p/0": (0, -1)}, {"p/0": 1}, Outcome.OK)
    attempt(load, {"p/0": (0, -1)}, {"p/0": 1}, Outcome.OK)
    assert "duplicate version" in verdict(load)[1]


def test_write_skew_is_seen() -> None:
    load = workload()
    attempt(load, {"p/0": (0, -1), "p/1": (0, -1)}, {"p/0": 1}, Outcome.OK)
    attempt(load, {"p/0": (0, -1), "p/1": (0, -1)}, {"p/1": 1}, Outcome.OK)
    attempt(load, {"p/0": (1, 0), "p/1": (1, 1)}, {}, Outcome.OK)
    assert verdict(load)[0] is Serializable.NOT


def test_an_acknowledged_write_that_the_last_reader_misses_is_seen() -> None:
    load = workload()
    attempt(load, {"p/0": (0, -1)}, {"p/0": 1}, Outcome.OK)
    attempt(load, {"p/0": (0, -1)}, {}, Outcome.OK)
    assert verdict(load)[1] == ["G-single-realtime"]


def test_a_phantom_is_seen() -> None:
    """Both read the range while it was empty, and each put another object into it."""
    load = workload()
    attempt(load, {}, {"p/0": 1}, Outcome.OK, ranges=("p/",))
    attempt(load, {}, {"p/1": 1}, Outcome.OK, ranges=("p/",))
    attempt(load, {"p/0": (1, 0), "p/1": (1, 1)}, {}, Outcome.OK, ranges=("p/",))
    assert verdict(load)[0] is Serializable.NOT


def test_an_attempt_of_unknown_outcome_counts_once_somebody_saw_it() -> None:
    load = workload()
    attempt(load, {"p/0": (0, -1)}, {"p/0": 1}, Outcome.INFO)
    attempt(load, {"p/0": (0, -1)}, {"p/0": 1}, Outcome.OK)
    assert verdict(load) == (Serializable.SERIALIZABLE, []), "nobody saw the first"
    attempt(load, {"p/0": (1, 0)}, {}, Outcome.OK)
    assert "duplicate version" in verdict(load)[1]


def test_what_failed_and_was_seen_is_an_aborted_read() -> None:
    load = workload()
    attempt(load, {"p/0": (0, -1)}, {"p/0": 1}, Outcome.FAIL)
    attempt(load, {"p/0": (1, 0)}, {}, Outcome.OK)
    assert verdict(load)[1] == ["G1a"]

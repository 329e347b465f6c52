"""Seeded runs of the whole cluster, judged; and that a seed is all there is to a run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from gostore.core.errors import BadRequest
from gostore.experiments import simulation
from gostore.experiments.simulation import minimise, run_seed
from gostore.faults import PROFILES, Step, draw

NODES = ["n1", "n2", "n3", "n4", "n5"]

ONE_RUN = """
import gc, json, sys
from gostore.experiments.simulation import run_seed
first, threshold = sys.argv[1] == "second", int(sys.argv[2])
gc.set_threshold(threshold)
if first:
    run_seed(5, seconds=1.0, profile="swarm")
run = run_seed(7, seconds=6.0, profile="swarm")
print(json.dumps([run.trace_sha256, run.events]))
"""


def in_a_process(hash_seed: str, world: str, threshold: int) -> tuple[str, int]:
    answer = subprocess.run(
        [sys.executable, "-c", ONE_RUN, world, str(threshold)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True, timeout=110,
    )  # fmt: skip
    sha256, events = json.loads(answer.stdout)
    return sha256, events


def test_the_same_seed_gives_the_same_trace_anywhere() -> None:
    """In another process, with another hash seed, as the second world of a process, with other collections."""
    one = in_a_process("1", "first", 700)
    other = in_a_process("2", "second", 50)
    assert one == other
    assert one[1] > 10_000
    assert run_seed(8, seconds=6.0, profile="swarm").trace_sha256 != one[0]


def test_a_schedule_is_a_function_of_its_seed_and_ends_in_time() -> None:
    for profile in PROFILES:
        schedules = [draw(random.Random(seed), NODES, 30.0, profile) for seed in range(20)]
        assert schedules == [draw(random.Random(seed), NODES, 30.0, profile) for seed in range(20)]
        words = {step.word for schedule in schedules for step in schedule}
        assert words == set(PROFILES[profile])
        for schedule in schedules:
            for step in schedule:
                assert 0.0 <= step.at_s <= step.until_s <= 30.0
            for step in schedule:
                down = [s.arguments["node"] for s in schedule if s.word in ("kill", "power_cut", "pause")
                        and s.at_s <= step.at_s < s.until_s]  # fmt: skip
                assert len(down) == len(set(down)) <= 2, "a minority at most, and no node twice"


def test_a_schedule_of_faults_happens() -> None:
    schedule = [Step(0.5, 1.5, "kill", {"node": "n3"}), Step(2.0, 3.0, "isolate", {"node": "n1", "direction": "in"})]
    run = run_seed(3, seconds=4.0, schedule=schedule)
    assert (run.coverage["fault_kill"], run.coverage["fault_isolate"]) == (1, 1)
    assert run.violations == [], run.replay


def test_what_is_not_needed_for_a_failure_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight faults are to blame; delta debugging finds just these."""
    schedule = [Step(float(i), i + 0.5, "kill", {"node": f"n{i % 5 + 1}"}) for i in range(8)]
    guilty = [schedule[2], schedule[6]]

    def pretend(seed: int, **options: object) -> simulation.Run:
        steps = list(options["schedule"])  # type: ignore[call-overload]
        run = simulation.Run(seed, 5, 10.0, "swarm", steps)
        run.violations = ["broken"] if all(step in steps for step in guilty) else []
        return run

    monkeypatch.setattr(simulation, "run_seed", pretend)
    failing = pretend(1, schedule=schedule)
    assert minimise(failing) == guilty


def test_what_breaks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that loses an acknowledged write is caught: here the client's write is dropped on the way."""
    from gostore.client.objects import DbHandle

    original, calls = DbHandle.set, []

    async def forgetful(self: DbHandle, container: str, key: str, value: object, *path: object) -> int:
        calls.append(key)
        if container == "registers" and len(calls) % 5 == 0:
            return 1
        return await original(self, container, key, value, *path)

    monkeypatch.setattr(DbHandle, "set", forgetful)
    run = run_seed(2, seconds=8.0, profile="none")  # as many writes of registers as before there were other jobs
    assert any("registers" in violation for violation in run.violations)
    assert "gostore sim" in run.replay


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(BadRequest, match="no such profile"):
        run_seed(1, profile="everything")
    with pytest.raises(BadRequest, match="seconds"):
        run_seed(1, seconds=0)

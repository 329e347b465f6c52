"""A hundred seeds with the faults that the services promise to survive. `make soak` runs far more, and longer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gostore.experiments.simulation import run_seed

SEEDS = range(1, 101)
ENOUGH = {
    "fault_kill": 30, "fault_power_cut": 30, "fault_loss": 20, "fault_duplicate": 20, "fault_reorder": 20,
    "fault_delay": 20, "fault_slow_disk": 20, "fault_skew": 20, "torn_tails": 5, "repairs": 20, "conflict": 50,
    "suspect": 100, "refute": 100, "master": 100, "raft_leader": 500, "raft_snapshot": 100,
    "raft_configuration": 500, "commit": 5_000, "operations": 5_000,
}  # fmt: skip
"""A quiet run proves nothing: what must have happened at least so often in all of them."""

happened: dict[str, int] = {}


@pytest.fixture(scope="module", autouse=True)
def enough_happened(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    ran = [item for item in request.session.items if item.name.startswith("test_the_faults_that_are_survived[")]
    if len(ran) == len(SEEDS) and not request.session.testsfailed:
        quiet = {mark: happened.get(mark, 0) for mark, least in ENOUGH.items() if happened.get(mark, 0) < least}
        assert not quiet, f"these happened too seldom: {quiet}"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_faults_that_are_survived(seed: int) -> None:
    run = run_seed(seed, seconds=8.0, profile="promised")
    assert run.violations == [], run.replay
    assert run.unknown == [], run.replay
    assert run.coverage["operations"] > 20
    assert run.coverage["commit"] > 20
    for mark, count in run.coverage.items():
        happened[mark] = happened.get(mark, 0) + count

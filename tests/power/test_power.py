"""Every planted bug is found again, with the seed and the faults that found it; and the page says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hunt
import soaked
from bugs import BUGS

FOUND, TRIED = hunt.load()

SAMPLE = 9
"""Each so many-th bug is also run without the bug: all of them were when they were hunted."""


MORE_SEEDS = 12
"""Tried when the product has changed so much that a recorded seed is another run."""


QUICK = 6
"""Each so many-th bug is hunted in `make test`, all of them in `make slow`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i % QUICK else []) for i, name in enumerate(FOUND)]
)
def test_a_planted_bug_is_found(name: str) -> None:
    found, bug = FOUND[name], BUGS[name]
    if hunt.run_with(bug, found.seed, found.seconds, hunt.steps_of(found)).violations:
        return
    for seed in range(found.seed, found.seed + MORE_SEEDS):
        if hunt.run_with(bug, seed, bug.seconds, hunt.schedule_of(bug, seed)).violations:
            return
    pytest.fail(f"{name} is not found on seed {found.seed} any more: run tests/power/hunt.py {name} --again")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FOUND)[::SAMPLE])
def test_without_the_bug_the_run_is_clean(name: str) -> None:
    found = FOUND[name]
    run = hunt.run_with(BUGS[name], found.seed, found.seconds, hunt.steps_of(found), present=False)
    assert run.violations == []
    assert run.unknown == []


def test_all_bugs_are_found_and_the_page_says_how() -> None:
    assert list(FOUND) == list(BUGS), "run tests/power/hunt.py"
    assert len(FOUND) > 30
    assert all(found.seeds <= hunt.SEEDS_MAX for found in FOUND.values())
    assert hunt.TABLE.read_text() == hunt.table(FOUND, TRIED), "run tests/power/hunt.py"


def test_a_patch_ends_with_its_run() -> None:
    for bug in BUGS.values():
        with hunt.planted(bug), hunt.planted(bug):
            pass
    with hunt.planted(BUGS["lost_update"]):
        assert hunt.BUGS["lost_update"].where == "services.db.machine"
    from gostore.services.db import machine, transaction

    assert machine.find_clash is transaction.find_clash


def test_the_page_of_a_soak_says_what_was_violated_and_what_happened() -> None:
    row = {
        "code": "c0de", "commit": "c1", "nodes": 5, "seconds": 30.0, "faults": "swarm", "events": 1000,
        "virtual_s": 40.0, "violations": [], "unknown": [], "progress_s": 0.5,
        "coverage": {"raft_leader": 7, "fault_kill": 1},
    }  # fmt: skip
    rows = [{**row, "seed": 1}, {**row, "seed": 2, "violations": ["lost"], "progress_s": 3.0, "commit": "c2"}]
    page = soaked.page(rows, soaked.ranges([1, 2]))
    assert "Violated: 1** (2)" in page
    assert "seeds 1 to 2)" in page
    assert "`c0de` (the content of `gostore/`), last commit `c2`" in page
    assert "worst 3.000 s" in page
    assert "| leader changes | 14 | 7,000 | 100 |" in page
    assert "| fault: kill | 2 |" in page
    assert "not all of them" in soaked.ranges([1, 3])

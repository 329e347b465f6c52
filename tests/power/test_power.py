"""Every planted bug is found again, with the seed and the faults that found it; and the page says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hunt
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

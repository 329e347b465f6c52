"""Some of the rounds of ``kills.py``; all two hundred are run by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kills import WORK, run


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_whoever_is_killed_no_answer_is_taken_back() -> None:
    tally = run(rounds=20, seed=7)
    assert (tally.violations, tally.unknown) == ([], [])
    assert tally.rounds == 20
    assert tally.kills > 20
    assert tally.whole > 0
    assert tally.done >= 20 * WORK

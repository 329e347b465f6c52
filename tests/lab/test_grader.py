from __future__ import annotations

import json
from pathlib import Path

import pytest

from gostore.core.errors import BadRequest, NotFound
from gostore.lab import grader
from gostore.lab.grader import find_labs, grade, labs_folder, load_lab, read_submission

LABS = Path(__file__).parents[2] / "labs"

# A small lab, so that what the grader does with a submission can be seen without a cluster.
CHECKS = """
from gostore.lab import check

@check(points=3, hint="say five")
def says_five(cls, rng):
    assert rng.random() == __import__("random").Random(7).random(), "the seed is handed in"
    assert cls({"n1": 1.0}, 1, 1).owners(b"") == ("n1",), "a message"
"""


@pytest.fixture
def small(tmp_path: Path) -> grader.Lab:
    folder = tmp_path / "09_small"
    folder.mkdir()
    (folder / "lab.toml").write_text('title = "Small"\nslot = "placement"\nclass_name = "Mine"\n')
    (folder / "checks.py").write_text(CHECKS)
    return load_lab(tmp_path, "09")


GOOD = """
class Mine:
    def __init__(self, nodes, replicas, tokens_per_node=1):
        self.names = sorted(nodes)[:replicas]
    def owners(self, key):
        return tuple(self.names)
"""


def test_a_good_submission_gets_the_points(small: grader.Lab) -> None:
    result = grade(small, GOOD, seed=7)
    assert (result.points, result.points_max, result.checks[0].hint) == (3, 3, "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (GOOD.replace("Mine", "Other"), "defines no class"),
        (GOOD + "\nimport sys\nsys.exit(0)\n", "SystemExit"),
        (GOOD.replace("return tuple", "import os; os._exit(0); return tuple"), "ended with status 0"),
        (GOOD.replace("tuple(self.names)", "tuple(self.nmes)"), "line 6"),
        (GOOD.replace("tuple(self.names)", "['n1']"), ""),
    ],
)
def test_a_bad_one_gets_none_and_is_told_why(small: grader.Lab, source: str, message: str) -> None:
    result = grade(small, source, seed=7)
    assert result.points == 0
    assert message in result.checks[0].message != ""
    assert result.checks[0].hint == "say five"
    assert result.checks[0].seed == 7


def test_a_submission_that_never_ends_is_ended(small: grader.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader, "CHECK_TIMEOUT_S", 2.0)
    result = grade(small, GOOD.replace("return tuple", "\n        while True: pass\n        return tuple"), seed=7)
    assert result.points == 0
    assert "did not end" in result.checks[0].message


def test_only_the_definitions_of_a_notebook_are_graded(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["class Prose: pass"]},
        {
            "cell_type": "code",
            "source": ["%matplotlib inline\n", "import bisect, os\n", "LIMIT = 3\n", "x = os.getpid()"],
        },
        {
            "cell_type": "code",
            "source": ["@staticmethod\n", "def helper():\n", "    return LIMIT\n", "raise SystemExit"],
        },
        {"cell_type": "code", "source": ["cluster = await gs.launch(5)"]},
    ]
    file = tmp_path / "x.ipynb"
    file.write_text(json.dumps({"cells": cells, "nbformat": 4}))
    source = read_submission(file)
    namespace: dict[str, object] = {}
    exec(source, namespace)
    assert namespace["LIMIT"] == 3
    assert "helper" in namespace
    assert "x" not in namespace
    assert "cluster" not in source
    assert "Prose" not in source


def test_what_is_no_submission_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="cannot be read"):
        read_submission(tmp_path / "absent.py")
    (tmp_path / "x.ipynb").write_text("{}")
    with pytest.raises(BadRequest, match="not a notebook"):
        read_submission(tmp_path / "x.ipynb")
    with pytest.raises(NotFound, match="no labs in"):
        labs_folder(tmp_path / "absent")
    with pytest.raises(NotFound, match="01_ring"):
        load_lab(LABS, "no_such_lab")


@pytest.mark.parametrize("lab", find_labs(LABS), ids=lambda lab: lab.name)
def test_the_reference_gets_every_point_and_the_start_does_not(lab: grader.Lab) -> None:
    assert len({check.name for check in lab.checks}) == len(lab.checks)
    result = grade(lab, read_submission(lab.reference))
    assert [check.message for check in result.checks] == [""] * len(lab.checks)
    assert result.points == lab.points_max
    begin = read_submission(lab.folder / f"{lab.name}.ipynb")
    assert grade(lab, begin).points < lab.points_max

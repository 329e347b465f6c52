"""A soak goes on where it was, on any number of processors, and tells which commit it was about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import BadRequest
from gostore.experiments import soak as module
from gostore.experiments.soak import Plan, read_tally, soak, tallies

SHORT = Plan(nodes=3, seconds=0.3, profile="none")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs are pretended; the seeds that were run."""
    ran: list[int] = []

    def pretend(seed: int, plan: Plan) -> dict[str, Any]:
        ran.append(seed)
        return line(module.commit(), seed, plan, code=module.code())

    monkeypatch.setattr(module, "commit", lambda: "c1")
    monkeypatch.setattr(module, "code", lambda: "t1")
    monkeypatch.setattr(module, "run_one", pretend)
    return ran


def line(commit: str, seed: int, plan: Plan = SHORT, **more: Any) -> dict[str, Any]:
    return {
        "commit": commit, "code": "t", "nodes": plan.nodes, "seconds": plan.seconds, "faults": plan.profile,
        "seed": seed, "violations": [], "unknown": [], "virtual_s": 1.0, "wall_s": 0.1, "coverage": {"view": seed},
        **more,
    }  # fmt: skip


def test_a_soak_goes_on_where_it_was(counted: list[int], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "tally.jsonl"
    rows = soak(range(3), SHORT, file=file)
    assert [row["seed"] for row in rows] == counted == [0, 1, 2]
    assert soak(range(5), SHORT, file=file)[:3] == rows
    assert counted == [0, 1, 2, 3, 4]
    soak(range(5), Plan(3, 0.3, "swarm"), file=file)
    assert len(counted) == 10, "another plan is another soak"
    assert [len(tally.coverage) and tally.seeds for tally in tallies(read_tally(file))] == [5, 5]


def test_a_line_counts_for_its_commit(counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tally.jsonl"
    soak(range(2), SHORT, file=file)
    monkeypatch.setattr(module, "commit", lambda: "c1a")  # a commit that does not touch the package
    soak(range(2), SHORT, file=file)
    assert counted == [0, 1]
    monkeypatch.setattr(module, "commit", lambda: "c2")
    monkeypatch.setattr(module, "code", lambda: "t2")
    soak(range(2), SHORT, file=file)
    assert counted == [0, 1, 0, 1]
    assert [(tally.commit, tally.seeds) for tally in tallies(read_tally(file))] == [("c1", 2), ("c2", 2)]
    monkeypatch.setattr(module, "commit", lambda: "c2+")  # changed and not committed: not the code of any line
    soak(range(2), SHORT, file=file)
    assert counted == [0, 1, 0, 1, 0, 1]


def test_a_line_that_was_cut_short_is_run_again(counted: list[int], tmp_path: Path) -> None:
    file = tmp_path / "tally.jsonl"
    soak(range(3), SHORT, file=file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert len(read_tally(file)) == 2
    soak(range(3), SHORT, file=file)
    assert counted == [0, 1, 2, 2]
    assert file.read_bytes() == whole


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tally.jsonl"
    for broken in ("[]", "{}", "not json", '{"seed": 1}'):
        file.write_text(json.dumps(line("c", 1)) + "\n" + broken + "\n" + json.dumps(line("c", 2)) + "\n")
        with pytest.raises(BadRequest, match=r"tally\.jsonl, line 2: expected a run"):
            read_tally(file)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 9), st.booleans(), st.booleans())))
def test_a_tally_adds_up(lines: list[tuple[str, int, bool, bool]]) -> None:
    rows = [
        line(commit, seed, violations=["broken: x\ny"] * bad, unknown=["gap"] * unsure)
        for commit, seed, bad, unsure in lines
    ]
    latest = {(row["commit"], row["seed"]): row for row in rows}
    for tally in tallies(rows):
        mine = [row for (commit, _), row in latest.items() if commit == tally.commit]
        assert tally.seeds == len(mine)
        assert sorted(tally.violated) == sorted(row["seed"] for row in mine if row["violations"])
        assert set(tally.violated.values()) <= {"broken: x"}
        assert sorted(tally.unknown) == sorted(r["seed"] for r in mine if r["unknown"] and not r["violations"])
        assert tally.coverage == {"view": sum(row["seed"] for row in mine)}
        assert f"{len(tally.violated)} violated" in tally.text()


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    alone = soak(range(1, 4), SHORT)
    seen: list[int] = []
    together = soak(range(1, 4), SHORT, jobs=2, file=tmp_path / "t", progress=lambda row: seen.append(row["seed"]))
    assert [row["trace_sha256"] for row in together] == [row["trace_sha256"] for row in alone]
    assert sorted(seen) == [1, 2, 3]
    assert {row["seed"] for row in read_tally(tmp_path / "t")} == {1, 2, 3}


def test_jobs_are_a_number() -> None:
    with pytest.raises(BadRequest, match="jobs = -1"):
        soak([1], SHORT, jobs=-1)


SOAK = """
import sys
from gostore.experiments.soak import Plan, soak
if __name__ == "__main__":
    soak(range(1, 1000), Plan(3, 0.3, "none"), jobs=2, progress=lambda row: print(row["seed"], flush=True))
"""


def test_workers_end_with_whoever_started_them(tmp_path: Path) -> None:
    """Also when it is killed and can tell nobody."""
    program = tmp_path / "soak_program.py"
    program.write_text(SOAK)
    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline().strip().isdigit(), "they are at work"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive

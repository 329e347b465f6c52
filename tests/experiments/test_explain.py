"""A failing run is made smaller, replayed and drawn; the command line says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gostore.cli import main
from gostore.client.objects import DbHandle
from gostore.experiments.explain import explain
from gostore.experiments.replay import Token, replay
from gostore.experiments.simulation import run_seed
from gostore.faults import Step
from gostore.trace import Journal

SCHEDULE = [Step(0.5, 1.5, "loss", {"probability": 0.05}), Step(0.8, 1.4, "delay", {"delay_s": 0.01, "jitter_s": 0.0})]


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third value is acknowledged and dropped: a bug that needs no fault at all."""
    original = DbHandle.set

    async def set_(self: DbHandle, container: str, key: str, value: object, *path: object) -> int:
        if container == "registers" and isinstance(value, int) and value % 3 == 0:
            return 1
        return await original(self, container, key, value, *path)

    monkeypatch.setattr(DbHandle, "set", set_)


@pytest.mark.usefixtures("forgetful")
def test_what_led_to_a_violation(tmp_path: Path) -> None:
    run = run_seed(6, seconds=4.0, profile="none", schedule=SCHEDULE)
    assert run.violations
    said: list[str] = []
    found = explain(Token.of(run, drawn=False), progress=said.append)
    assert found.steps == (), "no fault is needed"
    assert found.before == 2
    assert said, "each smaller schedule is told"
    again = replay(str(found.token))
    assert again.same
    assert again.run.violations == list(found.violations)

    # The look is at the answer that a client should not have got.
    assert again.focus is not None
    assert (again.focus.node, again.focus.kind) == ("client", "recv")
    assert found.event == again.index_of(again.focus)
    assert again.at(again.focus).time_s >= again.focus.time_s
    assert found.diagram.focus is not None
    assert found.diagram.rows[found.diagram.focus].event == again.focus
    assert len(found.glance.rows) <= len(found.diagram.rows)

    text = found.text()
    assert "0 of 2 faults are enough" in text
    assert f"--at {found.event}" in text
    figures = json.loads(json.dumps(found.to_dict()))
    assert figures["command"] == f"gostore sim --replay {found.token}"
    assert str(found.token) in figures["cell"]

    files = {file.name: file for file in found.save(tmp_path / "there" / "it")}
    assert all(file.stat().st_size for file in files.values())
    assert list(Journal.load(files["journal.jsonl"])) == list(again.journal)
    assert files["token.txt"].read_text().strip() == str(found.token)
    assert files["spacetime.svg"].read_text().startswith("<svg")
    json.loads(files["perfetto.json"].read_text())


def gostore(*arguments: str) -> tuple[int, dict[str, Any], str]:
    answer = CliRunner().invoke(main, [*arguments, "--json"])
    last = answer.output.strip().splitlines()[-1]
    return answer.exit_code, json.loads(last) if last.startswith("{") else {}, answer.output


@pytest.mark.usefixtures("forgetful")
def test_the_command_explains_the_first_seed_that_fails_and_replays_it(tmp_path: Path) -> None:
    sim = ("sim", "--seed", "4", "--seconds", "4", "--faults", "none")
    status, figures, output = gostore(*sim, "--save", str(tmp_path), "--tally", str(tmp_path / "tally"))
    assert (status, figures["violations"]) == (1, 1)
    assert "VIOLATED" in output
    assert (tmp_path / "spacetime.svg").exists()
    token = figures["replay"]["token"]
    status, again, output = gostore("sim", "--replay", token)
    assert (status, again["violations"], again["same"]) == (1, 1, True)
    assert again["trace_sha256"] == figures["trace_sha256"]
    status, _, output = gostore("sim", "--replay", token, "--at", str(figures["replay"]["event"]))
    assert "n5" in output
    assert f"event {figures['replay']['event']:,}" in output


def test_a_fine_run_has_nothing_to_explain() -> None:
    status, figures, _ = gostore("sim", "--seed", "3", "--seconds", "1", "--faults", "none", "--nodes", "3")
    assert (status, figures["violations"], figures["unknown"]) == (0, 0, 0)
    assert "replay" not in figures
    token = str(Token.of(run_seed(3, nodes=3, seconds=1.0, profile="none"), drawn=True))
    status, again, _ = gostore("sim", "--replay", token)
    assert (status, again["same"]) == (0, True)
    assert again["trace_sha256"] == figures["trace_sha256"]


def test_a_lesson_is_run_and_replayed_as_such() -> None:
    sim = ("sim", "--seed", "3", "--seconds", "1", "--faults", "none", "--nodes", "3")
    status, figures, _ = gostore(*sim, "--replication", "quorum")
    assert (status, figures["seeds"], figures["violations"]) == (0, 1, 0)
    assert figures["runs"][0]["replay"].endswith("--replication quorum")
    assert figures["trace_sha256"] != gostore(*sim)[1]["trace_sha256"]
    output = CliRunner().invoke(main, ["sim", "--help"]).output
    assert "primary_backup and quorum are lessons" in " ".join(output.split())


def test_options_that_do_not_fit() -> None:
    status, _, output = gostore("sim", "--at", "5")
    assert status == 1
    assert "--at goes with --replay" in output
    status, _, output = gostore("sim", "--replication", "quorum", "--tally", "none.jsonl")
    assert status == 1
    assert "quorum is a lesson: leave out the tally" in output
    status, _, output = gostore("sim", "--replay", "gs1.nonsense")
    assert status == 1
    assert "damaged" in output
    status, _, output = gostore("bench", "sim", "--vs", "dask")
    assert status == 1
    assert "no peer simulates this node" in output

"""The lessons are real: clients can tell what the policies do, and raft survives the same."""

from __future__ import annotations

from typing import Any

import pytest

from gostore.check import Outcome, Verdict
from gostore.core.errors import BadRequest, ConfigError
from gostore.experiments.lessons import KEYS, first_broken, teach
from gostore.experiments.replay import Token, replay
from gostore.experiments.simulation import run_seed
from gostore.faults import Step
from gostore.sim.world import CLIENT
from gostore.trace import Causality

SPLIT = [Step(1.0, 5.5, "partition", {"group": ["n1", "n2"]})]
LAGGING = [
    Step(0.2, 6.0, "skew", {"node": "n1", "offset_s": -30.0}),
    Step(0.2, 6.0, "skew", {"node": "n2", "offset_s": -20.0}),
    Step(0.3, 6.0, "loss", {"probability": 0.3}),
]
LESSONS: dict[str, tuple[dict[str, Any], list[Step]]] = {
    "a deposed primary reads": ({"replication": "primary_backup"}, SPLIT),
    "R + W <= N": ({"replication": "quorum", "read_quorum": 1, "write_quorum": 1}, SPLIT),
    "the later stamp wins": ({"replication": "quorum"}, LAGGING),
}


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_checker_finds_what_a_policy_does_not_promise_and_raft_survives_it(lesson: str) -> None:
    db, schedule = LESSONS[lesson]
    found = first_broken(range(1, 41), schedule, db=db)
    assert found is not None
    assert "no order of" in found.text()
    assert found.focus is not None
    assert (found.focus.node, found.focus.kind) == (CLIENT, "recv")
    assert found.guilty[-1].kind == "read"
    assert found.focus.time_s == pytest.approx(found.guilty[-1].returned_s, abs=0.01)
    assert found.focus.data["from"] == str(found.guilty[-1].process).removeprefix("at ")
    past = Causality(found.journal).past(found.focus)
    rows = [row.event for row in found.diagram(events_max=30).rows]
    assert rows[-1] == found.focus
    assert {event.seq for event in rows if event.node == CLIENT and event != found.focus} <= {
        event.seq for event in past if event.node == CLIENT
    }
    again = teach(found.seed, schedule, db={"replication": "raft"})
    assert again.verdict.verdict is Verdict.LINEARIZABLE, again.text()
    assert (again.focus, again.guilty) == (None, ())
    done = [operation for operation in again.history if operation.outcome is Outcome.OK]
    assert {operation.kind for operation in done} == {"read", "write"}
    assert {operation.key for operation in done} == set(KEYS)
    assert len(done) > 40
    refused = next(operation for operation in again.history if operation.outcome is not Outcome.OK)
    with pytest.raises(BadRequest, match="has no result"):
        again.told(refused)


def test_without_faults_all_is_well() -> None:
    for db in ({"replication": "quorum"}, {"replication": "primary_backup"}, {}):
        lesson = teach(1, [], seconds=2.0, db=db)
        assert lesson.verdict.verdict is Verdict.LINEARIZABLE, lesson.text()
        assert all(operation.outcome is Outcome.OK for operation in lesson.history if operation.returned_s < 1.9)


def test_a_lesson_is_a_function_of_its_seed() -> None:
    one, other = (teach(3, SPLIT, seconds=2.0, db={"replication": "quorum"}) for _ in range(2))
    assert list(one.history) == list(other.history)
    assert list(one.journal) == list(other.journal)


def test_bad_input() -> None:
    with pytest.raises(BadRequest, match="no node 'n9'"):
        teach(1, [Step(1.0, 2.0, "kill", {"node": "n9"})])
    with pytest.raises(ConfigError, match="db.write_quorum = 5"):
        teach(1, [], db={"replication": "quorum", "write_quorum": 5})


def test_a_token_remembers_the_settings() -> None:
    run = run_seed(3, seconds=1.0, profile="none", db={"replication": "quorum", "write_quorum": 1})
    assert run.replay.endswith("--replication quorum")
    token = Token.of(run, drawn=True)
    again = replay(str(token))
    assert again.token.settings == {"db": {"replication": "quorum", "write_quorum": 1}}
    assert again.same
    with pytest.raises(BadRequest, match="damaged"):
        Token.parse(str(token)[:-4])

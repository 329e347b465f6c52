"""A token names a run; its replay is that run, and can be stopped anywhere."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import BadRequest
from gostore.experiments import replay as module
from gostore.experiments.replay import Moment, Replay, Token, replay
from gostore.experiments.simulation import run_seed
from gostore.faults import Step

SEED = 11
SCHEDULE = [Step(0.5, 2.9, "kill", {"node": "n3"}), Step(1.0, 1.8, "loss", {"probability": 0.1})]


@pytest.fixture(scope="module")
def again() -> Replay:
    run = run_seed(SEED, seconds=3.0, schedule=SCHEDULE)
    return replay(str(Token.of(run, drawn=False)))


def test_a_replay_is_the_same_run_though_its_journal_has_every_message(again: Replay) -> None:
    assert again.differences == []
    assert again.same
    kinds = {event.kind for event in again.events}
    assert {"send", "recv", "wal_sync", "commit", "fault", "view"} <= kinds
    assert again.run.schedule == SCHEDULE


def test_every_moment_is_on_the_way_of_the_same_run(again: Replay) -> None:
    """Looking stops the world where it is: what a later moment shows begins with what an earlier one showed."""
    events = again.run.events
    moments = [again.at(index) for index in (0, 1, events // 3, events // 2, events - 1, events)]
    for one, other in itertools.pairwise(moments):
        assert one.index < other.index
        assert one.time_s <= other.time_s
        assert other.events[: len(one.events)] == one.events
    assert moments[-1].events == again.events[: len(moments[-1].events)]
    assert moments[0].nodes == {}
    assert set(moments[2].nodes) == {"n1", "n2", "n3", "n4", "n5"}
    assert again.at(events // 2) == moments[3], "a second look sees the same"


def test_a_moment_shows_the_states(again: Replay) -> None:
    kill = next(e for e in again.events if e.kind == "fault" and e.data["fault"] == "kill")
    moment = again.at(kill)
    assert moment.events[-1] == kill
    assert moment.nodes["n3"]["life"] == "killed"
    assert moment.nodes["n3"]["status"] is None
    assert moment.nodes["n1"]["status"]["members"]["n3"]["state"] == "online", "nobody has noticed yet"
    assert "killed" in moment.text()
    assert "<td>killed</td>" in moment._repr_html_()
    later = next(
        e for e in again.events if e.kind == "member" and e.data["member"] == "n3" and e.data["state"] == "offline"
    )
    assert again.at(later).nodes[later.node]["status"]["members"]["n3"]["state"] == "offline"


def test_the_stopped_cluster_can_be_looked_into(again: Replay) -> None:
    moment = again.at(again.run.events // 2)
    node = moment.cluster.sim.node("n1")
    assert node.state == "running"
    assert node.disk.files()
    again.close()
    assert moment.cluster.sim.scheduler.dead


def test_moments_that_are_not_there(again: Replay) -> None:
    wrong: Any
    for wrong in (-1, again.run.events + 1, 1.5, True, "now"):
        with pytest.raises(BadRequest, match="this run has the events 0 to"):
            again.at(wrong)
    with pytest.raises(BadRequest, match="not of this run"):
        again.at(replace(again.events[0], seq=10**6))


steps = st.builds(
    Step,
    at_s=st.floats(0, 100),
    until_s=st.floats(0, 100),
    word=st.sampled_from(["kill", "loss", "partition"]),
    arguments=st.dictionaries(st.text(max_size=8), st.one_of(st.text(), st.floats(0, 1), st.lists(st.text()))),
)


@given(
    seed=st.integers(0, 2**40),
    nodes=st.integers(1, 100),
    seconds=st.floats(0.1, 3600),
    profile=st.text(max_size=10),
    schedule=st.none() | st.lists(steps, max_size=5).map(tuple),
    digest=st.binary(max_size=32),
)
def test_a_token_holds_all_of_it(
    seed: int, nodes: int, seconds: float, profile: str, schedule: tuple[Step, ...] | None, digest: bytes
) -> None:
    token = Token(seed, nodes, seconds, profile, schedule, digest.hex())
    assert Token.parse(f"  {token}\n") == token
    assert token.versions["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert token.versions["commit"]


@given(st.data())
def test_a_damaged_token_is_told(data: st.DataObject) -> None:
    good = str(Token(7, 5, 30.0, "swarm", tuple(SCHEDULE), "ab" * 32))
    where = data.draw(st.integers(0, len(good) - 1))
    what = data.draw(st.sampled_from(["cut", "replace", "insert"]))
    letter = data.draw(st.sampled_from("Aa0_-=. é"))
    bad = {
        "cut": good[:where],
        "replace": good[:where] + letter + good[where + 1 :],
        "insert": good[:where] + letter + good[where:],
    }[what]
    try:
        read = str(Token.parse(bad))
    except BadRequest:
        return
    assert read == good, "what is read is what was written"


def test_a_token_of_another_python_is_refused(again: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = replace(again.token, versions={**again.token.versions, "python": "3.99"})
    with pytest.raises(BadRequest, match=r"Python 3\.99.*anyway=True"):
        replay(str(elsewhere))
    assert replay(elsewhere, anyway=True).differences == [
        f"python was 3.99, here it is {sys.version_info[0]}.{sys.version_info[1]}"
    ]
    older = replace(again.token, versions={**again.token.versions, "commit": "abc"})
    assert replay(older).differences == [f"commit was abc, here it is {module.commit()}"]


def test_the_commit_of_a_package_without_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise OSError("there is no git")

    monkeypatch.setattr(module.subprocess, "run", no_git)
    assert module.commit.__wrapped__().startswith("version ")
    assert module.code.__wrapped__().startswith("version ")


def test_an_empty_moment_is_shown() -> None:
    assert Moment(0, 0.0, {}, (), None).text().startswith("event 0, 0.000000 virtual s")

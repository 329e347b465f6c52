"""The panel of the consensus groups: of made-up groups, and of simulated clusters to which something happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gostore as gs
from gostore.sim.cluster import SimCluster
from gostore.viz.consensus import GROUPS_MAX, consensus_panel, terms_led
from gostore.viz.graph import graph_of
from gostore.viz.scene import cluster_picture

NODES = [f"n{i}" for i in range(1, 6)]


def panel(groups: list[dict[str, Any]], replication: str = "raft") -> dict[str, Any]:
    return json.loads(json.dumps(consensus_panel({"groups": groups, "replication": replication}, NODES)))  # type: ignore[no-any-return]


def cells(row: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    return {cell["id"]: (cell["look"], cell["member"], cell["text"]) for cell in row["cells"]}


def test_when_all_is_well_every_bar_is_full(feed: ModuleType) -> None:
    found = panel(feed.groups())
    assert found["words"] == "17 groups · 17 quiet"
    assert (found["trouble"], found["note"]) == ("", "")
    assert [row["id"] for row in found["rows"]] == ["masters", *(f"shard {i}" for i in range(16))]
    assert {cell["fill"] for row in found["rows"] for cell in row["cells"]} == {1.0}
    shard = found["rows"][4]
    assert (shard["word"], shard["leader"], shard["term"], shard["commit"]) == ("n4", "n4", 4, "811")
    # In launch order, whoever leads: a change of the leader moves nothing.
    assert [cell["id"] for cell in shard["cells"]] == ["n1", "n4", "n5"]


def test_every_trouble_has_its_look(feed: ModuleType) -> None:
    found = panel(feed.troubled())
    rows = {row["id"]: row for row in found["rows"]}
    assert found["words"] == "17 groups · 3 quiet · 1 snapshot on the way"
    assert found["trouble"] == "no quorum: shard 4 · election: shard 0 · no leader: shards 9, 14"
    assert [rows[f"shard {i}"]["word"] for i in (0, 4, 9)] == ["election", "no quorum", "no leader"]
    assert cells(rows["shard 0"])["n1"] == ("stands", "voter", "stands")
    assert cells(rows["shard 1"])["n3"] == ("snapshot", "voter", "37 %")
    assert cells(rows["shard 2"])["n1"] == ("probe", "learner", "?")
    assert cells(rows["shard 2"])["n4"] == ("follower", "voter", "\u22121")
    assert cells(rows["shard 3"])["n4"] == ("leader", "voter", "+7")
    assert cells(rows["shard 3"])["n5"] == ("gone", "voter", "\u221212")
    assert cells(rows["shard 5"])["n1"] == ("deposed", "voter", "t3")
    assert cells(rows["shard 6"])["n4"][:2] == ("follower", "leaving")
    assert cells(rows["shard 6"])["n1"][:2] == ("follower", "voter")


def test_a_snapshot_on_its_way_is_seen_although_its_receiver_loses_patience(feed: ModuleType) -> None:
    group = feed.group("shard 0", ["n1", "n2", "n3"])
    group["replicas"]["n2"].update(role="pre-candidate", state="snapshot", last=1, sent_bytes=50, size_bytes=100)
    (cell,) = (cell for cell in panel([group])["rows"][0]["cells"] if cell["id"] == "n2")
    assert (cell["look"], cell["fill"], cell["text"]) == ("snapshot", 0.5, "50 %")


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_bar_is_shorter_the_more_is_missing_and_its_words_fit(a: int, b: int) -> None:
    def cell(lag: int) -> dict[str, Any]:
        replica = {"role": "follower", "last": 10**12 - lag, "state": "replicate", "stale": False, "down": False}
        group = {
            "name": "shard 0", "kind": "raft", "state": "led", "leader": "n1", "term": 1, "quiet": False,
            "last": 10**12, "committed": 10**12, "voters": ["n2"], "learners": [], "outgoing": [],
            "replicas": {"n2": {**replica, "member": True}},
        }  # fmt: skip
        found: dict[str, Any] = panel([group])["rows"][0]["cells"][0]
        return found

    less, more = cell(min(a, b)), cell(max(a, b))
    assert 0 <= more["fill"] <= less["fill"] <= 1
    assert all(len(one["text"]) <= 5 for one in (less, more))
    assert (less["text"] == "") == (min(a, b) == 0)


def test_many_groups_are_counted_and_the_first_are_shown(feed: ModuleType) -> None:
    found = panel(feed.groups(5, 1000))
    assert len(found["rows"]) == GROUPS_MAX
    assert found["words"] == f"1001 groups · 1001 quiet · the first {GROUPS_MAX} are shown"


@pytest.mark.parametrize(
    ("replication", "kind", "words"),
    [
        ("raft", "raft", ""),
        ("primary_backup", "primary_backup", "shards: primary_backup, no consensus; its generations stand for terms"),
        ("quorum", None, "shards: quorum, which has no leaders and no terms"),
    ],
)
def test_a_policy_without_consensus_is_named(feed: ModuleType, replication: str, kind: str | None, words: str) -> None:
    shards = [feed.group("shard 0", ["n1", "n2"], kind=kind)] if kind else []
    assert panel([feed.group("masters", NODES), *shards], replication)["note"] == words


def test_nothing_known_is_said() -> None:
    assert panel([]) == {"words": "", "trouble": "", "note": "nothing is known of consensus groups", "rows": []}


def test_a_node_tells_what_it_leads_in_which_terms(feed: ModuleType) -> None:
    groups = [feed.group("masters", NODES, term=1), feed.group("shard 0", ["n1", "n2"]), feed.group("shard 2", ["n1"])]
    assert terms_led(groups, "n1") == "term 1: masters · term 4: shards 0, 2"
    picture = cluster_picture(graph_of(feed.snapshot(5, groups=groups)))
    facts = {node["id"]: dict(node["facts"])["leads"] for node in picture["nodes"]}
    assert (facts["n1"], facts["n2"]) == ("term 1: masters · term 4: shards 0, 2", "nothing")


def test_a_group_without_a_leader_is_in_the_headline(feed: ModuleType) -> None:
    chips = cluster_picture(graph_of(feed.snapshot(5, groups=feed.troubled())))["chips"]
    assert ["suspect", "4 groups without a leader"] in chips


# -- simulated clusters


@pytest.fixture
def simulated(request: pytest.FixtureRequest) -> Iterator[SimCluster]:
    """Three nodes and one shard; parameters are settings of ``db``."""
    with gs.simulate(3, seed=7, db={"shards": 1, "snapshot_entries": 16, **getattr(request, "param", {})}) as cluster:
        cluster.db.create_container_sync("t")
        cluster.wait_settled_sync()
        yield cluster


def shard(cluster: SimCluster) -> dict[str, Any]:
    picture = cluster_picture(graph_of(cluster.snapshot_sync()))
    (row,) = (row for row in picture["consensus"]["rows"] if row["id"] == "shard 0")
    return row  # type: ignore[no-any-return]


def until(
    cluster: SimCluster, what: str, fits: Callable[[dict[str, Any]], object], *, step_s: float = 0.02
) -> list[Any]:
    """The rows of the shard up to the first that fits, ``step_s`` of virtual time apart."""
    rows = []
    for _ in range(3000):
        rows.append(shard(cluster))
        if fits(rows[-1]):
            return rows
        cluster.sleep_sync(step_s)
    raise AssertionError(f"{what} was not to be seen: {rows[-1]}")


def test_the_death_of_a_leader_its_election_and_the_new_term_are_seen(simulated: SimCluster) -> None:
    before = shard(simulated)
    assert before["look"] == "led"
    dead = before["leader"]
    simulated.nodes[dead].kill_sync()
    rows = until(simulated, "a new leader", lambda row: row["look"] == "led")
    assert rows[0]["look"] == "leaderless", "nobody has noticed yet"
    assert rows[-1]["leader"] not in ("", dead)
    assert rows[-1]["term"] > before["term"]
    assert [row["term"] for row in rows] == sorted(row["term"] for row in rows)
    assert cells(rows[-1])[dead][0] == "gone"


def test_an_election_that_nobody_can_win_is_seen(simulated: SimCluster) -> None:
    leader = shard(simulated)["leader"]
    others = [name for name in simulated.nodes if name != leader]
    fault = simulated.faults.partition_sync([leader], others[:1], others[1:])
    rows = until(simulated, "an election", lambda row: row["look"] == "election")
    assert "stands" in {look for look, _, _ in cells(rows[-1]).values()}
    simulated.faults.heal_sync(fault)
    until(simulated, "a leader", lambda row: row["look"] == "led")


def test_a_majority_that_is_gone_is_named(simulated: SimCluster) -> None:
    leader = shard(simulated)["leader"]
    for name in [name for name in simulated.nodes if name != leader]:
        simulated.nodes[name].kill_sync()
    until(simulated, "the lack of a quorum", lambda row: row["word"] == "no quorum")


def test_a_node_that_lags_behind_the_log_is_sent_a_snapshot_before_ones_eyes(simulated: SimCluster) -> None:
    before = shard(simulated)
    late = next(name for name in simulated.nodes if name != before["leader"])
    simulated.nodes[late].kill_sync()
    for number in range(40):
        simulated.db.set_sync("t", f"k{number}", "x" * 50_000)
    assert cells(shard(simulated))[late][0] == "gone"
    slow = simulated.faults.delay_sync(0.02)
    simulated.nodes[late].restart_sync()

    def cell(row: dict[str, Any]) -> dict[str, Any]:
        return next(one for one in row["cells"] if one["id"] == late)  # type: ignore[no-any-return]

    rows = until(simulated, "its installation", lambda row: cell(row)["installed"] == 1)
    fills = [cell(row)["fill"] for row in rows if cell(row)["look"] == "snapshot"]
    assert fills == sorted(fills)
    assert len({*fills}) >= 4, "its progress is seen"
    assert all(fill <= 1 for fill in fills)
    simulated.faults.heal_sync(slow)
    until(simulated, "a full bar", lambda row: (cell(row)["look"], cell(row)["text"]) == ("follower", ""))


@pytest.mark.parametrize("simulated", [{"replication": "primary_backup"}], indirect=True)
def test_primary_backup_gives_what_it_has(simulated: SimCluster) -> None:
    simulated.db.set_sync("t", "k", "v")
    snapshot = simulated.snapshot_sync()
    found = consensus_panel(snapshot, list(simulated.nodes))
    assert snapshot["replication"] == "primary_backup"
    assert "primary_backup, no consensus" in found["note"]
    row = shard(simulated)
    assert row["leader"] in simulated.nodes
    assert row["term"] > 0
    assert int(row["commit"].replace(",", "")) > 0


def test_who_does_not_look_does_not_pay(simulated: SimCluster) -> None:
    asked: list[str] = []
    ask = simulated._ask_all

    async def counted(function: str, timeout_s: float) -> Any:
        asked.append(function)
        return await ask(function, timeout_s)

    simulated._ask_all = counted  # type: ignore[method-assign]
    simulated.wait_settled_sync()
    status = simulated.nodes["n1"].status_sync()
    simulated.stop_sync()
    assert asked
    assert "groups" not in asked
    assert "groups" not in status
    assert simulated.snapshot_sync()["groups"] == []

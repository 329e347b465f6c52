"""The testbed on real nodes: readiness, settling, faults, policies, snapshots and waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gostore as gs
from gostore.core.errors import BadRequest, NotSupported, PolicyError, Timeout
from gostore.testbed import Testbed

pytestmark = pytest.mark.processes


@pytest.fixture
def cluster() -> Iterator[Testbed]:
    with gs.launch(4, db={"shards": 4}) as cluster:
        yield cluster


class EverythingOnTheFirst:
    """A placement without a ring: the owners are the first nodes by name."""

    def __init__(self, nodes: dict[str, float], replicas: int, tokens_per_node: int) -> None:
        self.names = tuple(sorted(nodes)[:replicas])

    def owners(self, key: bytes) -> tuple[str, ...]:
        return self.names


class Broken(EverythingOnTheFirst):
    def owners(self, key: bytes) -> tuple[str, ...]:
        return self.nothing  # type: ignore[attr-defined, no-any-return]


def test_kill_settle_restart(cluster: Testbed) -> None:
    files = {f"/f/{number}": bytes([number]) * 20_000 for number in range(12)}
    cluster.fs.write_many_sync(files.items())
    since = cluster.events.position
    cluster.nodes["n3"].kill_sync()
    cluster.wait_settled_sync()
    cluster.wait_state_sync("n3", "offline")
    member = cluster.events.wait_for_sync("member", where=lambda e: e.data["member"] == "n3", since=since)
    assert member.node in cluster.nodes
    assert {path: cluster.fs.read_sync(path) for path in files} == files
    assert cluster.fs.check_sync()["under_replicated"] == 0
    cluster.nodes["n3"].restart_sync()
    cluster.wait_settled_sync()
    assert [node.state for node in cluster.nodes.values()] == ["online"] * 4
    assert {path: cluster.fs.read_sync(path, via="n3") for path in files} == files
    assert not cluster.events.complete  # what n3 had not sent when it was killed is unknown


def test_a_node_can_be_added(cluster: Testbed) -> None:
    added = cluster.add_node_sync(ring={"tokens_per_node": 32})
    assert (added.name, added.state) == ("n5", "online")
    cluster.wait_settled_sync()
    assert list(added.status_sync()["members"]) == ["n1", "n2", "n3", "n4", "n5"]
    with pytest.raises(BadRequest, match="there is a node 'n2' already"):
        cluster.add_node_sync("n2")


def test_a_policy_is_installed_while_the_cluster_runs(cluster: Testbed) -> None:
    cluster.fs.write_sync("/kept", b"x" * 10_000)
    cluster.install_sync("placement", EverythingOnTheFirst)
    assert {node.status_sync()["placement"] for node in cluster.nodes.values()} == {"EverythingOnTheFirst"}
    assert cluster.locate_sync("any key")["owners"] == ["n1", "n2", "n3"]
    cluster.wait_settled_sync()
    assert cluster.fs.read_sync("/kept", via="n4") == b"x" * 10_000
    with pytest.raises(PolicyError) as caught:
        cluster.install_sync("placement", Broken)
    assert "return self.nothing" in caught.value.message
    assert "AttributeError" in caught.value.message
    assert cluster.snapshot_sync()["placement"] == "EverythingOnTheFirst"
    cluster.install_sync("placement", None)
    assert cluster.snapshot_sync()["placement"] == "HashRing"


def test_a_kept_cluster_comes_back_with_its_data_and_takes_a_new_policy(tmp_path: Path) -> None:
    with gs.launch(3, path=tmp_path, db={"shards": 4}) as cluster:
        cluster.fs.write_sync("/large", b"x" * 200_000)
        cluster.db.create_container_sync("box")
        cluster.db.set_sync("box", "k", [1, 2])
        cluster.wait_settled_sync()
    with gs.launch(path=tmp_path, placement=EverythingOnTheFirst) as cluster:
        assert list(cluster.nodes) == ["n1", "n2", "n3"]
        assert cluster.snapshot_sync()["placement"] == "EverythingOnTheFirst"
        assert cluster.db.get_sync("box", "k") == [1, 2]
        assert cluster.fs.read_sync("/large") == b"x" * 200_000
        assert cluster.fs.check_sync()["orphans"] == 0


def test_a_partition_is_seen_and_heals(cluster: Testbed) -> None:
    cluster.faults.isolate_sync("n4")
    for name in ("n1", "n2", "n3"):
        cluster.wait_until_sync(
            lambda statuses, name=name: [
                (name, "sees n4") for n, s in statuses.items() if n == name and s["members"]["n4"]["state"] == "online"
            ],
            "rid of n4",
            60.0,
        )
    snapshot = cluster.snapshot_sync()
    assert sum(link["blocked"] for link in snapshot["links"]) == 6
    cluster.faults.heal_sync()
    cluster.wait_settled_sync()


def test_the_snapshot_holds_what_a_view_needs(cluster: Testbed) -> None:
    cluster.wait_settled_sync()
    snapshot = cluster.snapshot_sync()
    assert (snapshot["name"], snapshot["world"], snapshot["running"]) == ("gostore", "processes", True)
    assert (snapshot["replicas"], snapshot["shards"], snapshot["placement"]) == (3, 4, "HashRing")
    assert snapshot["master"] in cluster.nodes
    assert [node["name"] for node in snapshot["nodes"]] == ["n1", "n2", "n3", "n4"]
    node = snapshot["nodes"][0]
    assert (node["state"], node["alive"], node["paused"], node["stale"]) == ("online", True, False, False)
    assert sorted(shard for node in snapshot["nodes"] for shard in node["shards"]) == [0, 1, 2, 3]
    assert snapshot["arcs"][0][0] < snapshot["arcs"][1][0]
    assert all(len(owners) == 3 for _, _, owners in snapshot["arcs"])
    assert snapshot["replication"] == "raft"
    groups = {group["name"]: group for group in snapshot["groups"]}
    assert list(groups) == ["masters", "shard 0", "shard 1", "shard 2", "shard 3"]
    assert {group["leader"] for group in groups.values()} <= set(cluster.nodes)
    assert groups["masters"]["leader"] == snapshot["master"]
    assert all(len(groups[f"shard {shard}"]["replicas"]) == 3 for shard in range(4))
    cluster.nodes["n4"].kill_sync()
    node = cluster.snapshot_sync()["nodes"][3]
    assert (node["alive"], node["pid"], node["stale"], node["shards"]) == (False, None, True, [])
    heard: list[str] = []
    cluster.on_stop(lambda: heard.append("stopped"))
    cluster.stop_sync()
    assert heard == ["stopped"]
    assert cluster.snapshot_sync()["running"] is False


def test_waiting_in_vain_names_the_node_and_shows_its_log(cluster: Testbed) -> None:
    with pytest.raises(Timeout) as caught:
        cluster.wait_state_sync("n2", "offline", timeout_s=0.2)
    message = caught.value.message
    assert message.startswith(
        "the cluster is not of the opinion that n2 is offline after 0.2 s: n1 thinks that n2 is online;"
    )
    with pytest.raises(BadRequest, match="there is no node 'n9'; there are n1, n2, n3, n4"):
        cluster.wait_state_sync("n9", "offline")
    cluster.nodes["n2"].pause_sync()
    assert cluster.nodes["n2"].state == "paused"
    cluster.wait_settled_sync()
    cluster.nodes["n2"].resume_sync()
    cluster.wait_settled_sync()


def test_more_events_are_collected_on_request(cluster: Testbed) -> None:
    async def main() -> None:
        await cluster.watch("fs", "message", messages_a_s=-1)
        since = cluster.events.position
        await cluster.fs.write("/watched", b"x")
        event = await cluster.events.wait_for("fs_write", since=since)
        assert event.data["path"] == "/watched"
        await cluster.events.wait_for("recv", since=since, where=lambda e: e.data["service"] == "db")
        assert cluster.events.complete

    asyncio.run(main())


def test_what_nodes_tell(cluster: Testbed) -> None:
    statistics: dict[str, Any] = cluster.statistics_sync()
    assert list(statistics) == ["n1", "n2", "n3", "n4"]
    assert statistics["n1"]["comm"]["peers"] >= 3
    assert cluster.rest_url_sync() == cluster.nodes["n1"].rest_url
    assert len(cluster.pids()) == 4
    assert cluster.call_sync("n3", "admin", "ping")["name"] == "n3"
    assert cluster.locate_sync("a key")["owners"] == cluster.locate_sync(b"a key")["owners"]
    cluster.fs.write_sync("/where", b"x" * 10_000)
    assert cluster.locate_file_sync("/where")["chunks"][0]["held"]


def test_pictures_come_from_elsewhere(cluster: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(cluster.graph().nodes) == ["n1", "n2", "n3", "n4"]
    monkeypatch.setitem(__import__("sys").modules, "gostore.viz.figures", None)
    with pytest.raises(NotSupported, match=r"plot\(\) needs .*; run: pip install 'gostore\[notebook\]'"):
        cluster.plot()

"""The process cluster, with little nodes: life, death, and what people are told."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gostore.client.nodes import Life
from gostore.core.errors import (
    BadRequest,
    ConfigError,
    Forgotten,
    NotFound,
    NotSupported,
    PolicyError,
    Timeout,
    Unavailable,
    Unreachable,
)
from gostore.launch.processes import ProcessCluster

from .conftest import HERE, alive, wait_gone

Little = Callable[..., ProcessCluster]


def test_with_starts_and_stops_and_leaves_nothing(little: Little) -> None:
    cluster = little(3)
    with cluster as same:
        assert same is cluster
        pids, zygote = cluster.pids(), cluster._place.process.pid
        assert len(pids) == 3
        assert [node.state for node in cluster.nodes.values()] == ["online"] * 3
        assert 0 < cluster.ready_s < 60
    assert alive([*pids, zygote]) == []
    assert not cluster._place.root.exists()
    with pytest.raises(Unavailable, match="the cluster does not run"):
        cluster.statistics_sync()
    with pytest.raises(Unavailable, match="launch another one"):
        cluster.start_sync()


def test_async_with_and_await_work_on_the_users_loop(little: Little) -> None:
    async def main() -> None:
        async with little(2) as cluster:
            loop = asyncio.get_running_loop()
            await cluster.wait_ready()
            assert asyncio.get_running_loop() is loop
            assert (await cluster.call("n2", "admin", "statistics"))["process"]["pid"] == cluster.nodes["n2"].pid
            with pytest.raises(NotFound, match="nothing is here"):
                await cluster.call("n2", "admin", "missing")
        other = await little(1)
        await other.stop()

    asyncio.run(main())


def test_the_repr_is_the_same_for_every_run(little: Little) -> None:
    with little(2) as cluster:
        assert repr(cluster) == "<processes cluster 'gostore': 2 of 2 nodes run>"
        assert repr(cluster.nodes) == "{n1: online, n2: online}"
        assert repr(cluster.nodes["n2"]) == "<node n2: online>"
        cluster.nodes["n2"].kill_sync()
        assert repr(cluster) == "<processes cluster 'gostore': 1 of 2 nodes run>"
        assert repr(cluster.faults.active) == "()"
        assert "<td>n2</td><td>killed</td>" in cluster._repr_html_()
    assert repr(cluster) == "<processes cluster 'gostore': not running>"


def test_kill_and_restart_keep_the_ports(little: Little) -> None:
    with little(3) as cluster:
        before, pid = cluster.nodes["n2"].rest_url, cluster.nodes["n2"].pid
        assert pid is not None
        address = cluster._processes["n2"].address
        cluster.nodes["n2"].kill_sync()
        assert alive([pid]) == []
        assert (cluster.nodes["n2"].state, cluster.nodes["n2"].pid, cluster.nodes["n2"].rest_url) == (
            "killed",
            None,
            None,
        )
        with pytest.raises(BadRequest, match="kill does not fit: n2 is killed"):
            cluster.nodes["n2"].kill_sync()
        cluster.nodes["n2"].restart_sync()
        assert cluster._processes["n2"].address == address
        assert cluster.nodes["n2"].rest_url == before
        cluster.wait_ready_sync()
        assert cluster.nodes["n2"].logs() == "n2 begins\nn2 begins"
        kinds = [
            (event.node, event.data["fault"], event.data["arguments"]) for event in cluster.events.of_kind("fault")
        ]
        assert kinds == [("testbed", "kill", {"node": "n2"}), ("testbed", "restart", {"node": "n2"})]


def test_restart_of_a_running_node_kills_it_first(little: Little) -> None:
    with little(2) as cluster:
        pid = cluster.nodes["n2"].pid
        cluster.nodes["n2"].restart_sync()
        assert cluster.nodes["n2"].pid not in (None, pid)


def test_restart_with_the_port_taken_is_one_clear_error(little: Little) -> None:
    with little(2) as cluster:
        cluster.nodes["n2"].kill_sync()
        port = cluster._processes["n2"].ports["tcp"]
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind(("127.0.0.1", port))
            stranger.listen()
            with pytest.raises(ConfigError, match=f"n2: tcp_port = {port}: cannot be bound on 127.0.0.1"):
                cluster.nodes["n2"].restart_sync()
        cluster.nodes["n2"].restart_sync()
        cluster.wait_ready_sync()


def test_pause_stops_answers_and_resume_brings_them_back(little: Little) -> None:
    with little(3) as cluster:
        cluster.nodes["n3"].pause_sync()
        assert cluster.nodes["n3"].state == "paused"
        with pytest.raises(Timeout):
            cluster.call_sync("n3", "admin", "table", timeout_s=0.3)
        snapshot = cluster.snapshot_sync()
        assert [node["stale"] for node in snapshot["nodes"]] == [False, False, True]
        assert snapshot["nodes"][2]["paused"]
        with pytest.raises(BadRequest, match="pause does not fit: n3 is paused"):
            cluster.nodes["n3"].pause_sync()
        cluster.nodes["n3"].resume_sync()
        cluster.wait_ready_sync()
        with pytest.raises(BadRequest, match="resume does not fit: n3 is running"):
            cluster.nodes["n3"].resume_sync()


def test_a_crash_is_noticed_and_named_by_whoever_waits(little: Little) -> None:
    with little(3) as cluster:
        with pytest.raises(Forgotten, match="n2"):
            cluster.call_sync("n2", "admin", "exit", 9, timeout_s=30.0)
        with pytest.raises(Timeout) as caught:
            cluster.wait_ready_sync(timeout_s=0.5)
        message = caught.value.message
        assert message.startswith("the cluster is not ready after 0.5 s: n2 ended with status 9")
        assert message.endswith("the end of the log of n2:\n    n2 begins")
        assert cluster.nodes["n2"].life is Life.CRASHED
        assert not cluster.events.complete


def test_a_call_to_a_node_that_is_killed_ends_at_once(little: Little) -> None:
    async def main() -> None:
        async with little(2) as cluster:
            await cluster.nodes["n2"].pause()
            call = asyncio.ensure_future(cluster.call("n2", "admin", "table", timeout_s=100.0))
            await cluster.call("n1", "admin", "table")
            await cluster.nodes["n2"].kill()
            with pytest.raises((Forgotten, Unreachable), match="n2"):
                await call

    asyncio.run(main())


def test_start_up_errors_are_one_clear_error(little: Little) -> None:
    with pytest.raises(ConfigError, match=r"^n\d: db.shards = 13: this one is unlucky\nthe end of the log"):
        little(3, db={"shards": 13}).start_sync()
    with pytest.raises(ConfigError) as caught:
        little(3, db={"shards": 14}).start_sync()
    assert caught.value.message == (
        "n2 did not start: it ended with status 9\nthe end of the log of n2:\n    n2 begins"
    )
    with pytest.raises(
        Timeout, match=r"^n2 does not answer 1 s after its start\nthe end of the log of n2:\n    n2 begins"
    ):
        little(3, db={"shards": 15}, timeout_s=1.0).start_sync()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 0}, "nodes = 0: allowed are 1 to 64"),
        ({"nodes": "5"}, "nodes = '5': allowed are 1 to 64"),
        ({"nodes": True}, "nodes = True: allowed are 1 to 64"),
        ({"db": {"shards": 0}}, r"db.shards = 0: allowed are values from 1 to 1024"),
        ({"db": {"shard": 1}}, r"db.shard: there is no such setting"),
        ({"colour": 1}, "colour: there is no such setting"),
        ({"join": ("a:1",)}, "join = .*the launcher sets it"),
        ({"secret": "short"}, "secret: 5 characters; at least 16"),
        ({"name": "no spaces"}, "cluster = 'no spaces': allowed is what matches"),
    ],
)
def test_bad_arguments_are_told_before_anything_runs(little: Little, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        little(**arguments)


def test_a_directory_keeps_the_cluster(little: Little, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    with little(2, path=path, db={"shards": 4}) as cluster:
        ports = {name: process.ports for name, process in cluster._processes.items()}
        added = cluster.add_node_sync()
        assert added.name == "n3"
        with pytest.raises(ConfigError, match=r"kept': a cluster runs there already; stop it, or take another path"):
            little(2, path=path)
    assert "n1 ends" in (path / "n1" / "node.log").read_text()  # it was asked, not killed
    assert (path / "cluster.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match=r"nodes = 5: .*kept holds a cluster of 3; start it with nodes = 3"):
        little(5, path=path)
    with pytest.raises(ConfigError, match="db.shards = 8: this cluster was born with 4, which is fixed"):
        little(3, path=path, db={"shards": 8})
    with little(None, path=path) as cluster:
        assert list(cluster.nodes) == ["n1", "n2", "n3"]
        assert {name: cluster._processes[name].ports for name in ("n1", "n2")} == ports
        assert cluster._config("n1", ()).db.shards == 4


def test_a_kept_cluster_takes_new_ports_when_a_stranger_has_one(little: Little, tmp_path: Path) -> None:
    with little(2, path=tmp_path) as cluster:
        port = cluster._processes["n2"].ports["tcp"]
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with little(2, path=tmp_path) as cluster:
            assert cluster._processes["n2"].ports["tcp"] != port
    record = json.loads((tmp_path / "cluster.json").read_text())
    assert record["nodes"]["n2"]["ports"]["tcp"] != port


@pytest.mark.parametrize("content", ["", "[]", '{"version": 99}'])
def test_a_damaged_record_is_refused_by_name(little: Little, tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster.json").write_text(content)
    with pytest.raises(ConfigError, match=r"cluster.json: (is damaged|has version)"):
        little(2, path=tmp_path)


def test_a_path_that_is_no_directory_is_refused(little: Little, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"path = '.*file': .*; expected a directory that can be read and written"):
        little(2, path=tmp_path / "file")


def test_faults_reach_both_ends_and_survive_a_restart(little: Little) -> None:
    def links(node: str) -> list[list]:
        return cluster.call_sync(node, "admin", "links")

    with little(3) as cluster:
        fault = cluster.faults.partition_sync("n1", ["n2"])
        loss = cluster.faults.loss_sync(0.25, source="n1", target=cluster.nodes["n3"])
        assert links("n1") == [["out", "n2", 1.0], ["out", "n3", 0.25], ["in", "n2", 1.0]]
        assert links("n2") == [["out", "n1", 1.0], ["in", "n1", 1.0]]
        assert links("n3") == []
        cluster.nodes["n2"].restart_sync()
        assert links("n2") == [["out", "n1", 1.0], ["in", "n1", 1.0]]
        cluster.nodes["n3"].pause_sync()
        isolation = cluster.faults.isolate_sync("n3", direction="in")
        cluster.nodes["n3"].resume_sync()
        assert links("n3") == [["in", "n1", 1.0], ["in", "n2", 1.0]]
        assert {tuple(link.values())[:3] for link in cluster.snapshot_sync()["links"]} == {
            ("n1", "n2", True), ("n2", "n1", True), ("n1", "n3", True), ("n2", "n3", True)
        }  # fmt: skip
        cluster.faults.heal_sync(isolation)
        assert links("n1") == [["out", "n2", 1.0], ["out", "n3", 0.25], ["in", "n2", 1.0]]
        cluster.faults.heal_sync()
        assert links("n1") == links("n2") == links("n3") == []
        assert cluster.faults.active == ()
        assert repr((fault, loss)) == (
            "(partition(groups=[['n1'], ['n2']]), loss(probability=0.25, source=['n1'], target=['n3']))"
        )


def test_what_processes_cannot_do_says_so(little: Little) -> None:
    with little(1) as cluster:
        for word, arguments in (("power_cut", ()), ("skew", (1.0,)), ("slow_disk", (1.0,)), ("full_disk", ())):
            with pytest.raises(
                NotSupported, match=rf"faults.{word}: a cluster of processes cannot do that \(.*simulated"
            ):
                getattr(cluster.faults, f"{word}_sync")("n1", *arguments)
        assert cluster.events.of_kind("fault") == []


class MyRing:
    def __init__(self, nodes: dict, replicas: int, tokens_per_node: int) -> None:
        self.names = sorted(nodes)[:replicas]

    def owners(self, key: bytes) -> tuple:
        return tuple(self.names)


def test_a_policy_travels_to_every_node(little: Little) -> None:
    with little(2, policies={"placement": MyRing}) as cluster:
        for node in cluster.nodes:
            policy = cluster.call_sync(node, "admin", "policy")["placement"]
            assert policy["name"] == "MyRing"
            assert "def owners(self, key: bytes)" in policy["source"]
    with pytest.raises(PolicyError, match="give the class itself"):
        little(2, policies={"placement": 3})


def test_a_cluster_that_is_dropped_ends(little: Little, tmp_path: Path) -> None:
    from gostore.launch.place import Place

    place = Place(None, entry="little_node:main")
    place.boot()
    cluster = ProcessCluster(place, 2).start_sync()
    cluster.snapshot_sync()
    pids = [*cluster.pids(), place.process.pid]
    del cluster
    gc.collect()
    wait_gone(pids)


def owner(how: str) -> tuple[subprocess.Popen[str], Path, list[int]]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "cluster_owner.py"), how],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate()[1])
    root, *pids = line.split()
    return process, Path(root), [int(pid) for pid in pids]


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("exception", 1), ("exit", 3)])
def test_nothing_is_left_when_the_interpreter_ends(how: str, status: int) -> None:
    process, root, pids = owner(how)
    assert len(pids) == 4
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert alive(pids) == []
    assert not root.exists()
    assert ("something else went wrong" in errors) == (how == "exception")
    assert len(re.findall("Traceback", errors)) == (how == "exception")


def test_nothing_is_left_when_the_interpreter_is_killed() -> None:
    process, root, pids = owner("killed")
    process.kill()
    process.communicate(timeout=60)
    wait_gone(pids)
    assert not root.exists()


def test_an_interrupt_leaves_the_cluster_running_and_usable() -> None:
    process, _, pids = owner("interrupt")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the whole group
    out, errors = process.communicate(timeout=60)
    assert out == "<processes cluster 'gostore': 3 of 3 nodes run>\n"
    assert process.returncode == 0, errors
    assert alive(pids) == []


def test_a_fork_of_the_owner_does_not_end_the_cluster() -> None:
    process, _, pids = owner("fork")
    out, errors = process.communicate(timeout=60)
    assert (out, process.returncode) == ("4\n", 0), errors
    assert alive(pids) == []

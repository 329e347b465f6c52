"""The simulated cluster: the testbed's interface, the unmodified node, every fault of the vocabulary, from anywhere."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import aiohttp
import pytest

from gostore.core.auth import rest_token
from gostore.core.errors import BadRequest, ConfigError, NotFound, PolicyError, Timeout, Unavailable
from gostore.sim import simulate
from gostore.sim.errors import DeterminismError


def test_store_kill_read_restart():
    with simulate(5, seed=7) as cluster:
        assert repr(cluster) == "<simulation cluster 'gostore': 5 of 5 nodes run>"
        cluster.fs.write_sync("/a/b.txt", "hello")
        cluster.fs.write_sync("/large", bytes(range(256)) * 10_000)
        cluster.nodes["n2"].kill_sync()
        assert cluster.nodes["n2"].state == "killed"
        cluster.wait_state_sync("n2", "offline")
        cluster.wait_settled_sync()
        assert cluster.fs.read_sync("/a/b.txt") == b"hello"
        cluster.faults.restart_sync("n2")
        cluster.wait_ready_sync()
        cluster.wait_settled_sync()
        assert cluster.fs.read_sync("/large") == bytes(range(256)) * 10_000
        with pytest.raises(NotFound):
            cluster.fs.read_sync("/nothing")
        assert cluster.events.complete
        assert cluster.events.of_kind("fault")[0].data["fault"] == "kill"
        assert [e.data["member"] for e in cluster.events.of_kind("member", node="n1") if e.data["state"] == "offline"]
        snapshot = cluster.snapshot_sync()
        assert [node["name"] for node in snapshot["nodes"]] == ["n1", "n2", "n3", "n4", "n5"]
        for node in cluster.sim.nodes.values():
            assert node.loop.errors == []
    assert repr(cluster) == "<simulation cluster 'gostore': not running>"
    assert cluster.snapshot_sync()["running"] is False
    assert len(cluster.events) > 10
    with pytest.raises(Unavailable):
        cluster.fs.read_sync("/a/b.txt")


def test_in_a_notebook_cell_with_a_loop_running():
    async def cell():
        async with simulate(3, seed=1) as cluster:
            outer = asyncio.current_task()
            await cluster.fs.write("/x", "1")
            assert await cluster.fs.read("/x") == b"1"
            assert cluster.fs.read_sync("/x") == b"1"  # the twin works here as well: it waits for virtual time only
            before = cluster.sim.now
            # Side by side in virtual time.
            await asyncio.gather(cluster.sleep(10), cluster.sleep(10), cluster.sleep(10))
            assert cluster.sim.now - before == pytest.approx(10, abs=0.1)
            # A cancelled wait ends inside as well.
            waiting = asyncio.create_task(cluster.sleep(1e6))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert asyncio.current_task() is outer

            async def inside():
                await asyncio.sleep(100)
                with pytest.raises(RuntimeError, match="await the coroutine"):
                    cluster.fs.read_sync("/x")
                return await cluster.fs.read("/x")

            assert cluster.run(inside()) == b"1"
        return True

    assert asyncio.run(cell())


def test_from_another_thread():
    with simulate(1, seed=1) as cluster:
        cluster.fs.write_sync("/x", "1")
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(cluster.fs.read_sync("/x")))
        thread.start()
        thread.join()
        assert found == [b"1"]


def test_partition_pause_and_the_links_of_the_snapshot():
    with simulate(5, seed=3) as cluster:
        fault = cluster.faults.partition_sync(["n4"])
        cluster.wait_state_sync("n4", "offline")
        assert cluster.sim.net.links.get("n4", "n1").cut
        blocked = [(link["from"], link["to"]) for link in cluster.snapshot_sync()["links"] if link["blocked"]]
        assert ("n4", "n1") in blocked
        assert len(blocked) == 8
        cluster.faults.heal_sync(fault)
        assert not cluster.sim.net.links.get("n4", "n1").cut
        cluster.wait_ready_sync()
        cluster.nodes["n5"].pause_sync()
        with pytest.raises(BadRequest, match="is paused"):
            cluster.nodes["n5"].pause_sync()
        cluster.wait_state_sync("n5", "offline")
        cluster.nodes["n5"].resume_sync()
        cluster.wait_ready_sync()
        with pytest.raises(BadRequest, match="not paused"):
            cluster.nodes["n5"].resume_sync()


def test_machines_and_disks():
    with simulate(3, seed=3) as cluster:
        cluster.fs.write_sync("/x", "safe")
        cluster.faults.power_cut_sync("n2")
        assert cluster.nodes["n2"].state == "killed"
        cluster.faults.restart_sync("n2")
        cluster.wait_ready_sync()
        cluster.faults.skew_sync("n1", 3600.0, 0.01)
        assert cluster.sim.node("n1").clock.offset_s() == pytest.approx(3600, abs=1)
        cluster.faults.slow_disk_sync("n1", 1.0)
        assert cluster.sim.node("n1").disk_slow_s == 1.0
        cluster.faults.slow_disk_sync("n1", 0.0)
        cluster.faults.full_disk_sync("n3", 100)
        assert cluster.sim.node("n3").disk.free_bytes == 100
        cluster.faults.full_disk_sync("n3", -1)
        assert cluster.sim.node("n3").disk.free_bytes is None
        with pytest.raises(BadRequest, match="n1 has no file 'nothing'; it has"):
            cluster.faults.corrupt_sync("n1", "nothing")
        file = cluster.sim.node("n1").disk.files()[0]
        before = cluster.sim.node("n1").disk.read_bytes(file)
        cluster.faults.corrupt_sync("n1", file)
        after = cluster.sim.node("n1").disk.read_bytes(file)
        assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
        assert cluster.fs.read_sync("/x") == b"safe"


def test_a_node_is_added_and_a_policy_installed():
    class Backwards:
        """All to the last node of the alphabet."""

        def __init__(self, nodes, replicas, tokens_per_node):
            self.order = tuple(sorted(nodes, reverse=True))[:replicas]

        def owners(self, key):
            return self.order

    with simulate(3, seed=5) as cluster:
        node = cluster.add_node_sync()
        assert (node.name, node.state) == ("n4", "online")
        cluster.install_sync("placement", Backwards)
        assert cluster.locate_sync("key")["owners"] == ["n4", "n3", "n2"]


def test_rest_inside_the_world():
    with simulate(3, seed=1) as cluster:

        async def client():
            url = await cluster.rest_url()
            token = {"Authorization": f"Bearer {rest_token(cluster._secret)}"}
            async with aiohttp.ClientSession(headers=token) as session:
                async with session.post(f"{url}/a/b?type=text/plain", data=b"hello") as response:
                    assert response.status < 300
                async with session.get(f"{url}/a/b") as response:
                    assert response.headers["Date"].startswith("Thu, 01 Jan 2026 00:00:")
                    return await response.text()

        assert cluster.run(client()) == "hello"
        assert cluster.fs.read_sync("/a/b") == b"hello"


def test_mistakes():
    with pytest.raises(ConfigError, match="nodes = 0"):
        simulate(0)
    with pytest.raises(ConfigError, match="tcp_port"):
        simulate(3, tcp_port=3)
    with pytest.raises(ConfigError, match="shards"):
        simulate(3, db={"shards": 0})
    with pytest.raises(PolicyError):
        simulate(3, placement=3)
    with simulate(3, seed=1) as cluster:
        with pytest.raises(BadRequest, match="no node 'n9'"):
            cluster.faults.kill_sync("n9")
        cluster.faults.kill_sync("n2")
        with pytest.raises(BadRequest, match="does not run"):
            cluster.faults.kill_sync("n2")
        with pytest.raises(Timeout, match=r"n1 thinks that n3 is online"):
            cluster.wait_state_sync("n3", "offline", 5)


def test_a_node_that_reaches_for_real_randomness_ends_the_run_with_its_stack():
    class Lottery:
        def __init__(self, nodes, replicas, tokens_per_node):
            self.nodes, self.replicas = sorted(nodes), replicas

        def owners(self, key):
            import random

            random.random()  # without effect, so that it fits the slot
            return tuple(self.nodes[: self.replicas])

    cluster = simulate(3, seed=1, placement=Lottery)
    with pytest.raises(DeterminismError, match="random"):
        cluster.start_sync()


def test_a_dropped_cluster_is_freed():
    cluster = simulate(2, seed=1).start_sync()
    cluster.fs.write_sync("/x", "1")
    scheduler = weakref.ref(cluster.sim.scheduler)
    del cluster
    gc.collect()  # the cluster, which ends its world
    gc.collect()  # the world
    assert scheduler() is None

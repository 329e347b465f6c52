"""What only shards on consensus do: serve without a view, read stale, move, take and write snapshots."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.cluster.members import NodeState
from gostore.core.errors import (
    BadRequest,
    ConfigError,
    Conflict,
    GoStoreError,
    Unavailable,
)
from gostore.core.keyvalue import Versioned
from gostore.services.db import leadership
from gostore.sim.world import World

from .bed import POLICIES, Cluster, begin, play, put, until


def test_a_minority_is_neither_needed_nor_believed() -> None:
    """No view tells anybody of the partition: the groups find out themselves, also those that are quiet."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        for shard in range(4):
            await db.commit([], [put(cluster.key_of(shard), 1)])
        await asyncio.sleep(5.0)
        cluster.world.net.partition(["n0"], ["n1", "n2"])
        for shard in range(4):
            await cluster.db("n1").commit([], [put(cluster.key_of(shard), 2)], timeout_s=10.0)
            with pytest.raises(Unavailable) as caught:
                await cluster.db("n0").get("t", cluster.key_of(shard), timeout_s=1.0)
            assert caught.value.definite
            with pytest.raises(GoStoreError):
                await cluster.db("n0").commit([], [put(cluster.key_of(shard), 3)], timeout_s=1.0)
        cluster.world.net.heal()
        for shard in range(4):
            assert (await cluster.db("n0").get("t", cluster.key_of(shard))).value in (2, 3)
        await cluster.settled()
        await cluster.converged()

    play(scenario)


@pytest.mark.parametrize("replication", POLICIES)
def test_a_node_does_not_start_on_what_the_other_policy_wrote(replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        await cluster.settled()
        cluster.crash("n1")
        cluster.settings["replication"] = next(name for name in POLICIES if name != replication)
        task = cluster.world.restart("n1").task
        assert task is not None
        await until(task.done)
        with pytest.raises(ConfigError, match=f"were written by '{replication}'"):
            task.result()

    with World(1) as world:
        world.run(scenario(Cluster(world, 3, replication=replication)), timeout_s=60.0)


def test_a_stale_read_needs_no_majority() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        key = cluster.key_of(0)
        outside = next(name for name in cluster.names if name not in cluster.owners(0))
        await db.commit([], [put(key, 1)])
        for name in cluster.names:  # which know the container from now on
            assert (await cluster.db(name).get("t", key)).value == 1
        await cluster.converged()
        first, second, third = cluster.owners(0)
        for name in (second, third):
            cluster.crash(name, told=False)
        for name in (first, outside):
            assert Versioned.from_wire(await cluster.db(name).ask("get", "t", key, [], None, "stale")).value == 1
        with pytest.raises(Unavailable):
            await cluster.db(first).get("t", key, timeout_s=1.0)
        with pytest.raises(BadRequest, match="linearizable, stale"):
            await cluster.db(first).ask("get", "t", key, [], None, "eventual")
        with pytest.raises(BadRequest, match="snapshot"):
            await cluster.db(first).ask("get", "t", key, [], [[0, 1]], "stale")

    play(scenario, nodes=4)


def test_two_of_three_are_enough_whoever_they_are() -> None:
    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        await cluster.settled()
        cluster.crash("n1")
        await cluster.settled()
        await cluster.db("n0").commit([], [put("k", 1)])
        cluster.crash("n2")
        with pytest.raises(Unavailable) as caught:
            await cluster.db("n0").get("t", "k", timeout_s=2.0)
        assert caught.value.definite
        await cluster.restart("n1")
        assert (await cluster.db("n1").get("t", "k")).value == 1
        await cluster.db("n1").commit([], [put("k", 2)])
        cluster.crash("n0", power=True)
        await cluster.restart("n2")
        assert (await cluster.db("n2").get("t", "k")).value == 2
        await cluster.restart("n0")
        await cluster.settled()
        await cluster.converged()

    play(scenario)


def test_a_replica_that_was_moved_while_it_was_away_lets_go() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.all_up(cluster.names[:4])
        db = cluster.db("n0")
        await db.create_container("t")
        await db.commit([], [put(f"k{n}", "x" * 200) for n in range(100)])
        await cluster.settled()
        await until(lambda: "n4" in cluster.services)
        cluster.crash("n3", told=False)
        cluster.set_states(n3=NodeState.OFFLINE, n4=NodeState.ONLINE)
        await cluster.settled()
        await cluster.restart("n3")
        await cluster.settled()
        for shard in range(8):
            holders = [name for name in cluster.names if shard in cluster.services[name].status()["holds"]]
            assert sorted(holders) == sorted(cluster.owners(shard))
        assert len((await cluster.db("n3").scan("t")).entries) == 100
        await cluster.converged()

    play(scenario, nodes=5, shards=8)


def test_snapshots_replace_the_logs_and_bring_new_replicas_up_to_date() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.all_up(cluster.names[:3])
        db = cluster.db("n0")
        await db.create_container("t")
        seen: list[Any] = []
        for n in range(200):
            await db.commit([], [put(f"k{n % 10}", f"{n}" + "x" * 100)])
            if n in (77, 150):
                cluster.crash("n1", power=True)
                await cluster.restart("n1")
        await cluster.settled()
        raft = [cluster.services["n0"]._shards[shard].replication._raft for shard in range(4)]
        assert all(group.journal.start.index > 0 for group in raft if group.last.index > 40)
        await until(lambda: "n3" in cluster.services)
        cluster.world.nodes["n3"].env.events.subscribe(seen.append)
        cluster.set_states(n3=NodeState.ONLINE)
        await cluster.settled()
        await cluster.converged()
        assert [event for event in seen if event.kind == "raft_snapshot"]
        for name in cluster.names:
            cluster.crash(name, power=True)
        for name in cluster.names:
            await cluster.restart(name)
        for n in range(190, 200):
            assert (await cluster.db("n2").get("t", f"k{n % 10}")).value == f"{n}" + "x" * 100
        await cluster.settled()
        await cluster.converged()

    play(scenario, nodes=4, snapshot_entries=16)


def test_a_node_alone_grows_into_a_group() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.all_up(["n0"])
        db = cluster.db("n0")
        await db.create_container("t")
        await db.commit([], [put(f"k{n}", n) for n in range(20)])
        await until(lambda: len(cluster.services) == 3)
        for name in ("n1", "n2"):
            cluster.set_states(**{name: NodeState.ONLINE})
        await cluster.settled()
        statuses = await db.ask("shards")
        assert all(sorted(status["replicas"]) == ["n0", "n1", "n2"] for status in statuses)
        assert all(status["settled"] and status["leader"] == status["primary"] for status in statuses)
        cluster.crash("n0", power=True)
        assert len((await cluster.db("n1").scan("t")).entries) == 20
        # And back: whoever leaves gives away what it holds first.
        await cluster.restart("n0")
        cluster.set_states(n1=NodeState.LEAVING)
        cluster.set_states(n2=NodeState.LEAVING)
        await until(lambda: not any(cluster.services[name].status()["holds"] for name in ("n1", "n2")))
        cluster.crash("n1")
        cluster.crash("n2")
        assert len((await db.scan("t")).entries) == 20

    play(scenario)


def test_a_full_pipeline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leadership, "PROPOSALS_MAX", 3)

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        keys = [cluster.key_of(0, n) for n in range(30)]
        await asyncio.gather(*(db.commit([], [put(key, 1)]) for key in keys))
        for key in keys:
            assert (await db.get("t", key)).value == 1

    play(scenario, replication="primary_backup")


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1 << 30))
def test_the_same_seed_gives_the_same_run(seed: int) -> None:
    def trace() -> str:
        async def scenario(cluster: Cluster) -> None:
            db = await begin(cluster)
            await asyncio.gather(*(db.commit([], [put(f"k{n}", n)]) for n in range(10)))
            cluster.crash("n1")
            with contextlib.suppress(Conflict):  # a shard that has just lost its leader may refuse: the same each time
                await db.commit([], [put("k", 1), put("l", 1)])

        with World(seed) as world:
            cluster = Cluster(world, 3)
            world.run(scenario(cluster), timeout_s=300.0)
            return str(world.trace.sha256)

    assert trace() == trace()

"""Nodes fail, come back, come and go: no acknowledged write is lost, and each shard has its replicas again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gostore.cluster.members import NodeState
from gostore.core.errors import (
    GoStoreError,
    Unavailable,
)
from gostore.core.keyvalue import PointRead, RequestId, Write
from gostore.core.values import pack
from gostore.services.db import replica

from .bed import POLICIES, Cluster, begin, play, put, until


async def isolate(cluster: Cluster, victim: str, rng: Any) -> None:
    """Clients reach it and other nodes do not; it does not learn that it was replaced."""
    others = [name for name in cluster.names if name != victim]
    cluster.world.net.partition([victim], others)
    await asyncio.sleep(rng.uniform(0.0, 0.5))
    view = cluster.next_view({victim: NodeState.OFFLINE})
    for name in others:
        cluster.tell(name, view)
    await asyncio.sleep(rng.uniform(0.5, 2.0))
    cluster.world.net.heal()
    await asyncio.sleep(rng.uniform(0.0, 0.5))
    cluster.set_states(**{victim: NodeState.ONLINE})


@pytest.mark.parametrize("replication", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_no_acknowledged_write_is_lost_when_primaries_die(seed: int, replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        rng = cluster.world.rng("test")
        acknowledged: dict[str, int] = {}
        unknown: dict[str, list[int]] = {}
        done = False

        async def writer(number: int) -> None:
            value = 0
            while not done:
                key, value = f"w{number}/{rng.randrange(20)}", value + 1
                name = rng.choice(cluster.running)
                try:
                    await cluster.db(name).commit([], [put(key, value)], timeout_s=3.0)
                except (GoStoreError, KeyError) as error:
                    if not getattr(error, "definite", False):
                        unknown.setdefault(key, []).append(value)
                    await asyncio.sleep(0.05)
                    continue
                acknowledged[key] = value
                unknown.pop(key, None)
                await asyncio.sleep(rng.uniform(0.0, 0.1))

        writers = [asyncio.ensure_future(writer(number)) for number in range(4)]
        for _ in range(4):
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            victim = cluster.primary(rng.randrange(4))
            if rng.random() < 0.4:
                await isolate(cluster, victim, rng)
                continue
            cluster.crash(victim, power=rng.random() < 0.5, told=False)
            await asyncio.sleep(rng.uniform(0.0, 0.5))
            cluster.set_states(**{victim: NodeState.OFFLINE})
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            await cluster.restart(victim)
        done = True
        await asyncio.gather(*writers)
        await cluster.settled()
        await cluster.converged()
        assert len(acknowledged) > 30
        for key, value in acknowledged.items():
            found = await cluster.db("n0").get("t", key)
            assert found.value in (value, *unknown.get(key, [])), (key, found)

    play(scenario, nodes=5, seed=seed, replication=replication)


@pytest.mark.parametrize("replication", ["raft", "quorum"])
def test_the_whole_cluster_comes_back_in_any_order(replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        for n in range(30):
            await db.commit([], [put(f"k{n}", n)])
        for name in cluster.names:
            cluster.crash(name, power=True)
        for name in reversed(cluster.names):
            await cluster.restart(name)
        await cluster.settled()
        for n in range(30):
            assert (await cluster.db("n3").get("t", f"k{n}")).value == n
        await cluster.converged()

    play(scenario, nodes=5, replication=replication)


def test_a_shard_of_which_too_little_is_there_waits_and_says_for_whom() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        await db.commit([], [put(cluster.key_of(0), 1)])
        key, (first, second, third) = cluster.key_of(0), cluster.owners(0)
        other = next(name for name in cluster.names if name not in (first, second, third))
        for name in cluster.names:
            cluster.crash(name)
        await cluster.restart(other)
        await cluster.restart(third)
        with pytest.raises(Unavailable, match="waits for .*start them again"):
            await cluster.db(third).get("t", key, timeout_s=3.0)
        await cluster.restart(first)
        assert (await cluster.db(third).get("t", key)).value == 1

    play(scenario, nodes=4, replication="primary_backup")


def test_writes_need_copies() -> None:
    """Of two nodes one is lost: the other one can be read, and takes no write that could be lost with it."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await db.commit([], [put("k", 1)])
        await cluster.settled()
        cluster.crash("n1")
        await until(lambda: len(cluster.services["n0"].status()["leads"]) == 4)
        with pytest.raises(Unavailable, match="1 of the 2 copies") as caught:
            await db.commit([], [put("k", 2)], timeout_s=1.0)
        assert caught.value.definite
        assert (await db.get("t", "k")).value == 1
        await cluster.restart("n1")
        await db.commit([], [put("k", 3)])
        await cluster.settled()
        await cluster.converged()

    play(scenario, nodes=2, replication="primary_backup")


def test_two_losses_one_after_the_other_cost_no_write() -> None:
    """Of three; then whoever was lost last must be back, as the first one knows nothing of what came after."""

    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        await cluster.settled()
        cluster.crash("n1")
        await cluster.db("n0").commit([], [put("k", 1)])
        await cluster.settled()
        cluster.crash("n2")
        await cluster.restart("n1")
        with pytest.raises(Unavailable, match="waits for"):
            await cluster.db("n1").get("t", "k", timeout_s=2.0)
        cluster.crash("n0")
        await cluster.restart("n2")
        with pytest.raises(Unavailable, match="waits for"):
            await cluster.db("n1").get("t", "k", timeout_s=2.0)
        await cluster.restart("n0")
        assert (await cluster.db("n1").get("t", "k")).value == 1
        await cluster.settled()
        await cluster.converged()

    play(scenario, replication="primary_backup")


def test_an_acknowledged_write_is_on_the_backups_disks() -> None:
    """The primary never comes back, and the power of the backups fails right behind the acknowledgement."""

    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        await cluster.settled()
        key, (first, second, third) = cluster.key_of(0), cluster.owners(0)
        client = cluster.db(third)
        for value in range(5):
            await client.commit([], [put(key, value)])
        for name in (first, second, third):
            cluster.crash(name, power=True, told=name == first)
        for name in (second, third):
            await cluster.restart(name)
        assert (await client.get("t", key)).value == 4

    play(scenario)


def test_a_shard_is_not_born_twice() -> None:
    """Nodes that never held anything come first after the whole cluster was down."""

    async def scenario(cluster: Cluster) -> None:
        await cluster.all_up(["n0", "n1", "n2"])
        db = cluster.db("n0")
        await db.create_container("t")
        await db.commit([], [put("k", 1)])
        await cluster.settled()
        await until(lambda: len(cluster.services) == 5)
        for name in ("n0", "n1", "n2"):
            cluster.crash(name)
        cluster.set_states(n3=NodeState.ONLINE, n4=NodeState.ONLINE)
        with pytest.raises(Unavailable, match="nobody who answered holds it"):
            await cluster.db("n3").get(".containers", "t", timeout_s=2.0)
        for name in ("n0", "n1"):
            await cluster.restart(name)
        assert (await cluster.db("n3").get("t", "k")).value == 1

    play(scenario, nodes=5, replication="primary_backup")


def test_a_deposed_primary_cannot_write() -> None:
    """It is cut off from nobody and only does not know that the view has changed."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        key, old = cluster.key_of(0), cluster.primary(0)
        await db.commit([], [put(key, 1)])
        view = cluster.next_view({old: NodeState.OFFLINE})
        for name in cluster.names:
            if name != old:
                cluster.tell(name, view)
        new = cluster.db(cluster.primary(0))
        await new.commit([PointRead("t", key, (await new.get("t", key)).version)], [put(key, 2)])
        shard = cluster.services[old]._shards[0]
        write = ["set", cluster.services["n0"].database.known("t").physical, key, [], pack(3, 100)]

        async def commit() -> Any:
            deadline_s = asyncio.get_running_loop().time() + 2.0
            with pytest.raises(GoStoreError):
                await shard.serve("commit", [None, [], [write]], deadline_s)

        await cluster.on(old, commit())
        assert (await new.get("t", key)).value == 2
        cluster.tell(old, view)
        assert (await cluster.db(old).get("t", key)).value == 2
        # Back again, it follows: what it had appended alone is gone.
        cluster.set_states(**{old: NodeState.ONLINE})
        await cluster.settled()
        assert (await cluster.db(old).get("t", key)).value == 2
        await cluster.converged()

    play(scenario, nodes=4, replication="primary_backup")


def test_a_new_node_is_given_its_shards_and_the_old_owner_lets_go() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.all_up(cluster.names[:4])
        db = cluster.db("n0")
        await db.create_container("t")
        await db.commit([], [put(f"k{n}", "x" * 500) for n in range(100)])
        await cluster.settled()
        await until(lambda: "n4" in cluster.services)
        cluster.set_states(n4=NodeState.ONLINE)
        await cluster.settled()
        held = [cluster.services[name].status()["holds"] for name in cluster.names]
        for shard in range(8):
            holders = [name for name, shards in zip(cluster.names, held, strict=True) if shard in shards]
            assert sorted(holders) == sorted(cluster.owners(shard))
        assert held[4]
        page = await cluster.db("n4").scan("t")
        assert len(page.entries) == 100
        await cluster.converged()

    play(scenario, nodes=5, shards=8)


def test_a_backup_that_lags_too_much_gets_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gostore.services.db.journal.WINDOW_ENTRIES_MAX", 4)

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        seen: list[Any] = []
        cluster.crash("n3")
        for n in range(60):
            await db.commit([], [put(f"k{n}", n)])
        await cluster.restart("n3")
        cluster.world.nodes["n3"].env.events.subscribe(seen.append)
        await cluster.settled()
        await cluster.converged()
        for n in range(60):
            assert (await cluster.db("n3").get("t", f"k{n}")).value == n

    play(scenario, nodes=4, replication="primary_backup")


def test_the_log_is_compacted_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "COMPACTION_SIZE_BYTES", 2_000)

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        for n in range(200):
            await db.commit([], [put(f"k{n % 10}", f"{n}" + "x" * 100)])
            if n in (77, 150):
                cluster.crash("n1", power=True)
                await cluster.restart("n1")
        wal = cluster.services["n0"]._shards[0]._world.wal
        assert all(wal.first_index(1 + shard) > 1 for shard in range(4))
        for name in cluster.names:
            cluster.crash(name, power=True)
        for name in cluster.names:
            await cluster.restart(name)
        for n in range(190, 200):
            found = await cluster.db("n2").get("t", f"k{n % 10}")
            assert found.value == f"{n}" + "x" * 100
        await cluster.settled()
        await cluster.converged()

    play(scenario, replication="primary_backup")


def test_a_repeated_request_is_applied_once_across_primaries() -> None:
    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        await cluster.settled()
        key = cluster.key_of(0)
        old = cluster.primary(0)
        other = next(name for name in cluster.names if name != old)
        request = RequestId("me", 1)
        add = [Write("add", "t", key, 1)]
        await cluster.db(other).commit([], add, request_id=request)
        cluster.crash(old)
        await cluster.db(other).commit([], add, request_id=request, repeated=True)
        assert (await cluster.db(other).get("t", key)).value == 1

    play(scenario, nodes=4)

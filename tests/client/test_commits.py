"""Commits of one turn share a request, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import gostore as gs
from gostore.client.keyvalue import RemoteKeyValue
from gostore.core.errors import BadRequest, Conflict, GoStoreError, NotFound, NotOwner, Timeout, TooLarge, Unavailable
from gostore.core.keyvalue import PointRead, RequestId, Write
from gostore.sim.cluster import SimCluster

SHARDS = 4


@pytest.fixture
def cluster() -> Iterator[SimCluster]:
    with gs.simulate(3, seed=1, db={"shards": SHARDS, "value_size_bytes_max": 10_000}) as cluster:
        cluster.db.create_container_sync("a")
        cluster.wait_settled_sync()
        yield cluster


async def requests(cluster: SimCluster, node: str) -> int:
    """That a node has had for db, from clients and from other nodes."""
    count: int = (await cluster.statistics())[node]["comm"]["requests_db"]
    return count


def store_of(cluster: SimCluster, via: str | None = None) -> RemoteKeyValue:
    return cluster.db._store(via)


def put(key: str, value: Any = 1, container: str = "a") -> list[Write]:
    return [Write("set", container, key, value)]


async def outcomes(*coroutines: Any) -> list[Any]:
    return await asyncio.gather(*coroutines, return_exceptions=True)


def test_what_is_committed_in_one_turn_shares_a_request(cluster: SimCluster) -> None:
    async def scenario() -> None:
        store = store_of(cluster, "n2")
        before = await requests(cluster, "n2")
        found = await asyncio.gather(*(store.commit((), put(f"k{number}", number)) for number in range(30)))
        assert await requests(cluster, "n2") == before + 1
        for number, committed in enumerate(found):
            stored = await store.get("a", f"k{number}")
            assert (stored.value, stored.version) == (number, committed.version)

    cluster.run(scenario())


def test_each_has_its_own_outcome(cluster: SimCluster) -> None:
    async def scenario() -> None:
        store = store_of(cluster)
        (version,) = (await store.commit((), put("old"))).versions.values()
        both = [*put("left"), *put("right", 2), *put("middle", 3), *put("more", 4)]  # in several shards
        good, conflict, current, unknown, large, spread, nested, empty = await outcomes(
            store.commit((), put("good")),
            store.commit([PointRead("a", "old", version + 1)], put("never")),
            store.commit([PointRead("a", "old", version)], put("checked")),
            store.commit((), put("x", container="b")),
            store.commit((), put("x", b"." * 20_000)),
            store.commit((), both),
            store.commit((), [Write("add", "a", "text", 1)]),
            store.commit((), ()),
        )
        assert isinstance(conflict, Conflict)
        assert "old" in conflict.message
        assert isinstance(unknown, NotFound)
        assert isinstance(large, TooLarge)
        assert all(not isinstance(one, Exception) for one in (good, current, spread, nested, empty)), (
            "none spoils others"
        )
        assert empty.versions == {}
        assert len(spread.versions) > 1
        for key, expected in (("good", 1), ("checked", 1), ("left", 1), ("more", 4), ("text", 1)):
            assert (await store.get("a", key)).value == expected
        assert not (await store.get("a", "never")).found
        assert (await store.get("a", "good")).version == good.version

    cluster.run(scenario())


def test_what_comes_together_is_one_entry_unless_an_object_would_be_written_twice() -> None:
    with gs.simulate(3, seed=2, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.wait_settled()
            store = store_of(cluster, (await cluster.db.shards())[0]["primary"])
            before = (await store.commit((), put("known"))).version  # the node has looked the container up
            done = await asyncio.gather(*(store.commit((), put(f"k{number}", number)) for number in range(10)))
            assert {committed.version for committed in done} == {before + 1}
            assert [(await store.get("a", f"k{number}")).value for number in range(10)] == list(range(10))
            # Whoever knows the version of its own write may build on it; so another one must not have the same.
            done = await asyncio.gather(*(store.commit((), put("k", number)) for number in range(5)))
            assert len({committed.version for committed in done}) == 5
            last = max(done, key=lambda committed: committed.version)
            for committed in done:
                builds = store.commit([PointRead("a", "k", committed.version)], put("k", "mine"))
                if committed is last:
                    await builds
                else:
                    with pytest.raises(Conflict):
                        await builds

        cluster.run(scenario())


def test_what_cannot_be_sent_spoils_nothing(cluster: SimCluster) -> None:
    async def scenario() -> None:
        store = store_of(cluster)
        first, wrong, last = await outcomes(
            store.commit((), put("first")), store.commit((), put("x", object())), store.commit((), put("last"))
        )
        assert isinstance(wrong, BadRequest)
        assert {first.versions != {}, last.versions != {}} == {True}
        assert (await store.get("a", "last")).value == 1

    cluster.run(scenario())


def test_who_gives_up_takes_nobody_with_it(cluster: SimCluster) -> None:
    async def scenario() -> None:
        store = store_of(cluster)
        tasks = [asyncio.create_task(store.commit((), put(f"k{number}"))) for number in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in done] == [True, False, False, True, False]
        assert (await store.get("a", "k4")).value == 1

    cluster.run(scenario())


def test_a_request_id_is_applied_once_in_a_batch_too(cluster: SimCluster) -> None:
    async def scenario() -> None:
        store = store_of(cluster)
        one = RequestId("somebody", 1)
        add = [Write("add", "a", "sum", 1)]
        done = await asyncio.gather(*(store.commit((), add, request_id=one) for _ in range(3)), store.commit((), add))
        assert len({str(committed.versions) for committed in done[:3]}) == 1
        assert (await store.get("a", "sum")).value == 2

    cluster.run(scenario())


def test_a_container_that_was_made_anew_is_looked_up_again(cluster: SimCluster) -> None:
    async def scenario() -> None:
        stores = [store_of(cluster, name) for name in ("n1", "n2", "n3")]
        for store in stores:
            await store.commit((), put("k", 1))  # now all remember what the name stands for
        await cluster.db.drop_container("a")
        await cluster.db.create_container("a")
        for number, store in enumerate(stores):
            await asyncio.gather(*(store.commit((), put(f"{number}.{key}", 2)) for key in range(4)))
            assert (await store.get("a", f"{number}.3")).value == 2
        assert not (await stores[0].get("a", "k")).found

    cluster.run(scenario())


def test_who_waits_for_a_lock_keeps_nobody_waiting() -> None:
    """A transaction across shards holds its locks while a participant is cut off; the others of a batch pass it."""
    with gs.simulate(3, seed=5, db={"shards": SHARDS}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.wait_settled()
            store = store_of(cluster)
            spread = [*put("left"), *put("right", 2), *put("middle", 3), *put("more", 4)]

            def locked() -> bool:
                return any(
                    shard.machine.prepared for node in cluster._machines.values() for shard in node.app.db._shards
                )

            task = asyncio.create_task(store.commit((), spread))
            async with asyncio.timeout(10):
                while not locked():  # noqa: ASYNC110 (a state of the shards, with no event of its own)
                    await asyncio.sleep(0.0005)
            waiting = [
                store.commit((), put("left", 5)),
                store.commit((), put("free", 6)),
                store.commit((), put("b", 7)),
            ]
            done = await outcomes(*waiting, task)
            assert not [one for one in done if isinstance(one, GoStoreError)]
            assert (await store.get("a", "left")).value == 5
            assert (await store.get("a", "free")).value == 6

        cluster.run(scenario())


@pytest.mark.parametrize("replication", ["primary_backup", "quorum"])
def test_a_policy_that_takes_one_at_a_time_takes_batches(replication: str) -> None:
    with gs.simulate(3, seed=2, db={"shards": 2, "replication": replication}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.wait_settled()
            store = store_of(cluster)
            await asyncio.gather(*(store.commit((), put(f"k{number}", number)) for number in range(10)))
            assert [(await store.get("a", f"k{number}")).value for number in range(10)] == list(range(10))

        cluster.run(scenario())


def test_batches_are_bounded(cluster: SimCluster) -> None:
    async def scenario() -> None:
        store = store_of(cluster, "n1")
        before = await requests(cluster, "n1")
        await asyncio.gather(*(store.commit((), put(f"k{number}")) for number in range(150)))
        assert await requests(cluster, "n1") == before + 3
        await asyncio.gather(*(store.commit((), put(f"l{number}", b"." * 9_000)) for number in range(10)))
        assert await requests(cluster, "n1") == before + 5

    cluster.run(scenario())


def test_what_became_of_one_alone_is_found_out_alone() -> None:
    """One of a batch is lost with the lead, of another nobody knows: both go on alone, under their own ids."""
    with gs.simulate(3, seed=3, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.wait_settled()
            leader = (await cluster.db.shards())[0]["primary"]
            store = store_of(cluster, leader)
            await store.commit((), put("known"))  # the node has looked the container up
            replication = cluster._machines[leader].app.db._shards[0].replication
            real, batches = replication.propose_all, []

            async def propose_all(payloads: list[bytes], deadline_s: float) -> list[Any]:
                batches.append(len(payloads))
                told = await real([payloads[0], payloads[2]], deadline_s)
                return [told[0], NotOwner("lost with the lead", owner=None), Timeout("nobody knows")]

            replication.propose_all = propose_all
            # Of one object, so that each has an entry of its own.
            adds = [store.commit((), [Write("add", "a", "n", number)]) for number in (1, 10, 100)]
            done = await asyncio.gather(*adds)
            assert batches == [3]
            assert len({committed.version for committed in done}) == 3
            found = await store.get("a", "n")
            assert (found.value, found.version) == (111, max(committed.version for committed in done))

        cluster.run(scenario())


@pytest.mark.parametrize("when", ["before it is sent", "while it is on its way"])
def test_nobody_waits_for_a_connection_that_was_closed(cluster: SimCluster, when: str) -> None:
    async def scenario() -> None:
        connection, store = cluster._connected(), store_of(cluster)
        tasks = [asyncio.create_task(store.commit((), put(f"k{number}"))) for number in range(3)]
        await asyncio.sleep(0)
        if when == "while it is on its way":
            for _ in range(3):
                await asyncio.sleep(0)
        await connection.close()
        async with asyncio.timeout(60):
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, GoStoreError) for one in done)

    cluster.run(scenario())


def test_one_who_repeats_a_request_himself_says_so(cluster: SimCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store, request = store_of(cluster), RequestId("me", 1)
        first = await store.commit((), [Write("add", "a", "k", 1)], request_id=request)
        again = await store.commit((), [Write("add", "a", "k", 1)], request_id=request, repeated=True)
        assert again.versions == first.versions
        assert (await store.get("a", "k")).value == 1

        async def call(*args: Any, **_: Any) -> Any:
            assert args[-1] is True, "repeated"
            raise Unavailable("nobody leads")

        monkeypatch.setattr(cluster._connected().endpoint, "call", call)
        with pytest.raises(Timeout) as caught:
            await store.commit((), put("k"), request_id=request, repeated=True, timeout_s=1.0)
        assert not caught.value.definite

    cluster.run(scenario())


@pytest.mark.parametrize("function", ["commit", "commits"])
def test_what_may_have_committed_is_not_refused_for_a_lock(cluster: SimCluster, function: str) -> None:
    """A definite refusal would say that nothing happened (swarm faults, seed 951)."""

    async def scenario() -> None:
        (place,) = (await store_of(cluster).commit((), put("k"))).versions
        shards = [node.app.db._shards[place] for node in cluster._machines.values()]
        (shard,) = (shard for shard in shards if shard.replication.role == "primary")
        (container,) = (name for name in shard.machine.store.containers() if name.startswith("a@"))

        async def ask(repeated: bool) -> Any:
            item = [["x", 1, repeated], [], [["set", container, "k", [], b"\x02"]]]
            args = item if function == "commit" else [[item]]
            return await cluster.call(shard.name, "db", "shard", place, function, args)

        first = await ask(False)
        shard.machine.locks.acquire("t", [], [(container, "k")])
        try:
            assert await ask(True) == first
        finally:
            shard.machine.locks.release("t")

    cluster.run(scenario())


@pytest.mark.parametrize("function", ["commit", "commits"])
@pytest.mark.parametrize("writes", [None, 7, ["x"], [["set", 1, 2, [], b"1"]], [[[], {}, None]]])
def test_what_cannot_be_read_under_the_id_of_a_commit_stops_no_node(function: str, writes: Any) -> None:
    """From a node with a mistake: the outcome is that of the commit, and of these writes nothing can be told."""
    with gs.simulate(1, seed=3, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            (shard,) = cluster._machines["n1"].app.db._shards

            async def ask(writes: Any) -> Any:
                item = [["x", 1, False], [], writes]
                return await cluster.call("n1", "db", "shard", 0, function, item if function == "commit" else [[item]])

            first = await ask([["set", "c@1", "k", [], b"\x02"]])
            assert await ask(writes) == first
            assert shard.machine.store.version("c@1", "k") > 0

        cluster.run(scenario())
        assert cluster.nodes["n1"].life.alive


def test_a_doubt_of_an_attempt_before_is_not_forgotten() -> None:
    """Nobody knows what became of the first attempt; the second one surely fails for one of the two."""
    with gs.simulate(3, seed=3, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.wait_settled()
            leader = (await cluster.db.shards())[0]["primary"]
            store = store_of(cluster, leader)
            await store.commit((), put("known"))  # the node has looked the container up
            shard = cluster._machines[leader].app.db._shards[0]
            real, serve, attempts, alone = shard.replication.propose_all, shard.serve, [], []

            async def propose_all(payloads: list[bytes], deadline_s: float) -> list[Any]:
                attempts.append(len(payloads))
                told = await real(payloads, deadline_s)
                if len(attempts) == 1:
                    raise Timeout("nobody knows")
                return [told[0], NotOwner("lost with the lead", owner=None)]

            def served(function: str, args: list[Any], deadline_s: float) -> Any:
                if function == "commit":
                    alone.append(args[0][2])
                return serve(function, args, deadline_s)

            shard.replication.propose_all, shard.serve = propose_all, served
            await asyncio.gather(*(store.commit((), [Write("add", "a", "n", number)]) for number in (1, 10)))
            assert attempts == [2, 2]
            assert alone == [True], "it is told that an attempt before may have had its effect"
            assert (await store.get("a", "n")).value == 11

        cluster.run(scenario())

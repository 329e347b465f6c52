"""One cluster in which nothing fails: what is written, read, refused and told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gostore.config import NodeConfig
from gostore.core import packing
from gostore.core.blocks import Block
from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    Conflict,
    NotFound,
    NotSupported,
    Timeout,
    TooLarge,
    Unavailable,
    WrongType,
)
from gostore.core.keyvalue import Committed, PointRead, Write
from gostore.services.db.database import TRANSACTION_SIZE_BYTES_MAX

from .bed import Cluster, begin, play, put, until


@pytest.mark.parametrize("replication", ["raft", "quorum"])
def test_what_one_node_writes_every_node_reads_at_once(replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        for number in range(20):
            committed = await db.commit([], [put(f"k{number}", {"n": [number]})])
            for name in cluster.names:
                found = await cluster.db(name).get("t", f"k{number}", ("n", 0))
                assert (found.value, found.version, found.found) == (number, committed.version, True)
        assert (await db.get("t", "none")).version == 0
        page = await cluster.db("n2").scan("t", "k1")
        assert [entry.key for entry in page.entries] == sorted(f"k{n}" for n in range(20) if f"k{n}".startswith("k1"))
        await cluster.converged()

    play(scenario, replication=replication)


@pytest.mark.parametrize("replication", ["raft", "quorum"])
def test_an_acknowledged_write_is_on_the_disks_of_all_replicas(replication: str) -> None:
    """The power of every node fails right behind the acknowledgement."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        for number in range(10):
            await db.commit([], [put(f"k{number}", number)])
            for name in cluster.names:
                cluster.crash(name, power=True, told=False)
            for name in cluster.names:
                await cluster.restart(name)
            db = cluster.db("n1")
            for other in range(number + 1):
                assert (await db.get("t", f"k{other}")).value == other

    play(scenario, replication=replication)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("commit", [None, [], [[1]]]),
        ("commit", [None, [], [["set", "t", 7, [], b"1"]]]),
        ("commit", [None, 5, 5]),
        ("commits", [[[None, [], [[1]]]]]),
        ("coordinate", [None, [[0, [], [[1]]], [1, [], [[1]]]]]),
        ("coordinate", [None, []]),
        ("coordinate", [None, [[0, [], []], 7]]),
        ("prepare", ["a.b.c", 1, [], []]),
        ("prepare", ["1.1.1", 1, [], [[1]]]),
        ("decide", ["a.b.c", True]),
        ("decision", ["a.b.c"]),
    ],
)
def test_a_malformed_request_of_a_node_stops_no_other(function: str, args: list[Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        said: list[Any]
        try:
            call = cluster.client.call(cluster.primary(0), "db", "shard", 0, function, args, timeout_s=5.0)
            said = (await call).value
        except BadRequest as error:
            said = ["error", error.code]
        if function in ("commits", "coordinate") and isinstance(said[0], list):
            (said, *_) = said
        assert said[:2] == ["error", "bad_request"]
        for number in range(8):
            await db.commit([], [put(f"k{number}", number)])
        await cluster.converged()
        for name in cluster.names:
            cluster.crash(name)
            await cluster.restart(name)
        assert (await cluster.db("n1").get("t", "k7")).value == 7

    play(scenario)


def test_pages_of_all_shards_make_one_order() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        keys = [f"{n:03}" for n in range(60)]
        await db.commit([], [put(key, "x") for key in keys])
        found: list[str] = []
        start: str | None = ""
        pages = 0
        while start is not None:
            page = await db.scan("t", start=start, limit=7)
            found += [entry.key for entry in page.entries]
            await db.commit(page.ranges, [])  # what was read is still so
            start = page.next_start
            pages += 1
        assert found == keys
        assert pages == 9
        page = await db.scan("t", "01", start="013", end="017")
        assert [entry.key for entry in page.entries] == ["013", "014", "015", "016"]
        large = "y" * 400_000
        await db.commit([], [put("010", large), put("011", large), put("012", large)])
        page = await db.scan("t", "01")
        assert 1 <= len(page.entries) < 10, "an answer is bounded in bytes"
        assert page.next_start is not None

    play(scenario)


@pytest.mark.parametrize("replication", ["raft", "quorum"])
def test_a_separator_keeps_a_directory_in_one_shard(replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await db.create_container("files", separator="/")
        committed = await db.commit([], [Write("set", "files", f"dir/{n}", n) for n in range(50)])
        assert len(committed.versions) == 1
        page = await db.scan("files", "dir/")
        assert len(page.entries) == 50
        assert len(page.ranges) == 1

    play(scenario, replication=replication)


def test_containers() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await db.create_container("a", separator="/")
        await cluster.db("n1").create_container("a", separator="/")
        with pytest.raises(AlreadyExists, match="other options"):
            await db.create_container("a")
        with pytest.raises(NotSupported, match="db.replication"):
            await db.create_container("b", replication="magic")
        with pytest.raises(BadRequest):
            await db.create_container(".b")
        for attempt in (db.get("b", "k"), db.scan("b"), db.commit([], [Write("set", "b", "k", 1)])):
            with pytest.raises(NotFound, match="create_container"):
                await attempt
        options = {"separator": None, "replication": "raft"}
        assert await cluster.db("n2").containers() == {"a": {**options, "separator": "/"}, "t": options}

    play(scenario)


def test_a_dropped_container_is_gone_for_those_who_remember_it_too() -> None:
    async def scenario(cluster: Cluster) -> None:
        db, other = await begin(cluster), cluster.db("n1")
        await db.commit([], [put(f"k{n}", n) for n in range(20)])
        assert (await other.get("t", "k1")).value == 1
        await db.drop_container("t")
        for attempt in (other.get("t", "k1"), other.scan("t"), other.commit([], [put("k1", 2)])):
            with pytest.raises(NotFound):
                await attempt
        with pytest.raises(NotFound):
            await db.drop_container("t")
        await db.create_container("t")
        assert (await other.get("t", "k1")).version == 0
        await other.commit([], [put("k1", 3)])
        assert (await db.get("t", "k1")).value == 3
        await db.commit([], [put("k2", 3)])
        await cluster.converged()
        assert all(cluster.machine("n0", s).store.objects <= 3 for s in range(4))

    play(scenario)


def test_limits() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        for writes, said in (
            ([put("k" * 2000, 1)], "key has 2000 bytes"),
            ([put("k", "x" * 2000)], "at most 1024"),
            ([put(f"k{n}", 1) for n in range(2000)], "transaction_operations_max"),
        ):
            with pytest.raises(TooLarge, match=said):
                await db.commit([], writes)
        with pytest.raises(BadRequest, match="empty"):
            await db.get("t", "")
        with pytest.raises(BadRequest, match="limit"):
            await db.scan("t", limit=100_000)

    play(scenario, value_size_bytes_max=1024)
    assert (
        NodeConfig.from_dict({"name": "n", "secret": "s" * 16, "data_dir": "d"}).comm.message_size_bytes_max
        > TRANSACTION_SIZE_BYTES_MAX
    )


def test_conflicts_and_wrong_types_change_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        first = await db.commit([PointRead("t", "k", 0)], [put("k", [1])])
        with pytest.raises(Conflict, match="'k' was absent"):
            await db.commit([PointRead("t", "k", 0)], [put("k", 2), put("l", 2)])
        with pytest.raises(WrongType, match="root is an array"):
            await db.commit([], [put("l", 2), Write("set", "t", "k", 1, ("name",))])
        assert (await db.get("t", "k")).version == first.version
        assert (await db.get("t", "l")).version == 0

    play(scenario)


def test_a_repeated_commit_that_misses_its_container_may_have_happened() -> None:
    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        ask, item = cluster.client.call, ([], [put("k", 1).to_wire()], ["me", 1])
        await ask("n1", "db", "commit", *item)
        await cluster.db("n1").drop_container("t")
        for repeated in (False, True):
            with pytest.raises(NotFound) as caught:
                await ask("n2", "db", "commit", *item, repeated)
            assert caught.value.definite is not repeated
            ((told, error),) = (await ask("n2", "db", "commits", [packing.pack(item)], repeated)).value
            assert (told, error[0], error[2]) == (None, "not_found", not repeated)

    play(scenario)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_repeated_batch_that_reached_nobody_may_have_happened(repeated: bool) -> None:
    """Of this time nothing did; but what the log itself refuses is surely refused, whenever it was asked."""

    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        database = cluster.services["n1"].database

        async def commit_all(wanted: Any, *, repeated: bool) -> list[Any]:
            return [Unavailable("nobody leads"), Conflict("was changed"), Committed({0: 7})]

        database.commit_all = commit_all  # type: ignore[method-assign]
        items = [packing.pack(([], [put(key, 1).to_wire()], ["me", 1])) for key in "abc"]
        answer = (await cluster.client.call("n1", "db", "commits", items, repeated)).value
        assert [error and error[2] for _, error in answer] == [not repeated, True, None]
        assert answer[2][0] == [[0, 7]]

    play(scenario)


@pytest.mark.parametrize("when", ["before it is marked", "before it is deleted"])
def test_a_slow_drop_touches_only_the_container_that_it_found(when: str) -> None:
    """Meanwhile another node drops it, creates it anew, and writes: nobody loses that."""

    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        slow, at = cluster.services["n1"].database, {"reached": False, "goes on": False}
        commit = slow.commit

        async def commit_slowly(reads: Any, writes: Any, **more: Any) -> Committed:
            if writes[0].operation == ("set" if when == "before it is marked" else "delete"):
                at["reached"] = True
                await until(lambda: at["goes on"])
            return await commit(reads, writes, **more)

        slow.commit = commit_slowly  # type: ignore[method-assign]
        dropping = asyncio.ensure_future(cluster.db("n1").drop_container("t"))
        await until(lambda: at["reached"])
        db = cluster.db("n2")
        await db.drop_container("t")
        await db.create_container("t")
        await db.commit([], [put("k", "precious")])
        at["goes on"] = True
        await dropping
        for name in cluster.names:
            assert (await cluster.db(name).get("t", "k")).value == "precious"

    play(scenario)


def test_what_fails_half_way_is_not_surely_undone() -> None:
    async def scenario(cluster: Cluster) -> None:
        db, ask = await begin(cluster), cluster.client.call
        database = cluster.services["n1"].database
        real = database._all_shards

        async def fail(*_: Any) -> Any:
            raise Unavailable("shard 2 cannot be served")

        database._all_shards = fail  # type: ignore[assignment, method-assign]
        with pytest.raises(Unavailable) as caught:
            await ask("n1", "db", "drop_container", "t")
        assert not caught.value.definite
        database._all_shards = real  # type: ignore[method-assign]
        await ask("n1", "db", "drop_container", "t")
        assert await db.containers() == {}

        await ask("n1", "db", "stage_container", "s1", "t", None)
        await ask("n1", "db", "put_in_place", {"s1": "t"}, True)
        await ask("n1", "db", "stage_container", "s2", "t", None)
        database._drop = fail  # type: ignore[assignment, method-assign]
        with pytest.raises(Unavailable) as caught:
            await ask("n1", "db", "put_in_place", {"s2": "t"}, True)
        assert not caught.value.definite, "it is in its place; what was there is not dropped yet"

    play(scenario)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_commit_that_cannot_learn_where_its_container_is_may_have_happened_before(repeated: bool) -> None:
    """Not a conflict: that would be a reason to run the transaction again."""

    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        database = cluster.services["n1"].database
        database._known.clear()

        async def locked(*_: Any, **__: Any) -> Any:
            raise Conflict("locked by a transaction across shards")

        database.get = locked  # type: ignore[method-assign]
        with pytest.raises(Unavailable) as caught:
            await cluster.client.call("n1", "db", "commit", [], [put("k", 1).to_wire()], ["me", 1], repeated)
        assert caught.value.definite is not repeated

    play(scenario)


def test_a_batch_keeps_its_doubt_when_nobody_is_reached_any_more() -> None:
    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        database = cluster.services["n1"].database
        told: list[bool] = []

        async def call_again(shard: int, function: str, args: Any, deadline_s: float) -> Any:
            if function == "commits":
                return [["failed", Timeout("nobody knows").to_wire()] for _ in args(False)[0]]
            told.append(args(False)[0][2])
            raise Unavailable("nobody leads")

        keys = [f"k{number}" for number in range(9)]
        items = [packing.pack(([], [put(key, 1).to_wire()], ["me", n])) for n, key in enumerate(keys)]
        await cluster.db("n1").get("t", "k")  # it has looked the container up
        database._router.call_again = call_again  # type: ignore[method-assign]
        answer = (await cluster.client.call("n1", "db", "commits", items)).value
        assert told == [True] * 9, "that an attempt before may have had its effect"
        assert [(error[0], error[2]) for _, error in answer] == [("unavailable", False)] * 9

    play(scenario)


def test_remote_functions_and_blocks() -> None:
    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        ask = cluster.client.call
        block = Block().set("t", "ann", {"n": 1}).add("t", "ann", 4, ("n",)).get("x", "t", "ann", ("n",)).result("x")
        assert (await ask("n2", "db", "run", block.to_wire())).value == [5]
        found = (await ask("n1", "db", "get", "t", "ann", ["n"])).value
        assert found[0] == 5
        assert found[2] is True
        write = put("ann", 7, path=("n",)).to_wire()
        for repeated in (False, True):
            versions = (await ask("n1", "db", "commit", [], [write], ["me", 1], repeated)).value
            assert len(versions) == 1
        page = (await ask("n1", "db", "scan", "t")).value
        assert page[0] == [["ann", {"n": 7}, versions[0][1]]]
        await cluster.settled()
        shards = (await ask("n1", "db", "shards")).value
        assert [shard["shard"] for shard in shards] == [0, 1, 2, 3]
        assert all(shard["role"] == "primary" and len(shard["replicas"]) == 3 for shard in shards)
        with pytest.raises(BadRequest, match="separator"):
            await ask("n1", "db", "create_container", "x", {"color": "red"})
        with pytest.raises(BadRequest, match="snapshot"):
            await ask("n1", "db", "get", "t", "ann", [], [1])

    play(scenario)


def test_events_tell_what_happened() -> None:
    async def scenario(cluster: Cluster) -> None:
        await until(lambda: len(cluster.services) == 3)
        seen: list[Any] = []
        for name in cluster.names:
            cluster.world.nodes[name].env.events.subscribe(seen.append)
        db = await begin(cluster)
        await db.commit([], [put("k", 1)])
        with pytest.raises(Conflict):
            await db.commit([PointRead("t", "k", 0)], [put("k", 1)])
        commits = [event.data for event in seen if event.kind == "commit" and event.data["container"] == "t"]
        assert [commit["keys"] for commit in commits] == [["k"]]
        assert [e.data["key"] for e in seen if e.kind == "conflict"] == ["k"]
        assert sorted({e.data["shard"] for e in seen if e.kind == "shard_primary"}) == [0, 1, 2, 3]
        statistics = [cluster.services[name].statistics() for name in cluster.names]
        assert sum(s["conflicts"] for s in statistics) == 1
        assert sum(s["shards_primary"] for s in statistics) == 4

    play(scenario)

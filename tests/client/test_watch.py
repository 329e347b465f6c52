"""``db.watch``: what it takes, how it is consumed, and that it works on real nodes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import gostore as gs
from gostore.client import connect_at
from gostore.core.errors import BadRequest, Compacted, GoStoreError, NotFound, NotSupported, TooLarge, Unavailable
from gostore.core.keyvalue import Change
from gostore.testbed import Testbed


@pytest.fixture(scope="module")
def world() -> Iterator[Testbed]:
    with gs.simulate(3, seed=4, db={"shards": 4}) as cluster:
        cluster.db.create_container_sync("t", separator="/")
        cluster.db.set_sync("t", "d/before", 0)
        yield cluster


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({}, "give one of them"),
        ({"key": "k", "prefix": "k"}, "give one of them"),
        ({"key": 7}, "key = 7 is no string"),
        ({"prefix": b"k"}, "prefix = b'k' is no string"),
        ({"key": "k", "since": -1}, "expected a version"),
        ({"key": "k", "since": True}, "expected a version"),
        ({"key": "k", "since": "5"}, "expected a version"),
        ({"key": "k", "since": 1.0}, "expected a version"),
        ({"prefix": "", "since": {0: None}}, "expected a version"),
        ({"key": "k", "timeout_s": 0}, "timeout_s = 0"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(world: Testbed, what: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        world.db.watch("t", **what)


@pytest.mark.parametrize(
    ("container", "what", "error", "says"),
    [
        ("none", {"key": "k"}, NotFound, "there is no container"),
        ("t", {"key": ""}, BadRequest, "key"),
        ("t", {"key": "k" * 2000}, (BadRequest, TooLarge), "key"),
        ("t", {"key": "k", "since": 1_000_000}, BadRequest, "in the future"),
        ("t", {"prefix": "", "since": 0}, BadRequest, "spans 4 shards"),
        ("t", {"prefix": "", "since": {0: 0}}, BadRequest, "names no version of shard 1"),
        ("t", {"prefix": "", "since": {0: 0, 1: 0, 2: 0, 3: 1 << 40}}, BadRequest, "in the future"),
    ],
)
def test_what_cannot_be_watched_is_refused_when_it_begins(
    world: Testbed, container: str, what: dict[str, Any], error: type[GoStoreError], says: str
) -> None:
    watch = world.db.watch(container, **what)
    with pytest.raises(error, match=says):
        watch.open_sync()
    with pytest.raises(Unavailable, match="has not begun"):
        next(watch)


def test_a_watch_begins_when_its_block_is_entered(world: Testbed) -> None:
    watch = world.db.watch("t", key="d/begin")
    assert "not begun" in repr(watch)
    world.db.set_sync("t", "d/begin", "before")
    with watch:
        assert "at {" in repr(watch)
        version = world.db.set_sync("t", "d/begin", "after")
        world.db.set_sync("t", "d/other", "another key")
        gone = world.db.delete_sync("t", "d/begin")
        world.db.delete_sync("t", "d/begin")  # nothing was there, and nothing changes
        one, other = next(watch), next(watch)
        assert one == Change("t", "d/begin", version, one.shard, "after")
        assert other == Change("t", "d/begin", gone, one.shard, None, deleted=True)
        assert watch.poll_sync(3.0) == []
    assert list(watch) == []
    assert "closed" in repr(watch)
    with pytest.raises(Unavailable, match="was closed"):
        watch.open_sync()


def test_a_watch_goes_on_from_a_version_or_a_position(world: Testbed) -> None:
    db = world.db
    versions = [db.set_sync("t", "d/since", number) for number in range(5)]
    with db.watch("t", key="d/since", since=versions[1]) as watch:
        assert [change.value for change in (next(watch), next(watch))] == [2, 3]
        position = watch.position
    with db.watch("t", prefix="d/since", since=position) as watch:  # the separator: one shard, and one version
        assert [(change.value, change.version) for change in watch.poll_sync()] == [(4, versions[4])]
    with db.watch("t", key="d/since", since=versions[4]) as watch:
        assert watch.poll_sync() == []
    with db.watch("t", prefix="") as watch:
        position = watch.position
    for number in range(8):
        db.set_sync("t", f"everywhere{number}", number)
    found: list[Change] = []
    while len(found) < 8:
        with db.watch("t", prefix="everywhere", since=position) as watch:
            found.append(next(watch))
            position = watch.position
    assert sorted(change.key for change in found) == [f"everywhere{number}" for number in range(8)]
    assert {change.shard for change in found} > {0}


def test_every_write_of_a_transaction_is_a_change(world: Testbed) -> None:
    with world.db.watch("t", prefix="x") as watch:
        with world.db.transaction() as transaction:
            for number in range(8):
                transaction.add("t", f"x{number}", number, "deep")
            transaction.add("t", "x0", 1, "deep")
        found: list[Change] = []
        while len(found) < 8:
            found += watch.poll_sync(5.0)
        assert sorted((change.key, change.value["deep"]) for change in found) == [
            (f"x{number}", number or 1) for number in range(8)
        ]
        by_shard = {change.shard: change.version for change in found}
        assert len(by_shard) > 1
        assert all(change.version == by_shard[change.shard] for change in found)


async def interrupted(cluster: Testbed, container: str, count: int) -> list[int]:
    """What a watch delivers of these numbers to somebody whose waits are cancelled, at whatever moment."""
    values: list[int] = []

    async def write() -> None:
        for number in range(count):
            await cluster.db.set(container, "d/number", number)

    async with cluster.db.watch(container, key="d/number") as watch:
        writer = asyncio.ensure_future(write())
        turns = 0
        while not writer.done():
            task = asyncio.ensure_future(anext(watch))
            turns = (turns + 1) % 7
            for _ in range(turns):
                if not task.done():
                    await asyncio.sleep(0.001 * (turns == 6))
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                values.append(task.result().value)
        await writer
        while changes := await watch.poll(1.0):
            values += [change.value for change in changes]
    return values


def test_a_wait_that_is_cancelled_loses_nothing(world: Testbed) -> None:
    assert asyncio.run(interrupted(world, "t", 30)) == list(range(30))


def test_closing_ends_whoever_waits(world: Testbed) -> None:
    async def cell() -> None:
        watch = await world.db.watch("t", key="d/close").open()

        found: list[Change] = []
        came = asyncio.Event()

        async def consume() -> None:
            async for change in watch:
                found.append(change)
                came.set()

        async def close() -> None:
            await world.db.set("t", "d/close", 1)
            await came.wait()
            await watch.close()
            await watch.close()

        await asyncio.gather(consume(), close())
        assert [change.value for change in found] == [1]

    asyncio.run(cell())


def test_what_a_new_leader_does_not_know_is_never_skipped() -> None:
    """A position that the log does not reach, as after a loss of everything: told, and not waited for in silence."""
    with gs.simulate(1, seed=1, db={"shards": 1}) as cluster:
        cluster.db.create_container_sync("t")
        with cluster.db.watch("t", key="k", timeout_s=3.0) as watch:
            watch._since[0] = (1_000_000, 0)
            with pytest.raises(Compacted, match="knows nothing of 1000000: read again"):
                next(watch)


def test_where_no_order_is_final_there_are_no_watches() -> None:
    with gs.simulate(3, seed=1, db={"shards": 1, "replication": "quorum"}) as cluster:
        cluster.db.create_container_sync("t")
        with pytest.raises(NotSupported, match="no log whose order is final"):
            cluster.db.watch("t", key="k").open_sync()


# on real nodes


@pytest.mark.processes
def test_a_notebook_watches(cluster: Testbed) -> None:
    db = cluster.db
    db.create_container_sync("watched")
    with db.watch("watched", prefix="") as watch:
        writer = threading.Thread(target=lambda: [db.set_sync("watched", f"k{number}", number) for number in range(40)])
        writer.start()
        found = [next(watch) for _ in range(40)]
        writer.join()
        assert watch.poll_sync(0.1) == []
    assert sorted(change.value for change in found) == list(range(40))
    for shard in range(4):
        versions = [change.version for change in found if change.shard == shard]
        assert versions == sorted(versions)
    assert asyncio.run(interrupted(cluster, "watched", 50)) == list(range(50))


@pytest.mark.processes
def test_leaders_die_while_somebody_watches() -> None:
    with gs.launch(3, db={"shards": 2}) as cluster:
        cluster.db.create_container_sync("t")
        place: Any = cluster
        # A client from elsewhere is not told who was killed.
        with connect_at(place._place.root) as client, client.db.watch("t", prefix="") as watch:
            expected: list[Any] = []
            found: list[Any] = []
            for victim in ("n1", "n2"):
                for number in range(10):
                    expected.append((f"{victim}{number}", number))
                    cluster.db.set_sync("t", *expected[-1])
                    if number == 5:
                        cluster.nodes[victim].kill_sync()
                while len(found) < len(expected):
                    found += [(change.key, change.value) for change in watch.poll_sync(30.0)]
                cluster.faults.restart_sync(victim)
                cluster.wait_settled_sync()
            assert sorted(found) == sorted(expected)

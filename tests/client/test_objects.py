"""``cluster.db`` on real nodes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gostore.client.objects import TransactionHandle
from gostore.core.blocks import Block, var
from gostore.core.errors import AlreadyExists, BadRequest, Conflict, NotFound, WrongType
from gostore.testbed import Testbed

pytestmark = pytest.mark.processes


@pytest.fixture
def box(cluster: Testbed, request: pytest.FixtureRequest) -> str:
    name = request.node.name[:60].replace("[", "-").replace("]", "-")
    cluster.db.create_container_sync(name)
    return name


def test_values_are_nested_and_reached_by_paths(cluster: Testbed, box: str) -> None:
    db = cluster.db
    assert db.get_sync(box, "k") is None
    assert db.get_sync(box, "k", default=3) == 3
    first = db.set_sync(box, "k", {"a": [1, 2], "b": None})
    second = db.set_sync(box, "k", "deep", "c", "d", 0)
    assert second > first
    for node in cluster.nodes:
        assert db.get_sync(box, "k", via=node) == {"a": [1, 2], "b": None, "c": {"d": ["deep"]}}
    assert db.get_sync(box, "k", "a", 1) == 2
    db.add_sync(box, "k", 40, "a", 1)
    assert db.get_sync(box, "k", "a") == [1, 42]
    db.delete_sync(box, "k", "a")
    assert db.get_sync(box, "k", "a", default="gone") == "gone"
    db.delete_sync(box, "k")
    assert db.get_sync(box, "k") is None
    db.set_sync(box, "s", "text")
    with pytest.raises(WrongType):
        db.set_sync(box, "s", 1, "name")


def test_a_stale_read_is_asked_for_by_name(cluster: Testbed, box: str) -> None:
    cluster.db.set_sync(box, "k", 1)
    cluster.db.set_sync(box, "k", 2)
    assert cluster.db.get_sync(box, "k", consistency="stale") in (None, 1, 2)
    with pytest.raises(BadRequest, match="linearizable, stale"):
        cluster.db.get_sync(box, "k", consistency="fresh")


def test_containers(cluster: Testbed, box: str) -> None:
    cluster.db.create_container_sync(box)
    with pytest.raises(AlreadyExists):
        cluster.db.create_container_sync(box, separator="/")
    assert box in cluster.db.containers_sync()
    cluster.db.drop_container_sync(box)
    assert box not in cluster.db.containers_sync()
    with pytest.raises(NotFound):
        cluster.db.get_sync(box, "k")


def test_scan_goes_over_all_shards_and_pages(cluster: Testbed, box: str) -> None:
    async def main() -> None:
        await asyncio.gather(*(cluster.db.set(box, f"k{number:03}", number) for number in range(50)))
        assert await cluster.db.scan(box) == [(f"k{number:03}", number) for number in range(50)]
        assert await cluster.db.scan(box, "k01", limit=3) == [("k010", 10), ("k011", 11), ("k012", 12)]

    asyncio.run(main())


def test_a_transaction_is_all_or_nothing(cluster: Testbed, box: str) -> None:
    with cluster.db.transaction() as t:
        t.set(box, "alice", {"balance": 30})
        t.set(box, "bob", {"balance": 0})

    async def move(amount: int) -> None:
        async with cluster.db.transaction() as t:
            if await t.get(box, "alice", "balance") < amount:
                raise ValueError("too poor")
            t.add(box, "alice", -amount, "balance")
            t.add(box, "bob", amount, "balance")
            assert await t.get(box, "alice", "balance") == 30 - amount

    asyncio.run(move(10))
    assert cluster.db.scan_sync(box) == [("alice", {"balance": 20}), ("bob", {"balance": 10})]
    with pytest.raises(ValueError, match="too poor"):
        asyncio.run(move(25))
    assert cluster.db.get_sync(box, "alice", "balance") == 20


def test_a_conflict_changes_nothing_and_transact_runs_again(cluster: Testbed, box: str) -> None:
    cluster.db.set_sync(box, "n", 0)
    t = cluster.db.transaction()
    t.set(box, "n", t.get_sync(box, "n") + 1)
    cluster.db.set_sync(box, "n", 10)
    with pytest.raises(Conflict):
        t.commit_sync()
    assert cluster.db.get_sync(box, "n") == 10

    async def main() -> None:
        async def increment(t: TransactionHandle) -> int:
            value: int = await t.get(box, "n")
            t.set(box, "n", value + 1)
            return value

        seen = await asyncio.gather(*(cluster.db.transact(increment) for _ in range(6)))
        assert sorted(seen) == list(range(10, 16))

    asyncio.run(main())
    assert cluster.db.get_sync(box, "n") == 16


def test_a_block_is_one_round_trip_and_returns_its_variables(cluster: Testbed, box: str) -> None:
    block = (
        Block().let("bonus", 10).set(box, "a", {"n": 1}).add(box, "a", var("bonus"), ("n",))
        .get("after", box, "a", ("n",)).result("bonus", "after")
    )  # fmt: skip
    assert cluster.db.run_sync(block) == [10, 11]


def test_shards_tell_who_holds_what(cluster: Testbed) -> None:
    shards: list[dict[str, Any]] = cluster.db.shards_sync()
    assert len(shards) == 4


def test_a_commit_that_is_sent_again_happens_once(cluster: Testbed, box: str) -> None:
    """The answer is lost, the client does not know, and asks another node under the same request id."""
    from gostore.core.errors import Timeout

    connection = cluster._connected()
    call, lost = connection.endpoint.call, []

    async def lossy(node: str, service: str, function: str, *args: Any, **keywords: Any) -> Any:
        reply = await call(node, service, function, *args, **keywords)
        if function == "commit" and len(lost) < 2:
            lost.append(args[-1])
            raise Timeout("the answer was lost")
        return reply

    connection.endpoint.call = lossy  # type: ignore[method-assign]
    try:
        cluster.db.add_sync(box, "n", 5)
    finally:
        connection.endpoint.call = call  # type: ignore[method-assign]
    assert lost == [False, True]
    assert cluster.db.get_sync(box, "n") == 5

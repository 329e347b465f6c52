"""db on several nodes of a simulated world: the real service, on a real log, with a membership written by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.cluster.members import MASTERS_RING, Member, NodeState
from gostore.cluster.view import RingSpec, View, changes_between, found
from gostore.cluster.watchers import Watchers
from gostore.comm import Endpoint
from gostore.config import NodeConfig
from gostore.consensus import PROFILES
from gostore.consensus.groups import Groups
from gostore.core import packing
from gostore.core.address import Address
from gostore.core.blocks import Block
from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    ConfigError,
    Conflict,
    Forgotten,
    GoStoreError,
    NotFound,
    NotSupported,
    TooLarge,
    Unavailable,
    WrongType,
)
from gostore.core.events import Event
from gostore.core.keyvalue import Committed, Page, PointRead, RequestId, Versioned, Write
from gostore.core.transaction import Transaction, transact
from gostore.core.values import pack
from gostore.services.db import DbService, coordinator, leadership, replica
from gostore.services.db.database import TRANSACTION_SIZE_BYTES_MAX, Container
from gostore.sim.world import SimNode, World
from gostore.storage import Wal

WAIT_S = 60.0
ONE_LOG = ("raft", "primary_backup")
"""Policies in which all replicas have one log, so that transactions are what they should be."""
POLICIES = (*ONE_LOG, "quorum")


class Membership:
    """What one node believes of the cluster."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.watchers = Watchers(self.report)

    def report(self, error: BaseException) -> None:
        raise error

    def become(self, view: View) -> None:
        old, self.view = self.view, view
        self.watchers.notify(old, view, changes_between(old, view))


class Db:
    """``KeyValue`` through one node, for coroutines on the client's machine."""

    def __init__(self, endpoint: Endpoint, node: str) -> None:
        self._endpoint = endpoint
        self._node = node

    async def ask(self, function: str, *args: Any, timeout_s: float | None = None) -> Any:
        while True:
            try:
                return (await self._endpoint.call(self._node, "db", function, *args, timeout_s=timeout_s)).value
            except Forgotten:
                # The node was born again; what changes nothing is asked again.
                if function == "commit":
                    raise

    async def create_container(self, name: str, **options: Any) -> None:
        await self.ask("create_container", name, options)

    async def drop_container(self, name: str) -> None:
        await self.ask("drop_container", name)

    async def containers(self) -> Any:
        return await self.ask("containers")

    async def get(
        self, container: str, key: str, path: Any = (), *, snapshot: Any = None, timeout_s: float | None = None
    ) -> Versioned:
        pairs = list(map(list, (snapshot or {}).items()))
        return Versioned.from_wire(await self.ask("get", container, key, list(path), pairs, timeout_s=timeout_s))

    async def scan(
        self,
        container: str,
        prefix: str = "",
        *,
        start: str = "",
        end: str | None = None,
        limit: int = 1024,
        snapshot: Any = None,
        timeout_s: float | None = None,
    ) -> Page:
        pairs = list(map(list, (snapshot or {}).items()))
        wire = await self.ask("scan", container, prefix, start, end, limit, pairs, timeout_s=timeout_s)
        return Page.from_wire(wire)

    async def commit(
        self,
        reads: Any,
        writes: Any,
        *,
        request_id: RequestId | None = None,
        timeout_s: float | None = None,
        repeated: bool = False,
    ) -> Committed:
        args = [[read.to_wire() for read in reads], [write.to_wire() for write in writes]]
        request = None if request_id is None else request_id.to_wire()
        return Committed.from_wire(await self.ask("commit", *args, request, repeated, timeout_s=timeout_s))


class Cluster:
    """Nodes n0, n1, ... in a world. A view is told to all running nodes at once, unless a test says otherwise."""

    def __init__(self, world: World, nodes: int, replicas: int = 3, **db: Any) -> None:
        self.world = world
        self.names = [f"n{number}" for number in range(nodes)]
        self.settings = {"shards": 4, **db}
        self.memberships: dict[str, Membership] = {}
        self.services: dict[str, DbService] = {}
        self.client: Endpoint
        self.addresses: dict[str, Address] = {}
        rings = {"global": RingSpec(replicas, 16), MASTERS_RING: RingSpec(3, 16)}
        self.view = View("test", 0, {}, rings)
        for name in self.names:
            world.add_node(name, main=self.main)

    async def main(self, node: SimNode) -> None:
        """The process of one node."""
        env, name = node.env, node.name
        wal = await Wal.open(env, self.config(name).storage)
        endpoint = Endpoint(
            env,
            cluster="test",
            secret="s" * 16,
            host=node.address,
            tcp_port=7000,
            udp_port=7000,
            incarnation=node.incarnation,
            resolver=self,
            config=self.config(name).comm,
        )
        membership = Membership(self.view)
        groups = Groups(env, endpoint, wal, PROFILES["fast"])
        service = DbService(env, endpoint, membership, wal, groups, self.config(name))
        endpoint.register(groups)
        endpoint.register(service)
        await endpoint.start()
        await groups.start()
        self.addresses[name] = endpoint.address
        await service.start()
        membership.become(self.view)
        self.memberships[name] = membership
        self.services[name] = service

    def config(self, name: str) -> NodeConfig:
        return NodeConfig.from_dict({"name": name, "secret": "s" * 16, "data_dir": name, "db": self.settings})

    def address(self, name: str) -> Address | None:
        return self.addresses.get(name)

    # membership

    def next_view(self, states: dict[str, NodeState]) -> View:
        members = dict(self.view.members)
        for name, state in states.items():
            incarnation = self.world.nodes[name].incarnation
            members[name] = Member(name=name, address=Address("0", 1, 1), state=state, incarnation=incarnation)
        view = View("test", self.view.epoch + 1, members, self.view.rings, cache=self.view.cache)
        founders = self.view.founders or (found(view, self.settings["shards"]) if view.online else ())
        self.view = replace(view, founders=founders)
        return self.view

    def set_states(self, **states: NodeState) -> None:
        view = self.next_view(states)
        for name in self.running:
            self.tell(name, view)

    def tell(self, name: str, view: View) -> None:
        """The news arrives at one node."""

        async def become() -> None:
            self.memberships[name].become(view)

        self.world.nodes[name].spawn(become(), name="view")

    async def on(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine inside a node."""
        task = self.world.nodes[name].spawn(coroutine, name="test")
        await until(task.done)
        return task.result()

    async def connect(self) -> None:
        """The client's own endpoint."""
        self.client = Endpoint(
            self.world.client().env,
            cluster="test",
            secret="s" * 16,
            host=self.world.client().address,
            incarnation=1,
            resolver=self,
            config=self.config("client").comm,
        )
        await self.client.start()

    @property
    def running(self) -> list[str]:
        return [n for n in self.names if n in self.services and self.world.nodes[n].state == "running"]

    async def all_up(self, names: list[str] | None = None) -> None:
        wanted = self.names if names is None else names
        await self.connect()
        await until(lambda: all(name in self.services for name in wanted))
        self.set_states(**dict.fromkeys(wanted, NodeState.ONLINE))

    def crash(self, name: str, *, power: bool = False, told: bool = True) -> None:
        (self.world.power_cut if power else self.world.crash)(name)
        self.services.pop(name)
        if told:
            self.set_states(**{name: NodeState.OFFLINE})

    async def restart(self, name: str) -> None:
        self.services.pop(name, None)
        self.world.restart(name)
        await until(lambda: name in self.services)
        self.set_states(**{name: NodeState.ONLINE})

    # looking

    def db(self, name: str) -> Db:
        return Db(self.client, name)

    def owners(self, shard: int) -> tuple[str, ...]:
        return self.view.ring().owners(b"shard:%d" % shard)

    def primary(self, shard: int) -> str:
        return self.owners(shard)[0]

    def machine(self, name: str, shard: int) -> Any:
        return self.services[name]._shards[shard].machine

    async def settled(self) -> None:
        await until(
            lambda: (
                all(not self.services[name].status()["unsettled"] for name in self.running)
                and all(
                    self.services[self.primary(s)].status()["leads"].count(s) for s in range(self.settings["shards"])
                )
            )
        )

    async def converged(self) -> None:
        """All replicas of every shard have applied the same."""

        def equal() -> bool:
            for shard in range(self.settings["shards"]):
                digests = [self.machine(name, shard).digest() for name in self.owners(shard)]
                if digests != digests[:1] * len(digests):
                    return False
            return True

        await until(equal)

    def key_of(self, shard: int, number: int = 0) -> str:
        """A key that lives in a shard (of a container without separator)."""
        service = self.services[self.running[0]]
        holder = Container("t", "t", None, "")
        found = (f"k{n}" for n in range(100_000) if service.database.shard_of(holder, f"k{n}") == shard)
        for _ in range(number):
            next(found)
        return next(found)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the condition lies in other processes
            await asyncio.sleep(0.01)


Scenario = Callable[[Cluster], Coroutine[Any, Any, None]]


def play(scenario: Scenario, *, nodes: int = 3, seed: int = 1, **options: Any) -> None:
    with World(seed) as world:
        cluster = Cluster(world, nodes, **options)
        world.run(scenario(cluster), timeout_s=300.0)
        assert not world.statistics()["errors"]


async def begin(cluster: Cluster) -> Any:
    await cluster.all_up()
    db = cluster.db(cluster.names[0])
    await db.create_container("t")
    await db.get("t", "k")
    return db


def put(key: str, value: Any, **more: Any) -> Write:
    return Write("set", "t", key, value, **more)


# one cluster, nothing fails


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


# nodes fail


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


# transactions across shards


@pytest.mark.parametrize("replication", ONE_LOG)
def test_transactions_across_shards_keep_the_bank_in_balance_while_nodes_die(replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        rng = cluster.world.rng("test")
        accounts = [f"account{n}" for n in range(12)]
        await db.commit([], [put(name, 100) for name in accounts])
        done = False
        moved = audited = 0

        async def pause(attempt: int) -> None:
            await asyncio.sleep(rng.uniform(0.0, 0.02 * 2 ** min(attempt, 4)))

        async def mover() -> None:
            nonlocal moved
            while not done:
                source, target = rng.sample(accounts, 2)

                async def body(t: Transaction, source: str = source, target: str = target) -> None:
                    balance = await t.get("t", source)
                    if balance >= 10:
                        t.set("t", source, balance - 10)
                        t.add("t", target, 10)

                await asyncio.sleep(rng.uniform(0.0, 0.2))
                try:
                    await transact(cluster.db(rng.choice(cluster.running)), body, pause=pause)
                    moved += 1
                except (GoStoreError, KeyError):
                    await asyncio.sleep(0.05)

        async def auditor() -> None:
            nonlocal audited
            while not done:

                async def body(t: Transaction) -> int:
                    return sum(entry.value for entry in await t.scan("t"))

                await asyncio.sleep(rng.uniform(0.0, 0.2))
                try:
                    total = await transact(cluster.db(rng.choice(cluster.running)), body, pause=pause)
                except (GoStoreError, KeyError):
                    await asyncio.sleep(0.05)
                    continue
                assert total == 1200
                audited += 1

        tasks = [asyncio.ensure_future(run) for run in (mover(), mover(), mover(), auditor())]
        for _ in range(3):
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            victim = rng.choice(cluster.names)
            cluster.crash(victim, power=rng.random() < 0.5)
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            await cluster.restart(victim)
        done = True
        await asyncio.gather(*tasks)
        await cluster.settled()
        # No lock stays: everything can be written again.
        await until(lambda: all(cluster.services[n].statistics()["prepared"] == 0 for n in cluster.names))
        page = await cluster.db("n0").scan("t")
        assert sum(entry.value for entry in page.entries) == 1200

        async def all_at_once(t: Transaction) -> None:
            for name in accounts:
                t.set("t", name, 1)

        # The leads may still be on their way home, and a transaction that meets that is refused, and run again.
        await transact(cluster.db("n0"), all_at_once, pause=pause)
        await cluster.converged()
        assert moved > 20
        assert audited > 0

    play(scenario, nodes=4, replication=replication)


@pytest.mark.parametrize("replication", ONE_LOG)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_coordinator_that_dies_leaves_no_lock(monkeypatch: pytest.MonkeyPatch, when: str, replication: str) -> None:
    """Its successor aborts what was not decided, and tells what was."""

    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        await cluster.settled()
        keys = [cluster.key_of(shard) for shard in range(4)]
        coordinating = cluster.primary(0)
        client = next(name for name in cluster.names if name != coordinating)
        reached: list[bool] = []
        seen: list[Event] = []
        for node in cluster.names:
            if node != coordinating:
                cluster.world.nodes[node].env.events.subscribe(seen.append)
        cut = coordinator.Coordinator._tell if when == "after" else coordinator.Coordinator._prepare_all

        async def stuck(self: Any, *args: Any) -> Any:
            """The driver gets here, and never any further."""
            if self._env.name != coordinating or self._env is not cluster.world.nodes[coordinating].env:
                return await cut(self, *args)
            if when == "before":
                await cut(self, *args)
            reached.append(True)
            await asyncio.Event().wait()
            return None

        name = "_tell" if when == "after" else "_prepare_all"
        monkeypatch.setattr(coordinator.Coordinator, name, stuck)

        async def commit() -> None:
            await cluster.db(client).commit([], [put(key, "new") for key in keys], timeout_s=20.0)

        task = asyncio.ensure_future(commit())
        await until(lambda: bool(reached))
        cluster.crash(coordinating)
        try:
            await task
            happened = True
        except Conflict:
            happened = False
        assert happened == (when == "after")
        values = [(await cluster.db(client).get("t", key)).value for key in keys]
        assert values == (["new"] * 4 if happened else [None] * 4)
        await until(lambda: all(cluster.services[n].statistics()["prepared"] == 0 for n in cluster.running))
        await until(lambda: all(cluster.services[n].statistics()["coordinated"] == 0 for n in cluster.running))
        await cluster.db(client).commit([], [put(key, "again") for key in keys])
        recovered = [event.data["outcome"] for event in seen if event.kind == "transaction_recovered"]
        assert recovered == ["commit" if happened else "abort"]

    play(scenario, nodes=4, replication=replication)


def test_a_late_prepare_is_resolved_by_asking() -> None:
    """The message that was delayed arrives when the transaction was aborted and forgotten long ago."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        key = cluster.key_of(1)
        shard = cluster.services[cluster.primary(1)]._shards[1]
        physical = cluster.services["n0"].database.known("t").physical
        write = ["set", physical, key, [], pack("late", 100)]

        async def prepare() -> Any:
            now_s = asyncio.get_running_loop().time()
            return await shard.propose(["prepare", "0.1000.99999", 0, [], [write]], now_s + 5)

        assert (await cluster.on(cluster.primary(1), prepare()))[0] == "ok"
        await db.commit([], [put(key, "mine")])
        assert (await db.get("t", key)).value == "mine"

    play(scenario)


def test_read_only_transactions_across_shards_are_validated() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        first, second = cluster.key_of(0), cluster.key_of(1)
        await db.commit([], [put(first, 1), put(second, 1)])
        t = Transaction(db)
        assert await t.get("t", first) == 1
        await db.commit([], [put(first, 2), put(second, 2)])
        assert await t.get("t", second) == 2, "another shard, a later snapshot"
        with pytest.raises(Conflict):
            await t.commit()

    play(scenario)


# raft


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

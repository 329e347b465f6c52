"""db on several nodes of a simulated world: the real service, on a real log, with a membership written by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from gostore.cluster.members import MASTERS_RING, Member, NodeState
from gostore.cluster.view import RingSpec, View, changes_between, found
from gostore.cluster.watchers import Watchers
from gostore.comm import Endpoint
from gostore.config import NodeConfig
from gostore.consensus import PROFILES
from gostore.consensus.groups import Groups
from gostore.core.address import Address
from gostore.core.errors import (
    Forgotten,
)
from gostore.core.keyvalue import Committed, Page, RequestId, Versioned, Write
from gostore.services.db import DbService
from gostore.services.db.database import Container
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

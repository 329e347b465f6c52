"""A cluster of cls services in one process, over loopback and real directories."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from gostore.cluster import View
from gostore.comm import Endpoint
from gostore.config import NodeConfig
from gostore.consensus import PROFILES
from gostore.consensus.groups import Groups
from gostore.core.address import Address
from gostore.core.errors import GoStoreError
from gostore.core.events import Event
from gostore.core.slots import PolicySource
from gostore.env import Env, real_env
from gostore.services.cls import ClsService, Patience, next_incarnation
from gostore.storage import Wal

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

WAIT_S = 30.0
"""The limit of every wait; a run on an idle machine needs a tenth of it at most."""


class Resolver:
    def __init__(self) -> None:
        self.cls: ClsService | None = None

    def address(self, name: str) -> Address | None:
        return self.cls.address(name) if self.cls is not None else None


class Node:
    """One node without db and fs."""

    def __init__(
        self,
        root: Path,
        name: str,
        join: Iterable[str] = (),
        policy: PolicySource | None = None,
        at: Address | None = None,
        **settings: Any,
    ) -> None:
        self.name = name
        self.seed = hash_of(f"{root.name} {name}")
        self.at = at or Address("127.0.0.1", 0, 0)
        self.config = NodeConfig.from_dict(
            {
                "name": name,
                "secret": "a secret of the tests",
                "data_dir": str(root / name),
                "join": tuple(join),
                "cls": settings,
            }
        )
        self.policy = policy
        self.events: list[Event] = []
        self.fatal: list[str] = []
        self.env: Env
        self.endpoint: Endpoint
        self.cls: ClsService

    async def boot(self, patience: Patience | None = None) -> None:
        """Everything but the start of membership."""
        self.env = real_env(self.name, self.config.data_dir, seed=self.seed)
        self.env.on_fatal = self.fatal.append
        self.env.events.subscribe(self.events.append)
        self.wal = await Wal.open(self.env, self.config.storage)
        resolver = Resolver()
        self.endpoint = Endpoint(
            self.env,
            cluster="test",
            secret=self.config.secret,
            host=self.at.host,
            tcp_port=self.at.tcp_port,
            udp_port=self.at.udp_port,
            incarnation=await next_incarnation(self.env),
            resolver=resolver,
            config=self.config.comm,
        )
        self.groups = Groups(self.env, self.endpoint, self.wal, PROFILES[self.config.cls.profile])
        self.cls = resolver.cls = ClsService(
            self.env, self.endpoint, self.wal, self.groups, self.config, self.policy, patience=patience
        )
        self.endpoint.register(self.groups)
        self.endpoint.register(self.cls)
        await self.endpoint.start()
        await self.groups.start()

    async def start(self) -> None:
        await self.boot()
        await self.cls.start()

    async def kill(self) -> None:
        """Gone without a word."""
        self.endpoint.pause()
        await self.cls.stop()
        await self.groups.stop()
        await self.endpoint.stop()
        await self.env.tasks.stop()
        self.env.disk.close()

    async def stop(self) -> None:
        await self.cls.stop()
        await self.groups.stop()
        await self.endpoint.stop()
        await self.wal.close()
        await self.env.tasks.stop()
        self.env.disk.close()

    @property
    def contact(self) -> list[str]:
        """What others set as ``join``."""
        return [f"127.0.0.1:{self.endpoint.address.tcp_port}"]

    @property
    def view(self) -> View:
        return self.cls.view

    @property
    def votes(self) -> bool:
        return self.cls.group.settled and self.name in self.cls.group.configuration.voters

    async def wait(self, predicate: Callable[[View], bool]) -> View:
        return await self.cls.wait_view(predicate, WAIT_S)

    async def wait_version(self, version: tuple[int, int]) -> View:
        return await self.wait(lambda view: view.version >= version)

    def published(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event.data) for event in self.events if event.kind == kind]


def hash_of(name: str) -> int:
    return sum(name.encode())


class Nodes:
    """``n1`` starts the cluster; the others join through it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running: dict[str, Node] = {}
        self.places: dict[str, Address] = {}

    async def add(
        self, name: str, *, policy: PolicySource | None = None, same_place: bool = False, **settings: Any
    ) -> Node:
        """Start a node, or start it again; ``same_place``: on the ports that it had."""
        join = [address for node in self.running.values() for address in node.contact]
        node = Node(self.root, name, join[:2], policy, self.places[name] if same_place else None, **settings)
        await node.start()
        self.running[name] = node
        return node

    async def launch(self, count: int, **settings: Any) -> list[Node]:
        """All are online at all when this returns, and the masters' group is what the seats say."""
        first = await self.add("n1", **settings)
        rest = [Node(self.root, f"n{i}", first.contact, **settings) for i in range(2, count + 1)]
        await asyncio.gather(*(node.start() for node in rest))
        self.running.update({node.name: node for node in rest})
        await self.wait_online(self.running)
        await self.wait_masters()
        return list(self.running.values())

    async def wait_masters(self) -> None:
        """Until every node that has a seat knows that it votes."""
        async with asyncio.timeout(WAIT_S):
            for node in self.running.values():
                while node.name in node.view.masters and not node.votes:
                    await node.cls.group.wait_changed(asyncio.get_running_loop().time() + WAIT_S)

    async def wait_online(self, names: Iterable[str]) -> None:
        """Until exactly these are online, as seen by each of them, in one epoch."""
        expected = tuple(sorted(names))

        async def settled() -> None:
            while True:
                views = [await self.running[name].wait(lambda view: view.online == expected) for name in expected]
                latest = max(view.version for view in views)
                again = [await self.running[name].wait_version(latest) for name in expected]
                if all(view.online == expected and view.version == latest for view in again):
                    return

        async with asyncio.timeout(WAIT_S):
            await settled()

    async def kill(self, name: str) -> Node:
        node = self.running.pop(name)
        self.places[name] = node.endpoint.address
        await node.kill()
        return node

    async def kill_all(self) -> None:
        """At one moment: nobody sees another one die."""
        for node in self.running.values():
            node.endpoint.pause()
        for name in list(self.running):
            await self.kill(name)

    async def stop(self) -> None:
        for node in list(self.running.values()):
            await node.stop()
        self.running.clear()


async def with_nodes(root: Path, scenario: Callable[[Nodes], Awaitable[None]]) -> None:
    nodes = Nodes(root)
    try:
        await scenario(nodes)
    finally:
        await nodes.stop()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Nodes], Awaitable[None]]], None]:
    """Run a scenario ``async def scenario(nodes)`` and stop what it started."""
    return lambda scenario: asyncio.run(with_nodes(tmp_path, scenario))


__all__ = ["GoStoreError", "Node", "Nodes"]

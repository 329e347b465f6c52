"""Endpoints over loopback, in one process."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gostore.comm import Call, Endpoint, Reply, remote, service
from gostore.config import CommConfig
from gostore.core.address import Address
from gostore.core.errors import NotFound
from gostore.core.events import Event
from gostore.env import Env, RealClock

SECRET = "0123456789abcdef"
MIB = 1024 * 1024
WAIT_S = 30.0


class Members:
    """A resolver to which addresses are written."""

    def __init__(self) -> None:
        self.known: dict[str, Address] = {}

    def address(self, name: str) -> Address | None:
        return self.known.get(name)


async def until(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds; it is looked at again and again."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - anything may be a condition
            await asyncio.sleep(0.001)


@service("echo")
class Echo:
    """What the tests call; it counts what ran."""

    def __init__(self) -> None:
        self.ran: dict[str, int] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[Call] = []

    def _count(self, key: str) -> None:
        self.ran[key] = self.ran.get(key, 0) + 1

    @remote
    async def echo(self, call: Call, value: Any) -> Any:
        self._count(str(value))
        return value

    @remote
    def note(self, call: Call, key: str) -> None:
        """In the turn in which it arrives."""
        self.calls.append(call)
        if key == "bug":
            raise RuntimeError("a bug")
        self._count(key)

    @remote
    async def add(self, call: Call, left: int, right: int = 1) -> int:
        return left + right

    @remote
    async def typed(self, call: Call, a: int, b: float, c: str | None, d: list[int], e: bytes = b"") -> str:
        return "fits"

    @remote
    async def held(self, call: Call, key: str) -> str:
        self._count(key)
        await self.gate.wait()
        return key

    @remote
    async def block(self, call: Call, size: int) -> Reply:
        self._count("block")
        return Reply(len(call.data), b"x" * size)

    @remote
    async def fail(self, call: Call, what: str) -> None:
        self._count("fail")
        if what == "bug":
            raise RuntimeError("a bug")
        raise NotFound(f"no {what}", hint=what)

    @remote
    async def pass_on(self, call: Call, chain: list[str], key: str) -> list[str]:
        """Redirects along a chain of names; the last one answers."""
        self._count(key)
        me = call.endpoint.name
        rest = chain[chain.index(me) + 1 :] if me in chain else chain
        if rest:
            call.redirect(rest[0])
        return [call.endpoint.name, call.source]

    @remote
    async def toss(self, call: Call, to: dict[str, str]) -> None:
        """Redirects for ever."""
        self._count("toss")
        call.redirect(to[call.endpoint.name])

    @remote
    async def deadline(self, call: Call, to: str) -> float:
        """The time left here, and there for a nested call that names no timeout."""
        left = call.deadline_s - asyncio.get_running_loop().time()
        if not to:
            return left
        return float((await call.endpoint.call(to, "echo", "deadline", "")).value)


class Node:
    """One endpoint with its env and its echo."""

    def __init__(self, env: Env, endpoint: Endpoint, echo: Echo) -> None:
        self.env = env
        self.endpoint = endpoint
        self.echo = echo
        self.events: list[Event] = []

    def statistic(self, name: str) -> int:
        return self.endpoint.statistics().get(name, 0)

    async def stop(self) -> None:
        await self.endpoint.stop()
        await self.env.tasks.stop()


class Net:
    """Makes nodes that know one another."""

    def __init__(self) -> None:
        self.members = Members()
        self.nodes: list[Node] = []

    async def node(
        self,
        name: str,
        *,
        incarnation: int = 1,
        known: bool = True,
        cluster: str = "test",
        secret: str = SECRET,
        address: Address | None = None,
        **settings: Any,
    ) -> Node:
        settings.setdefault("attempt_timeout_s", 0.02)
        settings.setdefault("timeout_s", WAIT_S)
        env = Env(
            name,
            clock=RealClock(),
            rng=random.Random(len(self.nodes)),
            disk=None,  # type: ignore[arg-type]
            log=logging.getLogger(f"test.{name}"),
        )
        at = address or Address("127.0.0.1", 0, 0)
        endpoint = Endpoint(
            env,
            cluster=cluster,
            secret=secret,
            host=at.host,
            tcp_port=at.tcp_port,
            udp_port=at.udp_port,
            incarnation=incarnation,
            resolver=self.members,
            config=CommConfig(**settings),
        )
        echo = Echo()
        endpoint.register(echo)
        await endpoint.start()
        if known:
            self.members.known[name] = endpoint.address
        node = Node(env, endpoint, echo)
        self.nodes.append(node)
        return node

    async def stop(self) -> None:
        for node in self.nodes:
            await node.stop()


@pytest.fixture
def run_net() -> Callable[[Callable[[Net], Coroutine[Any, Any, None]]], None]:
    """Runs ``scenario(net)`` on a fresh loop and stops every node that it made."""

    def run(scenario: Callable[[Net], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            net = Net()
            try:
                await scenario(net)
            finally:
                await net.stop()

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


Run = Callable[[Callable[[Net], Coroutine[Any, Any, None]]], None]
"""What ``run_net`` gives."""

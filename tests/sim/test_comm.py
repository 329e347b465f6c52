"""The unmodified endpoints of two and more nodes on the simulated network."""

from __future__ import annotations

import asyncio

import pytest

from gostore.comm import Call, Endpoint, Reply, remote, service
from gostore.config import CommConfig
from gostore.core.address import Address
from gostore.core.errors import GoStoreError, Timeout
from gostore.sim.world import World

SECRET = "0123456789abcdef"


class Everybody:
    """Knows where every node of a world listens."""

    def __init__(self, world):
        self.world = world

    def address(self, name):
        node = self.world.nodes.get(name)
        return None if node is None else Address(node.address, 7000, 7000)


@service("counter")
class Counter:
    def __init__(self):
        self.value = 0
        self.seen: list[int] = []

    @remote
    async def add(self, call: Call, number: int) -> int:
        self.seen.append(number)
        self.value += 1
        return self.value

    @remote
    async def echo(self, call: Call) -> Reply:
        await asyncio.sleep(0.01)
        return Reply(len(call.data), call.data)


def cluster(world, names):
    async def main(node):
        node.counter = Counter()
        node.endpoint = Endpoint(
            node.env, cluster="test", secret=SECRET, host=node.address, tcp_port=7000, udp_port=7000,
            incarnation=node.incarnation, resolver=Everybody(world), config=CommConfig(),
        )  # fmt: skip
        node.endpoint.register(node.counter)
        await node.endpoint.start()

    for name in names:
        world.add_node(name, main)
    world.run_for(0.1)
    return [world.node(name) for name in names]


def test_calls_small_and_large():
    async def main(a):
        assert (await a.endpoint.call("b", "counter", "add", 7)).value == 1
        data = bytes(range(256)) * 4000
        reply = await a.endpoint.call("b", "counter", "echo", data=data)
        assert (reply.value, bytes(reply.data)) == (len(data), data)

    with World(1) as world:
        a, b = cluster(world, "ab")
        world.run(main(a), on="a")
        assert b.counter.seen == [7]
        assert a.loop.errors == b.loop.errors == []


def test_at_most_once_under_loss_duplicates_and_reordering():
    async def main(a):
        async def one(i):
            try:
                await a.endpoint.call("b", "counter", "add", i, timeout_s=20.0)
            except Timeout:
                return 0
            return 1

        return sum(await asyncio.gather(*(one(i) for i in range(200))))

    with World(3) as world:
        a, b = cluster(world, "ab")
        for pair in (("a", "b"), ("b", "a")):
            world.net.links.set(*pair, loss=0.2, duplicate=0.2, reorder=0.5)
        acknowledged = world.run(main(a), on="a")
        assert acknowledged > 190
        assert len(set(b.counter.seen)) == len(b.counter.seen) >= acknowledged
        assert world.net.drops["loss"] > 20


def test_a_partition_times_out_and_a_heal_lets_the_retry_succeed_once():
    async def main(world, a):
        world.net.cut(["b"], ["a"])  # requests arrive, answers do not
        with pytest.raises(Timeout):
            await a.endpoint.call("b", "counter", "add", 1, timeout_s=1.0)
        asyncio.get_running_loop().call_later(0.5, world.net.heal)
        assert (await a.endpoint.call("b", "counter", "add", 2, timeout_s=5.0)).value == 2

    with World(1) as world:
        a, b = cluster(world, "ab")
        world.run(a.endpoint.call("b", "counter", "add", 0), on="a")
        b.counter.value = 0
        b.counter.seen.clear()
        world.run(main(world, a), on="a")
        assert b.counter.seen == [1, 2]


def test_a_killed_and_a_paused_callee():
    async def main(world, a):
        call = asyncio.create_task(a.endpoint.call("b", "counter", "echo", data=bytes(100_000), timeout_s=3.0))
        await asyncio.sleep(0.005)
        world.crash("b")
        with pytest.raises(GoStoreError) as caught:
            await call
        assert not caught.value.definite
        world.restart("b")
        await asyncio.sleep(0.1)
        assert (await a.endpoint.call("b", "counter", "add", 1)).value == 1
        world.pause("b")
        with pytest.raises(Timeout):
            await a.endpoint.call("b", "counter", "add", 2, timeout_s=1.0)
        world.resume("b")
        assert (await a.endpoint.call("b", "counter", "add", 3)).value == 3

    with World(1) as world:
        a, _ = cluster(world, "ab")
        world.run(main(world, a), on="a")


def test_it_is_deterministic():
    async def main(a, names):
        async with asyncio.TaskGroup() as group:
            for i in range(100):
                group.create_task(a.endpoint.call(names[i % len(names)], "counter", "add", i))
                group.create_task(a.endpoint.call(names[i % len(names)], "counter", "echo", data=bytes(9000)))

    def trace(seed):
        with World(seed) as world:
            nodes = cluster(world, "abcd")
            world.net.links.set("a", "b", loss=0.1)
            world.run(main(nodes[0], "bcd"), on="a")
            return world.trace.sha256

    assert trace(5) == trace(5)
    assert trace(5) != trace(6)

"""How worlds end: silently, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
import weakref

import pytest

from gostore.sim import graveyard
from gostore.sim.errors import SimulationError
from gostore.sim.world import World


def test_silencing_works_here():
    assert graveyard.silencing_works()


def test_silenced_generators_do_not_run_when_they_are_freed():
    ran = []

    def generator(name):
        try:
            yield name
        finally:
            ran.append(name)

    def started(name):
        made = generator(name)
        next(made)
        return made

    one, two, three = started("one"), started("two"), started("three")
    assert graveyard.silence([{"deep": [(one,)]}, lambda held=two: held]) == 2
    del one, two
    assert ran == []
    del three
    assert ran == ["three"]


def test_running_generators_and_the_program_around_are_not_touched():
    def generator():
        # It is being run: silencing it would do harm.
        yield graveyard.silence([holder])

    holder = {}
    holder["running"] = generator()
    assert next(holder["running"]) == 0


def test_a_world_that_is_dropped_without_closing_is_silent_too():
    ran = []

    async def main(node):
        try:
            await asyncio.Event().wait()
        finally:
            ran.append("finally")

    world = World(1)
    world.add_node("n1", main)
    world.run_for(1)
    scheduler = weakref.ref(world.scheduler)
    del world
    gc.collect()
    assert ran == []
    assert scheduler() is None


def test_a_closed_world_does_nothing_more():
    async def main(node):
        node.events = []
        await asyncio.sleep(10)

    world = World(1)
    node = world.add_node("n1", main)
    world.run_for(1)
    world.close()
    world.close()
    assert repr(world) == "<World seed=1 closed>"
    coroutine = asyncio.sleep(1)
    with pytest.raises(SimulationError, match="closed"):
        world.run_for(1)
    with pytest.raises(SimulationError, match="closed"):
        world.run(coroutine)
    assert node.loop.call_soon(print).cancelled()


def test_even_what_the_walk_does_not_find_cannot_act(monkeypatch):
    """The second line: a closed world ignores its loops' calls."""
    monkeypatch.setattr(graveyard, "silencing_works", lambda: False)
    acted = []

    async def main(node):
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, (node.address, 1))
        _, writer = await asyncio.open_connection("n1", 80)
        try:
            await asyncio.Event().wait()
        finally:
            transport.sendto(b"from the grave", ("10.0.0.1", 1))
            writer.write(b"from the grave")
            writer.close()
            loop.call_soon(acted.append, "callback")
            loop.create_task(asyncio.sleep(0)).add_done_callback(acted.append)
            node.env.log.info("seen")

    async def serve(node):
        await asyncio.start_server(lambda r, w: None, node.address, 80)

    world = World(1)
    world.add_node("n1", serve)
    world.add_node("n2", main)
    world.run_for(1)
    before = (world.trace.sha256, world.trace.entries)
    world.close()
    gc.collect()
    assert (world.trace.sha256, world.trace.entries) == before
    assert acted == []


class Data(asyncio.DatagramProtocol):
    pass


async def busy(node):
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(Data, (node.address, 1))
    accepted = []

    async def accept(reader, writer):
        accepted.append(writer)
        await asyncio.sleep(3)

    server = await asyncio.start_server(accept, node.address, 80)
    node.env.disk.open("file", create=True).append(bytes(10_000))
    for i in range(20):
        node.env.tasks.start(asyncio.sleep(100 + i), name=f"sleep {i}")
    _, writer = await asyncio.open_connection(node.address, 80)
    try:
        async with server, asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(asyncio.Event().wait())
    finally:
        writer.close()


def short_life(seed):
    with World(seed) as world:
        for i in range(3):
            world.add_node(f"n{i}", busy)
        world.run_for(0.05)
        world.crash("n0")
        world.restart("n0")
        world.power_cut("n1")
        world.run_for(0.05)


def test_memory_does_not_grow_over_many_worlds():
    tracemalloc.start()
    try:
        sizes = []
        for _ in range(3):  # the first round fills caches
            for seed in range(20):
                short_life(seed)
            gc.collect()
            sizes.append((len(gc.get_objects()), tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    assert sizes[2][0] - sizes[1][0] < 200
    assert sizes[2][1] - sizes[1][1] < 60_000  # a single world takes more


def test_memory_stays_bounded_without_a_full_collection():
    """The automatic collector must see the garbage of worlds as such."""
    gc.collect()
    before = len(gc.get_objects())
    highest = 0
    for seed in range(60):
        short_life(seed)
        highest = max(highest, len(gc.get_objects()))
    assert highest < 1.5 * before + 60_000

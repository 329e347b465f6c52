"""A bare model of SWIM's traffic and a mixed workload, for the tests of determinism and speed.

``python model.py world|cluster SEED GC_THRESHOLDS`` prints the trace's hash: the tests run it in processes with other
hash seeds.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from contextlib import suppress

from gostore.sim.world import World


class Swim(asyncio.DatagramProtocol):
    """Probes a random member every period, and answers probes."""

    def __init__(self, node, members):
        self.node, self.members = node, members
        self.waiting = {}
        self.acks = self.failures = 0

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        if data[:1] == b"P":
            self.transport.sendto(b"A" + data[1:], addr)
        else:
            future = self.waiting.pop(data[1:5], None)
            if future is not None and not future.done():
                future.set_result(None)
                self.acks += 1

    async def probe(self, period_s):
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            number += 1
            key = number.to_bytes(4, "big")
            self.waiting[key] = future = loop.create_future()
            target = self.members[int(self.node.env.rng.random() * len(self.members))]
            self.transport.sendto(b"P" + key + b"gossip" * 10, target)
            try:
                async with asyncio.timeout(period_s / 2):
                    await future
            except TimeoutError:
                self.failures += 1
                self.waiting.pop(key, None)
            await asyncio.sleep(period_s)


def swim(world, count, period_s):
    """Add ``count`` members that probe each other."""
    members = []

    async def main(node):
        loop = asyncio.get_running_loop()
        _, node.swim = await loop.create_datagram_endpoint(lambda: Swim(node, members), (node.address, 1))
        await node.swim.probe(period_s)

    members.extend((world.add_node(f"n{i}", main).address, 1) for i in range(count))


async def mixed(node):
    """Streams, task groups, waits on sets of tasks, the disk, logging, time-outs."""
    log = logging.getLogger("model")

    async def serve(reader, writer):
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                writer.write(await reader.readexactly(1000))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, node.address, 80)
    file = node.env.disk.open("log", create=True)

    async def client(number):
        peer = f"m{(int(node.name[1:]) + number) % 3}"
        try:
            async with asyncio.timeout(3):
                reader, writer = await asyncio.open_connection(peer, 80)
        except (OSError, TimeoutError):
            return
        try:
            async with asyncio.timeout(3):
                for _ in range(3):
                    writer.write(node.env.rng.getrandbits(8000).to_bytes(1000, "big"))
                    await reader.readexactly(1000)
                    file.append(f"{number} {time.time()}".encode())
                    await file.sync()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.info("%s: %s", peer, type(error).__name__)
        finally:
            writer.close()

    async with server:
        for _ in range(15):
            tasks = {asyncio.create_task(client(i)) for i in range(4)}
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    # The order of a set is part of the trace.
                    file.append(task.get_name().encode())
            async with asyncio.TaskGroup() as group:
                for i in range(3):
                    group.create_task(asyncio.sleep(node.env.rng.random() / 10 * i))


def scenario(seed, sink=None):
    """A run with faults; returns (hash, entries)."""
    with World(seed, trace_sink=sink) as world:
        swim(world, 5, 0.2)
        for i in range(3):
            world.add_node(f"m{i}", mixed)
        world.net.links.set("n1", "n2", loss=0.2, duplicate=0.2, reorder=0.3)
        world.net.links.set("m0", "m1", loss=0.05)
        world.at(1.0, lambda: world.crash("n0"))
        world.at(1.5, lambda: world.net.partition(["m0"], ["m1", "m2"]))
        world.at(2.0, lambda: world.pause("m2"))
        world.at(2.5, lambda: world.restart("n0"))
        world.at(3.0, lambda: world.resume("m2"))
        world.at(3.5, world.net.heal)
        world.at(4.0, lambda: world.power_cut("m1"))
        world.at(4.2, lambda: world.node("m0").clock.jump(-100))
        world.at(5.0, lambda: world.restart("m1"))
        world.run_for(8)
        return world.trace.sha256, world.trace.entries


def cluster_scenario(seed):
    """A run of the whole product: five nodes, files, a kill, loss, a restart; returns (hash, entries)."""
    from gostore.core.errors import GoStoreError
    from gostore.sim import simulate

    with simulate(5, seed=seed, db={"shards": 4}) as cluster:

        async def work():
            for i in range(10):
                with suppress(GoStoreError):
                    await cluster.fs.write(f"/d/{i}", f"content {i}" * 1000)
                if i == 3:
                    await cluster.faults.kill("n3")
                if i == 5:
                    await cluster.faults.loss(0.05)
                if i == 7:
                    await cluster.faults.restart("n3")
            await cluster.faults.heal()
            await cluster.wait_ready()

        cluster.run(work())
        return cluster.sim.trace.sha256, cluster.sim.trace.entries


if __name__ == "__main__":
    gc.set_threshold(*map(int, sys.argv[3].split(",")))
    print(*{"world": scenario, "cluster": cluster_scenario}[sys.argv[1]](int(sys.argv[2])))

"""Storms over groups: kills, power cuts, partitions, moves, all at once; what was acknowledged stays, in one order."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections import Counter

from gostore.consensus.groups import Compaction
from gostore.core.errors import GoStoreError
from gostore.sim.world import SimNode, World

from .nodes import Cluster

STORM_S = 20.0


def storm(seed: int) -> tuple[Counter[str], str]:
    """Load, crashes, power cuts, partitions, loss and moves; then all that was acknowledged is there once."""
    done: Counter[str] = Counter()
    names = ("n1", "n2", "n3", "n4", "n5")
    with World(seed) as world:
        rng = world.rng("storm")
        cluster = Cluster(world, names, compaction=Compaction(size_bytes=3_000, entries=10_000))
        numbers = itertools.count()
        acknowledged: list[int] = []
        seen: list[tuple[int, list[int]]] = []  # reads: (how many were acknowledged before, what was read)

        async def client(name: str) -> None:
            loop = asyncio.get_running_loop()
            while True:
                await asyncio.sleep(rng.uniform(0.0, 0.05))
                group = cluster.group(name)
                try:
                    kind = rng.random()
                    if kind < 0.2:
                        before = len(acknowledged)
                        await group.read_barrier(loop.time() + 1.0)
                        seen.append((before, list(cluster.machines[name][0].values)))
                    elif kind < 0.4:
                        values = [next(numbers) for _ in range(rng.randrange(1, 5))]
                        payloads = [struct.pack("<q", value).ljust(200, b"\0") for value in values]
                        told = await group.propose_all(payloads, loop.time() + 1.0)
                        outcomes = zip(values, told, strict=True)
                        acknowledged.extend(value for value, one in outcomes if not isinstance(one, GoStoreError))
                    else:
                        value = next(numbers)
                        await group.propose(struct.pack("<q", value).ljust(200, b"\0"), loop.time() + 1.0)
                        acknowledged.append(value)
                except GoStoreError:
                    pass

        async def mover(name: str) -> None:
            loop = asyncio.get_running_loop()
            while True:
                await asyncio.sleep(rng.uniform(0.2, 0.6))
                group = cluster.group(name)
                voters, learners = group.configuration.voters, group.configuration.learners
                try:
                    if "n" in (others := "".join(rng.sample(names, 1))) and others not in voters and not learners:
                        await group.change(voters, (others,), loop.time() + 1.0)
                    elif learners and group.caught_up(learners[0]):
                        kept = rng.sample(voters, 2)
                        await group.change((*kept, learners[0]), (), loop.time() + 1.0)
                        done["changes"] += 1
                    removed = group.settled and name not in group.configuration.members
                    if removed and group.last.index and group.configuration.voters:
                        await group.clear()
                        done["cleared"] += 1
                except GoStoreError:
                    pass

        original = cluster._main

        async def main(node: SimNode) -> None:
            await original(node)
            node.spawn(client(node.name), name="client")
            node.spawn(mover(node.name), name="mover")

        for node in world.nodes.values():
            node.main = main
            cluster.restart(node.name)
        end_s = world.now + STORM_S
        while world.now < end_s:
            world.run_for(rng.uniform(0.1, 1.0))
            victim, fault = rng.choice(names), rng.randrange(6)
            done[f"fault {fault}"] += 1
            if fault == 0 and len(cluster.running()) == 5:
                world.crash(victim)
            elif fault == 1 and len(cluster.running()) == 5:
                world.power_cut(victim)
            elif fault == 2:
                world.net.partition([victim], [name for name in names if name != victim])
            elif fault == 3:
                for pair in itertools.permutations(names, 2):
                    world.net.links.set(*pair, loss=0.05, duplicate=0.1, reorder=0.2)
            else:
                world.net.heal()
            for node in world.nodes.values():
                if node.state == "down" and node.name in names and rng.random() < 0.5:
                    cluster.restart(node.name)
        world.net.heal()
        for node in list(world.nodes.values()):
            if node.state == "down":
                cluster.restart(node.name)
        leader = cluster.wait_leader()
        world.run_for(3.0)
        leader = cluster.wait_leader()
        members = cluster.group(leader).configuration.members
        cluster.wait_equal(members)
        values = cluster.machines[leader][0].values
        assert len(set(values)) == len(values)
        missing = set(acknowledged) - set(values)
        assert not missing, f"lost: {sorted(missing)}"
        for before, read in seen:
            assert read == values[: len(read)], "a read of another history"
            assert set(acknowledged[:before]) <= set(read), "a stale read"
        leaders: dict[int, str] = {}
        for event in cluster.events:
            if event.kind == "raft_leader":
                assert leaders.setdefault(event.data["term"], event.node) == event.node, "two leaders in a term"
            assert event.kind != "task_failed", event.data
            done[event.kind] += 1
        done["acknowledged"] += len(acknowledged)
        done["reads"] += len(seen)
        errors = [error for loop in world.scheduler.loops for error in loop.errors]
        assert not errors, errors
        return done, world.trace.sha256


def test_storms() -> None:
    total: Counter[str] = Counter()
    for seed in range(6):
        total += storm(seed)[0]
    assert total["acknowledged"] > 1_000
    assert total["reads"] > 200
    for what in ("changes", "cleared", "raft_snapshot"):
        assert total[what] >= 5, total
    assert total["raft_leader"] >= 20


def test_a_storm_is_a_function_of_its_seed() -> None:
    assert storm(3) == storm(3)

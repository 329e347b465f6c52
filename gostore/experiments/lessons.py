"""What a replication policy does with one schedule of faults, and whether clients could tell: for lessons.

A small load on a simulated cluster: one client for each node, which asks that node and no other, and writes and reads a
few registers while the faults happen. That is what :func:`~gostore.experiments.simulation.run_seed` leaves to chance: a
client that is on the wrong side of a partition, and stays there. One judge: are the registers linearizable?
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gostore.check import History, Linearizability, Verdict, check_linearizable
from gostore.core.errors import GoStoreError
from gostore.core.events import CATEGORIES, Event
from gostore.experiments.judge import told_s
from gostore.faults import Nemesis, Step
from gostore.sim import SimCluster, simulate
from gostore.sim.world import CLIENT
from gostore.trace import Journal
from gostore.viz.spacetime import SpaceTime, space_time

KEYS: Final = ("w", "x", "y", "z")
WRITES: Final = 0.4
"""The share of writes; the others are reads."""

PATIENCE_S: Final = 0.8
"""So long a client waits for an answer. Its write may still happen then."""

PAUSE_S: Final = (0.05, 0.2)
"""Between two operations of a client."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One run. ``focus``: the message with which a client was told what no order explains; None: all is well."""

    seed: int
    history: History
    verdict: Linearizability
    journal: Journal
    focus: Event | None

    @property
    def broken(self) -> bool:
        return self.verdict.verdict is Verdict.NOT

    def text(self) -> str:
        """The verdict: of each register that failed the smallest set of operations that no order explains."""
        return self.verdict.text()

    def diagram(self, **options: Any) -> SpaceTime:
        """The causal past of ``focus``, else the end of the run; ``options`` as for :func:`gostore.viz.space_time`."""
        return space_time(self.journal, self.focus, **options)

    def __repr__(self) -> str:
        return f"<Lesson of seed {self.seed}: {len(self.history)} operations, {self.verdict.verdict}>"


def teach(seed: int, schedule: Sequence[Step], *, nodes: int = 5, seconds: float = 6.0, **settings: Any) -> Lesson:
    """Load and faults for ``seconds`` of virtual time; ``settings`` of the cluster as for :func:`gostore.simulate`.

    Raises :class:`BadRequest` for a schedule that cannot be, :class:`ConfigError` for wrong settings.
    """
    cluster = simulate(nodes, seed=seed, **settings)
    try:
        cluster.run(cluster.watch(*CATEGORIES, messages_a_s=-1.0))
        cluster.watch_client()
        cluster.start_sync()
        history = cluster.run(_load(cluster, schedule, seconds, random.Random(f"lesson {seed}")))
        verdict, at_s = check_linearizable(history), None
        if verdict.verdict is Verdict.NOT:
            at_s = told_s(verdict)
        told = [event for event in cluster.events.of_kind("recv") if event.node == CLIENT and _upto(event, at_s)]
        return Lesson(seed, history, verdict, cluster.events, told[-1] if told else None)
    finally:
        cluster.sim.close()


def _upto(event: Event, at_s: float | None) -> bool:
    return at_s is not None and event.time_s <= at_s


def first_broken(seeds: Iterable[int], schedule: Sequence[Step], **options: Any) -> Lesson | None:
    """The first of these seeds with which the registers are not linearizable; ``options`` as for :func:`teach`."""
    return next((lesson for seed in seeds if (lesson := teach(seed, schedule, **options)).broken), None)


async def _load(cluster: SimCluster, schedule: Sequence[Step], seconds: float, rng: random.Random) -> History:
    loop = asyncio.get_running_loop()
    history = History("register", now=loop.time)
    nemesis = Nemesis(cluster, schedule)
    await cluster.db.create_container("registers")
    for node in cluster.nodes:  # which know the container from now on
        await cluster.db.get("registers", KEYS[0], via=node)
    until_s = loop.time() + seconds
    async with asyncio.TaskGroup() as group:
        group.create_task(nemesis.run(seconds))
        for node in cluster.nodes:
            group.create_task(_client(cluster, node, history, rng, until_s))
    return history


async def _set(cluster: SimCluster, key: str, value: int, node: str) -> None:
    await cluster.db.set("registers", key, value, via=node)


async def _client(cluster: SimCluster, node: str, history: History, rng: random.Random, until_s: float) -> None:
    loop, db = asyncio.get_running_loop(), cluster.db
    while (left_s := until_s - loop.time()) > 0:
        key = rng.choice(KEYS)
        try:
            async with asyncio.timeout(min(PATIENCE_S, left_s)):
                if rng.random() < WRITES:
                    value = len(history)  # so each is written once
                    await history.record(f"at {node}", "write", key, value, _set(cluster, key, value, node))
                else:
                    await history.record(f"at {node}", "read", key, None, db.get("registers", key, via=node))
        except (GoStoreError, TimeoutError):
            pass  # the history knows
        await asyncio.sleep(rng.uniform(*PAUSE_S))

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

from gostore.check import History, Linearizability, Operation, Outcome, Verdict, check_linearizable
from gostore.core.errors import BadRequest, GoStoreError
from gostore.core.events import CATEGORIES, Event
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
    """One run: what the clients did and were told, what is to be said of it, and what happened in the cluster."""

    seed: int
    history: History
    verdict: Linearizability
    journal: Journal

    @property
    def broken(self) -> bool:
        return self.verdict.verdict is Verdict.NOT

    @property
    def guilty(self) -> tuple[Operation, ...]:
        """The smallest set of operations that no order explains, of the first register that failed."""
        found = next((key.counterexample for key in self.verdict.keys if key.counterexample is not None), None)
        return () if found is None else found.operations

    @property
    def focus(self) -> Event | None:
        """The message with which a client was told what cannot be; None: all is well."""
        answered = [operation for operation in self.guilty if operation.outcome is Outcome.OK]
        return self.told(max(answered, key=lambda operation: operation.returned_s or 0.0)) if answered else None

    def told(self, operation: Operation) -> Event:
        """The message with which the client was told the result. Raises :class:`BadRequest` when it was not."""
        at_s = operation.returned_s
        if operation.outcome is not Outcome.OK or at_s is None:
            raise BadRequest(f"operation {operation.id} has no result: its client was told {operation.outcome}")
        return [e for e in self.journal.of_kind("recv") if e.node == CLIENT and e.time_s <= at_s][-1]

    def diagram(self, operation: Operation | None = None, **options: Any) -> SpaceTime:
        """What led to the result of an operation, else to ``focus``; else the end of the run.

        ``options`` as for :func:`gostore.viz.space_time`.
        """
        return space_time(self.journal, self.focus if operation is None else self.told(operation), **options)

    def text(self) -> str:
        """The verdict: of each register that failed the smallest set of operations that no order explains."""
        return self.verdict.text()

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
        return Lesson(seed, history, check_linearizable(history), cluster.events)
    finally:
        cluster.sim.close()


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

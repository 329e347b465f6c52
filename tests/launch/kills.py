"""Rounds of kill -9 of random nodes of a real cluster under load, whole clusters included; then every answer is judged.

    .venv/bin/python tests/launch/kills.py [--rounds 200] [--seed 1]

A cluster lives for so many rounds that its histories can be judged. The faults are real (the kernel ends the
processes), so a seed repeats the choice of the victims, and not the run. What kill -9 cannot show, writes that the
page cache saved, is shown by the simulated power cuts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import gostore as gs
from gostore.experiments.judge import judge_clients
from gostore.experiments.workload import Workload, describe

NODES = 5
ROUNDS_A_CLUSTER = 20
VICTIMS = (1, 1, 1, 1, 2, 2, 2, 3, NODES, NODES)
"""How many die in a round. Three and more are no minority: nobody is answered until they are back."""
DOWN_S = (0.0, 1.5)
READY_TIMEOUT_S = 60.0
CLIENTS = 12
WORK = 30
"""Operations and transactions that are done between two rounds, at least."""
WORK_TIMEOUT_S = 60.0


@dataclass
class Tally:
    rounds: int = 0
    kills: int = 0
    whole: int = 0
    done: int = 0
    refused: int = 0
    violations: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.kills} kills, {self.whole} of the whole cluster; {self.done} operations and "
            f"transactions, {self.refused} refused; {len(self.violations)} violations, {len(self.unknown)} unknown"
        )


def done(workload: Workload) -> int:
    figures = describe(workload)
    return int(figures["operations"] + figures["transactions"])


async def worked(workload: Workload) -> None:
    """Until the clients have got something done again."""
    enough = done(workload) + WORK
    async with asyncio.timeout(WORK_TIMEOUT_S):
        while done(workload) < enough:  # noqa: ASYNC110  # the load knows of nobody who waits
            await asyncio.sleep(0.02)


async def run_cluster(rounds: int, rng: random.Random, tally: Tally) -> None:
    """One cluster: load, ``rounds`` of kills, then everything is read and judged."""
    with tempfile.TemporaryDirectory(prefix="gostore-kills-") as directory:
        async with gs.launch(NODES, path=directory) as cluster:
            loop = asyncio.get_running_loop()
            workload = Workload(cluster, rng, loop.time)
            await workload.prepare()
            load = asyncio.create_task(workload.run(3600.0, CLIENTS))
            try:
                for _ in range(rounds):
                    victims = rng.sample(list(cluster.nodes), rng.choice(VICTIMS))
                    await asyncio.gather(*(cluster.nodes[name].kill() for name in victims))
                    await asyncio.sleep(rng.uniform(*DOWN_S))
                    await asyncio.gather(*(cluster.nodes[name].restart() for name in victims))
                    await cluster.wait_ready(READY_TIMEOUT_S)
                    await worked(workload)
                    tally.rounds += 1
                    tally.kills += len(victims)
                    tally.whole += len(victims) == NODES
            finally:
                load.cancel()
                await asyncio.gather(load, return_exceptions=True)
            await cluster.wait_settled()
            await workload.read_all()
    told = judge_clients(workload)
    tally.violations += told.violations
    tally.unknown += told.unknown
    tally.done += done(workload)
    tally.refused += workload.refused


def run(rounds: int, seed: int, progress: Callable[[Tally], None] = lambda tally: None) -> Tally:
    """Clusters one after the other; it ends with the first that breaks a promise."""
    tally, rng = Tally(), random.Random(seed)
    while tally.rounds < rounds and not tally.violations:
        asyncio.run(run_cluster(min(ROUNDS_A_CLUSTER, rounds - tally.rounds), rng, tally))
        progress(tally)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    begun = time.monotonic()

    def progress(tally: Tally) -> None:
        print(f"{tally} ({time.monotonic() - begun:.0f} s)", flush=True)

    tally = run(arguments.rounds, arguments.seed, progress)
    print("\n".join([*tally.violations, *tally.unknown]))
    return 1 if tally.violations or tally.unknown else 0


if __name__ == "__main__":
    sys.exit(main())

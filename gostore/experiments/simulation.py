"""``gostore sim``: seeded runs of a simulated cluster under load and faults, with all checks on."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from gostore.core.errors import BadRequest, GoStoreError
from gostore.core.events import CATEGORIES, Event
from gostore.experiments.judge import converge, coverage, judge
from gostore.experiments.workload import Workload
from gostore.faults import Nemesis, Step, draw
from gostore.sim import SimCluster, simulate
from gostore.sim.errors import SimulationError, Stopped

SETTLE_S: Final = 60.0
"""Virtual seconds that a healed cluster may take to be as it should be: liveness, bounded."""

SEEDS_MAX: Final = 1_000_000

SNAPSHOT_ENTRIES: Final = 16
"""So short are the logs of the shards in these runs, unless they are told otherwise: snapshots are to be exercised."""

JUDGED: Final = ("db", "storage", "fs")
"""Categories of events that the checks need, beside those that a journal always collects."""


@dataclass(slots=True)
class Run:
    """One seed. ``violations`` say what was broken; ``unknown`` what could not be judged.

    ``settings``: of the cluster, where they are not those that every run has.
    """

    seed: int
    nodes: int
    seconds: float
    profile: str
    schedule: list[Step]
    settings: dict[str, Any] = field(default_factory=dict)
    virtual_s: float = 0.0
    wall_s: float = 0.0
    events: int = 0
    trace_sha256: str = ""
    progress_s: float = 0.0
    """From the heal until a write was acknowledged in every shard; ``settled_s``: until nothing was left to do."""
    settled_s: float = 0.0
    violations: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    coverage: dict[str, int] = field(default_factory=dict)
    focus: Event | float | None = None
    """Where to look first: the event that broke a promise, or the virtual time at which a client was told what cannot
    be."""

    @property
    def fine(self) -> bool:
        return not self.violations and not self.unknown

    @property
    def replay(self) -> str:
        """The command that runs it again."""
        command = (
            f"gostore sim --nodes {self.nodes} --seed {self.seed} --seconds {self.seconds:g} --faults {self.profile}"
        )
        lesson = self.settings.get("db", {}).get("replication")
        return command if lesson is None else f"{command} --replication {lesson}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "virtual_s": round(self.virtual_s, 3),
            "events": self.events,
            "trace_sha256": self.trace_sha256,
            "violations": self.violations,
            "unknown": self.unknown,
            "coverage": self.coverage,
            "replay": self.replay,
        }


class Session:
    """One run that can be looked at: its cluster lives until :meth:`close`.

    ``schedule``: these faults instead of those that the seed draws. ``messages``: the journal also gets every message
    and everything else that is published; a run is the same with and without. ``indices``: the index in the run (of a
    callback) at which each event of the journal was published. Raises as :func:`run_seed`.
    """

    def __init__(
        self,
        seed: int,
        *,
        nodes: int = 5,
        seconds: float = 30.0,
        profile: str = "swarm",
        schedule: Sequence[Step] | None = None,
        messages: bool = False,
        **settings: Any,
    ) -> None:
        if seconds <= 0:
            raise BadRequest(f"seconds = {seconds}: allowed are values above 0")
        names = [f"n{number}" for number in range(1, nodes + 1)]
        drawn = draw(random.Random(f"nemesis {seed}"), names, seconds, profile) if schedule is None else list(schedule)
        self.run = Run(seed, nodes, float(seconds), profile, drawn, dict(settings))
        self.indices = array("Q")
        settings["db"] = {"snapshot_entries": SNAPSHOT_ENTRIES, **settings.get("db", {})}
        self.cluster = simulate(nodes, seed=seed, **settings)
        self._begun = time.perf_counter()
        self._categories = CATEGORIES if messages else JUDGED
        indices, scheduler = self.indices, self.cluster.sim.scheduler
        if messages:
            self.cluster.events.subscribe(lambda event: indices.append(scheduler.count))
            self.cluster.watch_client()

    def perform(self) -> Run:
        """The whole of it: load and faults, a heal, quiet, then every check. Raises :class:`Stopped` at a break."""
        run, sim = self.run, self.cluster.sim
        try:
            _perform(self.cluster, run, self._categories)
        finally:
            run.virtual_s, run.events, run.trace_sha256 = sim.now, sim.callbacks, sim.trace.sha256
            run.wall_s = time.perf_counter() - self._begun
        return run

    def close(self) -> None:
        self.cluster.sim.close()
        self.run.wall_s = time.perf_counter() - self._begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_seed(
    seed: int,
    *,
    nodes: int = 5,
    seconds: float = 30.0,
    profile: str = "swarm",
    schedule: Sequence[Step] | None = None,
    **settings: Any,
) -> Run:
    """One world: load and faults for ``seconds`` of virtual time, a heal, quiet, then every check.

    ``schedule``: these faults instead of those that the seed draws (to make a failing run smaller). Raises
    :class:`BadRequest` and :class:`~gostore.core.errors.ConfigError` for wrong arguments; everything else that goes
    wrong is a violation.
    """
    with Session(seed, nodes=nodes, seconds=seconds, profile=profile, schedule=schedule, **settings) as session:
        return session.perform()


def _perform(cluster: SimCluster, run: Run, categories: Sequence[str]) -> None:
    rng = random.Random(f"workload {run.seed}")
    workload: Workload | None = None
    nemesis = Nemesis(cluster, run.schedule)

    async def main() -> None:
        nonlocal workload
        loop = asyncio.get_running_loop()
        workload = Workload(cluster, rng, loop.time)
        await workload.prepare()
        healed_s = 0.0

        async def faults_and_heal() -> None:
            nonlocal healed_s
            await nemesis.run(run.seconds)
            healed_s = loop.time()
            await workload.progress()
            run.progress_s = loop.time() - healed_s

        async with asyncio.TaskGroup() as group:
            group.create_task(faults_and_heal())
            group.create_task(workload.run(run.seconds))
        await cluster.wait_settled(SETTLE_S)
        run.settled_s = loop.time() - healed_s
        run.violations.extend(await converge(cluster))
        await workload.read_all()

    try:
        cluster.run(cluster.watch(*categories, messages_a_s=-1.0))
        cluster.start_sync()
        cluster.run(main())
    except Stopped:
        raise
    except SimulationError as error:
        run.violations.append(f"the world ended: {error}")
    except ExceptionGroup as errors:
        run.violations.extend(f"{type(error).__name__}: {error}" for error in _leaves(errors))
    except GoStoreError as error:
        run.violations.append(f"liveness: {error.message}")
    judge(cluster, run, workload)
    run.coverage = coverage(cluster, nemesis, workload)
    cluster.stop_sync()


def _leaves(errors: ExceptionGroup[Exception]) -> Iterator[Exception]:
    """What happened, out of the groups of groups that it was wrapped in."""
    for error in errors.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def minimise(run: Run, *, tries_max: int = 64, progress: Callable[[str], None] = lambda text: None) -> list[Step]:
    """A smaller schedule of faults with which the same seed still fails: delta debugging.

    Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (TSE 2002). At most ``tries_max`` runs.
    """
    schedule, parts, tries = list(run.schedule), 2, 0
    while len(schedule) >= 1 and tries < tries_max:
        size = max(1, len(schedule) // parts)
        for start in range(0, len(schedule), size):
            rest = schedule[:start] + schedule[start + size :]
            tries += 1
            again = run_seed(
                run.seed, nodes=run.nodes, seconds=run.seconds, profile=run.profile, schedule=rest, **run.settings
            )
            if again.violations:
                schedule, parts = rest, max(2, parts - 1)
                progress(f"{len(schedule)} faults are enough ({tries} runs)")
                break
            if tries >= tries_max:
                break
        else:
            if size == 1:
                break
            parts = min(len(schedule), parts * 2)
    return schedule

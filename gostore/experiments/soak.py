"""Many seeds: on several processors, resumable, with a tally by commit.

Every finished run is one JSON line of the tally file, written when it is known; so a soak may be interrupted at any
time and goes on where it was. A line counts for the code that made it, whose commit it names: after a change to the
package all seeds are run again, and the tally shows both.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gostore.core.errors import BadRequest
from gostore.experiments.replay import Token, code, commit
from gostore.experiments.simulation import run_seed

AHEAD: Final = 4
"""Runs given out to each worker beyond the one it works at: a worker never waits, and a stop loses little."""

SEEDS_SHOWN_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What every run of a soak has in common. ``replication``: a lesson instead of ``raft``."""

    nodes: int = 5
    seconds: float = 30.0
    profile: str = "swarm"
    replication: str = "raft"


def run_one(seed: int, plan: Plan) -> dict[str, Any]:
    """One line of a tally."""
    settings: dict[str, Any] = {} if plan.replication == "raft" else {"db": {"replication": plan.replication}}
    run = run_seed(seed, nodes=plan.nodes, seconds=plan.seconds, profile=plan.profile, **settings)
    return {
        "commit": commit(), "code": code(), "nodes": plan.nodes, "seconds": plan.seconds, "faults": plan.profile,
        **run.to_dict(), "wall_s": round(run.wall_s, 3), "settled_s": round(run.settled_s, 3),
        "progress_s": round(run.progress_s, 3),
        "token": "" if run.fine else str(Token.of(run, drawn=True)),
    }  # fmt: skip


def read_tally(file: Path) -> list[dict[str, Any]]:
    """The lines of a tally file; none when there is no file. Raises :class:`BadRequest` that names file and line.

    A last line that is not whole (the soak was killed while it wrote) is left out: its seed is run again.
    """
    if not file.exists():
        return []
    found = []
    lines = file.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            _ = (
                row["seed"],
                row["commit"],
                row["code"],
                row["nodes"],
                row["seconds"],
                row["faults"],
                row["violations"],
            )
        except (ValueError, TypeError, KeyError) as error:
            raise BadRequest(
                f"{file}, line {number}: expected a run as `gostore sim --tally` writes it: {error}"
            ) from None
        found.append(row)
    return found


def soak(
    seeds: Iterable[int],
    plan: Plan,
    *,
    jobs: int = 1,
    file: Path | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Run the seeds that the tally ``file`` does not have for this code and plan; the lines of all of them, by seed.

    ``jobs``: processes, 0 for as many as there are processors. ``progress`` is called with each new line. Raises as
    :func:`run_seed` and :func:`read_tally`, :class:`BadRequest` for a negative ``jobs`` and for a tally of a lesson.
    """
    if file is not None and plan.replication != "raft":
        raise BadRequest(f"a tally counts what raft does, and {plan.replication} is a lesson: leave out the tally")
    if jobs < 0:
        raise BadRequest(f"jobs = {jobs}: allowed are 0 (one for each processor) and more")
    wanted = dict.fromkeys(seeds)
    rows = {row["seed"]: row for row in _known(file, plan) if row["seed"] in wanted}
    todo = [seed for seed in wanted if seed not in rows]
    jobs = min(jobs or os.cpu_count() or 1, max(len(todo), 1))
    for row in _run_all(todo, plan, jobs):
        if file is not None:
            _append(file, row)
        rows[row["seed"]] = row
        progress(row)
    return [rows[seed] for seed in wanted]


def _known(file: Path | None, plan: Plan) -> list[dict[str, Any]]:
    if file is None or commit().endswith("+"):
        return []  # what was never committed has no name, so its runs cannot be told apart
    mine = (code(), plan.nodes, plan.seconds, plan.profile)
    return [r for r in read_tally(file) if (r["code"], r["nodes"], r["seconds"], r["faults"]) == mine]


def _append(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":  # cut short by an earlier end; what is left of that line is no run
                lines.seek(0)
                whole = lines.read().rfind(b"\n") + 1
                lines.truncate(whole)
        lines.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")


def _run_all(seeds: list[int], plan: Plan, jobs: int) -> Iterator[dict[str, Any]]:
    """In this process for one job, so that an error shows its own stack."""
    if jobs == 1:
        for seed in seeds:
            yield run_one(seed, plan)
        return
    todo = iter(seeds)
    # Spawned, not forked: a worker begins as any interpreter does, whatever this one has open.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as workers:
        running: dict[Future[dict[str, Any]], None] = {}
        try:
            while True:
                while len(running) < jobs * (1 + AHEAD) and (following := next(todo, None)) is not None:
                    running[workers.submit(run_one, following, plan)] = None
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[done]
                    yield done.result()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker holds both ends of the queue that it reads, so it would not notice that its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(slots=True)
class Tally:
    """What came out for one commit and plan. ``coverage``: marks summed over its runs."""

    commit: str
    plan: Plan
    seeds: int = 0
    violated: dict[int, str] = field(default_factory=dict)
    unknown: list[int] = field(default_factory=list)
    virtual_s: float = 0.0
    wall_s: float = 0.0
    coverage: dict[str, int] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.seeds += 1
        if row["violations"]:
            self.violated[row["seed"]] = str(row["violations"][0]).partition("\n")[0]
        elif row["unknown"]:
            self.unknown.append(row["seed"])
        self.virtual_s += row["virtual_s"]
        self.wall_s += row["wall_s"]
        for mark, count in row["coverage"].items():
            self.coverage[mark] = self.coverage.get(mark, 0) + count

    def text(self) -> str:
        plan = self.plan
        lines = [
            f"commit {self.commit}: {self.seeds:,} seeds of {plan.nodes} nodes x {plan.seconds:g} s, faults "
            f"{plan.profile}: {len(self.violated)} violated, {len(self.unknown)} unknown"
        ]
        for seed, why in list(sorted(self.violated.items()))[:SEEDS_SHOWN_MAX]:
            lines.append(f"    seed {seed}: {why}")
        if len(self.violated) > SEEDS_SHOWN_MAX:
            lines.append(f"    and {len(self.violated) - SEEDS_SHOWN_MAX} more")
        return "\n".join(lines)


def tallies(rows: Iterable[dict[str, Any]]) -> list[Tally]:
    """One for each commit and plan, in the order of their first line; a seed that was run again counts once."""
    latest = {(r["commit"], r["nodes"], r["seconds"], r["faults"], r["seed"]): r for r in rows}
    found: dict[tuple[Any, ...], Tally] = {}
    for (made, nodes, seconds, faults, _), row in latest.items():
        key = (made, nodes, seconds, faults)
        if key not in found:
            found[key] = Tally(made, Plan(nodes, seconds, faults))
        found[key].add(row)
    return list(found.values())

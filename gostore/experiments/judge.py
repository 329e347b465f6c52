"""What is checked of a simulated run, and the marks that tell how much happened in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gostore.check import Verdict, check_linearizable, judge_journal
from gostore.experiments.workload import Workload, describe
from gostore.faults import Nemesis
from gostore.sim import SimCluster

if TYPE_CHECKING:
    from gostore.experiments.simulation import Run


def judge(cluster: SimCluster, run: Run, workload: Workload | None) -> None:
    """Every check that can be made when a run is over; what it finds goes to ``run.violations`` and ``run.unknown``."""
    judgement = judge_journal(cluster.events)
    run.violations.extend(str(violation) for violation in judgement.violations)
    run.unknown.extend(judgement.gaps)
    for name, life in [(name, cluster.nodes[name].life) for name in cluster.nodes]:
        if str(life) == "crashed":
            run.violations.append(f"{name} {cluster.why_ended(name)}")
    for event in cluster.events:
        if event.kind == "task_failed":
            run.violations.append(f"{event.node}: task {event.data['task']} failed: {event.data['error']}")
    if workload is None:
        return
    run.violations.extend(workload.totals.wrong)
    for what, history in (("registers", workload.registers), ("files", workload.files)):
        verdict = check_linearizable(history)
        if verdict.verdict is Verdict.NOT:
            run.violations.append(f"{what}: {verdict.text()}")
        elif verdict.verdict is Verdict.UNKNOWN:
            run.unknown.append(f"{what}: {verdict.text()}")


def coverage(cluster: SimCluster, nemesis: Nemesis, workload: Workload | None) -> dict[str, int]:
    """Marks that what should have happened did."""
    marks = {f"fault_{word}": count for word, count in sorted(nemesis.done.items())}
    kinds: dict[str, int] = {}
    for event in cluster.events:
        kinds[event.kind] = kinds.get(event.kind, 0) + 1
        if event.kind == "wal_recovered" and event.data["torn_bytes"]:
            marks["torn_tails"] = marks.get("torn_tails", 0) + 1
        if event.kind == "repair_done" and event.data["copied"]:
            marks["repairs"] = marks.get("repairs", 0) + 1
    for kind in ("view", "master", "suspect", "refute", "conflict", "commit", "shard_primary", "shard_synced"):
        marks[kind] = kinds.get(kind, 0)
    return marks | (describe(workload) if workload is not None else {})

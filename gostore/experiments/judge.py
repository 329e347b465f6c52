"""What is checked of a simulated run, and the marks that tell how much happened in it.

There are two kinds of checks. :func:`judge` reads what clients were told (histories) and what nodes published (the
journal). :func:`converge` looks into the nodes, from outside, as a simulated world can: when load and faults are over,
the replicas of a shard must become equal, to the byte, and nothing may be left of what was under way (locks,
transactions, suspicions).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gostore.check import (
    Linearizability,
    Serializable,
    Verdict,
    check_linearizable,
    check_serializable,
    judge_journal,
    unequal_replicas,
)
from gostore.core.errors import Corrupt
from gostore.core.events import Event
from gostore.experiments.workload import Workload, describe
from gostore.faults import Nemesis, Step
from gostore.node import Node
from gostore.services.db.machine import Restorer, unpack_command
from gostore.services.db.shard import Shard
from gostore.sim import SimCluster

if TYPE_CHECKING:
    from gostore.experiments.simulation import Run

LOOK_S: Final = 0.25
LOOKS_MAX: Final = 80
"""How often a settled cluster is looked at, and how far apart, until its replicas must be equal: for 20 virtual
seconds, several times the longest back-off."""

CUTTING: Final = ("partition", "one_way", "isolate", "pause", "loss", "delay")
"""Faults after which a member that lives may be taken for dead."""

DECLARED_S: Final = 12.0
"""Seconds after the end of a life in which it may be declared, some of them after the next life has begun."""


def judge(cluster: SimCluster, run: Run, workload: Workload | None) -> None:
    """Every check that can be made when a run is over; what it finds goes to ``run.violations`` and ``run.unknown``."""
    judgement = judge_journal(cluster.events)
    run.violations.extend(str(violation) for violation in judgement.violations)
    run.unknown.extend(judgement.gaps)
    if judgement.violations:
        run.focus = judgement.violations[0].event
    for name, life in [(name, cluster.nodes[name].life) for name in cluster.nodes]:
        if str(life) == "crashed":
            run.violations.append(f"{name} {cluster.why_ended(name)}")
    run.violations.extend(wrongly_declared(cluster.events, run.schedule))
    for event in cluster.events:
        if event.kind == "task_failed":
            run.violations.append(f"{event.node}: task {event.data['task']} failed: {event.data['error']}")
    if workload is not None:
        run.violations.extend(_run_again(cluster.events, workload))
        told = judge_clients(workload)
        run.violations.extend(told.violations)
        run.unknown.extend(told.unknown)
        if run.focus is None:
            run.focus = told.focus_s


@dataclass(slots=True)
class Told:
    """What is wrong with what clients were told; ``focus_s``: when the first of them was told what cannot be."""

    violations: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    focus_s: float | None = None


def judge_clients(workload: Workload) -> Told:
    """The checks that need nothing but the answers: in any world."""
    told = Told([*workload.totals.wrong, *_counters(workload)])
    for what, history in (("registers", workload.registers), ("files", workload.files)):
        verdict = check_linearizable(history)
        if verdict.verdict is Verdict.NOT:
            told.violations.append(f"{what}: {verdict.text()}")
            if told.focus_s is None:
                told.focus_s = _told_s(verdict)
        elif verdict.verdict is Verdict.UNKNOWN:
            told.unknown.append(f"{what}: {verdict.text()}")
    serializable = check_serializable(workload.transactions(), strict=True)
    if serializable.verdict is Serializable.NOT:
        told.violations.append(f"cells: {serializable.text()}")
    elif serializable.verdict is Serializable.UNKNOWN:
        told.unknown.append(f"cells: {serializable.text()}")
    return told


def _told_s(verdict: Linearizability) -> float | None:
    """When a client was told what no order explains: the last answer of the first counterexample."""
    found = next((key.counterexample for key in verdict.keys if key.counterexample is not None), None)
    if found is None:
        return None
    return max(
        (operation.returned_s for operation in found.operations if operation.returned_s is not None), default=None
    )


def wrongly_declared(events: Iterable[Event], schedule: Sequence[Step]) -> list[str]:
    """Members that were declared offline though they lived, and nothing had cut them off or stopped them.

    Judged only without faults that may do that rightly (:data:`CUTTING`). ``events`` in the order of their times.
    """
    if any(step.word in CUTTING for step in schedule):
        return []
    found: dict[str, str] = {}
    ended_s: dict[str, float] = {}
    for event in events:
        if event.kind == "fault" and event.data["fault"] in ("kill", "power_cut", "restart"):
            ended_s[event.data["arguments"]["node"]] = event.time_s
        elif event.kind in ("node_started", "node_stopping"):
            ended_s[event.node] = event.time_s
        if event.kind == "member" and event.data["state"] == "offline":
            member = event.data["member"]
            if event.time_s - ended_s.get(member, -math.inf) > DECLARED_S:
                what = f"{member} was declared offline at {event.time_s:.3f} s (event {event.seq} of {event.node})"
                found.setdefault(member, f"only the dead are declared offline: {what}, but had been running")
    return list(found.values())


def _run_again(events: Iterable[Event], workload: Workload) -> Iterator[str]:
    """A call runs at most once: a file is written at most as often as clients asked for it.

    (They ask again only after an error that says that nothing has happened.)
    """
    asked: dict[str, int] = {}
    for operation in workload.files:
        if operation.kind == "write" and operation.argument is not None:
            path = f"/load/{operation.key}"
            asked[path] = asked.get(path, 0) + 1
    written: dict[str, int] = {}
    for event in events:
        if event.kind == "fs_write":
            written[event.data["path"]] = written.get(event.data["path"], 0) + 1
    for path, times in sorted(written.items()):
        if times > asked.get(path, 0):
            yield f"at most once: {path} was written {times} times by {asked.get(path, 0)} calls"


def _counters(workload: Workload) -> Iterator[str]:
    """An addition that was acknowledged happened once; one of unknown outcome at most once."""
    for name, counter in workload.counters.items():
        most = counter.added + counter.doubtful
        if counter.final is not None and not counter.added <= counter.final <= most:
            allowed = f"{counter.added}" if not counter.doubtful else f"{counter.added} to {most}"
            yield f"counters: {name} is {counter.final} at the end; what was acknowledged makes it {allowed}"


async def converge(cluster: SimCluster) -> list[str]:
    """Wait until replicas are equal and nothing is under way; what is still not so after :data:`LOOKS_MAX` looks.

    Run it inside the world, on a settled cluster without load.
    """
    nodes = {name: machine.app for name, machine in cluster._machines.items() if machine.app and machine.life.alive}
    for _ in range(LOOKS_MAX):
        found = [*_left_over(nodes), *_unequal(nodes), *_damaged(nodes)]
        # It asks all nodes, so only when the rest is quiet; what clients gave up is still being cleared away then.
        found = found or await _check_files(cluster)
        if not found:
            break
        await asyncio.sleep(LOOK_S)
    return found


async def _check_files(cluster: SimCluster) -> list[str]:
    check = await cluster.fs.check()
    wrong = ("lost", "corrupt", "under_replicated", "orphans", "dangling", "intents")
    return [f"files: {check[what]} {what.replace('_', ' ')} after quiet" for what in wrong if check[what]]


def _left_over(nodes: dict[str, Node]) -> Iterator[str]:
    for name, node in nodes.items():
        for shard in node.db._shards:
            machine = shard.machine
            if shard.replication.role != "primary":
                continue
            if machine.prepared or len(machine.locks):
                stays = ", ".join(machine.prepared) or "a transaction that is not there"
                yield f"locks: {stays} locks shard {shard.number} of {name} after quiet"
            if machine.coordinated:
                yield f"two-phase commit: {name} does not forget {', '.join(machine.coordinated)} after quiet"
        doubted = node.cls._detection.swim.in_status("suspect", "dead")
        if doubted:
            yield f"membership: {name} doubts {', '.join(sorted(doubted))} after quiet"


def _unequal(nodes: dict[str, Node]) -> Iterator[str]:
    """Replicas are all who hold a shard as primary or backup."""
    groups: dict[int, dict[str, Shard]] = {}
    for name, node in nodes.items():
        for shard in node.db._shards:
            if shard.replication.role != "idle":
                groups.setdefault(shard.number, {})[name] = shard
    digests: dict[str, dict[str, str]] = {}
    for number, shards in groups.items():
        applied = max(shard.machine.applied for shard in shards.values())
        digests[f"shard {number}"] = {name: _digest(shard, applied) for name, shard in shards.items()}
    yield from map(str, unequal_replicas(digests))


def _digest(shard: Shard, applied: int) -> str:
    """Of the state that a replica is in, or would be in if it took over: after this index of the log.

    A backup of ``primary_backup`` that restarted learns with the next write how far its log is committed; it applies
    nothing before.
    """
    machine = shard.machine
    if machine.applied < applied:
        restorer = Restorer(shard.number, machine._value_size_bytes_max)
        for piece in machine.snapshot():
            restorer.add(piece)
        machine = restorer.finish()
        for index, command in shard.replication.unapplied():
            if index > applied:
                break
            if command is not None:
                machine.apply(unpack_command(command), index)
            else:
                machine.skip(index)
    return machine.digest()


def _damaged(nodes: dict[str, Node]) -> Iterator[str]:
    """Every copy of every chunk is read, as a scrub would; a damaged one is healed then."""
    for name, node in nodes.items():
        for key in node.fs.holder.keys():  # noqa: SIM118  # no mapping
            try:
                if hashlib.sha256(node.fs.holder.get(key)).hexdigest() != key:
                    yield f"chunks: {name} gives bytes for {key} that it does not name"
            except Corrupt as error:
                yield f"chunks: {name}: {error.message}"


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
    for kind in (
        "view",
        "master",
        "suspect",
        "refute",
        "conflict",
        "commit",
        "shard_primary",
        "shard_synced",
        "raft_leader",
        "raft_snapshot",
        "raft_configuration",
        "transaction_recovered",
    ):
        marks[kind] = kinds.get(kind, 0)
    return marks | (describe(workload) if workload is not None else {})

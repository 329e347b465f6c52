"""The cluster at a glance, as plain JSON values: what the views read. The schema is in ``gostore.viz.graph``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 2


@dataclass(slots=True)
class NodeFacts:
    """What is known of one node: by the testbed, and from its latest status (``stale`` when it did not answer)."""

    name: str
    alive: bool
    paused: bool
    pid: int | None
    address: str | None
    rest: str | None
    status: Mapping[str, Any] = field(default_factory=dict)
    stale: bool = False


def snapshot(
    facts: Sequence[NodeFacts],
    *,
    name: str,
    world: str,
    time_s: float,
    started_ms: int,
    running: bool,
    arcs: Sequence[Any],
    links: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    replication: str | None,
) -> dict[str, Any]:
    """Assemble the snapshot. ``facts`` are in launch order."""
    fresh = [fact.status for fact in facts if fact.status and not fact.stale]
    # The newest view speaks for the cluster; when nobody answers, what was last known does.
    known = fresh or [fact.status for fact in facts if fact.status]
    newest: Mapping[str, Any] = max(known, key=lambda status: status["epoch"], default={})
    repairs = [status["repair"] for status in fresh]
    return {
        "version": SCHEMA_VERSION,
        "name": name,
        "world": world,
        "time_s": round(time_s, 3),
        "started_ms": started_ms,
        "running": running,
        "epoch": newest.get("epoch", 0),
        "master": newest.get("master"),
        "replicas": newest.get("replicas"),
        "shards": newest.get("shard_count"),
        "placement": newest.get("placement"),
        "nodes": [_node(fact, newest.get("members", {}), fresh) for fact in facts],
        "arcs": list(arcs),
        "links": list(links),
        "replication": replication,
        "groups": list(groups),
        "repair": {
            "active": any(repair["active"] for repair in repairs),
            "missing": sum(repair["missing"] for repair in repairs),
            "copied": sum(repair["copied"] for repair in repairs),
        },
    }


def _node(
    fact: NodeFacts, members: Mapping[str, Mapping[str, Any]], fresh: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    status = fact.status
    member = members.get(fact.name, {})
    return {
        "name": fact.name,
        "state": member.get("state", "offline" if not fact.alive else "joining"),
        "alive": fact.alive,
        "paused": fact.paused,
        "suspect": [other["name"] for other in fresh if fact.name in other["suspect"]],
        "stale": fact.stale,
        "roles": status.get("roles", []) if fact.alive else [],
        "epoch": status.get("epoch", 0),
        "incarnation": status.get("incarnation", 0),
        "address": fact.address,
        "rest": fact.rest,
        "pid": fact.pid,
        "shards": status.get("shards", []) if fact.alive else [],
        "shards_held": status.get("shards_held", []) if fact.alive else [],
        "chunks": status.get("chunks", 0),
        "bytes": status.get("bytes", 0),
        "counters": dict(status.get("counters", {})),
    }

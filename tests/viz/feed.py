"""Snapshots and events as a testbed gives them, made up from a seed: what the picture's tests draw."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from gostore.core.events import Event
from gostore.core.stamps import LOGICAL_BITS

STARTED_MS = 1_790_000_000_000


def token(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def arcs(names: list[str], tokens_per_node: int = 32, replicas: int = 3) -> list[list[Any]]:
    """A consistent-hashing ring: [start, end, owners], every token owned once."""
    places = sorted((token(f"{name}/{i}"), name) for name in names for i in range(tokens_per_node))
    out = []
    for i, (start, _) in enumerate(places):
        owners: list[str] = []
        for _, name in places[i:] + places[:i]:
            if name not in owners:
                owners.append(name)
            if len(owners) == min(replicas, len(names)):
                break
        out.append([start, places[(i + 1) % len(places)][0], owners])
    return out


def snapshot(count: int = 5, *, time_s: float = 134.0, gone: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """A cluster of n1 ... that has run for a while; ``gone``: offline members."""
    names = [f"n{i}" for i in range(1, count + 1)]
    online = [name for name in names if name not in gone]
    rng = random.Random(count)
    nodes = []
    for i, name in enumerate(names):
        nodes.append(
            {
                "name": name,
                "state": "offline" if name in gone else "online",
                "alive": name not in gone,
                "paused": False,
                "suspect": [],
                "stale": name in gone,
                "roles": ["master"] if name == online[0] else ["candidate"] if i < 3 else [],
                "epoch": 7 + len(gone),
                "incarnation": 1,
                "address": f"127.0.0.1:{40100 + i}",
                "rest": f"http://127.0.0.1:{8100 + i}",
                "pid": 4200 + i,
                "shards": [s for s in range(16) if s % count == i],
                "shards_held": [s for s in range(16) if (s - i) % count < 3],
                "chunks": 100 + rng.randrange(60),
                "bytes": 5_000_000 + rng.randrange(1_000_000),
                "counters": {
                    "calls": int(time_s * (300 + 10 * i)),
                    "sent": int(time_s * 700),
                    "received": int(time_s * 690),
                    "dropped": 12 * i,
                    "gossip": int(time_s * 8),
                    "commits": int(time_s * 120),
                    "conflicts": i,
                },
            }
        )
    found = {
        "version": 1,
        "name": "gostore-5f3a",
        "world": "processes",
        "time_s": time_s,
        "started_ms": STARTED_MS,
        "running": True,
        "epoch": 7 + len(gone),
        "master": online[0],
        "replicas": 3,
        "shards": 16,
        "placement": "HashRing",
        "nodes": nodes,
        "arcs": arcs(online),
        "links": [],
        "repair": {"active": False, "missing": 0, "copied": 0},
    }
    return {**found, **changes}


class Feed:
    """Events of a cluster, with gapless numbers per node and stamps from ``at_s``."""

    def __init__(self) -> None:
        self.seqs: dict[str, int] = {}
        self.at_s = 134.0

    def event(self, node: str, kind: str, **data: Any) -> Event:
        self.seqs[node] = self.seqs.get(node, 0) + 1
        stamp = (STARTED_MS + int(self.at_s * 1000)) << LOGICAL_BITS
        return Event(node, self.seqs[node], kind, stamp, self.at_s, None, data)

    def recv(self, source: str, node: str, service: str, function: str) -> Event:
        more = {"frame": "request", "request": 1, "bytes": 100, "transport": "udp"}
        return self.event(node, "recv", **{"from": source}, service=service, function=function, **more)

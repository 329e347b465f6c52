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
        "version": 2,
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
        "replication": "raft",
        "groups": [],
        "repair": {"active": False, "missing": 0, "copied": 0},
    }
    return {**found, **changes}


def replica(last: int | None, **changes: Any) -> dict[str, Any]:
    """One replica of a group that is well; ``role``, ``state`` and whatever else as changed."""
    found = {
        "role": "follower", "term": 4, "applied": last, "snapshot": 0, "installed": 0, "last": last,
        "state": "replicate", "stale": False, "down": False, "member": True,
    }  # fmt: skip
    return {**found, **changes}


def group(name: str, members: list[str], *, committed: int = 812, term: int = 4, **changes: Any) -> dict[str, Any]:
    """A group led by its first member, with everything committed everywhere."""
    replicas = {member: replica(committed, term=term) for member in members}
    replicas[members[0]].update(role="leader", state=None)
    found = {
        "name": name, "kind": "raft", "state": "led", "leader": members[0], "term": term, "quiet": True,
        "last": committed, "committed": committed, "voters": members, "learners": [], "outgoing": [],
        "replicas": replicas,
    }  # fmt: skip
    return {**found, **changes}


def groups(count: int = 5, shards: int = 16) -> list[dict[str, Any]]:
    """The masters and the shards of n1 ...; all is well."""
    names = [f"n{i}" for i in range(1, count + 1)]
    held = [[names[(shard + i) % count] for i in range(min(3, count))] for shard in range(shards)]
    return [
        group("masters", names[:5], committed=23, term=1),
        *(group(f"shard {shard}", members, committed=700 + 37 * shard) for shard, members in enumerate(held)),
    ]


def _replica(group: dict[str, Any], place: int) -> dict[str, Any]:
    found: dict[str, Any] = group["replicas"][group["voters"][place]]
    return found


def troubled(count: int = 5, shards: int = 16) -> list[dict[str, Any]]:
    """The same with one of each kind of trouble, in shards 0 to 6; the last node is dead."""
    found = groups(count, shards)
    dead = f"n{count}"
    for one in found:
        if dead in one["replicas"]:
            one["replicas"][dead].update(down=True, stale=True, last=one["committed"] - 12)
            one["quiet"] = False
            if one["leader"] == dead:
                one.update(state="leaderless", leader=None)
    elected, copied, joined, ahead, lost, deposed, moved = found[1:8]
    elected.update(state="election", leader=None, quiet=False, term=5)
    elected["replicas"]["n1"].update(role="candidate", term=5)
    _replica(copied, 1).update(state="snapshot", last=120, sent_bytes=786_432, size_bytes=2_100_000)
    copied["quiet"] = False
    joined.update(learners=["n1"], quiet=False)
    joined["replicas"]["n1"] = replica(None, state="probe")
    _replica(joined, 1).update(last=joined["committed"] - 1)
    ahead.update(last=ahead["committed"] + 7, quiet=False, leader=ahead["voters"][0], state="led")
    lost.update(state="no quorum", leader=None, quiet=False)
    _replica(lost, 1).update(down=True, stale=True)
    _replica(deposed, 0).update(role="leader", term=3, down=False, stale=False)
    _replica(deposed, 1).update(role="leader", state=None, down=False, stale=False)
    deposed.update(leader=deposed["voters"][1], state="led", quiet=False)
    moved.update(outgoing=moved["voters"], voters=[*moved["voters"][:2], "n1"], quiet=False)
    moved["replicas"]["n1"] = replica(moved["committed"])
    return found


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

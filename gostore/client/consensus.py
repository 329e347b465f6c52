"""The consensus groups of a cluster, made of what each node says of those that it is in (``admin.groups``).

Pure. Every node is asked at a slightly different moment, and some do not answer. So where a log stands is taken from
the leader, who has one moment for all (``match``), and from the replica itself only where the leader does not know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

LEADER: Final = "leader"
STANDING: Final = ("pre-candidate", "candidate")

LED: Final = "led"
ELECTION: Final = "election"
LEADERLESS: Final = "leaderless"
NO_QUORUM: Final = "no quorum"
UNKNOWN: Final = "unknown"

Told = Mapping[str, Mapping[str, Any]]


def merged_groups(told: Told, *, fresh: Collection[str], alive: Collection[str]) -> list[dict[str, Any]]:
    """The snapshot's ``groups``; the schema is in :mod:`gostore.viz.graph`.

    ``told``: node -> its latest answer. ``fresh``: whose answer is of now. ``alive``: who could answer, being neither
    dead nor paused.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for node, answer in told.items():
        for group in answer["groups"]:
            groups.setdefault(group["name"], {})[node] = group
    return [_merged(name, groups[name], fresh, alive) for name in sorted(groups, key=_natural)]


def with_leader(group: dict[str, Any], leader: str, term: int) -> dict[str, Any]:
    """The group after the news that ``leader`` has won ``term``; the same object when that is no news."""
    if term < group["term"] or (term == group["term"] and group["leader"] is not None):
        return group
    replicas = {
        node: {**replica, "role": LEADER if node == leader else "follower"}
        for node, replica in group["replicas"].items()
    }
    return {**group, "leader": leader, "term": term, "state": LED, "replicas": replicas}


def _natural(name: str) -> tuple[str, int]:
    """``shard 10`` comes after ``shard 9``."""
    text = name.rstrip("0123456789")
    return text, int(name[len(text) :] or 0)


def _merged(name: str, told: Told, fresh: Collection[str], alive: Collection[str]) -> dict[str, Any]:
    heard = {node: one for node, one in told.items() if node in fresh}
    leader = _leader(heard, alive)
    leads = leader is not None and leader in heard
    best = heard[leader] if leader is not None and leads else _furthest(heard or told)
    followers: Mapping[str, Mapping[str, Any]] = best["followers"] if leads else {}
    members = dict.fromkeys([*best["voters"], *best["learners"], *best["outgoing"]])
    # Who is no member any more is shown as long as it says that it holds a copy.
    nodes = [*members, *(node for node in heard if node not in members)]
    return {
        "name": name,
        "kind": best["kind"],
        "state": _state(heard, leader, best["voters"], alive),
        "leader": leader,
        "term": max(one["term"] for one in (heard or told).values()) if leader is None else best["term"],
        "quiet": bool(best["quiet"]),
        "last": best["last"],
        "committed": best["committed"],
        "voters": list(best["voters"]),
        "learners": list(best["learners"]),
        "outgoing": list(best["outgoing"]),
        "replicas": {
            node: {
                **_position(told.get(node), followers.get(node), best, answers=node in fresh),
                "stale": node not in fresh,
                "down": node not in alive,
                "member": node in members,
            }
            for node in nodes
        },
    }


def _leader(heard: Told, alive: Collection[str]) -> str | None:
    """Who leads in the highest term: who says so of itself, or whom others follow, if it lives and is slow to answer.

    Nobody whose process is dead or paused: others follow it until they notice, and that is an election to come.
    """
    claims = [(one["term"], node) for node, one in heard.items() if one["role"] == LEADER]
    claims += [
        (one["term"], one["leader"])
        for one in heard.values()
        if one["leader"] is not None and one["leader"] in alive and one["leader"] not in heard
    ]
    return max(claims)[1] if claims else None


def _furthest(told: Told) -> Mapping[str, Any]:
    return max(told.values(), key=lambda one: (one["term"], one["committed"]))


def _state(heard: Told, leader: str | None, voters: Collection[str], alive: Collection[str]) -> str:
    if not heard:
        return UNKNOWN
    if leader is not None:
        return LED
    if 2 * sum(name in alive for name in voters) <= len(voters):
        return NO_QUORUM
    return ELECTION if any(one["role"] in STANDING for one in heard.values()) else LEADERLESS


def _position(
    own: Mapping[str, Any] | None, seen: Mapping[str, Any] | None, best: Mapping[str, Any], *, answers: bool
) -> dict[str, Any]:
    """What is known of one replica: by itself (``own``), and by the leader (``seen``)."""
    found = {key: own[key] for key in ("role", "term", "applied", "snapshot", "installed")} if own else {}
    # A node that answers and does not speak of the group has nothing of it.
    last = min(own["last"], best["last"]) if own else 0 if answers else None
    if seen is None:
        return {**found, "last": last, "state": None}
    if seen["state"] == "replicate" or seen["match"]:
        last = seen["match"]
    found = {**found, "last": last, "state": seen["state"]}
    if "sent_bytes" in seen:
        found["sent_bytes"] = min(seen["sent_bytes"], best["size_bytes"])
        found["size_bytes"] = best["size_bytes"]
    return found

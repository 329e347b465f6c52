"""The panel of the consensus groups: who leads in which term, and where every replica's log is.

Pure: the snapshot's ``groups`` go in, words and numbers ready to be drawn come out. A row is a group, a cell in it one
of its replicas. A cell's bar is full when the replica has all that is committed; what is missing shortens it by its
logarithm, because one entry behind and ten thousand behind both have to be seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

GROUPS_MAX: Final = 128
"""Rows of the panel; more are counted only."""
LAG_FULL: Final = 10_000
"""Entries behind at which nothing is left of a bar."""
NAMED_MAX: Final = 3
"""Groups in trouble that are named in the headline."""

_WORDS: Final = {"election": "election", "leaderless": "no leader", "no quorum": "no quorum", "unknown": "unknown"}
_TROUBLE: Final = ("no quorum", "election", "leaderless")
_STANDING: Final = ("pre-candidate", "candidate")

Group = Mapping[str, Any]


def consensus_panel(about: Mapping[str, Any], nodes: Sequence[str]) -> dict[str, Any]:
    """``{"words", "trouble", "note", "rows"}`` of the snapshot's groups; ``nodes`` in launch order.

    A row is ``{"id", "look", "word", "leader", "term", "commit", "title", "cells"}``: ``look`` the group's state,
    ``word`` the leader's name or what is said in its place. A cell is ``{"id", "look", "member", "fill", "text",
    "installed", "title"}``: ``look`` one of ``leader``, ``follower``, ``probe``, ``snapshot`` (``fill`` is then the
    part that has arrived), ``stands``, ``deposed``, ``gone``; ``member`` one of ``voter``, ``learner``, ``leaving``.
    """
    groups: Sequence[Group] = about.get("groups") or ()
    if not groups:
        return {"words": "", "trouble": "", "note": "nothing is known of consensus groups", "rows": []}
    order = {name: i for i, name in enumerate(nodes)}
    return {
        "words": _headline(groups),
        "trouble": _trouble(groups),
        "note": _note(about, groups),
        "rows": [_row(group, order) for group in groups[:GROUPS_MAX]],
    }


def terms_led(groups: Sequence[Group], node: str) -> str:
    """The groups that a node leads, by their terms: ``term 2: masters, shards 0, 4 · term 3: shard 5``."""
    by_term: dict[int, list[str]] = {}
    for group in groups:
        if group["leader"] == node:
            by_term.setdefault(group["term"], []).append(group["name"])
    return " · ".join(f"term {term}: {_named(names)}" for term, names in sorted(by_term.items()))


def electing(groups: Sequence[Group]) -> int:
    """How many groups have nobody who leads."""
    return sum(group["state"] in _TROUBLE for group in groups)


def _named(names: Sequence[str]) -> str:
    shards = [name.removeprefix("shard ") for name in names if name.startswith("shard ")]
    others = [name for name in names if not name.startswith("shard ")]
    return ", ".join(others + ([f"shard{'s' if len(shards) > 1 else ''} {', '.join(shards)}"] if shards else []))


def _headline(groups: Sequence[Group]) -> str:
    words = [f"{len(groups)} groups" if len(groups) != 1 else "1 group"]
    quiet = sum(group["quiet"] for group in groups)
    if quiet:
        words.append(f"{quiet} quiet")
    snapshots = sum(_transfer(replica) is not None for group in groups for replica in group["replicas"].values())
    if snapshots:
        words.append(f"{snapshots} snapshot{'s' if snapshots > 1 else ''} on the way")
    if len(groups) > GROUPS_MAX:
        words.append(f"the first {GROUPS_MAX} are shown")
    return " · ".join(words)


def _trouble(groups: Sequence[Group]) -> str:
    parts = []
    for state in _TROUBLE:
        names = [group["name"] for group in groups if group["state"] == state]
        if names:
            more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
            parts.append(f"{_WORDS[state]}: {_named(names[:NAMED_MAX])}{more}")
    return " · ".join(parts)


def _note(about: Mapping[str, Any], groups: Sequence[Group]) -> str:
    kinds = {group["kind"] for group in groups if group["name"] != "masters"}
    policy = about.get("replication")
    if policy is None or policy == "raft":
        return ""
    if policy in kinds:
        return f"shards: {policy}, no consensus; its generations stand for terms"
    return f"shards: {policy}, which has no leaders and no terms"


def _row(group: Group, order: Mapping[str, int]) -> dict[str, Any]:
    names = sorted(group["replicas"], key=lambda name: (order.get(name, len(order)), name))
    leader = group["leader"]
    return {
        "id": group["name"],
        "look": group["state"],
        "word": leader or _WORDS.get(group["state"], ""),
        "leader": leader or "",
        "term": group["term"],
        "commit": f"{group['committed']:,}",
        "title": _about(group),
        "cells": [_cell(name, group["replicas"][name], group) for name in names],
    }


def _about(group: Group) -> str:
    who = f"{group['leader']} leads" if group["leader"] else _WORDS.get(group["state"], "")
    words = [f"{group['name']}: {who}, term {group['term']}", f"committed {group['committed']:,} of {group['last']:,}"]
    if group["quiet"]:
        words.append("quiet")
    return " · ".join(words)


def _cell(name: str, replica: Mapping[str, Any], group: Group) -> dict[str, Any]:
    look = _look(name, replica, group)
    last, transfer = replica["last"], _transfer(replica)
    lag = None if last is None else max(group["committed"] - last, 0)
    fill = 0.0 if lag is None else max(1 - math.log1p(lag) / math.log1p(LAG_FULL), 0.0)
    text = "?" if lag is None else f"\u2212{_short(lag)}" if lag else ""
    if look == "leader" and group["last"] > group["committed"]:
        text = f"+{_short(group['last'] - group['committed'])}"
    elif look == "stands":
        text = "stands"
    elif look == "deposed":
        text = f"t{replica['term']}"
    elif look == "snapshot":
        fill = transfer or 0.0
        text = f"{fill * 100:.0f} %"
    return {
        "id": name,
        "look": look,
        "member": _member(name, replica, group),
        "fill": round(fill, 3),
        "text": text,
        "installed": replica.get("installed", 0),
        "title": _about_cell(name, replica, look, lag),
    }


def _short(count: float) -> str:
    """At most four characters, for they stand on the bar: ``812``, ``1.2k``, ``34M``."""
    for unit in ("", "k", "M"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit or count >= 10 else f"{int(count * 10) / 10}{unit}"
        count /= 1000
    return "999M"


def _look(name: str, replica: Mapping[str, Any], group: Group) -> str:
    role = replica.get("role")
    if replica["down"] or (replica["stale"] and group["leader"] is None):
        return "gone"
    if name == group["leader"]:
        return "leader"
    if _transfer(replica) is not None:
        return "snapshot"  # also of one that loses patience meanwhile
    if role in _STANDING and not replica["stale"]:
        return "stands"
    if role == "leader" and not replica["stale"]:
        return "deposed"
    return "probe" if replica["state"] == "probe" else "follower"


def _member(name: str, replica: Mapping[str, Any], group: Group) -> str:
    if name in group["learners"]:
        return "learner"
    # During a change both majorities decide: who is only in the old one is about to leave.
    return "voter" if replica["member"] and name in group["voters"] else "leaving"


def _transfer(replica: Mapping[str, Any]) -> float | None:
    """The part of a snapshot that has arrived, 0 to 1; ``None``: none is on its way."""
    if "sent_bytes" not in replica or replica["down"]:
        return None
    return float(min(replica["sent_bytes"] / max(replica["size_bytes"], 1), 1.0))


_LOOKS: Final = {
    "leader": "leads",
    "follower": "follows",
    "probe": "follows; the leader does not know yet where their logs meet",
    "stands": "stands for election",
    "deposed": "still thinks that it leads",
    "gone": "does not answer",
}


def _about_cell(name: str, replica: Mapping[str, Any], look: str, lag: int | None) -> str:
    if look == "snapshot":
        sent, whole = replica.get("sent_bytes", 0), replica.get("size_bytes", 0)
        words = [f"{name} is sent a snapshot, {sent / 1000:,.0f} of about {whole / 1000:,.0f} kB"]
    else:
        words = [f"{name} {_LOOKS[look]}"]
    if replica["last"] is not None:
        behind = f", {lag:,} behind what is committed" if lag else ""
        words.append(f"log up to {replica['last']:,}{behind}")
    for key, word in (("applied", "applied"), ("snapshot", "latest snapshot at"), ("term", "term")):
        if replica.get(key):
            words.append(f"{word} {replica[key]:,}")
    return " · ".join(words)

"""What a testbed waits for: conditions on the statuses of the nodes, as pure functions.

Each takes the answers of the nodes that run (a status, or the error instead of one) and gives what is still missing, as
(node, reason) pairs that complete a sentence: ``("n3", "is joining")``. Empty means that the condition holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gostore.core.errors import GoStoreError

Status = dict[str, Any]
Statuses = Mapping[str, Status | GoStoreError]
Missing = list[tuple[str, str]]
Condition = Callable[[Statuses], Missing]


def good_ones(statuses: Statuses) -> dict[str, Status]:
    return {name: status for name, status in statuses.items() if not isinstance(status, GoStoreError)}


def silent(statuses: Statuses) -> Missing:
    """Nodes that did not answer."""
    return [
        (name, f"does not answer ({status.code})")
        for name, status in statuses.items()
        if isinstance(status, GoStoreError)
    ]


def not_ready(statuses: Statuses) -> Missing:
    """Ready: everybody is online, sees all others online, and has the same epoch and a master."""
    missing, good = silent(statuses), good_ones(statuses)
    newest = max((status["epoch"] for status in good.values()), default=0)
    for name, status in good.items():
        unseen = [other for other in statuses if _seen(status, other) != "online"]
        if status["state"] != "online":
            missing.append((name, f"is {status['state']}"))
        elif status["epoch"] < newest:
            missing.append((name, f"is at epoch {status['epoch']}, others at {newest}"))
        elif unseen:
            missing.append((name, f"does not see {', '.join(unseen)} online"))
        elif status["master"] is None:
            missing.append((name, "knows no master"))
    return missing


def not_settled(statuses: Statuses, gone: Iterable[str]) -> Missing:
    """Settled: ready, nobody thinks that one of those who are ``gone`` is online, and no node has work left."""
    missing, gone = not_ready(statuses), list(gone)
    for name, status in good_ones(statuses).items():
        missing += [
            (name, f"still thinks that {other} is online") for other in gone if _seen(status, other) == "online"
        ]
        missing += [(name, reason) for reason in status["unsettled"]]
    return missing


def not_seen_as(node: str, state: str) -> Condition:
    """All others think that ``node`` is in ``state``."""

    def missing(statuses: Statuses) -> Missing:
        others = {name: status for name, status in statuses.items() if name != node}
        return silent(others) + [
            (name, f"thinks that {node} is {_seen(status, node)}")
            for name, status in good_ones(others).items()
            if _seen(status, node) != state
        ]

    return missing


def not_at_epoch(epoch: int) -> Condition:
    """All have installed this epoch, or a later one."""

    def missing(statuses: Statuses) -> Missing:
        return silent(statuses) + [
            (name, f"is at epoch {status['epoch']}")
            for name, status in good_ones(statuses).items()
            if status["epoch"] < epoch
        ]

    return missing


def describe(missing: Missing, shown_max: int = 8) -> str:
    """``n3 is joining; n4 does not answer (timeout); and 2 more``."""
    shown = [f"{name} {reason}" for name, reason in missing[:shown_max]]
    return "; ".join(shown + ([f"and {len(missing) - shown_max} more"] if len(missing) > shown_max else []))


def _seen(status: Status, node: str) -> str:
    return str(status["members"].get(node, {}).get("state", "unknown"))

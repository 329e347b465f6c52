"""From whom may a new primary take over a shard? Pure.

The policy ``primary_backup`` acknowledges a write when *all* members of the current configuration have it on their
disks. A new primary asks who holds what, and each who answers first promises to follow no older generation. The
newest configuration in any answer names the members that may have acknowledged something; of those who answer, the
one with the most advanced log has every acknowledged write. It remains to exclude that a still newer configuration
existed among nodes that do not answer. It leaves two traces:

* A configuration starts only when ``quorum`` of the replicas planned for it hold the whole log, and its plan was
  promised by everybody it asked. So if a promise is newer than the newest configuration, and fewer than ``quorum`` of
  its planned replicas can be silent, that generation has never acknowledged anything.
* A majority of the members of the newest configuration that is known must answer. A later generation had to ask a
  majority of them too, so one who answers knows of its promise. (Where the cluster has but two members, one of them is
  enough: alone it cannot acknowledge anything, and there is no third with whom it could.)

If a trace cannot be excluded, the shard waits and says for whom. After one loss at a time, with time in between to copy
to another node, that never happens; when a majority of the replicas is lost at once, it is the difference between
waiting and losing acknowledged writes. Members that left the cluster for good are not waited for.

The rules bind generations as far as the cluster's views do: two views that do not know of one another may still have
two primaries. That is the lesson of this policy; Raft does without the trust in views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gostore.services.db.entries import Configuration, Point, Promise


@dataclass(frozen=True, slots=True)
class Report:
    """What one node holds of a shard. ``promises``: those made before the question, oldest first."""

    last: Point
    configuration: Configuration | None
    promises: tuple[Promise, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """``source``: whose log to take over; or ``virgin``: the shard never existed; or ``waits``: for any of these."""

    source: str | None = None
    virgin: bool = False
    waits: tuple[str, ...] = ()
    why: str = ""


def start_quorum(planned: int, copies_min: int) -> int:
    """So many of the planned replicas must hold the log before a generation may begin."""
    return max(min(copies_min, planned), planned // 2 + 1)


def answers_needed(members: int, everybody: int) -> int:
    """So many members of a configuration must answer, in a cluster of ``everybody``."""
    return 1 if everybody <= 2 else members // 2 + 1


def judge(me: str, reports: Mapping[str, Report], everybody: Iterable[str], generation: int) -> Verdict:
    """What the answers to the primary ``me`` of the new ``generation`` allow.

    ``everybody``: the members of the cluster that may hold something; all of them must answer before a shard of which
    nobody knows is taken for a new one.
    """
    living = tuple(everybody)
    newest: Configuration | None = None
    for name in sorted(reports):
        found = reports[name].configuration
        if found is not None and (
            newest is None or (found.generation, found.index) > (newest.generation, newest.index)
        ):
            newest = found
    doubtful = _doubtful_promise(reports, living, newest.generation if newest is not None else 0, generation)
    if doubtful is not None:
        return doubtful
    if newest is None:
        silent = tuple(name for name in living if name not in reports)
        if silent:
            return Verdict(waits=silent, why="nobody who answered holds it, and these may")
        return Verdict(virgin=True)
    members = [name for name in newest.members if name in living]
    heard = [name for name in members if name in reports]
    needed = answers_needed(len(members), len(living))
    if len(heard) < needed:
        silent = tuple(name for name in newest.members if name not in reports)
        return Verdict(waits=silent, why=f"{needed} of its replicas {', '.join(newest.members)} must answer")
    best = max(heard, key=lambda name: (reports[name].last.term, reports[name].last.index, name == me, name))
    return Verdict(source=best)


def _doubtful_promise(
    reports: Mapping[str, Report], living: tuple[str, ...], newest: int, generation: int
) -> Verdict | None:
    """A generation after ``newest`` that may have acknowledged writes among nodes that do not answer."""
    for promise in (promise for name in sorted(reports) for promise in reports[name].promises):
        if not newest < promise.generation < generation:
            continue
        silent = tuple(planned for planned in promise.planned if planned in living and planned not in reports)
        if len(silent) >= promise.quorum:
            return Verdict(
                waits=silent,
                why=f"generation {promise.generation} may have begun with {', '.join(promise.planned)} without others",
            )
    return None

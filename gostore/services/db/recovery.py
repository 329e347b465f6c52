"""From whom may a new primary take over a shard? Pure.

The policy ``primary_backup`` acknowledges a write when *all* members of the current configuration have it on their
disks. A new primary asks who holds what, and each who answers first promises to follow no older generation. The
newest configuration in any answer names the members that may have acknowledged something; of those who answer, the
one with the most advanced log has every acknowledged write. It remains to exclude that a still newer configuration
existed among nodes that do not answer. It leaves two traces:

* A configuration starts only when ``quorum`` of the replicas planned for it hold the whole log, and its plan was
  promised by everybody it asked. So if a promise is newer than the newest configuration, and fewer than ``quorum`` of
  its planned replicas can be silent, that generation has never acknowledged anything.
* The members of the newest configuration that are known would have been asked by a later generation. So
  ``len(members) - quorum + 1`` of them must answer: at least one of any quorum.

If a trace cannot be excluded, the shard waits and says for whom. After one loss at a time that never happens; when a
majority of the replicas is lost at once, it is the difference between waiting and losing acknowledged writes.

The rules bind generations as far as the cluster's views do: two views that do not know of one another may still have
two primaries. That is the lesson of this policy; Raft does without the trust in views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gostore.services.db.entries import Configuration, Point, Promise


@dataclass(frozen=True, slots=True)
class Report:
    """What one node holds of a shard. ``promise``: the newest one before the question."""

    last: Point
    configuration: Configuration | None
    promise: Promise | None


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


def answers_needed(replicas: int, quorum: int) -> int:
    """So many of the replicas must answer for at least one of every quorum to be among them."""
    return replicas - quorum + 1


def judge(me: str, reports: Mapping[str, Report], everybody: Iterable[str], generation: int) -> Verdict:
    """What the answers to the primary ``me`` of the new ``generation`` allow.

    ``everybody``: the members of the cluster that may hold something; all of them must answer before a shard of which
    nobody knows is taken for a new one.
    """
    newest: Configuration | None = None
    for name in sorted(reports):
        found = reports[name].configuration
        if found is not None and (
            newest is None or (found.generation, found.index) > (newest.generation, newest.index)
        ):
            newest = found
    doubtful = _doubtful_promise(reports, newest.generation if newest is not None else 0, generation)
    if doubtful is not None:
        return doubtful
    if newest is None:
        silent = tuple(name for name in everybody if name not in reports)
        if silent:
            return Verdict(waits=silent, why="nobody who answered holds it, and these may")
        return Verdict(virgin=True)
    heard = [name for name in newest.members if name in reports]
    needed = answers_needed(len(newest.members), start_quorum(len(newest.members), newest.copies_min))
    if len(heard) < needed:
        silent = tuple(name for name in newest.members if name not in reports)
        return Verdict(waits=silent, why=f"{needed} of its replicas {', '.join(newest.members)} must answer")
    best = max(heard, key=lambda name: (reports[name].last.term, reports[name].last.index, name == me, name))
    return Verdict(source=best)


def _doubtful_promise(reports: Mapping[str, Report], newest: int, generation: int) -> Verdict | None:
    """A generation after ``newest`` that may have acknowledged writes among nodes that do not answer."""
    for name in sorted(reports):
        promise = reports[name].promise
        if promise is None or not newest < promise.generation < generation:
            continue
        heard = [planned for planned in promise.planned if planned in reports]
        if len(heard) < answers_needed(len(promise.planned), promise.quorum):
            silent = tuple(planned for planned in promise.planned if planned not in reports)
            return Verdict(
                waits=silent,
                why=f"generation {promise.generation} may have begun with {', '.join(promise.planned)} without others",
            )
    return None

"""Going on after a majority is lost for good. UNSAFE: it gives up what makes a write safe.

Theory of operation
===================
A group whose majority is gone cannot decide anything, and rightly so: nobody who is left can know what the others have
acknowledged. If they will never come back, an operator may decide that what is left is the truth. That is done offline,
on the data directories of all nodes that survived, while none of them runs:

1. For each group (the masters' and the shards'), the survivor with the most advanced log (greatest last term, then
   index) is found. By the log matching property and leader completeness it has everything that any other survivor knows
   to be committed; what the lost majority has acknowledged beyond that is gone, and nobody can say how much that is.
2. A group of which a majority of the voters survives is not touched.
3. Otherwise a configuration with that survivor as its only voter is appended to its log, in a term far above all that
   were seen. When the node starts it is elected by itself, everything in its log is committed, and the moving of
   replicas goes on from there (etcd's ``--force-new-cluster`` and CockroachDB's ``debug recover`` do likewise).
4. The masters' group begins with the newest view that any survivor has, in which the lost nodes have left.
5. A shard of which no survivor holds anything is lost as a whole. Only on explicit demand it begins again, empty.

What excludes that the lost ones come back, and are a majority again: the recovery makes a new secret, and marks the
data directories that took part (:mod:`gostore.fence`). Whoever has the old secret is not heard, and an old data
directory with the new secret does not start.

:func:`examine` changes nothing but what opening a log changes; :func:`perform` is done again after an interruption.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from gostore import fence
from gostore.cluster import NodeState, RingCache, View
from gostore.config import StorageConfig
from gostore.consensus.configuration import NOBODY, Configuration
from gostore.consensus.journal import Journal
from gostore.consensus.messages import COMMAND, CONFIGURATION, ORIGIN, Entry, Point
from gostore.consensus.pieces import fragments
from gostore.consensus.ready import HardState
from gostore.core.errors import BadRequest, ConfigError, NotSupported
from gostore.env import Env
from gostore.services.cls import masters
from gostore.services.cls.history import History
from gostore.services.cls.machine import Machine
from gostore.services.cls.service import MASTERS_GROUP
from gostore.services.db.raft import GROUPS_FROM
from gostore.services.db.service import LOGS_FROM
from gostore.storage import Wal

TERMS_JUMP: Final = 1_000_000
"""The term of the new configuration is so much above all that any survivor has seen."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What one survivor has of one group. ``configuration``: of ``NOBODY`` if it knows nothing of the group yet.

    ``votes``: whether its vote would count, if it has one: also with an empty log, for that it has promised nothing to
    anybody; but not while it holds less than it had before it forgot its log (see ``Group.clear``).
    """

    node: str
    term: int
    last: Point
    configuration: Configuration
    votes: bool


@dataclass(frozen=True, slots=True)
class Repair:
    """A group that lost its majority: ``survivor`` (None: nobody has anything of it) shall be its only voter.

    ``lost``: voters that are gone; ``voters``: all there were. ``last``: the last entry that is kept.
    """

    number: int
    name: str
    survivor: str | None
    voters: tuple[str, ...]
    lost: tuple[str, ...]
    last: Point
    term: int

    def __str__(self) -> str:
        if self.survivor is None and self.number == MASTERS_GROUP:
            return f"{self.name}: NONE OF THEM IS LEFT; the newest view that anybody else has will count"
        if self.survivor is None:
            return f"{self.name}: NOTHING OF IT IS LEFT; everything in it is lost"
        return (
            f"{self.name}: of {', '.join(self.voters)} only {self.survivor} will decide. Its log ends with entry "
            f"{self.last.index}, of which it cannot know whether it was acknowledged: it will count. Whatever "
            f"{', '.join(self.lost)} acknowledged after it IS LOST"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """``view``: the newest that anybody has. ``healthy``: groups that still have their majority."""

    view: View
    survivors: tuple[str, ...]
    lost: tuple[str, ...]
    repairs: tuple[Repair, ...]
    healthy: tuple[str, ...]
    interrupted: str | None

    @property
    def empty(self) -> tuple[Repair, ...]:
        """Those of which nothing is left."""
        return tuple(repair for repair in self.repairs if repair.survivor is None and repair.number != MASTERS_GROUP)


@asynccontextmanager
async def opened(envs: Iterable[Env], storage: StorageConfig) -> AsyncIterator[dict[str, Wal]]:
    """The logs of nodes that do not run, by name. Raises what opening a log raises, and ``ConfigError``."""
    wals: dict[str, Wal] = {}
    try:
        for env in envs:
            if not env.disk.exists("wal"):
                raise ConfigError(f"{env.name}: its data directory holds no log; is it the right one?")
            wals[env.name] = await Wal.open(env, storage)
        yield wals
    finally:
        for wal in wals.values():
            await wal.close()


async def examine(
    envs: Mapping[str, Env], wals: Mapping[str, Wal], lost: Sequence[str], *, cluster: str, secret: str
) -> Plan:
    """What is lost, and what a recovery would do. ``secret``: that with which the cluster ran last.

    Raises ``BadRequest`` when there is nothing to recover, or a voter is neither given nor said to be lost;
    ``NotSupported`` for a cluster of another replication policy.
    """
    if both := [name for name in lost if name in wals]:
        raise BadRequest(f"{both[0]} is said to be lost, and its data directory is given: one of them is wrong")
    view = _newest_view(wals, cluster)
    if unknown := [name for name in lost if name not in view.members]:
        raise BadRequest(f"there was no node {unknown[0]!r}; there were {', '.join(view.members)}")
    for name in wals:
        if name not in view.members:
            raise BadRequest(f"{name} was never a member; there were {', '.join(view.members)}")
    _refuse_other_policies(wals, len(view.founders))
    members = tuple(name for name, member in view.members.items() if member.state is not NodeState.LEFT)
    repairs, healthy = [], []
    for number, group, founders in _groups(view):
        asked = [_standing(name, wal, number, founders) for name, wal in wals.items()]
        standings = [found for found in asked if found is not None]
        repair = _judge(number, group, founders, members, standings, tuple(wals), tuple(lost))
        if repair is None:
            healthy.append(group)
        else:
            repairs.append(repair)
    fences = [mark for env in envs.values() if (mark := fence.read(env.disk)) is not None]
    begun = [one.id for one in fences if one.id != fence.id_of(secret)]
    if not repairs and not begun:
        raise BadRequest(
            f"every group has a majority among {', '.join(wals)}: there is nothing to recover. Start these nodes; the "
            "cluster replaces the others by itself"
        )
    return Plan(view, tuple(wals), tuple(lost), tuple(repairs), tuple(healthy), begun[-1] if begun else None)


async def perform(
    plan: Plan, envs: Mapping[str, Env], wals: Mapping[str, Wal], *, accept_empty_shards: bool = False
) -> str:
    """Do it; returns the number of the recovery, of which the cluster's new secret is made (:mod:`gostore.fence`).

    Raises ``BadRequest`` when whole shards are lost and that was not accepted.
    """
    if plan.empty and not accept_empty_shards:
        names = ", ".join(repair.name for repair in plan.empty)
        raise BadRequest(
            f"nothing is left of {names}: accept that they begin again empty, or bring back a node that has them"
        )
    identity = plan.interrupted or fence.new_id(envs[plan.survivors[0]].rng)
    groups = tuple(repair.name for repair in plan.repairs)
    for name in plan.survivors:
        before = fence.read(envs[name].disk)
        if before is not None and before.id == identity:  # it was interrupted: what it did then, it did
            groups = tuple(dict.fromkeys((*before.groups, *groups)))
        await fence.write(envs[name], fence.Fence(identity, groups, plan.lost))
    for number, repair in enumerate(plan.repairs):
        survivor = repair.survivor or plan.survivors[number % len(plan.survivors)]
        journal = Journal(wals[survivor], repair.number)
        if repair.number == MASTERS_GROUP:
            _begin_masters(journal, repair, survivor, _without(plan.view, plan.lost, survivor, repair.term))
        else:
            _begin_shard(journal, repair, survivor)
        await wals[survivor].sync()
    return identity


def _refuse_other_policies(wals: Mapping[str, Wal], shards: int) -> None:
    """Raises ``NotSupported``. Their nodes would not start with the groups of raft that a recovery writes."""
    advice = "which has no majorities to lose: bring the lost nodes back, or restore a backup into a new cluster"
    for name, wal in wals.items():
        for policy, first in LOGS_FROM.items():
            if policy != "raft" and any(wal.last_index(first + shard) for shard in range(shards)):
                raise NotSupported(f"{name} has db.replication = {policy!r}, {advice}")
    # Of raft each node has the beginning of each group, though it holds none of the shards.
    if not any(wal.last_index(GROUPS_FROM + shard) for wal in wals.values() for shard in range(shards)):
        raise NotSupported(f"{', '.join(wals)} have another db.replication than 'raft', {advice}")


def _groups(view: View) -> list[tuple[int, str, tuple[str, ...]]]:
    """(number, name, founders); the founders of the masters' group are not known any more."""
    return [
        (MASTERS_GROUP, "masters", ()),
        *((GROUPS_FROM + shard, f"shard {shard}", founders) for shard, founders in enumerate(view.founders)),
    ]


def _standing(name: str, wal: Wal, number: int, founders: tuple[str, ...]) -> Standing | None:
    """None for a group of which this node has no record."""
    if not wal.last_index(number):
        # A founder that has not begun yet. Who came later was asked for its vote only when it had records of the group,
        # so it has lost them.
        return Standing(name, 0, ORIGIN, NOBODY, votes=True) if name in founders else None
    journal = Journal(wal, number)
    restored = journal.restored()
    last = Point(restored.last, restored.runs[-1][1] if restored.runs else restored.start.term)
    configuration = restored.configurations[-1][1] if restored.configurations else restored.configuration
    votes = _age(last) >= _age(journal.tomb)
    return Standing(name, max(restored.hard_state.term, last.term), last, configuration, votes)


def _age(point: Point) -> tuple[int, int]:
    """The greater one knows more."""
    return point.term, point.index


def _judge(
    number: int,
    group: str,
    founders: tuple[str, ...],
    members: tuple[str, ...],
    standings: Sequence[Standing],
    survivors: tuple[str, ...],
    lost: tuple[str, ...],
) -> Repair | None:
    """None when a majority survives. ``members``: of the cluster. Raises ``BadRequest``."""
    term = max((standing.term for standing in standings), default=0) + TERMS_JUMP
    known = [standing for standing in standings if standing.configuration != NOBODY]
    best = max(known, key=lambda one: (*_age(one.last), one.configuration.is_voter(one.node)), default=None)
    # While nobody knows of another one, that of the founders is in force, and they would begin the group.
    configuration = best.configuration if best is not None else Configuration(founders)
    voters = tuple(name for name in configuration.members if configuration.is_voter(name))
    # What no survivor knows of may be with any other member.
    if missing := [name for name in (members if best is None else voters) if name not in (*survivors, *lost)]:
        why = "may have it, and none of the survivors has" if best is None else "votes in it"
        raise BadRequest(
            f"{group}: {missing[0]} {why}: give its data directory, or say that it is lost for good "
            f"(--lost {missing[0]})"
        )
    # Who knows most can stand, and votes for itself.
    if configuration.won({one.node: True for one in standings if one.votes or one is best}):
        return None
    if best is None:
        return Repair(number, group, None, (), (), ORIGIN, term)
    gone = tuple(name for name in voters if name in lost)
    return Repair(number, group, best.node, voters, gone, best.last, term)


def _begin_shard(journal: Journal, repair: Repair, survivor: str) -> None:
    if journal.empty:
        journal.found(NOBODY)
    journal.write_hard(HardState(repair.term, None, journal.hard.commit))
    only = Configuration((survivor,))
    journal.append([Entry(repair.term, journal.last + 1, CONFIGURATION, only.pack())])


def _begin_masters(journal: Journal, repair: Repair, survivor: str, view: View) -> None:
    """The view stands for the whole log, as a snapshot does that a leader has sent."""
    if journal.empty:
        journal.found(NOBODY)
    journal.write_hard(HardState(repair.term, None, journal.hard.commit))
    journal.begin_installation(Point(journal.last + 1, repair.term), Configuration((survivor,)))
    machine = Machine(view, lambda event, view: None)
    for part in fragments(machine.snapshot()):
        journal.add_part(part)
    journal.end_installation()
    journal.drop(journal.take_drop())


def _newest_view(wals: Mapping[str, Wal], cluster: str) -> View:
    """Of what all survivors have seen and, as masters, have in their logs. Raises ``BadRequest``."""
    cache = RingCache()
    views = [view for wal in wals.values() if (view := History(wal).load(cache)) is not None]
    logs = [Journal(wal, MASTERS_GROUP) for wal in wals.values() if wal.last_index(MASTERS_GROUP)]
    views += [_view_of_masters(journal, cluster, cache) for journal in logs]
    # Of the same epoch the one that was installed somewhere, for it was committed: max() takes the first.
    newest = max(views, key=lambda view: view.epoch, default=None)
    if newest is None or newest.epoch == 0 or not newest.founders:
        raise BadRequest("none of these nodes was ever a member of a cluster that was complete")
    if newest.cluster != cluster:
        raise BadRequest(f"these nodes are of the cluster {newest.cluster!r}, and not of {cluster!r}")
    return newest


def _view_of_masters(journal: Journal, cluster: str, cache: RingCache) -> View:
    machine = Machine(View(cluster, 0, {}, {}, cache=cache), lambda event, view: None)
    if state := journal.take_state():
        machine.restore(state)
    for entry in journal.standing():
        if entry.kind == COMMAND:
            machine.apply(entry.index, entry.payload)
    return machine.view


def _without(view: View, lost: Iterable[str], master: str, term: int) -> View:
    """The view one epoch on, in which the lost ones have left for good."""
    changes = []
    for name in lost:
        member = view.members[name]
        if member.state is NodeState.LEFT:
            continue
        if member.state is not NodeState.OFFLINE:
            member = member.to(NodeState.OFFLINE)
            changes.append(member)
        changes.append(replace(member.to(NodeState.LEFT), rings=()))
    return masters.apply(view, masters.NodeEvent(view.epoch + 1, view.digest, term, master, tuple(changes)))

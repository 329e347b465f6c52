"""Classical mistakes, each planted into the product by a patch of a line or two while a run lasts.

A bug is a context manager. ``schedule`` draws the faults under which it is hunted (the same on every run of a seed), so
that a bug that needs a power cut gets one; ``tune`` changes constants for the hunt *and* for the run without the bug,
where a mechanism would not be reached in a run of seconds (snapshots). A bug counts as found on a seed only when the
same seed, with the same faults and without the bug, is clean.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from gostore import node
from gostore.client.keyvalue import RemoteKeyValue
from gostore.comm import calls
from gostore.consensus import configuration
from gostore.consensus.configuration import NOBODY, Configuration
from gostore.consensus.group import Group
from gostore.consensus.journal import BEGIN, Journal
from gostore.consensus.leader import Leadership
from gostore.consensus.log import RaftLog
from gostore.consensus.messages import Point
from gostore.consensus.outbox import Outbox
from gostore.consensus.raft import Raft
from gostore.core.errors import GoStoreError, Timeout
from gostore.core.keyvalue import Committed, PointRead, RangeRead
from gostore.core.transaction import Transaction
from gostore.faults import Faults, Step, draw, nemesis
from gostore.services.cls import admission
from gostore.services.cls import service as cls_service
from gostore.services.cls.service import MASTERS_GROUP
from gostore.services.db import coordinator, machine, mvcc, primary_backup, replica, transaction
from gostore.services.db import service as db_service
from gostore.services.fs import chunks, collector, directory, repair
from gostore.services.fs import transactions as fs_transactions
from gostore.storage import blobs, segments, wal

NODES = ("n1", "n2", "n3", "n4", "n5")

SLOW_S = (0.01, 0.03, 0.1, 0.3)
"""What a sync takes on a slow disk."""

Schedule = Callable[[random.Random, float], list[Step]]


@dataclass(frozen=True)
class Bug:
    """``what`` in a sentence; ``where`` in the product; ``seconds`` of load in a run of a cluster with ``settings``."""

    name: str
    where: str
    what: str
    patch: Callable[[], AbstractContextManager[Any]]
    schedule: Schedule
    tune: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    seconds: float = 4.0
    settings: dict[str, Any] = field(default_factory=dict)


BUGS: dict[str, Bug] = {}


# the faults of a hunt


def profile(name: str) -> Schedule:
    """The schedules of the product's own profiles."""
    return lambda rng, seconds: draw(rng, NODES, seconds, name)


def dense(
    *words: str, gap_s: tuple[float, float] = (0.4, 1.6), lasting_s: tuple[float, float] = (0.5, 3.0)
) -> Schedule:
    """One fault after the other, all of these words; at most a minority is down at a time."""

    def schedule(rng: random.Random, seconds: float) -> list[Step]:
        steps: list[Step] = []
        at_s = rng.uniform(*gap_s)
        while at_s < seconds:
            busy = [s.arguments["node"] for s in steps if s.until_s > at_s and s.word in ("kill", "power_cut", "pause")]
            word = rng.choice(words)
            arguments = nemesis._arguments(rng, word, NODES, busy)
            if arguments is not None:
                until_s = min(at_s + rng.uniform(*lasting_s), seconds)
                steps.append(Step(round(at_s, 3), round(until_s, 3), word, arguments))
            at_s += rng.uniform(*gap_s)
        return steps

    return schedule


def blackout(rng: random.Random, seconds: float) -> list[Step]:
    """The disks are slow, and in the midst of the load every machine loses its power at once."""
    at_s, sync_s = round(rng.uniform(0.4, 0.7) * seconds, 3), round(rng.uniform(0.02, 0.3), 3)
    slow = [Step(1.0, at_s, "slow_disk", {"node": node, "sync_s": sync_s}) for node in NODES]
    return slow + [Step(at_s, round(at_s + 0.5, 3), "power_cut", {"node": node}) for node in NODES]


def uneven_blackout(rng: random.Random, seconds: float) -> list[Step]:
    """As a blackout, but some disks are slow and some are fast."""
    return [
        replace(step, arguments={**step.arguments, "sync_s": round(rng.choice((0.002, 0.3, 1.0)), 3)})
        if step.word == "slow_disk"
        else step
        for step in blackout(rng, seconds)
    ]


def slow_disks(rng: random.Random, seconds: float) -> list[Step]:
    """All disks are slow, each in its way, to the end."""
    return [Step(0.3, seconds, "slow_disk", {"node": node, "sync_s": rng.choice(SLOW_S)}) for node in NODES]


def failing_disk(rng: random.Random, seconds: float) -> list[Step]:
    """The syncs of one disk fail for a moment; later its node is killed."""
    node, at_s = rng.choice(NODES), round(rng.uniform(0.2, 0.5) * seconds, 3)
    return [
        Step(at_s, at_s + 0.1, "failing_syncs", {"node": node, "for_s": round(rng.uniform(0.02, 0.2), 3)}),
        Step(round(at_s + 1.5, 3), round(at_s + 2.0, 3), "kill", {"node": node}),
    ]


def lossy_client(rng: random.Random, seconds: float) -> list[Step]:
    """What the client and the nodes say to each other is lost now and then, to the end."""
    return [Step(0.2, seconds, "lossy_client", {"probability": round(rng.uniform(0.05, 0.25), 3)})]


def damaged_chunks(rng: random.Random, seconds: float) -> list[Step]:
    """Now and then a bit flips in a chunk."""
    times = sorted(round(rng.uniform(0.1, 0.9) * seconds, 3) for _ in range(12))
    return [Step(at_s, at_s, "damage", {"node": rng.choice(NODES), "number": rng.randrange(100)}) for at_s in times]


slow_turnover = dense("kill", "slow_disk", "loss", gap_s=(0.2, 0.6), lasting_s=(1.0, 3.0))
"""Leaders end, and answers are late."""


async def _failing_syncs(faults: Any, node: str, for_s: float) -> None:
    disk = faults._cluster.sim.node(node).disk
    disk.failing = True
    await asyncio.sleep(for_s)
    disk.failing = False


async def _damage(faults: Any, node: str, number: int) -> None:
    disk = faults._cluster.sim.node(node).disk
    names = [name for name in disk.files() if "blobs/" in name and disk.read_bytes(name)]
    if names:
        name = names[number % len(names)]
        disk.corrupt(name, len(disk.read_bytes(name)) // 2, bit=3)


async def _lossy_client(faults: Any, probability: float) -> None:
    links = faults._cluster.sim.net.links
    for name in NODES:
        for source, target in (("client", name), (name, "client")):
            links.set(source, target, loss=probability)


@contextmanager
def more_faults() -> Iterator[None]:
    """Words that the vocabulary of faults lacks, for schedules of this file."""
    more = {"failing_syncs": _failing_syncs, "damage": _damage, "lossy_client": _lossy_client}
    with ExitStack() as stack:
        stack.enter_context(patch.object(nemesis, "WORDS", (*nemesis.WORDS, *more)))
        for word, function in more.items():
            stack.enter_context(patch.object(Faults, word, function, create=True))
        yield


# registering


def bug(
    where: str,
    what: str,
    schedule: Schedule,
    *,
    tune: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    seconds: float = 4.0,
    **settings: Any,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """The function returns what is patched: a context manager, or several in a list."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        @contextmanager
        def planted() -> Iterator[None]:
            found = function()
            with ExitStack() as stack:
                for one in found if isinstance(found, list) else [found]:
                    stack.enter_context(one)
                yield

        name = function.__name__
        BUGS[name] = Bug(name, where, what, planted, schedule, tune, seconds, settings)
        return function

    return register


FAR = Point(1 << 40, 1 << 40)
"""As if a log went so far."""

PRIMARY_BACKUP = {"replication": "primary_backup"}
"""The other way of replication, which the product keeps as a lesson."""


def short_doubts() -> AbstractContextManager[Any]:
    """A participant is in doubt after milliseconds instead of a second."""
    return patch.object(coordinator, "IN_DOUBT_S", 0.02)


# storage


@bug("storage.wal", "acknowledge before the sync", blackout)
def ack_before_sync() -> Any:
    async def sync(self: wal.Wal) -> None:
        self._dirty.set()

    return patch.object(wal.Wal, "sync", sync)


@bug("storage.wal", "the torn tail of the log is not cut off, and new records follow it", dense("power_cut"))
def torn_tail_stays() -> Any:
    async def end_tail(self: wal.Wal) -> None:
        self._current.size = self._synced_size = self._current_file().size()
        self._noted = True

    return patch.object(wal.Wal, "_end_tail", end_tail)


@bug("storage.segments", "checksums are not compared, so a torn record passes for a whole one", blackout)
def checksum_ignored() -> Any:
    return patch.object(segments, "crc32", lambda *_: 0)


@bug("storage.wal", "a sync that failed is tried again, and the second one says that all is well", failing_disk)
def failed_sync_retried() -> Any:
    original = wal.Wal._current_file

    class Stubborn:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        async def sync(self) -> None:
            while True:
                try:
                    return await self._file.sync()
                except OSError:
                    await asyncio.sleep(0.01)

        async def write(self, parts: Any, *, sync: bool) -> None:
            await self._file.write(parts, sync=False)
            if sync:
                await self.sync()

    return patch.object(wal.Wal, "_current_file", lambda self: Stubborn(original(self)))


@bug("storage.blobs", "the directory is not synced after the rename, so the name of a chunk is lost", blackout)
def directory_not_synced() -> Any:
    async def sync(self: blobs.DirectorySyncs, name: str) -> None:
        return

    return patch.object(blobs.DirectorySyncs, "sync", sync)


@bug("storage.blobs", "a chunk is read without a look at its checksum", damaged_chunks)
def chunk_not_verified() -> Any:
    def get(self: blobs.BlobStore, key: str) -> bytes:
        return self._env.disk.read_bytes(self._path(key))

    return patch.object(blobs.BlobStore, "get", get)


# comm


@bug("comm.calls", "no suppression of duplicates: a request that comes again runs again", lossy_client)
def duplicates_run() -> Any:
    original = calls.Callee.request

    def request(self: calls.Callee, session: Any, *args: Any, **options: Any) -> int:
        verdict = original(self, session, *args, **options)
        if verdict == calls.RESEND and not options.get("poke"):
            session._remove(args[1])
            session.running[args[1]] = None
            return calls.RUN
        return verdict

    return patch.object(calls.Callee, "request", request)


# the client


@bug("client.keyvalue", "a commit without an answer is sent again under a new request id", slow_disks)
def new_id_for_a_retry() -> Any:
    original = RemoteKeyValue.commit

    async def commit(self: RemoteKeyValue, reads: Any, writes: Any, **options: Any) -> Committed:
        reads = list(reads)
        try:
            return await original(self, reads, writes, **{**options, "timeout_s": 0.5})
        except Timeout:
            return await original(self, reads, writes, **options)

    return patch.object(RemoteKeyValue, "commit", commit)


@bug("core.transaction", "a transaction that only read is not validated (read skew)", dense("delay"), seconds=6.0)
def reads_not_validated() -> Any:
    original = Transaction.commit

    async def commit(self: Transaction, **options: Any) -> Committed:
        if self._writes:
            return await original(self, **options)
        self._finished = True
        return Committed({})

    return patch.object(Transaction, "commit", commit)


# db: transactions


@bug("services.db.machine", "what a transaction has read is not validated (lost update)", profile("none"))
def lost_update() -> Any:
    original = transaction.find_clash
    return patch.object(machine, "find_clash", lambda store, locks, reads, writes: original(store, locks, [], writes))


@bug("services.db.machine", "only what is also written is validated (write skew)", profile("none"))
def write_skew() -> Any:
    original = transaction.find_clash

    def find_clash(store: Any, locks: Any, reads: Any, writes: Any) -> Any:
        kept = [r for r in reads if isinstance(r, RangeRead) or not writes or (r.container, r.key) in writes]
        return original(store, locks, kept, writes)

    return patch.object(machine, "find_clash", find_clash)


@bug("services.db.transaction", "ranges are not validated (phantoms)", profile("none"))
def phantoms() -> Any:
    return patch.object(transaction, "_range_clash", lambda store, locks, read: None)


@bug("services.db.machine", "a request that is in the log twice is applied twice: no sessions", slow_turnover)
def no_sessions() -> Any:
    return patch.object(machine.ShardMachine, "_once", lambda self, request, execute, *args: execute(*args))


@bug("services.db.machine", "a prepared transaction writes before the decision (dirty read)", profile("none"))
def dirty_read() -> Any:
    original = machine.ShardMachine._prepare

    def prepare(self: machine.ShardMachine, name: str, coordinator: int, reads: Any, writes: Any, index: int) -> Any:
        outcome = original(self, name, coordinator, reads, writes, index)
        if outcome[0] == "ok":
            for (container, key), packed in self.prepared[name].values.items():
                self.store.write(container, key, packed, index)
        return outcome

    return patch.object(machine.ShardMachine, "_prepare", prepare)


@bug("services.db.transaction", "the locks of a transaction across shards are never released", profile("none"))
def locks_stay() -> Any:
    return patch.object(transaction.LockTable, "release", lambda self, name: None)


@bug("services.db.coordinator", "a participant in doubt aborts without asking", slow_disks, tune=short_doubts)
def participant_aborts() -> Any:
    async def resolve(self: coordinator.Coordinator, name: str, number: int) -> None:
        with contextlib.suppress(GoStoreError):
            await self._shard.propose(["decide", name, False], self._now() + coordinator.DECIDE_TIMEOUT_S)

    return patch.object(coordinator.Coordinator, "_resolve", resolve)


@bug("services.db.coordinator", "the decision is forgotten before the other shards have heard it", profile("none"))
def decision_forgotten() -> Any:
    async def tell(self: coordinator.Coordinator, number: int, name: str, commit: bool) -> int:
        return 0

    return patch.object(coordinator.Coordinator, "_tell", tell)


@bug(
    "services.db.machine",
    "the decision of a transaction across shards is applied in its first shard only",
    profile("none"),
)
def half_a_commit() -> Any:
    original = machine.ShardMachine._decide

    def decide(self: machine.ShardMachine, name: str, commit: bool, index: int) -> Any:
        return original(self, name, commit and name in self.coordinated, index)

    return patch.object(machine.ShardMachine, "_decide", decide)


# db: replication and snapshots


@bug(
    "services.db.recovery",
    "the new primary takes its own log, not the most advanced one",
    dense("kill", "power_cut"),
    seconds=6.0,
    db=PRIMARY_BACKUP,
)
def own_log_taken() -> Any:
    original = primary_backup.judge

    def judge(me: str, *args: Any) -> Any:
        verdict = original(me, *args)
        return replace(verdict, source=me) if verdict.source is not None else verdict

    return patch.object(primary_backup, "judge", judge)


@bug(
    "services.db.replica",
    "a replica forgets its promise (its vote) and follows any primary",
    dense("isolate", "kill"),
    seconds=6.0,
    db=PRIMARY_BACKUP,
)
def no_fencing() -> Any:
    return patch.object(replica.Replica, "check", lambda self, generation, primary: None)


@bug("services.db.machine", "a snapshot holds the objects, but not the sessions", dense("kill"), seconds=6.0)
def snapshot_without_sessions() -> Any:
    original, digest = machine.ShardMachine.snapshot, machine.ShardMachine.digest

    def snapshot(self: machine.ShardMachine) -> Any:
        with patch.object(self, "_sessions", type(self._sessions)()):
            return original(self)

    def whole(self: machine.ShardMachine) -> str:
        with patch.object(machine.ShardMachine, "snapshot", original):
            return digest(self)

    return [
        patch.object(machine.ShardMachine, "snapshot", snapshot),
        patch.object(machine.ShardMachine, "digest", whole),
    ]


@bug("services.db.mvcc", "deleted objects are in the snapshot again (no tombstone)", dense("kill"))
def deleted_is_back() -> Any:
    original = mvcc.Store.rows

    def rows(self: mvcc.Store, container: str) -> list[mvcc.Row]:
        found = {row.key: row for row in original(self, container)}
        for change in self._changes:
            if change.container == container and change.key not in found and change.previous is not None:
                found[change.key] = mvcc.Row(change.key, *change.previous)
        return list(found.values())

    return patch.object(mvcc.Store, "rows", rows)


# consensus


@bug("consensus.configuration", "off by one: a minority may decide", profile("network"))
def minority_decides() -> Any:
    def majority(voters: Sequence[str], numbers: Any) -> int:
        reached = sorted((numbers.get(name, 0) for name in voters), reverse=True)
        return reached[max(0, len(reached) // 2 - 1)]

    return patch.object(configuration, "_majority", majority)


@bug("consensus.journal", "term and vote are not written, so a replica votes twice in a term", blackout)
def vote_forgotten() -> Any:
    return patch.object(Journal, "write_hard", lambda self, hard: None)


@bug("consensus.raft", "a vote is granted without a look at how far the candidate's log is", dense("isolate", "kill"))
def logs_not_compared() -> Any:
    original = Raft._on_vote
    return patch.object(
        Raft, "_on_vote", lambda self, source, vote, now_s: original(self, source, replace(vote, last=FAR), now_s)
    )


@bug("consensus.outbox", "a follower acknowledges entries, and votes, before the sync", blackout)
def promised_before_sync() -> Any:
    return patch.object(Outbox, "send_synced", Outbox.send)


@bug("consensus.leader", "a leader counts its own log before it is synced", uneven_blackout)
def own_log_not_synced() -> Any:
    original = Leadership.advance

    def advance(self: Leadership, now_s: float) -> None:
        with patch.object(self._log, "durable", self._log.last.index):
            original(self, now_s)

    return patch.object(Leadership, "advance", advance)


@bug("consensus.group", "a snapshot does not hold the configuration", dense("power_cut"))
def snapshot_without_members() -> Any:
    original = Group._here
    return patch.object(Group, "_here", lambda self: (original(self)[0], NOBODY))


@bug("consensus.journal", "a snapshot drops the entries that follow it in the log", dense("kill"))
def snapshot_loses_the_rest() -> Any:
    def begin(self: Journal, point: Point, made: Configuration, tail_max: int) -> Any:
        compaction = self._compaction = self._open(BEGIN, point, made)
        compaction.tail = point.index + 1
        return compaction

    return patch.object(Journal, "begin_compaction", begin)


@bug("consensus.log", "a configuration is in force when it is committed, not when it is in the log", dense("kill"))
def configuration_in_force_late() -> Any:
    return patch.object(
        RaftLog, "configuration", property(lambda self: self.configuration_at(max(self.committed, self.start.index)))
    )


# cls


@bug(
    "services.cls.leader",
    "the master decides alone, whatever the other masters know",
    dense("isolate", gap_s=(0.5, 1.5), lasting_s=(5.0, 8.0)),
    seconds=9.0,
)
@contextmanager
def master_decides_alone() -> Iterator[None]:
    propose, read_barrier = Group.propose, Group.read_barrier

    async def apply_at_once(self: Group, payload: bytes, deadline_s: float) -> Any:
        if self.number != MASTERS_GROUP:
            return await propose(self, payload, deadline_s)
        return self.machine.apply(self.last.index + 1, payload)

    async def believe(self: Group, deadline_s: float) -> None:
        if self.number != MASTERS_GROUP:
            await read_barrier(self, deadline_s)

    with patch.object(Group, "propose", apply_at_once), patch.object(Group, "read_barrier", believe):
        yield


@bug("services.cls.service", "a node that restarts comes back in its former incarnation", dense("kill"))
def incarnation_reused() -> Any:
    original = node.next_incarnation

    async def first(env: Any) -> int:
        await original(env)
        return 1

    return patch.object(node, "next_incarnation", first)


@bug("services.cls.admission", "a node that restarts builds upon the view that it has saved", dense("kill"))
def saved_view_is_trusted() -> Any:
    def all_offline(view: Any) -> Any:
        return replace(admission.all_offline(view), digest=view.digest)

    return patch.object(cls_service, "all_offline", all_offline)


@bug("services.db.service", "a node keeps the ring of its first view: joins and losses do not reach it", dense("kill"))
def stale_ring() -> Any:
    original = db_service.DbService._owners

    def owners(self: Any, view: Any, number: int) -> tuple[str, ...]:
        found = original(self, view, number)
        if self._env.name != "n3":
            return found
        kept = self.__dict__.setdefault("_kept", {})
        return kept.setdefault(number, found) if len(found) > 2 else found

    return patch.object(db_service.DbService, "_owners", owners)


# fs


@bug(
    "services.fs.collector",
    "collection looks at headers only, not at the intents of writers",
    dense("delay", "slow_disk"),
)
def intents_ignored() -> Any:
    original = collector.Collector._scan

    async def scan(self: collector.Collector, container: str, work: Any) -> Any:
        if container != directory.INTENTS:
            async for entry in original(self, container, work):
                yield entry

    return patch.object(collector.Collector, "_scan", scan)


@bug(
    "services.fs.collector",
    "headers are read before the list of what is held, so new files lose chunks",
    dense("delay"),
)
def collected_too_early() -> Any:
    async def referenced(self: collector.Collector, work: Any) -> frozenset[str]:
        return self.__dict__.get("_before", frozenset())

    original_collect, original_referenced = collector.Collector.collect, collector.Collector._referenced

    async def collect(self: collector.Collector, done: Any = None) -> Any:
        await self._tree.ready()
        self.__dict__["_before"] = await original_referenced(self, collector.Work())
        return await original_collect(self, done)

    return [
        patch.object(collector.Collector, "_referenced", referenced),
        patch.object(collector.Collector, "collect", collect),
        patch.object(chunks.Holder, "pin", lambda self, key: self.has(key)),
        patch.object(chunks.Holder, "_touch", lambda self, key: None),
    ]


@bug("services.fs.directory", "a file is created without validating that its directory still exists", profile("none"))
def directory_not_validated() -> Any:
    original = fs_transactions.Transactions.commit

    async def commit(self: Any, reads: Any, writes: Any) -> Any:
        kept = [r for r in reads if not (isinstance(r, PointRead) and r.key.endswith("/"))]
        return await original(self, kept, writes)

    return patch.object(fs_transactions.Transactions, "commit", commit)


@bug("services.fs.repair", "repair counts an owner that does not answer as one that holds the chunk", dense("kill"))
def silence_is_consent() -> Any:
    original = repair.Repair._look

    async def look(self: repair.Repair, view: Any, keys: Any) -> Any:
        found = await original(self, view, keys)
        for copies in found.values():
            copies.holding += copies.silent + copies.lacking
            copies.silent, copies.lacking = [], []
        return found

    return patch.object(repair.Repair, "_look", look)

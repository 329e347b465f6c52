"""Watches while everything breaks: what is delivered is what the logs say, no more and no less, in their order."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from gostore.client import watch as client_watch
from gostore.client.watch import Watch
from gostore.core.errors import BadRequest, Compacted, GoStoreError, NotFound, Unavailable
from gostore.core.keyvalue import Change
from gostore.core.values import unpack
from gostore.faults import Nemesis, draw
from gostore.services.db import DbService, mvcc, watches
from gostore.services.db.machine import ShardMachine, pack_command, unpack_command
from gostore.sim import SimCluster, simulate

POLICIES = ("raft", "primary_backup")
KEYS = tuple(f"{letter}{number}" for letter in "ab" for number in range(4))
QUIET_S = 60.0


class Logs:
    """What was committed: every command that any replica applied, and what it changed.

    Found by applying them to a machine of its own and comparing all rows before and after, not by what is tested.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: dict[int, dict[int, bytes]] = {}
        apply = ShardMachine.apply

        def record(machine: ShardMachine, command: Sequence[Any], index: int) -> Any:
            packed = pack_command(command)
            # Two replicas that apply something else at the same index would make every test here worthless.
            assert self.commands.setdefault(machine.shard, {}).setdefault(index, packed) == packed
            return apply(machine, command, index)

        monkeypatch.setattr(ShardMachine, "apply", record)
        self._apply = apply

    def changes(self, shard: int) -> Iterator[tuple[int, str, Any, bool]]:
        """(version, key, value, deleted) of what happened in the container ``t``."""
        machine, before = ShardMachine(shard, 1 << 20), dict[str, Any]()
        for index, packed in sorted(self.commands.get(shard, {}).items()):
            self._apply(machine, unpack_command(packed), index)
            containers = [name for name in machine.store.containers() if name.startswith("t@")]
            after = {row.key: row for name in containers for row in machine.store.rows(name)}
            for key in sorted({*before, *after}):
                if before.get(key) != after.get(key):
                    value = unpack(after[key].packed) if key in after else None
                    yield index, key, value, key not in after
            before = after

    def expected(self, shard: int, after: int, upto: int, wanted: Callable[[str], bool]) -> list[Any]:
        return [one for one in self.changes(shard) if after < one[0] <= upto and wanted(one[1])]


class Watcher:
    """Consumes a watch for the whole run; begins anew after a gap. ``streams``: (began at, changes, ended at)."""

    def __init__(self, cluster: SimCluster, rng: random.Random, lazy_s: float = 0.0, **what: str) -> None:
        self.cluster = cluster
        self.rng = rng
        self.lazy_s = lazy_s
        self.what = what
        self.streams: list[tuple[dict[int, int], list[Change], dict[int, int]]] = []
        self.gaps = 0
        self.waits = 0
        self.watch: Watch | None = None
        self.ended = False

    async def run(self) -> None:
        while not self.ended:
            watch = self.cluster.db.watch("t", **self.what, timeout_s=5.0)  # type: ignore[arg-type]
            try:
                await watch.open()
            except GoStoreError:
                continue
            changes: list[Change] = []
            began, self.watch = watch.position, watch
            try:
                await self.consume(watch, changes)
            except Compacted:
                self.gaps += 1
            finally:
                self.streams.append((began, changes, watch.position))
                await watch.close()

    async def consume(self, watch: Watch, changes: list[Change]) -> None:
        while not self.ended:
            try:
                if self.rng.random() < 0.5:
                    async with asyncio.timeout(self.rng.uniform(0.0, 1.0)):
                        changes.append(await anext(watch))
                else:
                    changes += await watch.poll(self.rng.uniform(0.0, 1.0))
            except TimeoutError:
                pass  # cancelled in the middle of whatever it did
            except Unavailable:
                self.waits += 1  # nothing is lost by that
            if self.lazy_s:
                await asyncio.sleep(self.rng.uniform(0.0, self.lazy_s))

    def wanted(self, key: str) -> bool:
        return key == self.what["key"] if "key" in self.what else key.startswith(self.what["prefix"])

    def check(self, logs: Logs) -> None:
        for began, changes, ended in self.streams:
            for shard in began:
                mine = [(c.version, c.key, c.value, c.deleted) for c in changes if c.shard == shard]
                assert [one[0] for one in mine] == sorted(one[0] for one in mine)
                # Inside one commit the objects are in the order of its writes.
                upto = max([ended[shard], *(one[0] for one in mine)])
                assert sorted(mine, key=str) == sorted(logs.expected(shard, began[shard], upto, self.wanted), key=str)
                assert len(mine) == len(set(map(str, mine)))


async def write(cluster: SimCluster, rng: random.Random, until_s: float) -> None:
    """Single writes, removals, additions, and transactions over several shards."""
    db, loop = cluster.db, asyncio.get_running_loop()
    while loop.time() < until_s:
        try:
            async with asyncio.timeout(4.0):
                kind, keys = rng.randrange(4), rng.sample(KEYS, 3)
                if kind == 0:
                    await db.delete("t", keys[0])
                elif kind == 1:
                    async with db.transaction() as transaction:
                        for key in keys:
                            transaction.set("t", key, rng.randrange(1_000_000))
                else:
                    await db.set("t", keys[0], rng.randrange(1_000_000))
        except (GoStoreError, TimeoutError):
            pass
        await asyncio.sleep(rng.uniform(0.0, 0.1))


def soak(logs: Logs, seed: int, policy: str, profile: str, seconds: float = 15.0, **db: Any) -> list[Watcher]:
    rng = random.Random(f"watches {seed}")
    settings = {"shards": 4, "replication": policy, "snapshot_entries": 32, **db}
    with simulate(5, seed=seed, db=settings) as cluster:

        async def main() -> list[Watcher]:
            await cluster.db.create_container("t")
            watchers = [
                Watcher(cluster, rng, prefix=""), Watcher(cluster, rng, prefix="a"), Watcher(cluster, rng, key="b1"),
                Watcher(cluster, rng, lazy_s=1.0, prefix="b"),
            ]  # fmt: skip
            nemesis = Nemesis(cluster, draw(rng, list(cluster.nodes), seconds, profile))
            loop = asyncio.get_running_loop()
            until_s = loop.time() + seconds
            async with asyncio.TaskGroup() as group:
                for watcher in watchers:
                    group.create_task(watcher.run())
                async with asyncio.TaskGroup() as work:
                    work.create_task(nemesis.run(seconds))
                    for _ in range(3):
                        work.create_task(write(cluster, rng, until_s))
                await cluster.wait_settled(QUIET_S)
                # Every watch comes to the end of the logs: never silence.
                async with asyncio.timeout(QUIET_S):
                    while not all(caught_up(watcher) for watcher in watchers):  # noqa: ASYNC110 - it lies in nodes
                        await asyncio.sleep(0.1)
                for watcher in watchers:
                    watcher.ended = True
            return watchers

        def caught_up(watcher: Watcher) -> bool:
            position = watcher.watch.position if watcher.watch is not None else {}
            return bool(position) and all(
                position[shard] >= max(logs.commands.get(shard, {}), default=0) for shard in position
            )

        watchers: list[Watcher] = cluster.run(main())
        assert not [error for node in cluster.sim.nodes.values() for error in node.loop.errors]
    return watchers


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("policy", "profile"), [("raft", "swarm"), ("raft", "crash"), ("primary_backup", "promised")])
def test_what_is_delivered_is_what_the_logs_say(
    monkeypatch: pytest.MonkeyPatch, seed: int, policy: str, profile: str
) -> None:
    """Nodes die, hang and are cut off; leads and replicas move; logs become snapshots. No gap, double or disorder."""
    logs = Logs(monkeypatch)
    watchers = soak(logs, seed, policy, profile)
    for watcher in watchers:
        watcher.check(logs)
    assert sum(len(changes) for _, changes, _ in watchers[0].streams) > 50
    # A gap is for a history that is really gone: not for every fault.
    assert sum(watcher.gaps for watcher in watchers[:3]) <= 6


def test_a_short_history_makes_gaps_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two changes kept for a shard, nobody keeps up; and nobody misses anything without being told."""
    monkeypatch.setattr(mvcc, "HISTORY_CHANGES_MAX", 2)
    logs = Logs(monkeypatch)
    watchers = soak(logs, 1, "raft", "network", seconds=8.0)
    for watcher in watchers:
        watcher.check(logs)
    assert watchers[-1].gaps > 0


# one thing at a time


@contextlib.contextmanager
def small(nodes: int = 3, shards: int = 1, seed: int = 1, **db: Any) -> Iterator[SimCluster]:
    with simulate(nodes, seed=seed, db={"shards": shards, **db}) as cluster:
        cluster.db.create_container_sync("t", separator="/")
        cluster.wait_settled_sync()
        yield cluster
        assert not [error for node in cluster.sim.nodes.values() for error in node.loop.errors]


def primary(cluster: SimCluster, shard: int = 0) -> str:
    return str(cluster.db.shards_sync()[shard]["primary"])


def take(watch: Watch, count: int) -> list[Any]:
    """The next (key, value), so many of them."""
    return [(change.key, change.value) for change in (next(watch) for _ in range(count))]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_watch_goes_on_at_the_next_leader(policy: str) -> None:
    with small(replication=policy) as cluster, cluster.db.watch("t", key="k") as watch:
        cluster.db.set_sync("t", "k", 1)
        assert take(watch, 1) == [("k", 1)]
        for number in (2, 3):
            cluster.db.set_sync("t", "k", number)  # not fetched when its leader dies
            victim = primary(cluster)
            cluster.nodes[victim].kill_sync()
            cluster.db.set_sync("t", "k", -number)
            assert primary(cluster) != victim
            assert take(watch, 2) == [("k", number), ("k", -number)]
            cluster.faults.restart_sync(victim)
            cluster.wait_settled_sync()
        assert watch.poll_sync(5.0) == []


def test_a_watch_follows_its_shard_to_a_new_node() -> None:
    """The new replica began with a snapshot: whoever waited is nowhere behind it, though nothing was delivered."""
    with small(shards=8, snapshot_entries=16) as cluster, cluster.db.watch("t", prefix="w") as watch:
        before = {shard["shard"]: shard["primary"] for shard in cluster.db.shards_sync()}

        async def main() -> list[Change]:
            reader = asyncio.create_task(consume())
            for number in range(200):
                await cluster.db.set("t", f"other{number}", number)
            for name in ("n4", "n5", "n6"):
                await cluster.add_node(name)
            await cluster.wait_settled()
            for number in range(50):
                await cluster.db.set("t", f"w{number}", number)
            return await reader

        async def consume() -> list[Change]:
            return [await anext(watch) for _ in range(50)]

        changes = cluster.run(main())
        assert sorted((change.key, change.value) for change in changes) == sorted((f"w{n}", n) for n in range(50))
        after = {shard["shard"]: shard["primary"] for shard in cluster.db.shards_sync()}
        moved = [shard for shard in after if before[shard] != after[shard]]
        assert len(moved) >= 2
        for shard in moved:
            machine = service(cluster, after[shard])._shards[shard].machine
            assert machine.store.history_floor > 0, "it has been there from the beginning"


def test_a_leader_that_was_cut_off_delivers_nothing_that_is_not_committed() -> None:
    with small() as cluster:
        leader = primary(cluster)

        async def main() -> None:
            db = cluster.db
            async with db.watch("t", prefix="") as watch:
                waiting = asyncio.create_task(watch.poll(30.0))
                await cluster.sleep(0.5)  # its poll is parked at the leader
                await cluster.faults.partition([leader])
                lost = asyncio.create_task(db.set("t", "k", "of the old leader", via=leader))
                await cluster.sleep(0.2)
                await db.set("t", "k", "of the new leader", via=next(n for n in cluster.nodes if n != leader))
                found = await waiting
                assert [change.value for change in found] == ["of the new leader"]
                await cluster.faults.heal()
                try:
                    version = await lost
                except GoStoreError:
                    assert await watch.poll(5.0) == []
                else:  # it was sent again
                    assert [change.version for change in await watch.poll(5.0)] == [version]

        cluster.run(main())


def service(cluster: SimCluster, name: str) -> DbService:
    app = cluster._machines[name].app
    assert app is not None
    return app.db


@contextlib.contextmanager
def deposed() -> Iterator[tuple[SimCluster, str, str]]:
    """A cluster, its leader that is about to be cut off, and another node.

    Its group is quiet, so that it does not notice; only a read barrier can tell.
    """
    with small() as cluster:
        leader = primary(cluster)
        cluster.db.get_sync("t", "k", via=leader)  # it remembers the container
        cluster.sleep_sync(20.0)
        yield cluster, leader, next(name for name in cluster.nodes if name != leader)


def test_a_leader_that_does_not_know_that_it_is_none_keeps_nobody() -> None:
    with deposed() as (cluster, leader, other):

        async def main() -> None:
            async with cluster.db.watch("t", key="k") as watch:
                await cluster.faults.partition([leader])
                await cluster.db.set("t", "k", 1, via=other)
                assert service(cluster, leader)._shards[0].replication.role == "primary"
                assert [change.value for change in await watch.poll(20.0)] == [1]

        cluster.run(main())


def test_nobody_begins_where_a_leader_that_is_none_is() -> None:
    """Whoever begins now begins after what is committed now, whichever node it meets first."""
    with deposed() as (cluster, leader, other):

        async def main() -> None:
            await cluster.faults.partition([leader])
            await cluster.db.set("t", "k", 1, via=other)
            assert service(cluster, leader)._shards[0].replication.role == "primary"
            for _ in range(3):
                async with cluster.db.watch("t", key="k") as watch:
                    assert await watch.poll(10.0) == []

        cluster.run(main())


def test_a_replica_that_is_replaced_lets_go_of_whoever_waits_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deposed leader gets a snapshot. The history that it lacks now is at the new one: no reason for a gap."""
    monkeypatch.setattr(client_watch, "WAIT_S", 25.0)
    with small(snapshot_entries=16) as cluster:
        leader = primary(cluster)
        other = next(name for name in cluster.nodes if name != leader)

        async def main() -> None:
            db = cluster.db
            async with db.watch("t", key="k") as watch:
                waiting = asyncio.create_task(watch.poll(60.0))
                await cluster.sleep(0.5)
                await cluster.faults.partition([leader])
                for number in range(60):
                    await db.set("t", "k", number, via=other)
                await cluster.faults.heal()
                found = await waiting
                assert service(cluster, leader)._shards[0].machine.store.history_floor > 0, "it needed no snapshot"
                while len(found) < 60:
                    found += await watch.poll(60.0)
                assert [change.value for change in found] == list(range(60))

        cluster.run(main())


def test_nobody_who_waits_is_behind_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leader may die with the position that only it knew; whoever began with the snapshot knows nothing before."""
    monkeypatch.setattr(client_watch, "WAIT_S", 25.0)
    with small() as cluster:
        shard = service(cluster, primary(cluster))._shards[0]

        async def main() -> None:
            async with cluster.db.watch("t", key="k") as watch:
                waiting = asyncio.create_task(watch.poll(10.0))
                await cluster.sleep(0.5)
                began = watch.position[0]
                await cluster.db.set("t", "other", 1)
                await cluster.sleep(0.5)
                assert watch.position[0] == began
                shard.snapshot()
                await cluster.sleep(0.5)
                assert watch.position[0] == shard.machine.applied > began
                await cluster.db.set("t", "k", 1)
                assert [change.value for change in await waiting] == [1]

        cluster.run(main())


def test_without_a_leader_a_watch_waits_then_says_so_and_loses_nothing() -> None:
    with small() as cluster, cluster.db.watch("t", key="k", timeout_s=4.0) as watch:
        cluster.db.set_sync("t", "k", 1)
        assert take(watch, 1) == [("k", 1)]
        cluster.db.set_sync("t", "k", 2)
        down = [name for name in cluster.nodes if name != "n1"]
        for name in down:
            cluster.nodes[name].kill_sync()
        with pytest.raises(Unavailable, match="shard 0 cannot be watched"):
            take(watch, 2)
        for name in down:
            cluster.faults.restart_sync(name)
        cluster.wait_settled_sync()
        assert take(watch, 1) == [("k", 2)]


def test_whoever_does_not_keep_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvcc, "HISTORY_CHANGES_MAX", 8)
    with small() as cluster, cluster.db.watch("t", prefix="") as watch:
        for number in range(3):
            cluster.db.set_sync("t", "k", number)
        assert take(watch, 1) == [("k", 0)]
        for number in range(3, 40):
            cluster.db.set_sync("t", "k", number)
        received: list[Any] = []
        with pytest.raises(Compacted, match="read again, and begin a new watch"):
            received.extend(change.value for change in watch)
        assert received == list(range(1, 1 + len(received))), "what was received is delivered before the end"
        assert len(received) < 20
        with pytest.raises(Compacted):
            next(watch)
        with pytest.raises(Compacted, match="keeps what came after"):
            cluster.db.watch("t", prefix="", since=watch.position).open_sync()
        with cluster.db.watch("t", prefix="") as again:
            cluster.db.set_sync("t", "k", "new")
            assert take(again, 1) == [("k", "new")]


def test_changes_of_others_do_not_make_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more than the history holds passes by while one poll is parked."""
    monkeypatch.setattr(mvcc, "HISTORY_CHANGES_MAX", 8)
    with small() as cluster:

        async def main() -> None:
            async with cluster.db.watch("t", key="k") as watch:
                waiting = asyncio.create_task(watch.poll(1.9))
                await cluster.sleep(0.1)
                for number in range(50):
                    await cluster.db.set("t", f"o{number}", number)
                await cluster.db.set("t", "k", "here")
                assert [change.value for change in await waiting] == ["here"]

        cluster.run(main())


@pytest.mark.parametrize("key", ["k", "o3"])
def test_an_entry_larger_than_the_history_stops_no_node_that_is_watched(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(mvcc, "HISTORY_CHANGES_MAX", 4)
    with small() as cluster:

        async def main() -> None:
            async with cluster.db.watch("t", key=key) as watch:
                await watch.poll(0.1)
                waiting = asyncio.create_task(watch.poll(1.9))
                await cluster.sleep(0.1)
                async with cluster.db.transaction() as transaction:
                    for number in range(10):
                        transaction.set("t", f"o{number}", number)
                assert [change.value for change in await waiting] == ([3] if key == "o3" else [])
                await cluster.db.set("t", key, "then")
                assert [change.value for change in await watch.poll(5.0)] == ["then"]

        cluster.run(main())
        assert all(node.life.alive for node in cluster.nodes.values())


def test_whoever_cannot_be_told_of_an_entry_is_answered_and_the_entry_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    with small() as cluster:

        async def main() -> None:
            async with cluster.db.watch("t", key="k") as watch:
                await watch.poll(0.1)
                waiting = asyncio.create_task(watch.poll(30.0))
                await cluster.sleep(0.1)
                with monkeypatch.context() as patch:

                    def gone(*_: Any) -> Any:
                        raise Compacted("it is no longer kept", kept_after=1)

                    patch.setattr(mvcc.Store, "written", gone)
                    await cluster.db.set("t", "other", 1)
                    with pytest.raises(Compacted):
                        await waiting
                assert await cluster.db.get("t", "other") == 1

        cluster.run(main())
        assert all(node.life.alive for node in cluster.nodes.values())


@pytest.mark.parametrize(("count", "size_bytes"), [(3, 1 << 20), (1024, 200)])
def test_a_transaction_larger_than_an_answer_comes_in_pieces(
    monkeypatch: pytest.MonkeyPatch, count: int, size_bytes: int
) -> None:
    """Across a change of the leader in the middle of it, too."""
    monkeypatch.setattr(watches, "ANSWER_CHANGES_MAX", count)
    monkeypatch.setattr(watches, "ANSWER_SIZE_BYTES_MAX", size_bytes)
    with small() as cluster, cluster.db.watch("t", prefix="d/") as watch:
        cluster.db.set_sync("t", "d/first", 0)
        with cluster.db.transaction() as transaction:
            for number in range(10):
                transaction.set("t", f"d/{number}", "x" * 50)
                transaction.set("t", f"o/{number}", "x" * 50)
        cluster.db.delete_sync("t", "d/first")
        changes = [next(watch) for _ in range(4)]
        cluster.nodes[primary(cluster)].kill_sync()
        resumed = cluster.db.watch("t", prefix="d/", since=watch.position)
        changes += [next(watch) for _ in range(8)]
        assert [change.key for change in changes] == ["d/first", *(f"d/{number}" for number in range(10)), "d/first"]
        assert [change.deleted for change in changes] == [False] * 11 + [True]
        assert len({change.version for change in changes}) == 3
        assert watch.poll_sync(3.0) == []
        # A position in the middle of a transaction is that before it.
        with resumed:
            assert take(resumed, 2) == [("d/0", "x" * 50), ("d/1", "x" * 50)]


def test_a_dropped_container_ends_its_watches_and_no_others() -> None:
    with small(shards=2) as cluster:
        cluster.db.create_container_sync("u")
        with cluster.db.watch("t", prefix="") as watch, cluster.db.watch("u", prefix="") as other:
            cluster.db.set_sync("u", "k", 1)
            cluster.db.drop_container_sync("t")
            cluster.db.create_container_sync("t", separator="/")
            cluster.db.set_sync("t", "k", "of another container of that name")
            for _ in range(2):
                with pytest.raises(NotFound, match="'t' was dropped"):
                    next(watch)
            cluster.db.set_sync("u", "k", 2)
            assert take(other, 2) == [("k", 1), ("k", 2)]
        with cluster.db.watch("t", key="k") as watch:
            cluster.db.set_sync("t", "k", 3)
            assert take(watch, 1) == [("k", 3)]


def polls(cluster: SimCluster) -> int:
    """At all nodes: those that run, and those that are parked."""
    nodes = [machine.app for machine in cluster._machines.values() if machine.app is not None]
    parked = sum(len(shard.watches.parked) for node in nodes for shard in node.db._shards)
    return parked + sum(node.db._polls._running for node in nodes)


def test_a_watch_leaves_nothing_behind() -> None:
    with small(shards=4) as cluster:
        with cluster.db.watch("t", prefix="") as watch:
            assert polls(cluster) == 0, "nothing is asked before somebody waits"
            assert watch.poll_sync(0.5) == []
            assert polls(cluster) > 0
        cluster.sleep_sync(5.0)
        assert polls(cluster) == 0


def test_watchers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "POLLS_MAX", 1)
    with small() as cluster:

        async def main() -> None:
            async with cluster.db.watch("t", key="k") as one, cluster.db.watch("t", key="k", timeout_s=0.3) as other:
                first = asyncio.create_task(one.poll(10.0))
                await cluster.sleep(0.1)
                with pytest.raises(Unavailable, match="1 watchers already"):
                    await other.poll(1.5)
                await cluster.db.set("t", "k", 1)
                assert [change.value for change in await first] == [1]
                assert [change.value for change in await other.poll(5.0)] == [1]

        cluster.run(main())


@pytest.mark.parametrize(
    ("since", "wait_s"),
    [([], 1.0), ([[0]], 1.0), ([[9, 0, 0]], 1.0), ([[0, -1, 0]], 1.0), ([["0", 0, 0]], 1.0), ([[0, 0, 0]], 31.0),
     ([[0, 0, 0]], float("nan"))],
)  # fmt: skip
def test_a_node_refuses_a_malformed_poll(since: list[Any], wait_s: float) -> None:
    with small() as cluster, pytest.raises(BadRequest):
        cluster.call_sync("n1", "db", "changes", "t", "", None, since, wait_s)

"""Shards that have forgotten which containers were dropped; see ``gostore.services.db.drops``."""

from __future__ import annotations

from typing import Any

import pytest

import gostore as gs
from gostore.client.watch import Watch
from gostore.comm import wire
from gostore.config import KIB
from gostore.core.errors import BadRequest, NotFound, TooLarge, Unavailable
from gostore.core.keyvalue import PointRead, RequestId, Write
from gostore.core.values import pack
from gostore.services.db import machine as machine_module
from gostore.services.db.database import Container, Database
from gostore.services.db.machine import ADMITTED, DROPS, Outcome, Restorer, ShardMachine

from .bed import POLICIES, Cluster, begin, play, put

KEPT = 3
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "DROPPED_MAX", KEPT)


async def drop_many(db: Any, number: int = KEPT, prefix: str = "x") -> None:
    """So many that no shard remembers what was dropped before."""
    for one in range(number):
        await db.create_container(f"{prefix}{one}")
        await db.drop_container(f"{prefix}{one}")


def item(key: str, value: Any, container: str = "t") -> Write:
    return Write("set", container, key, value)


# the state machine


class Shard:
    def __init__(self) -> None:
        self.machine = ShardMachine(0, SIZE)

    def apply(self, *command: Any) -> Outcome:
        return self.machine.apply(list(command), self.machine.applied + 1)

    def set(self, container: str, key: str = "k", reads: Any = ()) -> Outcome:
        return self.apply("commit", None, list(reads), [["set", container, key, [], pack(1, SIZE)]])

    def drop(self, container: str) -> None:
        nothing = pack(None, SIZE)
        writes = [["set", ADMITTED, DROPS, [], nothing], ["delete", ADMITTED, container, [], nothing]]
        assert self.apply("commit", None, [], writes)[0] == "ok"
        assert self.apply("drop", container)[0] == "ok"

    def drops(self) -> list[Any]:
        return PointRead(ADMITTED, DROPS, self.machine.store.version(ADMITTED, DROPS)).to_wire()


def test_a_shard_that_has_forgotten_takes_for_alive_only_what_is_admitted() -> None:
    shard = Shard()
    assert shard.set("old@1")[0] == shard.set("live@1")[0] == "ok"
    for one in ("old@1", "x@1"):
        shard.drop(one)
    assert shard.set("old@1") == ["dropped", "old@1"]
    assert shard.set("live@1")[0] == "ok", "it remembers all"
    for one in range(KEPT):
        shard.drop(f"x{one}@1")
    assert shard.set("old@1") == ["dropped", "old@1"], "it is forgotten"
    assert shard.set("live@1") == ["dropped", "live@1"], "it may be one of those"
    assert shard.apply("commit", None, [PointRead("live@1", "k", 0).to_wire()], []) == ["dropped", "live@1"]
    assert shard.set(ADMITTED, "live@1", [shard.drops()])[0] == "ok"
    assert shard.set("live@1")[0] == "ok"
    # A snapshot says the same.
    restorer = Restorer(0, SIZE)
    for piece in shard.machine.snapshot():
        restorer.add(piece)
    other = Shard()
    other.machine = restorer.finish()
    for one in (shard, other):
        assert one.set("live@1")[0] == "ok"
        assert one.set("old@1") == ["dropped", "old@1"]
        one.drop("live@1")
        for number in range(KEPT):
            one.drop(f"y{number}@1")
        assert one.set("live@1") == ["dropped", "live@1"], "it was admitted once"
    assert shard.machine.digest() == other.machine.digest()
    assert shard.machine.store.rows(ADMITTED)[0].key == DROPS
    assert len(shard.machine.store.rows(ADMITTED)) == 1


def test_an_admission_of_before_a_drop_is_refused() -> None:
    shard = Shard()
    before = shard.drops()
    shard.drop("t@1")
    for one in range(KEPT):
        shard.drop(f"x{one}@1")
    assert shard.set(ADMITTED, "t@1", [before])[0] == "conflict"
    assert shard.set("t@1") == ["dropped", "t@1"]


def test_what_earlier_releases_logged_means_what_it_meant() -> None:
    """Replicas of which one replays a log, and another begins with its old snapshot, must agree."""
    shard = Shard()
    for one in range(KEPT + 1):
        shard.apply("drop", f"x{one}@1")
    assert shard.set("live@1")[0] == shard.set("x0@1")[0] == "ok"
    assert shard.set("x1@1") == ["dropped", "x1@1"]


# nodes


@pytest.mark.parametrize("replication", POLICIES)
def test_a_node_that_heard_of_nothing_finds_the_container_that_is_there_now(replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        other = cluster.services["n1"].database
        keys = [f"k{n}" for n in range(4)]
        for turn in range(2):  # the second container of this name is an admitted one
            await cluster.db("n1").commit([], [put(keys[0], "old")])
            old = other.known("t")
            assert old is not None
            await db.drop_container("t")
            await db.create_container("t")
            await db.commit([], [put(key, "new") for key in keys])
            await drop_many(db, 2 * KEPT)

            def forget(old: Container = old) -> None:
                other._known["t"] = old

            assert other.known("t") == old, "it has heard of nothing"
            assert (await cluster.db("n1").get("t", keys[0])).value == "new"
            forget()
            assert [entry.value for entry in (await cluster.db("n1").scan("t")).entries] == ["new"] * 4
            forget()
            assert (await cluster.on("n1", other.get("t", keys[0], consistency="stale"))).value == "new"
            for key in keys:
                forget()
                await cluster.db("n1").commit([], [put(key, "one")])
                assert (await db.get("t", key)).value == "one"
            forget()
            wanted = [([], [put(key, "all")], RequestId("me", 10 * turn + n)) for n, key in enumerate(keys)]
            told = await cluster.on("n1", other.commit_all(wanted))
            assert [one.version for one in told] == [(await db.get("t", key)).version for key in keys]
        await cluster.converged()

    play(scenario, replication=replication, shards=2)


def test_a_stale_read_that_is_refused_asks_who_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica at the node may be the last to hear that the container was admitted."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await db.commit([], [put("k", 1)])
        other = cluster.services["n1"].database

        async def refused(*_: Any) -> Any:
            raise NotFound("the container 't' was dropped", dropped="t@1")

        with monkeypatch.context() as patch:
            patch.setattr(other._router, "read_stale", refused)
            assert (await cluster.on("n1", other.get("t", "k", consistency="stale"))).value == 1

    play(scenario, shards=1)


def test_a_container_that_is_alive_stays_so_at_every_node() -> None:
    """Also where nothing of it is, so that the shard never heard of it."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        first, second = (cluster.key_of(shard) for shard in (0, 1))
        await db.commit([], [put(first, 1)])
        await drop_many(db)
        for turn, name in enumerate(cluster.names):
            one = cluster.db(name)
            assert (await one.get("t", second)).value == (f"n{turn - 1}" if turn else None)
            page = await one.scan("t")
            await one.commit(page.ranges, [put(first, name), put(second, name)])
            await one.create_container(f"new-{name}")
            await one.commit([], [item("k", name, f"new-{name}")])
            await drop_many(db, 1)
        await cluster.converged()
        machine = cluster.machine("n0", 0)
        assert len(machine.store.rows(ADMITTED)) == 1 + 4, "one for each, and of what was dropped none"

    play(scenario, shards=2)


def test_a_container_that_is_dropped_while_it_is_admitted_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.db("n1").commit([], [put("k", "old")])
        await drop_many(db)
        slow = cluster.services["n1"].database
        look_up, lookups = slow._lookup, 0

        async def replaced() -> None:
            other = cluster.services["n0"].database
            await other.drop_container("t")
            await other.create_container("t")
            await drop_many(other, KEPT, "y")

        async def slow_lookup(name: str) -> Container | None:
            nonlocal lookups
            found = await look_up(name)
            lookups += 1
            if lookups == 2:  # the first one is made because what is remembered may be old
                await cluster.on("n0", replaced())
            return found

        monkeypatch.setattr(slow, "_lookup", slow_lookup)
        await cluster.db("n1").commit([], [put("k", "new")], timeout_s=30.0)
        assert lookups > 2
        for name in cluster.names:
            assert (await cluster.db(name).get("t", "k")).value == "new"
        physical = cluster.services["n0"].database.known("t")
        await cluster.converged()
        assert physical is not None
        assert {row.key for row in cluster.machine("n0", 0).store.rows(ADMITTED)} == {physical.physical, DROPS}

    play(scenario, shards=1)


def test_a_failure_to_admit_is_definite_of_a_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that was refused may still arrive a second time, when somebody else has admitted the container."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.db("n1").get("t", "k")
        await drop_many(db)

        async def fails(self: Database, name: str) -> Container:
            raise Unavailable("no majority")

        with monkeypatch.context() as patch:
            patch.setattr(Database, "_admitted", fails)
            for attempt, definite in ((db.get("t", "k"), True), (db.commit([], [put("k", 1)]), False)):
                with pytest.raises(Unavailable, match="no majority") as caught:
                    await attempt
                assert caught.value.definite is definite
        await db.commit([], [put("k", 1)])

    play(scenario, shards=1)


# watches


def test_a_watch_goes_on_when_its_shards_forget() -> None:
    with gs.simulate(3, seed=2, db={"shards": 2}) as cluster:
        db = cluster.db

        async def values(watch: Watch, number: int) -> list[Any]:
            found: list[Any] = []
            while len(found) < number:
                found += [(change.key, change.value) for change in await watch.poll(30.0)]
            return found

        async def go() -> None:
            for name in ("t", "u"):
                await db.create_container(name)
            async with db.watch("t", prefix="") as watch, db.watch("u", key="k") as alone:
                assert await watch.poll(0.5) == []
                await drop_many(db, KEPT + 1)
                assert await watch.poll(5.0) == []
                for number in range(4):
                    await db.set("t", f"k{number}", number)
                assert sorted(await values(watch, 4)) == [(f"k{number}", number) for number in range(4)]
                # And it ends with its container, also when that is long ago.
                await db.drop_container("u")
                await drop_many(db, KEPT + 1)
                await db.create_container("u")
                await db.set("u", "k", "another")
                with pytest.raises(NotFound, match="'u' was dropped"):
                    await alone.poll(30.0)
                await db.drop_container("t")
                with pytest.raises(NotFound, match="'t' was dropped"):
                    await watch.poll(30.0)

        cluster.run(go())


# the containers of the system


def test_clients_read_the_containers_of_the_system_and_do_not_write_there() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        evil = Write("set", ".containers", "evil", 1)
        block = [["set", ".containers", ["value", "evil"], [], ["value", 1]]]
        packed = wire.pack([[], [evil.to_wire()], ["me", 1]])
        with pytest.raises(BadRequest, match=r"'\.containers'.*system"):
            await db.commit([], [put("k", 1), evil])
        with pytest.raises(BadRequest, match=r"'\.admitted'"):
            await db.commit([], [Write("delete", ADMITTED, DROPS)])
        with pytest.raises(BadRequest, match="system"):
            await db.ask("run", block)
        ((answer, error),) = await db.ask("commits", [packed])
        assert answer is None
        assert error[0] == "bad_request"
        for name in (".containers", ".x"):
            with pytest.raises(BadRequest):
                await db.create_container(name)
        assert list(await db.containers()) == ["t"]
        assert [entry.key for entry in (await db.scan(".containers")).entries] == ["t"]
        read = await db.get(".containers", "t")
        await db.commit([PointRead(".containers", "t", read.version)], [put("k", 1)])
        with pytest.raises(NotFound):
            await db.get(ADMITTED, DROPS)

    play(scenario)


def test_an_answer_that_is_too_large_tells_of_a_read_that_nothing_happened() -> None:
    settings = {"comm": {"message_size_bytes_max": 256 * KIB}, "db": {"shards": 1, "value_size_bytes_max": 64 * KIB}}
    with gs.simulate(3, seed=1, **settings) as cluster:
        db = cluster.db
        db.create_container_sync("t")
        for number in range(8):
            db.set_sync("t", f"k{number}", bytes(60 * KIB))
        for node in cluster.nodes:  # from the shard's leader to this node, or from this node to the client
            with pytest.raises(TooLarge, match="message_size_bytes_max") as caught:
                db.scan_sync("t", via=node)
            assert caught.value.definite
            assert len(db.scan_sync("t", limit=3, via=node)) == 3


def test_also_when_it_is_too_large_on_its_way_to_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)

        async def too_large(*_: Any) -> Any:
            raise TooLarge("db.shard: an answer of many bytes", definite=False)

        with monkeypatch.context() as patch:
            patch.setattr(cluster.services["n0"].database._router, "read", too_large)
            for attempt in (db.get("t", "k"), db.scan("t")):
                with pytest.raises(TooLarge) as caught:
                    await attempt
                assert caught.value.definite

    play(scenario, shards=1)

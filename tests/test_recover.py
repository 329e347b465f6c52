"""A majority is lost for good; what is left goes on, and the lost ones are kept out."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import gostore as gs
from gostore import fence, recover
from gostore.client.connection import Connection
from gostore.config import NodeConfig, StorageConfig
from gostore.consensus.configuration import NOBODY
from gostore.consensus.journal import Journal
from gostore.consensus.messages import Point
from gostore.consensus.ready import HardState
from gostore.core.errors import BadRequest, ConfigError, Corrupt, GoStoreError, NotSupported
from gostore.env import Env
from gostore.services.cls.service import MASTERS_GROUP
from gostore.services.db.raft import GROUPS_FROM
from gostore.sim.cluster import SimCluster
from gostore.sim.disk import SimDisk
from gostore.storage import Wal

SHARDS = 4
LABELS = itertools.count()


def secret_of(cluster: SimCluster) -> str:
    return str(cluster._secret)


def give_secret(cluster: SimCluster, names: tuple[str, ...], secret: str) -> None:
    """As an operator writes it into the configuration of these nodes."""

    def changed(configure: Callable[[Any], NodeConfig]) -> Callable[[Any], NodeConfig]:
        return lambda machine: dataclasses.replace(configure(machine), secret=secret)

    cluster._secret = secret
    for name in names:
        machine = cluster._machines[name]
        machine._configure = changed(machine._configure)


async def connect(cluster: SimCluster, secret: str, names: tuple[str, ...]) -> None:
    """The testbed's client is one of the new cluster."""
    old = cluster._connection
    assert old is not None
    members = {name: old.members[name] for name in names}
    await old.endpoint.stop()
    cluster._connection = Connection(
        old.env, cluster=cluster.name, secret=secret, members=members, host=cluster.sim.client().address
    )
    cluster._connection.requests = old.requests  # it has the same name, and a request is applied once
    await cluster._connection.open()


async def offline(
    cluster: SimCluster, names: tuple[str, ...], job: Callable[[dict[str, Env], dict[str, Wal]], Awaitable[Any]]
) -> Any:
    """On the disks of nodes that do not run."""
    envs = {}
    for name in names:
        node, rng = cluster.sim.node(name), cluster.sim.scheduler.rng(f"recover:{name}:{next(LABELS)}")
        envs[name] = Env(
            name,
            node.clock,
            rng,
            node.disk,
            logging.getLogger(),
        )
    try:
        async with recover.opened(envs.values(), StorageConfig()) as wals:
            return await job(envs, wals)
    finally:
        for env in envs.values():
            await env.tasks.stop()


async def recovered(cluster: SimCluster, survivors: tuple[str, ...], lost: tuple[str, ...], **accept: bool) -> Any:
    """(plan, new secret) of a recovery; all nodes are down."""

    async def job(envs: dict[str, Env], wals: dict[str, Wal]) -> Any:
        plan = await recover.examine(envs, wals, lost, cluster=cluster.name, secret=secret_of(cluster))
        identity = await recover.perform(plan, envs, wals, **accept)
        return plan, fence.new_secret(identity, f"{random.Random(next(LABELS)).getrandbits(128):032x}")

    return await offline(cluster, survivors, job)


async def start(cluster: SimCluster, survivors: tuple[str, ...], secret: str) -> None:
    give_secret(cluster, survivors, secret)
    await connect(cluster, secret, survivors)
    for name in survivors:
        await cluster.nodes[name].restart()
    # The master holds the same view as all others, and nothing waits to be moved.
    await cluster.wait_settled(timeout_s=120.0)


async def fill(cluster: SimCluster, count: int = 100) -> dict[str, int]:
    await cluster.db.create_container("a")
    for number in range(count):
        await cluster.db.set("a", f"k{number}", number)
    return {f"k{number}": number for number in range(count)}


@pytest.mark.parametrize(
    ("seed", "lost", "masters"), [(1, ("n3", "n4", "n5"), 5), (2, ("n1", "n2", "n4"), 5), (3, "masters", 3)]
)
def test_what_is_left_goes_on(seed: int, lost: tuple[str, ...] | str, masters: int) -> None:
    """Three of five are lost at once under load, perhaps all masters; replicas: 4, so that no shard is lost."""
    with gs.simulate(
        5, seed=seed, db={"shards": SHARDS}, ring={"replicas": 4}, cls={"masters_max": masters}
    ) as cluster:

        async def scenario() -> None:
            before = await fill(cluster)
            gone = cluster._machines["n1"].app.cls.view.masters if isinstance(lost, str) else lost
            survivors = tuple(name for name in ("n1", "n2", "n3", "n4", "n5") if name not in gone)
            acknowledged: dict[str, int] = {}

            async def write() -> None:
                for number in range(10_000):
                    await cluster.db.set("a", f"later{number}", number)
                    acknowledged[f"later{number}"] = number

            load = asyncio.create_task(write())
            await cluster.sleep(0.5)
            load.cancel()
            await asyncio.wait([load])
            for name in (*gone, *survivors):
                await cluster.faults.power_cut(name)
            plan, secret = await recovered(cluster, survivors, gone)
            # What a majority of four had, one of two survivors may lack; what both shards and masters say, is said.
            assert {repair.name for repair in plan.repairs} >= {"masters"}
            assert all(
                set(repair.lost) <= set(gone) and repair.survivor in (None, *survivors) for repair in plan.repairs
            )
            await start(cluster, survivors, secret)
            found = dict(await cluster.db.scan("a"))
            assert {key: found.get(key) for key in before} == before
            assert set(found) <= {*before, *acknowledged, f"later{len(acknowledged)}"}
            # It is a cluster like any other: it takes writes and new nodes, and replication is restored.
            await cluster.db.set("a", "new", 1)
            await cluster.add_node()
            await cluster.wait_settled(timeout_s=120.0)
            for shard in await cluster.db.shards():
                assert sorted(shard["replicas"]) == sorted((*survivors, "n6"))
                assert shard["settled"]
            events = cluster.events.select("lost_majority")
            assert {event.node for event in events} == set(survivors)
            assert all(event.data["lost"] == list(gone) for event in events)

        cluster.run(scenario())


THREE = ("n1", "n2", "n3")


def test_the_lost_ones_are_kept_out() -> None:
    """They were a majority of everything, and are one again: of a cluster of their own, which nobody else hears."""
    lost, survivors = ("n1", "n2", "n3"), ("n4", "n5")
    with gs.simulate(5, seed=11, db={"shards": SHARDS}, ring={"replicas": 4}) as cluster:

        async def scenario() -> None:
            await fill(cluster)
            for name in (*lost, *survivors):
                await cluster.nodes[name].kill()
            _, secret = await recovered(cluster, survivors, lost)
            await start(cluster, survivors, secret)
            await cluster.db.set("a", "k0", "of those who are left")
            for name in lost:  # with their old disks and the old secret
                await cluster.nodes[name].restart()
            await cluster.sleep(20.0)
            apps = {name: cluster._machines[name].app for name in (*lost, *survivors)}
            assert all(app is not None and app.cls.view.master in lost for name, app in apps.items() if name in lost)
            for name in survivors:
                app = apps[name]
                assert app is not None
                assert app.cls.view.master in survivors
                assert app.cls.view.online == survivors
                assert app.endpoint.statistics().get("dropped_tag", 0) > 0
            for _ in range(10):
                assert await cluster.db.get("a", "k0") == "of those who are left"
            # And with the new secret none of them starts.
            give_secret(cluster, lost, secret)
            for name in lost:
                await cluster.nodes[name].kill()
                with pytest.raises(ConfigError, match="are of before the recovery .* under another name"):
                    await cluster.nodes[name].restart()
            # Nor does one of the others with the old one.
            give_secret(cluster, ("n5",), "an old secret of long ago")
            await cluster.nodes["n5"].kill()
            with pytest.raises(ConfigError, match="went through the recovery .* set the secret that"):
                await cluster.nodes["n5"].restart()

        cluster.run(scenario())


def test_a_majority_that_lives_is_not_touched() -> None:
    with gs.simulate(5, seed=12, db={"shards": SHARDS}) as cluster:

        async def scenario() -> None:
            await fill(cluster, 20)
            held = (await cluster.db.shards())[0]["replicas"]
            for name in cluster.nodes:
                await cluster.nodes[name].kill()
            with pytest.raises(BadRequest, match="every group has a majority among n1, n2, n3, n4: there is nothing"):
                await recovered(cluster, ("n1", "n2", "n3", "n4"), ("n5",))
            with pytest.raises(
                BadRequest, match=r"n[1-5] votes in it: give its data directory, or say that it is lost"
            ):
                await recovered(cluster, THREE, ("n5",))
            with pytest.raises(BadRequest, match="n3 is said to be lost, and its data directory is given"):
                await recovered(cluster, THREE, ("n3", "n4", "n5"))
            with pytest.raises(BadRequest, match="there was no node 'n9'; there were n1, n2, n3, n4, n5"):
                await recovered(cluster, THREE, ("n4", "n5", "n9"))
            # Some shards have lost their majority and the masters have not: only those shards are touched.
            gone = tuple(held[:2])
            left = tuple(name for name in ("n1", "n2", "n3", "n4", "n5") if name not in gone)
            plan, secret = await recovered(cluster, left, gone)
            names = [repair.name for repair in plan.repairs]
            assert "shard 0" in names
            assert "masters" in plan.healthy
            assert not set(names) & set(plan.healthy)
            assert {*names, *plan.healthy} == {"masters", *(f"shard {shard}" for shard in range(SHARDS))}
            await start(cluster, left, secret)
            found = dict(await cluster.db.scan("a"))
            assert found == {f"k{number}": number for number in range(20)}  # a quiet cluster loses nothing

        cluster.run(scenario())


def test_a_shard_of_which_nothing_is_left_begins_again_only_on_demand() -> None:
    lost, survivors = ("n2", "n3", "n4", "n5"), ("n1",)
    with gs.simulate(5, seed=13, db={"shards": 8}, ring={"replicas": 1}) as cluster:

        async def scenario() -> None:
            before = await fill(cluster)
            for name in cluster.nodes:
                await cluster.nodes[name].kill()
            with pytest.raises(BadRequest, match="nothing is left of shard .*: accept that they begin again empty"):
                await recovered(cluster, survivors, lost)
            plan, secret = await recovered(cluster, survivors, lost, accept_empty_shards=True)
            assert plan.empty
            assert "NOTHING OF IT IS LEFT" in str(plan.empty[0])
            await start(cluster, survivors, secret)
            await cluster.db.create_container("a")  # its name may have been in a shard that is gone
            found = dict(await cluster.db.scan("a"))
            assert found.items() <= before.items()
            for number in range(100):
                await cluster.db.set("a", f"k{number}", number)
            assert dict(await cluster.db.scan("a")) == before

        cluster.run(scenario())


def test_an_interrupted_recovery_is_done_again() -> None:
    """The power goes at any sync of any of the disks."""
    lost, survivors = ("n1", "n2", "n3"), ("n4", "n5")
    with gs.simulate(5, seed=14, db={"shards": 2}, ring={"replicas": 4}) as cluster:

        async def scenario() -> None:
            before = await fill(cluster, 30)
            for name in cluster.nodes:
                await cluster.nodes[name].kill()
            disks = [cluster.sim.node(name).disk for name in survivors]
            crashes = 0
            while True:
                syncs = 0

                def count(real: Any, at: int = crashes) -> Any:
                    async def wait(*args: Any, **named: Any) -> Any:
                        nonlocal syncs
                        syncs += 1
                        if syncs > at:
                            raise OSError(5, "the power is gone")
                        return await real(*args, **named)

                    return wait

                real = [disk.wait_for_medium for disk in disks]
                for disk in disks:
                    disk.wait_for_medium = count(disk.wait_for_medium)  # type: ignore[method-assign]
                try:
                    _, secret = await recovered(cluster, survivors, lost)
                    break
                except (GoStoreError, OSError):
                    crashes += 1
                finally:
                    for disk, waits in zip(disks, real, strict=True):
                        disk.wait_for_medium = waits  # type: ignore[method-assign]
                    for disk in disks:
                        disk.process_died()
                        disk.power_cut()
            assert crashes > 10
            # Once more, as if the new secret had been lost: it names the same recovery.
            _, again = await recovered(cluster, survivors, lost)
            assert fence.id_of(again) == fence.id_of(secret)
            assert again != secret
            await start(cluster, survivors, again)
            assert dict(await cluster.db.scan("a")) == before

        cluster.run(scenario())


@pytest.mark.parametrize("policy", ["primary_backup", "quorum"])
@pytest.mark.parametrize("holds", [True, False])
def test_another_policy_has_no_majorities(policy: str, holds: bool) -> None:
    """``holds``: whether those who are left hold anything of the shard."""
    with gs.simulate(5, seed=15, db={"shards": 1, "replication": policy}, ring={"replicas": 2}) as cluster:

        async def scenario() -> None:
            await fill(cluster, 5)
            held = (await cluster.db.shards())[0]["replicas"]
            others = [name for name in cluster.nodes if name not in held]
            survivors = (held[0], others[0]) if holds else tuple(others[:2])
            for name in cluster.nodes:
                await cluster.nodes[name].kill()
            before = await offline(cluster, survivors, written)
            lost = tuple(name for name in cluster.nodes if name not in survivors)
            with pytest.raises(
                NotSupported, match="which has no majorities to lose: bring the lost nodes back"
            ) as told:
                await recovered(cluster, survivors, lost, accept_empty_shards=True)
            assert told.value.definite
            assert f"db.replication = {policy!r}" in told.value.message or not holds
            assert await offline(cluster, survivors, written) == before
            for name in cluster.nodes:  # nothing was done to them: with the others back it goes on
                await cluster.nodes[name].restart()
            await cluster.wait_settled(timeout_s=60.0)
            assert len(await cluster.db.scan("a")) == 5

        cluster.run(scenario())


async def written(envs: dict[str, Env], wals: dict[str, Wal]) -> Any:
    """Of each node the last position of each log, and the mark of a recovery."""
    return {
        name: ([(number, wal.last_index(number)) for number in wal.groups()], fence.read(envs[name].disk))
        for name, wal in wals.items()
    }


async def never_began(cluster: SimCluster, name: str, group: int) -> None:
    """Make a node, which does not run, one that knew of the founding of the group, and stopped before it began."""
    disk = cluster.sim.node(name).disk

    async def read(envs: dict[str, Env], wals: dict[str, Wal]) -> Any:
        wal = wals[name]
        return {number: list(wal.records(number)) for number in wal.groups() if number != group}

    records = await offline(cluster, (name,), read)
    for file in disk.listdir("wal"):
        disk.remove(f"wal/{file}")

    async def write(envs: dict[str, Env], wals: dict[str, Wal]) -> Any:
        for number, entries in records.items():
            for entry in entries:
                wals[name].append(number, entry.term, entry.index, entry.payload, entry.kind)
        await wals[name].sync()

    await offline(cluster, (name,), write)


async def examined(cluster: SimCluster, survivors: tuple[str, ...], lost: tuple[str, ...]) -> recover.Plan:
    async def job(envs: dict[str, Env], wals: dict[str, Wal]) -> Any:
        return await recover.examine(envs, wals, lost, cluster=cluster.name, secret=secret_of(cluster))

    plan = await offline(cluster, survivors, job)
    assert isinstance(plan, recover.Plan)
    return plan


def test_a_founder_that_has_not_begun_is_one_of_the_majority() -> None:
    """It has promised nothing, and votes as soon as it runs: its group has lost nothing."""
    with gs.simulate(3, seed=16, db={"shards": 2}) as cluster:

        async def scenario() -> None:
            await fill(cluster, 20)
            for name in THREE:
                await cluster.nodes[name].kill()
            await never_began(cluster, "n2", GROUPS_FROM)
            with pytest.raises(BadRequest, match="every group has a majority among n1, n2: there is nothing"):
                await examined(cluster, ("n1", "n2"), ("n3",))
            # Alone it is none.
            plan = await examined(cluster, ("n2",), ("n1", "n3"))
            assert plan.empty[0].name == "shard 0"
            # A majority of the founders knows of nothing: nothing was ever decided.
            await never_began(cluster, "n1", GROUPS_FROM)
            with pytest.raises(BadRequest, match="every group has a majority among n1, n2: there is nothing"):
                await examined(cluster, ("n1", "n2"), ("n3",))
            # Whoever was no founder must have had something before it could vote.
            await never_began(cluster, "n2", MASTERS_GROUP)
            plan = await examined(cluster, ("n1", "n2"), ("n3",))
            assert [repair.name for repair in plan.repairs] == ["masters"]

            # One that has begun may be a voter before the first entry reaches it.
            async def begin(envs: dict[str, Env], wals: dict[str, Wal]) -> None:
                Journal(wals["n2"], MASTERS_GROUP).found(NOBODY)
                await wals["n2"].sync()

            await offline(cluster, ("n2",), begin)
            with pytest.raises(BadRequest, match="every group has a majority among n1, n2: there is nothing"):
                await examined(cluster, ("n1", "n2"), ("n3",))

        cluster.run(scenario())


def test_a_group_with_a_founder_that_has_not_begun_goes_on_without_a_recovery() -> None:
    with gs.simulate(3, seed=16, db={"shards": 2}) as cluster:

        async def scenario() -> None:
            before = await fill(cluster, 20)
            for name in THREE:
                await cluster.nodes[name].kill()
            await never_began(cluster, "n2", GROUPS_FROM)
            for name in ("n1", "n2"):
                await cluster.nodes[name].restart()
            await cluster.sleep(20.0)
            assert dict(await cluster.db.scan("a")) == before
            await cluster.db.set("a", "new", 1)

        cluster.run(scenario())


def test_a_voter_that_forgot_its_log_is_none_of_the_majority() -> None:
    """It was removed, which the only other one left does not know: it grants no votes (see ``Group.clear``)."""
    with gs.simulate(3, seed=17, db={"shards": 2}) as cluster:

        async def scenario() -> None:
            await fill(cluster, 20)
            for name in THREE:
                await cluster.nodes[name].kill()

            async def clear(envs: dict[str, Env], wals: dict[str, Wal]) -> None:
                journal = Journal(wals["n2"], GROUPS_FROM)
                tomb = Point(journal.last, journal.restored().runs[-1][1])
                journal.clear(HardState(journal.hard.term + 1, None, 0), tomb)
                await wals["n2"].sync()

            await offline(cluster, ("n2",), clear)
            plan = await examined(cluster, ("n1", "n2"), ("n3",))
            assert [(repair.name, repair.survivor) for repair in plan.repairs] == [("shard 0", "n1")]

        cluster.run(scenario())


def test_a_shard_that_an_unnamed_node_may_have_is_not_given_up() -> None:
    with gs.simulate(5, seed=13, db={"shards": 8}, ring={"replicas": 1}, cls={"masters_max": 1}) as cluster:

        async def scenario() -> None:
            await fill(cluster, 20)
            for name in cluster.nodes:
                await cluster.nodes[name].kill()
            app = cluster._machines["n1"].app
            assert app is not None
            (master,) = app.cls.view.masters
            survivors = tuple(name for name in cluster.nodes if name != master)[:1]
            unnamed = next(name for name in cluster.nodes if name != master and name not in survivors)
            lost = tuple(name for name in cluster.nodes if name not in (unnamed, *survivors))
            with pytest.raises(BadRequest, match=f"{unnamed} may have it, .*: give its data directory"):
                await recovered(cluster, survivors, lost, accept_empty_shards=True)
            assert (await recovered(cluster, survivors, (*lost, unnamed), accept_empty_shards=True))[0].empty

        cluster.run(scenario())


def test_a_mark_that_cannot_be_read_is_refused() -> None:
    disk = SimDisk(random.Random(1))
    assert fence.read(disk) is None
    file = disk.open(fence.FILE, create=True)
    file.append(b"{")
    with pytest.raises(Corrupt, match="recovered cannot be read"):
        fence.read(disk)
    file.truncate(0)
    file.append(b'{"version": 2, "id": 7}')
    with pytest.raises(NotSupported, match="format version 2; this release reads version 1: run the release that"):
        fence.read(disk)
    assert fence.id_of("recovered-short") is None
    identity = fence.new_id(random.Random(1))
    assert fence.id_of(fence.new_secret(identity, "0" * 32)) == identity

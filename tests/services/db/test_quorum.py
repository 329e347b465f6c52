"""The lesson ``quorum``: what it promises, and that it does not promise more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gostore as gs
from gostore.config import NodeConfig
from gostore.core.errors import ConfigError, GoStoreError, TooLarge, Unavailable
from gostore.experiments.judge import converge
from gostore.services.db import quorum
from gostore.services.db.quorum import Quorum, tagged
from gostore.services.db.replication import Group
from gostore.services.db.stamped import Stamped
from gostore.sim import SimCluster

NAMES = ("n1", "n2", "n3")


def play(scenario: Any, *, nodes: int = 3, seed: int = 1, r: int = 2, w: int = 2) -> None:
    db = {"replication": "quorum", "read_quorum": r, "write_quorum": w, "shards": 2}
    cluster = gs.simulate(nodes, seed=seed, db=db)
    cluster.start_sync()
    try:
        cluster.run(scenario(cluster))
    finally:
        cluster.sim.close()


async def begin(cluster: SimCluster) -> None:
    """Every node knows the container, and serves."""
    await cluster.wait_settled()
    await cluster.db.create_container("t")
    for name in cluster.nodes:
        await retried(lambda name=name: cluster.db.get("t", "k", via=name))


async def retried(ask: Any) -> Any:
    """With R = 1 a node may not have heard of the container yet; within some virtual seconds it has."""
    async with asyncio.timeout(20.0):
        while True:
            try:
                return await ask()
            except GoStoreError:
                await asyncio.sleep(0.1)


def disks_with(cluster: SimCluster, mark: bytes) -> list[str]:
    found = []
    for name in cluster.nodes:
        disk = cluster.sim.nodes[name].disk
        if any(mark in disk.read_bytes(file) for file in disk.files()):
            found.append(name)
    return found


# what it promises


@pytest.mark.parametrize("w", [1, 2, 3])
def test_an_acknowledged_write_is_on_w_disks_and_survives(w: int) -> None:
    """The power of every node fails right behind the acknowledgement."""

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        for number, via in enumerate(NAMES):
            mark = f"unmistakable-{number}"
            await cluster.db.set("t", f"k{number}", mark, via=via)
            for name in NAMES:
                await cluster.faults.power_cut(name)
            assert len(disks_with(cluster, mark.encode())) >= w
            for name in NAMES:
                await cluster.faults.restart(name)
            await cluster.wait_settled()
            assert await converge(cluster) == []
            for other in range(number + 1):
                assert await cluster.db.get("t", f"k{other}", via=via) == f"unmistakable-{other}"

    play(scenario, r=4 - w, w=w)


@pytest.mark.parametrize(("r", "w"), [(2, 2), (1, 3), (3, 1)])
def test_with_r_and_w_above_n_reads_meet_writes(r: int, w: int) -> None:
    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        for number in range(10):
            for writer in NAMES:
                value = f"{number} of {writer}"
                await cluster.db.set("t", f"k{number}", value, via=writer)
                for reader in NAMES:
                    assert await cluster.db.get("t", f"k{number}", via=reader) == value
        assert len(await cluster.db.scan("t", "k")) == 10

    play(scenario, r=r, w=w)


def test_replicas_converge_when_all_is_quiet_and_additions_are_never_lost() -> None:
    """Both sides of a partition go on; what they did is merged, in the same order everywhere."""

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await cluster.faults.partition(["n1", "n2"])
        for number in range(100):
            for name in NAMES:
                await cluster.db.set("t", f"k{number % 7}", [number, name], via=name)
                await cluster.db.add("t", "sum", 1, via=name)
        assert await cluster.db.get("t", "sum", via="n3") < 300, "the sides know nothing of one another"
        await cluster.faults.heal()
        await cluster.wait_settled()
        assert await converge(cluster) == []
        for name in NAMES:
            assert await cluster.db.get("t", "sum", via=name) == 300
            for number in range(93, 100):
                assert (await cluster.db.get("t", f"k{number % 7}", via=name))[0] == number

    play(scenario, r=1, w=1)


def test_a_new_replica_is_given_everything_and_a_former_one_lets_go() -> None:
    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        for number in range(50):
            await cluster.db.set("t", f"k{number}", number)
        for victim in ("n1", "n4"):
            await cluster.faults.kill(victim)
            await cluster.wait_settled()
            for name in cluster.nodes:
                if name != victim:
                    for number in range(50):
                        assert await cluster.db.get("t", f"k{number}", via=name) == number
            await cluster.faults.restart(victim)
            await cluster.wait_settled()
            assert await converge(cluster) == []
        for name in cluster.nodes:
            for shard in cluster._machines[name].app.db.own_shards():
                assert (shard["role"] == "primary") == (name in shard["planned"])
                assert (shard["role"] == "idle") == (name not in shard["planned"])

    play(scenario, nodes=5, r=1, w=3)


async def missed(cluster: SimCluster, name: str) -> None:
    """A write that all replicas but one have; it is not sent to that one any more."""
    await cluster.faults.isolate(name)
    await cluster.db.set("t", "k", "new", via="n1")
    await asyncio.sleep(2 * quorum.SEND_TIMEOUT_S)
    await cluster.faults.heal()
    assert [held(cluster, node) for node in NAMES] == [None if node == name else "new" for node in NAMES]


def held(cluster: SimCluster, name: str) -> Any:
    """What a replica would read if it asked nobody."""
    return cluster._machines[name].app.db.local("t", "k").value


async def until(condition: Any) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - the condition lies in other processes
            await asyncio.sleep(0.01)


def test_a_read_takes_over_what_the_replica_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quorum, "ANTI_ENTROPY_S", (1e6, 1e6))
    monkeypatch.setattr(quorum, "SEND_TIMEOUT_S", 0.3)

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await missed(cluster, "n3")
        assert await cluster.db.get("t", "k", via="n3") == "new"

    play(scenario)


def test_read_repair_brings_the_write_to_those_who_missed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quorum, "ANTI_ENTROPY_S", (1e6, 1e6))
    monkeypatch.setattr(quorum, "SEND_TIMEOUT_S", 0.3)

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await missed(cluster, "n3")
        assert await cluster.db.get("t", "k", via="n2") == "new"
        await until(lambda: held(cluster, "n3") == "new")

    play(scenario)


def test_anti_entropy_does_so_without_any_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quorum, "SEND_TIMEOUT_S", 0.3)

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await missed(cluster, "n3")
        await until(lambda: held(cluster, "n3") == "new")

    play(scenario)


def test_who_comes_back_serves_when_it_has_caught_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Quorum) -> None:
        """No anti-entropy that would hide it."""

    monkeypatch.setattr(Quorum, "_compare", nothing)

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await cluster.faults.kill("n3")
        await cluster.wait_state("n3", "offline")
        await cluster.db.set("t", "k", "new", via="n1")
        await cluster.faults.restart("n3")

        def serves() -> bool:
            app = cluster._machines["n3"].app
            return app is not None and all(shard["role"] == "primary" for shard in app.db.own_shards())

        await until(serves)
        assert await retried(lambda: cluster.db.get("t", "k", via="n3")) == "new"

    play(scenario, r=1)


def test_a_clock_that_is_ahead_takes_the_others_along() -> None:
    """Whoever has heard of a write, stamps the next one later, whatever its own clock says."""

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await cluster.faults.skew("n1", 30.0)
        for name in (*NAMES, *NAMES):
            await cluster.db.set("t", "k", f"of {name}", via=name)
            assert await cluster.db.get("t", "k") == f"of {name}"

    play(scenario, r=1, w=3)


# what it does not


def test_a_clock_that_is_behind_loses_an_acknowledged_update() -> None:
    """The last writer wins, by stamps: n3 writes later, into the past."""

    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await cluster.faults.isolate("n3")
        await cluster.faults.skew("n3", -30.0)
        await cluster.db.set("t", "k", "first", via="n1")
        await cluster.db.set("t", "k", "second", via="n3")
        assert await cluster.db.get("t", "k", via="n3") == "second", "so it seems"
        await cluster.faults.heal()
        await cluster.wait_settled()
        assert await converge(cluster) == []
        assert [await cluster.db.get("t", "k", via=name) for name in NAMES] == ["first"] * 3

    play(scenario, r=1, w=1)


def test_both_of_two_transactions_that_contradict_each_other_are_acknowledged() -> None:
    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await cluster.db.set("t", "k", 0)
        await converge(cluster)
        await cluster.faults.partition(["n1", "n2"])
        for name in ("n1", "n3"):
            async with cluster.db.transaction(via=name) as transaction:
                transaction.set("t", "k", await transaction.get("t", "k") + 1)
        await cluster.faults.heal()
        await cluster.wait_settled()
        assert await converge(cluster) == []
        assert await cluster.db.get("t", "k") == 1, "one of them had no effect"

    play(scenario, r=1, w=1)


# limits and bad input


def test_too_few_replicas_refuse_and_say_so() -> None:
    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        await cluster.faults.kill("n2")
        await cluster.wait_state("n2", "offline")
        with pytest.raises(Unavailable, match="a write needs 3 replicas, and 2 are there") as caught:
            await cluster.db.set("t", "k", 1, via="n1")
        assert caught.value.definite
        assert await cluster.db.get("t", "k", via="n3") is None
        await cluster.faults.restart("n2")
        await cluster.wait_settled()
        await cluster.db.set("t", "k", 1)

    play(scenario, r=1, w=3)


def test_a_full_shard_refuses_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: SimCluster) -> None:
        await begin(cluster)
        monkeypatch.setattr(quorum, "LOG_ENTRIES_MAX", 5)

        async def fill() -> None:
            for number in range(20):
                await cluster.db.set("t", f"k{number}", number)

        with pytest.raises(TooLarge, match="lesson and never compacts") as caught:
            await fill()
        assert caught.value.definite
        assert await cluster.db.get("t", "k0") == 0

    play(scenario)


@pytest.mark.parametrize("name", ["read_quorum", "write_quorum"])
def test_quorums_must_fit_the_ring(name: str) -> None:
    node = {"name": "n1", "secret": "s" * 16, "data_dir": "d", "ring": {"replicas": 3}}

    def make(value: Any, replication: str = "quorum") -> NodeConfig:
        return NodeConfig.from_dict({**node, "db": {"replication": replication, name: value}})

    for value in (1, 2, 3):
        assert getattr(make(value).db, name) == value
    with pytest.raises(ConfigError, match=rf"db\.{name} = 4: allowed are values from 1 to 3.*ring\.replicas = 3"):
        make(4)
    with pytest.raises(ConfigError, match=rf"{name} = 0: allowed are values from 1"):
        make(0)
    with pytest.raises(ConfigError, match="expected int"):
        make("2")
    assert make(4, "raft"), "who does not use it need not care"


# the order


@given(st.lists(st.integers(1, 30), max_size=25), st.randoms())
@settings(deadline=None)
def test_a_late_command_is_put_in_its_place(stamps: list[int], rng: Any) -> None:
    """Whatever the order in which the commands of two origins arrive, the state is that of their stamps' order."""
    entries = []
    for origin in ("a", "b"):
        mine = sorted(stamp for stamp in stamps if rng.random() < 0.5)
        entries += [Stamped(stamp, origin, number, b"%d" % stamp) for number, stamp in enumerate(mine, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quorum, "CHECKPOINT_ENTRIES", 3)
        patch.setattr(quorum, "CHECKPOINTS_MAX", 2)
        policy, machine = alone()
        left = {origin: [entry for entry in entries if entry.origin == origin] for origin in ("a", "b")}
        while waiting := [queue for queue in left.values() if queue]:
            policy._take([rng.choice(waiting).pop(0)])
        assert machine.told == [entry.payload for entry in sorted(entries)]
        assert machine.indices == sorted(set(machine.indices)), "they grow"
        again, other = alone(policy._group.wal.all)
        again._apply_from(0)
        assert (other.told, other.indices) == (machine.told, machine.indices), "after a restart, too"
        assert again._log.vector == policy._log.vector


@given(st.integers(0, 1 << 60), st.sampled_from(NAMES))
def test_stamps_of_two_nodes_differ(stamp: int, name: str) -> None:
    mine = tagged(stamp, name)
    assert stamp <= mine < stamp + 256
    assert tagged(mine, name) == mine
    assert len({tagged(stamp, other) for other in NAMES}) == 3


def test_the_numbers_of_another_life_are_not_used_again() -> None:
    """What was sent and not synced may be elsewhere under its number, and not here, after a power cut."""
    names = []
    for incarnation in (1, 2):
        policy, _ = alone(incarnation=incarnation)
        policy._group.env = SimpleNamespace(wall_ms=lambda: 1)  # type: ignore[assignment]
        names.append(policy._stamp(b"").name)
    assert names[0] != names[1]


class Log:
    """The part of the node's log that the policy uses."""

    def __init__(self, records: list[Any] | None = None) -> None:
        self.all: list[Any] = list(records or [])

    def last_index(self, group: int) -> int:
        return len(self.all)

    def append(self, group: int, term: int, index: int, payload: bytes, kind: int = 0) -> None:
        self.all.append(Record(payload))

    def records(self, group: int) -> Iterator[Any]:
        return iter(self.all)


class Record:
    def __init__(self, payload: bytes) -> None:
        self.payload = payload


class Machine:
    """Remembers what it executed; its snapshot is that."""

    size_bytes = 0

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.indices: list[int] = []

    def apply(self, index: int, payload: bytes) -> Any:
        self.told.append(payload)
        self.indices.append(index)

    def snapshot(self) -> Iterator[bytes]:
        return iter([b"%d %s" % pair for pair in zip(self.indices, self.told, strict=True)])

    def restore(self, pieces: list[bytes]) -> None:
        pairs = [piece.split() for piece in pieces]
        self.indices, self.told = [int(pair[0]) for pair in pairs], [pair[1] for pair in pairs]


def alone(records: list[Any] | None = None, incarnation: int = 1) -> tuple[Quorum, Machine]:
    """The policy without a cluster: enough for its order."""
    machine = Machine()
    nothing: Any = None
    group = Group(
        env=nothing, name="n1", shard=0, wal=Log(records), groups=nothing, moves=nothing, machine=machine,
        send=nothing, view=nothing, owners=nothing, copies_min=1, read_quorum=1, write_quorum=1,
        incarnation=incarnation, compaction=nothing,
    )  # type: ignore[arg-type]  # fmt: skip
    return Quorum(group), machine

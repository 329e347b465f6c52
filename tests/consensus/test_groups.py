"""The driver of a node's groups, in simulated worlds: crashes, power cuts, partitions, many groups at once."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from gostore.comm import Endpoint
from gostore.config import KIB, CommConfig, StorageConfig
from gostore.consensus import Tunables
from gostore.consensus.group import SUCCESSOR_TIMEOUTS, Group
from gostore.consensus.groups import Compaction, Groups
from gostore.core.address import Address
from gostore.core.errors import GoStoreError, NotOwner, Timeout, Unavailable
from gostore.core.events import Event
from gostore.sim.world import SimNode, World
from gostore.storage import Wal

SECRET = "0123456789abcdef"
NAMES = ("n1", "n2", "n3")
TUNABLES = Tunables(election_timeout_s=0.5, heartbeat_s=0.1, retry_s=0.25, quiet_after_s=1.0)
STORAGE = StorageConfig(segment_size_bytes_max=16 * KIB)


class Everybody:
    """Knows where every node of a world listens."""

    def __init__(self, world: World) -> None:
        self.world = world

    def address(self, name: str) -> Address | None:
        node = self.world.nodes.get(name)
        return None if node is None else Address(node.address, 7000, 7000)


class Register:
    """Adds numbers; the outcome is (the number before, the index). Its state is all that was added, in order."""

    def __init__(self) -> None:
        self.applied = 0
        self.values: list[int] = []

    @property
    def size_bytes(self) -> int:
        return 8 * len(self.values)

    def apply(self, index: int, payload: bytes) -> tuple[int, int]:
        assert index == self.applied + 1
        self.applied = index
        self.values.append(struct.unpack("<q", payload[:8])[0])
        return len(self.values), index

    def skip(self, index: int) -> None:
        assert index == self.applied + 1
        self.applied = index

    def snapshot(self) -> Iterator[bytes]:
        return iter([struct.pack("<q", self.applied), *(struct.pack("<q", value) for value in self.values)])

    def restore(self, pieces: list[bytes]) -> None:
        numbers = [struct.unpack("<q", piece)[0] for piece in pieces] or [0]
        self.applied, self.values = numbers[0], numbers[1:]


class Cluster:
    """Nodes with nothing but a log and groups. ``count``: how many; all are founded by ``founders``, the ``late`` ones
    of whom do not know it yet."""

    def __init__(
        self,
        world: World,
        names: tuple[str, ...] = NAMES,
        founders: tuple[str, ...] = NAMES,
        count: int = 1,
        compaction: Compaction | None = None,
        late: tuple[str, ...] = (),
    ) -> None:
        self.world = world
        self.late = late
        self.founders = founders
        self.count = count
        self.compaction = compaction
        self.events: list[Event] = []
        self.groups: dict[str, Groups] = {}
        self.machines: dict[str, list[Register]] = {}
        self._of: dict[str, list[Group]] = {}
        for name in names:
            world.add_node(name, self._main)

    async def _main(self, node: SimNode) -> None:
        env = node.env
        env.events.subscribe(self.events.append, ("cls", "fault"))
        wal = await Wal.open(env, STORAGE)
        endpoint = Endpoint(
            env, cluster="test", secret=SECRET, host=node.address, tcp_port=7000, udp_port=7000,
            incarnation=node.incarnation, resolver=Everybody(self.world), config=CommConfig(),
        )  # fmt: skip
        groups = Groups(env, endpoint, wal, TUNABLES)
        endpoint.register(groups)
        await endpoint.start()
        machines = [Register() for _ in range(self.count)]
        opened = [
            groups.open(7 + number, f"group {number}", machine, self.compaction)
            for number, machine in enumerate(machines)
        ]
        self.groups[node.name], self.machines[node.name], self._of[node.name] = groups, machines, opened
        await groups.start()
        founder = node.name in self.founders
        for number, group in enumerate(opened):
            if node.name in self.late:
                continue
            group.begin(self.founders if founder else ())
            if founder and node.name == self.founders[number % len(self.founders)] and group.last.index == 0:
                group.campaign()

    def restart(self, name: str) -> None:
        """Another life, or the first one after a crash; until it has opened its log, there are no groups."""
        self._of.pop(name, None)
        self.world.restart(name)

    def group(self, name: str, number: int = 0) -> Group:
        return self._of[name][number]

    def running(self) -> list[str]:
        return [name for name, node in self.world.nodes.items() if node.state == "running" and name in self._of]

    def leader(self, number: int = 0) -> str | None:
        """Who serves with the greatest term."""
        serving = [name for name in self.running() if self.group(name, number).serves]
        return max(serving, key=lambda name: self.group(name, number).status.term, default=None)

    def wait_leader(self, number: int = 0, among: tuple[str, ...] | None = None) -> str:
        def there() -> bool:
            found = self.leader(number)
            return found is not None and (among is None or found in among)

        self.world.run_until(there, timeout_s=20.0, what="a leader")
        found = self.leader(number)
        assert found is not None
        return found

    def propose(self, name: str, value: int, number: int = 0, timeout_s: float = 5.0, size: int = 8) -> Any:
        async def main() -> Any:
            payload = struct.pack("<q", value).ljust(size, b"\0")
            return await self.group(name, number).propose(payload, asyncio.get_running_loop().time() + timeout_s)

        return self.world.run(main(), on=name)

    def read(self, name: str, number: int = 0, timeout_s: float = 5.0) -> list[int]:
        async def main() -> list[int]:
            await self.group(name, number).read_barrier(asyncio.get_running_loop().time() + timeout_s)
            return list(self.machines[name][number].values)

        return self.world.run(main(), on=name)

    def change(
        self, name: str, voters: tuple[str, ...], learners: tuple[str, ...] = (), timeout_s: float = 5.0
    ) -> None:
        async def main() -> None:
            await self.group(name).change(voters, learners, asyncio.get_running_loop().time() + timeout_s)

        self.world.run(main(), on=name)

    def wait_equal(self, names: tuple[str, ...] = NAMES, number: int = 0) -> None:
        def equal() -> bool:
            states = [(self.machines[name][number].applied, self.machines[name][number].values) for name in names]
            return all(state == states[0] for state in states)

        self.world.run_until(equal, timeout_s=20.0, what="equal machines")


@pytest.fixture(name="world")
def fresh_world() -> Iterator[World]:
    with World(11) as world:
        yield world


def test_the_first_founder_leads_without_a_time_out(world: World) -> None:
    cluster = Cluster(world)
    assert cluster.wait_leader() == "n1"
    assert world.now < TUNABLES.election_timeout_s
    assert cluster.propose("n1", 5) == (1, 2)
    assert cluster.read("n1") == cluster.read("n2") == [5]  # a follower asks its leader
    cluster.wait_equal()
    with pytest.raises(NotOwner) as caught:
        cluster.propose("n2", 6)
    assert caught.value.details["owner"] == "n1"
    assert [event.data["leader"] for event in cluster.events if event.kind == "raft_leader"] == ["n1"]


def test_who_begins_late_has_not_missed_the_question_of_the_first_founder(world: World) -> None:
    cluster = Cluster(world, late=("n2", "n3"))
    world.run_until(lambda: len(cluster.running()) == 3, timeout_s=5.0)
    world.run_for(0.05)
    assert cluster.leader() is None

    async def begin(name: str) -> None:
        cluster.group(name).begin(cluster.founders)

    for name in ("n2", "n3"):
        world.run(begin(name), on=name)
    assert cluster.wait_leader() == "n1"
    assert world.now < TUNABLES.election_timeout_s


def test_many_groups_share_syncs_and_messages(world: World) -> None:
    cluster = Cluster(world, count=16)
    for number in range(16):
        assert cluster.wait_leader(number) == NAMES[number % 3]

    async def write(name: str) -> None:
        deadline_s = asyncio.get_running_loop().time() + 5.0
        led = [number for number in range(16) if cluster.leader(number) == name]
        payloads = [struct.pack("<q", value) for value in range(20)]
        await asyncio.gather(*(cluster.group(name, n).propose(p, deadline_s) for n in led for p in payloads))

    before = {name: cluster.groups[name].statistics() for name in NAMES}
    for name in NAMES:
        world.run(write(name), on=name)
    for number in range(16):
        cluster.wait_equal(number=number)
        assert cluster.machines["n1"][number].values == list(range(20))
    for name in NAMES:
        after = cluster.groups[name].statistics()
        # 320 commands of sixteen groups, each to be synced here.
        assert after["syncs"] - before[name]["syncs"] <= 40
        assert after["casts"] - before[name]["casts"] <= 100


def test_what_a_leader_says_leaves_before_it_writes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(world)
    leader = cluster.wait_leader()
    cluster.propose(leader, 1)
    cluster.wait_equal()
    endpoint, wal, group = cluster.groups[leader]._endpoint, cluster.groups[leader].wal, cluster.group(leader)
    seen: list[tuple[str, int]] = []

    def note(what: str) -> None:
        seen.append((what, endpoint.statistics()["sent_packets_udp"]))

    append_all = wal.append_all

    def write(number: int, index: int, entries: Any) -> None:
        note("written")
        append_all(number, index, entries)

    monkeypatch.setattr(wal, "append_all", write)

    async def propose() -> None:
        note("proposed")
        await group.propose(struct.pack("<q", 2), asyncio.get_running_loop().time() + 5.0)

    world.run(propose(), on=leader)
    sent = seen[0][1]
    assert seen[:2] == [("proposed", sent), ("written", sent + 2)]  # a packet for each follower


def test_what_was_handed_out_is_written_though_its_messages_cannot_be_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(world)
    leader = cluster.wait_leader()
    failed: list[int] = []

    def fail() -> None:
        failed.append(1)
        monkeypatch.undo()
        raise ValueError("an address of another family")

    monkeypatch.setattr(cluster.groups[leader]._endpoint, "flush", fail)
    cluster.propose(leader, 1)
    assert failed
    group = cluster.group(leader)
    assert group.journal.last == group.last.index
    cluster.propose(leader, 2)
    cluster.wait_equal()
    assert cluster.machines[leader][0].values == [1, 2]


def test_no_more_is_taken_from_the_cores_than_may_wait_for_the_medium(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gostore.consensus.groups.UNSYNCED_SIZE_BYTES_MAX", 4000)
    cluster = Cluster(world, count=16)
    led = [number for number in range(16) if cluster.wait_leader(number) == "n1"]
    assert len(led) > 3
    groups, seen = cluster.groups["n1"], []

    async def overload() -> None:
        deadline_s = asyncio.get_running_loop().time() + 60.0
        world.node("n1").env.disk.stall()
        payload = struct.pack("<q", 1).ljust(1000, b"\0")
        waiting = [
            asyncio.create_task(cluster.group("n1", number).propose(payload, deadline_s))
            for _ in range(10)
            for number in led
        ]
        for _ in range(50):
            await asyncio.sleep(0.001)
            seen.append(groups._unsynced_size)
        world.node("n1").env.disk.resume()
        await asyncio.gather(*waiting)

    append_all = groups.wal.append_all

    def append(number: int, index: int, entries: Any) -> None:
        append_all(number, index, entries)
        seen.append(groups.wal._buffer_size)

    monkeypatch.setattr(groups.wal, "append_all", append)
    world.run(overload(), on="n1")
    largest = 10 * 1100  # what one core may hand out at a time here
    assert 4000 < max(seen) <= 4000 + 2 * largest
    assert groups._unsynced_size == 0


def test_a_core_asks_its_journal_for_nothing_that_a_compaction_let_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(world, compaction=Compaction(size_bytes=4000, entries=20))
    leader = cluster.wait_leader()
    group, wal = cluster.group(leader), cluster.groups[leader].wal
    sync, firsts = wal.sync, set()

    async def look() -> None:
        assert group.raft is not None
        assert group.journal.first <= group.raft.log.start.index + 1
        firsts.add(group.journal.first)
        await sync()

    monkeypatch.setattr(wal, "sync", look)
    for value in range(60):
        cluster.propose(leader, value, size=200)
    assert len(firsts) > 2, "it compacted"
    cluster.wait_equal()


def test_an_idle_cluster_goes_quiet_and_wakes(world: World) -> None:
    cluster = Cluster(world, count=4)
    for number in range(4):
        cluster.wait_leader(number)

    def quiet() -> bool:
        return all(cluster.groups[name].statistics()["quiet"] == 4 for name in NAMES)

    world.run_until(quiet, timeout_s=10.0)
    casts = [cluster.groups[name].statistics()["casts"] for name in NAMES]
    world.run_for(60.0)
    assert [cluster.groups[name].statistics()["casts"] for name in NAMES] == casts
    assert cluster.propose("n1", 1)[0] == 1
    # Nobody notices the death of a quiet leader here; whoever watches the nodes says so.
    world.run_until(quiet, timeout_s=10.0)
    world.crash("n1")
    world.run_for(5.0)
    assert cluster.leader() is None
    for name in ("n2", "n3"):
        world.run(wake(cluster, name, "n1"), on=name)
    assert cluster.wait_leader() in ("n2", "n3")


async def wake(cluster: Cluster, name: str, suspected: str) -> None:
    cluster.groups[name].wake(suspected)


def test_a_quiet_replica_that_is_asked_in_vain_finds_out_that_its_leader_is_dead(world: World) -> None:
    cluster = Cluster(world)
    cluster.wait_leader()
    world.run_until(lambda: cluster.groups["n2"].statistics()["quiet"] == 1, timeout_s=10.0)
    world.crash("n1")

    async def stir() -> None:
        cluster.group("n2").stir()

    world.run(stir(), on="n2")
    assert cluster.wait_leader() in ("n2", "n3")


def test_a_leader_without_a_majority_serves_nobody(world: World) -> None:
    cluster = Cluster(world)
    cluster.wait_leader()
    cluster.propose("n1", 1)
    world.net.partition(["n1"], ["n2", "n3"])
    with pytest.raises((Unavailable, NotOwner)) as read:
        cluster.read("n1", timeout_s=2.0)
    assert read.value.definite
    new = cluster.wait_leader(among=("n2", "n3"))
    assert cluster.propose(new, 2)[0] == 2
    assert cluster.read(new) == [1, 2]
    world.net.heal()
    cluster.wait_equal()
    with pytest.raises(NotOwner):
        cluster.propose("n1", 3)


def test_what_a_deposed_leader_had_taken_is_surely_lost_or_may_have_happened(world: World) -> None:
    cluster = Cluster(world)
    cluster.wait_leader()
    outcomes: list[Exception] = []

    async def late(value: int, timeout_s: float) -> None:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            await cluster.group("n1").propose(struct.pack("<q", value), deadline_s)
        except GoStoreError as error:
            outcomes.append(error)

    world.net.partition(["n1"], ["n2", "n3"])
    world.node("n1").spawn(late(7, 0.2), name="late")
    world.node("n1").spawn(late(8, 60.0), name="late")
    new = cluster.wait_leader(among=("n2", "n3"))
    cluster.propose(new, 9)
    world.net.heal()
    world.run_until(lambda: len(outcomes) == 2, timeout_s=10.0)
    assert [(type(error), error.definite) for error in outcomes] == [(Timeout, False), (NotOwner, True)]
    cluster.wait_equal()
    assert cluster.machines["n1"][0].values == [9]


def test_who_waits_for_a_deposed_leader_is_told_before_the_deadline(world: World) -> None:
    """Nobody takes the lead here, so nobody will ever know; but the command may be repeated elsewhere."""
    cluster = Cluster(world)
    cluster.wait_leader()
    told: list[Exception] = []

    async def late(values: tuple[int, ...]) -> None:
        group, deadline_s = cluster.group("n1"), asyncio.get_running_loop().time() + 3600.0
        payloads = [struct.pack("<q", value) for value in values]
        try:
            if len(payloads) == 1:
                await group.propose(payloads[0], deadline_s)
            else:
                told.extend(await group.propose_all(payloads, deadline_s))
        except GoStoreError as error:
            told.append(error)

    world.net.partition(["n1"], ["n2"], ["n3"])
    world.node("n1").spawn(late((7,)), name="late")
    world.node("n1").spawn(late((8, 9)), name="late")
    world.run_until(lambda: cluster.group("n1").role != "leader", timeout_s=5.0)
    assert not told
    world.run_until(lambda: len(told) == 3, timeout_s=(SUCCESSOR_TIMEOUTS + 0.5) * TUNABLES.election_timeout_s)
    assert [(type(error), error.definite) for error in told] == [(Timeout, False)] * 3
    world.net.heal()
    cluster.propose(cluster.wait_leader(), 10)
    cluster.wait_equal()


def test_several_commands_share_a_wait_and_not_their_fate(world: World) -> None:
    cluster = Cluster(world)
    cluster.wait_leader()

    def several(name: str, values: list[int], timeout_s: float) -> list[Any]:
        async def main() -> list[Any]:
            payloads = [struct.pack("<q", value) for value in values]
            deadline_s = asyncio.get_running_loop().time() + timeout_s
            return await cluster.group(name).propose_all(payloads, deadline_s)

        return world.run(main(), on=name)

    assert [count for count, _ in several("n1", [1, 2, 3], 5.0)] == [1, 2, 3]
    with pytest.raises(NotOwner):  # nothing was proposed: that is told at once
        several("n2", [4], 5.0)
    world.net.partition(["n1"], ["n2", "n3"])
    late = several("n1", [4, 5], 0.2)
    assert [(type(error), error.definite) for error in late] == [(Timeout, False)] * 2
    told: list[list[Any]] = []

    async def wait_long() -> None:
        payloads = [struct.pack("<q", value) for value in (6, 7)]
        told.append(await cluster.group("n1").propose_all(payloads, asyncio.get_running_loop().time() + 60.0))

    world.node("n1").spawn(wait_long(), name="late")
    new = cluster.wait_leader(among=("n2", "n3"))
    for value in (9, 10, 11, 12):  # other entries stand where theirs were
        cluster.propose(new, value)
    world.net.heal()
    world.run_until(lambda: bool(told), timeout_s=10.0)
    assert [(type(error), error.definite) for error in told[0]] == [(NotOwner, True)] * 2
    cluster.wait_equal()
    assert cluster.machines["n1"][0].values == [1, 2, 3, 9, 10, 11, 12]
    assert not cluster.group("n1")._waiters


def test_a_read_joins_those_whose_round_has_not_been_sent(world: World) -> None:
    """One that comes later may know of a write of which the round that is on its way proves nothing."""
    cluster = Cluster(world)
    cluster.wait_leader()

    async def main() -> None:
        group = cluster.group("n1")

        async def read() -> None:
            await group.read_barrier(asyncio.get_running_loop().time() + 5.0)

        before = group._read_number
        together = [asyncio.create_task(read()) for _ in range(3)]
        while group._read_number == before or group._gathering is not None:  # noqa: ASYNC110 (a turn of the group)
            await asyncio.sleep(0)
        late = asyncio.create_task(read())
        await asyncio.gather(*together)
        assert not late.done()
        await late
        assert group._read_number == before + 2
        assert not group._reads

    world.run(main(), on="n1")


@pytest.mark.parametrize("power", [False, True])
def test_acknowledged_commands_survive_the_death_of_all(world: World, power: bool) -> None:
    cluster = Cluster(world, compaction=Compaction(size_bytes=600, entries=1000))
    name = cluster.wait_leader()
    acknowledged: list[int] = []
    for round_ in range(6):
        for _ in range(12):
            acknowledged.append(len(acknowledged))
            cluster.propose(name, acknowledged[-1], size=40)
        for victim in NAMES:
            (world.power_cut if power else world.crash)(victim)
        for victim in NAMES[: 2 + round_ % 2]:
            cluster.restart(victim)
        name = cluster.wait_leader()
        assert cluster.read(name) == acknowledged
    for victim in NAMES:
        cluster.restart(victim)
    cluster.wait_leader()
    cluster.wait_equal()
    assert cluster.group("n1").journal.start.index > 0, "the log was compacted"


def test_a_replica_that_lags_behind_the_log_gets_a_snapshot(world: World) -> None:
    cluster = Cluster(world, compaction=Compaction(size_bytes=20_000, entries=10_000))
    cluster.wait_leader()
    world.crash("n3")
    for value in range(400):
        cluster.propose("n1", value, size=2000)
    assert cluster.group("n1").journal.start.index > 0
    for fault in ("power", "kill", None):
        cluster.restart("n3")
        if fault is not None:
            world.run_for(0.03)
            (world.power_cut if fault == "power" else world.crash)("n3")
    world.run_until(lambda: "n3" in cluster.running(), timeout_s=10.0)
    cluster.wait_equal()
    assert cluster.group("n3").snapshots_installed >= 1
    assert {event.node for event in cluster.events if event.kind == "raft_snapshot"} == {"n3"}
    # What was installed and acknowledged is what a restart finds.
    leader = cluster.group("n1")
    world.run_until(lambda: leader.statistics()["followers"]["n3"]["match"] == leader.last.index, timeout_s=10.0)
    cluster.restart("n3")
    world.run_until(lambda: "n3" in cluster.running(), timeout_s=10.0)
    cluster.wait_equal()
    assert cluster.group("n3").snapshots_installed == 0


def test_replicas_move_and_forget(world: World) -> None:
    cluster = Cluster(world, names=(*NAMES, "n4"), compaction=Compaction(size_bytes=5_000, entries=10_000))
    cluster.wait_leader()
    for value in range(300):
        cluster.propose("n1", value, size=100)
    with pytest.raises(Unavailable, match="caught up"):
        cluster.change("n1", ("n1", "n2", "n4"))
    cluster.change("n1", NAMES, ("n4",))
    world.run_until(lambda: cluster.group("n1").caught_up("n4"), timeout_s=10.0)
    cluster.change("n1", ("n1", "n2", "n4"))
    assert cluster.group("n1").configuration.members == ("n1", "n2", "n4")
    removed = cluster.group("n3")
    world.run_until(lambda: removed.settled and "n3" not in removed.configuration.members, timeout_s=10.0)
    term, last = removed.status.term, removed.last
    world.run(removed.clear(), on="n3")
    assert (removed.last.index, removed.applied, removed.status.term) == (0, 0, term + 1)
    assert removed.journal.tomb == last
    assert cluster.machines["n3"][0].values == []
    world.power_cut("n3")
    cluster.restart("n3")
    world.run_for(3.0)
    assert (cluster.group("n3").last.index, cluster.group("n3").journal.tomb) == (0, last)
    assert cluster.leader() == "n1", "it disturbs nobody"
    # And back again, in the place of the leader. Its term is higher than the group's: the leader has to win one more
    # election, for which nobody waits.
    begun_s = world.now
    cluster.change(cluster.wait_leader(), ("n1", "n2", "n4"), ("n3",))
    world.run_until(lambda: cluster.group("n1").caught_up("n3"), timeout_s=10.0)
    assert world.now - begun_s < TUNABLES.election_timeout_s
    name = cluster.wait_leader()
    assert name == "n1"
    cluster.change(name, ("n2", "n3", "n4"))
    cluster.wait_leader(among=("n2", "n3", "n4"))
    cluster.wait_equal(("n2", "n3", "n4"))
    assert cluster.machines["n3"][0].values == list(range(300))


def test_a_replica_that_forgot_its_log_grants_no_votes_until_it_has_it_again(world: World) -> None:
    """It must not help a replica that lags behind its removal to lead again."""
    cluster = Cluster(world, names=(*NAMES, "n4"))
    cluster.wait_leader()
    cluster.propose("n1", 1)
    cluster.change("n1", NAMES, ("n4",))
    world.run_until(lambda: cluster.group("n1").caught_up("n4"), timeout_s=10.0)
    cluster.wait_equal()
    world.net.partition(["n2"], ["n1", "n3", "n4"])  # it does not learn what the others decide now
    cluster.change("n1", ("n1", "n2", "n4"))
    cluster.propose("n1", 2)
    removed = cluster.group("n3")
    world.run_until(lambda: removed.settled and "n3" not in removed.configuration.members, timeout_s=10.0)
    world.run(removed.clear(), on="n3")
    for name in ("n1", "n4"):
        world.crash(name)
    world.net.heal()
    world.run_for(20.0)
    assert cluster.leader() is None, "n2, which believes that n3 votes, lacks what n1 and n4 have committed"
    for name in ("n1", "n4"):
        cluster.restart(name)
    cluster.wait_leader(among=("n1", "n4"))
    cluster.wait_equal(("n1", "n2", "n4"))
    assert cluster.machines["n2"][0].values == [1, 2]


def test_the_lead_is_handed_over(world: World) -> None:
    cluster = Cluster(world)
    cluster.wait_leader()
    cluster.propose("n1", 1)

    async def transfer() -> str:
        return cluster.group("n1").transfer("n3")

    assert world.run(transfer(), on="n1") == "n3"
    with pytest.raises((Unavailable, NotOwner)):
        cluster.propose("n1", 2)
    assert cluster.wait_leader(among=("n3",)) == "n3"
    assert cluster.propose("n3", 3)[0] == 2


def test_a_failing_disk_stops_the_node_and_not_the_group(world: World) -> None:
    cluster = Cluster(world)
    cluster.wait_leader()
    world.node("n1").disk.failing = True
    task = world.node("n1").spawn(cluster.group("n1").propose(struct.pack("<q", 1), 5.0), name="propose")
    world.run_until(lambda: world.node("n1").state == "down", timeout_s=10.0, what="the end of n1")
    assert not (task.done() and task.exception() is None), "acknowledged without a sync"
    assert cluster.propose(cluster.wait_leader(among=("n2", "n3")), 2)[0] >= 1


def test_a_group_that_has_not_begun_promises_nothing(world: World) -> None:
    cluster = Cluster(world)
    cluster.wait_leader()

    async def open_another() -> Group:
        return cluster.groups["n1"].open(99, "another", Register())

    group = world.run(open_another(), on="n1")
    with pytest.raises(NotOwner):
        world.run(group.propose(b"", 10.0), on="n1")
    assert not group.begun
    assert group.journal.empty
    assert not group.campaign()


STORM_S = 20.0


def storm(seed: int) -> tuple[Counter[str], str]:
    """Load, crashes, power cuts, partitions, loss and moves; then all that was acknowledged is there once."""
    done: Counter[str] = Counter()
    names = ("n1", "n2", "n3", "n4", "n5")
    with World(seed) as world:
        rng = world.rng("storm")
        cluster = Cluster(world, names, compaction=Compaction(size_bytes=3_000, entries=10_000))
        numbers = itertools.count()
        acknowledged: list[int] = []
        seen: list[tuple[int, list[int]]] = []  # reads: (how many were acknowledged before, what was read)

        async def client(name: str) -> None:
            loop = asyncio.get_running_loop()
            while True:
                await asyncio.sleep(rng.uniform(0.0, 0.05))
                group = cluster.group(name)
                try:
                    kind = rng.random()
                    if kind < 0.2:
                        before = len(acknowledged)
                        await group.read_barrier(loop.time() + 1.0)
                        seen.append((before, list(cluster.machines[name][0].values)))
                    elif kind < 0.4:
                        values = [next(numbers) for _ in range(rng.randrange(1, 5))]
                        payloads = [struct.pack("<q", value).ljust(200, b"\0") for value in values]
                        told = await group.propose_all(payloads, loop.time() + 1.0)
                        outcomes = zip(values, told, strict=True)
                        acknowledged.extend(value for value, one in outcomes if not isinstance(one, GoStoreError))
                    else:
                        value = next(numbers)
                        await group.propose(struct.pack("<q", value).ljust(200, b"\0"), loop.time() + 1.0)
                        acknowledged.append(value)
                except GoStoreError:
                    pass

        async def mover(name: str) -> None:
            loop = asyncio.get_running_loop()
            while True:
                await asyncio.sleep(rng.uniform(0.2, 0.6))
                group = cluster.group(name)
                voters, learners = group.configuration.voters, group.configuration.learners
                try:
                    if "n" in (others := "".join(rng.sample(names, 1))) and others not in voters and not learners:
                        await group.change(voters, (others,), loop.time() + 1.0)
                    elif learners and group.caught_up(learners[0]):
                        kept = rng.sample(voters, 2)
                        await group.change((*kept, learners[0]), (), loop.time() + 1.0)
                        done["changes"] += 1
                    removed = group.settled and name not in group.configuration.members
                    if removed and group.last.index and group.configuration.voters:
                        await group.clear()
                        done["cleared"] += 1
                except GoStoreError:
                    pass

        original = cluster._main

        async def main(node: SimNode) -> None:
            await original(node)
            node.spawn(client(node.name), name="client")
            node.spawn(mover(node.name), name="mover")

        for node in world.nodes.values():
            node.main = main
            cluster.restart(node.name)
        end_s = world.now + STORM_S
        while world.now < end_s:
            world.run_for(rng.uniform(0.1, 1.0))
            victim, fault = rng.choice(names), rng.randrange(6)
            done[f"fault {fault}"] += 1
            if fault == 0 and len(cluster.running()) == 5:
                world.crash(victim)
            elif fault == 1 and len(cluster.running()) == 5:
                world.power_cut(victim)
            elif fault == 2:
                world.net.partition([victim], [name for name in names if name != victim])
            elif fault == 3:
                for pair in itertools.permutations(names, 2):
                    world.net.links.set(*pair, loss=0.05, duplicate=0.1, reorder=0.2)
            else:
                world.net.heal()
            for node in world.nodes.values():
                if node.state == "down" and node.name in names and rng.random() < 0.5:
                    cluster.restart(node.name)
        world.net.heal()
        for node in list(world.nodes.values()):
            if node.state == "down":
                cluster.restart(node.name)
        leader = cluster.wait_leader()
        world.run_for(3.0)
        leader = cluster.wait_leader()
        members = cluster.group(leader).configuration.members
        cluster.wait_equal(members)
        values = cluster.machines[leader][0].values
        assert len(set(values)) == len(values)
        missing = set(acknowledged) - set(values)
        assert not missing, f"lost: {sorted(missing)}"
        for before, read in seen:
            assert read == values[: len(read)], "a read of another history"
            assert set(acknowledged[:before]) <= set(read), "a stale read"
        leaders: dict[int, str] = {}
        for event in cluster.events:
            if event.kind == "raft_leader":
                assert leaders.setdefault(event.data["term"], event.node) == event.node, "two leaders in a term"
            assert event.kind != "task_failed", event.data
            done[event.kind] += 1
        done["acknowledged"] += len(acknowledged)
        done["reads"] += len(seen)
        errors = [error for loop in world.scheduler.loops for error in loop.errors]
        assert not errors, errors
        return done, world.trace.sha256


def test_storms() -> None:
    total: Counter[str] = Counter()
    for seed in range(6):
        total += storm(seed)[0]
    assert total["acknowledged"] > 1_000
    assert total["reads"] > 200
    for what in ("changes", "cleared", "raft_snapshot"):
        assert total[what] >= 5, total
    assert total["raft_leader"] >= 20


def test_a_storm_is_a_function_of_its_seed() -> None:
    assert storm(3) == storm(3)

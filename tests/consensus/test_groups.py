"""The driver of a node's groups, in simulated worlds: crashes, power cuts, partitions, many groups at once."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from gostore.consensus.group import SUCCESSOR_TIMEOUTS, Group
from gostore.consensus.groups import Compaction
from gostore.consensus.raft import Raft
from gostore.core.errors import GoStoreError, NotOwner, Timeout, Unavailable
from gostore.sim.world import World

from .nodes import NAMES, TUNABLES, Cluster, Register


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
    assert "an address of another family" in world.trouble(), "it is seen"
    group = cluster.group(leader)
    assert group.journal.last == group.last.index
    cluster.propose(leader, 2)
    cluster.wait_equal()
    assert cluster.machines[leader][0].values == [1, 2]


@pytest.mark.parametrize("step", ["receive", "timeout", "ready"])
def test_an_error_within_a_core_stops_the_node_and_not_the_group(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It may be half changed: whatever it said then, nobody knows whether it holds."""
    cluster = Cluster(world)
    leader = cluster.wait_leader()
    cluster.propose(leader, 1)
    raft, function = cluster.group(leader).raft, getattr(Raft, step)

    def fail(self: Raft, *arguments: Any) -> Any:
        if self is raft:
            raise AssertionError("nobody has thought of this")
        return function(self, *arguments)

    monkeypatch.setattr(Raft, step, fail)
    world.run_until(lambda: world.node(leader).state == "down", timeout_s=10.0, what=f"the end of {leader}")
    others = tuple(name for name in NAMES if name != leader)
    assert cluster.propose(cluster.wait_leader(among=others), 2)[0] == 2


def test_messages_that_cannot_be_sent_to_one_keep_nobody_else_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(world)
    leader = cluster.wait_leader()
    first = next(iter(name for name in NAMES if name != leader))
    endpoint = cluster.groups[leader]._endpoint
    cast = endpoint.cast

    def fail(to: str, *arguments: Any) -> Any:
        if to == first:
            raise ValueError("nobody has thought of this")
        return cast(to, *arguments)

    monkeypatch.setattr(endpoint, "cast", fail)
    cluster.propose(leader, 1)
    assert "nobody has thought of this" in world.trouble(), "it is seen"
    assert world.node(leader).state == "running"
    monkeypatch.undo()
    cluster.wait_equal()


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
        while groups._unsynced_size <= 4000:  # noqa: ASYNC110 - the condition lies in the driver
            await asyncio.sleep(0)
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


def test_whoever_holds_something_for_the_first_time_is_told_of_it(world: World) -> None:
    """Even if nothing else changes: it may be the copy of one who is to be a member no longer, and must ask whether it
    is (seed 63 with `promised`)."""
    cluster = Cluster(world, names=("n1", "n2", "n3", "n4"), founders=("n1", "n2", "n3"))
    leader = cluster.wait_leader()
    cluster.propose(leader, 1)
    late = cluster.group("n4")
    told: list[tuple[int, int]] = []
    late.on_change = lambda: told.append((late.last.index, late.applied))

    async def admit() -> None:
        await cluster.group(leader).change(("n1", "n2", "n3"), ("n4",), asyncio.get_running_loop().time() + 5.0)

    # So that the configuration that admits it is not committed, and not applied there.
    world.net.partition([leader, "n4"], [name for name in NAMES if name != leader])
    admission = world.node(leader).spawn(admit(), name="admit")
    world.run_until(lambda: late.last.index > 0, timeout_s=10.0, what="something at n4")
    assert told
    assert told[-1] == (late.last.index, late.applied)
    assert late.applied < late.last.index
    admission.cancel()


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

"""Several nodes in one process, over loopback. Every wait is for a condition."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gostore.cluster import MemberChange, NodeState, View
from gostore.core.address import Address
from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    GoStoreError,
    NotFound,
    PolicyError,
    Timeout,
    Unavailable,
)
from gostore.core.events import Event
from gostore.core.slots import PolicySource
from gostore.services.cls import Patience

Nodes = Any
Node = Any
Run = Callable[[Callable[[Nodes], Awaitable[None]]], None]

REVERSED = PolicySource(
    "Reversed",
    """
from gostore.cluster import HashRing
class Reversed(HashRing):
    def owners(self, key):
        return super().owners(key)[::-1]
""",
)


def test_five_nodes_are_online_in_one_epoch(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        cluster = await nodes.launch(5, expect=5)
        views = [node.view for node in cluster]
        assert len({view.version for view in views}) == 1
        assert sorted(views[0].masters) == ["n1", "n2", "n3", "n4", "n5"]
        assert views[0].masters[0] == "n1" == views[0].master
        assert all(sorted(node.cls.group.configuration.voters) == sorted(views[0].masters) for node in cluster)
        assert [node.name for node in cluster if node.cls.is_master] == ["n1"]
        owners = {node.name: [node.view.resolve(b"%d" % k).owners for k in range(50)] for node in cluster}
        assert all(found == owners["n1"] for found in owners.values())
        for node in cluster:
            online = {e["epoch"] for e in node.published("member") if e["state"] == "online"}
            assert len(online) <= 1, "all in one epoch (or with the whole view)"
            assert len(node.published("node_ready")) == 1
            assert node.endpoint.epoch == node.view.epoch

    run(scenario)


def test_events_tell_the_path_they_took(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        cluster = await nodes.launch(3)
        epoch = await nodes.running["n2"].cls.set_placement(REVERSED)
        await nodes.add("n4")
        await nodes.wait_online(["n1", "n2", "n3", "n4"])
        for node in cluster:
            paths = [e["path"] for e in node.published("member") if e["member"] == "n4" and e["epoch"] > epoch]
            assert paths
            for path in paths:
                assert path[0] == "n1"
                assert path[-1] == node.name

    run(scenario)


def test_a_dead_node_is_found_and_declared(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(4)
        await nodes.kill("n4")
        await nodes.wait_online(["n1", "n2", "n3"])
        for node in nodes.running.values():
            assert node.view.members["n4"].state is NodeState.OFFLINE
            assert node.cls.suspected() == []
        assert any(e["member"] == "n4" for node in nodes.running.values() for e in node.published("suspect"))

    run(scenario)


def test_the_next_master_takes_over_and_the_epoch_goes_on(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        cluster = await nodes.launch(5, expect=5)
        before = cluster[0].view
        await nodes.kill("n1")
        rest = sorted(nodes.running)
        await nodes.wait_online(rest)
        (leader,) = [node for node in nodes.running.values() if node.cls.is_master]
        assert leader.view.epoch == before.epoch + 2, "it says that it leads, and that n1 is dead"
        assert leader.view.term > before.term
        assert [e["member"] for e in leader.published("master")][-1] == leader.name
        await nodes.add("n6", expect=5)
        await nodes.wait_online([*rest, "n6"])

    run(scenario)


def test_a_node_that_restarts_is_back_with_a_higher_incarnation(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(3)
        old = nodes.running["n3"].view.members["n3"]
        await nodes.kill("n3")
        await nodes.wait_online(["n1", "n2"])
        back = await nodes.add("n3")
        await nodes.wait_online(["n1", "n2", "n3"])
        new = back.view.members["n3"]
        assert new.incarnation > old.incarnation
        assert new.joined == old.joined
        states = [e["state"] for e in nodes.running["n1"].published("member") if e["member"] == "n3"]
        assert states[-3:] == ["offline", "connecting", "online"], "the master sees every step"

    run(scenario)


@pytest.mark.parametrize("name", ["n1", "n3"])
def test_a_node_that_restarts_before_it_is_missed(run: Run, name: str) -> None:
    """The master too."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(3)
        other = nodes.running["n2"]
        await nodes.kill(name)
        await nodes.add(name)
        await other.wait(lambda view: view.members[name].incarnation > 1000 and view.members[name].online)
        await nodes.wait_online(["n1", "n2", "n3"])
        states = [e["state"] for e in other.published("member") if e["member"] == name]
        assert states.count("online") >= 2, "it entered the state again, by events or with a whole view"

    run(scenario)


def test_the_whole_cluster_restarts(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(4, expect=4)
        saved = nodes.running["n1"].view
        await nodes.kill_all()
        await asyncio.gather(*(nodes.add(name, expect=4, same_place=True) for name in ("n4", "n3", "n2", "n1")))
        await nodes.wait_online(["n1", "n2", "n3", "n4"])
        for node in nodes.running.values():
            assert node.view.master == "n1"
            assert node.view.epoch > saved.epoch
            assert node.view.masters == saved.masters
            assert all(member.incarnation > 1000 for member in node.view.members.values())

    run(scenario)


def test_a_minority_that_restarts_waits_for_the_others(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        first, *_ = await nodes.launch(4, expect=4)
        second = first.view.masters[1]
        await nodes.kill_all()
        alone = type(first)(nodes.root, second, at=nodes.places[second], expect=3)
        await alone.boot()
        starting = asyncio.ensure_future(alone.cls.start())
        with pytest.raises(Timeout):
            await alone.cls.wait_view(lambda view: bool(view.online), 1.0)
        assert {member.state for member in alone.view.members.values()} == {NodeState.OFFLINE}
        nodes.running[second] = alone
        others = [name for name in ("n2", "n3", "n4") if name != second]
        await asyncio.gather(*(nodes.add(name, same_place=True, expect=3) for name in others), starting)
        await nodes.wait_online(nodes.running)

    run(scenario)


def test_a_name_that_is_taken_is_refused(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Either comm does not hear the second of a name, or the master refuses it; the first is not disturbed."""

    async def scenario(nodes: Nodes) -> None:
        first, second = await nodes.launch(2)
        intruder = type(first)(tmp_path_factory.mktemp("other"), "n2", first.contact)
        await intruder.boot(Patience(join_s=1.0))
        with pytest.raises((AlreadyExists, Unavailable), match="choose another"):
            await intruder.cls.start()
        await intruder.stop()
        await nodes.wait_online(["n1", "n2"])
        assert first.view.members["n2"].address == second.endpoint.address
        assert second.fatal == []

    run(scenario)


def test_a_node_that_has_lost_its_disk_is_another_one(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever its incarnation: the former may have voted, and acknowledged what only it holds."""

    async def scenario(nodes: Nodes) -> None:
        first, _, third = await nodes.launch(3)
        before = third.view.members["n3"]
        await nodes.kill("n3")
        await nodes.wait_online(["n1", "n2"])
        other = type(first)(tmp_path_factory.mktemp("other"), "n3", first.contact)
        await other.boot()
        await other.stop()
        await other.boot()
        assert other.endpoint.incarnation > before.incarnation
        with pytest.raises(AlreadyExists, match="lost its data directory: choose another name"):
            await other.cls.start()
        await other.stop()
        assert first.view.members["n3"].disk == before.disk
        await nodes.add("n3")
        await nodes.wait_online(["n1", "n2", "n3"])
        assert len({member.disk for member in first.view.members.values()}) == 3

    run(scenario)


def test_nobody_at_the_address_is_one_clear_error(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        first = await nodes.add("n1")
        (address,) = first.contact
        await nodes.kill("n1")
        lonely = type(first)(nodes.root, "n2", [address])
        await lonely.boot(Patience(first_s=0.05, answer_s=0.1, join_s=0.5))
        with pytest.raises(Unavailable, match=f"found no cluster to join at {address}"):
            await lonely.cls.start()
        await lonely.stop()

    run(scenario)


def test_leaving_gives_everything_away_first(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(4)
        leaver, told = nodes.running["n2"], []

        async def drain() -> None:
            told.append((leaver.view.members["n2"].state, leaver.view.online))

        leaver.cls.drains.append(drain)
        await leaver.cls.leave()
        assert told == [(NodeState.LEAVING, ("n1", "n3", "n4"))]
        others = [nodes.running[name] for name in ("n1", "n3", "n4")]
        for node in others:
            await node.wait(lambda view: view.members["n2"].state is NodeState.LEFT)
            assert node.cls.address("n2") is None
            assert len(node.view.masters) == 3

    run(scenario)


def test_the_master_hands_over_when_it_leaves_or_disconnects(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(4, expect=4)
        await nodes.running["n1"].cls.leave()
        assert nodes.running["n1"].cls.group.leader != "n1", "the lead first, then the seat"
        left = nodes.running["n2"]
        view = await left.wait(lambda view: view.members["n1"].state is NodeState.LEFT)
        assert sorted(view.masters) == ["n2", "n3", "n4"]
        await nodes.kill("n1")
        await nodes.wait_online(["n2", "n3", "n4"])
        await nodes.wait_masters()
        assert sorted(left.cls.group.configuration.voters) == ["n2", "n3", "n4"]
        second = next(node for node in nodes.running.values() if node.cls.is_master)
        await second.cls.disconnect()
        assert not second.cls.is_master
        for node in nodes.running.values():
            await node.wait(lambda view: view.master not in (None, "n1", second.name))
            assert second.name in node.view.masters, "its seat is kept"
        await nodes.kill(second.name)
        for node in nodes.running.values():
            await node.wait(lambda view: view.members[second.name].state is NodeState.OFFLINE)

    run(scenario)


def test_of_two_the_master_leaves_and_the_other_leads(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        first, second = await nodes.launch(2)
        assert first.view.masters == ("n1",)
        await first.cls.leave()
        await second.wait(lambda view: view.members["n1"].state is NodeState.LEFT)
        assert second.cls.is_master
        assert second.cls.group.configuration.voters == ("n2",)
        assert await second.cls.set_placement(REVERSED) == second.view.epoch
        assert first.fatal == []

    run(scenario)


def test_a_master_that_is_gone_for_long_is_replaced(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(4, expect=4, seat_timeout_s=0.2)
        gone, *rest = sorted(name for name in nodes.running["n1"].view.masters if name != "n1")
        (spare,) = [name for name in nodes.running if name not in nodes.running["n1"].view.masters]
        await nodes.kill(gone)
        for node in nodes.running.values():
            await node.wait(lambda view: sorted(view.masters) == sorted(["n1", *rest, spare]))
        await nodes.wait_masters()
        back = await nodes.add(gone, seat_timeout_s=0.2)
        await nodes.wait_online(["n1", "n2", "n3", "n4"])
        assert gone not in back.view.masters
        # The replaced one counts no more: two of the three who vote now go on without n1.
        await nodes.kill("n1")
        await nodes.wait_online([gone, *rest, spare])

    run(scenario)


def test_who_has_left_and_is_started_again_is_a_new_member(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(3)
        before = nodes.running["n1"].view.members["n2"]
        await nodes.running["n2"].cls.leave()
        await nodes.kill("n2")
        back = await nodes.add("n2")
        await nodes.wait_online(["n1", "n2", "n3"])
        await nodes.wait_masters()
        member = back.view.members["n2"]
        assert member.joined > before.joined
        assert member.disk == before.disk

    run(scenario)


def test_the_last_one_online_cannot_leave(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        (only,) = await nodes.launch(1)
        with pytest.raises(BadRequest, match="stop it instead"):
            await only.cls.leave()

    run(scenario)


def test_a_placement_written_by_a_student_rules_everywhere(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(3)
        before = [nodes.running["n1"].view.resolve(b"%d" % k).owners for k in range(20)]
        epoch = await nodes.running["n3"].cls.set_placement(REVERSED)
        late = await nodes.add("n4")
        for node in nodes.running.values():
            await node.wait(lambda view: view.epoch >= epoch)
            assert node.view.policy == REVERSED
            assert {"slot": "placement", "name": "Reversed"} in node.published("policy_installed")
        assert late.view.master == "n1"
        with pytest.raises(PolicyError, match="line 2"):
            await nodes.running["n2"].cls.set_placement(PolicySource("Bad", "\nclass Bad(Missing): pass\n"))
        assert nodes.running["n2"].view.policy == REVERSED
        await nodes.running["n2"].cls.set_placement(None)
        assert nodes.running["n2"].view.policy is None
        await nodes.running["n1"].wait(lambda view: view.policy is None)
        assert before

    run(scenario)


def test_a_cluster_may_start_with_a_policy(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.add("n1", policy=REVERSED)
        second = await nodes.add("n2")
        assert second.view.policy == REVERSED

    run(scenario)


def cut(nodes: Nodes, one: list[str], other: list[str], *, drop: float) -> None:
    for here, there in ((one, other), (other, one)):
        for name in here:
            for peer in there:
                if drop:
                    nodes.running[name].endpoint.links.set(peer, drop=drop)
                else:
                    nodes.running[name].endpoint.links.clear(peer)


async def probes_made(node: Node, count: int) -> None:
    """Return when the node has pinged somebody ``count`` more times."""
    done = asyncio.Event()
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += event.kind == "send" and event.data["function"] == "ping"
        if seen >= count:
            done.set()

    unsubscribe = node.env.events.subscribe(watch)
    await done.wait()
    unsubscribe()


@pytest.mark.parametrize("minority", [["n1"], ["n4", "n5"], ["n1", "n5"]])
def test_a_partition_the_majority_goes_on_and_all_meet_again(run: Run, minority: list[str]) -> None:
    async def scenario(nodes: Nodes) -> None:
        cluster = await nodes.launch(5)
        majority = [node.name for node in cluster if node.name not in minority]
        before = nodes.running["n1"].view
        cut(nodes, minority, majority, drop=1.0)
        for name in majority:
            await nodes.running[name].wait(lambda view: view.online == tuple(majority))
        for name in minority:
            # Cut off, it expels nobody.
            assert nodes.running[name].view.version == before.version
        cut(nodes, minority, majority, drop=0.0)
        await nodes.wait_online(before.online)
        for name in minority:
            assert nodes.running[name].fatal == []

    run(scenario)


def test_a_node_that_was_paused_is_expelled_and_comes_back(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(4)
        paused, watched = nodes.running["n4"], []
        paused.cls.watchers.on(NodeState.ONLINE, lambda change, view: watched.append(change.name))
        paused.endpoint.pause()
        for name in ("n1", "n2", "n3"):
            await nodes.running[name].wait(lambda view: "n4" not in view.online)
        paused.endpoint.resume()
        await nodes.wait_online(["n1", "n2", "n3", "n4"])
        assert "n4" in watched
        assert paused.view.members["n4"].incarnation > paused.endpoint.incarnation
        assert len(paused.published("node_ready")) == 1

    run(scenario)


def test_lossy_links_expel_nobody(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        cluster = await nodes.launch(5)
        for node in cluster:
            for peer in cluster:
                if peer is not node:
                    node.endpoint.links.set(peer.name, "out", drop=0.1, delay_s=0.001, jitter_s=0.005, duplicate=0.1)
        for number in range(6):
            await nodes.running["n2"].cls.set_placement(REVERSED if number % 2 == 0 else None)
        await asyncio.gather(*(probes_made(node, 10) for node in cluster))
        await nodes.wait_online([node.name for node in cluster])
        for node in cluster:
            assert not [e for e in node.published("member") if e["state"] == "offline"]

    run(scenario)


def test_watchers_see_every_change_in_order(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        (first,) = await nodes.launch(1)
        seen: list[tuple[int, int]] = []
        changed: list[str] = []

        def watcher(old: View, new: View, changes: list[MemberChange]) -> None:
            assert first.view is new
            seen.append((old.epoch, new.epoch))
            changed.extend(f"{change.name} {change.new.state}" for change in changes if change.state_changed)
            assert all(change.state_changed or change.old.rings != change.new.rings for change in changes)

        first.cls.watchers.watch(watcher)
        for name in ("n2", "n3"):
            await nodes.add(name)
        await nodes.wait_online(["n1", "n2", "n3"])
        await nodes.kill("n3")
        await nodes.wait_online(["n1", "n2"])
        assert all(new == old + 1 for old, new in seen)
        assert [new for _, new in seen] == list(range(seen[0][1], seen[-1][1] + 1))
        assert changed == ["n2 joining", "n2 online", "n3 joining", "n3 online", "n3 offline"]

    run(scenario)


def test_requests_that_make_no_sense_are_answered(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        first, second = await nodes.launch(2)
        ask = second.endpoint.call
        with pytest.raises(BadRequest, match="not an address"):
            await ask("n1", "cls", "join", ["x"], 0, 1, 1.0, "")
        with pytest.raises(BadRequest, match="weight"):
            await ask("n1", "cls", "join", Address("127.0.0.1", 1, 2).to_wire(), 0, 2000, -1.0, "")
        with pytest.raises(BadRequest, match="allowed are disconnecting, leaving, left"):
            await ask("n1", "cls", "depart", 1, "asleep")
        with pytest.raises(BadRequest, match="not a policy"):
            await ask("n1", "cls", "install_placement", {"name": 1})
        version = first.view.version
        for items in ([1], [[1, 2]], [[2, [1, 0, 1, "m", [], None, None, []], ["x"]]], [[1, None, [1]]]):
            second.endpoint.cast("n1", "cls", "event", items)
        second.endpoint.cast("n1", "cls", "ping", 1, 0, [["n2", "dead", 1]])
        reply = await ask("n1", "cls", "state", 0)
        assert View.from_wire(reply.value["view"]).version == version
        assert reply.value["master"] == "n1"
        with pytest.raises(Timeout, match="n1 online, n2 online"):
            await first.cls.wait_view(lambda view: False, 0.01)
        with pytest.raises(NotFound):
            first.view.resolve(b"key", "no such ring")

    run(scenario)


def test_stopping_ends_who_waits(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        (only,) = await nodes.launch(1)
        waiting = asyncio.ensure_future(only.cls.wait_view(lambda view: False, 60.0))
        await asyncio.sleep(0)
        await nodes.stop()
        with pytest.raises(Unavailable):
            await waiting

    run(scenario)


def test_a_redirected_join_is_answered_by_the_master(run: Run) -> None:
    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(3)
        second = nodes.running["n2"]
        joiner = type(second)(nodes.root, "n9", second.contact)
        await joiner.start()
        nodes.running["n9"] = joiner
        await nodes.wait_online(["n1", "n2", "n3", "n9"])
        assert any(e["frame"] == "redirect" and e["function"] == "join" for e in second.published("send"))
        assert any(e["from"] == "n1" and e["frame"] == "response" for e in joiner.published("recv"))

    run(scenario)


def test_a_last_call_protects_who_answers(run: Run) -> None:
    """A node that the master's detector took for dead, and that answers the last call, stays."""

    async def scenario(nodes: Nodes) -> None:
        await nodes.launch(3)
        first = nodes.running["n1"]
        version = first.view.version
        first.cls._detection.swim._peers["n3"].status = "dead"
        first.cls._leader.wake()
        with pytest.raises(GoStoreError):
            await first.cls.wait_view(lambda view: view.version != version, 0.5)
        assert first.cls.suspected() == []

    run(scenario)

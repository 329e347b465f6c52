from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.cluster import DEFAULT_POLICY, MASTERS_RING, NodeState, RingCache, RingSpec, View
from gostore.core.address import Address
from gostore.core.errors import AlreadyExists, BadRequest, Fenced, NotFound
from gostore.core.slots import PolicySource
from gostore.services.cls.masters import (
    Dead,
    Depart,
    Install,
    Join,
    Master,
    NodeEvent,
    Request,
    acting_master,
    apply,
    birth,
    changes_of,
    comeback,
    fits,
    has_quorum,
    leader_of_rebirth,
    rebirth,
)

ONLINE, OFFLINE, LEAVING, LEFT = NodeState.ONLINE, NodeState.OFFLINE, NodeState.LEAVING, NodeState.LEFT
JOINING, CONNECTING, DISCONNECTING = NodeState.JOINING, NodeState.CONNECTING, NodeState.DISCONNECTING
RINGS = {"global": RingSpec(3, 8), "masters": RingSpec(3, 8)}


def join(number: int, incarnation: int = 1, port: int | None = None, weight: float = 1.0) -> Join:
    address = Address("127.0.0.1", port or 1000 + number, 2000 + number)
    return Join(name=f"n{number}", address=address, rest_port=0, incarnation=incarnation, weight=weight)


class Cluster:
    """A master's decisions, applied at once. ``events``: all of them."""

    def __init__(self, expect: int = 1) -> None:
        self.view = View("test", 0, {}, RINGS)
        self.events: list[NodeEvent] = []
        self.now_s = 100.0
        self.master = Master("n1", expect=expect, expect_timeout_s=10.0, masters_max=3)
        self.commit(birth(self.view, join(1), None))
        self.settle()

    def commit(self, event: NodeEvent) -> None:
        self.view = apply(self.view, event)
        self.events.append(event)

    def ask(self, *requests: Request, dead: tuple[str, ...] = ()) -> list[Exception | None]:
        plan = self.master.plan(self.view, requests, self.now_s, dead)
        if plan.event is not None:
            self.commit(plan.event)
        return list(plan.refusals)

    def settle(self) -> None:
        while (plan := self.master.plan(self.view, (), self.now_s)).event is not None:
            self.commit(plan.event)

    def do(self, *requests: Request) -> None:
        assert self.ask(*requests) == [None] * len(requests)
        self.settle()

    def states(self) -> dict[str, NodeState]:
        return {name: member.state for name, member in self.view.members.items()}


def cluster_of(count: int, expect: int = 1) -> Cluster:
    cluster = Cluster(expect)
    for number in range(2, count + 1):
        cluster.do(join(number))
    return cluster


def test_a_single_node_is_online_at_once() -> None:
    cluster = Cluster()
    assert cluster.states() == {"n1": ONLINE}
    assert cluster.view.epoch == 2
    assert cluster.view.master == "n1"


def test_the_first_three_that_join_are_masters() -> None:
    cluster = cluster_of(5)
    assert cluster.view.masters == ("n1", "n2", "n3")
    assert cluster.view.online == ("n1", "n2", "n3", "n4", "n5")


def test_nobody_is_online_before_the_expected_have_come_and_then_all_at_once() -> None:
    cluster = Cluster(expect=4)
    for number in (2, 3):
        cluster.do(join(number))
        assert cluster.view.online == ()
        assert cluster.view.master == "n1", "who leads while the cluster is being born"
    assert cluster.ask(join(4)) == [None]
    assert cluster.view.online == ()
    before = cluster.view.epoch
    cluster.settle()
    assert cluster.view.epoch == before + 1
    assert cluster.view.online == ("n1", "n2", "n3", "n4")
    cluster.do(join(5))
    assert "n5" in cluster.view.online


def test_after_the_wait_it_goes_on_with_those_who_came() -> None:
    cluster = Cluster(expect=4)
    cluster.do(join(2))
    due_s = cluster.master.due_s(cluster.view)
    assert due_s == 110.0
    cluster.now_s = due_s - 0.001
    cluster.settle()
    assert cluster.view.online == ()
    cluster.now_s = due_s
    cluster.settle()
    assert cluster.view.online == ("n1", "n2")
    assert cluster.master.due_s(cluster.view) is None


def test_a_joiner_that_died_is_not_counted_and_not_brought_online() -> None:
    cluster = Cluster(expect=2)
    assert cluster.ask(join(2)) == [None]
    assert cluster.ask(dead=("n2",)) == []
    assert cluster.view.online == ()
    cluster.do(Dead("n2", 1))
    assert cluster.states() == {"n1": JOINING, "n2": OFFLINE}


def test_many_joins_are_one_event() -> None:
    cluster = cluster_of(1)
    before = cluster.view.epoch
    cluster.do(*(join(number) for number in range(2, 60)))
    assert cluster.view.epoch == before + 2
    assert len(cluster.view.online) == 59
    assert len(cluster.view.masters) == 3


def test_nobody_is_brought_online_twice() -> None:
    cluster = cluster_of(3)
    before = cluster.view
    cluster.do(join(2))
    assert cluster.view is before, "asked twice, nothing changes"
    assert cluster.ask(join(4), join(4)) == [None, None]
    cluster.settle()
    times = [m.name for event in cluster.events for m in event.members if m.state is ONLINE]
    assert sorted(times) == ["n1", "n2", "n3", "n4"]


@pytest.mark.parametrize("state", [ONLINE, OFFLINE])
def test_another_node_of_the_same_name_is_refused(state: NodeState) -> None:
    cluster = cluster_of(3)
    if state is OFFLINE:
        cluster.do(Dead("n2", 1))
    (refusal,) = cluster.ask(join(2, port=7777))
    assert isinstance(refusal, AlreadyExists)
    assert "choose another name" in str(refusal)
    where = cluster.view.members["n2"].address.to_wire()
    assert refusal.details == {"incarnation": 1, "live": state is ONLINE, "address": where}


def test_a_restarted_node_is_back_with_its_seat_and_seniority() -> None:
    cluster = cluster_of(4)
    cluster.do(Dead("n2", 1))
    assert cluster.states()["n2"] is OFFLINE
    cluster.do(join(2, incarnation=1001, port=7777))
    member = cluster.view.members["n2"]
    assert (member.state, member.incarnation, member.address.tcp_port) == (ONLINE, 1001, 7777)
    assert cluster.view.masters == ("n1", "n2", "n3")


def test_a_node_that_restarts_before_it_is_missed_goes_through_offline() -> None:
    cluster = cluster_of(3)
    before, number = cluster.view, len(cluster.events)
    cluster.do(join(3, incarnation=1001, port=7777))
    steps = []
    for event in cluster.events[number:]:
        steps += [change.new.state for change in changes_of(before, event)]
        before = apply(before, event)
    assert steps == [OFFLINE, CONNECTING, ONLINE]


def test_the_death_of_an_earlier_life_is_ignored() -> None:
    cluster = cluster_of(3)
    cluster.do(join(3, incarnation=1001))
    before = cluster.view
    cluster.do(Dead("n3", 1), Dead("stranger", 9))
    assert cluster.view is before
    cluster.do(Dead("n3", 1002))
    assert cluster.view.members["n3"].incarnation == 1002
    (refusal,) = cluster.ask(join(3, incarnation=1002))
    assert isinstance(refusal, AlreadyExists), "it must come back above the incarnation that died"


def test_leaving_and_coming_again_as_a_new_node() -> None:
    cluster = cluster_of(4)
    cluster.do(Depart("n2", 1, LEAVING))
    assert cluster.view.online == ("n1", "n3", "n4")
    assert cluster.view.masters == ("n1", "n3", "n4"), "its seat goes to the next senior"
    cluster.do(Depart("n2", 1, LEFT))
    assert cluster.states()["n2"] is LEFT
    cluster.do(Depart("n2", 1, LEFT))
    cluster.do(join(2, incarnation=1001))
    assert cluster.view.members["n2"].joined > cluster.view.members["n4"].joined
    assert MASTERS_RING not in cluster.view.members["n2"].rings


def test_a_departure_that_cannot_be_is_refused() -> None:
    cluster = cluster_of(2)
    assert isinstance(cluster.ask(Depart("n9", 1, LEAVING))[0], NotFound)
    assert isinstance(cluster.ask(Depart("n2", 0, LEAVING))[0], Fenced)
    assert isinstance(cluster.ask(Depart("n2", 1, LEFT))[0], BadRequest)
    first, second = cluster.ask(Depart("n1", 1, LEAVING), Depart("n2", 1, LEAVING))
    assert first is None
    assert isinstance(second, BadRequest), "decided together, the later sees what the earlier changed"
    assert "stop it instead" in str(second)


def test_who_disconnects_is_off_the_rings_and_hands_over() -> None:
    cluster = cluster_of(3)
    cluster.do(Depart("n1", 1, DISCONNECTING))
    assert cluster.view.master == "n2"
    assert cluster.view.masters[0] == "n1", "its seat is kept"


def test_a_policy_is_an_event() -> None:
    cluster = cluster_of(2)
    policy = PolicySource("P", "class P: pass")
    before = cluster.view.epoch
    cluster.do(Install(policy))
    assert (cluster.view.epoch, cluster.view.policy) == (before + 1, policy)
    cluster.do(join(3))
    assert cluster.view.policy == policy
    cluster.do(Install(DEFAULT_POLICY))
    assert cluster.view.policy is None


def test_the_acting_master_is_the_first_not_found_dead() -> None:
    view = cluster_of(5).view
    assert acting_master(view) == "n1" == view.master
    assert acting_master(view, {"n1": 1}) == "n2"
    assert acting_master(view, {"n1": 1, "n2": 1, "n3": 1}) is None
    young = Cluster(expect=3).view
    assert acting_master(young) == "n1"
    assert acting_master(young, ["n1"]) is None


@pytest.mark.parametrize(
    ("online", "alive", "quorum"),
    [
        (5, "n1 n2 n3", True),
        (5, "n3 n4 n5", True),
        (5, "n1 n2", False),
        (4, "n1 n2", True),  # half with the most senior
        (4, "n3 n4", False),
        (2, "n1", True),
        (2, "n2", False),
        (1, "n1", True),
        (1, "", False),
    ],
)
def test_a_quorum(online: int, alive: str, quorum: bool) -> None:
    assert has_quorum(cluster_of(online).view, alive.split()) is quorum


@given(st.integers(1, 9), st.randoms(use_true_random=False))
def test_of_two_sides_at_most_one_has_a_quorum(count: int, rng: random.Random) -> None:
    view = cluster_of(count).view
    side = [name for name in view.online if rng.random() < 0.5]
    other = [name for name in view.online if name not in side]
    assert not (has_quorum(view, side) and has_quorum(view, other))
    assert has_quorum(view, side) or has_quorum(view, other)


def test_after_a_restart_of_all_the_saved_master_leads_again() -> None:
    view = cluster_of(5).view
    assert leader_of_rebirth(view, ["n1", "n2"]) is None
    assert leader_of_rebirth(view, ["n1", "n2", "n5"]) == "n1"
    assert leader_of_rebirth(view, ["n2", "n4", "n5"]) == "n2"
    unborn = Cluster(expect=9)
    unborn.do(join(2), join(3))
    assert leader_of_rebirth(unborn.view, ["n1"]) is None, "the others may know that it was born"
    assert leader_of_rebirth(unborn.view, ["n1", "n3"]) == "n1"
    event = rebirth(view, join(1, incarnation=1001))
    born = apply(view, event)
    assert born.epoch == view.epoch + 1
    assert {name: m.state for name, m in born.members.items()} == {
        "n1": CONNECTING, **dict.fromkeys(("n2", "n3", "n4", "n5"), OFFLINE)
    }  # fmt: skip
    assert born.master == "n1"


def test_a_master_that_restarted_unmissed_is_back_at_once() -> None:
    view = cluster_of(3).view
    back = apply(view, comeback(view, join(1, incarnation=1001, port=7777)))
    assert back.master == "n1"
    assert back.online == view.online
    assert back.members["n1"].incarnation == 1001


def test_an_event_continues_one_view_only() -> None:
    cluster = cluster_of(3)
    event = cluster.events[-1]
    assert not fits(cluster.view, event)
    with pytest.raises(Fenced):
        apply(cluster.view, event)
    other = NodeEvent(cluster.view.epoch + 1, cluster.view.digest + 1, "n1", ())
    assert not fits(cluster.view, other), "the same number, another history"


def test_events_survive_the_wire_and_keep_their_digest() -> None:
    for event in cluster_of(4).events:
        again = NodeEvent.from_wire(event.to_wire())
        assert again == event
        assert again.digest == event.digest
    policed = NodeEvent(3, 2, "n1", (), PolicySource("P", "x"))
    assert NodeEvent.from_wire(policed.to_wire()) == policed


@pytest.mark.parametrize("wire", [None, [], [0, 0, "m", [], None], [1, -1, "m", [], None], [1, 0, "m", [1], None]])
def test_refuses_what_is_no_event(wire: object) -> None:
    with pytest.raises(ValueError):
        NodeEvent.from_wire(wire)


requests = st.one_of(
    st.builds(join, st.integers(1, 6), st.integers(1, 5), st.sampled_from([None, 7777])),
    st.builds(Dead, st.sampled_from([f"n{i}" for i in range(1, 7)]), st.integers(1, 5)),
    st.builds(
        Depart,
        st.sampled_from([f"n{i}" for i in range(1, 7)]),
        st.integers(1, 5),
        st.sampled_from([DISCONNECTING, LEAVING, LEFT]),
    ),
    st.builds(Install, st.sampled_from([PolicySource("P", "x"), DEFAULT_POLICY])),
)


@settings(max_examples=200)
@given(st.lists(st.lists(requests, max_size=4), max_size=12), st.integers(1, 3))
def test_whatever_is_asked_followers_end_where_the_master_is(rounds: list[list[Request]], expect: int) -> None:
    """All take the same steps, every step is legal, incarnations never fall, and seats are bounded."""
    cluster = Cluster(expect)
    for batch in rounds:
        cluster.ask(*batch)
        cluster.settle()
    follower = View("test", 0, {}, RINGS, cache=RingCache())
    for event in cluster.events:
        changes = changes_of(follower, event)
        assert len(changes) == len(event.members), "the master proposes nothing that is not taken"
        new = apply(follower, NodeEvent.from_wire(event.to_wire()))
        for name, member in follower.members.items():
            assert new.members[name].incarnation >= member.incarnation
        assert sum(MASTERS_RING in m.rings for m in new.members.values()) <= 3
        follower = new
    assert follower == cluster.view
    assert follower.version == cluster.view.version

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.cluster import DEFAULT_POLICY, MASTERS_RING, NodeState, RingCache, RingSpec, View, found, shard_key
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
    apply,
    changes_of,
    fits,
    next_group,
)

ONLINE, OFFLINE, LEAVING, LEFT = NodeState.ONLINE, NodeState.OFFLINE, NodeState.LEAVING, NodeState.LEFT
JOINING, CONNECTING, DISCONNECTING = NodeState.JOINING, NodeState.CONNECTING, NodeState.DISCONNECTING
RINGS = {"global": RingSpec(3, 8), "masters": RingSpec(3, 8)}


def join(number: int, incarnation: int = 1, port: int | None = None, weight: float = 1.0) -> Join:
    address = Address("127.0.0.1", port or 1000 + number, 2000 + number)
    return Join(name=f"n{number}", address=address, rest_port=0, incarnation=incarnation, weight=weight)


class Cluster:
    """A master's decisions, applied at once. ``events``: all of them."""

    def __init__(self, expect: int = 1, masters_max: int = 3, policy: PolicySource | None = None) -> None:
        self.view = View("test", 0, {}, RINGS)
        self.events: list[NodeEvent] = []
        self.now_s = 100.0
        self.term = 1
        self.seated = True
        self.policy = policy
        self.expect, self.masters_max = expect, masters_max
        self.lead("n1")
        self.do(join(1))

    def lead(self, name: str) -> None:
        self.master = Master(
            name,
            expect=self.expect,
            expect_timeout_s=10.0,
            masters_max=self.masters_max,
            seat_timeout_s=30.0,
            found=lambda view: found(view, 4),
        )

    def commit(self, event: NodeEvent) -> None:
        self.view = apply(self.view, event)
        self.events.append(event)

    def ask(self, *requests: Request, dead: tuple[str, ...] = ()) -> list[Exception | None]:
        plan = self.master.plan(
            self.view, self.term, requests, self.now_s, dead=dead, seated=self.seated, policy=self.policy
        )
        if plan.event is not None:
            self.commit(plan.event)
        return list(plan.refusals)

    def settle(self) -> None:
        before = -1
        while before != self.view.epoch:
            before = self.view.epoch
            self.ask()

    def due_s(self) -> float | None:
        return self.master.due_s(self.view, self.now_s)

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
    due_s = cluster.due_s()
    assert due_s == 110.0
    cluster.now_s = due_s - 0.001
    cluster.settle()
    assert cluster.view.online == ()
    cluster.now_s = due_s
    cluster.settle()
    assert cluster.view.online == ("n1", "n2")
    assert cluster.due_s() is None


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
    times, view = [], View("test", 0, {}, RINGS)
    for event in cluster.events:
        times += [step.name for step in changes_of(view, event) if step.state_changed and step.new.online]
        view = apply(view, event)
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


def test_who_disconnects_is_off_the_rings_and_keeps_its_seat() -> None:
    cluster = cluster_of(3)
    cluster.do(Depart("n1", 1, DISCONNECTING))
    assert cluster.view.online == ("n2", "n3")
    assert cluster.view.masters[0] == "n1"


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


def test_a_new_leader_says_so_first() -> None:
    cluster = cluster_of(3)
    before = cluster.view
    assert (before.master, before.term) == ("n1", 1)
    cluster.settle()
    assert cluster.view is before, "who leads still has nothing to say"
    cluster.term = 4
    cluster.lead("n2")
    cluster.settle()
    assert (cluster.view.master, cluster.view.term, cluster.view.epoch) == ("n2", 4, before.epoch + 1)
    assert cluster.view.members == before.members


def test_what_begins_a_cluster_is_in_its_first_event() -> None:
    policy = PolicySource("P", "class P: pass")
    cluster = Cluster(policy=policy)
    first = cluster.events[0]
    assert (first.epoch, first.previous, first.policy, first.rings) == (1, 0, policy, RINGS)
    assert all(event.rings is None and event.policy is None for event in cluster.events[1:])
    other = View("test", 0, {}, {"global": RingSpec(1, 1)})
    for event in cluster.events:
        other = apply(other, event)
    assert other.rings == RINGS, "the rings are the founder's, whatever one's own configuration says"


def test_the_founders_are_the_owners_of_the_first_view_and_stay() -> None:
    cluster = Cluster(expect=4)
    cluster.do(join(2), join(3))
    assert cluster.view.founders == ()
    cluster.do(join(4))
    founders = cluster.view.founders
    assert founders == tuple(cluster.view.ring().owners(shard_key(shard)) for shard in range(4))
    assert all(len(names) == 3 for names in founders)
    cluster.do(join(5))
    cluster.do(Dead("n1", 1))
    assert cluster.view.founders == founders
    assert sum(bool(event.founders) for event in cluster.events) == 1


def test_a_placement_that_fails_founds_by_the_default() -> None:
    bad = PolicySource("Bad", "class Bad:\n    def __init__(self, *arguments): raise ValueError('bad')\n")
    good, failing = Cluster(), Cluster(policy=bad)
    assert failing.view.founders == good.view.founders != ()


def test_the_first_are_online_when_the_masters_are() -> None:
    """The cluster survives the loss of a master from its first moment on; but it does not wait for ever."""
    for waits in (True, False):
        cluster = Cluster(expect=3)
        cluster.seated = False
        cluster.do(join(2), join(3))
        assert cluster.view.online == ()
        if waits:
            cluster.now_s = cluster.due_s() or 0.0
        else:
            cluster.seated = True
        cluster.settle()
        assert cluster.view.online == ("n1", "n2", "n3")
        cluster.seated = False
        cluster.do(join(4))
        assert "n4" in cluster.view.online, "later ones do not wait"


def test_the_group_does_not_follow_the_seats_before_the_expected_are_here() -> None:
    cluster = Cluster(expect=3)
    cluster.do(join(2))
    assert not cluster.master.may_seat(cluster.view)
    cluster.seated = False
    cluster.do(join(3))
    assert cluster.master.may_seat(cluster.view)
    cluster.seated = True
    cluster.settle()
    cluster.do(Dead("n2", 1))
    assert cluster.master.may_seat(cluster.view), "later they follow at once"


@pytest.mark.parametrize(
    ("members", "masters_max", "seats"),
    [(1, 5, 1), (2, 5, 1), (3, 5, 3), (4, 5, 3), (5, 5, 5), (9, 5, 5), (9, 4, 3), (9, 3, 3), (9, 2, 1), (9, 1, 1)],
)
def test_seats_are_an_odd_number(members: int, masters_max: int, seats: int) -> None:
    cluster = Cluster(masters_max=masters_max)
    for number in range(2, members + 1):
        cluster.do(join(number))
    assert cluster.view.masters == tuple(f"n{number}" for number in range(1, seats + 1))


def test_a_master_that_is_gone_for_long_gives_its_seat_to_somebody_who_is_here() -> None:
    cluster = cluster_of(4)
    cluster.do(Dead("n2", 1))
    assert cluster.due_s() == 130.0
    cluster.now_s = 129.0
    cluster.settle()
    assert cluster.view.masters == ("n1", "n2", "n3")
    cluster.now_s = 130.0
    cluster.settle()
    assert cluster.view.masters == ("n1", "n3", "n4")
    assert cluster.due_s() is None
    cluster.do(join(2, incarnation=1001))
    assert cluster.view.masters == ("n1", "n3", "n4"), "who holds a seat keeps it"


def test_a_seat_that_nobody_else_can_take_is_kept() -> None:
    cluster = cluster_of(3)
    cluster.do(Dead("n2", 1))
    cluster.now_s = 1000.0
    before = cluster.view
    cluster.settle()
    assert cluster.view is before
    assert cluster.due_s() is None
    cluster.do(join(4))
    assert cluster.view.masters == ("n1", "n3", "n4")


def test_a_master_that_is_back_in_time_keeps_its_seat() -> None:
    cluster = cluster_of(4)
    cluster.do(Dead("n2", 1))
    cluster.now_s = 129.0
    cluster.do(join(2, incarnation=1001))
    cluster.do(Dead("n2", 1001))
    cluster.now_s = 131.0
    cluster.settle()
    assert "n2" in cluster.view.masters, "it is offline for two seconds"


@given(st.integers(1, 7), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_group_comes_to_the_seats_in_steps_that_raft_allows(
    count: int, masters_max: int, rng: random.Random
) -> None:
    cluster = Cluster(masters_max=masters_max)
    for number in range(2, count + 1):
        cluster.do(join(number))
    view = cluster.view
    voters: tuple[str, ...] = tuple(rng.sample(list(view.members), rng.randint(1, count)))
    learners = tuple(name for name in rng.sample(list(view.members), rng.randint(0, count)) if name not in voters)
    steps = 0
    while (step := next_group(view, voters, learners, ())) is not None:
        steps += 1
        assert steps <= 3
        assert step[0]
        assert all(name in voters or name in learners for name in step[0]), "it learns before it votes"
        assert not set(step[0]) & set(step[1])
        voters, learners = step
    assert sorted(voters) == sorted(view.masters)
    assert learners == ()


def test_who_is_not_alive_is_not_taken_into_the_group() -> None:
    view = cluster_of(5).view
    assert next_group(view, ("n1",), (), ("n2",)) is None, "with n3 alone they were an even number"
    assert next_group(view, ("n1",), (), ()) == (("n1",), ("n2", "n3"))
    assert next_group(view, ("n1", "n2", "n3"), (), ("n2",)) is None, "who is in stays in"
    assert next_group(view, ("n1",), ("n2", "n3"), ()) == (("n1", "n2", "n3"), ())
    assert next_group(view, ("n1", "n2", "n3"), ("n4",), ()) == (("n1", "n2", "n3"), ())
    assert next_group(View("test", 0, {}, RINGS), ("n1",), (), ()) is None


def test_an_event_continues_one_view_only() -> None:
    cluster = cluster_of(3)
    event = cluster.events[-1]
    assert not fits(cluster.view, event)
    with pytest.raises(Fenced):
        apply(cluster.view, event)
    other = NodeEvent(cluster.view.epoch + 1, cluster.view.digest + 1, 1, "n1")
    assert not fits(cluster.view, other), "the same number, another history"


def test_events_survive_the_wire_and_keep_their_digest() -> None:
    for event in cluster_of(4).events:
        again = NodeEvent.from_wire(event.to_wire())
        assert again == event
        assert again.digest == event.digest
    policed = NodeEvent(3, 2, 1, "n1", (), PolicySource("P", "x"), RINGS, (("n1",), ()))
    assert NodeEvent.from_wire(policed.to_wire()) == policed
    digests = [NodeEvent(3, 2, term, name).digest for term in (1, 2) for name in ("n1", "n2")]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    "wire",
    [
        None,
        [],
        [0, 0, 1, "m", [], None, None, []],
        [1, -1, 1, "m", [], None, None, []],
        [1, 0, -1, "m", [], None, None, []],
        [1, 0, 1, "m", [1], None, None, []],
        [1, 0, 1, "m", [], None, {"global": [0, 0]}, []],
        [1, 0, 1, "m", [], None, None, ["n1"]],
    ],
)
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
        seats = sum(MASTERS_RING in m.rings for m in new.members.values())
        assert seats in (1, 3) or not new.online
        follower = new
    assert follower == cluster.view
    assert follower.version == cluster.view.version

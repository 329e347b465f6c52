from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.cluster.members import (
    ENTRY,
    LIVE,
    PRECEDENCE,
    TRANSITIONS,
    WAITING,
    WEIGHT_MAX,
    Member,
    MemberChange,
    NodeState,
    is_legal,
    merge,
)
from gostore.core.address import Address

ADDRESS = Address("127.0.0.1", 4001, 4002)

members = st.builds(
    Member,
    name=st.sampled_from(["a", "b", "node-3"]),
    address=st.builds(Address, st.just("10.0.0.1"), st.integers(0, 65_535), st.integers(0, 65_535)),
    rest_port=st.integers(0, 65_535),
    state=st.sampled_from(list(NodeState)),
    incarnation=st.integers(1, 5),
    rings=st.sampled_from([("global",), ("global", "masters"), ()]),
    weight=st.floats(0.1, WEIGHT_MAX),
    joined=st.integers(0, 1 << 40),
)


def member(state: NodeState, incarnation: int = 1) -> Member:
    return Member(name="a", address=ADDRESS, state=state, incarnation=incarnation)


@given(members)
def test_survives_the_wire(record: Member) -> None:
    assert Member.from_wire(record.to_wire()) == record


@given(st.one_of(st.none(), st.integers(), st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=9)))
def test_refuses_what_is_no_member(wire: object) -> None:
    with pytest.raises(ValueError):
        Member.from_wire(wire)


@pytest.mark.parametrize(
    ("field", "value"),
    [(3, "asleep"), (4, 0), (6, 0.0), (6, float("nan")), (6, 1e9), (2, 70_000), (1, ["h", 1]), (5, [1]), (0, "")],
)
def test_refuses_a_member_with_one_bad_field(field: int, value: object) -> None:
    wire = member(NodeState.ONLINE).to_wire()
    wire[field] = value
    with pytest.raises(ValueError):
        Member.from_wire(wire)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(NodeState, NodeState)))
def test_within_an_incarnation_the_state_only_moves_forward(old: NodeState, new: NodeState) -> None:
    legal = is_legal(member(old), member(new))
    assert legal == (new is old or new in TRANSITIONS[old])
    if legal and new is not old:
        assert PRECEDENCE[new] > PRECEDENCE[old]


@pytest.mark.parametrize("old", NodeState)
def test_a_higher_incarnation_comes_back_through_its_entry_state(old: NodeState) -> None:
    for new in NodeState:
        expected = new in (ENTRY[old], NodeState.OFFLINE, NodeState.LEFT)
        assert is_legal(member(old, 1), member(new, 2)) == expected
    assert ENTRY[old] is (NodeState.JOINING if old is NodeState.LEFT else NodeState.CONNECTING)


def test_a_stranger_may_only_join() -> None:
    assert [state for state in NodeState if is_legal(None, member(state))] == [NodeState.JOINING]


@given(members, members)
def test_an_older_incarnation_never_wins(one: Member, other: Member) -> None:
    kept = merge(one, other)
    assert kept is not None
    assert kept.incarnation >= one.incarnation
    if other.incarnation < one.incarnation:
        assert kept is one


def test_the_dead_do_not_rise_in_the_same_incarnation() -> None:
    """Gossip without incarnations would resurrect a node by an old 'online' record."""
    dead = member(NodeState.OFFLINE, 3)
    assert merge(dead, member(NodeState.ONLINE, 3)) is dead
    assert merge(dead, member(NodeState.ONLINE, 2)) is dead
    assert merge(dead, member(NodeState.CONNECTING, 4)) == member(NodeState.CONNECTING, 4)


def test_a_change_knows_whether_the_state_changed() -> None:
    online = member(NodeState.ONLINE)
    assert MemberChange(None, online).state_changed
    assert MemberChange(online, member(NodeState.ONLINE, 2)).state_changed, "another life"
    assert not MemberChange(online, online.to(NodeState.ONLINE, weight=2.0)).state_changed
    assert MemberChange(online, online.to(NodeState.OFFLINE)).name == "a"


def test_states_in_the_order_of_their_precedence() -> None:
    order = ["joining", "connecting", "online", "disconnecting", "leaving", "offline", "left"]
    assert sorted(NodeState, key=PRECEDENCE.__getitem__) == order
    assert len(dict.fromkeys(PRECEDENCE.values())) == len(NodeState)


def test_states_that_are_live_and_states_that_wait() -> None:
    assert {state for state in NodeState if member(state).live} == set(NodeState) - {NodeState.OFFLINE, NodeState.LEFT}
    assert [state for state in NodeState if member(state).online] == [NodeState.ONLINE]
    assert set(WAITING) == {NodeState.JOINING, NodeState.CONNECTING} < set(LIVE)


@pytest.mark.parametrize(
    ("field", "least", "most", "outside"),
    [
        ("rest_port", 0, 65_535, (-1, 65_536)),
        ("incarnation", 1, 1 << 62, (0, -1)),
        ("joined", 0, 1 << 62, (-1,)),
        ("weight", 1e-9, 64.0, (0.0, -1.0, 64.000001, float("inf"), float("-inf"), float("nan"))),
        ("name", "x", "y" * 60, ("",)),
    ],
)
def test_fields_at_their_bounds(field: str, least: object, most: object, outside: tuple[object, ...]) -> None:
    fields: dict[str, object] = {"name": "a", "address": ADDRESS}
    for value in (least, most):
        assert getattr(Member(**{**fields, field: value}), field) == value  # type: ignore[arg-type]
    for value in outside:
        with pytest.raises(ValueError, match=r"allowed|too small|needs a name"):
            Member(**{**fields, field: value})  # type: ignore[arg-type]


def test_a_member_by_default_joins_the_global_ring_with_the_ordinary_weight() -> None:
    record = Member(name="a", address=ADDRESS)
    assert record.to_wire() == ["a", ADDRESS.to_wire(), 0, "joining", 1, ["global"], 1.0, 0, ""]


def test_records_are_values() -> None:
    """They are shared between views: nobody may change one, equal ones are one to a set."""
    record = member(NodeState.ONLINE)
    with pytest.raises(FrozenInstanceError):
        record.weight = 2.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        MemberChange(None, record).old = record  # type: ignore[misc]
    assert len({record, member(NodeState.ONLINE), record.to(NodeState.LEFT)}) == 2
    with pytest.raises(TypeError):
        Member("a", ADDRESS)  # type: ignore[misc]


def test_incarnations_are_compared_as_numbers() -> None:
    """Also when they are large, and come from the network as another object each."""
    now = 1 << 40
    old = member(NodeState.ONLINE, now)
    assert is_legal(old, member(NodeState.OFFLINE, int(str(now))))
    assert not is_legal(old, member(NodeState.CONNECTING, int(str(now))))
    assert is_legal(old, member(NodeState.CONNECTING, now + 1))
    assert not is_legal(old, member(NodeState.OFFLINE, now - 1))
    assert not MemberChange(old, member(NodeState.ONLINE, int(str(now)))).state_changed
    assert MemberChange(old, member(NodeState.ONLINE, now - 1)).state_changed

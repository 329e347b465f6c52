"""Who should hold a shard, and how its replicas get there: one at a time, without a moment of fewer copies."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.cluster.members import Member, NodeState
from gostore.cluster.view import RingSpec, View
from gostore.consensus import Configuration
from gostore.core.address import Address
from gostore.services.db.moves import Move, next_move, plan

NAMES = ("a", "b", "c", "d", "e", "f", "g")


def view_of(replicas: int = 3, **states: NodeState) -> View:
    members = {name: Member(name=name, address=Address("0", 1, 1), state=state) for name, state in states.items()}
    return View("test", 1, members, {"global": RingSpec(replicas, 16)})


def test_a_voter_that_may_come_back_keeps_its_seat_where_nobody_else_can_take_it() -> None:
    online, offline = NodeState.ONLINE, NodeState.OFFLINE
    view = view_of(a=online, b=online, c=offline)
    assert plan(view, ("a", "b"), ("a", "b", "c")) == ("a", "b", "c")
    assert plan(view, ("a", "b"), ("c", "b")) == ("a", "b", "c")
    assert plan(view, ("a", "b"), ("a", "b")) == ("a", "b"), "who has no seat gets none while it is away"
    assert plan(view_of(a=online, b=online, c=online, d=offline), ("a", "b", "c"), ("a", "b", "d")) == ("a", "b", "c")
    for state in (NodeState.LEFT, NodeState.LEAVING):
        assert plan(view_of(a=online, b=online, c=state), ("a", "b"), ("a", "b", "c")) == ("a", "b")
    assert plan(view, ("a", "b"), ("a", "b", "unknown")) == ("a", "b")
    assert plan(view, (), ("b", "c")) == ("b", "c"), "the ring cannot be asked: everybody stays"


def move(
    voters: Sequence[str], learners: Sequence[str], planned: Sequence[str], *, me: str = "a", caught_up: str = ""
) -> Move | None:
    configuration = Configuration(tuple(voters), tuple(learners))
    return next_move(configuration, tuple(planned), me, "abcdefg", caught_up.__contains__)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (move("abc", "", "abc"), None),
        (move("abc", "", "abd"), Move(("a", "b", "c"), ("d",), "d", None)),
        (move("abc", "d", "abd"), None),
        (move("abc", "d", "abd", caught_up="d"), Move(("a", "b", "d"), (), "d", "c")),
        (move("a", "b", "abc", caught_up="b"), Move(("a", "b"), (), "b", None)),
        (move("abc", "", "bcd", me="a"), Move(("a", "b", "c"), ("d",), "d", None)),
        (move("abc", "d", "bde", me="a", caught_up="d"), Move(("b", "d", "a"), (), "d", "c")),
        (move("abc", "d", "abe"), Move(("a", "b", "c"), ("e",), "e", None)),
        (move("abc", "d", "abc"), Move(("a", "b", "c"), (), None, "d")),
        (move("abcd", "", "abc"), Move(("a", "b", "c"), (), None, "d")),
        (move("abcd", "e", "abc", me="d"), Move(("a", "b", "c"), (), None, "d")),
    ],
)
def test_moves(found: Move | None, expected: Move | None) -> None:
    assert found == expected


def test_those_who_are_down_go_first() -> None:
    configuration = Configuration(("a", "b", "c"), ("d",))
    found = next_move(configuration, ("d", "e", "f"), "b", ("b", "c", "d", "e", "f"), lambda name: True)
    assert found is not None
    assert found.goes == "a"


@settings(max_examples=300)
@given(st.data())
def test_they_arrive_one_at_a_time_and_never_with_fewer_copies(data: st.DataObject) -> None:
    voters = tuple(data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)))
    others = [name for name in NAMES if name not in voters]
    learners = tuple(data.draw(st.lists(st.sampled_from(others), max_size=1))) if others else ()
    planned = tuple(data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)))
    me = data.draw(st.sampled_from(voters))
    configuration = Configuration(voters, learners)
    for _ in range(3 * len(NAMES)):
        found = next_move(configuration, planned, me, NAMES, configuration.learners.__contains__)
        if found is None:
            break
        after = configuration.begin(found.voters, found.learners).end()  # raises for what is no change
        come = set(after.voters) - set(configuration.voters)
        gone = set(configuration.voters) - set(after.voters)
        assert len(come) <= 1
        assert len(gone) <= 1
        assert come <= set(configuration.learners)
        assert len(after.voters) >= min(len(configuration.voters), len(planned))
        assert len(after.learners) <= 1
        assert gone.isdisjoint(planned)
        if me in gone:
            assert set(configuration.voters) - set(planned) == {me}, "the leader goes last"
            me = after.voters[0]
        configuration = after
    assert (sorted(configuration.voters), configuration.learners) == (sorted(planned), ())

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.cluster import (
    HashRing,
    Member,
    NodeState,
    RingCache,
    RingSpec,
    View,
    Watchers,
    changes_between,
)
from gostore.cluster.view import RINGS_KEPT_MAX, VIEWS_KEPT_MAX
from gostore.core.address import Address
from gostore.core.errors import NotFound, PolicyError, Unavailable
from gostore.core.slots import PolicySource

SPECS = {"global": RingSpec(3, 16), "masters": RingSpec(3, 16)}


def member(number: int, state: NodeState = NodeState.ONLINE, **fields: object) -> Member:
    fields.setdefault("rings", ("global", "masters") if number <= 3 else ("global",))
    fields.setdefault("joined", number)
    return Member(name=f"node-{number}", address=Address("127.0.0.1", number, number), state=state, **fields)  # type: ignore[arg-type]


def view_of(*members: Member, **fields: object) -> View:
    fields.setdefault("epoch", 7)
    return View(  # type: ignore[arg-type]
        cluster="test", members={m.name: m for m in sorted(members, key=lambda m: m.name)}, rings=SPECS, **fields
    )


states = st.lists(st.sampled_from(list(NodeState)), max_size=8)


@given(states)
def test_survives_the_wire(states: list[NodeState]) -> None:
    view = view_of(*(member(i, state) for i, state in enumerate(states, 1)), digest=9)
    assert View.from_wire(view.to_wire()) == view
    policed = View.from_wire({**view.to_wire(), "policy": {"name": "P", "source": "class P: pass"}})
    assert policed.policy == PolicySource("P", "class P: pass")


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": "7"},
        {"members": [1]},
        {"members": [member(1).to_wire(), member(1).to_wire()]},
        {"rings": {"global": [0, 1]}},
        {"rings": {"global": [3, 10**9]}},
        {"policy": {"name": 1}},
        {"cluster": None},
    ],
)
def test_refuses_what_is_no_view(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        View.from_wire({**view_of(member(1)).to_wire(), **change})
    with pytest.raises(ValueError):
        View.from_wire([])


@given(states)
def test_only_the_online_are_on_the_ring(states: list[NodeState]) -> None:
    view = view_of(*(member(i, state) for i, state in enumerate(states, 1)))
    online = tuple(f"node-{i}" for i, state in enumerate(states, 1) if state is NodeState.ONLINE)
    assert view.online == online
    for number in range(20):
        resolution = view.resolve(b"key-%d" % number)
        assert set(resolution.owners) <= set(online)
        assert len(resolution.owners) == min(3, len(online))
        masters = view.resolve(b"key-%d" % number, "masters").owners
        assert set(masters) <= set(online) & {"node-1", "node-2", "node-3"}


def test_a_resolution_answers_as_the_original_did() -> None:
    view = view_of(member(1), member(2), member(4))
    resolution = view.resolve(b"key")
    first, second, third = resolution.owners
    assert resolution.first == resolution.nth(0) == first
    assert resolution.nth(2) == third
    assert resolution.is_first(first)
    assert not resolution.is_first(second)
    assert resolution.is_among(third)
    assert not resolution.is_among("node-9")
    with pytest.raises(Unavailable, match="3 online owners"):
        resolution.nth(3)
    with pytest.raises(Unavailable):
        _ = view_of().resolve(b"key").first
    assert not view_of().resolve(b"key").is_first("node-1")
    with pytest.raises(NotFound, match="global, masters"):
        view.resolve(b"key", "unknown")


def test_the_master_is_the_first_online_by_seniority() -> None:
    offline = NodeState.OFFLINE
    # node-10 sorts before node-2 by name and joined later.
    late = member(10, joined=10, rings=("global", "masters"))
    assert view_of(late, member(2)).masters == ("node-2", "node-10")
    assert view_of(member(1), member(2), member(3)).master == "node-1"
    assert view_of(member(1, offline), member(2), member(3)).master == "node-2"
    assert view_of(member(1, offline), member(2, NodeState.LEAVING), member(4)).master is None
    assert view_of(member(1, NodeState.LEFT), member(2)).masters == ("node-2",)
    assert view_of(member(2, joined=5), member(3, joined=5)).master == "node-2"
    assert view_of().master is None


def test_a_cluster_that_is_being_born_is_led_by_the_first_that_waits() -> None:
    joining, connecting = NodeState.JOINING, NodeState.CONNECTING
    assert view_of(member(1, joining), member(2, joining)).master == "node-1"
    assert view_of(member(1, NodeState.OFFLINE), member(2, connecting)).master == "node-2"
    assert view_of(member(1, connecting), member(2)).master == "node-2"


def test_changes_are_merged_in_order_and_illegal_ones_left_out() -> None:
    view = view_of(member(1))
    new = view.with_members(
        [
            member(2, NodeState.JOINING),
            member(2),
            member(3),  # a stranger cannot be online at once
            member(1, NodeState.OFFLINE),
            member(1),  # the dead do not rise
        ],
        digest=5,
    )
    assert new.version == (8, 5)
    assert {name: m.state for name, m in new.members.items()} == {
        "node-1": NodeState.OFFLINE,
        "node-2": NodeState.ONLINE,
    }
    assert list(new.members) == sorted(new.members)
    assert view.members["node-1"].online, "a view never changes"
    changes = changes_between(view, new)
    assert [(c.name, c.old and c.old.state, c.new.state) for c in changes] == [
        ("node-1", NodeState.ONLINE, NodeState.OFFLINE),
        ("node-2", None, NodeState.ONLINE),
    ]
    assert changes_between(new, new) == ()


def test_after_a_join_the_ring_is_another() -> None:
    """A ring kept from the old view would send keys to the wrong node."""
    view = view_of(member(1), member(2))
    ring = view.ring()
    assert view.ring() is ring
    new = view.with_members([member(3, NodeState.JOINING), member(3)])
    assert new.ring() is not ring
    assert {name for k in range(50) for name in new.resolve(b"%d" % k).owners} == {"node-1", "node-2", "node-3"}


def test_many_nodes_build_one_ring() -> None:
    cache = RingCache()
    wire = view_of(*(member(i) for i in range(1, 6)), digest=77).to_wire()
    views = [View.from_wire(wire, cache) for _ in range(1000)]
    assert len({id(view) for view in views}) == 1
    assert len({id(view.ring()) for view in views}) == 1
    # Other epochs with the same members on the ring share it as well.
    other = views[0].with_members([member(9, NodeState.JOINING, incarnation=2)])
    assert other.ring() is views[0].ring()
    assert cache.built == 1


def test_the_cache_is_bounded() -> None:
    cache = RingCache()
    for number in range(VIEWS_KEPT_MAX + 50):
        cache.share(view_of(epoch=number, cache=cache))
        cache.ring(None, SPECS["global"], {f"n{number}": 1.0}, own=False)
    assert len(cache._views) == VIEWS_KEPT_MAX
    assert len(cache._rings) == RINGS_KEPT_MAX
    assert cache.known("test", 0, 0) is None
    assert cache.known("test", VIEWS_KEPT_MAX + 49, 0) is not None


REVERSED = PolicySource(
    "Reversed",
    """
from gostore.cluster import HashRing
class Reversed(HashRing):
    def owners(self, key):
        if key == b"trap":
            raise RuntimeError("no idea")
        return super().owners(key)[::-1]
""",
)


def test_a_policy_rules_the_global_ring_and_not_the_masters() -> None:
    view = view_of(*(member(i) for i in range(1, 6)))
    policed = view.with_members([], policy=REVERSED)
    assert policed.epoch == view.epoch + 1
    assert policed.with_members([]).policy == REVERSED
    for number in range(20):
        key = b"key-%d" % number
        assert policed.resolve(key).owners == view.resolve(key).owners[::-1]
        assert policed.resolve(key, "masters").owners == view.resolve(key, "masters").owners
    with pytest.raises(PolicyError, match="line 6: RuntimeError: no idea"):
        policed.resolve(b"trap")
    assert policed.master == "node-1"


def test_another_default_placement() -> None:
    class Mine(HashRing):
        pass

    view = view_of(member(1), cache=RingCache(Mine))
    assert type(view.ring()) is Mine
    assert type(view.ring("masters")) is HashRing


def test_watchers_are_called_in_order_and_one_that_raises_harms_nobody() -> None:
    calls: list[object] = []
    errors: list[BaseException] = []
    watchers = Watchers(errors.append)

    def bad(*_: object) -> None:
        raise RuntimeError("bad watcher")

    watchers.watch(bad)
    unwatch = watchers.watch(lambda old, new, changes: calls.append((old.epoch, new.epoch, len(changes))))
    for state in NodeState:
        watchers.on(state, lambda change, view, state=state: calls.append((change.name, state.value)))  # type: ignore[misc]
    old = view_of(member(1), member(2))
    new = old.with_members([member(1, NodeState.OFFLINE), member(2, weight=2.0), member(3, NodeState.JOINING)])
    watchers.notify(old, new, changes_between(old, new))
    assert calls == [(7, 8, 3), ("node-3", "joining"), ("node-1", "offline")]
    assert [str(error) for error in errors] == ["bad watcher"]
    unwatch()
    unwatch()
    watchers.notify(new, new, ())
    assert len(calls) == 3
    assert len(watchers) == 8

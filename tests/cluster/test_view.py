from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.cluster import (
    DEFAULT_POLICY,
    HashRing,
    Member,
    NodeState,
    Resolution,
    RingCache,
    RingSpec,
    View,
    Watchers,
    changes_between,
    found,
    shard_key,
)
from gostore.cluster.ring import CheckedPlacement
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
        {"master": 1},
        {"term": -1},
        {"founders": [1]},
        {"founders": [[1]]},
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


def test_the_masters_are_in_the_order_of_their_seniority() -> None:
    # node-10 sorts before node-2 by name and joined later.
    late = member(10, joined=10, rings=("global", "masters"))
    assert view_of(late, member(2)).masters == ("node-2", "node-10")
    assert view_of(member(1, NodeState.OFFLINE), member(2)).masters == ("node-1", "node-2")
    assert view_of(member(1, NodeState.LEFT), member(2)).masters == ("node-2",)
    assert view_of(member(3, joined=5), member(2, joined=5)).masters == ("node-2", "node-3")
    assert view_of(member(4)).masters == ()


def test_who_leads_and_who_founded_is_handed_on() -> None:
    view = view_of(member(1), master="node-1", term=3, founders=(("node-1",), ()))
    assert View.from_wire(view.to_wire()) == view
    new = view.with_members([])
    assert (new.master, new.term, new.founders) == ("node-1", 3, (("node-1",), ()))
    newer = view.with_members([], master="node-2", term=4)
    assert (newer.master, newer.term) == ("node-2", 4)
    assert view_of().master is None


def test_the_founders_are_the_owners() -> None:
    view = view_of(*(member(number) for number in range(1, 6)))
    assert found(view, 3) == tuple(view.resolve(shard_key(shard)).owners for shard in range(3))
    assert found(view_of(), 2) == ((), ())


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


@pytest.mark.parametrize("wire", [[1, 1], [64, 4096], [1, 4096], [64, 1]])
def test_rings_within_their_bounds(wire: list[int]) -> None:
    assert RingSpec.from_wire(wire).to_wire() == wire


@pytest.mark.parametrize("wire", [[0, 1], [1, 0], [65, 1], [1, 4097], [-1, 8], [1], [1, 1, 1], ["1", 1], None, {}])
def test_rings_out_of_bounds_are_refused(wire: object) -> None:
    with pytest.raises(ValueError, match="not a ring"):
        RingSpec.from_wire(wire)


def test_views_at_their_bounds() -> None:
    wire = view_of(member(1), epoch=0).to_wire()
    assert View.from_wire(wire).version == (0, 0)
    for change in ({"epoch": -1}, {"digest": -1}, {"digest": None}, {"rings": []}):
        with pytest.raises(ValueError, match="not a view"):
            View.from_wire({**wire, **change})
    with pytest.raises(ValueError, match="a member is listed twice"):
        View.from_wire({**wire, "members": [member(1).to_wire(), member(1, weight=2.0).to_wire()]})


def test_views_are_values_and_their_caches_no_part_of_them() -> None:
    one, other = (view_of(member(1), cache=RingCache()) for _ in range(2))
    one.ring()
    assert one == other
    assert repr(one) == repr(other)
    assert "RingCache" not in repr(one)
    assert one != view_of(member(1), digest=1)
    for value, field in ((one, "epoch"), (one.resolve(b"k"), "key"), (SPECS["global"], "replicas")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, 0)


def test_a_view_is_read_sorted_whatever_the_order_it_came_in() -> None:
    wire = view_of(member(1), member(2)).to_wire()
    turned = {**wire, "members": wire["members"][::-1], "rings": dict(reversed(list(wire["rings"].items())))}
    found = View.from_wire(turned)
    assert list(found.members) == ["node-1", "node-2"]
    assert list(found.rings) == ["global", "masters"]
    assert found.online == ("node-1", "node-2")


def test_members_in_some_states() -> None:
    view = view_of(*(member(number, state) for number, state in enumerate(NodeState, 1)))
    assert view.in_states(NodeState.JOINING, NodeState.LEFT) == ("node-1", "node-7")
    assert view.in_states() == ()


def test_every_ring_has_its_own_members_weights_and_specification() -> None:
    specs = {"global": RingSpec(2, 4), "masters": RingSpec(3, 16)}
    members = {f"node-{n}": member(n, weight=float(n)) for n in range(1, 6)}
    view = View("test", 1, members, specs)
    ring, masters = view.ring(), view.ring("masters")
    assert isinstance(ring, HashRing)
    assert isinstance(masters, HashRing)
    assert (ring.nodes, ring.replicas, ring.tokens_per_node) == ({f"node-{n}": float(n) for n in range(1, 6)}, 2, 4)
    assert (list(masters.nodes), masters.replicas, masters.tokens_per_node) == (["node-1", "node-2", "node-3"], 3, 16)


@pytest.mark.parametrize("n", [-1, 1, 2])
def test_there_are_no_owners_beside_the_owners(n: int) -> None:
    resolution = Resolution(b"k", ("a",))
    assert resolution.nth(0) == "a"
    with pytest.raises(Unavailable, match=f"has 1 online owners; number {n} was asked for"):
        resolution.nth(n)
    assert Resolution(b"k", ("a", "b")).is_first("a")
    assert not Resolution(b"k", ("a", "b")).is_first("b")


def test_a_policy_is_kept_replaced_and_ended() -> None:
    view = view_of(member(1))
    other = PolicySource("Other", "class Other: ...")
    policed = view.with_members([], policy=REVERSED, digest=4)
    assert (policed.version, policed.policy) == ((8, 4), REVERSED)
    assert policed.with_members([]).policy == REVERSED
    assert policed.with_members([], policy=other).policy == other
    assert policed.with_members([], policy=DEFAULT_POLICY).policy is None
    assert view.with_members([]).policy is None
    assert policed.cluster == "test"
    assert policed.cache is view.cache


def test_the_longest_unused_goes_first() -> None:
    cache = RingCache()
    spec = SPECS["global"]
    rings = [cache.ring(None, spec, {f"n{number}": 1.0}, own=False) for number in range(16)]
    assert cache.ring(None, spec, {"n0": 1.0}, own=False) is rings[0], "and is now the latest used"
    assert cache.built == 16
    cache.ring(None, spec, {"n16": 1.0}, own=False)
    assert cache.ring(None, spec, {"n0": 1.0}, own=False) is rings[0]
    assert cache.ring(None, spec, {"n2": 1.0}, own=False) is rings[2]
    assert cache.built == 17
    assert cache.ring(None, spec, {"n1": 1.0}, own=False) is not rings[1]
    assert cache.built == 18
    views = [cache.share(view_of(epoch=epoch, cache=cache)) for epoch in range(256)]
    assert cache.share(view_of(epoch=0, cache=cache)) is views[0]
    cache.share(view_of(epoch=256, cache=cache))
    assert cache.known("test", 0, 0) is views[0]
    assert cache.known("test", 1, 0) is None
    assert cache.known("test", 0, 1) is None
    assert cache.known("other", 0, 0) is None


def test_a_policy_is_loaded_once_and_rules_rings_that_are_not_our_own() -> None:
    loaded: list[str] = []

    def load(policy: PolicySource) -> type:
        loaded.append(policy.name)
        return HashRing

    cache = RingCache(load=load)
    sources = [PolicySource(f"P{number}", "") for number in range(17)]
    for _ in range(2):
        for nodes in ({"a": 1.0}, {"b": 1.0}):
            assert isinstance(cache.ring(sources[0], SPECS["global"], nodes, own=False), CheckedPlacement)
    assert type(cache.ring(sources[0], SPECS["global"], {"a": 1.0}, own=True)) is HashRing
    assert (loaded, cache.built) == (["P0"], 3)
    for source in sources:
        cache.placement_class(source)
    cache.placement_class(sources[1])
    assert loaded == [source.name for source in sources]
    cache.placement_class(sources[0])
    assert loaded == [*(source.name for source in sources), "P0"], "of 17 the longest unused was forgotten"


def test_a_watcher_may_end_itself_and_hears_of_its_state_only() -> None:
    watchers = Watchers(lambda error: None)
    heard: list[object] = []

    def once(old: View, new: View, changes: object) -> None:
        heard.append(new.epoch)
        unwatch()

    unwatch = watchers.watch(once)
    watchers.watch(lambda old, new, changes: heard.append((old.epoch, new.epoch)))
    end = watchers.on(NodeState.ONLINE, lambda change, view: heard.append((change.name, view.epoch)))
    old = view_of(member(1, NodeState.OFFLINE), member(2))
    new = view_of(member(1, incarnation=2), member(2), epoch=8)
    assert len(watchers) == 3
    for _ in range(2):
        watchers.notify(old, new, changes_between(old, new))
    assert heard == [8, (7, 8), ("node-1", 8), (7, 8), ("node-1", 8)]
    end()
    end()
    assert len(watchers) == 1

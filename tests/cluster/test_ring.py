from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from gostore.cluster.ring import (
    TOKENS,
    Arc,
    CheckedPlacement,
    HashRing,
    Move,
    arcs_of,
    check_placement,
    diff,
    token_of,
)
from gostore.core.errors import PolicyError
from gostore.core.slots import SLOTS, PolicySource, load_policy

names = st.lists(st.text("abcdef-0123456789", min_size=1, max_size=8), unique=True, max_size=12)
replicas = st.integers(1, 5)
tokens = st.integers(1, 16)
keys = st.binary(max_size=40)
KEYS = [b"key-%d" % number for number in range(4000)]


def nodes_of(count: int, weight: float = 1.0) -> dict[str, float]:
    return {f"node-{number}": weight for number in range(1, count + 1)}


def owners_by_definition(ring: HashRing, token: int) -> tuple[str, ...]:
    """The preference list as the papers define it: walk clockwise from the token and take distinct nodes."""
    circle = ring.tokens
    start = next((i for i, (t, _) in enumerate(circle) if t >= token), 0)
    found: list[str] = []
    for step in range(len(circle)):
        name = circle[(start + step) % len(circle)][1]
        if name not in found and len(found) < ring.replicas:
            found.append(name)
    return tuple(found)


@given(names, replicas, tokens, st.lists(keys, max_size=20))
def test_owners_are_distinct_known_and_as_many_as_asked(
    names: list[str], replicas: int, tokens: int, keys: list[bytes]
) -> None:
    ring = HashRing(dict.fromkeys(names, 1.0), replicas, tokens)
    for key in keys:
        owners = ring.owners(key)
        assert len(owners) == len(set(owners)) == min(replicas, len(names))
        assert set(owners) <= set(names)


@given(names.filter(bool), replicas, tokens, st.lists(st.integers(0, TOKENS - 1), max_size=20))
def test_owners_are_those_of_the_definition(names: list[str], replicas: int, tokens: int, points: list[int]) -> None:
    ring = HashRing(dict.fromkeys(names, 1.0), replicas, tokens)
    borders = [token + step for token, _ in ring.tokens for step in (-1, 0, 1)]
    for point in [*points, 0, TOKENS - 1, *(p % TOKENS for p in borders)]:
        assert ring.owners_of_token(point) == owners_by_definition(ring, point)


@given(names, replicas, tokens, st.randoms(use_true_random=False), st.lists(keys, max_size=20))
def test_the_order_of_construction_does_not_matter(names, replicas, tokens, random, keys) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(names)
    random.shuffle(shuffled)
    one = HashRing(dict.fromkeys(names, 1.0), replicas, tokens)
    other = HashRing(dict.fromkeys(shuffled, 1.0), replicas, tokens)
    assert [one.owners(key) for key in keys] == [other.owners(key) for key in keys]
    assert one.arcs() == other.arcs()


@given(names, replicas, tokens)
def test_arcs_cover_the_circle_once(names: list[str], replicas: int, tokens: int) -> None:
    ring = HashRing(dict.fromkeys(names, 1.0), replicas, tokens)
    arcs = ring.arcs()
    if not names:
        assert arcs == []
        return
    assert arcs[0].start == 0
    assert arcs[-1].end == TOKENS
    assert all(a.end == b.start for a, b in pairwise(arcs))
    assert math.isclose(sum(arc.share for arc in arcs), 1.0)
    for arc in arcs:
        assert ring.owners_of_token(arc.start) == ring.owners_of_token(arc.end - 1) == arc.owners


def test_the_owner_of_a_key_is_that_of_its_token() -> None:
    ring = HashRing(nodes_of(5), 3, 32)
    for key in KEYS[:500]:
        assert ring.owners(key) == ring.owners_of_token(token_of(key))
    assert token_of(b"key") == xxh3_64_intdigest(b"key")


@given(names, names, replicas, tokens, st.lists(st.integers(0, TOKENS - 1), max_size=30))
def test_diff_says_what_comparing_point_by_point_says(
    before: list[str], after: list[str], replicas: int, tokens: int, points: list[int]
) -> None:
    old = HashRing(dict.fromkeys(before, 1.0), replicas, tokens)
    new = HashRing(dict.fromkeys(after, 1.0), replicas, tokens)
    moves = diff(old, new)
    assert all(a.end <= b.start for a, b in pairwise(moves))
    borders = [token + step for ring in (old, new) for token, _ in ring.tokens for step in (0, 1)]
    for point in [*points, 0, TOKENS - 1, *(p % TOKENS for p in borders)]:
        here = [move for move in moves if move.start <= point < move.end]
        was, now = old.owners_of_token(point), new.owners_of_token(point)
        if was == now:
            assert not here
        else:
            assert [(move.old_owners, move.new_owners) for move in here] == [(was, now)]


@given(names, replicas, tokens)
def test_nothing_moves_between_equal_rings(names: list[str], replicas: int, tokens: int) -> None:
    ring = HashRing(dict.fromkeys(names, 1.0), replicas, tokens)
    assert diff(ring, ring) == []
    assert diff(ring, HashRing(dict.fromkeys(reversed(names), 1.0), replicas, tokens)) == []


def test_diff_from_the_empty_ring_is_everything() -> None:
    one = HashRing(nodes_of(1), 3, 8)
    empty = HashRing({}, 3, 8)
    assert diff(empty, one) == [Move(0, TOKENS, (), ("node-1",))]
    assert diff(one, empty) == [Move(0, TOKENS, ("node-1",), ())]


@given(st.integers(1, 12), replicas, st.integers(1, 64))
def test_a_join_takes_keys_for_the_newcomer_alone(count: int, replicas: int, tokens: int) -> None:
    """Between nodes that stay nothing moves: the new list is the old one with the newcomer let in."""
    old = HashRing(nodes_of(count), replicas, tokens)
    new = HashRing({**nodes_of(count), "newcomer": 1.0}, replicas, tokens)
    for key in KEYS[:300]:
        was, now = old.owners(key), new.owners(key)
        stayed = tuple(name for name in now if name != "newcomer")
        assert stayed == was[: len(stayed)]


@pytest.mark.parametrize("count", [2, 5, 10, 30])
def test_on_a_join_about_one_nth_of_the_keys_move(count: int) -> None:
    """The newcomer's share is a sum of ``tokens`` arcs; its mean is 1/(n+1) and its deviation 1/sqrt(tokens) of that.

    Averaged over 20 newcomers, the bound of 25 % is more than four deviations away.
    """
    tokens = 64
    old = HashRing(nodes_of(count), 1, tokens)
    shares = []
    for number in range(20):
        new = HashRing({**nodes_of(count), f"newcomer-{number}": 1.0}, 1, tokens)
        moves = diff(old, new)
        assert {move.new_owners for move in moves} == {(f"newcomer-{number}",)}
        shares.append(sum(move.share for move in moves))
    mean = sum(shares) / len(shares)
    assert mean == pytest.approx(1 / (count + 1), rel=0.25)


def shares_of(ring: HashRing) -> Counter[str]:
    shares: Counter[str] = Counter()
    for arc in ring.arcs():
        shares[arc.owners[0]] += arc.end - arc.start
    return Counter({name: share / TOKENS for name, share in shares.items()})  # type: ignore[misc]


@pytest.mark.parametrize("count", [2, 5, 20])
def test_shares_are_balanced(count: int) -> None:
    """With 256 tokens a share deviates by about 6 %: a node holds between two thirds and three halves of its due."""
    shares = shares_of(HashRing(nodes_of(count), 3, 256))
    assert len(shares) == count
    assert all(0.66 / count < share < 1.5 / count for share in shares.values())


def test_weights_shift_shares() -> None:
    shares = shares_of(HashRing({**nodes_of(4), "heavy": 4.0, "light": 0.25}, 3, 256))
    assert shares["heavy"] == pytest.approx(4 / 8.25, rel=0.3)
    assert shares["light"] == pytest.approx(0.25 / 8.25, rel=0.6)
    assert shares["heavy"] > 2 * shares["node-1"] > 4 * shares["light"]


def test_even_the_lightest_node_has_a_token() -> None:
    ring = HashRing({"a": 1.0, "feather": 0.001}, 1, 8)
    assert "feather" in {name for _, name in ring.tokens}


@pytest.mark.parametrize(
    ("nodes", "replicas", "tokens"),
    [({"a": 0.0}, 3, 8), ({"a": -1.0}, 3, 8), ({"a": 1e9}, 3, 8), ({"a": 1.0}, 0, 8), ({"a": 1.0}, 3, 0)],
)
def test_refuses_nonsense(nodes: dict[str, float], replicas: int, tokens: int) -> None:
    with pytest.raises(ValueError):
        HashRing(nodes, replicas, tokens)


class Rendezvous:
    """Highest random weight hashing (Thaler and Ravishankar, 1998): a placement that is not made of arcs."""

    def __init__(self, nodes, replicas, tokens_per_node):  # type: ignore[no-untyped-def]
        self.nodes, self.replicas = sorted(nodes), replicas

    def owners(self, key: bytes) -> tuple[str, ...]:
        order = sorted(self.nodes, key=lambda name: token_of(name.encode() + key), reverse=True)
        return tuple(order[: self.replicas])


def test_a_placement_without_arcs_can_be_drawn_and_compared() -> None:
    old, new = Rendezvous(nodes_of(4), 2, 1), Rendezvous(nodes_of(5), 2, 1)
    arcs = arcs_of(old)
    assert arcs[0].start == 0
    assert arcs[-1].end == TOKENS
    assert all(a.end == b.start and a.owners != b.owners for a, b in pairwise(arcs))
    assert diff(old, old) == []
    assert sum(move.share for move in diff(old, new)) == pytest.approx(2 / 5, rel=0.3)
    assert arcs_of(Rendezvous({}, 2, 1)) == []


class Backwards(HashRing):
    """Inherits ``arcs`` but has owners of its own: the inherited arcs would lie."""

    def owners(self, key: bytes) -> tuple[str, ...]:
        return super().owners(key)[::-1]


def test_inherited_arcs_are_not_believed() -> None:
    placement = Backwards(nodes_of(5), 3, 8)
    point = {token_of(b"sample-%d" % number): b"sample-%d" % number for number in range(50)}
    for arc in arcs_of(placement):
        for token, key in point.items():
            if arc.start <= token < arc.end:
                assert arc.owners == placement.owners(key)
    assert arcs_of(HashRing(nodes_of(5), 3, 8)) == HashRing(nodes_of(5), 3, 8).arcs()
    assert Arc(0, TOKENS, ("a",)).share == 1.0


def test_the_slot_accepts_the_default_and_rendezvous_hashing() -> None:
    assert SLOTS["placement"].default is HashRing
    for cls in (HashRing, Rendezvous, Backwards):
        check_placement(cls)


HEAD = """
from gostore.cluster import HashRing
class Mine:
    def __init__(self, nodes, replicas, tokens_per_node):
        self.nodes, self.replicas = list(nodes), replicas
    def owners(self, key):
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return (self.nodes[0],) * min(self.replicas, len(self.nodes)) if self.nodes else ()", "one node twice"),
        ("return tuple(self.nodes)", r"expected 1: min\(replicas"),
        ("return ('stranger',)", "'stranger', which is no node"),
        ("return self.nodes[0]", "returned str"),
        ("return tuple(self.nodes[: self.replicas])", "in one order and"),
        ("self.nodes.append(self.nodes.pop(0)); return tuple(self.nodes[: self.replicas])", "the same key must always"),
        ("return 1 / 0", r"ZeroDivisionError: division by zero\n    7 \|         return 1 / 0"),
        ("return None", "returned NoneType"),
    ],
)
def test_the_slot_teaches_what_is_wrong(body: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        load_policy("placement", PolicySource("Mine", f"{HEAD}        {body}\n"))


def test_a_policy_that_fails_at_work_is_one_clear_error() -> None:
    body = "return tuple(sorted(self.nodes)[: self.replicas]) if key != b'trap' else self.nodes[99]"
    policy = PolicySource("Mine", f"{HEAD}        {body}\n")
    cls = load_policy("placement", policy)
    placement = CheckedPlacement(cls, policy, nodes_of(3), 2, 8)
    assert placement.owners(b"fine") == ("node-1", "node-2")
    with pytest.raises(PolicyError, match=r"Mine, line 7: IndexError"):
        placement.owners(b"trap")
    with pytest.raises(PolicyError, match="takes no arguments"):
        CheckedPlacement(type("Bad", (), {"owners": lambda self, key: ()}), policy, nodes_of(3), 2, 8)


@settings(max_examples=30)
@given(names, names)
def test_two_moves_compose(before: list[str], after: list[str]) -> None:
    """What moves there and back again is the same ranges with the sides exchanged."""
    old, new = (HashRing(dict.fromkeys(names, 1.0), 2, 4) for names in (before, after))
    there = [(m.start, m.end, m.old_owners, m.new_owners) for m in diff(old, new)]
    back = [(m.start, m.end, m.new_owners, m.old_owners) for m in diff(new, old)]
    assert there == back


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 64.0), max_size=4), tokens)
def test_tokens_are_hashes_of_names_and_numbers(nodes: dict[str, float], tokens: int) -> None:
    """The papers' definition, and what nodes of all releases must agree on."""
    expected = {
        token_of(f"{name}#{number}".encode()): name
        for name in sorted(nodes, reverse=True)
        for number in range(max(1, round(tokens * nodes[name])))
    }
    assert HashRing(nodes, 2, tokens).tokens == sorted(expected.items())


def test_a_ring_knows_how_it_was_built() -> None:
    ring = HashRing({"b": 1.0, "a": 64.0}, 1, 1)
    assert (list(ring.nodes.items()), ring.replicas, ring.tokens_per_node) == ([("a", 64.0), ("b", 1.0)], 1, 1)
    assert len(ring.tokens) == 65
    for weight in (0.0, -1.0, 64.001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight = {weight}: allowed are values above 0 up to 64"):
            HashRing({"a": weight}, 1, 1)
    for replicas, tokens in ((0, 1), (1, 0), (-1, 1), (1, -1)):
        with pytest.raises(ValueError, match=f"replicas = {replicas}, tokens_per_node = {tokens}: both must be"):
            HashRing({"a": 1.0}, replicas, tokens)


def test_the_circle_has_two_to_the_64_tokens() -> None:
    """Of a ring with one token the arc that wraps is two: they meet at 0."""
    ring = HashRing({"a": 1.0, "b": 1.0}, 1, 1)
    (low, first), (high, second) = ring.tokens
    assert ring.arcs() == [Arc(0, low + 1, (first,)), Arc(low + 1, high + 1, (second,)), Arc(high + 1, 2**64, (first,))]
    assert [arc.share for arc in ring.arcs()] == [(low + 1) / 2**64, (high - low) / 2**64, (2**64 - high - 1) / 2**64]
    assert Move(2**62, 2**63, (), ("a",)).share == 0.25


def test_equal_lists_are_one_object() -> None:
    """Many tokens, few lists: a ring of three nodes with two copies has six."""
    ring = HashRing(nodes_of(3), 2, 200)
    assert len(ring.tokens) == 600
    assert len({id(owners) for owners in ring._owners}) == len(set(ring._owners)) == 6


def test_arcs_and_moves_are_values() -> None:
    for value in (Arc(0, 1, ("a",)), Move(0, 1, (), ("a",))):
        with pytest.raises(FrozenInstanceError):
            value.start = 1  # type: ignore[misc]
        assert hash(value) == hash(replace(value))
    assert sorted([Arc(2, 3, ()), Arc(0, 2, ())])[0].start == 0
    assert sorted([Move(2, 3, (), ()), Move(0, 2, (), ())])[0].start == 0


@pytest.mark.parametrize("count", [1, 4])
def test_the_picture_of_a_placement_shows_every_sample_halfway_to_the_next(count: int) -> None:
    placement = Rendezvous(nodes_of(count), 2, 1)
    samples = sorted((token_of(b"sample-%d" % number), b"sample-%d" % number) for number in range(2048))
    borders = [0, *((a + b) // 2 for (a, _), (b, _) in pairwise(samples)), TOKENS]
    arcs = arcs_of(placement)
    place = 0
    for (_, key), (start, end) in zip(samples, pairwise(borders), strict=True):
        while arcs[place].end <= start:
            place += 1
        assert arcs[place].start <= start < end <= arcs[place].end
        assert arcs[place].owners == placement.owners(key)
    assert place == len(arcs) - 1
    assert set(arc.end for arc in arcs) <= set(borders)


def test_neighbours_with_equal_moves_are_one() -> None:
    """Two placements that agree on a half: the other half is one move, however many arcs it has."""

    class Halves(Rendezvous):
        def __init__(self, *owners: str) -> None:
            self.halves = owners

        def owners(self, key: bytes) -> tuple[str, ...]:
            return (self.halves[token_of(key) >= TOKENS // 2],)

    (move,) = diff(Halves("a", "b"), Halves("a", "c"))
    assert (move.end, move.old_owners, move.new_owners) == (TOKENS, ("b",), ("c",))
    assert move.start == pytest.approx(TOKENS / 2, rel=0.01)
    first, second = diff(Halves("a", "b"), Halves("c", "d"))
    assert (first.start, first.end, second.end) == (0, second.start, TOKENS)


class Honest:
    """Right, and in the same order for everybody."""

    def __init__(self, nodes: dict[str, float], replicas: int, tokens_per_node: int) -> None:
        self.nodes, self.replicas, self.tokens = sorted(nodes), replicas, tokens_per_node

    def owners(self, key: bytes) -> tuple[str, ...] | list[str]:
        return self.nodes[: self.replicas]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda self, key: len(self.nodes) == 1 and (), "returned 0 owners; expected 1"),
        (lambda self, key: len(self.nodes) == 8 and (), "with 8 nodes returned 0 owners"),
        (
            lambda self, key: len(self.nodes) == 8 and self.replicas == 1 and self.nodes[:2],
            "returned 2 owners; expected 1",
        ),
        (lambda self, key: self.replicas == 3 and len(self.nodes) == 2 and (), "returned 0 owners; expected 2"),
        (lambda self, key: key == b"" and (), "returned 0 owners"),
        (lambda self, key: key == b"\0" and (), "returned 0 owners"),
        (lambda self, key: len(key) == 40 and (), "returned 0 owners"),
        (lambda self, key: key == b"key-63" and (), "returned 0 owners"),
        (lambda self, key: len(self.nodes) == 5 and ["node-1"] * self.replicas, "one node twice"),
        (lambda self, key: len(self.nodes) == 5 and [1] * self.replicas, "names 1, which is no node"),
        (lambda self, key: not self.nodes and ("node-1",), "must be the empty tuple"),
        (lambda self, key: not self.nodes and [None], "must be the empty tuple"),
    ],
)
def test_the_slot_finds_what_is_wrong_in_one_case_only(wrong: Callable[[Any, bytes], Any], words: str) -> None:
    check_placement(Honest)

    class Wrong(Honest):
        def owners(self, key: bytes) -> Any:
            answer = wrong(self, key)
            return super().owners(key) if answer is False else answer

    with pytest.raises(AssertionError, match=words):
        check_placement(Wrong)


def test_the_slot_builds_twins_with_the_same_arguments() -> None:
    """A placement may depend on each of them, and on nothing else."""
    built: list[tuple[int, int]] = []

    class Curious(Honest):
        def __init__(self, nodes: dict[str, float], replicas: int, tokens_per_node: int) -> None:
            super().__init__(nodes, replicas, tokens_per_node)
            assert set(nodes.values()) <= {1.0}
            built.append((replicas, tokens_per_node))
            nodes.clear()  # its own copy

        def owners(self, key: bytes) -> Any:
            turn = (self.replicas + self.tokens) % max(1, len(self.nodes))
            return (self.nodes[turn:] + self.nodes[:turn])[: self.replicas]

    check_placement(Curious)
    assert set(built) == {(1, 8), (3, 8)}


def test_a_placement_at_work_is_given_a_copy_and_answers_with_tuples() -> None:
    nodes = nodes_of(3)
    policy = PolicySource("Mine", "")

    class Greedy(Honest):
        def __init__(self, nodes: dict[str, float], replicas: int, tokens_per_node: int) -> None:
            super().__init__(nodes, replicas, tokens_per_node)
            nodes.clear()

    placement = CheckedPlacement(Greedy, policy, nodes, 5, 8)
    assert placement.owners(b"k") == ("node-1", "node-2", "node-3")
    assert len(nodes) == 3
    assert placement.arcs is None
    assert arcs_of(CheckedPlacement(HashRing, policy, nodes, 2, 8)) == HashRing(nodes, 2, 8).arcs()
    drawn = arcs_of(placement)
    assert drawn == [Arc(0, TOKENS, ("node-1", "node-2", "node-3"))]
    few = type("Few", (Honest,), {"owners": lambda self, key: self.nodes[:1]})
    with pytest.raises(PolicyError, match=r"Mine: owners\(b'k'\) with 3 nodes returned 1 owners; expected 2"):
        CheckedPlacement(few, policy, nodes, 2, 8).owners(b"k")

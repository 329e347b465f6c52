"""The placement slot: which nodes hold a key. Its default is consistent hashing with virtual nodes.

Theory of operation
-------------------
Tokens are the integers of 64 bits, drawn as a circle. A key's token is its hash (:func:`token_of`). Every node puts
``tokens_per_node x weight`` tokens of its own on the circle, hashes of its name and a number (Karger et al.:
"Consistent Hashing and Random Trees", STOC 1997; virtual nodes as in DeCandia et al.: "Dynamo", SOSP 2007, section
4.2). A key belongs to the node whose token comes first at or after the key's token; its copies belong to the next
*distinct* nodes. The list of them, in this order, is the key's *preference list*.

When a node joins, the only keys that change their first owner are those on the arcs before its tokens: about 1/N of
all. :func:`diff` tells them: which ranges of tokens move from whom to whom.

Looking a key up must cost less than anything that is done with it. So all preference lists are computed when the ring
is built, one tuple for each arc, and a look-up is a hash, a bisection and an index: about a quarter of a microsecond.
An arc past the last token belongs to the first one; the list of tuples has one entry more, so that no look-up wraps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol, cast

from xxhash import xxh3_64_intdigest

from gostore.cluster.members import WEIGHT_MAX
from gostore.core.errors import PolicyError
from gostore.core.slots import PolicySource, Slot, declare_slot, describe_failure

TOKENS: Final = 1 << 64
"""The number of tokens: a token is from 0 to ``TOKENS - 1``."""

ARC_SAMPLES: Final = 2048
"""Keys by which a placement without arcs is drawn. More: a truer picture; cost grows in proportion."""


def token_of(key: bytes) -> int:
    """The token of a key: xxh3, 64 bits, without a seed."""
    return xxh3_64_intdigest(key)


class Placement(Protocol):
    """Slot ``placement``: decides which nodes hold a key.

    It is built from the online members and never changes; a new membership builds a new one. It must be a function of
    its arguments alone (no randomness, no clock), as every node builds its own and all must agree.
    """

    def __init__(self, nodes: Mapping[str, float], replicas: int, tokens_per_node: int) -> None:
        """``nodes``: name -> weight (1.0 is the ordinary one), possibly empty."""
        ...

    def owners(self, key: bytes) -> tuple[str, ...]:
        """The preference list: distinct names out of ``nodes``, ``min(replicas, len(nodes))`` of them."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class Arc:
    """The tokens ``start <= token < end``, all with the same owners. No arc wraps: ``end`` is at most ``TOKENS``."""

    start: int
    end: int
    owners: tuple[str, ...]

    @property
    def share(self) -> float:
        """Its part of the circle, 0 to 1."""
        return (self.end - self.start) / TOKENS


@dataclass(frozen=True, slots=True, order=True)
class Move:
    """The tokens ``start <= token < end`` whose owners change."""

    start: int
    end: int
    old_owners: tuple[str, ...]
    new_owners: tuple[str, ...]

    @property
    def share(self) -> float:
        return (self.end - self.start) / TOKENS


class HashRing:
    """Consistent hashing with virtual nodes and weights: the default placement.

    ``nodes``: name -> weight above 0. Raises ``ValueError`` for a count below 1 or a weight out of range.
    """

    __slots__ = ("_owners", "_tokens", "nodes", "replicas", "tokens_per_node")

    def __init__(self, nodes: Mapping[str, float], replicas: int, tokens_per_node: int) -> None:
        if replicas < 1 or tokens_per_node < 1:
            raise ValueError(f"replicas = {replicas}, tokens_per_node = {tokens_per_node}: both must be at least 1")
        self.nodes = {name: nodes[name] for name in sorted(nodes)}
        self.replicas = replicas
        self.tokens_per_node = tokens_per_node
        holder: dict[int, str] = {}
        for name, weight in self.nodes.items():
            if not 0.0 < weight <= WEIGHT_MAX:
                raise ValueError(f"{name}: weight = {weight}: allowed are values above 0 up to {WEIGHT_MAX}")
            for number in range(max(1, round(tokens_per_node * weight))):
                # Of two nodes with the same token the first name keeps it, in whatever order they came.
                holder.setdefault(token_of(f"{name}#{number}".encode()), name)
        self._tokens = sorted(holder)
        self._owners = _preference_lists([holder[token] for token in self._tokens], min(replicas, len(self.nodes)))

    def owners(self, key: bytes) -> tuple[str, ...]:
        """The preference list of a key; empty when the ring is."""
        return self._owners[bisect_left(self._tokens, xxh3_64_intdigest(key))]

    def owners_of_token(self, token: int) -> tuple[str, ...]:
        return self._owners[bisect_left(self._tokens, token)]

    @property
    def tokens(self) -> list[tuple[int, str]]:
        """All tokens on the circle with their nodes, ascending."""
        return [(token, owners[0]) for token, owners in zip(self._tokens, self._owners, strict=False)]

    def arcs(self) -> list[Arc]:
        """The whole circle, ascending, without gaps; empty when the ring is. Neighbours may have equal owners."""
        if not self._tokens:
            return []
        starts = [0, *(token + 1 for token in self._tokens)]
        ends = [*starts[1:], TOKENS]
        return [
            Arc(start, end, owners)
            for start, end, owners in zip(starts, ends, self._owners, strict=True)
            if start < end
        ]


def _preference_lists(holders: list[str], length: int) -> list[tuple[str, ...]]:
    """For each token's position its preference list, and once more the first, for the arc past the last token.

    Walks the circle backwards: the list at a position is its holder, then the next position's list without it. That
    list may be one short of ``length`` when the holder was in it; then it is walked for.
    """
    if not holders:
        return [()]
    count = len(holders)
    lists: list[tuple[str, ...]] = [()] * count
    following = lists[0] = _walk(holders, 0, length)
    shared: dict[tuple[str, ...], tuple[str, ...]] = {following: following}
    for position in range(count - 1, 0, -1):
        holder = holders[position]
        if holder == following[0]:
            lists[position] = following
            continue
        owners = _walk(holders, position, length) if holder in following[:-1] else (holder, *following[: length - 1])
        # Equal lists are one object: a ring of 1,000 nodes keeps 32,000 of them.
        following = lists[position] = shared.setdefault(owners, owners)
    lists.append(lists[0])
    return lists


def _walk(holders: list[str], position: int, length: int) -> tuple[str, ...]:
    found: list[str] = []
    count = len(holders)
    for step in range(count):
        holder = holders[(position + step) % count]
        if holder not in found:
            found.append(holder)
            if len(found) == length:
                break
    return tuple(found)


def arcs_of(placement: Placement) -> list[Arc]:
    """The arcs of any placement: its own when it has ``arcs()``, else a picture drawn from :data:`ARC_SAMPLES` keys.

    A placement need not be made of arcs (rendezvous hashing is not); the picture then shows each sampled key's owners
    on the range of tokens around it.
    """
    own = _arcs_method(placement)
    if own is not None:
        return list(own())
    samples = sorted((token_of(key), key) for key in _sample_keys())
    ends = [*((a + b) // 2 for (a, _), (b, _) in pairwise(samples)), TOKENS]
    arcs: list[Arc] = []
    start = 0
    for (_, key), end in zip(samples, ends, strict=True):
        owners = tuple(placement.owners(key))
        if owners and end > start:
            if arcs and arcs[-1].owners == owners:
                arcs[-1] = Arc(arcs[-1].start, end, owners)
            else:
                arcs.append(Arc(start, end, owners))
        start = end
    return arcs


def _arcs_method(placement: Any) -> Callable[[], Iterable[Arc]] | None:
    """``arcs`` of a placement, unless it was inherited by a class that has its own ``owners``: then it would lie."""
    if isinstance(placement, CheckedPlacement):
        return placement.arcs
    for cls in type(placement).__mro__:
        if "arcs" in vars(cls):
            return cast("Callable[[], Iterable[Arc]]", placement.arcs)
        if "owners" in vars(cls):
            return None
    return None


def _sample_keys() -> Iterator[bytes]:
    return (b"sample-%d" % number for number in range(ARC_SAMPLES))


def diff(old: Placement, new: Placement) -> list[Move]:
    """Which ranges of tokens have other owners in ``new``: ascending, disjoint, neighbours with equal moves joined.

    Exact when both have ``arcs()`` (the hash ring has); otherwise as exact as the picture of :func:`arcs_of`. An empty
    ring owns nothing: the empty tuple stands for its owners. A change in the order of owners counts as a change.
    """
    moves: list[Move] = []
    for start, end, old_owners, new_owners in _overlay(arcs_of(old), arcs_of(new)):
        if old_owners == new_owners:
            continue
        last = moves[-1] if moves else None
        if last and last.end == start and last.old_owners == old_owners and last.new_owners == new_owners:
            moves[-1] = Move(last.start, end, old_owners, new_owners)
        else:
            moves.append(Move(start, end, old_owners, new_owners))
    return moves


def _overlay(old: list[Arc], new: list[Arc]) -> Iterator[tuple[int, int, tuple[str, ...], tuple[str, ...]]]:
    """Both coverings of the circle, cut at the borders of either."""
    nowhere = [Arc(0, TOKENS, ())]
    old, new = old or nowhere, new or nowhere
    start = i = j = 0
    while i < len(old) and j < len(new):
        end = min(old[i].end, new[j].end)
        yield start, end, old[i].owners, new[j].owners
        i += old[i].end == end
        j += new[j].end == end
        start = end


class CheckedPlacement:
    """A student's placement at work: what it raises or returns wrongly becomes one clear :class:`PolicyError`.

    Unlike the conformance test, which tries samples before a class is installed, this judges every answer.
    """

    __slots__ = ("_count", "_inner", "_nodes", "_policy", "arcs")

    def __init__(self, cls: type, policy: PolicySource, nodes: Mapping[str, float], replicas: int, tokens: int) -> None:
        self._policy = policy
        self._nodes = nodes
        self._count = min(replicas, len(nodes))
        try:
            self._inner = cls(dict(nodes), replicas, tokens)
        except Exception as error:
            raise PolicyError(f"slot 'placement': {describe_failure(error, policy)}") from error
        self.arcs = _arcs_method(self._inner)

    def owners(self, key: bytes) -> tuple[str, ...]:
        """Raises :class:`PolicyError` that shows the line at fault, or what is wrong with the answer."""
        try:
            owners = self._inner.owners(key)
        except Exception as error:
            raise PolicyError(f"slot 'placement': {describe_failure(error, self._policy)}") from error
        wrong = _what_is_wrong(owners, self._nodes, self._count, key)
        if wrong:
            raise PolicyError(f"slot 'placement': {self._policy.name}: {wrong}")
        return tuple(owners)


def _what_is_wrong(owners: Any, nodes: Mapping[str, float], count: int, key: bytes) -> str | None:
    """What a preference list lacks, in words for the student who wrote it; ``None`` when it is right."""
    shown = f"owners({key!r}) with {len(nodes)} nodes"
    if not isinstance(owners, (tuple, list)):
        return f"{shown} returned {type(owners).__name__} ({owners!r:.80}); expected a tuple of node names"
    strange = [owner for owner in owners if not isinstance(owner, str) or owner not in nodes]
    if strange:
        return f"{shown} names {strange[0]!r}, which is no node of the ring; the nodes are {', '.join(nodes)[:200]}"
    if len(dict.fromkeys(owners)) != len(owners):
        return (
            f"{shown} returned {tuple(owners)!r}: one node twice. Two copies on one node die together; "
            "after the first owner take the next *distinct* nodes"
        )
    if len(owners) != count:
        return f"{shown} returned {len(owners)} owners; expected {count}: min(replicas, number of nodes)"
    return None


def check_placement(cls: type) -> None:
    """The conformance test of the slot. Raises ``AssertionError`` with a message for the student.

    First the shape of every answer, then whether all nodes would agree: the simpler mistake is named first.
    """
    keys = [b"key-%d" % number for number in range(64)] + [b"", b"\x00", b"\xff" * 40]
    memberships = [{f"node-{number}": 1.0 for number in range(1, count + 1)} for count in (1, 2, 3, 5, 8)]
    for nodes in memberships:
        for replicas in (1, 3):
            ring = cls(dict(nodes), replicas, 8)
            for key in keys:
                wrong = _what_is_wrong(ring.owners(key), nodes, min(replicas, len(nodes)), key)
                assert wrong is None, wrong
    for nodes in memberships:
        ring = cls(dict(nodes), 3, 8)
        twin = cls({name: nodes[name] for name in reversed(list(nodes))}, 3, 8)
        for key in keys:
            once, again, theirs = (tuple(placement.owners(key)) for placement in (ring, ring, twin))
            assert again == once, (
                f"owners({key!r}) returned {once!r} and then {again!r}: the same key must always have the same owners"
            )
            assert theirs == once, (
                f"owners({key!r}) is {once!r} when the nodes are given in one order and {theirs!r} in another: "
                "every node builds its own ring, and all must agree"
            )
    assert tuple(cls({}, 3, 8).owners(b"key")) == (), "with no nodes, owners(key) must be the empty tuple"


PLACEMENT: Final = declare_slot(
    Slot(
        name="placement",
        default=HashRing,
        methods=("owners",),
        check=check_placement,
        doc="which nodes hold a key: built from {name: weight}, replicas and tokens_per_node",
    )
)

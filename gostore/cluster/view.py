"""The view: what the cluster consists of in one epoch. Immutable, shared, with its rings built when first asked for.

Every change of the cluster is a numbered event that turns the view of epoch e into that of e + 1. The masters' group
commits one event for an epoch, so there is one view of it. The *digest* chains the events: it is the hash of the
previous digest and the event, so that two nodes with the same epoch and digest went through the same history; and what
belongs to the history of another cluster is recognised.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from gostore.cluster.members import (
    GLOBAL_RING,
    MASTERS_RING,
    Member,
    MemberChange,
    NodeState,
    is_legal,
)
from gostore.cluster.ring import CheckedPlacement, HashRing, Placement
from gostore.core.errors import NotFound, NotSupported, PolicyError, Unavailable
from gostore.core.slots import PolicySource, load_policy

K = TypeVar("K")
V = TypeVar("V")

FORMAT_VERSION: Final = 1
"""Of a view as it is written and sent. The first one carries no number; a later one does, under ``version``."""

RINGS_KEPT_MAX: Final = 16
"""Rings one cache keeps. A view needs one per ring; old views live as long as a repair compares with them."""

VIEWS_KEPT_MAX: Final = 256
"""Views one cache shares. More than the epochs that are under way at a time, in a simulated world of many nodes."""

RING_REPLICAS_MAX: Final = 64
RING_TOKENS_MAX: Final = 4096

Founders = tuple[tuple[str, ...], ...]
"""Shard -> the nodes with which its group begins, in the order of preference."""


DEFAULT_POLICY: Final = PolicySource("", "")
"""Stands for "back to the default" where a policy is installed; a view holds ``None`` then."""


@dataclass(frozen=True, slots=True)
class RingSpec:
    """How a ring is built: copies of a key, virtual nodes of a node of weight 1."""

    replicas: int
    tokens_per_node: int

    def to_wire(self) -> list[int]:
        return [self.replicas, self.tokens_per_node]

    @classmethod
    def from_wire(cls, wire: Any) -> RingSpec:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make."""
        match wire:
            case [int(replicas), int(tokens)] if 1 <= replicas <= RING_REPLICAS_MAX and 1 <= tokens <= RING_TOKENS_MAX:
                return cls(replicas, tokens)
        raise ValueError(f"not a ring: {wire!r:.100}; expected [replicas, tokens_per_node]")


class RingCache:
    """Rings and views shared by all that hold it: the nodes of one process, or all nodes of a simulated world.

    A ring depends on the policy, the specification and the (name, weight) of those on it; who asks does not matter.
    ``default``: the placement when the view names no policy; ``load``: makes a class of a policy's source (raises
    ``PolicyError``). Bounded by :data:`RINGS_KEPT_MAX` and :data:`VIEWS_KEPT_MAX`, the longest unused goes first.
    """

    def __init__(
        self,
        default: type = HashRing,
        load: Callable[[PolicySource], type] = lambda policy: load_policy("placement", policy),
    ) -> None:
        self.default = default
        self._load = load
        self._classes: OrderedDict[PolicySource, type] = OrderedDict()
        self._rings: OrderedDict[Any, Placement] = OrderedDict()
        self._views: OrderedDict[tuple[str, int, int], View] = OrderedDict()
        self.built = 0

    def placement_class(self, policy: PolicySource) -> type:
        """The class of a policy, compiled and checked once. Raises :class:`PolicyError`."""
        found = self._classes.get(policy)
        if found is None:
            found = self._classes[policy] = self._load(policy)
        return _bounded(self._classes, policy, RINGS_KEPT_MAX, found)

    def ring(self, policy: PolicySource | None, spec: RingSpec, nodes: Mapping[str, float], *, own: bool) -> Placement:
        """The placement of ``nodes``; ``own``: by :class:`HashRing` whatever the policy and the default say."""
        key = (policy, own, spec, tuple(nodes.items()))
        found = self._rings.get(key)
        if found is None:
            self.built += 1
            if policy is not None and not own:
                cls = self.placement_class(policy)
                found = CheckedPlacement(cls, policy, nodes, spec.replicas, spec.tokens_per_node)
            else:
                found = (HashRing if own else self.default)(nodes, spec.replicas, spec.tokens_per_node)
            self._rings[key] = found
        return _bounded(self._rings, key, RINGS_KEPT_MAX, found)

    def known(self, cluster: str, epoch: int, digest: int) -> View | None:
        """The view of this history when somebody here has it already."""
        return self._views.get((cluster, epoch, digest))

    def share(self, view: View) -> View:
        """The one object that stands for all views equal to this one."""
        key = (view.cluster, view.epoch, view.digest)
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = view
        return _bounded(self._views, key, VIEWS_KEPT_MAX, found)


def _bounded(cache: OrderedDict[K, V], key: K, size_max: int, value: V) -> V:
    cache.move_to_end(key)
    while len(cache) > size_max:
        cache.popitem(last=False)
    return value


@dataclass(frozen=True, slots=True)
class Resolution:
    """The online nodes that hold a key, in the order of preference."""

    key: bytes
    owners: tuple[str, ...]

    @property
    def first(self) -> str:
        """The key's master. Raises :class:`Unavailable` when the ring is empty."""
        return self.nth(0)

    def nth(self, n: int) -> str:
        """The n-th online owner, from 0. Raises :class:`Unavailable` when there are fewer."""
        if not 0 <= n < len(self.owners):
            raise Unavailable(f"key {self.key!r:.80} has {len(self.owners)} online owners; number {n} was asked for")
        return self.owners[n]

    def is_first(self, name: str) -> bool:
        return self.owners[:1] == (name,)

    def is_among(self, name: str) -> bool:
        return name in self.owners


@dataclass(frozen=True)
class View:
    """The cluster in one epoch.

    ``members``: by name, sorted, those who left included. ``rings``: name -> how it is built. ``policy``: the placement
    of the global ring, ``None`` for the default. ``master``, ``term``: who committed the event that made this view, and
    in which term of the masters' group; ``None`` and 0 before the first. ``founders``: with whom the groups of the
    shards begin, empty before anybody was online, and never changed since. ``cache`` is handed on from view to view and
    is no part of the value.
    """

    cluster: str
    epoch: int
    members: Mapping[str, Member]
    rings: Mapping[str, RingSpec]
    policy: PolicySource | None = None
    digest: int = 0
    master: str | None = None
    term: int = 0
    founders: Founders = ()
    cache: RingCache = field(default_factory=RingCache, compare=False, repr=False)
    _memo: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def version(self) -> tuple[int, int]:
        """(epoch, digest): of one history the greater is the later; equal means equal views."""
        return self.epoch, self.digest

    @property
    def online(self) -> tuple[str, ...]:
        """Names of the online members, sorted."""
        found: tuple[str, ...] | None = self._memo.get("online")
        if found is None:
            found = self._memo["online"] = tuple(name for name, member in self.members.items() if member.online)
        return found

    @property
    def masters(self) -> tuple[str, ...]:
        """The masters ring in its order, which is seniority: (epoch of joining, name). Whatever their state."""
        found: tuple[str, ...] | None = self._memo.get("masters")
        if found is None:
            ring = [m for m in self.members.values() if MASTERS_RING in m.rings and m.state is not NodeState.LEFT]
            found = self._memo["masters"] = tuple(m.name for m in sorted(ring, key=lambda m: (m.joined, m.name)))
        return found

    def in_states(self, *states: NodeState) -> tuple[str, ...]:
        return tuple(name for name, member in self.members.items() if member.state in states)

    def ring(self, name: str = GLOBAL_RING) -> Placement:
        """The placement over the online members of a ring, built once.

        Raises :class:`NotFound` for an unknown ring and :class:`PolicyError` when a student's class fails. The policy
        rules the global ring alone: an error in it must not depose the master.
        """
        placement: Placement | None = self._memo.get(f"ring {name}")
        if placement is None:
            spec = self.rings.get(name)
            if spec is None:
                raise NotFound(f"there is no ring {name!r}; the rings are {', '.join(self.rings)}")
            nodes = {n: self.members[n].weight for n in self.online if name in self.members[n].rings}
            placement = self.cache.ring(self.policy, spec, nodes, own=name != GLOBAL_RING)
            self._memo[f"ring {name}"] = placement
        return placement

    def resolve(self, key: bytes, ring: str = GLOBAL_RING) -> Resolution:
        """Who holds a key. Raises as :meth:`ring` does."""
        return Resolution(key, self.ring(ring).owners(key))

    def with_members(
        self, changes: Iterable[Member], *, policy: PolicySource | None = None, digest: int = 0, **fields: Any
    ) -> View:
        """The view one epoch on, with these members' records merged in their order.

        Changes that are not legal are left out, by everybody alike. ``policy``: the new placement; ``None`` keeps it,
        :data:`DEFAULT_POLICY` ends it. ``fields``: what else of the view changes.
        """
        members = dict(self.members)
        kept = self.policy if policy is None else policy
        for member in changes:
            if is_legal(members.get(member.name), member):
                members[member.name] = member
        return replace(
            self,
            epoch=self.epoch + 1,
            members={name: members[name] for name in sorted(members)},
            policy=None if kept == DEFAULT_POLICY else kept,
            digest=digest,
            **fields,
        )

    def to_wire(self) -> dict[str, Any]:
        return {
            "cluster": self.cluster,
            "epoch": self.epoch,
            "digest": self.digest,
            "members": [member.to_wire() for member in self.members.values()],
            "rings": {name: spec.to_wire() for name, spec in self.rings.items()},
            "policy": self.policy.to_wire() if self.policy else None,
            "master": self.master,
            "term": self.term,
            "founders": founders_to_wire(self.founders),
        }

    @classmethod
    def from_wire(cls, wire: Any, cache: RingCache | None = None) -> View:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make, ``NotSupported`` for another format."""
        if isinstance(wire, dict) and wire.get("version", FORMAT_VERSION) != FORMAT_VERSION:
            raise NotSupported(
                f"a view of the cluster has format version {wire['version']!r:.20}; this release reads version "
                f"{FORMAT_VERSION}: run the release that wrote it, on all nodes"
            )
        match wire:
            case {
                "cluster": str(cluster),
                "epoch": int(epoch),
                "digest": int(digest),
                "members": [*members],
                "rings": dict(rings),
                "policy": policy,
                "master": str() | None as master,
                "term": int(term),
                "founders": founders,
            } if epoch >= 0 and digest >= 0 and term >= 0:
                cache = cache or RingCache()
                known = cache.known(cluster, epoch, digest)
                if known is not None:
                    return known
                records = [Member.from_wire(member) for member in members]
                by_name = {record.name: record for record in records}
                if len(by_name) != len(records):
                    raise ValueError("not a view: a member is listed twice")
                view = cls(
                    cluster,
                    epoch,
                    {name: by_name[name] for name in sorted(by_name)},
                    {str(name): RingSpec.from_wire(rings[name]) for name in sorted(rings)},
                    None if policy is None else PolicySource.from_wire(policy),
                    digest,
                    master,
                    term,
                    founders_from_wire(founders),
                    cache,
                )
                return cache.share(view)
        raise ValueError(f"not a view: {wire!r:.200}")


def changes_between(old: View, new: View) -> tuple[MemberChange, ...]:
    """What a watcher of ``old`` has to learn to be at ``new``, by name; steps in between are not told."""
    return tuple(
        MemberChange(old.members.get(name), member)
        for name, member in new.members.items()
        if old.members.get(name) != member
    )


def shard_key(shard: int) -> bytes:
    """The key on the ring whose owners hold a shard."""
    return b"shard:%d" % shard


def found(view: View, shards: int) -> Founders:
    """With whom the groups of so many shards begin: the owners on the ring of this view.

    A placement that raises must not keep the cluster from being born: the default ring decides in its place.
    """
    try:
        return tuple(view.ring().owners(shard_key(shard)) for shard in range(shards))
    except PolicyError:
        return found(replace(view, policy=None), shards)


def founders_to_wire(founders: Founders) -> list[list[str]]:
    return [list(names) for names in founders]


def founders_from_wire(wire: Any) -> Founders:
    """Raises ``ValueError`` on anything that :func:`founders_to_wire` did not make."""
    match wire:
        case [*shards] if all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in shards
        ):
            return tuple(tuple(names) for names in shards)
    raise ValueError(f"not founders: {wire!r:.100}; expected a list of names for each shard")

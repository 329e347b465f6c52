"""Nodes as the cluster knows them: their states, the legal changes of state, and how two records of one node merge.

A node's *incarnation* counts its lives: it grows whenever the node starts again, and whenever it refutes that it is
dead. Within one incarnation the state only moves forward, so that of two records of one node the newer is known
without a clock: the higher incarnation wins, then the later state (:data:`PRECEDENCE`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from gostore.core.address import Address

GLOBAL_RING: Final = "global"
MASTERS_RING: Final = "masters"

WEIGHT_MAX: Final = 64.0
"""A node may hold at most this many times the share of a node of weight 1; a bound on the tokens of one node."""


class NodeState(StrEnum):
    """What the cluster has decided about a node (a *suspicion* is no decision, and no state)."""

    JOINING = "joining"
    """Admitted for the first time (or after it had left); it has the state of the cluster and waits to be online."""
    CONNECTING = "connecting"
    """A member that was offline is back and waits to be online."""
    ONLINE = "online"
    """On the rings: it owns keys."""
    DISCONNECTING = "disconnecting"
    """It announced that it stops, keeps its data and will be back; it is off the rings and answers a little longer."""
    OFFLINE = "offline"
    """Declared dead, or not yet back after a restart of the cluster. Its place is kept."""
    LEAVING = "leaving"
    """It announced that it goes for good; it is off the rings and still gives away what it holds."""
    LEFT = "left"
    """Gone for good. Its name may join again, as a new node."""


PRECEDENCE: Final[dict[NodeState, int]] = {
    NodeState.JOINING: 0,
    NodeState.CONNECTING: 1,
    NodeState.ONLINE: 2,
    NodeState.DISCONNECTING: 3,
    NodeState.LEAVING: 4,
    NodeState.OFFLINE: 5,
    NodeState.LEFT: 6,
}

# state -> the states that may follow it within the same incarnation.
TRANSITIONS: Final[dict[NodeState, tuple[NodeState, ...]]] = {
    NodeState.JOINING: (NodeState.ONLINE, NodeState.OFFLINE, NodeState.LEAVING, NodeState.LEFT),
    NodeState.CONNECTING: (NodeState.ONLINE, NodeState.DISCONNECTING, NodeState.OFFLINE, NodeState.LEAVING),
    NodeState.ONLINE: (NodeState.DISCONNECTING, NodeState.OFFLINE, NodeState.LEAVING),
    NodeState.DISCONNECTING: (NodeState.OFFLINE,),
    NodeState.LEAVING: (NodeState.OFFLINE, NodeState.LEFT),
    NodeState.OFFLINE: (NodeState.LEFT,),
    NodeState.LEFT: (),
}

# With a higher incarnation a node is back: from any state but LEFT it was a member and connects, else it joins.
ENTRY: Final[dict[NodeState | None, NodeState]] = {
    None: NodeState.JOINING,
    NodeState.LEFT: NodeState.JOINING,
    **{state: NodeState.CONNECTING for state in NodeState if state is not NodeState.LEFT},
}

# Those that should answer a probe.
LIVE: Final[tuple[NodeState, ...]] = (
    NodeState.JOINING,
    NodeState.CONNECTING,
    NodeState.ONLINE,
    NodeState.DISCONNECTING,
    NodeState.LEAVING,
)
WAITING: Final[tuple[NodeState, ...]] = (NodeState.JOINING, NodeState.CONNECTING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node as the cluster knows it.

    ``rest_port``: 0 when it serves no REST. ``weight``: its share of the ring relative to a node of weight 1.
    ``joined``: the epoch in which it was first admitted, its seniority: the order of the masters ring. ``disk``: the
    mark of its data directory; another mark is another node, whatever it calls itself: it lacks what this one promised.
    Raises ``ValueError`` for a weight or a number out of range.
    """

    name: str
    address: Address
    rest_port: int = 0
    state: NodeState = NodeState.JOINING
    incarnation: int = 1
    rings: tuple[str, ...] = (GLOBAL_RING,)
    weight: float = 1.0
    joined: int = 0
    disk: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a member needs a name")
        if not 0 <= self.rest_port <= 65_535:
            raise ValueError(f"{self.name}: rest_port = {self.rest_port}: allowed are values from 0 to 65535")
        if self.incarnation < 1 or self.joined < 0:
            raise ValueError(f"{self.name}: incarnation = {self.incarnation}, joined = {self.joined}: too small")
        if not (math.isfinite(self.weight) and 0.0 < self.weight <= WEIGHT_MAX):
            raise ValueError(f"{self.name}: weight = {self.weight}: allowed are values above 0 up to {WEIGHT_MAX}")

    @property
    def online(self) -> bool:
        return self.state is NodeState.ONLINE

    @property
    def live(self) -> bool:
        """Whether it should answer a probe."""
        return self.state in LIVE

    def to(self, state: NodeState, **changes: Any) -> Member:
        """This member in another state; whether the change is legal is judged where it is merged."""
        return replace(self, state=state, **changes)

    def to_wire(self) -> list[Any]:
        return [
            self.name,
            self.address.to_wire(),
            self.rest_port,
            self.state.value,
            self.incarnation,
            list(self.rings),
            self.weight,
            self.joined,
            self.disk,
        ]

    @classmethod
    def from_wire(cls, wire: Any) -> Member:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make."""
        match wire:
            case [
                str(name),
                address,
                int(rest_port),
                str(state),
                int(incarnation),
                [*rings],
                float() | int() as weight,
                int(joined),
                str(disk),
            ] if all(isinstance(ring, str) for ring in rings):
                return cls(
                    name=name,
                    address=Address.from_wire(address),
                    rest_port=rest_port,
                    state=NodeState(state),
                    incarnation=incarnation,
                    rings=tuple(rings),
                    weight=float(weight),
                    joined=joined,
                    disk=disk,
                )
        raise ValueError(f"not a member: {wire!r:.200}")


def is_legal(old: Member | None, new: Member) -> bool:
    """Whether ``new`` may follow ``old`` (``None``: a node never heard of).

    The same incarnation may only take a step of :data:`TRANSITIONS`; a higher one is back, by :data:`ENTRY`. A record
    that changes nothing but its attributes (address, rings, weight) is legal within the same incarnation and state.
    """
    if old is None:
        return new.state is ENTRY[None]
    if new.incarnation > old.incarnation:
        # A death is declared at the highest incarnation that was heard, which may be above the one that joined.
        return new.state is ENTRY[old.state] or new.state in (NodeState.OFFLINE, NodeState.LEFT)
    if new.incarnation < old.incarnation:
        return False
    return new.state is old.state or new.state in TRANSITIONS[old.state]


def merge(old: Member | None, new: Member) -> Member | None:
    """The record to keep of two: ``new`` when its change of state is legal, ``old`` otherwise (GOSTORE, "Merge")."""
    return new if is_legal(old, new) else old


@dataclass(frozen=True, slots=True)
class MemberChange:
    """One member's change, as watchers see it. ``old`` is ``None`` for a node never heard of."""

    old: Member | None
    new: Member

    @property
    def name(self) -> str:
        return self.new.name

    @property
    def state_changed(self) -> bool:
        """Whether it entered its state: from another one, or in a new life (what lay between may not be told)."""
        return self.old is None or self.old.state is not self.new.state or self.old.incarnation != self.new.incarnation

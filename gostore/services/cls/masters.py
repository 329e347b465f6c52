"""The master: who decides what the cluster consists of, and by which rules. Pure.

Theory of operation
===================
One member decides: the first of the masters ring that is online, by seniority. What it decides is a :class:`NodeEvent`,
numbered by the epoch that it makes. Master and followers alike turn one view into the next with :func:`apply`, and an
event applies to the one view that it continues: same epoch, same history (digest). So all that reach an epoch by the
same history hold the same view.

Requests (somebody joins, died, leaves; a policy is to be installed) are gathered while the last event is being written,
and decided together (:meth:`Master.plan`): a hundred nodes that join at once cost few epochs.

*Birth.* Nobody is online before ``expect`` members wait to be, or the first of them has waited ``expect_timeout_s``;
then all go online in one event. Their rings start as they will be, and nothing has to be moved between them.

*Death.* The failure detector's word grants nothing. Before the master declares a member offline it calls the roll: it
asks all online members, the accused too. It goes on only if those who answer are a *quorum* of the online (dynamic
voting with a tie-break; Jajodia, Mutchler: "Dynamic Voting Algorithms", TODS 1990): more than half, or half with the
most senior among them. So of two sides of a partition at most one goes on, and a single node that was cut off expels
nobody. (One that restarted and is not back yet has its vote.) A master that is found dead is succeeded by the next of
its ring, under the same condition.

*Every decision* needs a quorum that answered lately: a probe, so lately that nobody can have declared the master dead
since, or the roll call. A master that wakes after it was deposed thus learns of it before it decides.

*Limits.* There is no vote on an event: in the moment between another's roll call and the arrival of its event, two
masters may still number different events alike. The fork is found by the digest; the history with the greater
(epoch, digest) stays, and who was only in the other one joins again.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
from xxhash import xxh3_64_intdigest

from gostore.cluster.members import LIVE, MASTERS_RING, WAITING, Member, MemberChange, NodeState, is_legal
from gostore.cluster.view import View
from gostore.core.address import Address
from gostore.core.errors import AlreadyExists, BadRequest, Fenced, GoStoreError, NotFound
from gostore.core.slots import PolicySource

# Those who hold a place on the masters ring; the others give theirs to the next senior.
_SEATED: Final = (NodeState.JOINING, NodeState.CONNECTING, NodeState.ONLINE, NodeState.DISCONNECTING, NodeState.OFFLINE)


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """One change of the cluster, made by ``master``: the view of (epoch - 1, previous) becomes (epoch, digest).

    ``members``: records to merge, in this order; one member may appear twice (connecting, then online).
    """

    epoch: int
    previous: int
    master: str
    members: tuple[Member, ...]
    policy: PolicySource | None = None
    digest: int = field(init=False)
    _wire: list[Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        members = [member.to_wire() for member in self.members]
        policy = self.policy.to_wire() if self.policy else None
        object.__setattr__(self, "_wire", [self.epoch, self.previous, self.master, members, policy])
        object.__setattr__(self, "digest", xxh3_64_intdigest(msgpack.packb(self._wire)))

    def to_wire(self) -> list[Any]:
        """One list for all who ask (an event is told many times): not to be changed."""
        return self._wire

    @classmethod
    def from_wire(cls, wire: Any) -> NodeEvent:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make."""
        match wire:
            case [int(epoch), int(previous), str(master), [*members], policy] if epoch >= 1 and previous >= 0:
                return cls(
                    epoch,
                    previous,
                    master,
                    tuple(Member.from_wire(member) for member in members),
                    None if policy is None else PolicySource.from_wire(policy),
                )
        raise ValueError(f"not a node event: {wire!r:.200}")


def fits(view: View, event: NodeEvent) -> bool:
    """Whether the event continues this very view."""
    return (event.epoch, event.previous) == (view.epoch + 1, view.digest)


def apply(view: View, event: NodeEvent) -> View:
    """The view after the event. Raises :class:`Fenced` when it does not continue this view."""
    if not fits(view, event):
        raise Fenced(
            f"event {event.epoch} of {event.master} does not continue epoch {view.epoch} here", epoch=view.epoch
        )
    known = view.cache.known(view.cluster, event.epoch, event.digest)
    if known is not None:
        return known
    return view.cache.share(view.with_members(event.members, digest=event.digest, policy=event.policy))


def changes_of(view: View, event: NodeEvent) -> tuple[MemberChange, ...]:
    """The steps that the event takes, in its order; ``view`` is the one that it continues."""
    latest: dict[str, Member] = {}
    steps = []
    for member in event.members:
        old = latest.get(member.name) or view.members.get(member.name)
        if is_legal(old, member) and member != old:
            latest[member.name] = member
            steps.append(MemberChange(old, member))
    return tuple(steps)


def acting_master(view: View, dead: Container[str] = ()) -> str | None:
    """Who leads as seen by somebody who takes ``dead`` for dead: the first of the masters ring that is left."""
    if view.online:
        return next((name for name in view.masters if view.members[name].online and name not in dead), None)
    waiting = (name for name in view.masters if view.members[name].state in WAITING)
    return next((name for name in waiting if name not in dead), None)


def has_quorum(view: View, alive: Container[str]) -> bool:
    """Whether those alive may go on without the others: more than half of the online, or half with the most senior.

    While nobody is online there is nothing to protect.
    """
    return not view.online or _are_quorum(view, view.online, alive)


def _are_quorum(view: View, voters: Sequence[str], alive: Container[str]) -> bool:
    votes = sum(name in alive for name in voters)
    senior = min(voters, key=lambda name: (view.members[name].joined, name))
    return 2 * votes > len(voters) or (2 * votes == len(voters) and senior in alive)


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A node asks to be a member."""

    name: str
    address: Address
    rest_port: int
    incarnation: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Dead:
    """The failure detector found that a member died in this incarnation, and the roll call agreed."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Depart:
    """A member announces its own state: disconnecting, leaving or left."""

    name: str
    incarnation: int
    state: NodeState


@dataclass(frozen=True, slots=True)
class Install:
    """Another placement for the global ring."""

    policy: PolicySource


Request = Join | Dead | Depart | Install


@dataclass(frozen=True, slots=True)
class Plan:
    """``event``: what to commit, ``None`` when nothing changes. ``refusals``: per request, ``None`` when granted."""

    event: NodeEvent | None
    refusals: tuple[GoStoreError | None, ...] = ()


class Master:
    """The decisions of the node ``name`` while it leads."""

    def __init__(self, name: str, *, expect: int, expect_timeout_s: float, masters_max: int) -> None:
        self.name = name
        self.expect = expect
        self.expect_timeout_s = expect_timeout_s
        self.masters_max = masters_max
        self._waiting_since_s: float | None = None

    def plan(self, view: View, requests: Sequence[Request], now_s: float, dead: Container[str] = ()) -> Plan:
        """Decide on requests and on who goes online; ``dead``: whom the failure detector found dead meanwhile."""
        draft = _Draft(view)
        refusals: list[GoStoreError | None] = []
        for request in requests:
            try:
                self._decide(draft, request)
                refusals.append(None)
            except GoStoreError as error:
                refusals.append(error)
        draft.seat_masters(self.masters_max)
        # Joiners go online by an event of their own, which reaches them when they hold the state it continues.
        if not draft.changes and draft.policy is None:
            self._release(draft, now_s, dead)
        return Plan(draft.event(self.name), tuple(refusals))

    def due_s(self, view: View) -> float | None:
        """When to plan again without a request: the end of the wait for the expected."""
        if self._waiting_since_s is None or view.online or not view.in_states(*WAITING):
            return None
        return self._waiting_since_s + self.expect_timeout_s

    def _decide(self, draft: _Draft, request: Request) -> None:
        match request:
            case Join():
                _join(draft, request)
            case Dead(name, incarnation):
                member = draft.members.get(name)
                if member is not None and member.live and incarnation >= member.incarnation:
                    draft.take(member.to(NodeState.OFFLINE, incarnation=incarnation))
            case Depart():
                _depart(draft, request)
            case Install(policy):
                draft.policy = policy

    def _release(self, draft: _Draft, now_s: float, dead: Container[str]) -> None:
        """Bring those online who wait, as soon as it is allowed."""
        waiting = [name for name, m in draft.members.items() if m.state in WAITING and name not in dead]
        if not waiting:
            self._waiting_since_s = None
            return
        if not any(member.online for member in draft.members.values()) and len(waiting) < self.expect:
            if self._waiting_since_s is None:
                self._waiting_since_s = now_s
            if now_s < self._waiting_since_s + self.expect_timeout_s:
                return
        self._waiting_since_s = None
        for name in waiting:
            draft.take(draft.members[name].to(NodeState.ONLINE))


class _Draft:
    """An event in the making: later requests see what earlier ones have changed."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.members = dict(view.members)
        self.changes: list[Member] = []
        self.policy: PolicySource | None = None

    def take(self, member: Member) -> None:
        old = self.members.get(member.name)
        assert is_legal(old, member), f"{old} -> {member}"
        if member == old:
            return
        self.members[member.name] = member
        if old in self.changes and old.state is member.state:
            # One step of the member: it joins and takes a seat.
            self.changes[self.changes.index(old)] = member
        else:
            self.changes.append(member)

    def seat_masters(self, masters_max: int) -> None:
        """Fill the masters ring with the most senior."""
        by_seniority = sorted(self.members.values(), key=lambda member: (member.joined, member.name))
        seated = sum(MASTERS_RING in member.rings and member.state in _SEATED for member in by_seniority)
        for member in by_seniority:
            if seated < masters_max and MASTERS_RING not in member.rings and (member.online or member.state in WAITING):
                self.take(member.to(member.state, rings=(*member.rings, MASTERS_RING)))
                seated += 1

    def event(self, master: str) -> NodeEvent | None:
        if not self.changes and self.policy is None:
            return None
        return NodeEvent(self.view.epoch + 1, self.view.digest, master, tuple(self.changes), self.policy)


def _join(draft: _Draft, join: Join) -> None:
    """Raises :class:`AlreadyExists` when the name is taken, or this one is not its latest life.

    A higher incarnation is the same node in a later life: it comes from the same data directory, which one process
    at a time can use, and comm already hears the later life only.
    """
    old = draft.members.get(join.name)
    try:
        new = Member(
            name=join.name,
            address=join.address,
            rest_port=join.rest_port,
            state=NodeState.JOINING,
            incarnation=join.incarnation,
            weight=join.weight,
            joined=draft.view.epoch + 1,
        )
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if old is None or (old.state is NodeState.LEFT and join.incarnation > old.incarnation):
        draft.take(new)
        return
    if old.live and (old.incarnation, old.address) == (join.incarnation, join.address):
        return  # asked twice
    if join.incarnation <= old.incarnation:
        doing = f"is {old.state} at {old.address}" if old.live else f"was here (it is {old.state} now)"
        raise AlreadyExists(
            f"a node {join.name!r} {doing}, in incarnation {old.incarnation}; the one at {join.address} comes in "
            f"{join.incarnation}, so it is another node, or has lost its data directory: choose another name",
            incarnation=old.incarnation,
            address=old.address.to_wire(),
            live=old.live,
        )
    if old.live:
        # It restarted before anybody missed it.
        draft.take(old.to(NodeState.OFFLINE))
    draft.take(
        new.to(NodeState.JOINING)
        if old.state is NodeState.LEFT
        else new.to(NodeState.CONNECTING, rings=old.rings, joined=old.joined)
    )


def _depart(draft: _Draft, depart: Depart) -> None:
    """Raises :class:`NotFound`, :class:`Fenced` for an earlier life, :class:`BadRequest` when it cannot go now."""
    member = draft.members.get(depart.name)
    if member is None:
        raise NotFound(f"there is no node {depart.name!r}")
    if depart.incarnation < member.incarnation:
        raise Fenced(f"{depart.name} lives in incarnation {member.incarnation}; {depart.incarnation} is over")
    if member.state is depart.state:
        return  # asked twice
    others = [m.name for m in draft.members.values() if m.online and m.name != member.name]
    if depart.state is NodeState.LEAVING and member.online and not others:
        raise BadRequest(f"{depart.name} is the last one online and cannot leave: stop it instead")
    new = member.to(depart.state)
    if depart.state in (NodeState.LEAVING, NodeState.LEFT):
        new = new.to(depart.state, rings=tuple(ring for ring in member.rings if ring != MASTERS_RING))
    if not is_legal(member, new):
        raise BadRequest(f"{depart.name} is {member.state}; from there it cannot be {depart.state}")
    draft.take(new)


def birth(view: View, join: Join, policy: PolicySource | None) -> NodeEvent:
    """The first event of a cluster, by its first node; ``view`` is empty, of epoch 0."""
    draft = _Draft(view)
    draft.policy = policy
    _join(draft, join)
    draft.seat_masters(1)
    event = draft.event(join.name)
    assert event is not None
    return event


def rebirth(view: View, join: Join) -> NodeEvent:
    """The first event after a restart of the whole cluster: all are offline but the one that leads again.

    ``view``: the latest that was saved by those who are back. Raises as a join does.
    """
    draft = _Draft(view)
    for member in view.members.values():
        if member.state in LIVE:
            draft.take(member.to(NodeState.OFFLINE))
    _join(draft, join)
    event = draft.event(join.name)
    assert event is not None
    return event


def comeback(view: View, join: Join) -> NodeEvent:
    """The event by which a master that restarted before it was missed brings itself back. Raises as a join does."""
    draft = _Draft(view)
    _join(draft, join)
    draft.take(draft.members[join.name].to(NodeState.ONLINE))
    event = draft.event(join.name)
    assert event is not None
    return event


def leader_of_rebirth(view: View, back: Iterable[str]) -> str | None:
    """Of those that are back after a restart of the cluster, who leads; ``None`` while they are no quorum.

    The master of the view that was saved, or the first of its masters ring that is back.
    """
    here = frozenset(back)
    # A view in which all still wait to be online may be older than what the others saved.
    voters = view.online or view.in_states(*WAITING)
    if voters and not _are_quorum(view, voters, here):
        return None
    return view.master if view.master in here else next((name for name in view.masters if name in here), None)

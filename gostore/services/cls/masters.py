"""The master: what the cluster consists of, and by which rules. Pure.

Theory of operation
===================
Some members, the *masters*, are a Raft group (``gostore.consensus``). Its log is the history of the cluster: an entry
is a :class:`NodeEvent`, numbered by the epoch that it makes. The leader of the group is the master: it decides
(:meth:`Master.plan`), and what it decides holds when it is committed, not before. Masters and followers alike turn one
view into the next with :func:`apply`, and an event applies to the one view that it continues: same epoch, same history
(digest). What a leader planned on a view that has been overtaken is in the log too, fits nothing, and is void for all.
So an epoch has one event, one view and one master, whatever the network does; and a member is admitted or expelled by
a committed entry only.

*A new leader* begins with an event of its own, even if nothing else changes: it names the master and the term, and the
view says who leads.

Requests (somebody joins, died, leaves; a policy is to be installed) are gathered while the last event is being
committed, and decided together: a hundred nodes that join at once cost few epochs.

*Birth.* Nobody is online before ``expect`` members wait to be and those who shall be masters are, or the first of them
has waited ``expect_timeout_s``; then all go online in one event. Their rings start as they will be, and nothing has to
be moved between them. That event also names the founders of the shards' groups, once and for all.

*Seats.* The masters ring has up to ``masters_max`` seats, an odd number: an even group would be stopped by as many
losses as the next smaller odd one. They are held by the most senior; who leaves gives its seat up, and who is offline
for ``seat_timeout_s`` gives it to another member, if there is one. The members of the Raft group follow the seats
(:func:`next_group`): a new master learns first, then votes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgpack
from xxhash import xxh3_64_intdigest

from gostore.cluster.members import MASTERS_RING, WAITING, Member, MemberChange, NodeState, is_legal
from gostore.cluster.view import Founders, RingSpec, View, founders_from_wire, founders_to_wire
from gostore.core.address import Address
from gostore.core.errors import AlreadyExists, BadRequest, Fenced, GoStoreError, NotFound, NotSupported
from gostore.core.slots import PolicySource

EVENT_FIELDS: Final = 8
"""Of an event as it is written and sent. A later format has more of them, by which it is recognised."""

# Those who hold a place on the masters ring; the others give theirs to the next senior.
_SEATED: Final = (NodeState.JOINING, NodeState.CONNECTING, NodeState.ONLINE, NodeState.DISCONNECTING, NodeState.OFFLINE)


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """One change of the cluster, made by ``master`` in ``term``: the view of (epoch - 1, previous) becomes (epoch,
    digest).

    ``members``: records to merge, in this order; one member may appear twice (connecting, then online). ``rings``: of
    the first event. ``founders``: of the one that brings the first members online.
    """

    epoch: int
    previous: int
    term: int
    master: str
    members: tuple[Member, ...] = ()
    policy: PolicySource | None = None
    rings: Mapping[str, RingSpec] | None = None
    founders: Founders = ()
    digest: int = field(init=False)
    _wire: list[Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        rings = None if self.rings is None else {name: spec.to_wire() for name, spec in self.rings.items()}
        wire = [
            self.epoch,
            self.previous,
            self.term,
            self.master,
            [member.to_wire() for member in self.members],
            self.policy.to_wire() if self.policy else None,
            rings,
            founders_to_wire(self.founders),
        ]
        object.__setattr__(self, "_wire", wire)
        object.__setattr__(self, "digest", xxh3_64_intdigest(msgpack.packb(wire)))

    def to_wire(self) -> list[Any]:
        """One list for all who ask (an event is told many times): not to be changed."""
        return self._wire

    @classmethod
    def from_wire(cls, wire: Any) -> NodeEvent:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make, ``NotSupported`` for another format."""
        if isinstance(wire, list) and len(wire) > EVENT_FIELDS:
            raise NotSupported(
                f"an event of the masters has {len(wire)} fields; this release reads {EVENT_FIELDS}: run the release "
                "that wrote it, on all nodes"
            )
        match wire:
            case [
                int(epoch), int(previous), int(term), str(master), [*members], policy, dict() | None as rings, founders
            ] if epoch >= 1 and previous >= 0 and term >= 0:  # fmt: skip
                return cls(
                    epoch,
                    previous,
                    term,
                    master,
                    tuple(Member.from_wire(member) for member in members),
                    None if policy is None else PolicySource.from_wire(policy),
                    None if rings is None else {str(name): RingSpec.from_wire(rings[name]) for name in rings},
                    founders_from_wire(founders),
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
    return view.cache.share(
        view.with_members(
            event.members,
            policy=event.policy,
            digest=event.digest,
            master=event.master,
            term=event.term,
            rings=view.rings if event.rings is None else event.rings,
            founders=view.founders or event.founders,
        )
    )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A node asks to be a member."""

    name: str
    address: Address
    rest_port: int
    incarnation: int
    weight: float = 1.0
    disk: str = ""


@dataclass(frozen=True, slots=True)
class Dead:
    """The failure detector found that a member died in this incarnation, and it did not answer the last call."""

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


def next_group(
    view: View, voters: Collection[str], learners: Collection[str], suspected: Container[str]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The next step of the masters' Raft group towards the seats: (voters, learners), ``None`` when it is there.

    A new voter is a learner first; then it is exchanged, together with those who gave their seats up. Who is not alive
    is not taken in. The number of voters stays odd, as far as those who are alive allow it.
    """
    here = [n for n in view.masters if n in voters or (view.members[n].live and n not in suspected)]
    if len(here) % 2 == 0 and (new := [name for name in here if name not in voters]):
        here.remove(new[-1])
    if not here or sorted(here) == sorted(voters):
        return (tuple(voters), ()) if learners else None
    missing = [name for name in here if name not in voters]
    if all(name in learners for name in missing):
        return tuple(here), ()
    return tuple(voters), tuple(missing)


@dataclass(frozen=True, slots=True)
class Plan:
    """``event``: what to commit, ``None`` when nothing changes. ``refusals``: per request, ``None`` when granted."""

    event: NodeEvent | None
    refusals: tuple[GoStoreError | None, ...] = ()


class Master:
    """The decisions of the node ``name`` while it leads.

    ``found``: with whom the shards' groups begin, by the view that brings the first members online.
    """

    def __init__(
        self,
        name: str,
        *,
        expect: int,
        expect_timeout_s: float,
        masters_max: int,
        seat_timeout_s: float,
        found: Callable[[View], Founders],
    ) -> None:
        self.name = name
        self.expect = expect
        self.expect_timeout_s = expect_timeout_s
        self.masters_max = masters_max
        self.seat_timeout_s = seat_timeout_s
        self._found = found
        self._waiting_since_s: float | None = None
        self._offline_since_s: dict[str, float] = {}
        """Masters that are offline, as far as this leader has seen it."""

    def plan(
        self,
        view: View,
        term: int,
        requests: Sequence[Request],
        now_s: float,
        *,
        dead: Container[str] = (),
        seated: bool = True,
        policy: PolicySource | None = None,
    ) -> Plan:
        """Decide on requests, on seats, and on who goes online.

        ``dead``: whom the failure detector found dead meanwhile. ``seated``: the group of the masters is what the seats
        say. ``policy``: with which a new cluster begins.
        """
        draft = _Draft(view)
        if view.epoch == 0:
            draft.policy, draft.rings = policy, view.rings
        refusals: list[GoStoreError | None] = []
        for request in requests:
            try:
                self._decide(draft, request)
                refusals.append(None)
            except GoStoreError as error:
                refusals.append(error)
        draft.seat_masters(self.masters_max, self._long_gone(view, now_s))
        # Joiners go online by an event of their own, which reaches them when they hold the state it continues.
        if not draft.changes and draft.policy is None:
            self._release(draft, now_s, dead, seated)
        return Plan(draft.event(self.name, term), tuple(refusals))

    def due_s(self, view: View, now_s: float) -> float | None:
        """When to plan again without a request: the end of a wait."""
        waits = [since_s + self.seat_timeout_s for since_s in self._offline_since_s.values()]
        if self._waiting_since_s is not None:
            waits.append(self._waiting_since_s + self.expect_timeout_s)
        return min((wait_s for wait_s in waits if wait_s > now_s), default=None)

    def may_seat(self, view: View) -> bool:
        """Whether the group may follow the seats: not before all who are expected at its birth are here."""
        return bool(view.founders) or len(view.in_states(*WAITING)) >= self.expect

    def _long_gone(self, view: View, now_s: float) -> list[str]:
        offline = [name for name in view.masters if view.members[name].state is NodeState.OFFLINE]
        self._offline_since_s = {name: self._offline_since_s.get(name, now_s) for name in offline}
        return [name for name in offline if now_s >= self._offline_since_s[name] + self.seat_timeout_s]

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

    def _release(self, draft: _Draft, now_s: float, dead: Container[str], seated: bool) -> None:
        """Bring those online who wait, as soon as it is allowed."""
        waiting = [name for name, m in draft.members.items() if m.state in WAITING and name not in dead]
        if not waiting:
            self._waiting_since_s = None
            return
        born = bool(draft.view.founders)
        if not born and (len(waiting) < self.expect or not seated):
            if self._waiting_since_s is None:
                self._waiting_since_s = now_s
            if now_s < self._waiting_since_s + self.expect_timeout_s:
                return
        self._waiting_since_s = None
        for name in waiting:
            draft.take(draft.members[name].to(NodeState.ONLINE))
        if not born:
            draft.founders = self._found(draft.view.with_members(draft.changes))


class _Draft:
    """An event in the making: later requests see what earlier ones have changed."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.members = dict(view.members)
        self.changes: list[Member] = []
        self.policy: PolicySource | None = None
        self.rings: Mapping[str, RingSpec] | None = None
        self.founders: Founders = ()

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

    def seat_masters(self, masters_max: int, long_gone: Container[str]) -> None:
        """Give the seats, an odd number of them, to those who hold them, then to the most senior of the others."""
        by_seniority = sorted(self.members.values(), key=lambda member: (member.joined, member.name))
        able = [m for m in by_seniority if m.state in _SEATED and (_is_master(m) or m.online or m.state in WAITING)]
        # Who is long gone keeps a seat that nobody else can take.
        able.sort(key=lambda member: (member.name in long_gone, not _is_master(member)))
        seats = min(masters_max, len(able))
        seats -= seats % 2 == 0 and seats > 0
        chosen = [member.name for member in able[:seats]]
        for member in by_seniority:
            if _is_master(member) and member.name not in chosen and member.state is not NodeState.LEFT:
                self.take(_without_seat(member))
        for name in chosen:
            if not _is_master(member := self.members[name]):
                self.take(member.to(member.state, rings=(*member.rings, MASTERS_RING)))

    def event(self, master: str, term: int) -> NodeEvent | None:
        """``None`` when there is nothing to say, not even that somebody else leads now."""
        if not self.changes and self.policy is None and self.view.term == term:
            return None
        return NodeEvent(
            self.view.epoch + 1,
            self.view.digest,
            term,
            master,
            tuple(self.changes),
            self.policy,
            self.rings,
            self.founders,
        )


def _is_master(member: Member) -> bool:
    return MASTERS_RING in member.rings


def _without_seat(member: Member) -> Member:
    return replace(member, rings=tuple(ring for ring in member.rings if ring != MASTERS_RING))


def _join(draft: _Draft, join: Join) -> None:
    """Raises :class:`AlreadyExists` when the name is taken, or this one is not its latest life.

    The same data directory in a higher incarnation is the same node in a later life: one process at a time can use it,
    and comm already hears the later life only. With another one it has lost what it promised, as a master or as a
    replica of a shard (which way it voted, what it holds), and must not speak for the former.
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
            disk=join.disk,
        )
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if old is None or (old.state is NodeState.LEFT and join.incarnation > old.incarnation):
        draft.take(new)
        return
    if old.live and (old.incarnation, old.address) == (join.incarnation, join.address):
        return  # asked twice
    lost = join.disk != old.disk and old.state is not NodeState.LEFT
    if join.incarnation <= old.incarnation or lost:
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
        new = _without_seat(new)
    if not is_legal(member, new):
        raise BadRequest(f"{depart.name} is {member.state}; from there it cannot be {depart.state}")
    draft.take(new)

"""Failure detection: who does not answer any more. Pure: messages and the time go in, effects come out.

Theory of operation
===================
Das, Gupta, Motivala: "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol" (DSN 2002).

*Probes* (section 3). Once per period every member pings one other. No answer within ``direct_timeout_s``: it asks
``indirect`` others to ping it in its place, for the path between the two may be broken and nothing else. No answer at
the end of the period: the target is *suspected*. Targets are taken round robin from a list that is shuffled after each
round (4.3), so that a dead member is found within 2 n - 1 periods at most, and in about 1.6 periods by somebody.

*Suspicion* (4.2). A suspicion is a rumour. It becomes a death when it has stood for :meth:`Tunables.patience_s`,
unless the suspect refutes it: it raises its *incarnation* and spreads that it is alive. A rumour of a higher
incarnation overrides one of a lower; in the same one suspicion overrides life. Only a member raises its own number, so
that an old rumour can neither kill nor revive it.

*Rumours* travel piggyback on the probes (4.1), each a number of times logarithmic in the members, those that were sent
least often first. A suspect is told of its suspicion with whatever is sent to it (the "buddy system" of Dadgar,
Phillips, Currey: "Lifeguard", 2018, section III.C). Two of them do not wait for the next probe but are announced to
``indirect`` others at once: a suspicion to those that shall confirm it, and a refutation. And who was accused once says
its incarnation with all that it sends: members that joined since know the one that the master admitted, and what they
said of that one would count nowhere.

*A death found here grants nothing*: it is reported to the service, and only the master takes a member off the rings,
by an event that is committed. Until then the dead member is probed on; an answer from itself brings it back at once.

*Local health* (Lifeguard, III.A). Who cannot hear in time must not accuse others. A member counts what speaks against
itself, from 0 to ``health_max``: a probe that failed counts as many as there are helpers that said nothing at all (a
helper that gets no answer says so by a *nack*, so that its silence is about us; without helpers it counts 1), and a
suspicion of this member that it has to refute counts 1; each probe that is answered takes 1 off. Its period and its
time-outs are (1 + that number) times as long. And when :meth:`tick` comes later than ``late_s`` after it was due (the
loop was blocked, the process was stopped), all deadlines that run are put off by as much and by the time of an answer,
for the answers may be waiting unread in the sockets.

*Confirmations* (Lifeguard, III.B). A suspicion of one member alone stands long, for it may be the accuser who is in
trouble; each other member that finds the same by its own probe shortens it: see :meth:`Tunables.patience_s`. So a
rumour carries the names of the first accusers, and is told again when one has come.

*The lost* are members that were declared offline. Now and then one is pinged, so that the two sides of a healed
partition hear of each other.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gostore.core.ports import Rng

ALIVE: Final = "alive"
SUSPECT: Final = "suspect"
DEAD: Final = "dead"  # found here; never a rumour

PING: Final = "ping"
ACK: Final = "ack"
PING_REQ: Final = "ping_req"
NACK: Final = "nack"

RELAYS_MAX: Final = 1024
"""Pings made for others whose answers are awaited; beyond, the oldest is forgotten."""

RUMOURS_MAX: Final = 1024
"""Rumours waiting to be told, one per member; beyond, the most told is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunables:
    """Time constants in seconds, counts without a unit. A dead member is declared after about

    ``period_s x (1.6 + 1 / 2) + suspicion_s``, and the load is ``2 x members / period_s`` messages in the cluster.
    """

    period_s: float
    """One probe per member. Shorter: found sooner; load and false suspicions rise in proportion."""
    direct_timeout_s: float
    """Wait for the direct answer. Above the 99.9th percentile of a round trip, below ``period_s``: what remains of the
    period is for the indirect probes."""
    indirect: int = 3
    """Others who are asked to probe. With loss p per message a live target is suspected with about
    (1 - (1 - p)^2) x (1 - (1 - p)^4)^indirect: at p = 5 % and 3 others once in 1,600 probes."""
    suspicion_periods: float
    """A suspicion stands for at least ``suspicion_periods x period_s x max(1, log10(members))`` (the paper's alpha):
    time for the rumour to reach the suspect and for its refutation to come back. Longer: fewer live members die; the
    dead are served longer."""
    suspicion_factor: float
    """One that nobody else confirms stands so many times longer (the paper's beta)."""
    confirmations: int = 3
    """So many other accusers bring it down to the least (the paper's K)."""
    health_max: int
    """Periods and time-outs grow up to (1 + this) times (the paper's S). Larger: a member in trouble is quieter, and
    takes longer to be itself again."""
    nack_share: float = 0.8
    """A helper says so when it had no answer for this part of ``direct_timeout_s``; what remains is for its message."""
    retransmit: float = 2.0
    """A rumour is told ``retransmit x ln(members + 1)`` times by each. With c tellings each, a member misses it with
    about e^-c; more: surer, larger packets."""
    rumours_per_message_max: int = 8
    """About 40 bytes each; a packet stays below 500 bytes."""
    late_s: float
    """A tick this much later than due means that we were asleep. Above the jitter of a busy loop."""
    reconnect_periods: int = 5
    """The cluster as a whole pings one lost member every so many periods."""

    def suspicion_s(self, members: int) -> float:
        """The least time that a suspicion stands."""
        return self.suspicion_periods * self.period_s * max(1.0, math.log10(max(1, members)))

    def patience_s(self, members: int, confirmations: int) -> float:
        """How long a suspicion stands that so many others have confirmed.

        ``max - (max - min) x log(confirmations + 1) / log(wanted + 1)``, at least ``min = suspicion_s``, with
        ``max = suspicion_factor x min`` and ``wanted``: ``confirmations`` of the tunables, or as many as there can be
        beside the suspect and its first accuser; nobody: ``min``. (Lifeguard, III.B)
        """
        least, wanted = self.suspicion_s(members), min(self.confirmations, members - 2)
        if wanted < 1:
            return least
        most = self.suspicion_factor * least
        return max(least, most - (most - least) * math.log(confirmations + 1) / math.log(wanted + 1))

    def tellings(self, members: int) -> int:
        return math.ceil(self.retransmit * math.log(members + 1))


PROFILES: Final[dict[str, Tunables]] = {
    # Loopback and labs: round trips of a millisecond; a dead node is off the rings within about two seconds.
    "fast": Tunables(
        period_s=0.2, direct_timeout_s=0.1, suspicion_periods=5.0, suspicion_factor=3.0, health_max=3, late_s=0.05
    ),
    # Real networks: the values of memberlist's DefaultLANConfig.
    "lan": Tunables(
        period_s=1.0, direct_timeout_s=0.5, suspicion_periods=4.0, suspicion_factor=6.0, health_max=8, late_s=0.25
    ),
}


@dataclass(frozen=True, slots=True)
class Rumour:
    """What somebody says of a member: ``status`` is alive or suspect. ``by``: who suspects it, by its own probe."""

    name: str
    status: str
    incarnation: int
    by: tuple[str, ...] = ()

    def to_wire(self) -> list[Any]:
        return [self.name, self.status, self.incarnation, list(self.by)]

    @classmethod
    def from_wire(cls, wire: Any) -> Rumour:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make."""
        match wire:
            case [str(name), "alive" | "suspect" as status, int(incarnation), [*by]] if incarnation >= 0 and all(
                isinstance(accuser, str) for accuser in by
            ):
                return cls(name, status, incarnation, tuple(by))
        raise ValueError(f"not a rumour: {wire!r:.100}")


@dataclass(frozen=True, slots=True)
class Message:
    """``seq``: chosen by who pings, returned by the answer. ``target``: of a ping_req."""

    kind: str
    seq: int
    target: str = ""
    rumours: tuple[Rumour, ...] = ()


@dataclass(frozen=True, slots=True)
class Send:
    to: str
    message: Message


@dataclass(frozen=True, slots=True)
class Suspected:
    """``first_hand``: this member's own probe failed; else it was told."""

    name: str
    incarnation: int
    first_hand: bool


@dataclass(frozen=True, slots=True)
class Cleared:
    """A member that was suspected, or dead, is alive."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Died:
    """A suspicion stood too long. ``incarnation``: the one that is dead."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Refuted:
    """This member was suspected and has raised its incarnation to this."""

    incarnation: int


Effect = Send | Suspected | Cleared | Died | Refuted


class _Peer:
    """``accusers``, ``suspected_s``, ``deadline_s``: of a suspicion: who has it, since when, when it is a death."""

    __slots__ = ("accusers", "deadline_s", "incarnation", "name", "status", "suspected_s")

    def __init__(self, name: str, incarnation: int) -> None:
        self.name = name
        self.incarnation = incarnation
        self.status = ALIVE
        self.accusers: tuple[str, ...] = ()
        self.suspected_s = 0.0
        self.deadline_s = 0.0


class _Probe:
    """The probe of this period; ``direct_s``: when the others are asked, infinity once they were.

    ``helpers``: how many were asked; ``nacks``: of how many we heard that they had no answer.
    """

    __slots__ = ("direct_s", "helpers", "incarnation", "nacks", "peer", "seq")

    def __init__(self, peer: _Peer, seq: int, direct_s: float) -> None:
        self.peer = peer
        self.incarnation = peer.incarnation
        self.seq = seq
        self.direct_s = direct_s
        self.helpers = self.nacks = 0


class Swim:
    """The failure detector of one member. Call :meth:`tick` at :attr:`due_s`, :meth:`receive` with what arrives.

    ``incarnation`` is this member's own. ``now_s`` is any monotonic time, the same for all calls.
    """

    def __init__(self, name: str, incarnation: int, tunables: Tunables, rng: Rng, now_s: float) -> None:
        self.name = name
        self.incarnation = incarnation
        self.tunables = tunables
        self._rng = rng
        self._peers: dict[str, _Peer] = {}
        self._lost: dict[str, None] = {}
        self._order: list[str] = []
        self._position = 0
        self._seq = 0
        self._probe: _Probe | None = None
        self._period_s = 0.0
        self._suspicions: list[tuple[float, str, int]] = []
        self._relays: dict[int, tuple[str, int, float]] = {}
        self._nacks: deque[tuple[float, int]] = deque(maxlen=RELAYS_MAX)
        self.health = 0
        """What speaks against this member itself; 0: nothing."""
        self._rumours: dict[str, tuple[Rumour, int]] = {}
        self._was_accused = False
        self.counts = dict.fromkeys(("probes", "indirect", "suspected", "cleared", "died", "refuted", "late"), 0)

        self.begin(now_s)

    def begin(self, now_s: float) -> None:
        """Start over at this time: the first probe comes within a period.

        It comes at a random time, so that members that start together do not probe together.
        """
        self._period_s = now_s + self._rng.uniform(0.0, self.tunables.period_s)

    # Members

    def add(self, name: str, incarnation: int) -> None:
        """A member that should answer, from now on; again, with a higher incarnation: it is back."""
        if name == self.name:
            self.incarnation = max(self.incarnation, incarnation)
            return
        self._lost.pop(name, None)
        peer = self._peers.get(name)
        if peer is None:
            self._peers[name] = _Peer(name, incarnation)
            # At a random place of this round (section 4.3).
            self._order.insert(self._rng.randrange(self._position, len(self._order) + 1), name)
        elif incarnation > peer.incarnation:
            peer.incarnation, peer.status = incarnation, ALIVE

    def remove(self, name: str, *, lost: bool = False) -> None:
        """It need not answer any more; ``lost``: it may be back, and is looked for."""
        if self._peers.pop(name, None) is not None:
            place = self._order.index(name)
            del self._order[place]
            self._position -= place < self._position
            self._rumours.pop(name, None)
        if self._probe is not None and self._probe.peer.name == name:
            self._probe = None
        if lost and name != self.name:
            self._lost[name] = None
        else:
            self._lost.pop(name, None)

    def in_status(self, *statuses: str) -> dict[str, int]:
        """name -> incarnation of the members that are alive, suspect or dead as seen from here."""
        return {peer.name: peer.incarnation for peer in self._peers.values() if peer.status in statuses}

    def status(self, name: str) -> str | None:
        peer = self._peers.get(name)
        return peer.status if peer is not None else None

    def vouch(self, name: str) -> list[Effect]:
        """It has just answered by another way: whatever is held against it here is void."""
        peer = self._peers.get(name)
        return self._clear(peer, peer.incarnation) if peer is not None and peer.status != ALIVE else []

    def rise(self, above: int) -> None:
        """Come back with an incarnation above this one."""
        self.incarnation = max(self.incarnation, above + 1)

    # Time

    @property
    def due_s(self) -> float:
        """When :meth:`tick` is to be called next; a call before that does nothing."""
        due_s = self._period_s
        if self._probe is not None:
            due_s = min(due_s, self._probe.direct_s)
        if self._suspicions:
            due_s = min(due_s, self._suspicions[0][0])
        if self._nacks:
            due_s = min(due_s, self._nacks[0][0])
        return due_s

    def tick(self, now_s: float) -> list[Effect]:
        late_s = now_s - self.due_s
        if late_s > self.tunables.late_s:
            self._put_off(late_s)
        effects: list[Effect] = []
        while self._nacks and self._nacks[0][0] <= now_s:
            relay = self._relays.get(self._nacks.popleft()[1])
            if relay is not None:
                effects.append(self._send(relay[0], NACK, relay[1]))
        probe = self._probe
        if probe is not None and probe.direct_s <= now_s:
            probe.direct_s = math.inf
            effects += self._probe_indirectly(probe)
        if self._period_s <= now_s:
            effects += self._next_period(now_s)
        while self._suspicions and self._suspicions[0][0] <= now_s:
            deadline_s, name, incarnation = heapq.heappop(self._suspicions)
            peer = self._peers.get(name)
            if peer and peer.status == SUSPECT and peer.incarnation == incarnation and peer.deadline_s == deadline_s:
                peer.status = DEAD
                self._rumours.pop(name, None)
                self.counts["died"] += 1
                effects.append(Died(name, incarnation))
        return effects

    def _put_off(self, late_s: float) -> None:
        """We were asleep: what others should have done meanwhile they are given again."""
        self.counts["late"] += 1
        late_s += self.tunables.direct_timeout_s
        self._period_s += late_s
        if self._probe is not None:
            self._probe.direct_s += late_s
        # The order of the heap stays, as all move alike.
        self._suspicions = [(deadline_s + late_s, name, inc) for deadline_s, name, inc in self._suspicions]
        for peer in self._peers.values():
            peer.suspected_s += late_s
            peer.deadline_s += late_s

    def _next_period(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._probe is not None:
            probe, self._probe = self._probe, None
            self._feel(probe.helpers - probe.nacks if probe.helpers else 1)
            # If it has come back or refuted meanwhile, that is not what did not answer.
            effects += self._suspect(probe.peer, probe.incarnation, (self.name,), now_s)
        period_s = self.tunables.period_s * (1 + self.health)
        self._period_s += period_s
        if self._period_s <= now_s:
            self._period_s = now_s + period_s
        for seq in [seq for seq, (_, _, until_s) in self._relays.items() if until_s <= now_s]:
            del self._relays[seq]
        target = self._next_target()
        if target is not None:
            self.counts["probes"] += 1
            self._probe = _Probe(target, self._next_seq(), now_s + self.tunables.direct_timeout_s * (1 + self.health))
            effects.append(self._send(target.name, PING, self._probe.seq))
        if self._lost and self._rng.random() * self.tunables.reconnect_periods * (len(self._peers) + 1) < 1.0:
            effects.append(self._send(self._rng.choice(list(self._lost)), PING, self._next_seq()))
        return effects

    def _feel(self, worse: int) -> None:
        self.health = min(max(0, self.health + worse), self.tunables.health_max)

    def _next_target(self) -> _Peer | None:
        if self._position >= len(self._order):
            self._rng.shuffle(self._order)
            self._position = 0
        if not self._order:
            return None
        self._position += 1
        return self._peers[self._order[self._position - 1]]

    def _probe_indirectly(self, probe: _Probe) -> list[Effect]:
        helpers = self._some_but(probe.peer.name)
        self.counts["indirect"] += bool(helpers)
        probe.helpers = len(helpers)
        return [self._send(helper, PING_REQ, probe.seq, probe.peer.name) for helper in helpers]

    # Messages

    def receive(self, source: str, message: Message, now_s: float) -> list[Effect]:
        """A message from ``source``, which may be no member (or not yet)."""
        effects: list[Effect] = []
        for rumour in message.rumours:
            effects += self.hear(rumour, now_s)
        if message.kind == PING:
            effects.append(self._send(source, ACK, message.seq))
        elif message.kind == PING_REQ:
            if len(self._relays) >= RELAYS_MAX:
                del self._relays[next(iter(self._relays))]
            seq = self._next_seq()
            self._relays[seq] = (source, message.seq, now_s + self.tunables.period_s)
            self._nacks.append((now_s + self.tunables.nack_share * self.tunables.direct_timeout_s, seq))
            effects.append(self._send(message.target, PING, seq))
        elif message.kind == ACK:
            effects += self._acknowledged(source, message.seq)
        elif message.kind == NACK and self._probe is not None and self._probe.seq == message.seq:
            self._probe.nacks += 1
        return effects

    def _acknowledged(self, source: str, seq: int) -> list[Effect]:
        effects: list[Effect] = []
        relay = self._relays.pop(seq, None)
        if relay is not None:
            effects.append(self._send(relay[0], ACK, relay[1]))
        if self._probe is not None and self._probe.seq == seq:
            self._probe = None
            self._feel(-1)
        peer = self._peers.get(source)
        if peer is not None and peer.status == DEAD:
            effects += self._clear(peer, peer.incarnation)
        return effects

    def hear(self, rumour: Rumour, now_s: float) -> list[Effect]:
        """Take a rumour in; one that is new here is told on."""
        if rumour.name == self.name:
            if rumour.status != SUSPECT:
                return []
            self._was_accused = True
            if rumour.incarnation < self.incarnation:
                return []
            self.incarnation = rumour.incarnation + 1
            self.counts["refuted"] += 1
            self._feel(1)
            return [Refuted(self.incarnation), *self._announce(rumour.name)]
        peer = self._peers.get(rumour.name)
        if peer is None:
            return []
        if rumour.status == SUSPECT:
            return self._suspect(peer, rumour.incarnation, rumour.by, now_s)
        if rumour.incarnation <= peer.incarnation:
            return []
        return self._clear(peer, rumour.incarnation)

    def _suspect(self, peer: _Peer, incarnation: int, by: Sequence[str], now_s: float) -> list[Effect]:
        """``by``: who accuses it, ourselves after a probe of our own."""
        if incarnation < peer.incarnation or (incarnation == peer.incarnation and peer.status == DEAD):
            return []
        known = peer.accusers if incarnation == peer.incarnation and peer.status == SUSPECT else None
        accusers = tuple(dict.fromkeys((*(known or ()), *by)))[: self.tunables.confirmations + 1]
        if accusers == known:
            return []
        peer.accusers = accusers
        if known is None:
            peer.status, peer.incarnation, peer.suspected_s = SUSPECT, incarnation, now_s
            self.counts["suspected"] += 1
        patience_s = self.tunables.patience_s(len(self._peers) + 1, max(0, len(accusers) - 1))
        peer.deadline_s = peer.suspected_s + patience_s
        heapq.heappush(self._suspicions, (peer.deadline_s, peer.name, incarnation))
        self._tell(Rumour(peer.name, SUSPECT, incarnation, accusers))
        first_hand = self.name in by
        effects: list[Effect] = [Suspected(peer.name, incarnation, first_hand)] if known is None else []
        return [*effects, *self._announce(peer.name)] if first_hand else effects

    def _clear(self, peer: _Peer, incarnation: int) -> list[Effect]:
        doubted = peer.status != ALIVE
        if incarnation > peer.incarnation:
            self._tell(Rumour(peer.name, ALIVE, incarnation))
        else:
            self._rumours.pop(peer.name, None)
        peer.status, peer.incarnation = ALIVE, incarnation
        self.counts["cleared"] += doubted
        return [Cleared(peer.name, incarnation)] if doubted else []

    # Rumours

    def _announce(self, about: str) -> list[Effect]:
        """Tell some others now what there is to tell; any message would do, and the answer to this one is ignored."""
        return [self._send(name, PING, self._next_seq()) for name in self._some_but(about)]

    def _some_but(self, name: str) -> list[str]:
        """``indirect`` others, or all there are, that are not dead."""
        others = [other for other, peer in self._peers.items() if peer.status != DEAD and other != name]
        return self._rng.sample(others, min(self.tunables.indirect, len(others)))

    def _tell(self, rumour: Rumour) -> None:
        self._rumours.pop(rumour.name, None)
        if len(self._rumours) >= RUMOURS_MAX:
            del self._rumours[min(self._rumours, key=lambda name: self._rumours[name][1])]
        self._rumours[rumour.name] = (rumour, self.tunables.tellings(len(self._peers)))

    def _send(self, to: str, kind: str, seq: int, target: str = "") -> Send:
        return Send(to, Message(kind, seq, target, tuple(self._pick_rumours(to))))

    def _pick_rumours(self, to: str) -> Iterable[Rumour]:
        told = [Rumour(self.name, ALIVE, self.incarnation)] if self._was_accused else []
        peer = self._peers.get(to)
        if peer is not None and peer.status != ALIVE:
            told.append(Rumour(to, SUSPECT, peer.incarnation, peer.accusers))
        if self._rumours:
            room = self.tunables.rumours_per_message_max - len(told)
            fresh = heapq.nlargest(room, self._rumours.values(), key=lambda entry: entry[1])
            for rumour, left in fresh:
                if rumour.name == to:
                    continue
                told.append(rumour)
                if left > 1:
                    self._rumours[rumour.name] = (rumour, left - 1)
                else:
                    del self._rumours[rumour.name]
        return told

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

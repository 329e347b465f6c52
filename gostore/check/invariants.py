"""Promises that must hold after every event.

An invariant is a small class: a ``name``, the ``kinds`` of events that it wants, and ``look(event)``, which keeps what
it has to remember and returns a sentence once the promise is broken. :class:`Watch` feeds events to invariants::

    watch = Watch(standard_invariants())
    for event in journal:
        watch.feed(event)
    watch.judge()

A journal that lacks events proves nothing: the watch counts them (``core.events``: numbers of one incarnation of a node
are gapless, and begin at 1), and answers "unknown" where something is missing and nothing is broken. Events of several
nodes may arrive in any order; the invariants here do not depend on it.

Promises about states rather than events are plain functions: :func:`lost_writes` and :func:`unequal_replicas`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

from gostore.check.history import History, Operation, Outcome
from gostore.check.models import Frozen, freeze, show_operation, show_value
from gostore.core.events import Event

VIOLATIONS_MAX: Final = 100
"""Kept by one watch. The first explains, the others follow from it."""

GAPS_MAX: Final = 100
"""Reasons for "unknown" that one watch keeps."""


class Holds(StrEnum):
    FINE = "fine"
    VIOLATED = "violated"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise. ``event``: the one that broke it; None for promises about states."""

    invariant: str
    message: str
    event: Event | None = None

    def __str__(self) -> str:
        where = (
            "" if self.event is None else f" (event {self.event.seq} of {self.event.node}, {self.event.time_s:.6f} s)"
        )
        return f"{self.invariant}: {self.message}{where}"


class Invariant(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def kinds(self) -> tuple[str, ...]: ...

    def look(self, event: Event) -> str | None:
        """Take an event of one of ``kinds``; what is broken, in a sentence, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a watch has seen. ``gaps`` say why "fine" cannot be said."""

    verdict: Holds
    violations: tuple[Violation, ...]
    gaps: tuple[str, ...]
    events: int

    def text(self) -> str:
        lines = [f"{self.verdict.value} after {self.events:,} events"]
        return "\n".join(
            lines + [f"  {violation}" for violation in self.violations] + [f"  {gap}" for gap in self.gaps]
        )

    __str__ = text


class Watch:
    """Feeds events to invariants.

    ``consecutive``: every event of every node is fed, so that a missing number is a gap. Without it (a subscription to
    some categories only) tell :meth:`gap` what the journal knows of its gaps.
    """

    def __init__(self, invariants: Iterable[Invariant], *, consecutive: bool = True) -> None:
        self.violations: list[Violation] = []
        self.events = 0
        self._consecutive = consecutive
        self._gaps: dict[str, None] = {}
        self._latest: dict[str, int] = {}
        self._wanting: dict[str, list[Invariant]] = {}
        for invariant in invariants:
            for kind in invariant.kinds:
                self._wanting.setdefault(kind, []).append(invariant)

    def feed(self, event: Event) -> Violation | None:
        """Take an event; the first promise that it breaks, if it does."""
        self.events += 1
        if self._consecutive:
            self._count(event)
        first: Violation | None = None
        for invariant in self._wanting.get(event.kind, ()):
            message = invariant.look(event)
            if message is not None:
                violation = Violation(invariant.name, message, event)
                first = first or violation
                if len(self.violations) < VIOLATIONS_MAX:
                    self.violations.append(violation)
        return first

    def _count(self, event: Event) -> None:
        latest = self._latest.get(event.node, 0)
        if event.seq not in (1, latest + 1):
            # Another number may also mean a new incarnation whose first events are missing: a gap just as well.
            self.gap(f"{event.node}: event {event.seq} follows {latest or 'nothing'}")
        self._latest[event.node] = event.seq

    def gap(self, reason: str) -> None:
        """Events are missing."""
        if len(self._gaps) < GAPS_MAX:
            self._gaps[reason] = None

    def judge(self) -> Judgement:
        verdict = Holds.VIOLATED if self.violations else Holds.UNKNOWN if self._gaps else Holds.FINE
        return Judgement(verdict, tuple(self.violations), tuple(self._gaps), self.events)


class _Agreement:
    """For one subject there is one answer, whoever gives it."""

    name = ""
    kinds: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._said: dict[Hashable, tuple[Any, Event]] = {}

    def look(self, event: Event) -> str | None:
        subject, answer = self.says(event)
        before, first = self._said.setdefault(subject, (answer, event))
        if before == answer:
            return None
        return self.tell(event, f"{before!r} (event {first.seq} of {first.node})", f"{answer!r}")

    def says(self, event: Event) -> tuple[Hashable, Any]:
        """What the event is about, and what it says of it."""
        raise NotImplementedError

    def tell(self, event: Event, before: str, now: str) -> str:
        raise NotImplementedError


class OneMasterPerEpoch(_Agreement):
    """No two nodes take different nodes for the master of one epoch."""

    name = "one master per epoch"
    kinds = ("master",)

    def says(self, event: Event) -> tuple[Hashable, Any]:
        return event.data["epoch"], event.data["member"]

    def tell(self, event: Event, before: str, now: str) -> str:
        return f"in epoch {event.data['epoch']} the master is {before} and {now}"


class EqualViews(_Agreement):
    """Views of one epoch have the same nodes online, on every node."""

    name = "equal views"
    kinds = ("view",)

    def says(self, event: Event) -> tuple[Hashable, Any]:
        return event.data["epoch"], sorted(event.data["online"])

    def tell(self, event: Event, before: str, now: str) -> str:
        return f"in epoch {event.data['epoch']} these are online: {before} and {now}"


class EqualMembers(_Agreement):
    """The nodes agree in which state an epoch put a member."""

    name = "equal members"
    kinds = ("member",)

    def says(self, event: Event) -> tuple[Hashable, Any]:
        return (event.data["epoch"], event.data["member"]), event.data["state"]

    def tell(self, event: Event, before: str, now: str) -> str:
        return f"epoch {event.data['epoch']} made {event.data['member']} {before} and {now}"


class OnePrimaryPerGeneration(_Agreement):
    """A generation of a shard has one primary: the node that publishes its configuration."""

    name = "one primary per generation"
    kinds = ("shard_primary",)

    def says(self, event: Event) -> tuple[Hashable, Any]:
        return (event.data["shard"], event.data["generation"]), event.node

    def tell(self, event: Event, before: str, now: str) -> str:
        return (
            f"generation {event.data['generation']} of shard {event.data['shard']} has the primaries {before} and {now}"
        )


class OneLeaderPerTerm(_Agreement):
    """A term of a consensus group has one leader at most (Raft, figure 3: election safety)."""

    name = "one leader per term"
    kinds = ("raft_leader",)

    def says(self, event: Event) -> tuple[Hashable, Any]:
        return (event.data["group"], event.data["term"]), event.data["leader"]

    def tell(self, event: Event, before: str, now: str) -> str:
        return f"term {event.data['term']} of {event.data['group']} has the leaders {before} and {now}"


class OneCommitPerIndex(_Agreement):
    """An index of a shard's log has one commit: what was committed is never replaced by something else."""

    name = "one commit per index"
    kinds = ("commit",)

    def says(self, event: Event) -> tuple[Hashable, Any]:
        return (event.data["shard"], event.data["index"]), [event.data["container"], *event.data["keys"]]

    def tell(self, event: Event, before: str, now: str) -> str:
        return f"index {event.data['index']} of shard {event.data['shard']} wrote {before} and {now}"


class EpochsGrow:
    """The epoch of a node's view never falls, as long as the node lives."""

    name = "epochs grow"
    kinds = ("view", "node_started")

    def __init__(self) -> None:
        self._latest: dict[str, int] = {}

    def look(self, event: Event) -> str | None:
        if event.kind == "node_started":  # a new life may begin at an older epoch: the last one was not saved
            self._latest.pop(event.node, None)
            return None
        before, now = self._latest.get(event.node, 0), event.data["epoch"]
        self._latest[event.node] = now
        return None if now >= before else f"{event.node} went back from epoch {before} to {now}"


def standard_invariants() -> list[Invariant]:
    """All of this module that look at events, new ones."""
    return [
        OneMasterPerEpoch(),
        EqualViews(),
        EqualMembers(),
        EpochsGrow(),
        OnePrimaryPerGeneration(),
        OneLeaderPerTerm(),
        OneCommitPerIndex(),
    ]


class _Gap(Protocol):
    @property
    def node(self) -> str: ...
    @property
    def reason(self) -> str: ...


class _Journal(Protocol):
    """What is needed of ``gostore.trace.Journal``."""

    @property
    def gaps(self) -> Sequence[_Gap]: ...
    @property
    def complete(self) -> bool: ...
    def __iter__(self) -> Any: ...


def judge_journal(journal: _Journal, invariants: Iterable[Invariant] | None = None) -> Judgement:
    """Feed a journal to invariants (by default the standard ones). Incomplete journals are never "fine"."""
    watch = Watch(standard_invariants() if invariants is None else invariants, consecutive=False)
    for event in journal:
        watch.feed(event)
    for gap in journal.gaps:
        watch.gap(f"{gap.node}: events are missing: {gap.reason}")
    if not journal.complete:
        watch.gap("the journal has forgotten or left out events")
    return watch.judge()


# promises about states

_WRITES: Final = ("write", "set", "put", "delete", "cas")


def lost_writes(history: History, final: Mapping[Any, Any]) -> list[Violation]:
    """Acknowledged writes that the final state does not show.

    ``final``: what each key holds at the end, read when no write is running; a key that is missing is not judged. Its
    value must be that of a write which no other acknowledged write follows (was invoked after its return), or, when
    nothing was acknowledged, may be what it was. Writes of unknown outcome may have been last, or still be to come.
    Operations that overwrite count: write, set, put and cas with their value, delete with null. For values that may be
    anything but hashable, arrays and maps are compared as JSON.
    """
    keys: dict[Frozen, list[Operation]] = {}
    for operation in history:
        refused = operation.kind == "cas" and operation.result is False
        if operation.kind in _WRITES and operation.outcome is not Outcome.FAIL and not refused:
            keys.setdefault(freeze(operation.key), []).append(operation)
    found: list[Violation] = []
    for key, value in final.items():
        writes = keys.get(freeze(key), [])
        last = max((w.invoked for w in writes if w.outcome is Outcome.OK), default=None)
        if last is None:
            continue
        possible = [w for w in writes if w.outcome is Outcome.INFO or w.returned is None or w.returned > last]
        if freeze(value) not in [freeze(_value_of(w)) for w in possible]:
            acknowledged = next(w for w in reversed(writes) if w.outcome is Outcome.OK)
            message = (
                f"{show_value(key)} is {show_value(value)} at the end, but {show_operation(acknowledged)} "
                f"of {acknowledged.process} (operation {acknowledged.id}) was acknowledged"
            )
            found.append(Violation("no acknowledged write is lost", message))
    return found


def _value_of(write: Operation) -> Any:
    if write.kind == "delete":
        return None
    return write.argument[1] if write.kind == "cas" else write.argument


def unequal_replicas(digests: Mapping[Any, Mapping[str, Hashable]]) -> list[Violation]:
    """Groups (shards, chunks, directories) whose replicas differ after quiet: group -> node -> digest of its state."""
    found: list[Violation] = []
    for group, replicas in digests.items():
        by_digest: dict[Hashable, list[str]] = {}
        for node, digest in replicas.items():
            by_digest.setdefault(digest, []).append(node)
        if len(by_digest) > 1:
            camps = sorted(by_digest.items(), key=lambda camp: (-len(camp[1]), camp[1]))
            message = "; ".join(f"{', '.join(nodes)} have {str(digest)[:24]}" for digest, nodes in camps)
            found.append(Violation("replicas are equal", f"group {group}: {message}"))
    return found

"""Everything that happens is an event; every picture, metric, check and replay reads events.

One schema serves messages, state changes and faults, in both worlds. An event belongs to a node, has a sequence number
there (gapless, from 1, per incarnation), a hybrid logical stamp, loop time, the event that caused it, a kind out of
:data:`KINDS`, and the fields that the kind declares. With no subscriber ``publish`` returns 0 after one test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

EventId = tuple[str, int]
"""(node, sequence number)."""

# kind -> (category, fields). The category colours the ticker and selects what a subscriber wants.
KINDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    # messages, published by comm
    "send": ("message", ("to", "service", "function", "frame", "request", "bytes", "transport")),
    "recv": ("message", ("from", "service", "function", "frame", "request", "bytes", "transport")),
    "drop": ("message", ("peer", "reason", "bytes")),
    # node and membership
    "node_started": ("cls", ("incarnation",)),
    "node_ready": ("cls", ("epoch",)),
    "node_stopping": ("cls", ("reason",)),
    "member": ("cls", ("member", "state", "epoch", "path")),
    "view": ("cls", ("epoch", "online")),
    "suspect": ("cls", ("member", "incarnation")),
    "refute": ("cls", ("member", "incarnation")),
    "master": ("cls", ("member", "epoch")),
    # storage
    "wal_sync": ("storage", ("records", "bytes", "duration_s")),
    "wal_recovered": ("storage", ("records", "segments", "torn_bytes")),
    "disk_failed": ("storage", ("what", "error")),
    # db
    "commit": ("db", ("shard", "container", "keys", "index")),
    "conflict": ("db", ("shard", "container", "key")),
    "shard_primary": ("db", ("shard", "generation", "replicas")),
    "shard_synced": ("db", ("shard", "generation", "source", "bytes")),
    # fs
    "fs_write": ("fs", ("path", "size", "version", "chunks", "duration_s")),
    "fs_delete": ("fs", ("path", "entries")),
    "chunk_stored": ("fs", ("chunk", "bytes")),
    "repair_started": ("repair", ("epoch", "missing")),
    "chunk_copied": ("repair", ("chunk", "source", "bytes")),
    "repair_done": ("repair", ("epoch", "copied", "bytes")),
    "chunk_collected": ("repair", ("chunk",)),
    # faults, policies, tasks
    "fault": ("fault", ("fault", "arguments")),
    "policy_installed": ("policy", ("slot", "name")),
    "policy_failed": ("policy", ("slot", "name", "error")),
    "task_failed": ("fault", ("task", "error")),
}

CATEGORIES: Final[tuple[str, ...]] = ("message", "cls", "storage", "db", "fs", "repair", "fault", "policy")

current_cause: ContextVar[EventId | None] = ContextVar("current_cause", default=None)
"""The event that the running task reacts to; comm sets it when it dispatches a frame."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened on one node."""

    node: str
    seq: int
    kind: str
    stamp: int
    time_s: float
    cause: EventId | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> EventId:
        return (self.node, self.seq)

    @property
    def category(self) -> str:
        return KINDS[self.kind][0]

    def to_wire(self) -> list[Any]:
        return [self.node, self.seq, self.kind, self.stamp, self.time_s, self.cause, dict(self.data)]

    @classmethod
    def from_wire(cls, wire: Any) -> Event:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make."""
        match wire:
            case [str(node), int(seq), str(kind), int(stamp), float(time_s), cause, dict(data)] if kind in KINDS:
                return cls(node, seq, kind, stamp, time_s, tuple(cause) if cause else None, data)
        raise ValueError(f"not an event: {wire!r:.200}")


Subscriber = Callable[[Event], None]


class Events:
    """The event bus of one node. Subscribers are called in order, in the publisher's turn; they must not block.

    ``active``: somebody listens at all; ``messages``: somebody wants the category ``message``. Both are for hot paths,
    which test them before they build the fields of an event.
    """

    __slots__ = ("_seq", "_stamp", "_subscribers", "_time_s", "_wanted", "active", "messages", "node")

    def __init__(self, node: str, *, stamp: Callable[[], int], time_s: Callable[[], float]) -> None:
        self.node = node
        self.active = False
        self.messages = False
        self._stamp = stamp
        self._time_s = time_s
        self._seq = 0
        self._subscribers: dict[int, tuple[Subscriber, frozenset[str]]] = {}
        self._wanted: frozenset[str] = frozenset()

    @property
    def seq(self) -> int:
        """The number of the latest event."""
        return self._seq

    def subscribe(self, subscriber: Subscriber, categories: Iterable[str] | None = None) -> Callable[[], None]:
        """Call ``subscriber`` for every event of these categories (None: all); returns the function that ends it.

        Raises ``ValueError`` for a category that does not exist.
        """
        wanted = frozenset(CATEGORIES if categories is None else categories)
        if unknown := sorted(wanted - frozenset(CATEGORIES)):
            raise ValueError(f"no such categories: {unknown}; there are {', '.join(CATEGORIES)}")
        key = max(self._subscribers, default=0) + 1
        self._subscribers[key] = (subscriber, wanted)
        self._sum_up()

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)
            self._sum_up()

        return unsubscribe

    def _sum_up(self) -> None:
        self._wanted = frozenset().union(*(wanted for _, wanted in self._subscribers.values()))
        self.active = bool(self._subscribers)
        self.messages = "message" in self._wanted

    def publish(self, kind: str, /, *, cause: EventId | None = None, **data: Any) -> int:
        """Publish; returns the event's sequence number, 0 when nobody wants its category.

        Raises ``KeyError`` for an unknown kind and ``ValueError`` for fields that the kind does not declare.
        """
        if not self.active:
            return 0
        category, fields = KINDS[kind]
        if len(data) != len(fields) or any(name not in data for name in fields):
            raise ValueError(f"event {kind!r} takes the fields {fields}, not {tuple(data)}")
        if category not in self._wanted:
            return 0
        self._seq += 1
        event = Event(self.node, self._seq, kind, self._stamp(), self._time_s(), cause or current_cause.get(), data)
        for subscriber, wanted in tuple(self._subscribers.values()):
            if category in wanted:
                subscriber(event)
        return self._seq

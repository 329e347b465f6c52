"""Everything that happens is an event; every picture, metric, check and replay reads events.

One schema serves messages, state changes and faults, in both worlds. An event belongs to a node, has a sequence number
there (gapless, from 1, per incarnation), a hybrid logical stamp, loop time, the event that caused it, a kind out of
:data:`SCHEMA`, and the fields that the kind declares. With no subscriber ``publish`` returns 0 after one test.

Listening changes nothing in a node. The sequence numbers count what somebody wanted; so they do not travel. What
travels with a message is the number of the message, counted whether or not anybody listens: it names the event of its
send (:attr:`Event.id`). And publishing reads the hybrid clock without advancing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

EventId = tuple[str, int]
"""(node, sequence number); of a ``send`` (node, minus the number of the message)."""

SCHEMA: Final[dict[str, tuple[str, str, dict[str, tuple[str, str]]]]] = {
    # messages, published by comm
    "send": (
        "message",
        "A frame is handed to the network; a retry is a send of its own.",
        {
            "message": ("number", "the frame's number among all that this node sent in this life; it travels"),
            "to": ("node", "who shall get it; empty: whoever is at an address"),
            "service": ("name", "of a request or cast: the service called; else empty"),
            "function": ("name", "of a request or cast: its remote function; else empty"),
            "frame": ("word", "request, redirect, response, error, cast, hello, hello_ack, working, unseen or refused"),
            "request": ("number", "the request's, also in its answer; counted by whoever asks"),
            "bytes": ("bytes", "of the frame, without the packet around it"),
            "transport": ("word", "udp or tcp"),
        },
    ),
    "recv": (
        "message",
        "A frame has arrived and is about to be handled. Its cause is the send.",
        {
            "message": ("number", "the frame's number at its sender"),
            "from": ("node", "who sent it"),
            "service": ("name", "as in send"),
            "function": ("name", "as in send"),
            "frame": ("word", "as in send"),
            "request": ("number", "as in send"),
            "bytes": ("bytes", "as in send"),
            "transport": ("word", "as in send"),
        },
    ),
    "drop": (
        "message",
        "Frames end here: they are not sent, or not handled. What the network itself loses nobody sees.",
        {
            "peer": ("node", "the other end"),
            "reason": ("word", "fault (an injected one), overflow, unconnected, stale, closed, paused, tag, ..."),
            "bytes": ("bytes", "of the frames"),
        },
    ),
    # node and membership
    "node_started": ("cls", "A process begins to serve.", {"incarnation": ("number", "which life of the node it is")}),
    "lost_majority": (
        "cls",
        "A node starts whose cluster went on, unsafely, after a majority was lost: acknowledged writes may be gone.",
        {
            "recovery": ("name", "its number"),
            "groups": ("keys", "in which one replica was made to decide"),
            "lost": ("nodes", "that were given up"),
        },
    ),
    "node_ready": ("cls", "The node is online in its own view.", {"epoch": ("number", "the view's epoch")}),
    "node_stopping": ("cls", "The node says farewell.", {"reason": ("text", "why")}),
    "member": (
        "cls",
        "The state of a member is another in this node's view.",
        {
            "member": ("node", "whose state"),
            "state": ("word", "joining, online, offline, leaving, left, ..."),
            "epoch": ("number", "of the view in which it is so"),
            "path": ("nodes", "by whom the news came here, the master first"),
        },
    ),
    "view": (
        "cls",
        "The node has installed a view.",
        {"epoch": ("number", "the view's epoch"), "online": ("nodes", "who is online in it, sorted")},
    ),
    "suspect": (
        "cls",
        "The failure detector suspects a member.",
        {"member": ("node", "whom"), "incarnation": ("number", "of the member, in which it did not answer")},
    ),
    "refute": (
        "cls",
        "A suspicion is over: the member lives.",
        {"member": ("node", "who"), "incarnation": ("number", "of the member, in which it refutes")},
    ),
    "master": (
        "cls",
        "Another member is master in this node's view.",
        {"member": ("node", "the master"), "epoch": ("number", "the view's epoch")},
    ),
    # storage
    "wal_sync": (
        "storage",
        "Records of the log are on the disk.",
        {
            "records": ("count", "how many this sync covers"),
            "bytes": ("bytes", "their size in the segment"),
            "duration_s": ("s", "how long the sync took; it ends with the event"),
        },
    ),
    "wal_recovered": (
        "storage",
        "The log was read at the start.",
        {
            "records": ("count", "found"),
            "segments": ("count", "of files"),
            "torn_bytes": ("bytes", "cut off at the end: what a crash had left half written"),
        },
    ),
    "disk_failed": (
        "storage",
        "A write or sync failed; the node stops.",
        {"what": ("word", "which file"), "error": ("text", "what the system said")},
    ),
    # consensus
    "raft_leader": (
        "cls",
        "The node has won an election of a group.",
        {
            "group": ("name", "of the group"),
            "term": ("number", "in which it leads; there is one leader in a term at most"),
            "leader": ("node", "the node itself"),
        },
    ),
    "raft_snapshot": (
        "cls",
        "The node has installed a snapshot of a group's state that the leader sent.",
        {
            "group": ("name", "of the group"),
            "index": ("number", "of the last entry in it"),
            "term": ("number", "of that entry"),
            "bytes": ("bytes", "of the state"),
        },
    ),
    "raft_configuration": (
        "cls",
        "The leader of a group has committed who its members are.",
        {
            "group": ("name", "of the group"),
            "index": ("number", "of the entry"),
            "voters": ("nodes", "who decide"),
            "learners": ("nodes", "who only follow"),
            "outgoing": ("nodes", "who still decide too, until the change is complete"),
        },
    ),
    # db
    "commit": (
        "db",
        "A shard has applied a transaction that writes, or several that came together.",
        {
            "shard": ("number", "of the shard"),
            "container": ("name", "of the first key"),
            "keys": ("keys", "the first of those written"),
            "index": ("number", "of the entry in the shard's log"),
        },
    ),
    "transaction_recovered": (
        "db",
        "A coordinator has ended a transaction across shards whose driver is gone: a predecessor's, or its own before.",
        {
            "shard": ("number", "that coordinates it"),
            "transaction": ("name", "of the transaction"),
            "outcome": ("word", "commit, if that had been decided, or abort"),
        },
    ),
    "conflict": (
        "db",
        "A transaction was refused: what it had read has changed.",
        {
            "shard": ("number", "of the shard"),
            "container": ("name", "of the key"),
            "key": ("key", "that has changed"),
        },
    ),
    "shard_primary": (
        "db",
        "The primary of a shard has set its replicas.",
        {
            "shard": ("number", "of the shard"),
            "generation": ("number", "of the primary's reign"),
            "replicas": ("nodes", "who holds it from now on, the primary first"),
        },
    ),
    "shard_synced": (
        "db",
        "A replica has caught up by a copy of the shard.",
        {
            "shard": ("number", "of the shard"),
            "generation": ("number", "of the primary's reign"),
            "source": ("node", "where it was copied from"),
            "bytes": ("bytes", "copied"),
        },
    ),
    # fs
    "fs_write": (
        "fs",
        "A file was written: its header is committed.",
        {
            "path": ("path", "of the file"),
            "size": ("bytes", "of its content"),
            "version": ("number", "of the file, from 1"),
            "chunks": ("count", "of its content; 0: it is in the header"),
            "duration_s": ("s", "from the first byte to the commit; it ends with the event"),
        },
    ),
    "fs_delete": (
        "fs",
        "A file or a directory was removed.",
        {"path": ("path", "of it"), "entries": ("count", "removed, with all below")},
    ),
    "chunk_stored": (
        "fs",
        "A chunk that was not here is held and synced.",
        {"chunk": ("hash", "its name"), "bytes": ("bytes", "its size")},
    ),
    "repair_started": (
        "repair",
        "Copies of chunks are missing, and this node makes them.",
        {"epoch": ("number", "of the view"), "missing": ("count", "of copies")},
    ),
    "chunk_copied": (
        "repair",
        "A chunk came here by repair.",
        {"chunk": ("hash", "its name"), "source": ("node", "who sent it"), "bytes": ("bytes", "its size")},
    ),
    "repair_done": (
        "repair",
        "This node has nothing left to repair.",
        {"epoch": ("number", "of the view"), "copied": ("count", "of chunks"), "bytes": ("bytes", "copied")},
    ),
    "chunk_collected": ("repair", "A chunk that no file needs was removed.", {"chunk": ("hash", "its name")}),
    # faults, policies, tasks
    "fault": (
        "fault",
        "A fault begins or ends; of the node `testbed` when the testbed made it.",
        {
            "fault": ("word", "of the vocabulary: kill, partition, heal, ...; `link` is one node's part of it"),
            "arguments": ("map", "whom it strikes (node, nodes, groups, ...) and how much"),
        },
    ),
    "policy_installed": (
        "policy",
        "A class fills a slot on this node.",
        {"slot": ("name", "of the slot"), "name": ("name", "of the class")},
    ),
    "policy_failed": (
        "policy",
        "A class in a slot raised, or answered nonsense.",
        {"slot": ("name", "of the slot"), "name": ("name", "of the class"), "error": ("text", "what was wrong")},
    ),
    "task_failed": (
        "fault",
        "A task of the node ended with an error that nobody had foreseen.",
        {"task": ("name", "of the task"), "error": ("text", "its class and message")},
    ),
}
"""kind -> (category, meaning, field -> (unit, meaning)); ``docs/events.md`` is made of it."""

KINDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    kind: (category, tuple(fields)) for kind, (category, _, fields) in SCHEMA.items()
}
"""kind -> (category, fields). The category colours the ticker and selects what a subscriber wants."""

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
        """Unique among the events of one life of the node."""
        if self.kind == "send" and (number := self.data.get("message")):
            return (self.node, -number)
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

    def publish(self, kind: str, /, *, cause: EventId | None = None, stamp: int = 0, **data: Any) -> int:
        """Publish; returns the event's sequence number, 0 when nobody wants its category.

        ``cause``: by default what the running task reacts to. ``stamp``: the message's own, of a send or a receive.
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
        cause = cause or current_cause.get()
        event = Event(self.node, self._seq, kind, stamp or self._stamp(), self._time_s(), cause, data)
        for subscriber, wanted in tuple(self._subscribers.values()):
            if category in wanted:
                subscriber(event)
        return self._seq

"""The lines of the event ticker: one event in words, and many alike in one line.

A change of membership reaches every node, and each publishes it: that is one line ("n4 is offline ... seen by n1 n2"),
not five. Frequent kinds (files written, transactions aborted) share one line for a while and count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gostore.core.events import KINDS, Event
from gostore.core.stamps import stamp_wall_ms
from gostore.viz.scene import clock, plural, size

LINES_MAX: Final = 60
"""Lines kept; the oldest go."""
MERGE_S: Final = 2.0
"""Events of a frequent kind within this time of the first share its line."""
MERGE_MEMBER_S: Final = 30.0
"""News of one change of membership takes this long at most to reach all."""
NODES_MAX: Final = 64
"""Nodes named in one line."""

# Too frequent to read, or told better by a gauge, a pulse or another event.
SILENT: Final = (
    "send",
    "recv",
    "drop",
    "wal_sync",
    "commit",
    "chunk_stored",
    "chunk_copied",
    "chunk_collected",
    "view",
)
SHOWN: Final = tuple(kind for kind in KINDS if kind not in SILENT)


@dataclass
class Line:
    """One line. It may grow while it is shown: ``id`` stays."""

    id: int
    key: tuple[Any, ...]
    stamp_ms: int
    event: Event
    subjects: list[str] = field(default_factory=list)
    """Whom it is about."""
    nodes: list[str] = field(default_factory=list)
    """Who published it."""
    count: int = 0


class Ticker:
    """The newest lines, at most ``lines_max`` of them."""

    def __init__(self, lines_max: int = LINES_MAX) -> None:
        self.started_ms: int | None = None
        self._lines: deque[Line] = deque(maxlen=lines_max)
        self._changed: dict[int, Line] = {}
        self._next = 1

    def add(self, event: Event) -> None:
        # A partition is one fault and a link fault at every node: the first is a line, the others are drawn.
        if event.kind in SILENT or (event.kind == "fault" and event.data["fault"] == "link"):
            return
        at_ms = stamp_wall_ms(event.stamp)
        if self.started_ms is None:
            self.started_ms = at_ms
        key, merge_s = _key(event)
        for line in reversed(self._lines):
            if abs(at_ms - line.stamp_ms) <= merge_s * 1000 and line.key == key:
                break
        else:
            line = Line(self._next, key, at_ms, event)
            self._next += 1
            if len(self._lines) == self._lines.maxlen:
                self._changed.pop(self._lines[0].id, None)
            self._lines.append(line)
        line.count += 1
        # The newest of a frequent kind is the one to show; of a change of membership the first, who found it out.
        if merge_s == MERGE_S:
            line.event = event
        for names, name in ((line.nodes, event.node), (line.subjects, str(event.data.get("member", event.node)))):
            if name not in names and len(names) < NODES_MAX:
                names.append(name)
        self._changed[line.id] = line

    def take(self) -> list[dict[str, Any]]:
        """What is new or has changed since the last call, oldest first."""
        changed = [self._shown(line) for line in self._changed.values()]
        self._changed.clear()
        return changed

    def lines(self) -> list[dict[str, Any]]:
        """All lines, the oldest first: by the events' stamps, for they arrive from several nodes."""
        return [self._shown(line) for line in sorted(self._lines, key=lambda line: (line.stamp_ms, line.id))]

    def _shown(self, line: Line) -> dict[str, Any]:
        since_ms = line.stamp_ms - (self.started_ms or line.stamp_ms)
        tag, text = describe(line.event, line.nodes, line.subjects, line.count)
        return {
            "id": line.id,
            "ms": line.stamp_ms,
            "time": clock(since_ms / 1000, digits=2),
            "tag": tag,
            "text": text,
            "nodes": list(dict.fromkeys(line.subjects + line.nodes)),
        }


def describe(
    event: Event, nodes: list[str] | None = None, subjects: list[str] | None = None, count: int = 1
) -> tuple[str, str]:
    """The event as (tag, sentence). ``nodes``: who published it; ``subjects``: whom it is about; ``count``: how many
    alike it stands for."""
    nodes = nodes or [event.node]
    subjects = subjects or [str(event.data.get("member", event.node))]
    words = _WORDS.get(event.kind)
    text = (
        words(event.data, event.node, _are(subjects), nodes)
        if words
        else f"{event.node}: {event.kind.replace('_', ' ')}"
    )
    if event.kind in _FREQUENT and count > 1:
        text += f" and {count - 1:,} more"
    return event.category, text


_FREQUENT = (
    "conflict", "fs_write", "fs_delete", "repair_started", "repair_done", "shard_primary", "shard_synced",
    "raft_leader", "raft_snapshot", "raft_configuration", "transaction_recovered",
)  # fmt: skip


def _key(event: Event) -> tuple[tuple[Any, ...], float]:
    """What makes two events one line, and for how long (seconds)."""
    data = event.data
    match event.kind:
        case "member":
            return ("member", data["state"], data["epoch"]), MERGE_MEMBER_S
        case "node_ready":
            return (event.kind, data["epoch"]), MERGE_MEMBER_S
        case "suspect" | "refute":
            return (event.kind, data["member"], data["incarnation"]), MERGE_MEMBER_S
        case "master":
            return ("master", data["member"]), MERGE_MEMBER_S
        case "policy_installed":
            return (event.kind, data["slot"], data["name"]), MERGE_MEMBER_S
        case "policy_failed":
            return (event.kind, data["slot"], data["name"], data["error"]), MERGE_MEMBER_S
        case kind if kind in _FREQUENT:
            return (kind,), MERGE_S
    return (event.kind, event.node, event.seq), 0.0


def _are(names: list[str]) -> str:
    """``n1 is``, ``n1, n2 are``."""
    return f"{_some(names)} {'is' if len(names) == 1 else 'are'}"


def _seen(nodes: list[str]) -> str:
    return f"seen by {_by(nodes)}"


def _by(nodes: list[str]) -> str:
    return _some(nodes) if len(nodes) <= 3 else f"{len(nodes)} nodes"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.01 else f"{seconds * 1000:.0f}"


def _fault(data: Mapping[str, Any]) -> str:
    arguments = data["arguments"]
    if isinstance(arguments, Mapping):
        words = ", ".join(f"{key} {_plain(value)}" for key, value in arguments.items())
    else:
        words = _plain(arguments)
    return f"{data['fault']} {words}".strip()


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "{" + ", ".join(_plain(item) for item in value) + "}"
    return str(value)


_Words = Callable[[Mapping[str, Any], str, str, list[str]], str]
# kind -> (data, publisher, "whom it is about is/are", publishers) -> sentence
_WORDS: Final[dict[str, _Words]] = {
    "node_started": lambda d, n, *_: f"{n} started, incarnation {d['incarnation']}",
    "lost_majority": lambda d, n, *_: f"{n} goes on without {_plain(d['lost'])}: writes may be lost",
    "node_ready": lambda d, _, are, __: f"{are} ready, epoch {d['epoch']}",
    "node_stopping": lambda d, n, *_: f"{n} stops: {d['reason']}",
    "member": lambda d, _, are, nodes: f"{are} {d['state']}, epoch {d['epoch']}; {_seen(nodes)}",
    "suspect": lambda d, _, __, nodes: f"{d['member']} suspected by {_by(nodes)}",
    "refute": lambda d, _, __, nodes: f"{d['member']} is alive, incarnation {d['incarnation']}; {_seen(nodes)}",
    "master": lambda d, _, __, nodes: f"{d['member']} is the master, epoch {d['epoch']}; {_seen(nodes)}",
    "wal_recovered": lambda d, n, *_: f"{n} read its log: {plural(d['records'], 'record')}, torn {d['torn_bytes']} B",
    "disk_failed": lambda d, n, *_: f"{n}: disk failed at {d['what']}: {d['error']}",
    "conflict": lambda d, n, *_: f"{n} aborted a transaction: conflict on {d['container']}/{d['key']}",
    "shard_primary": lambda d, n, *_: f"{n} leads shard {d['shard']}, generation {d['generation']}",
    "shard_synced": lambda d, n, *_: f"{n} copied shard {d['shard']} from {d['source']}, {size(d['bytes'])}",
    "raft_leader": lambda d, n, *_: f"{n} leads {d['group']}, term {d['term']}",
    "raft_snapshot": lambda d, n, *_: f"{n} installed a snapshot of {d['group']}, {size(d['bytes'])}",
    "raft_configuration": lambda d, *_: f"{d['group']} is held by {_plain(d['voters'])}",
    "transaction_recovered": lambda d, n, *_: (
        f"{n} ends a transaction that its coordinator left, shard {d['shard']}: {d['outcome']}"
    ),
    "fs_write": lambda d, *_: f"write {d['path']} v{d['version']}, {size(d['size'])} in {_ms(d['duration_s'])} ms",
    "fs_delete": lambda d, *_: f"delete {d['path']}, {d['entries']} entries",
    "repair_started": lambda d, n, *_: f"{n} repairs {plural(d['missing'], 'chunk')}, epoch {d['epoch']}",
    "repair_done": lambda d, n, *_: f"{n} copied {plural(d['copied'], 'chunk')}, {size(d['bytes'])}",
    "fault": lambda d, *_: _fault(d),
    "policy_installed": lambda d, _, __, nodes: f"{d['slot']} is {d['name']} on {_by(nodes)}",
    "policy_failed": lambda d, _, __, nodes: f"{d['slot']} {d['name']} failed on {_some(nodes)}: {d['error']}",
    "task_failed": lambda d, n, *_: f"{n}: task {d['task']} failed: {d['error']}",
}

"""Space-time diagrams: a line for each node, time downwards, an arrow for each message that arrives (Lamport, 1978).

    space_time(journal, event)                   the causal past of an event: all that can have led to it
    space_time(journal, since_s=4, until_s=5)    a window of time

The result shows itself in a notebook; ``svg()`` is the picture, ``text()`` the same for a terminal. Every event has a
row of its own, in causal stamp order, so that nothing is drawn over anything else and arrows always point down; the
times stand at the left. Faults of the testbed have no causes and no node: they are shown when they fall into the time
of what is shown, and as a band on the nodes that they strike for as long as they last.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gostore.core.errors import BadRequest
from gostore.core.events import CATEGORIES, Event
from gostore.trace import Causality, Journal
from gostore.trace.export import TESTBED
from gostore.viz.scene import plural, size

EVENTS_MAX: Final = 120
"""Rows by default: some four screens."""
EVENTS_LIMIT: Final = 2_000
"""Rows that may be asked for."""
NODES_MAX: Final = 16
"""Lines; of more nodes those that were active last are shown."""
WIDTH_PX: Final = 720
WIDTH_PX_MIN: Final = 480
WIDTH_PX_MAX: Final = 2_400
KEYS_SHOWN: Final = 3

NETWORK_FAULTS: Final = ("partition", "isolate", "delay", "loss", "duplicate", "reorder")
DOWN, PAUSED, NETWORK, DISK = "down", "paused", "network", "disk"


@dataclass(frozen=True, slots=True)
class Row:
    """One event. ``words``: what happened, without the node; ``source``: the row of its send, of a receive."""

    event: Event
    words: str
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Band:
    """A fault that lasts, on one node, from one row to another, both included; ``look`` is one of the four above."""

    node: str
    look: str
    first: int
    last: int
    label: str


@dataclass(frozen=True, slots=True)
class SpaceTime:
    """What is drawn; see :func:`space_time`. ``nodes`` in the order of their lines, ``focus`` the row to look at."""

    title: str
    note: str
    nodes: tuple[str, ...]
    rows: tuple[Row, ...]
    bands: tuple[Band, ...]
    focus: int | None = None
    width_px: int = WIDTH_PX

    def svg(self) -> str:
        """An SVG document, complete in itself, that follows the reader's choice of light or dark."""
        from gostore.viz.spacetime_svg import svg_of

        return svg_of(self)

    def text(self) -> str:
        """The same in lines of text; see :func:`text_diagram`."""
        return text_diagram(self)

    def _repr_svg_(self) -> str:
        return self.svg()

    def __repr__(self) -> str:
        return f"<{self.title}: {plural(len(self.rows), 'event')} of {plural(len(self.nodes), 'node')}>"


def space_time(
    source: Journal | Causality | Iterable[Event],
    event: Event | None = None,
    *,
    since_s: float | None = None,
    until_s: float | None = None,
    nodes: Iterable[str] | None = None,
    categories: Iterable[str] | None = None,
    title: str = "",
    events_max: int = EVENTS_MAX,
    width_px: int = WIDTH_PX,
) -> SpaceTime:
    """The diagram of the causal past of ``event``, or without one of a window of time.

    ``since_s`` and ``until_s`` (loop time) and ``nodes`` and ``categories`` leave out more; a window of a journal that
    holds every message is mostly gossip, so ``categories=("db", "cls", "fault")`` may say more. Of more than
    ``events_max`` events the latest are shown, the nearest to ``event``; the diagram says how many it leaves out.

    Raises :class:`BadRequest` for an event that is not in the journal and for values out of range.
    """
    _within("events_max", events_max, 1, EVENTS_LIMIT)
    _within("width_px", width_px, WIDTH_PX_MIN, WIDTH_PX_MAX)
    wanted = frozenset(CATEGORIES if categories is None else categories)
    if unknown := sorted(wanted - frozenset(CATEGORIES)):
        raise BadRequest(f"there are no categories {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")
    causality = _causality(source)
    everything = causality.events if event is None else [*causality.past(event), event]
    low = float("-inf") if since_s is None else since_s
    high = float("inf") if until_s is None else until_s
    named = None if nodes is None else frozenset(nodes)
    chosen = [
        e
        for e in everything
        if e is event
        or (
            low <= e.time_s <= high
            and e.category in wanted
            and e.kind != "fault"
            and (named is None or e.node in named)
        )
    ]
    shown = chosen[-events_max:]
    faults = _from_outside(causality) if "fault" in wanted else []
    visible: list[Event] = []
    if shown:
        # Of a past, and where the beginning is cut off, faults of the time that is left; else of the whole window.
        whole = event is None and len(shown) == len(chosen)
        begin_s = low if whole or since_s is not None else min(e.time_s for e in shown)
        end_s = high if event is None or until_s is not None else max(e.time_s for e in shown)
        visible = [e for e in faults if begin_s <= e.time_s <= end_s][-events_max:]
    shown_nodes = _nodes(shown, visible)
    shown = [e for e in shown if e.node in shown_nodes]
    note = _note(shown, len(chosen))
    shown = _in_time(causality, sorted([*shown, *visible], key=causality.position))
    rows = _rows(causality, shown)
    return SpaceTime(
        title or (f"What led to {event.kind.replace('_', ' ')} on {event.node}" if event else "Space-time diagram"),
        note,
        shown_nodes,
        rows,
        _bands(causality, faults, rows, shown_nodes),
        next((index for index, row in enumerate(rows) if event is not None and row.event == event), None),
        width_px,
    )


# what is shown


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BadRequest(f"{name} = {value}: allowed are {low} to {high}")


def _causality(source: Journal | Causality | Iterable[Event]) -> Causality:
    if isinstance(source, Causality):
        return source
    return source.causality() if isinstance(source, Journal) else Causality(source)


def _from_outside(causality: Causality) -> list[Event]:
    """The faults that the testbed made; what a node says of its part in one is the same once more."""
    faults = [event for event in causality.events if event.kind == "fault"]
    return [fault for fault in faults if fault.node == TESTBED] or faults


def _nodes(events: Sequence[Event], faults: Sequence[Event]) -> tuple[str, ...]:
    """Who acts, the latest first to be taken, and who is struck by name."""
    active = [event.node for event in reversed(events) if event.node != TESTBED]
    named = [node for fault in reversed(faults) if (node := fault.data["arguments"].get("node")) is not None]
    return tuple(sorted(list(dict.fromkeys([*active, *named]))[:NODES_MAX], key=natural))


def natural(name: str) -> list[Any]:
    """A key that puts n10 behind n9."""
    return [(1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _in_time(causality: Causality, events: list[Event]) -> list[Event]:
    """By the clocks of the loops, finer than stamps, where these are one clock: then they respect every cause."""
    by_time = sorted(events, key=lambda event: event.time_s)
    place = {id(event): row for row, event in enumerate(by_time)}
    for row, event in enumerate(by_time):
        cause = causality.cause(event)
        if cause is not None and place.get(id(cause), row - 1) >= row:
            return events
    return by_time


def _rows(causality: Causality, events: Sequence[Event]) -> tuple[Row, ...]:
    places = {causality.position(event): row for row, event in enumerate(events)}
    rows = []
    for event in events:
        send = causality.cause(event) if event.kind == "recv" else None
        source = None if send is None else places.get(causality.position(send))
        rows.append(Row(event, words_of(event), source))
    return tuple(rows)


def _note(shown: Sequence[Event], found: int) -> str:
    if not shown:
        return "no events"
    times = [event.time_s for event in shown]
    span = f"{min(times):.3f} to {max(times):.3f} s"
    if len(shown) == found:
        return f"{plural(found, 'event')}, {span}"
    return f"the latest {len(shown):,} of {plural(found, 'event')}, {span}; {found - len(shown):,} are left out"


# faults that last


def _bands(
    causality: Causality, faults: Sequence[Event], rows: Sequence[Row], nodes: Sequence[str]
) -> tuple[Band, ...]:
    """Each from the row of its fault, or the first, to that of its end, or the last."""
    if not rows:
        return ()
    started = [event for event in causality.events if event.kind == "node_started"]
    times = [row.event.time_s for row in rows]
    timely = times == sorted(times)

    def key(event: Event) -> tuple[float, int]:
        """By what the rows are in order."""
        return (event.time_s if timely else 0.0, causality.position(event))

    bands = _Bands([key(row.event) for row in rows], nodes)
    for event in sorted([*faults, *started], key=key):
        bands.take(event, key(event))
    bands.close((float("inf"), 0), (DOWN, PAUSED, NETWORK, DISK))
    return tuple(sorted(bands.closed, key=lambda band: (band.first, nodes.index(band.node), band.look, band.last)))


class _Bands:
    """Follows the faults from the first on; what began before the first row may still last."""

    def __init__(self, keys: list[tuple[float, int]], nodes: Sequence[str]) -> None:
        self.closed: list[Band] = []
        self._keys = keys
        self._nodes = nodes
        self._open: list[tuple[tuple[float, int], str, str, str, str]] = []

    def take(self, event: Event, at: tuple[float, int]) -> None:
        kind, arguments = event.data.get("fault"), event.data.get("arguments", {})
        node = event.node if event.kind == "node_started" else arguments.get("node")
        if event.kind == "node_started" or kind == "restart":
            self.close(at, (DOWN, PAUSED), node)
        elif kind == "resume":
            self.close(at, (PAUSED,), node)
        elif kind == "heal":
            self.close(at, (NETWORK,), None, arguments.get("fault"))
        elif (look := _look(kind, arguments)) is not None:
            if look in (DOWN, DISK):
                self.close(at, (look,), node, None if look == DOWN else str(kind))
            if not _ends(arguments):
                words = words_of(event)
                self._open += [(at, name, look, str(kind), words) for name in struck(arguments, self._nodes)]

    def close(
        self, at: tuple[float, int], looks: Sequence[str], node: str | None = None, fault: str | None = None
    ) -> None:
        still = []
        for band in self._open:
            begun, name, look, kind, label = band
            if look not in looks or node not in (None, name) or fault not in (None, kind):
                still.append(band)
            elif begun <= self._keys[-1] and at >= self._keys[0]:
                last = min(bisect_left(self._keys, at), len(self._keys) - 1)
                self.closed.append(Band(name, look, bisect_left(self._keys, begun), last, label))
        self._open = still


def _look(kind: Any, arguments: Mapping[str, Any]) -> str | None:
    if kind in ("kill", "power_cut"):
        return DOWN
    if kind == "pause":
        return PAUSED
    if kind in NETWORK_FAULTS:
        return NETWORK
    return DISK if kind in ("slow_disk", "full_disk") else None


def _ends(arguments: Mapping[str, Any]) -> bool:
    """Whether these are the values by which a fault of a disk ends."""
    return arguments.get("sync_s") == 0 or arguments.get("free_bytes", 0) < 0


def struck(arguments: Mapping[str, Any], nodes: Sequence[str]) -> list[str]:
    """Which of the nodes a fault strikes, by its arguments; all, when they name none."""
    names = [arguments["node"]] if "node" in arguments else []
    names += [name for group in arguments.get("groups", ()) for name in group]
    names += [name for key in ("source", "target") for name in arguments.get(key, ())]
    return [node for node in nodes if node in names] if names else list(nodes)


# words


def words_of(event: Event) -> str:
    """What happened, in a few words, without the node."""
    data = event.data
    if (words := _WORDS.get(event.kind)) is not None:
        return words(data)
    told = [f"{name} {_list(value) if isinstance(value, list | tuple) else value}" for name, value in data.items()]
    return ", ".join([event.kind.replace("_", " "), *told])


def _frame(data: Mapping[str, Any]) -> str:
    called = f" {data['service']}.{data['function']}" if data.get("function") else ""
    return f"{data.get('frame', 'message')}{called}"


def _list(values: Sequence[Any]) -> str:
    few = " ".join(str(value) for value in values[:KEYS_SHOWN])
    return few if len(values) <= KEYS_SHOWN else f"{few} and {len(values) - KEYS_SHOWN} more"


def _arguments(arguments: Mapping[str, Any]) -> list[str]:
    told = []
    for name, value in arguments.items():
        if name == "groups":
            told.append(" | ".join(" ".join(group) for group in value))
        elif name in ("node", "fault"):
            told.append(str(value))
        elif isinstance(value, list | tuple):
            told.append(f"{'from' if name == 'source' else 'to' if name == 'target' else name} {' '.join(value)}")
        elif value is not None:
            told.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return told


_WORDS: Final[dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "send": lambda d: f"{_frame(d)} → {d.get('to') or 'an address'}",
    "recv": lambda d: f"{_frame(d)} ← {d.get('from')}",
    "drop": lambda d: f"dropped ({d.get('reason')}), to or from {d.get('peer')}",
    "member": lambda d: f"{d['member']} is {d['state']}, epoch {d['epoch']}",
    "view": lambda d: f"view of epoch {d['epoch']}: {_list(d['online'])}",
    "master": lambda d: f"master is {d['member']}, epoch {d['epoch']}",
    "suspect": lambda d: f"suspects {d['member']}",
    "refute": lambda d: f"{d['member']} lives after all",
    "node_started": lambda d: f"starts, life {d['incarnation']}",
    "commit": lambda d: f"commit {d['container']} {_list(d['keys'])}, shard {d['shard']}, index {d['index']}",
    "conflict": lambda d: f"conflict {d['container']} {d['key']}, shard {d['shard']}",
    "shard_primary": lambda d: f"primary of shard {d['shard']}, generation {d['generation']}: {_list(d['replicas'])}",
    "raft_leader": lambda d: f"leads {d['group']}, term {d['term']}",
    "raft_snapshot": lambda d: f"snapshot of {d['group']}, index {d['index']}, {size(d['bytes'])}",
    "raft_configuration": lambda d: f"members of {d['group']}, index {d['index']}: {_list(d['voters'])}",
    "transaction_recovered": lambda d: f"{d['outcome']} of {d['transaction']}, which its coordinator left",
    "wal_sync": lambda d: f"sync of {plural(d['records'], 'record')}, {d['duration_s'] * 1000:.1f} ms",
    "fs_write": lambda d: f"wrote {d['path']}, {size(d['size'])}",
    "fault": lambda d: " ".join([str(d["fault"]), *_arguments(d["arguments"])]),
}


# text

CELL: Final = 8


def short(name: str, characters: int) -> str:
    """A name that is too long by its end: that is where the names of nodes differ."""
    return name if len(name) <= characters else f"…{name[-(characters - 1) :]}"


_TRACKS: Final = {DOWN: " ", PAUSED: ".", NETWORK: ":", DISK: ";"}

KEY: Final = (
    "  o sends   -> arrives   x is dropped   * anything else   # a fault   @ look here\n"
    "  | runs    (blank) down    . paused    : network fault    ; disk fault"
)


def text_diagram(diagram: SpaceTime) -> str:
    """The diagram in plain text: a column for each node, an arrow in the row in which a message arrives."""
    columns = {node: CELL // 2 + CELL * index for index, node in enumerate(diagram.nodes)}
    width = CELL * len(columns)
    header = "".join(short(node, CELL - 1).center(CELL) for node in diagram.nodes)
    lines = [diagram.title, diagram.note, "", f"  {'time s':>10}  {header}".rstrip()]
    before = ""
    for index, row in enumerate(diagram.rows):
        now = f"{row.event.time_s:.6f}"
        track = _track(diagram, index, columns, width)
        focus = ">>" if index == diagram.focus else "  "
        told = row.words if row.event.kind == "fault" else f"{row.event.node} {row.words}"
        lines.append(f"{focus}{now if now != before else '':>10}  {track}  {told}".rstrip())
        before = now
    return "\n".join([*lines, "", KEY])


def _track(diagram: SpaceTime, index: int, columns: Mapping[str, int], width: int) -> str:
    row = diagram.rows[index]
    track = [" "] * width
    for node, column in columns.items():
        looks = [band.look for band in diagram.bands if band.node == node and band.first <= index <= band.last]
        # The gravest shows: who is down is in no network.
        track[column] = next((_TRACKS[look] for look in _TRACKS if look in looks), "|")
    at = columns.get(row.event.node)
    if row.event.kind == "fault":
        for node in struck(row.event.data["arguments"], diagram.nodes):
            track[columns[node]] = "#"
    elif at is not None:
        if row.source is not None:
            start = columns.get(diagram.rows[row.source].event.node, at)
            step = 1 if start < at else -1
            for place in range(start + step, at, step):
                track[place] = "+" if place in columns.values() else "-"
            track[at - step] = ">" if step > 0 else "<"
        track[at] = "@" if index == diagram.focus else {"send": "o", "recv": "o", "drop": "x"}.get(row.event.kind, "*")
    return "".join(track)

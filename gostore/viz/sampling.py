"""Thousands of events a second, ten to twenty updates: what each update tells.

Pure: events and snapshots go in, plain dictionaries come out; no clock, no thread. Between two updates the
:class:`Sampler` counts messages per link and kind (the picture animates a few and widens the link by the count), hands
everything readable to the :class:`~gostore.viz.ticker.Ticker`, and keeps every change of state. :class:`Gauges`
turns cumulative counters into rates over the last minute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from gostore.client.consensus import with_leader
from gostore.core.events import Event
from gostore.viz.scene import Picture
from gostore.viz.ticker import Ticker

LINKS_MAX: Final = 2000
"""Links counted between two updates (a full mesh of 40 nodes has 1,560)."""
PULSES_MAX: Final = 120
"""Links told in one update: the busiest, and what was dropped."""
GAUGE_POINTS_MAX: Final = 60
"""Points of a gauge: the last minute at one a second."""
CLIENT: Final = "client"
"""Everybody who is no node stands at one place."""

# Functions by which nodes copy what they hold to each other, by service.
_REPLICATION: Final = {"db": ("replicate",), "chunks": ("put", "get")}
# The view's own questions are not what it shows.
_WATCHING: Final = ("admin", "journal")


class Sampler:
    """What happened since the last update."""

    def __init__(self, ticker: Ticker | None = None) -> None:
        self.ticker = ticker or Ticker()
        self.events = 0
        self.skipped = 0
        self._links: dict[tuple[str, str, str], int] = {}
        self._states: list[Event] = []

    def add(self, event: Event) -> None:
        """Take one event; constant time, bounded memory."""
        self.events += 1
        data = event.data
        match event.kind:
            case "recv" if data["service"] not in _WATCHING:
                self._count(data["from"], event.node, kind_of(data["service"], data["function"]))
            case "drop" if data["peer"]:
                self._count(event.node, data["peer"], "drop")
            case "chunk_copied":
                self._count(data["source"], event.node, "copy")
            # What may change the next snapshot much, so that it is taken at once.
            case (
                "member" | "suspect" | "refute" | "master" | "view" | "node_started" | "node_stopping"
                | "raft_leader" | "raft_snapshot" | "raft_configuration" | "fault"
            ):  # fmt: skip
                self._states.append(event)
        self.ticker.add(event)

    def _count(self, a: str, b: str, kind: str) -> None:
        key = (a, b, kind)
        if key in self._links or len(self._links) < LINKS_MAX:
            self._links[key] = self._links.get(key, 0) + 1
        else:
            self.skipped += 1

    def take(self) -> tuple[list[list[Any]], list[dict[str, Any]], list[Event]]:
        """(pulses ``[from, to, kind, count]``, ticker lines new or changed, state events in order) since the last call.

        The caller must take often: state events are never dropped.
        """
        links, self._links = self._links, {}
        states, self._states = self._states, []
        busiest = sorted(links.items(), key=lambda item: (-item[1], item[0]))
        chosen = busiest[:PULSES_MAX]
        if len(busiest) > PULSES_MAX:
            # A dropped message among thousands of calls is what one must not miss.
            rare = [item for item in busiest if item[0][2] == "drop"][: PULSES_MAX // 2]
            chosen = rare + [item for item in busiest if item not in rare][: PULSES_MAX - len(rare)]
        pulses = [[a, b, kind, count] for (a, b, kind), count in chosen]
        return pulses, self.ticker.take(), states


def kind_of(service: str, function: str) -> str:
    """``gossip`` (membership), ``copy`` (replication) or ``call``: the pulse's shape and colour."""
    if service == "cls":
        return "gossip"
    return "copy" if function in _REPLICATION.get(service, ()) else "call"


# gauge -> (label, the counters added up per node, colour name in the style sheet)
GAUGES: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "calls": ("calls/s", ("calls",)),
    "gossip": ("gossip/s", ("gossip",)),
    "commits": ("commits/s", ("commits",)),
    "missing": ("chunks below R", ()),
}


class Gauges:
    """Rates from cumulative counters, one point per snapshot, the last minute of them."""

    def __init__(self, points_max: int = GAUGE_POINTS_MAX) -> None:
        self.points: dict[str, deque[float]] = {name: deque(maxlen=points_max) for name in GAUGES}
        self._time_s: float | None = None
        self._counts: dict[tuple[str, int, str], int] = {}

    def add(self, snapshot: Mapping[str, Any]) -> None:
        """Take a snapshot; one of no later time is ignored."""
        time_s = float(snapshot.get("time_s", 0.0))
        if self._time_s is not None and time_s <= self._time_s:
            return
        first, elapsed_s = self._time_s is None, time_s - (self._time_s or 0.0)
        counts = _counts(snapshot)
        for name, (_, counters) in GAUGES.items():
            if counters:
                grown = sum(
                    # A node that was not there before started from zero; one that restarted has a new incarnation.
                    max(count - self._counts.get(key, 0), 0)
                    for key, count in counts.items()
                    if key[2] in counters
                )
                self.points[name].append(0.0 if first else round(grown / elapsed_s, 2))
        self.points["missing"].append(float((snapshot.get("repair") or {}).get("missing", 0)))
        self._time_s, self._counts = time_s, counts

    def shown(self) -> list[dict[str, Any]]:
        """Per gauge ``{"id", "label", "text", "points"}``; ``text`` is the newest point."""
        return [
            {"id": name, "label": label, "text": figure(points[-1] if points else 0.0), "points": list(points)}
            for (name, (label, _)), points in zip(GAUGES.items(), self.points.values(), strict=True)
        ]


def figure(value: float) -> str:
    """A number of the size people read: ``8,412``, ``3.1``, ``0``."""
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _counts(snapshot: Mapping[str, Any]) -> dict[tuple[str, int, str], int]:
    wanted = [counter for _, counters in GAUGES.values() for counter in counters]
    return {
        (node["name"], int(node.get("incarnation", 0)), counter): int(node.get("counters", {}).get(counter, 0))
        for node in snapshot["nodes"]
        for counter in wanted
    }


def apply_states(snapshot: dict[str, Any], events: list[Event]) -> dict[str, Any]:
    """The snapshot, brought up to date with what nodes published since; the same object when nothing changed.

    The picture then changes at once, and the next snapshot confirms it.
    """
    nodes: dict[str, dict[str, Any]] = {node["name"]: dict(node) for node in snapshot["nodes"]}
    master, epoch = snapshot.get("master"), snapshot.get("epoch", 0)
    groups = snapshot.get("groups", [])
    for event in events:
        data = event.data
        member = nodes.get(str(data.get("member", "")))
        match event.kind:
            case "suspect" if member is not None and event.node not in member.get("suspect", ()):
                member["suspect"] = [*member.get("suspect", ()), event.node]
            case "refute" if member is not None:
                member["suspect"] = []
            case "member" if member is not None and data["epoch"] >= epoch:
                # An older epoch is late news of a node that lags behind.
                member["state"], member["suspect"] = str(data["state"]).lower(), []
                epoch = data["epoch"]
            case "master" if data["epoch"] >= epoch:
                master, epoch = data["member"], data["epoch"]
            case "raft_leader":
                groups = [
                    with_leader(group, data["leader"], data["term"]) if group["name"] == data["group"] else group
                    for group in groups
                ]
    found = {**snapshot, "nodes": list(nodes.values()), "master": master, "epoch": epoch, "groups": groups}
    return snapshot if found == {"master": None, "epoch": 0, "groups": [], **snapshot} else found


def with_traffic(picture: Picture, gauges: Gauges, ticker: Ticker) -> Picture:
    """The picture with its gauges and the ticker's lines, newest first."""
    return {**picture, "gauges": gauges.shown(), "ticker": ticker.lines()[::-1]}

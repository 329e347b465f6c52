"""From a graph to what is drawn: the one description that the widget, the SVG and the matplotlib figure share.

A *picture* is a dictionary of JSON values, ready to be drawn: names, words, colours, places in -1..1; the front end
formats nothing and knows nothing of clusters. The *ring* stands apart, because it is large and changes with the epoch
only: ``{"owners": [id...], "arcs": [[start, width, first, second...]...]}`` with places as parts of a turn and owners
as indices. (JavaScript has no 64-bit integers: tokens end here.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gostore.viz.consensus import consensus_panel, electing, terms_led
from gostore.viz.graph import circle, look_of, turn_of, width_of
from gostore.viz.palette import OKABE_ITO, colors

if TYPE_CHECKING:
    import networkx as nx

LAYOUTS: Final = ("auto", "ring", "spring")
NODE_EDGES_MAX: Final = 4000
"""Edges drawn of a student's graph; a picture of more says nothing."""

_COLOR = re.compile(r"#[0-9a-fA-F]{3,8}|[a-zA-Z]{1,32}")
_DRAWN = ("color", "pos", "look", "label", "x", "y", "counters", "share")
_CHIPS = (
    ("ok", "online"),
    ("arriving", "joining"),
    ("suspect", "suspect"),
    ("paused", "paused"),
    ("departing", "leaving"),
    ("gone", "gone"),
)

Picture = dict[str, Any]


def ring_of(graph: nx.DiGraph) -> dict[str, Any]:
    """The token ring of a cluster's graph; without arcs for any other graph."""
    owners = [str(node) for node in graph]
    index = {name: i for i, name in enumerate(owners)}
    arcs: list[list[float]] = []
    for start, end, names in graph.graph.get("arcs", ()):
        known = [index[name] for name in names if name in index]
        if known:
            arcs.append([round(turn_of(start), 7), round(width_of(start, end), 7), *known])
    return {"owners": owners, "arcs": arcs}


def cluster_picture(graph: nx.DiGraph) -> Picture:
    """The picture of a cluster's graph (:func:`gostore.viz.graph.graph_of`), without traffic, gauges and events."""
    about = graph.graph
    nodes = [_cluster_node(str(name), data, about) for name, data in graph.nodes(data=True)]
    running = about.get("running", True)
    return {
        "mode": "cluster",
        "title": f"GoStore · {plural(len(nodes), 'node')}",
        "name": str(about.get("name", "")),
        "facts": _headline(about),
        "uptime": clock(about.get("time_s", 0.0)),
        "status": "live" if running else "stopped",
        "chips": _chips(nodes, about) if running else [],
        "nodes": nodes,
        "links": [_link(a, b, data) for a, b, data in graph.edges(data=True) if data.get("blocked") or _slow(data)],
        "summary": _summary(graph),
        "consensus": consensus_panel(about, [node["id"] for node in nodes]),
        "gauges": [],
        "ticker": [],
        "mark": None,
        "note": "",
    }


def graph_picture(graph: nx.Graph, *, layout: str = "auto", title: str = "") -> Picture:
    """The picture of any networkx graph.

    Node attributes that are drawn: ``label``, ``color`` (CSS colour, or a number: one colour per number), ``state``
    (text under the label), ``look`` (as :func:`gostore.viz.graph.look_of`), ``pos`` (x, y); all others are listed when
    the node is selected. Edge attributes: ``color``, ``width`` (pixels), ``label``, ``dashed``. ``layout``: ``ring``
    puts the nodes on a circle in their order, ``spring`` is networkx's force layout with a fixed seed, ``auto`` takes
    the nodes' ``pos``, else ``ring`` up to eight nodes, else ``spring``. Raises ``ValueError`` for another layout.
    """
    names = list(graph)
    ids = node_ids(names)
    places, sprung = _places(graph, names, layout)
    tints = _tints([graph.nodes[name].get("color") for name in names])
    nodes = [
        _plain_node(ids[name], graph.nodes[name], place, tint)
        for name, place, tint in zip(names, places, tints, strict=True)
    ]
    edges = list(graph.edges(data=True))
    tint_of = dict(zip(names, tints, strict=True))
    return {
        "mode": "graph",
        "title": title or str(graph.graph.get("name", "")) or "Graph",
        "name": "",
        "facts": [plural(len(nodes), "node"), plural(len(edges), "edge")],
        "uptime": "",
        "status": "live",
        "chips": [],
        "nodes": nodes,
        "stretch": sprung,
        "links": [
            _edge(ids[a], ids[b], data, directed=graph.is_directed(), tint=tint_of[a])
            for a, b, data in edges[:NODE_EDGES_MAX]
        ],
        "summary": [],
        "consensus": None,
        "gauges": [],
        "ticker": [],
        "mark": None,
        "note": "" if len(edges) <= NODE_EDGES_MAX else f"the first {NODE_EDGES_MAX} of {len(edges)} edges",
    }


def clock(seconds: float, *, digits: int = 0) -> str:
    """Minutes and seconds: ``02:14`` or, with two digits, ``02:14.31``."""
    minutes, rest = divmod(max(seconds, 0.0), 60)
    # Cut, not rounded: 59.999 s is not yet the next minute.
    scale = 10**digits
    rest = int(rest * scale) / scale
    return f"{int(minutes):02d}:{rest:0{2 if digits == 0 else 3 + digits}.{digits}f}"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def size(count: float) -> str:
    """Bytes for people, in powers of 1,000: ``14 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


# -- clusters


def _headline(about: Mapping[str, Any]) -> list[str]:
    facts = []
    if "epoch" in about:
        facts.append(f"epoch {about['epoch']}")
    if about.get("shards"):
        facts.append(plural(about["shards"], "shard"))
    if about.get("replicas"):
        facts.append(f"R {about['replicas']}")
    return facts


def _chips(nodes: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[list[str]]:
    chips = []
    for look, word in _CHIPS:
        count = sum(1 for node in nodes if node["look"] == look)
        if count:
            chips.append([look, f"{count} {word}"])
    leaderless = electing(about.get("groups") or ())
    if leaderless:
        chips.append(["suspect", f"{plural(leaderless, 'group')} without a leader"])
    repair = about.get("repair") or {}
    missing, copied = repair.get("missing", 0), repair.get("copied", 0)
    if missing:
        chips.append(["repair", f"repairing {copied * 100 // (copied + missing)} %"])
    elif repair.get("active"):
        chips.append(["repair", "checking copies"])
    return chips


def _cluster_node(name: str, data: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    roles = list(data.get("roles", ()))
    master = about.get("master") == name or "master" in roles
    look = data.get("look") or look_of(data)
    return {
        "id": name,
        "label": name,
        "state": _state_word(data, look),
        "look": look,
        "color": data["color"],
        "x": round(data["pos"][0], 5),
        "y": round(data["pos"][1], 5),
        "master": master and look != "gone",
        "facts": _node_facts(name, data, look, master, about.get("groups") or ()),
    }


def _state_word(data: Mapping[str, Any], look: str) -> str:
    state = str(data.get("state", ""))
    if look == "gone" and state not in ("offline", "left"):
        return "killed"
    return look if look in ("paused", "suspect") else state


def _node_facts(
    name: str, data: Mapping[str, Any], look: str, master: bool, groups: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    facts = [["state", _state_word(data, look) + (" · master" if master and look != "gone" else "")]]
    if data.get("suspect"):
        facts.append(["suspected by", ", ".join(data["suspect"])])
    plain = ("incarnation", "epoch", "address", "rest", "pid")
    words = {"rest": "REST", "pid": "process"}
    facts += [[words.get(key, key), str(data[key])] for key in plain if data.get(key) is not None]
    if groups:
        facts.append(["leads", terms_led(groups, name) or "nothing"])
    elif "shards" in data:
        facts.append(["leads shards", ", ".join(str(shard) for shard in data["shards"]) or "none"])
    if "shards_held" in data:
        facts.append(["holds", plural(len(data["shards_held"]), "shard")])
    facts.append(["owns", f"{data.get('share', 0.0) * 100:.0f} % of the ring"])
    if "chunks" in data:
        facts.append(["chunks", f"{data['chunks']:,} · {size(data.get('bytes', 0))}"])
    for key, value in (data.get("counters") or {}).items():
        facts.append([key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)])
    if data.get("stale"):
        facts.append(["figures", "the last known: it does not answer"])
    return facts


def _summary(graph: nx.DiGraph) -> list[list[str]]:
    about = graph.graph
    facts = [["cluster", str(about.get("name", ""))]]
    if about.get("world"):
        facts.append(["world", str(about["world"])])
    facts.append(["master", str(about.get("master") or "none")])
    if about.get("placement"):
        facts.append(["placement", str(about["placement"])])
    shares = [data["share"] for _, data in graph.nodes(data=True) if data["share"]]
    if shares:
        facts.append(["balance", f"a node owns {min(shares) * 100:.0f} to {max(shares) * 100:.0f} % of the ring"])
    chunks = [data["chunks"] for _, data in graph.nodes(data=True) if "chunks" in data]
    if chunks:
        total = sum(data.get("bytes", 0) for _, data in graph.nodes(data=True))
        facts.append(["chunks", f"{sum(chunks):,} copies · {size(total)}"])
    repair = about.get("repair") or {}
    if repair:
        facts.append(["repair", f"{repair.get('missing', 0):,} missing · {repair.get('copied', 0):,} copied"])
    return facts


def _slow(data: Mapping[str, Any]) -> bool:
    return bool(data.get("drop") or data.get("delay_s"))


def _link(a: Hashable, b: Hashable, data: Mapping[str, Any]) -> dict[str, Any]:
    if data.get("blocked") or data.get("drop", 0.0) >= 1.0:
        words, look = "blocked", "blocked"
    else:
        look = "slow"
        words = ", ".join(
            part
            for part in (
                f"loses {data['drop'] * 100:.0f} %" if data.get("drop") else "",
                f"delays {data['delay_s'] * 1000:.0f} ms" if data.get("delay_s") else "",
            )
            if part
        )
    return {"a": str(a), "b": str(b), "look": look, "label": words, "directed": True}


# -- any graph


def node_ids(names: Sequence[Hashable]) -> dict[Hashable, str]:
    """A text for each node; ``repr`` where two nodes read the same (1 and "1")."""
    texts: dict[str, int] = {}
    for name in names:
        texts[str(name)] = texts.get(str(name), 0) + 1
    return {name: str(name) if texts[str(name)] == 1 else repr(name) for name in names}


def _places(graph: nx.Graph, names: Sequence[Hashable], layout: str) -> tuple[list[tuple[float, float]], bool]:
    """Where the nodes stand, and whether a force layout put them there."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: allowed are {', '.join(LAYOUTS)}")
    given = [graph.nodes[name].get("pos") for name in names]
    if layout == "auto" and names and all(pos is not None for pos in given):
        return _fit([(float(pos[0]), float(pos[1])) for pos in given]), False
    if layout == "ring" or (layout == "auto" and len(names) <= 8) or len(names) < 2:
        return circle(len(names)), False
    import networkx as nx

    found = nx.spring_layout(graph, seed=1, k=1.6 / math.sqrt(len(names)))
    xs, ys = ([float(found[name][axis]) for name in names] for axis in (0, 1))
    return list(zip(_spread(xs), _spread(ys), strict=True)), True


def _spread(values: Sequence[float]) -> list[float]:
    """Moved and scaled to fill -1..1."""
    low, high = min(values), max(values)
    return [(2 * value - low - high) / ((high - low) or 1.0) for value in values]


def _fit(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moved and scaled (both axes alike) into -1..1; places that fit already stay."""
    if all(abs(x) <= 1 and abs(y) <= 1 for x, y in places) and any(max(abs(x), abs(y)) > 0.6 for x, y in places):
        return list(places)
    xs, ys = [x for x, _ in places], [y for _, y in places]
    half = max(max(xs) - min(xs), max(ys) - min(ys)) / 2 or 1.0
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return [((x - middle_x) / half, (y - middle_y) / half) for x, y in places]


def _tints(given: Sequence[Any]) -> list[str]:
    """CSS colours as they are, numbers as members of the palette, blue without either: colours that differ mean it."""
    numbers = sorted({value for value in given if isinstance(value, int)})
    by_number = dict(zip(numbers, colors(len(numbers)), strict=True))
    tints = []
    for value in given:
        if isinstance(value, int):
            tints.append(by_number[value])
        else:
            tints.append(value if isinstance(value, str) and _COLOR.fullmatch(value) else OKABE_ITO[0])
    return tints


def _plain_node(node_id: str, data: Mapping[str, Any], place: tuple[float, float], tint: str) -> dict[str, Any]:
    facts = [[str(key), _short(value)] for key, value in data.items() if key not in _DRAWN]
    return {
        "id": node_id,
        "label": str(data.get("label", node_id)),
        "state": str(data.get("state", "")),
        "look": data["look"] if data.get("look") in dict(_CHIPS) else "ok",
        "color": tint,
        "x": round(place[0], 5),
        "y": round(place[1], 5),
        "master": False,
        "facts": facts,
    }


def _edge(a: str, b: str, data: Mapping[str, Any], *, directed: bool, tint: str) -> dict[str, Any]:
    color, width = data.get("color"), data.get("width")
    if width is None and "share" in data:
        # The edges of a cluster's graph tell whose keys go where: the first owner's colour, as wide as their share.
        color, width = color or tint, 0.5 + 16 * data["share"]
    return {
        "a": a,
        "b": b,
        "look": "edge",
        "color": color if isinstance(color, str) and _COLOR.fullmatch(color) else "",
        "width": round(min(max(float(width), 0.5), 12.0), 2) if isinstance(width, int | float) else 1.5,
        "dashed": bool(data.get("dashed")),
        "label": str(data.get("label", "")),
        "directed": directed,
    }


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else text[:119] + "…"

"""The picture with matplotlib: for papers, reports and places where only figures go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gostore.viz.graph import graph_of
from gostore.viz.palette import DROP, GONE, INK, LINE, MUTED
from gostore.viz.scene import Picture, cluster_picture, graph_picture, ring_of
from gostore.viz.svg import LOOK_COLORS, ON_RING_MIN, merged

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

BAND = 0.06
"""Width of the ring; its outer radius is 1."""


def plot(what: Mapping[str, Any] | nx.Graph, ax: Axes | None = None, *, layout: str = "auto") -> Axes:
    """Draw a snapshot or any networkx graph; returns the axes (``.figure`` to save or resize).

    A snapshot, and the graph made of one, is drawn as the token ring with its nodes; other graphs as
    :func:`gostore.viz.scene.graph_picture` describes. Without ``ax`` a figure of 5 x 5 inches is made.
    """
    graph = graph_of(what) if isinstance(what, Mapping) else what
    is_cluster = "arcs" in graph.graph or isinstance(what, Mapping)
    picture = cluster_picture(graph) if is_cluster else graph_picture(graph, layout=layout)
    if ax is None:
        # A figure of its own canvas, not pyplot's: nothing keeps it alive, and IPython shows it once.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 5), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_xlim(-1.14, 1.14)
    ax.set_ylim(-1.14, 1.14)
    ax.set_title(" · ".join([picture["title"], *picture["facts"]]), fontsize=10, color=INK, loc="left")
    count = max(len(picture["nodes"]), 1)
    reach = (1 - BAND / 2 if count >= ON_RING_MIN else 0.68) if is_cluster else 0.9
    radius = min(0.12, 2 * math.pi * reach / count * 0.36)
    if not is_cluster:
        radius = max(0.025, min(0.11, 0.42 / math.sqrt(count)))
    places = {node["id"]: (node["x"] * reach, -node["y"] * reach) for node in picture["nodes"]}
    _draw_ring(ax, picture, ring_of(graph))
    _draw_links(ax, picture, places, radius)
    _draw_nodes(ax, picture, places, radius)
    return ax


def _draw_ring(ax: Axes, picture: Picture, ring: Mapping[str, Any]) -> None:
    from matplotlib.patches import Wedge

    tints = {node["id"]: node["color"] for node in picture["nodes"]}
    for start, width, owner in merged(ring["arcs"]):
        # Turns run clockwise from the top, matplotlib's angles counter-clockwise from the right.
        end_deg = 90 - 360 * start
        ax.add_patch(
            Wedge((0, 0), 1, end_deg - 360 * width, end_deg, width=BAND, color=tints[ring["owners"][owner]], lw=0)
        )


def _draw_links(ax: Axes, picture: Picture, places: Mapping[str, tuple[float, float]], radius: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    if picture["mode"] == "cluster" and len(places) <= 8:
        spots = list(places.values())
        for i, (x1, y1) in enumerate(spots):
            for x2, y2 in spots[i + 1 :]:
                ax.plot([x1, x2], [y1, y2], color=LINE, lw=0.8, zorder=1)
    for link in picture["links"]:
        start, end = places[link["a"]], places[link["b"]]
        if link["look"] == "edge":
            ax.add_patch(
                FancyArrowPatch(
                    *_trimmed(start, end, radius),
                    arrowstyle="-|>" if link["directed"] else "-",
                    mutation_scale=9,
                    shrinkA=0,
                    shrinkB=0,
                    color=link["color"] or GONE,
                    linewidth=link["width"] * 0.7,
                    linestyle="--" if link["dashed"] else "-",
                    zorder=1,
                )
            )
        else:
            ax.plot([start[0], end[0]], [start[1], end[1]], color=DROP, lw=1.2, linestyle=":", zorder=1)
        if link["look"] == "blocked":
            ax.plot(*(a + 0.6 * (b - a) for a, b in zip(start, end, strict=True)), "x", color=DROP, zorder=2)
        if link["label"] and link["look"] == "edge":
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
            ax.annotate(link["label"], middle, fontsize=7, color=MUTED, ha="center", va="bottom")


def _trimmed(
    start: tuple[float, float], end: tuple[float, float], radius: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The line from the rim of one disc to the rim of the other."""
    (x1, y1), (x2, y2) = start, end
    part = min(radius / (math.hypot(x2 - x1, y2 - y1) or 1.0), 0.4)
    dx, dy = (x2 - x1) * part, (y2 - y1) * part
    return (x1 + dx, y1 + dy), (x2 - dx, y2 - dy)


def _draw_nodes(ax: Axes, picture: Picture, places: Mapping[str, tuple[float, float]], radius: float) -> None:
    from matplotlib.patches import Circle

    styles = {"suspect": "--", "paused": "--", "arriving": ":", "departing": ":"}
    for node in picture["nodes"]:
        x, y = places[node["id"]]
        gone = node["look"] == "gone"
        ax.add_patch(
            Circle(
                (x, y),
                radius,
                facecolor="white",
                edgecolor=GONE if gone else node["color"],
                linewidth=1.2 if gone else 2.4,
                linestyle=styles.get(node["look"], "-"),
                zorder=3,
            )
        )
        two = radius > 0.1 and bool(node["state"])
        text: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4}
        color = MUTED if gone else INK
        ax.text(x, y + (0.025 if two else 0), node["label"], fontsize=9 if radius > 0.05 else 7, color=color, **text)
        if two:
            ax.text(x, y - 0.045, node["state"], fontsize=7, color=LOOK_COLORS[node["look"]], **text)

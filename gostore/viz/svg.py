"""The picture as a still SVG, in plain Python: for files, for pages, and where no widget can run.

``stable=True`` leaves out every figure that another run of the same notebook would not show again (addresses, rates,
times, the election's winner): this is what a saved notebook holds beside the widget, and nbval compares it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape, quoteattr

from gostore.viz.palette import CALL, COPY, DROP, GONE, GOSSIP, INK, LINE, MUTED, OKABE_ITO, PAPER
from gostore.viz.scene import Picture

RING_PX: Final = 440
SIDE_PX: Final = 300
MARGIN_PX: Final = 24
BAND_PX: Final = 12
FONT: Final = "font-family:system-ui,'DejaVu Sans',sans-serif"
ON_RING_MIN: Final = 31
"""From so many nodes on they sit on the ring itself."""
EVENTS_SHOWN: Final = 7

LOOK_COLORS: Final = {
    "ok": "#00795a",
    "arriving": "#0072B2",
    "suspect": "#9a6700",
    "paused": "#9a6700",
    "departing": "#6b7785",
    "gone": "#6b7785",
    "repair": "#0072B2",
}
GAUGE_COLORS: Final = {"calls": CALL, "gossip": GOSSIP, "commits": COPY, "missing": DROP}


def svg_of(picture: Picture, ring: Mapping[str, Any] | None = None, *, stable: bool = False) -> str:
    """The picture as an SVG document of about 470 x 510 pixels, with the figures beside it 790 wide."""
    full = picture["mode"] == "cluster" and not stable
    width = RING_PX + 2 * MARGIN_PX + (SIDE_PX if full else 0)
    height = RING_PX + 2 * MARGIN_PX + 30
    title = picture["title"] if stable else " · ".join([picture["title"], *picture["facts"]])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label={quoteattr(_words(picture))} style="{FONT}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        _text(MARGIN_PX, 30, title, size=15, weight=600),
    ]
    middle = (MARGIN_PX + RING_PX / 2, 42 + MARGIN_PX / 2 + RING_PX / 2)
    # Names stand outside a large ring: it leaves them room.
    radius = RING_PX / 2 - (18 if len(picture["nodes"]) >= ON_RING_MIN else 0)
    places = node_places(picture, middle, radius, ringed=bool(ring and ring["arcs"]))
    parts += _ring(ring or {}, picture, middle, radius)
    parts += _links(picture, places)
    parts += _nodes(picture, places, stable=stable)
    if full:
        parts += _side(picture, RING_PX + 2 * MARGIN_PX + 8)
    return "".join([*parts, "</svg>"])


def node_places(
    picture: Picture, middle: tuple[float, float], radius: float, *, ringed: bool
) -> dict[str, tuple[float, float, float]]:
    """Where each node is drawn and how large: (x, y, radius)."""
    nodes = picture["nodes"]
    ringed = ringed or picture["mode"] == "cluster"
    if ringed:
        on_ring = len(nodes) >= ON_RING_MIN
        reach = radius - BAND_PX / 2 if on_ring else radius * 0.68
    else:
        on_ring, reach = False, radius * 0.88
    gap = 2 * math.pi * reach / max(len(nodes), 1)
    disc = min(26.0, gap * (0.3 if on_ring else 0.38)) if len(nodes) > 1 else 26.0
    if not ringed:
        disc = max(6.0, min(24.0, 0.42 * radius / math.sqrt(len(nodes) or 1)))
    return {
        node["id"]: (middle[0] + node["x"] * reach, middle[1] + node["y"] * reach, round(disc, 1)) for node in nodes
    }


def arc_path(middle: tuple[float, float], inner: float, outer: float, start: float, width: float) -> str:
    """A piece of the ring band; ``start`` and ``width`` in turns, 0 at the top, clockwise."""
    # A whole turn would end where it starts, and not be drawn.
    width = min(width, 0.9995)
    large = 1 if width > 0.5 else 0
    (x1, y1), (x2, y2) = _at(middle, outer, start), _at(middle, outer, start + width)
    (x3, y3), (x4, y4) = _at(middle, inner, start + width), _at(middle, inner, start)
    return (
        f"M{x1:.1f} {y1:.1f}A{outer:g} {outer:g} 0 {large} 1 {x2:.1f} {y2:.1f}"
        f"L{x3:.1f} {y3:.1f}A{inner:g} {inner:g} 0 {large} 0 {x4:.1f} {y4:.1f}Z"
    )


def merged(arcs: Sequence[Sequence[float]]) -> list[tuple[float, float, int]]:
    """Arcs as (start, width, first owner), neighbours of one owner made one."""
    out: list[tuple[float, float, int]] = []
    for start, width, owner, *_ in arcs:
        if out and out[-1][2] == owner and abs(out[-1][0] + out[-1][1] - start) < 1e-6:
            out[-1] = (out[-1][0], out[-1][1] + width, int(owner))
        else:
            out.append((start, width, int(owner)))
    return out


def _at(middle: tuple[float, float], radius: float, turn: float) -> tuple[float, float]:
    return middle[0] + radius * math.sin(2 * math.pi * turn), middle[1] - radius * math.cos(2 * math.pi * turn)


def _ring(ring: Mapping[str, Any], picture: Picture, middle: tuple[float, float], outer: float) -> list[str]:
    tints = {node["id"]: node["color"] for node in picture["nodes"]}
    inner = outer - BAND_PX
    paths: dict[int, list[str]] = {}
    for start, width, owner in merged(ring.get("arcs", ())):
        # A gap of half a pixel between neighbours, unless the piece is hardly wider itself.
        gap = min(0.8 / (2 * math.pi * outer), width * 0.25)
        paths.setdefault(owner, []).append(arc_path(middle, inner, outer, start + gap / 2, width - gap))
    owners = ring.get("owners", ())
    return [
        f'<path d="{"".join(paths[owner])}" fill="{tints.get(owners[owner], GONE)}"><title>{escape(owners[owner])}'
        f"</title></path>"
        for owner in sorted(paths)
    ]


def _links(picture: Picture, places: Mapping[str, tuple[float, float, float]]) -> list[str]:
    out = []
    if picture["mode"] == "cluster" and len(picture["nodes"]) <= 8:
        ids = [node["id"] for node in picture["nodes"]]
        for i, a in enumerate(ids):
            for b in ids[i + 1 :]:
                (x1, y1, _), (x2, y2, _) = places[a], places[b]
                out.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{LINE}"/>')
    for link in picture["links"]:
        (x1, y1, _), (x2, y2, r2) = places[link["a"]], places[link["b"]]
        if link["look"] in ("blocked", "slow"):
            out.append(
                f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{DROP}" stroke-width="1.5" '
                f'stroke-dasharray="2 4"><title>{escape(link["a"])} → {escape(link["b"])}: {escape(link["label"])}'
                f"</title></path>"
            )
            if link["look"] == "blocked":
                out.append(_cross(x1 + (x2 - x1) * 0.6, y1 + (y2 - y1) * 0.6))
        else:
            out.append(_edge(link, (x1, y1), (x2, y2), r2))
    return out


def _edge(link: Mapping[str, Any], start: tuple[float, float], end: tuple[float, float], radius: float) -> str:
    (x1, y1), (x2, y2) = start, end
    color = link["color"] or "#b4bec8"
    dash = ' stroke-dasharray="5 4"' if link["dashed"] else ""
    out = f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{color}" stroke-width="{link["width"]:g}"{dash}/>'
    length = math.hypot(x2 - x1, y2 - y1)
    if link["directed"] and length > 2 * radius + 6:
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        tip_x, tip_y = x2 - ux * (radius + 2), y2 - uy * (radius + 2)
        back = 8
        out += (
            f'<path d="M{tip_x:.1f} {tip_y:.1f}L{tip_x - ux * back - uy * 4:.1f} {tip_y - uy * back + ux * 4:.1f}'
            f'L{tip_x - ux * back + uy * 4:.1f} {tip_y - uy * back - ux * 4:.1f}Z" fill="{color}"/>'
        )
    if link["label"]:
        out += _text((x1 + x2) / 2, (y1 + y2) / 2 - 4, link["label"], size=11, color=MUTED, anchor="middle", halo=True)
    return out


def _nodes(picture: Picture, places: Mapping[str, tuple[float, float, float]], *, stable: bool) -> list[str]:
    out = []
    on_ring = picture["mode"] == "cluster" and len(places) >= ON_RING_MIN
    for node in picture["nodes"]:
        x, y, radius = places[node["id"]]
        look, color = node["look"], node["color"]
        dash = {"suspect": "5 4", "paused": "5 4", "arriving": "1 3", "departing": "1 3"}.get(look)
        out.append(
            f'<g data-node={quoteattr(node["id"])} data-look="{look}">'
            f"<title>{escape(node['label'])}{': ' + escape(node['state']) if node['state'] else ''}</title>"
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{PAPER}" '
            f'stroke="{GONE if look == "gone" else color}" stroke-width="{_stroke_px(look, radius)}"'
            f"{f' stroke-dasharray={quoteattr(dash)}' if dash else ''}/>"
        )
        if node["master"] and not stable:
            out.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius + 5:g}" fill="none" stroke="{color}" '
                f'stroke-dasharray="1.5 3"/>'
            )
        out += _label(node, x, y, radius, on_ring=on_ring)
        out.append("</g>")
    return out


def _stroke_px(look: str, radius: float) -> float:
    if look == "gone":
        return 1.8
    return 3.5 if radius > 12 else 2.5


def _label(node: Mapping[str, Any], x: float, y: float, radius: float, *, on_ring: bool) -> list[str]:
    ink = MUTED if node["look"] == "gone" else INK
    if on_ring:
        side = "middle" if abs(node["x"]) < 0.3 else "start" if node["x"] > 0 else "end"
        x, y = x + node["x"] * (radius + 5), y + node["y"] * (radius + 10) + 4
        return [_text(x, y, node["label"], size=11, color=ink, anchor=side)]
    if len(node["label"]) * 7 > 2 * radius - 4:
        # Too long for the disc: beside it, if it is a disc of its own size at all.
        return [_text(x, y - radius - 4, node["label"], size=11, color=ink, anchor="middle", halo=True)]
    if radius < 24 or not node["state"] or len(node["state"]) * 6 > 2 * radius:
        return [_text(x, y + 4, node["label"], size=12, weight=600, color=ink, anchor="middle")]
    return [
        _text(x, y + 1, node["label"], size=13, weight=600, color=ink, anchor="middle"),
        _text(x, y + 13, node["state"], size=11, color=LOOK_COLORS[node["look"]], anchor="middle"),
    ]


def _side(picture: Picture, x: float) -> list[str]:
    out = []
    y = 62.0
    for look, words in picture["chips"]:
        out.append(f'<circle cx="{x + 4:g}" cy="{y - 4:g}" r="4" fill="{LOOK_COLORS[look]}"/>')
        out.append(_text(x + 14, y, words, size=12))
        y += 20
    y += 8
    for gauge in picture["gauges"]:
        out.append(_text(x, y + 14, gauge["label"], size=12, color=MUTED))
        out.append(_text(x + SIDE_PX - 40, y + 14, gauge["text"], size=12, weight=600, anchor="end"))
        out.append(_spark(gauge["points"], x + 110, y, 90, 18, GAUGE_COLORS.get(gauge["id"], OKABE_ITO[0])))
        y += 28
    y += 16
    if picture["ticker"]:
        out.append(_text(x, y, "Events", size=13, weight=600))
    for line in picture["ticker"][:EVENTS_SHOWN]:
        y += 18
        text = line["text"] if len(line["text"]) <= 42 else line["text"][:41] + "…"
        out.append(_text(x, y, f"{line['time']}  {text}", size=11, color=MUTED))
    return out


def _spark(points: Sequence[float], x: float, y: float, width: float, height: float, color: str) -> str:
    top = max(points, default=0.0) or 1.0
    step = width / max(len(points) - 1, 1)
    line = " ".join(f"{x + i * step:.1f},{y + height - height * p / top:.1f}" for i, p in enumerate(points))
    return f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>' if len(points) > 1 else ""


def _cross(x: float, y: float, arm: float = 5) -> str:
    return (
        f'<path d="M{x - arm:.1f} {y - arm:.1f}L{x + arm:.1f} {y + arm:.1f}M{x - arm:.1f} {y + arm:.1f}'
        f'L{x + arm:.1f} {y - arm:.1f}" stroke="{DROP}" stroke-width="2" fill="none"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: int = 400,
    color: str = INK,
    anchor: str = "start",
    halo: bool = False,
) -> str:
    outline = f' stroke="{PAPER}" stroke-width="3" paint-order="stroke"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{color}" '
        f'text-anchor="{anchor}"{outline}>{escape(text)}</text>'
    )


def _words(picture: Picture) -> str:
    """The picture for those who do not see it."""
    nodes = ", ".join(f"{n['label']} {n['state']}".strip() for n in picture["nodes"][:50])
    return f"{picture['title']}: {nodes}"

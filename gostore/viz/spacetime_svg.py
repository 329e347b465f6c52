"""A space-time diagram as SVG, in plain Python. Colours say what kind of thing it is; shapes say it once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from gostore.core.events import Event, EventId
from gostore.trace.export import TESTBED
from gostore.viz.spacetime import DISK, DOWN, NETWORK, PAUSED, Row, SpaceTime, short, struck

ROW_PX: Final = 20
MARGIN_PX: Final = 16
TIME_PX: Final = 76
LABELS_PX_MIN: Final = 300
PITCH_PX: Final = (34, 96)
"""Between two nodes' lines: at least, at most."""
CHARACTER_PX: Final = 6.6
"""A character of a label, on the safe side: no browser says how wide a text will be."""
NAME_CHARACTERS: Final = 10
"""Of a node's name in a label, and where the names stand slanted."""
FOCUS_PX: Final = 26
BAND_PX: Final = 22

# A class for each meaning; light, dark. Okabe and Ito's colours, the inks darker or lighter to be legible.
COLORS: Final = {
    "paper": ("#ffffff", "#14191f"),
    "ink": ("#1f2933", "#e6ebf0"),
    "muted": ("#5d6975", "#9aa8b5"),
    "line": ("#d9dfe5", "#36414c"),
    "life": ("#8895a2", "#71808e"),
    "message": ("#0072B2", "#56B4E9"),
    "drop": ("#c44d00", "#ff8a3d"),
    "cls": ("#00795a", "#2fc79b"),
    "storage": ("#6b5b95", "#b3a1e6"),
    "db": ("#b0508a", "#e79bc6"),
    "fs": ("#8a6100", "#f0b429"),
    "repair": ("#3c6e8f", "#8cc4e8"),
    "policy": ("#4d5b1f", "#b7c973"),
    "fault": ("#c44d00", "#ff8a3d"),
    "focus": ("#fff1b8", "#4a3d00"),
}
WORDS: Final = {
    "cls": "membership",
    "storage": "log and disk",
    "db": "database",
    "fs": "files",
    "repair": "repair",
    "policy": "policy",
    "fault": "task failed",
}
BANDS: Final = {DOWN: "node down", PAUSED: "paused", NETWORK: "network fault", DISK: "disk fault"}


class Layout:
    """Where everything stands, in pixels."""

    def __init__(self, diagram: SpaceTime) -> None:
        count = max(len(diagram.nodes), 1)
        room = diagram.width_px - 2 * MARGIN_PX - TIME_PX - LABELS_PX_MIN
        self.pitch = min(max(room / count, PITCH_PX[0]), PITCH_PX[1])
        self.left = MARGIN_PX + TIME_PX
        self.labels = self.left + self.pitch * count + 8
        # Sixteen lines on a narrow page: the page grows rather than that the labels go.
        self.width = max(diagram.width_px, round(self.labels + 200))
        self.columns = {node: self.left + self.pitch * (i + 0.5) for i, node in enumerate(diagram.nodes)}
        longest = max((len(node) for node in diagram.nodes), default=0)
        self.slanted = longest * 7.6 > self.pitch - 4
        self.characters = int((self.width - MARGIN_PX - self.labels) / CHARACTER_PX)
        legend_rows = _legend_lines(diagram, self.width)
        self.legend_y = MARGIN_PX + 52
        self.names_y = self.legend_y + 20 * len(legend_rows) + (58 if self.slanted else 14)
        self.legend = legend_rows
        self.top = self.names_y + 12
        self.ys: list[float] = []
        y = self.top
        for index in range(len(diagram.rows)):
            height = FOCUS_PX if index == diagram.focus else ROW_PX
            self.ys.append(y + height / 2)
            y += height
        self.bottom = y
        self.height = round(self.bottom + 8 + MARGIN_PX)


def svg_of(diagram: SpaceTime) -> str:
    """The diagram as an SVG document of its own width, and 20 pixels high for each event."""
    layout = Layout(diagram)
    words = f"{diagram.title}. {diagram.note}. Nodes: {', '.join(diagram.nodes)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="gst" viewBox="0 0 {layout.width} {layout.height}" '
        f'width="{layout.width}" height="{layout.height}" role="img" aria-label={quoteattr(words)}>',
        f"<style>{_style()}</style>",
        f'<rect class="paper" width="{layout.width}" height="{layout.height}" rx="6"/>',
        _text(MARGIN_PX, MARGIN_PX + 14, _cut(diagram.title, int(layout.width / 9)), "title"),
        _text(MARGIN_PX, MARGIN_PX + 33, _cut(diagram.note, int(layout.width / 6.9)), "muted"),
    ]
    parts += _legend(layout)
    parts += _focus(diagram, layout)
    parts += _lifelines(diagram, layout)
    parts += _times(diagram, layout)
    parts += _arrows(diagram, layout)
    parts += _marks(diagram, layout)
    parts += _labels(diagram, layout)
    return "".join([*parts, "</svg>"])


def _style() -> str:
    """Colours as variables, so that dark is one block; the names begin with gst, as a page shares its styles."""
    light = "".join(f"--gst-{name}:{pair[0]};" for name, pair in COLORS.items())
    dark = "".join(f"--gst-{name}:{pair[1]};" for name, pair in COLORS.items())
    fills = "".join(
        f".gst .{name}{{fill:var(--gst-{name})}}.gst .s-{name}{{stroke:var(--gst-{name});fill:none}}" for name in COLORS
    )
    return (
        f".gst{{{light}font-family:system-ui,'DejaVu Sans',sans-serif;font-size:12px;max-width:100%}}"
        f"@media(prefers-color-scheme:dark){{.gst{{{dark}}}}}{fills}"
        ".gst .title{font-size:15px;font-weight:600;fill:var(--gst-ink)}"
        ".gst .name,.gst .strong{font-weight:600;fill:var(--gst-ink)}"
        ".gst .time{fill:var(--gst-muted);font-variant-numeric:tabular-nums;font-size:11px}"
        ".gst .dash{stroke-dasharray:4 4}.gst .dots{stroke-dasharray:1 4}"
    )


def _legend_items(diagram: SpaceTime) -> list[tuple[str, str]]:
    """(shape, words) of what occurs, and of nothing else."""
    kinds = {row.event.kind: None for row in diagram.rows}
    items = [("message", "message")] if any(row.source is not None for row in diagram.rows) else []
    if _has_stubs(diagram):
        items.append(("stub", "the other end is not shown"))
    if "drop" in kinds:
        items.append(("drop", "dropped"))
    present = {
        row.event.category: None for row in diagram.rows if row.event.kind not in ("send", "recv", "drop", "fault")
    }
    items += [(category, words) for category, words in WORDS.items() if category in present]
    looks = {band.look: None for band in diagram.bands}
    items += [(f"band {look}", words) for look, words in BANDS.items() if look in looks]
    return items


def _has_stubs(diagram: SpaceTime) -> bool:
    ends, dropped = _ends(diagram)
    return any(
        (row.event.kind == "recv" and row.source is None)
        or (row.event.kind == "send" and index not in ends and row.event.id not in dropped)
        for index, row in enumerate(diagram.rows)
    )


def _ends(diagram: SpaceTime) -> tuple[dict[int | None, None], dict[EventId | None, None]]:
    """The rows of sends that arrive, and the ids of those that are dropped."""
    arrived = {row.source: None for row in diagram.rows}
    return arrived, {row.event.cause: None for row in diagram.rows if row.event.kind == "drop"}


def _legend_lines(diagram: SpaceTime, width: float) -> list[list[tuple[float, str, str]]]:
    """The legend, broken into lines: (x, shape, words)."""
    lines: list[list[tuple[float, str, str]]] = []
    x = float(width)
    for shape, words in _legend_items(diagram):
        need = 26 + len(words) * CHARACTER_PX + 14
        if x + need > width - MARGIN_PX:
            lines.append([])
            x = MARGIN_PX
        lines[-1].append((x, shape, words))
        x += need
    return lines


def _legend(layout: Layout) -> list[str]:
    out = []
    for number, line in enumerate(layout.legend):
        y = layout.legend_y + 20 * number
        for x, shape, words in line:
            if shape in ("message", "stub"):
                out.append(
                    _arrow(x, y, x + 18, y, "message" if shape == "message" else "muted", dashed=shape == "stub")
                )
            elif shape == "drop":
                out.append(_cross(x + 9, y))
            elif shape.startswith("band "):
                out.append(_band(x, y - 7, 18, 14, shape[5:], ""))
            else:
                out.append(_diamond(x + 9, y, shape))
            out.append(_text(x + 24, y + 4, words, "muted"))
    return out


def _focus(diagram: SpaceTime, layout: Layout) -> list[str]:
    if diagram.focus is None:
        return []
    y = layout.ys[diagram.focus] - FOCUS_PX / 2
    return [f'<rect class="focus" x="6" y="{y:g}" width="{layout.width - 12}" height="{FOCUS_PX}" rx="4"/>']


def _lifelines(diagram: SpaceTime, layout: Layout) -> list[str]:
    out = []
    for node, x in layout.columns.items():
        out.append(f'<path class="s-life" d="M{x:.1f} {layout.top:g}V{layout.bottom:g}" stroke-width="1.25"/>')
        if layout.slanted:
            name = _text(x, layout.names_y, short(node, NAME_CHARACTERS), "name")
            out.append(f'<g transform="rotate(-40 {x:.1f} {layout.names_y:.1f})">{name}</g>')
        else:
            out.append(_text(x, layout.names_y, node, "name", anchor="middle"))
    for band in diagram.bands:
        x = layout.columns[band.node]
        first, last = layout.ys[band.first], layout.ys[band.last]
        # To the end of the diagram where the fault lasts beyond it.
        end = layout.bottom if band.last == len(diagram.rows) - 1 else last
        start = layout.top if band.first == 0 else first
        wide = min(BAND_PX, layout.pitch - 6)
        out.append(_band(x - wide / 2, start, wide, max(end - start, 3), band.look, f"{band.node}: {band.label}"))
    return out


def _band(x: float, y: float, width: float, height: float, look: str, title: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    about = f"<title>{escape(title)}</title>" if title else ""
    if look == DOWN:
        # Hides the line: nobody is there.
        return f'<rect class="paper" {place}/><rect class="fault" {place} fill-opacity="0.32">{about}</rect>'
    opacity, dash = {NETWORK: ("0.15", "3 3"), PAUSED: ("0.10", ""), DISK: ("0.10", "1 3")}[look]
    color = {NETWORK: "drop", PAUSED: "muted", DISK: "storage"}[look]
    return (
        f'<rect class="{color}" {place} fill-opacity="{opacity}">{about}</rect>'
        f'<rect class="s-{color}" {place} stroke-opacity="0.7" stroke-dasharray="{dash}"/>'
    )


def _times(diagram: SpaceTime, layout: Layout) -> list[str]:
    out, before = [], ""
    for row, y in zip(diagram.rows, layout.ys, strict=True):
        now = f"{row.event.time_s:.4f}"
        if now != before:
            out.append(_text(layout.left - 10, y + 4, now, "time", anchor="end"))
        before = now
    if diagram.rows:
        out.append(_text(layout.left - 10, layout.names_y, "seconds", "time", anchor="end"))
    return out


def _arrows(diagram: SpaceTime, layout: Layout) -> list[str]:
    out = []
    arrived, dropped = _ends(diagram)
    for index, (row, y) in enumerate(zip(diagram.rows, layout.ys, strict=True)):
        x = layout.columns.get(row.event.node)
        if x is None:
            continue
        if row.source is not None:
            start = diagram.rows[row.source].event.node
            if start in layout.columns:
                out.append(
                    _arrow(layout.columns[start], layout.ys[row.source], x, y, "message", gap=4, about=row.words)
                )
        elif row.event.kind == "recv":
            out.append(_stub(row.event, str(row.event.data.get("from")), x, y, layout, arriving=True))
        if row.event.kind == "send" and index not in arrived and row.event.id not in dropped:
            out.append(_stub(row.event, str(row.event.data.get("to")), x, y, layout, arriving=False))
    return out


def _stub(event: Event, peer: str, x: float, y: float, layout: Layout, *, arriving: bool) -> str:
    """The piece of an arrow whose other end is not shown, towards where it would be."""
    target = layout.columns.get(peer, layout.left)
    side = 1 if target > x else -1
    reach = min(layout.pitch * 0.42, 26) * side
    if arriving:
        return _arrow(x + reach, y - 7, x, y, "muted", gap=4, dashed=True)
    return _arrow(x, y, x + reach, y + 7, "muted", dashed=True)


def _marks(diagram: SpaceTime, layout: Layout) -> list[str]:
    out = []
    for index, (row, y) in enumerate(zip(diagram.rows, layout.ys, strict=True)):
        event, x = row.event, layout.columns.get(row.event.node)
        about = f"<title>{escape(f'{event.node}, {event.time_s:.6f} s: {row.words} (event {event.seq})')}</title>"
        out.append(f"<g>{about}")
        if event.kind == "fault":
            out += _fault(event, y, diagram.nodes, layout)
        elif x is None:
            pass
        elif event.kind in ("send", "recv"):
            filled = "message" if event.kind == "recv" else "paper"
            out.append(
                f'<circle class="{filled}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
                f'<circle class="s-message" cx="{x:.1f}" cy="{y:.1f}" r="3.6" stroke-width="1.5"/>'
            )
        elif event.kind == "drop":
            out.append(_cross(x, y))
        else:
            out.append(_diamond(x, y, event.category))
        if index == diagram.focus and x is not None:
            out.append(f'<circle class="s-fault" cx="{x:.1f}" cy="{y:.1f}" r="10" stroke-width="2.5"/>')
        out.append("</g>")
    return out


def _fault(event: Event, y: float, nodes: Sequence[str], layout: Layout) -> list[str]:
    """A line through the nodes that it strikes, with a bar on each."""
    xs = [layout.columns[node] for node in struck(event.data.get("arguments", {}), nodes)]
    if not xs:
        return []
    out = [f'<path class="s-fault" d="M{min(xs):.1f} {y:g}H{max(xs):.1f}" stroke-width="1.5" stroke-dasharray="5 3"/>']
    return out + [f'<rect class="fault" x="{x - 8:.1f}" y="{y - 2.5:.1f}" width="16" height="5" rx="1.5"/>' for x in xs]


def _labels(diagram: SpaceTime, layout: Layout) -> list[str]:
    out = []
    for index, (row, y) in enumerate(zip(diagram.rows, layout.ys, strict=True)):
        x = layout.columns.get(row.event.node)
        if x is not None and layout.labels - x > 16:
            out.append(f'<path class="s-line dots" d="M{x + 8:.1f} {y:g}H{layout.labels - 6:.1f}"/>')
        out.append(_label(row, y, layout, focus=index == diagram.focus))
    return out


def _label(row: Row, y: float, layout: Layout, *, focus: bool) -> str:
    event = row.event
    who = "" if event.node == TESTBED else short(event.node, NAME_CHARACTERS)
    room = layout.characters - len(who) - 1
    quiet = event.kind in ("send", "recv") and not focus
    look = "muted" if quiet else "strong" if focus else {"fault": "fault", "drop": "drop"}.get(event.kind, "ink")
    name = f'<tspan class="{"muted" if quiet else "name"}">{escape(who)} </tspan>' if who else ""
    return (
        f'<text x="{layout.labels:.1f}" y="{y + 4:.1f}">{name}'
        f'<tspan class="{look}">{escape(_cut(row.words, room if not focus else int(room * 0.92)))}</tspan></text>'
    )


# shapes


def _arrow(
    x1: float, y1: float, x2: float, y2: float, color: str, *, gap: float = 0, dashed: bool = False, about: str = ""
) -> str:
    length = max(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5, 0.001)
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    x2, y2 = x2 - ux * gap, y2 - uy * gap
    back, half = 7, 3.2
    dash = " dash" if dashed else ""
    title = f"<title>{escape(about)}</title>" if about else ""
    return (
        f'<path class="s-{color}{dash}" d="M{x1:.1f} {y1:.1f}L{x2 - ux * back:.1f} {y2 - uy * back:.1f}" '
        f'stroke-width="1.4">{title}</path>'
        f'<path class="{color}" d="M{x2:.1f} {y2:.1f}L{x2 - ux * back - uy * half:.1f} {y2 - uy * back + ux * half:.1f}'
        f'L{x2 - ux * back + uy * half:.1f} {y2 - uy * back - ux * half:.1f}Z"/>'
    )


def _diamond(x: float, y: float, color: str) -> str:
    return f'<path class="{color}" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6Z"/>'


def _cross(x: float, y: float, arm: float = 5) -> str:
    return (
        f'<path class="s-drop" d="M{x - arm:.1f} {y - arm:.1f}l{2 * arm:g} {2 * arm:g}m0 {-2 * arm:g}'
        f'l{-2 * arm:g} {2 * arm:g}" stroke-width="2.2"/>'
    )


def _text(x: float, y: float, text: str, look: str, *, anchor: str = "start") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: max(characters - 1, 1)] + "…"

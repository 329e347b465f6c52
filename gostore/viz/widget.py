"""The live view in a notebook: ``cluster.view()``, and the same picture for any networkx graph.

Theory of operation. Events arrive in the cluster's client thread and are only counted there (:mod:`.sampling`). Two
threads of the view (:mod:`.pump`) do the rest: one sends what was counted ten times a second, as a custom message of
the widget; the other fetches a snapshot once a second, and at once after a change of state, and sets the traits
``picture`` and ``ring``. ipykernel's iopub socket may be used from any thread, so the picture moves while a cell blocks
the kernel's own thread. Traits carry the whole state: a page that is opened late, or reloaded, shows them and goes on
from there; a notebook saved with its widget state shows the last of them.

Where no widget can run, the MIME bundle's SVG stands in its place. It holds only what a re-run would show again, so
that nbval can compare it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anywidget
import traitlets

from gostore.core.errors import GoStoreError
from gostore.core.events import Event
from gostore.viz.graph import graph_of, turn_of
from gostore.viz.pump import Pump
from gostore.viz.sampling import Gauges, Sampler, apply_states, with_traffic
from gostore.viz.scene import Picture, cluster_picture, graph_picture, node_ids, plural, ring_of
from gostore.viz.svg import svg_of
from gostore.viz.ticker import LINES_MAX, SHOWN

if TYPE_CHECKING:
    import networkx as nx

    from gostore.viz.source import Source

STATIC: Final = Path(__file__).parent / "static"

UPDATE_S: Final = 0.1
"""Between two messages to the front end: ten a second."""
SNAPSHOT_S: Final = 1.0
"""Between two snapshots; sooner after a change of state, but never without a rest of ``SNAPSHOT_REST_S``."""
SNAPSHOT_REST_S: Final = 0.2
MARK_TEXT_MAX: Final = 1024
"""Characters of a key or path that the front end may ask for."""
CHUNKS_MARKED_MAX: Final = 64
ASKING_FAILS: Final = (GoStoreError, OSError, TimeoutError)
"""What the cluster may answer when it is asked where something is."""


class _View(anywidget.AnyWidget):
    """What both views share: the front end, the two traits, and the picture for places without widgets."""

    _esm = STATIC / "view.js"
    _css = STATIC / "view.css"
    picture = traitlets.Dict().tag(sync=True)
    ring = traitlets.Dict().tag(sync=True)

    def svg(self) -> str:
        """The picture as it is now, as an SVG document."""
        return svg_of(self.picture, self.ring)

    def save(self, path: str | Path) -> Path:
        """Write the picture as it is now to an ``.svg`` file. Raises ``ValueError`` for another ending, ``OSError``."""
        path = Path(path)
        if path.suffix.lower() != ".svg":
            raise ValueError(f"{path}: the view is saved as .svg; for other formats use cluster.plot().savefig(...)")
        path.write_text(self.svg(), encoding="utf-8")
        return path

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        found = super()._repr_mimebundle_(**kwargs)
        if found is None:
            return None
        data, metadata = found
        return {**data, "image/svg+xml": svg_of(self.picture, self.ring, stable=True)}, metadata


class ClusterView(_View):
    """A cluster, live. ``source``: a testbed, or anything with its calls (:class:`gostore.viz.source.Source`).

    The view ends when the cluster stops, or with :meth:`close`. Raises what the first snapshot raises.
    """

    def __init__(self, source: Source, *, update_s: float = UPDATE_S) -> None:
        self._source = source
        # Two locks, so that the client thread never waits for a drawing. Never take the second inside the first.
        self._counting = threading.Lock()
        self._drawing = threading.RLock()
        self._sampler = Sampler()
        self._gauges = Gauges()
        self._mark: dict[str, Any] | None = None
        self._asked: Callable[[], dict[str, Any]] | None = None
        self._note = ""
        self._ended = False
        self._snapshot = source.snapshot_sync()
        self._sampler.ticker.started_ms = self._snapshot.get("started_ms")
        self._gauges.add(self._snapshot)
        picture, ring = self._drawn()
        super().__init__(picture=picture, ring=ring)
        self.on_msg(self._on_message)
        with self._counting:  # what arrives meanwhile waits; an event that comes both ways is one line of the ticker
            self._unsubscribe: Callable[[], None] = source.journal.subscribe(self._on_event)
            for event in source.journal.recent(LINES_MAX, kinds=SHOWN):
                self._sampler.ticker.add(event)
        self._draw()
        self._ticks = Pump(self._tick, interval_s=update_s, name="gostore-view-ticks")
        self._snapshots = Pump(
            self._refresh, interval_s=SNAPSHOT_S, rest_s=SNAPSHOT_REST_S, name="gostore-view-snapshots"
        )
        self._ticks.start()
        self._snapshots.start()

    def __repr__(self) -> str:
        return f"<ClusterView of {plural(len(self._snapshot['nodes']), 'node')}>"

    @property
    def live(self) -> bool:
        """False once the cluster stopped or the view was closed; the last picture stays."""
        return not self._ended

    def graph(self) -> nx.DiGraph:
        """The graph that the picture was last drawn from."""
        with self._drawing:
            return graph_of(copy.deepcopy(self._snapshot))

    def show_key(self, key: str) -> None:
        """Mark a key's token on the ring and light up its replicas. Raises what the cluster raises."""
        self._ask(lambda: key_mark(key, self._source.locate_sync(key)))

    def show_file(self, path: str) -> None:
        """Mark a file's entry and its chunks, and light up the replicas. Raises what the cluster raises."""
        self._ask(lambda: file_mark(path, self._source.locate_file_sync(path)))

    def show_nothing(self) -> None:
        """Take the mark away."""
        self._asked = None
        self._set_mark(None)

    def close(self) -> None:
        """End the subscription and the threads, and remove the view from the page."""
        if hasattr(self, "_ticks"):
            self._end()
            self._ticks.stop()
            self._snapshots.stop()
        super().close()

    # -- in the client thread

    def _on_event(self, event: Event) -> None:
        with self._counting:
            self._sampler.add(event)

    # -- in the view's threads

    def _tick(self) -> None:
        with self._counting:
            pulses, lines, states = self._sampler.take()
        if states:
            with self._drawing:
                snapshot = apply_states(self._snapshot, states)
                if snapshot is not self._snapshot:
                    self._snapshot = snapshot
                    self._draw()
            self._snapshots.nudge()
        # Also when nothing happened: the front end tells a quiet cluster from a dead kernel by it.
        self.send({"type": "tick", "pulses": pulses, "lines": lines})

    def _refresh(self) -> None:
        try:
            snapshot, note = self._source.snapshot_sync(), ""
        except Exception as error:  # whatever it was: the view says so and tries again
            with self._drawing:
                snapshot, note = self._snapshot, f"no answer: {str(error) or type(error).__name__}"
        asked = self._asked
        if asked is not None and snapshot.get("arcs") != self._snapshot.get("arcs"):
            # The ring has changed, and with it perhaps the owners of what is marked.
            with contextlib.suppress(*ASKING_FAILS):
                mark = asked()
                with self._drawing:
                    self._mark = mark if self._asked is asked else self._mark
        with self._drawing:
            self._snapshot, self._note = snapshot, note
            self._gauges.add(snapshot)
            self._draw()
        if not snapshot.get("running", True):
            self._end()
            self._ticks.stop()
            self._snapshots.stop()

    def _end(self) -> None:
        with self._drawing:
            if self._ended:
                return
            self._ended = True
        self._unsubscribe()

    def _drawn(self) -> tuple[Picture, dict[str, Any]]:
        graph = graph_of(self._snapshot)
        with self._counting:
            picture = with_traffic(cluster_picture(graph), self._gauges, self._sampler.ticker)
        picture["mark"], picture["note"] = self._mark, self._note
        return picture, ring_of(graph)

    def _draw(self) -> None:
        """Set the traits; one thread at a time, so that an older picture never replaces a newer one."""
        with self._drawing:
            picture, ring = self._drawn()
            if ring != self.ring:
                self.ring = ring
            self.picture = picture

    # -- from the front end, in the kernel's thread or a subshell's

    def _on_message(self, _: Any, content: Any, __: Any) -> None:
        if not isinstance(content, Mapping) or content.get("type") != "locate":
            return
        text = str(content.get("text", "")).strip()[:MARK_TEXT_MAX]
        try:
            if not text:
                self.show_nothing()
            elif text.startswith("/"):
                self.show_file(text)
            else:
                self.show_key(text)
        except ASKING_FAILS as error:
            self._asked = None
            self._set_mark({"words": f"{text}: {error}", "owners": None, "ticks": []})

    def _ask(self, ask: Callable[[], dict[str, Any]]) -> None:
        mark = ask()
        self._asked = ask
        self._set_mark(mark)

    def _set_mark(self, mark: dict[str, Any] | None) -> None:
        with self._drawing:
            self._mark = mark
            self._draw()


class GraphView(_View):
    """Any networkx graph, drawn like the cluster; set :attr:`graph` to draw another, or the same one changed.

    ``layout``: ``auto``, ``ring`` or ``spring``; the attributes that are drawn are those of
    :func:`gostore.viz.scene.graph_picture`. Raises ``ValueError`` for an unknown layout.
    """

    def __init__(self, graph: nx.Graph, *, layout: str = "auto", title: str = "") -> None:
        self._layout, self._title = layout, title
        self._graph = graph
        super().__init__(picture=graph_picture(graph, layout=layout, title=title), ring=_graph_ring(graph))

    def __repr__(self) -> str:
        return f"<GraphView of {plural(len(self._graph), 'node')}>"

    @property
    def graph(self) -> nx.Graph:
        return self._graph

    @graph.setter
    def graph(self, graph: nx.Graph) -> None:
        picture = graph_picture(graph, layout=self._layout, title=self._title)
        self._graph = graph
        self.ring = _graph_ring(graph)
        self.picture = picture

    def pulse(self, start: Any, end: Any, kind: str = "call") -> None:
        """Send a message along an edge: ``call`` (dot), ``copy`` (square), ``gossip`` (diamond) or ``drop`` (cross).

        Raises ``ValueError`` for another kind or a node that is not in the graph.
        """
        if kind not in ("call", "copy", "gossip", "drop"):
            raise ValueError(f"kind = {kind!r}: allowed are call, copy, gossip and drop")
        for node in (start, end):
            if node not in self._graph:
                raise ValueError(f"{node!r} is not in the graph")
        ids = node_ids(list(self._graph))
        self.send({"type": "tick", "pulses": [[ids[start], ids[end], kind, 1]]})


def _graph_ring(graph: nx.Graph) -> dict[str, Any]:
    return ring_of(graph) if "arcs" in graph.graph else {"owners": [], "arcs": []}


def key_mark(key: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A key's place as the front end draws it: ``{"words", "owners", "ticks": [{"turn", "owners", "main"}]}``."""
    owners = list(found["owners"])
    # The answer first: the line may be cut at its end.
    words = f"{', '.join(owners) or 'nobody'} · token 0x{found['token'][:4]}… · {key}"
    return {"words": words, "owners": owners, "ticks": [_mark_tick(found["token"], owners, main=True)]}


def file_mark(path: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A file's place: the entry's tick is the main one; each chunk has its own."""
    chunks = list(found.get("chunks", ()))
    if not chunks:
        return key_mark(path, found)
    mark = key_mark(path, found)
    holders: dict[str, None] = {}
    for chunk in chunks[:CHUNKS_MARKED_MAX]:
        holders.update(dict.fromkeys(chunk.get("held") or chunk["owners"]))
        mark["ticks"].append(_mark_tick(chunk["token"], chunk["owners"], main=False))
    owners, rest = mark["words"].split(" · ", 1)
    mark["words"] = f"{owners} · {plural(len(chunks), 'chunk')} on {', '.join(holders)} · {rest}"
    return mark


def _mark_tick(token: str, owners: list[str], *, main: bool) -> dict[str, Any]:
    return {"turn": round(turn_of(token), 7), "owners": owners, "main": main}

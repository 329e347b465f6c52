from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest

import gostore.viz
from gostore.core.errors import NotFound
from gostore.core.events import Event
from gostore.viz import ClusterView, GraphView

WAIT_S = 30.0


class Cluster:
    """A source of five lines, and what a test wants to know of it."""

    def __init__(self, snapshot: dict[str, Any]) -> None:
        self.found: Any = snapshot
        self.subscribers: dict[int, Callable[[Event], None]] = {}
        self.journal = self
        self.past: list[Event] = []
        self.owners = ["n2", "n3"]

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        key = len(self.subscribers)
        self.subscribers[key] = callback
        return lambda: self.subscribers.pop(key, None) and None

    def recent(self, count: int, *, kinds: Iterable[str]) -> list[Event]:
        return [event for event in self.past if event.kind in kinds][-count:]

    def publish(self, event: Event) -> None:
        for subscriber in list(self.subscribers.values()):
            subscriber(event)

    def snapshot_sync(self) -> dict[str, Any]:
        if isinstance(self.found, Exception):
            raise self.found
        return dict(self.found)

    def locate_sync(self, key: str) -> dict[str, Any]:
        return {"token": "8000000000000000", "owners": self.owners}

    def locate_file_sync(self, path: str) -> dict[str, Any]:
        if path == "/nowhere":
            raise NotFound("/nowhere: there is no such file")
        chunk = {"chunk": "9f3e", "token": "4000000000000000", "owners": ["n1", "n2"], "held": ["n1"]}
        return {"token": "8000000000000000", "owners": ["n2", "n3"], "chunks": [chunk]}


class Watch:
    """Waits until a picture or message fits; the widget's comm is replaced by none, so traits and sends are local."""

    def __init__(self, view: ClusterView) -> None:
        self.changed = threading.Condition()
        self.view = view
        self.messages: list[dict[str, Any]] = []
        view.observe(lambda _: self._notify(), names=["picture", "ring"])
        view.send = self._send

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _send(self, content: dict[str, Any]) -> None:
        with self.changed:
            self.messages.append(content)
            self.changed.notify_all()

    def until(self, fits: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(fits, WAIT_S), "the view did not get there"


@pytest.fixture
def cluster(feed: ModuleType) -> Cluster:
    return Cluster(feed.snapshot(5))


@pytest.fixture
def view(cluster: Cluster) -> Iterator[ClusterView]:
    view = ClusterView(cluster, update_s=0.005)
    yield view
    view.close()


def state_of(view: ClusterView, name: str) -> str:
    return next(node["state"] for node in view.picture["nodes"] if node["id"] == name)


def test_its_repr_is_stable(view: ClusterView) -> None:
    assert repr(view) == "<ClusterView of 5 nodes>"


def test_the_bundle_has_the_widget_for_jupyter_and_a_picture_for_others(view: ClusterView) -> None:
    bundle = view._repr_mimebundle_()
    assert bundle is not None
    data, _ = bundle
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == view.model_id
    assert data["text/plain"] == "<ClusterView of 5 nodes>"
    ElementTree.fromstring(data["image/svg+xml"])


def test_the_picture_is_there_before_anything_happens(view: ClusterView) -> None:
    assert [node["id"] for node in view.picture["nodes"]] == ["n1", "n2", "n3", "n4", "n5"]
    assert view.ring["arcs"]
    assert view.live


def test_the_ticker_begins_with_what_happened_before(cluster: Cluster, feed: ModuleType) -> None:
    cluster.past = [feed.Feed().event("n1", "node_ready", epoch=7)]
    view = ClusterView(cluster)
    assert [line["text"] for line in view.picture["ticker"]] == ["n1 is ready, epoch 7"]
    # The same event, delivered as well, is the same line.
    cluster.publish(cluster.past[0])
    assert len(view._sampler.ticker.lines()) == 1
    view.close()


def test_a_quiet_cluster_still_sends(view: ClusterView) -> None:
    watch = Watch(view)
    watch.until(lambda: len(watch.messages) >= 3)
    assert watch.messages[0] == {"type": "tick", "pulses": [], "lines": []}


def test_events_from_another_thread_become_pulses_and_lines(
    view: ClusterView, cluster: Cluster, feed: ModuleType
) -> None:
    watch, source = Watch(view), feed.Feed()

    def client_thread() -> None:
        for _ in range(50):
            cluster.publish(source.recv("n1", "n2", "cls", "probe"))
        cluster.publish(source.event("n1", "fault", fault="kill", arguments={"node": "n4"}))

    thread = threading.Thread(target=client_thread)
    thread.start()
    thread.join(WAIT_S)
    watch.until(lambda: sum(p[3] for m in watch.messages for p in m["pulses"]) == 50)
    watch.until(lambda: any(line["text"] == "kill node n4" for m in watch.messages for line in m["lines"]))


def test_a_change_of_state_shows_at_once_and_the_next_snapshot_confirms_it(
    view: ClusterView, cluster: Cluster, feed: ModuleType
) -> None:
    watch, source = Watch(view), feed.Feed()
    cluster.found = TimeoutError("busy")
    cluster.publish(source.event("n1", "suspect", member="n4", incarnation=1))
    watch.until(lambda: state_of(view, "n4") == "suspect")
    before = view.ring
    cluster.found = feed.snapshot(5, gone=("n4",), time_s=140.0)
    watch.until(lambda: state_of(view, "n4") == "offline")
    watch.until(lambda: view.ring != before)
    assert view.picture["chips"] == [["ok", "4 online"], ["gone", "1 gone"]]


def test_a_cluster_that_does_not_answer_is_asked_again(view: ClusterView, cluster: Cluster, feed: ModuleType) -> None:
    watch = Watch(view)
    cluster.found = TimeoutError("n3 did not answer within 1 s")
    watch.until(lambda: view.picture["note"] == "no answer: n3 did not answer within 1 s")
    assert view.live
    cluster.found = feed.snapshot(5, time_s=150.0)
    watch.until(lambda: view.picture["note"] == "")


def test_when_the_cluster_stops_the_view_says_so_and_lets_go(
    view: ClusterView, cluster: Cluster, feed: ModuleType
) -> None:
    watch = Watch(view)
    assert cluster.subscribers
    cluster.found = feed.snapshot(5, running=False, time_s=150.0)
    watch.until(lambda: view.picture["status"] == "stopped")
    view._snapshots._thread.join(WAIT_S)
    view._ticks._thread.join(WAIT_S)
    assert not view.live
    assert not cluster.subscribers
    assert not view._ticks.running
    assert not view._snapshots.running


def test_closing_ends_threads_and_subscription_and_may_be_done_twice(cluster: Cluster) -> None:
    view = ClusterView(cluster)
    view.close()
    view.close()
    assert not cluster.subscribers
    assert not view._ticks.running
    assert not view._snapshots.running


def test_a_key_and_its_replicas(view: ClusterView) -> None:
    view.show_key("user:7")
    mark = view.picture["mark"]
    assert mark["words"] == "n2, n3 · token 0x8000… · user:7"
    assert mark["ticks"] == [{"turn": 0.5, "owners": ["n2", "n3"], "main": True}]
    view.show_nothing()
    assert view.picture["mark"] is None


def test_a_mark_follows_the_ring(view: ClusterView, cluster: Cluster, feed: ModuleType) -> None:
    watch = Watch(view)
    view.show_key("user:7")
    cluster.owners = ["n3", "n4"]
    cluster.found = feed.snapshot(5, gone=("n2",), time_s=140.0)
    watch.until(lambda: view.picture["mark"]["owners"] == ["n3", "n4"])


def test_a_file_and_its_chunks(view: ClusterView) -> None:
    view.show_file("/notes/raft.md")
    mark = view.picture["mark"]
    assert mark["words"] == "n2, n3 · 1 chunk on n1 · token 0x8000… · /notes/raft.md"
    assert [tick["turn"] for tick in mark["ticks"]] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user:7", "n2, n3 · token"),
        (" /notes/raft.md ", "n2, n3 · 1 chunk"),
        ("/nowhere", "/nowhere: /nowhere: there is no such file"),
    ],
)
def test_the_front_end_may_ask(view: ClusterView, text: str, words: str) -> None:
    view._handle_custom_msg({"type": "locate", "text": text}, [])
    assert view.picture["mark"]["words"].startswith(words)
    view._handle_custom_msg({"type": "locate", "text": ""}, [])
    assert view.picture["mark"] is None


@pytest.mark.parametrize("content", [None, 7, [], {}, {"type": "format disk"}])
def test_other_messages_are_ignored(view: ClusterView, content: Any) -> None:
    view._handle_custom_msg(content, [])
    assert view.picture["mark"] is None


def test_it_is_saved_as_svg_and_as_nothing_else(view: ClusterView, tmp_path: Path) -> None:
    path = view.save(tmp_path / "x.svg")
    ElementTree.parse(path)
    with pytest.raises(ValueError, match=r"\.svg"):
        view.save(tmp_path / "x.png")


def test_its_graph_is_a_copy(view: ClusterView) -> None:
    graph = view.graph()
    graph.nodes["n1"]["counters"]["calls"] = -1
    assert view.graph().nodes["n1"]["counters"]["calls"] >= 0


def test_a_graph_of_ones_own() -> None:
    view = GraphView(nx.path_graph(3), title="Path")
    assert repr(view) == "<GraphView of 3 nodes>"
    assert view.picture["title"] == "Path"
    bigger = nx.path_graph(4)
    view.graph = bigger
    assert view.graph is bigger
    assert len(view.picture["nodes"]) == 4
    # The same object, changed, is drawn again as well.
    bigger.add_node("new")
    view.graph = bigger
    assert view.picture["nodes"][-1]["id"] == "new"
    view.close()


def test_pulses_of_ones_own() -> None:
    view = GraphView(nx.path_graph(3))
    sent: list[Any] = []
    view.send = sent.append
    view.pulse(0, 1, "gossip")
    assert sent == [{"type": "tick", "pulses": [["0", "1", "gossip", 1]]}]
    with pytest.raises(ValueError, match="call, copy, gossip and drop"):
        view.pulse(0, 1, "shout")
    with pytest.raises(ValueError, match="not in the graph"):
        view.pulse(0, 99)
    view.close()


def test_the_graph_of_a_cluster_keeps_its_ring(feed: ModuleType) -> None:
    view = GraphView(gostore.viz.graph_of(feed.snapshot(5)))
    assert view.ring["arcs"]
    view.close()


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gostore.viz._HOMES, "plot", "nowhere")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        gostore.viz.plot  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gostore.viz.nothing  # noqa: B018

"""The front end alone, without JupyterLab: what is drawn, at which sizes, and that nothing jumps or overlaps."""

from __future__ import annotations

import copy
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gostore.viz
from gostore.viz.graph import graph_of
from gostore.viz.sampling import Gauges, with_traffic
from gostore.viz.scene import cluster_picture, ring_of
from gostore.viz.ticker import Ticker
from gostore.viz.widget import key_mark

HERE = Path(__file__).parent
STATIC = Path(gostore.viz.__file__).parent / "static"

PANELS = """
return [...document.querySelectorAll(".gs-head, .gs-stage, .gs-legend, .gs-ask, .gs-detail, .gs-gauges, .gs-events,"
  + " .gs-consensus, .gs-groups-list")]
  .map((e) => { const b = e.getBoundingClientRect(); return [e.className, b.x, b.y, b.width, b.height].join(" "); });
"""


def scene(feed: ModuleType, snapshot: dict[str, Any], ticker: Ticker | None = None) -> dict[str, Any]:
    graph, gauges = graph_of(snapshot), Gauges()
    for back in range(60, -1, -1):
        earlier = copy.deepcopy(snapshot)
        earlier["time_s"] -= back
        for node in earlier["nodes"]:
            node["counters"] = {k: v - back * (100 + back * 7 % 31) for k, v in node["counters"].items()}
        gauges.add(earlier)
    return {"ring": ring_of(graph), "picture": with_traffic(cluster_picture(graph), gauges, ticker or Ticker())}


def busy(feed: ModuleType, count: int) -> tuple[dict[str, Any], Ticker]:
    """A cluster in trouble, so that every kind of thing is on the screen."""
    snapshot = feed.snapshot(count, gone=(f"n{count}",), repair={"active": True, "missing": 76, "copied": 48})
    snapshot["nodes"][3]["suspect"] = ["n1", "n2"]
    snapshot["links"] = [{"from": "n2", "to": "n4", "blocked": True}, {"from": "n1", "to": "n3", "delay_s": 0.1}]
    if count > 8:
        snapshot["nodes"][6]["paused"] = True
        snapshot["nodes"][8]["state"] = "joining"
    snapshot["groups"] = feed.troubled(count, 64 if count > 8 else 16)
    source, ticker = feed.Feed(), Ticker()
    ticker.started_ms = feed.STARTED_MS
    for i in range(40):
        source.at_s = 100 + i
        ticker.add(source.event("n1", "fault", fault="kill", arguments={"node": f"a node of a rather long name {i}"}))
    return snapshot, ticker


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server on loopback: (its address, the feeds it serves)."""
    feeds: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = {"/": HERE / "harness.html", "/view.js": STATIC / "view.js", "/view.css": STATIC / "view.css"}
            kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
            body = json.dumps(feeds.get(path.removeprefix("/feed/"))).encode()
            kind = "application/json"
            if path in files:
                body, kind = files[path].read_bytes(), kinds[files[path].suffix]
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", feeds
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser(tools: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with tools.chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.set_window_size(1400, 1500)
        yield driver


Open = Callable[..., Any]


@pytest.fixture
def opened(tools: ModuleType, browser: Any, site: tuple[str, dict[str, Any]]) -> Iterator[Open]:
    address, feeds = site

    def open_page(found: dict[str, Any], *, width: int = 1120, theme: str = "light") -> Any:
        feeds["it"] = found
        browser.get(f"{address}/?feed=it&w={width}&theme={theme}")
        tools.wait_for("the page", lambda: browser.execute_script("return window.ready === true"))
        tools.wait_for("the nodes", lambda: browser.find_elements("css selector", ".gs-node[transform]"))
        return browser

    yield open_page
    assert tools.errors_of(browser) == []
    assert tools.foreign(tools.requests_of(browser)) == []


def query(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements("css selector", selector))


def emit(page: Any, pulses: list[Any] | None = None, lines: list[Any] | None = None) -> None:
    message = {"type": "tick", "pulses": pulses or [], "lines": lines or []}
    page.execute_script("window.model.emit(arguments[0])", message)


def put(page: Any, found: dict[str, Any]) -> None:
    script = "window.model.set('ring', arguments[0].ring); window.model.set('picture', arguments[0].picture)"
    page.execute_script(script, found)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 720, 1120])
@pytest.mark.parametrize("count", [5, 12, 20, 40])
def test_it_is_legible_at_every_size(
    tools: ModuleType, opened: Open, feed: ModuleType, count: int, width: int, theme: str
) -> None:
    page = opened(scene(feed, *busy(feed, count)), width=width, theme=theme)
    assert len(query(page, ".gs-node")) == count
    assert page.execute_script(tools.SMALLEST) >= 11
    assert page.execute_script(tools.OUTSIDE) == []
    if width >= 720:
        assert page.execute_script(tools.OVERLAPS) == []


def test_where_there_is_less_room_the_panels_go_below(opened: Open, feed: ModuleType) -> None:
    def places(width: int) -> tuple[Any, Any]:
        page = opened(scene(feed, feed.snapshot(5)), width=width)
        return query(page, ".gs-stage")[0].rect, query(page, ".gs-detail")[0].rect

    stage, panel = places(1120)
    assert panel["x"] >= stage["x"] + stage["width"]
    stage, panel = places(720)
    assert panel["y"] >= stage["y"] + stage["height"]


def test_no_panel_jumps_whatever_happens(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    before = page.execute_script(PANELS)
    emit(page, [["n1", "n2", "call", 1000], ["client-1", "n3", "call", 5]])
    put(page, scene(feed, *busy(feed, 5)))
    assert page.execute_script(PANELS) == before
    page.execute_script(
        "document.querySelector('[data-node=n2]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert query(page, ".gs-detail h3")[0].text == "n2"
    assert page.execute_script(PANELS) == before
    found = scene(feed, feed.snapshot(5))
    found["picture"]["mark"] = key_mark("a long key " * 20, {"token": "8" * 16, "owners": ["n1", "n2", "n3"]})
    put(page, found)
    assert page.execute_script(PANELS) == before


def test_states_are_told_by_shape_and_word(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, *busy(feed, 12)))
    looks = {node.get_attribute("data-node"): node.get_attribute("data-look") for node in query(page, ".gs-node")}
    assert looks["n1"] == "ok"
    assert (looks["n4"], looks["n7"], looks["n9"], looks["n12"]) == ("suspect", "paused", "arriving", "gone")
    labels = [node.get_attribute("aria-label") for node in query(page, ".gs-node")]
    assert labels[0] == "n1, online, master"
    assert labels[3] == "n4, suspect"
    assert [chip.text for chip in query(page, ".gs-chip")] == [
        "8 online",
        "1 joining",
        "1 suspect",
        "1 paused",
        "1 gone",
        "7 groups without a leader",
        "repairing 38 %",
    ]
    assert len(query(page, ".gs-cross")) == 1
    assert len(query(page, ".gs-slow")) == 1


def test_when_the_ring_changes_the_moved_ranges_are_marked(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    owners = [path.get_attribute("data-owner") for path in query(page, ".gs-ring path")]
    assert sorted(owners) == ["n1", "n2", "n3", "n4", "n5"]
    assert not query(page, ".gs-moved path")
    put(page, scene(feed, feed.snapshot(5, gone=("n4",))))
    owners = [path.get_attribute("data-owner") for path in query(page, ".gs-ring path")]
    assert sorted(owners) == ["n1", "n2", "n3", "n5"]
    moved = [path.get_attribute("data-owner") for path in query(page, ".gs-moved path")]
    assert moved
    assert "n4" not in moved


def test_messages_widen_their_link_and_clients_stand_outside(tools: ModuleType, opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(12)))
    assert not query(page, ".gs-link")
    emit(page, [["n1", "n2", "gossip", 5], ["client-9", "n3", "call", 2]])
    tools.wait_for("the links' colours", lambda: len(query(page, ".gs-link[data-kind='gossip']")) == 1)
    assert query(page, ".gs-link[data-kind='call']")
    assert query(page, ".gs-client")[0].get_attribute("visibility") == "visible"
    tools.wait_for("links that are silent to fade", lambda: not query(page, ".gs-link"))


def test_pulses_are_drawn_and_not_with_reduced_motion(tools: ModuleType, opened: Open, feed: ModuleType) -> None:
    count = (
        "window.drawn = 0; const pen = document.querySelector('.gs-canvas').getContext('2d');"
        "for (const name of ['fill', 'stroke']) { const f = pen[name].bind(pen);"
        " pen[name] = (...a) => { window.drawn++; return f(...a); }; }"
    )
    pulses = [["n1", "n2", kind, 1] for kind in ("call", "copy", "gossip", "drop")]
    page = opened(scene(feed, feed.snapshot(5)))
    page.execute_script(count)
    emit(page, pulses)
    tools.wait_for("pulses", lambda: page.execute_script("return window.drawn") > 4)

    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    )
    try:
        page = opened(scene(feed, feed.snapshot(5)))
        page.execute_script(count)
        emit(page, pulses)
        tools.wait_for(
            "the link's width", lambda: query(page, ".gs-link[data-kind='call'], .gs-link[data-kind='copy']")
        )
        assert page.execute_script("return window.drawn") == 0
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_lines_come_in_on_top_and_grow_in_place(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    line = {"id": 7, "ms": 120000, "time": "02:00.00", "tag": "cls", "text": "n4 suspected by n1", "nodes": ["n1"]}
    emit(page, lines=[line, {**line, "id": 8, "tag": "fault", "text": "kill n4"}])
    emit(page, lines=[{**line, "text": "n4 suspected by n1, n2"}])
    rows = [row.text for row in query(page, ".gs-events-list .gs-text")]
    assert rows == ["kill n4", "n4 suspected by n1, n2"]
    query(page, ".gs-events-list li")[1].click()
    assert query(page, ".gs-detail h3")[0].text == "n1"
    emit(page, lines=[{**line, "id": i, "ms": 120000 + i, "text": f"line {i}"} for i in range(100, 300)])
    assert len(query(page, ".gs-events-list li")) == 60
    assert query(page, ".gs-events-list .gs-text")[0].text == "line 299"


def test_elections_terms_and_snapshots_are_seen_in_their_rows(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5, groups=feed.groups())))

    def text(group: str, selector: str) -> str:
        return str(query(page, f"[data-group='{group}'] {selector}")[0].text)

    def looks(group: str) -> dict[str, str]:
        found = query(page, f"[data-group='{group}'] .gs-replica")
        return {cell.get_attribute("data-replica"): cell.get_attribute("data-look") for cell in found}

    assert len(query(page, ".gs-groups-list li")) == 17
    assert (text("shard 0", ".gs-lead"), text("shard 0", ".gs-term")) == ("n1", "term 4")
    assert looks("shard 0") == {"n1": "leader", "n2": "follower", "n3": "follower"}
    assert not query(page, ".gs-news, .gs-installed"), "nothing is news at first sight"
    first = query(page, "[data-group='shard 0'] .gs-replica")[0]
    before = page.execute_script(PANELS)

    put(page, scene(feed, feed.snapshot(5, groups=feed.troubled())))
    assert page.execute_script(PANELS) == before
    assert text("shard 0", ".gs-lead") == "election"
    assert query(page, "[data-group='shard 0']")[0].get_attribute("data-look") == "election"
    assert looks("shard 0") == {"n1": "stands", "n2": "follower", "n3": "follower"}
    assert [row.text for row in query(page, ".gs-term.gs-news")] == ["term 5"], "one term is new"
    assert text("shard 1", "[data-replica=n3]") == "n3\n37 %"
    assert query(page, "[data-group='shard 1'] [data-replica=n3] i")[0].value_of_css_property("width") != "0px"
    assert text("shard 2", "[data-member=learner]").startswith("+n1")
    assert len(query(page, "[data-group='shard 6'] [data-member=leaving]")) == 1

    groups = feed.groups()
    groups[2]["replicas"]["n3"]["installed"] = 1
    put(page, scene(feed, feed.snapshot(5, groups=groups)))
    assert len(query(page, ".gs-installed")) == 1
    assert query(page, "[data-group='shard 0'] .gs-replica")[0] == first, "rows and cells are kept"
    query(page, "[data-group='shard 0'] .gs-lead")[0].click()
    assert query(page, ".gs-detail h3")[0].text == "n1"
    mine = [row.get_attribute("data-group") for row in query(page, ".gs-mine")]
    assert mine == ["masters", "shard 0", "shard 5", "shard 10", "shard 15"]


def test_it_works_from_the_keyboard(tools: ModuleType, opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    stops = [node.get_attribute("tabindex") for node in query(page, ".gs-node")]
    assert stops == ["0", "-1", "-1", "-1", "-1"]
    page.execute_script("document.querySelector('[data-node=n1]').focus()")
    page.switch_to.active_element.send_keys(tools.Keys.ARROW_RIGHT)
    focused = page.switch_to.active_element
    assert focused.get_attribute("data-node") == "n2"
    focused.send_keys(tools.Keys.ENTER)
    assert focused.get_attribute("aria-pressed") == "true"
    assert query(page, ".gs-detail h3")[0].text == "n2"
    focused.send_keys(tools.Keys.ESCAPE)
    assert query(page, ".gs-detail h3")[0].text == "Cluster"


def test_no_letter_typed_reaches_the_notebook(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    page.execute_script("window.heard = 0; document.addEventListener('keydown', () => window.heard++)")
    query(page, ".gs-ask input")[0].send_keys("dd /notes/raft.md\n")
    assert page.execute_script("return window.model.sent") == [{"type": "locate", "text": "dd /notes/raft.md"}]
    assert page.execute_script("return window.heard") == 0


def test_a_key_lights_up_its_replicas_in_their_order(opened: Open, feed: ModuleType) -> None:
    found = scene(feed, feed.snapshot(5))
    page = opened(found)
    found["picture"]["mark"] = key_mark("user:7", {"token": "4000000000000000", "owners": ["n3", "n1", "n5"]})
    put(page, found)
    ranks = {n.get_attribute("data-node"): n.text for n in query(page, ".gs-node.gs-asked")}
    assert {name: text.split()[-1] for name, text in ranks.items()} == {"n3": "1", "n1": "2", "n5": "3"}
    assert len(query(page, ".gs-tick")) == 1
    assert len(query(page, ".gs-thread")) == 3
    assert query(page, ".gs-answer")[0].text == "n3, n1, n5 · token 0x4000… · user:7"
    found["picture"]["mark"] = None
    put(page, found)
    assert not query(page, ".gs-asked, .gs-tick, .gs-thread")
    assert query(page, ".gs-answer")[0].text == ""


def test_paused_it_stands_still_and_resumed_it_shows_the_present(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    button = query(page, ".gs-head .gs-button")[0]
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert query(page, ".gs-status")[0].text == "paused"
    put(page, scene(feed, feed.snapshot(5, gone=("n2",))))
    assert not query(page, "[data-look=gone]")
    button.click()
    assert [n.get_attribute("data-node") for n in query(page, ".gs-node[data-look=gone]")] == ["n2"]


def test_a_stopped_cluster_says_so_and_there_is_nothing_to_pause(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    put(page, scene(feed, feed.snapshot(5, running=False)))
    assert query(page, ".gs-status")[0].text == "stopped"
    assert not query(page, ".gs-head .gs-button")[0].is_enabled()


def test_silence_is_said(tools: ModuleType, opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    assert query(page, ".gs-status")[0].text == "live"
    tools.wait_for("the silence to be noticed", lambda: query(page, ".gs-status")[0].text.startswith("no news for"))
    emit(page)
    tools.wait_for("life again", lambda: query(page, ".gs-status")[0].text == "live")


def test_after_the_end_nothing_listens(opened: Open, feed: ModuleType) -> None:
    page = opened(scene(feed, feed.snapshot(5)))
    page.execute_script("window.end()")
    assert page.execute_script("return Object.values(window.model.handlers).flat().length") == 0

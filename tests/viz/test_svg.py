from __future__ import annotations

import copy
import math
import re
from types import ModuleType
from xml.etree import ElementTree

import networkx as nx
import pytest

from gostore.viz.graph import graph_of
from gostore.viz.sampling import Gauges, with_traffic
from gostore.viz.scene import cluster_picture, graph_picture, ring_of
from gostore.viz.svg import arc_path, merged, node_places, svg_of
from gostore.viz.ticker import Ticker

SPACE = "{http://www.w3.org/2000/svg}"


def drawn(snapshot: dict[str, object], *, stable: bool = False) -> str:
    graph, gauges, ticker = graph_of(snapshot), Gauges(), Ticker()
    gauges.add(snapshot)
    return svg_of(with_traffic(cluster_picture(graph), gauges, ticker), ring_of(graph), stable=stable)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 20, 31, 40])
def test_it_is_well_formed_and_shows_every_node(feed: ModuleType, count: int) -> None:
    root = ElementTree.fromstring(drawn(feed.snapshot(count)))
    names = [group.get("data-node") for group in root.iter(f"{SPACE}g")]
    assert names == [f"n{i}" for i in range(1, count + 1)]
    sizes = [int(text.get("font-size", "0")) for text in root.iter(f"{SPACE}text")]
    assert min(sizes) >= 11


def test_text_is_escaped(feed: ModuleType) -> None:
    graph = nx.Graph()
    graph.add_node('<script x="1">', state="</text>", label="a & b <c>")
    ElementTree.fromstring(svg_of(graph_picture(graph)))


def test_it_names_no_other_place(feed: ModuleType) -> None:
    assert re.findall(r"https?://[^\"]*", drawn(feed.snapshot(5))) == ["http://www.w3.org/2000/svg"]


def test_the_stable_picture_shows_only_what_a_re_run_would_show(feed: ModuleType) -> None:
    one = feed.snapshot(5, gone=("n4",))
    other = copy.deepcopy(one)
    other.update(name="other", time_s=999.0, started_ms=7, epoch=31, master="n3")
    for node in other["nodes"]:
        node.update(address="10.0.0.1:1", pid=1, incarnation=9, chunks=0, bytes=1, counters={"calls": 1})
        node["roles"] = []
    assert drawn(one, stable=True) == drawn(other, stable=True)
    assert drawn(one) != drawn(other)
    other["nodes"][1]["state"] = "offline"
    assert drawn(one, stable=True) != drawn(other, stable=True)


@pytest.mark.parametrize("count", [2, 5, 12, 20, 30, 31, 40])
def test_discs_do_not_overlap(feed: ModuleType, count: int) -> None:
    picture = cluster_picture(graph_of(feed.snapshot(count)))
    places = list(node_places(picture, (220, 220), 220, ringed=True).values())
    for i, (x1, y1, r1) in enumerate(places):
        for x2, y2, r2 in places[i + 1 :]:
            assert math.hypot(x1 - x2, y1 - y2) > r1 + r2 + 2


def test_neighbouring_arcs_of_one_owner_are_one() -> None:
    assert merged([[0, 0.25, 1, 2], [0.25, 0.25, 1, 3], [0.5, 0.5, 2, 1]]) == [(0, 0.5, 1), (0.5, 0.5, 2)]


def test_a_whole_ring_of_one_node_is_visible() -> None:
    path = arc_path((0, 0), 90, 100, 0.1, 1.0)
    start, end = re.findall(r"M([-\d.]+ [-\d.]+)A.*?1 ([-\d.]+ [-\d.]+)L", path)[0]
    assert start != end, "an arc from a point to itself is not drawn"

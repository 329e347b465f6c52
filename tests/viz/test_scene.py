from __future__ import annotations

import json
from types import ModuleType

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.viz.graph import graph_of
from gostore.viz.scene import clock, cluster_picture, graph_picture, ring_of, size


def test_a_picture_is_json_and_so_is_the_ring(feed: ModuleType) -> None:
    graph = graph_of(feed.snapshot(5))
    assert json.loads(json.dumps(cluster_picture(graph)))["mode"] == "cluster"
    ring = json.loads(json.dumps(ring_of(graph)))
    assert ring["owners"] == ["n1", "n2", "n3", "n4", "n5"]
    assert sum(arc[1] for arc in ring["arcs"]) == pytest.approx(1, abs=1e-4)
    assert all(len(arc) == 5 for arc in ring["arcs"])


def test_chips_count_every_node_once(feed: ModuleType) -> None:
    snapshot = feed.snapshot(6, gone=("n6",))
    snapshot["nodes"][1]["suspect"] = ["n1"]
    snapshot["nodes"][2]["paused"] = True
    snapshot["nodes"][3]["state"] = "joining"
    chips = cluster_picture(graph_of(snapshot))["chips"]
    assert chips == [
        ["ok", "2 online"],
        ["arriving", "1 joining"],
        ["suspect", "1 suspect"],
        ["paused", "1 paused"],
        ["gone", "1 gone"],
    ]


@pytest.mark.parametrize(
    ("repair", "words"),
    [
        ({"active": True, "missing": 124, "copied": 76}, "repairing 38 %"),
        ({"active": True, "missing": 0, "copied": 0}, "checking copies"),
        ({"active": True, "missing": 1, "copied": 999}, "repairing 99 %"),
        ({"active": False, "missing": 0, "copied": 76}, None),
        (None, None),
    ],
)
def test_repair_in_progress(feed: ModuleType, repair: dict[str, object] | None, words: str | None) -> None:
    chips = cluster_picture(graph_of(feed.snapshot(3, repair=repair)))["chips"]
    assert [text for look, text in chips if look == "repair"] == ([words] if words else [])


def test_a_killed_node_is_told_from_one_declared_offline(feed: ModuleType) -> None:
    snapshot = feed.snapshot(3, gone=("n3",))
    snapshot["nodes"][1]["alive"] = False
    states = {node["id"]: (node["look"], node["state"]) for node in cluster_picture(graph_of(snapshot))["nodes"]}
    assert states == {"n1": ("ok", "online"), "n2": ("gone", "killed"), "n3": ("gone", "offline")}


def test_cut_and_slow_links_are_shown_and_ordinary_ones_are_not(feed: ModuleType) -> None:
    links = [
        {"from": "n1", "to": "n2", "blocked": True},
        {"from": "n2", "to": "n3", "drop": 0.3, "delay_s": 0.02},
        {"from": "n3", "to": "n1"},
    ]
    found = cluster_picture(graph_of(feed.snapshot(3, links=links)))["links"]
    assert [(link["a"], link["b"], link["look"], link["label"]) for link in found] == [
        ("n1", "n2", "blocked", "blocked"),
        ("n2", "n3", "slow", "loses 30 %, delays 20 ms"),
    ]


def test_a_stopped_cluster_says_so(feed: ModuleType) -> None:
    picture = cluster_picture(graph_of(feed.snapshot(3, running=False)))
    assert picture["status"] == "stopped"
    assert picture["chips"] == []


def test_any_graph_has_a_picture() -> None:
    graph = nx.Graph([(1, "1"), ("1", (2, 3))])
    graph.nodes[1].update(color="#123456", state="busy", weight=7)
    picture = graph_picture(graph)
    ids = [node["id"] for node in picture["nodes"]]
    assert len({*ids}) == 3, "two nodes that read the same are told apart"
    assert picture["nodes"][0]["color"] == "#123456"
    assert picture["nodes"][0]["facts"] == [["state", "busy"], ["weight", "7"]]
    assert len(picture["links"]) == 2
    json.dumps(picture)


def test_numbers_are_colours_of_groups() -> None:
    graph = nx.path_graph(4)
    nx.set_node_attributes(graph, {0: 3, 1: 3, 2: 9, 3: 9}, "color")
    tints = [node["color"] for node in graph_picture(graph)["nodes"]]
    assert tints[0] == tints[1] != tints[2] == tints[3]


def test_a_colour_cannot_smuggle_in_a_style() -> None:
    graph = nx.Graph()
    graph.add_node("a", color="red;background:url(//example.org)")
    graph.add_edge("a", "b", color="url(//example.org)")
    assert "example" not in json.dumps(graph_picture(graph))


@pytest.mark.parametrize("layout", ["auto", "ring", "spring"])
@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_layouts_stay_inside_and_repeat(layout: str, count: int) -> None:
    graph = nx.path_graph(count)
    first, second = graph_picture(graph, layout=layout), graph_picture(graph, layout=layout)
    assert first == second
    assert all(abs(node["x"]) <= 1.00001 and abs(node["y"]) <= 1.00001 for node in first["nodes"])


def test_given_places_keep_their_shape() -> None:
    graph = nx.Graph()
    for name, pos in {"a": (0, 0), "b": (400, 0), "c": (400, 200)}.items():
        graph.add_node(name, pos=pos)
    a, b, c = graph_picture(graph)["nodes"]
    assert b["x"] - a["x"] == pytest.approx(2 * (c["y"] - b["y"]))


def test_an_unknown_layout_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="auto, ring, spring"):
        graph_picture(nx.path_graph(3), layout="star")


def test_the_graph_of_a_cluster_is_a_graph_like_others(feed: ModuleType) -> None:
    picture = graph_picture(graph_of(feed.snapshot(5)))
    assert [node["state"] for node in picture["nodes"]] == ["online"] * 5
    assert all(link["color"] for link in picture["links"])


@given(st.floats(0, 1e6))
def test_the_clock_is_cut_and_never_shows_sixty_seconds(seconds: float) -> None:
    minutes, rest = clock(seconds, digits=2).split(":")
    assert float(rest) < 60
    assert len(rest) == 5
    assert int(minutes) * 60 + float(rest) == pytest.approx(seconds, abs=0.011)


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1400, "1.4 kB"), (14_000, "14 kB"), (5e12, "5.0 TB")]
)
def test_sizes_for_people(count: float, words: str) -> None:
    assert size(count) == words

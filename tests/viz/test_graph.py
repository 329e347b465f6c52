from __future__ import annotations

import json
from types import ModuleType

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.viz.graph import circle, graph_of, look_of, turn_of, width_of

TOKEN = st.integers(0, 2**64 - 1).map(lambda n: f"{n:016x}")


def test_the_graph_carries_the_snapshot(feed: ModuleType) -> None:
    snapshot = feed.snapshot(5, gone=("n5",))
    graph = graph_of(snapshot)
    assert isinstance(graph, nx.DiGraph)
    assert list(graph) == ["n1", "n2", "n3", "n4", "n5"]
    assert graph.nodes["n1"]["address"] == "127.0.0.1:40100"
    assert graph.nodes["n5"]["look"] == "gone"
    assert graph.graph["epoch"] == 8
    assert "nodes" not in graph.graph


def test_shares_cover_the_ring_and_edges_tell_who_replicates_whom(feed: ModuleType) -> None:
    graph = graph_of(feed.snapshot(5))
    assert sum(share for _, share in graph.nodes(data="share")) == pytest.approx(1)
    # Three copies: what a node owns first is held by two others.
    for name in graph:
        out = sum(data["share"] for _, _, data in graph.out_edges(name, data=True))
        assert out == pytest.approx(2 * graph.nodes[name]["share"])


def test_links_of_the_snapshot_are_edges(feed: ModuleType) -> None:
    graph = graph_of(feed.snapshot(3, arcs=[], links=[{"from": "n1", "to": "n3", "blocked": True}]))
    assert list(graph.edges(data=True)) == [("n1", "n3", {"blocked": True})]


def test_only_names_and_states_are_required() -> None:
    graph = graph_of({"name": "c", "nodes": [{"name": "a", "state": "online"}]})
    assert graph.nodes["a"]["look"] == "ok"
    assert graph.nodes["a"]["share"] == 0


def test_a_snapshot_is_json(feed: ModuleType) -> None:
    assert graph_of(json.loads(json.dumps(feed.snapshot(5)))).graph["name"] == "gostore-5f3a"


@pytest.mark.parametrize(
    ("node", "look"),
    [
        ({"state": "online"}, "ok"),
        ({"state": "online", "alive": False}, "gone"),
        ({"state": "offline", "paused": True}, "gone"),
        ({"state": "left"}, "gone"),
        ({"state": "online", "suspect": ["n2"]}, "suspect"),
        ({"state": "online", "suspect": ["n2"], "paused": True}, "paused"),
        ({"state": "joining"}, "arriving"),
        ({"state": "connecting"}, "arriving"),
        ({"state": "disconnecting"}, "departing"),
        ({"state": "leaving"}, "departing"),
    ],
)
def test_what_the_testbed_knows_comes_before_what_the_cluster_believes(node: dict[str, object], look: str) -> None:
    assert look_of(node) == look


@given(TOKEN)
def test_a_token_has_a_place_on_the_ring(token: str) -> None:
    assert 0 <= turn_of(token) < 1
    assert turn_of(token) == pytest.approx(int(token, 16) / 2**64, abs=1e-9)


@given(st.lists(TOKEN, min_size=1, max_size=20, unique=True))
def test_ranges_between_tokens_cover_the_ring_once(tokens: list[str]) -> None:
    tokens.sort()
    widths = [width_of(a, b) for a, b in zip(tokens, tokens[1:] + tokens[:1], strict=True)]
    assert all(0 < width <= 1 for width in widths)
    assert sum(widths) == pytest.approx(1)


def test_the_first_of_the_circle_is_on_top_and_it_goes_clockwise() -> None:
    top, right, bottom, left = circle(4)
    assert top == pytest.approx((0, -1))
    assert right == pytest.approx((1, 0))
    assert bottom == pytest.approx((0, 1))
    assert left == pytest.approx((-1, 0))

from __future__ import annotations

from types import ModuleType

import networkx as nx
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Wedge

from gostore.viz import graph_of, plot


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_snapshot_and_its_graph_give_the_same_ring(feed: ModuleType, count: int) -> None:
    for what in (feed.snapshot(count), graph_of(feed.snapshot(count))):
        axes = plot(what)
        assert sum(isinstance(patch, Circle) for patch in axes.patches) == count
        wedges = [patch for patch in axes.patches if isinstance(patch, Wedge)]
        assert sum(wedge.theta2 - wedge.theta1 for wedge in wedges) == pytest.approx(360, abs=0.1)
        axes.figure.canvas.draw()


def test_any_graph_in_given_axes() -> None:
    axes = Figure().add_subplot()
    graph = nx.DiGraph([("a", "b"), ("b", "a")])
    graph.edges["a", "b"]["label"] = "vote"
    assert plot(graph, axes) is axes
    assert sum(isinstance(patch, FancyArrowPatch) for patch in axes.patches) == 2
    assert "vote" in [text.get_text() for text in axes.texts]


def test_faults_and_states_are_drawn(feed: ModuleType) -> None:
    snapshot = feed.snapshot(5, gone=("n5",), links=[{"from": "n1", "to": "n2", "blocked": True}])
    axes = plot(snapshot)
    assert "offline" in [text.get_text() for text in axes.texts]
    assert any(line.get_marker() == "x" for line in axes.lines)

"""Strongly connected components and shortest ways, against networkx."""

from __future__ import annotations

import networkx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gostore.check.cycles import Edge, components, edges_of, shortest_path

KINDS = ("ww", "wr", "rw")
triples = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(KINDS)), max_size=40)
Graph = dict[int, dict[int, dict[str, Edge]]]


def graph(of: list[tuple[int, int, str]]) -> Graph:
    made: Graph = {}
    for source, target, kind in of:
        if source != target:
            made.setdefault(source, {}).setdefault(target, {})[kind] = Edge(source, target, kind)
    return made


def other(of: list[tuple[int, int, str]], kinds: tuple[str, ...]) -> networkx.DiGraph:
    return networkx.DiGraph((source, target) for source, target, kind in of if kind in kinds)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(triples, st.sampled_from([KINDS, ("ww",), ("ww", "wr")]))
def test_components(edges: list[tuple[int, int, str]], kinds: tuple[str, ...]) -> None:
    wanted = [frozenset(c) for c in networkx.strongly_connected_components(other(edges, kinds)) if len(c) > 1]
    assert sorted(map(sorted, components(graph(edges), kinds))) == sorted(map(sorted, wanted))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(triples, st.sampled_from([KINDS, ("ww",), ("ww", "wr")]))
def test_shortest_path(edges: list[tuple[int, int, str]], kinds: tuple[str, ...]) -> None:
    inside = frozenset(range(1, 10))
    ours = shortest_path(graph(edges), inside, 1, 2, kinds)
    within = other(edges, kinds).subgraph(inside)
    if 1 in within and 2 in within and networkx.has_path(within, 1, 2):
        assert ours is not None
        assert len(ours) == networkx.shortest_path_length(within, 1, 2)
        assert [e.source for e in ours] + [2] == [1] + [e.target for e in ours]
        assert all(e.kind in kinds for e in ours)
    else:
        assert ours is None


def test_a_needed_kind_is_on_the_way() -> None:
    edges = graph([(1, 2, "ww"), (1, 3, "ww"), (3, 2, "rw"), (2, 1, "wr")])
    everywhere = frozenset({1, 2, 3})
    assert [e.kind for e in shortest_path(edges, everywhere, 1, 2, KINDS) or []] == ["ww"]
    assert [e.kind for e in shortest_path(edges, everywhere, 1, 2, KINDS, "rw") or []] == ["ww", "rw"]
    assert shortest_path(edges, everywhere, 1, 2, ("ww", "wr"), "rw") is None
    assert [(e.source, e.target) for e in edges_of(edges, everywhere, "ww")] == [(1, 2), (1, 3)]


def test_a_long_chain_needs_no_recursion() -> None:
    ring = graph([(n, (n + 1) % 20_000, "ww") for n in range(20_000)])
    assert [len(c) for c in components(ring, KINDS)] == [20_000]

"""Cycles in a graph whose edges have kinds: what the search for anomalies of transactions needs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edge:
    """``source`` comes before ``target``, because of the versions ``before`` and ``after`` of ``key``."""

    source: int
    target: int
    kind: str
    key: str = ""
    before: int = 0
    after: int = 0


Graph = Mapping[int, Mapping[int, Mapping[str, Edge]]]
"""source -> target -> kind -> edge."""


def edges_of(graph: Graph, inside: Set[int], kind: str) -> Iterator[Edge]:
    """The edges of this kind within a set of nodes, in the order of the graph."""
    for source, targets in graph.items():
        if source in inside:
            for target, kinds in targets.items():
                if target in inside and kind in kinds:
                    yield kinds[kind]


def components(graph: Graph, kinds: Sequence[str]) -> list[frozenset[int]]:
    """The strongly connected components with more than one node, along edges of these kinds.

    Tarjan, "Depth-first search and linear graph algorithms", SIAM J. Comput. 1972, without recursion.
    """
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    pending: dict[int, None] = {}
    found: list[frozenset[int]] = []

    def enter(node: int) -> tuple[int, Iterator[int]]:
        number[node] = low[node] = len(number)
        pending[node] = None
        return node, (t for t, edges in graph.get(node, {}).items() if any(kind in edges for kind in kinds))

    for root in graph:
        stack = [] if root in number else [enter(root)]
        while stack:
            node, targets = stack[-1]
            target = next(targets, None)
            if target is None:
                stack.pop()
                if stack:
                    low[stack[-1][0]] = min(low[stack[-1][0]], low[node])
                if low[node] == number[node]:
                    members = _pop_from(pending, node)
                    if len(members) > 1:
                        found.append(members)
            elif target not in number:
                stack.append(enter(target))
            elif target in pending:
                low[node] = min(low[node], number[target])
    return found


def _pop_from(pending: dict[int, None], node: int) -> frozenset[int]:
    """Take off everything that was entered since ``node``, and it."""
    members: list[int] = []
    while not members or members[-1] != node:
        members.append(pending.popitem()[0])
    return frozenset(members)


def shortest_path(
    graph: Graph, inside: Set[int], source: int, target: int, kinds: Sequence[str], needed: str | None = None
) -> list[Edge] | None:
    """The fewest edges of these kinds (the first kinds preferred) from ``source`` to ``target``.

    With ``needed``, one edge of that kind at least is on the way; such a way may pass a node twice.
    """
    begin = (source, needed is None)
    came: dict[tuple[int, bool], tuple[tuple[int, bool], Edge] | None] = {begin: None}
    queue = deque([begin])
    while queue:
        place = queue.popleft()
        if place == (target, True):
            path: list[Edge] = []
            while (step := came[place]) is not None:
                place, edge = step
                path.append(edge)
            return path[::-1]
        node, has = place
        for neighbour, edges in graph.get(node, {}).items():
            if neighbour in inside:
                for kind in kinds:
                    after = (neighbour, has or kind == needed)
                    if kind in edges and after not in came:
                        came[after] = (place, edges[kind])
                        queue.append(after)
    return None

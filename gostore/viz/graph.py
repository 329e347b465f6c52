"""A cluster as a networkx graph: what ``cluster.graph()`` returns and every picture is drawn from.

The snapshot (``testbed.snapshot()``) is a plain dictionary of JSON values:

====================  ==================================================================================================
``name``              the cluster's name
``time_s``            seconds since it was started, by the testbed's clock
``started_ms``        wall clock at its start, milliseconds since 1970: places events in time
``running``           false once it was stopped
``epoch``             of the newest view; ``master``: name or ``None``; ``replicas``, ``shards``: numbers;
                      ``placement``: the name of the placement class; ``world``: ``processes`` or ``simulated``
``nodes``             in launch order, each ``name``, ``state`` and, as far as known, ``alive``, ``paused``,
                      ``suspect`` (who suspects it), ``stale``, ``roles``, ``epoch``, ``incarnation``, ``address``,
                      ``rest``, ``pid``, ``shards`` (led), ``shards_held``, ``chunks``, ``bytes``, ``counters``
                      (cumulative)
``arcs``              ``[start, end, owners]``: tokens as 16 hex digits, start <= token < end, preference list
``replication``       the shards' policy: ``raft``, or a lesson; ``None`` while nobody has said
``groups``            of consensus, ``masters`` first, then the shards by number; each ``name``, ``kind`` (``raft``,
                      or the policy), ``state`` (``led``, ``election``: somebody stands, ``leaderless``: nobody yet,
                      ``no quorum``: too few live, ``unknown``: nobody answers), ``leader``, ``term``, ``quiet``,
                      ``last`` and ``committed`` (indices), ``voters``, ``learners``, ``outgoing``, and ``replicas``:
                      node -> ``last`` (where its log ends, as the leader knows; ``None``: unknown), ``state`` (the
                      leader's: ``probe``, ``replicate``, ``snapshot``, or ``None``), ``member``, ``down`` (dead or
                      paused), ``stale`` (no answer), and, as far as it has said, ``role``, ``term``, ``applied``,
                      ``snapshot`` (index of its latest), ``installed`` (how many came from a leader); while it is
                      sent one, ``sent_bytes`` of about ``size_bytes``
``links``             what is not an ordinary link: ``from``, ``to``, ``blocked``, ``drop``, ``delay_s``; also ``rates``
``repair``            ``active``, ``missing`` (chunks with too few copies), ``copied`` (since this repair began)
====================  ==================================================================================================

Only ``name`` and the nodes' ``name`` and ``state`` are required.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gostore.viz.palette import colors

if TYPE_CHECKING:
    import networkx as nx

TOKENS: Final = 1 << 64
"""Tokens are 64-bit: the ring has this many places."""

GONE: Final = ("offline", "left")
ARRIVING: Final = ("joining", "connecting")
DEPARTING: Final = ("disconnecting", "leaving")


def graph_of(snapshot: Mapping[str, Any]) -> nx.DiGraph:
    """The snapshot as a directed graph.

    Nodes carry the snapshot's fields and ``color`` (``#rrggbb``), ``pos`` (x, y in -1..1, first node on top, clockwise,
    y downwards), ``look`` (see :func:`look_of`), ``share`` (of the tokens it owns first, 0..1). An edge a -> b carries
    ``share``: of the tokens, those that a owns first and b replicates; and what the snapshot says of the link a -> b.
    ``graph.graph`` carries everything else. Raises ``KeyError`` where a name or state is missing.
    """
    import networkx as nx

    nodes: Sequence[Mapping[str, Any]] = snapshot["nodes"]
    graph = nx.DiGraph(**{key: value for key, value in snapshot.items() if key not in ("nodes", "links")})
    shares, pairs = _shares(snapshot.get("arcs", ()))
    places = circle(len(nodes))
    for node, color, pos in zip(nodes, colors(len(nodes)), places, strict=True):
        name = node["name"]
        own = {key: value for key, value in node.items() if key != "name"}
        graph.add_node(name, **own, color=color, pos=pos, look=look_of(node), share=shares.get(name, 0.0))
    for (first, other), share in pairs.items():
        if first in graph and other in graph:
            graph.add_edge(first, other, share=share)
    for link in snapshot.get("links", ()):
        if link["from"] in graph and link["to"] in graph:
            graph.add_edge(link["from"], link["to"], **{k: v for k, v in link.items() if k not in ("from", "to")})
    return graph


def look_of(node: Mapping[str, Any]) -> str:
    """How a node is drawn: ``gone``, ``paused``, ``suspect``, ``arriving``, ``departing`` or ``ok``.

    What the testbed knows (the process is dead, or paused) comes before what the cluster believes.
    """
    state = node.get("state", "online")
    if not node.get("alive", True) or state in GONE:
        return "gone"
    if node.get("paused"):
        return "paused"
    if node.get("suspect") or state == "suspect":
        return "suspect"
    if state in ARRIVING:
        return "arriving"
    return "departing" if state in DEPARTING else "ok"


def circle(count: int) -> list[tuple[float, float]]:
    """``count`` places on the unit circle, the first on top, clockwise, with y downwards as screens have it."""
    turns = [2 * math.pi * i / max(count, 1) for i in range(count)]
    return [(math.sin(turn), -math.cos(turn)) for turn in turns]


def turn_of(token: str) -> float:
    """The place of a token (16 hex digits) on the ring: 0 at the top, clockwise, below 1."""
    # 64 bits do not fit a float; the top 52 do, so that the last token does not round up to a full turn.
    return (int(token, 16) >> 12) / (1 << 52)


def width_of(start: str, end: str) -> float:
    """The part of the ring from one token to the next, 0 < width <= 1; equal tokens are the whole ring."""
    return ((int(end, 16) - int(start, 16)) % TOKENS or TOKENS) / TOKENS


def _shares(arcs: Iterable[Sequence[Any]]) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Per node the part of the ring that it owns first, and per (first owner, replica) the part they share."""
    shares: dict[str, float] = {}
    pairs: dict[tuple[str, str], float] = {}
    for start, end, owners in arcs:
        if not owners:
            continue
        width = width_of(start, end)
        shares[owners[0]] = shares.get(owners[0], 0.0) + width
        for other in owners[1:]:
            pairs[owners[0], other] = pairs.get((owners[0], other), 0.0) + width
    return shares, pairs

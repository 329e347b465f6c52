"""Pictures of a cluster: networkx graphs, matplotlib figures, SVG, and a live widget.

``graph_of`` (snapshot -> networkx), ``plot`` (matplotlib), ``svg`` (text), ``ClusterView`` and ``GraphView`` (widgets);
``space_time`` (journal -> Lamport diagram).
The heavy libraries are loaded when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gostore.viz.figures import plot
    from gostore.viz.graph import graph_of
    from gostore.viz.spacetime import space_time
    from gostore.viz.svg import svg_of
    from gostore.viz.widget import ClusterView, GraphView

__all__ = ["ClusterView", "GraphView", "graph_of", "plot", "space_time", "svg_of"]

_HOMES = {
    "ClusterView": "widget",
    "GraphView": "widget",
    "graph_of": "graph",
    "plot": "figures",
    "space_time": "spacetime",
    "svg_of": "svg",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("gostore"):
            raise
        raise ModuleNotFoundError(
            f"{name} needs {error.name}: pip install 'gostore[notebook]'", name=error.name
        ) from None

"""GoStore: learn, teach and research distributed systems from a notebook.

``import gostore as gs``, then ``gs.launch(5)`` for a cluster of real processes. Nothing else is imported before it is
used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gostore.client import connect
    from gostore.cluster import HashRing
    from gostore.core.errors import GoStoreError
    from gostore.experiments.replay import replay
    from gostore.launch import launch
    from gostore.sim import simulate
    from gostore.viz import ClusterView, GraphView

__version__ = "0.1.0"
__all__ = ["ClusterView", "GoStoreError", "GraphView", "HashRing", "connect", "launch", "replay", "simulate"]

# name -> the module that defines it
_LAZY = {
    "launch": "gostore.launch",
    "simulate": "gostore.sim",
    "replay": "gostore.experiments.replay",
    "connect": "gostore.client",
    "ClusterView": "gostore.viz",
    "GraphView": "gostore.viz",
    "HashRing": "gostore.cluster",
    "GoStoreError": "gostore.core.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gostore' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]

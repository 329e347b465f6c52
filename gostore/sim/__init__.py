"""The simulated world: the unmodified node on virtual time, a network, disks and clocks that fail as they are told to.

:func:`simulate` gives a cluster (``gostore.sim.cluster``); :class:`~gostore.sim.world.World` is what it stands in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gostore.sim.cluster import SimCluster, simulate
    from gostore.sim.world import World

__all__ = ["SimCluster", "World", "simulate"]


def __getattr__(name: str) -> Any:
    # Deferred: a world needs no node, and a cluster needs all of it.
    if name == "World":
        from gostore.sim.world import World

        return World
    if name in __all__:
        from gostore.sim import cluster

        return getattr(cluster, name)
    raise AttributeError(f"module 'gostore.sim' has no attribute {name!r}; it has {', '.join(__all__)}")

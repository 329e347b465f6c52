"""Faults of the simulated world: all words of the vocabulary, performed by the world itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gostore.core.errors import BadRequest
from gostore.faults import NO_FAULT, Faults, Link, LinkFault, UnknownFault
from gostore.sim.errors import locate

if TYPE_CHECKING:
    from gostore.sim.cluster import SimCluster


class SimFaults(Faults):
    """See :class:`~gostore.faults.Faults`."""

    def __init__(self, cluster: SimCluster) -> None:
        super().__init__(cluster._runner, lambda: list(cluster.nodes), cluster._publish_fault)
        self._cluster = cluster

    def _explain(self, error: UnknownFault) -> UnknownFault:
        locate(error, self._cluster.sim.seed, self._cluster.sim.now)
        return error

    async def _set_links(self, changed: Mapping[Link, LinkFault]) -> None:
        links = self._cluster.sim.net.links
        for (source, target), effect in changed.items():
            links.clear(source, target)
            if effect != NO_FAULT:
                links.set(
                    source,
                    target,
                    loss=effect.drop,
                    cut=effect.drop >= 1.0,
                    delay_s=effect.delay_s,
                    jitter_s=effect.jitter_s,
                    duplicate=effect.duplicate,
                    reorder=effect.reorder,
                )

    async def _kill(self, name: str) -> None:
        self._cluster._kill_node(name)

    async def _restart(self, name: str) -> None:
        await self._cluster._restart_node(name)

    async def _pause(self, name: str) -> None:
        self._cluster._pause_node(name)

    async def _resume(self, name: str) -> None:
        self._cluster._resume_node(name)

    async def _power_cut(self, name: str) -> None:
        self._cluster._kill_node(name, power=True)

    async def _skew(self, name: str, offset_s: float, drift: float) -> None:
        clock = self._cluster.sim.node(name).clock
        clock.jump(offset_s)
        if not -1 < drift <= 1:
            raise BadRequest(f"drift = {drift!r}: allowed are values above -1 and up to 1")
        clock.drift(1.0 + drift)

    async def _slow_disk(self, name: str, sync_s: float) -> None:
        self._cluster.sim.node(name).disk_slow_s = sync_s

    async def _full_disk(self, name: str, free_bytes: int) -> None:
        self._cluster.sim.node(name).disk.free_bytes = None if free_bytes < 0 else free_bytes

    async def _corrupt(self, name: str, file: str, offset: int | None) -> None:
        disk, rng = self._cluster.sim.node(name).disk, self._cluster.sim.rng("corrupt")
        try:
            size = len(disk.read_bytes(file))
        except OSError:
            files = ", ".join(disk.files()[:20]) or "none"
            raise BadRequest(f"{name} has no file {file!r}; it has {files}") from None
        if not size:
            raise BadRequest(f"{file} of {name} is empty: there is nothing to corrupt")
        try:
            disk.corrupt(file, rng.randrange(size) if offset is None else offset, rng.randrange(8))
        except ValueError as error:
            raise BadRequest(str(error)) from None

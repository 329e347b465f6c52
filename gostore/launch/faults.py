"""Faults of the process world: the network in the nodes' transports, processes by signals. Nothing needs privileges."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from gostore.client.nodes import Life
from gostore.core.errors import BadRequest, GoStoreError
from gostore.faults import Faults, Link, LinkFault

if TYPE_CHECKING:
    from gostore.launch.processes import ProcessCluster

LINK_TIMEOUT_S: Final = 5.0

_INSTEAD: Final = {
    "power_cut": "the kernel keeps what a killed process has written; kill() loses nothing that was written",
    "skew": "processes share this machine's clock",
    "slow_disk": "processes share this machine's disk",
    "full_disk": "processes share this machine's disk",
    "corrupt": "change the files of a killed node yourself, below the cluster's path",
}


class ProcessFaults(Faults):
    """See :class:`~gostore.faults.Faults`."""

    def __init__(self, cluster: ProcessCluster) -> None:
        super().__init__(cluster._runner, lambda: list(cluster.nodes), cluster._publish_fault)
        self._cluster = cluster

    def _why_not(self, kind: str) -> str:
        return f"a cluster of processes cannot do that ({_INSTEAD[kind]}); the simulated world can"

    async def _set_links(self, changed: Mapping[Link, LinkFault]) -> None:
        await self._apply({link: effect for link, effect in changed.items()}, only=None)

    async def _reapply(self, name: str) -> None:
        """A node that was restarted or resumed learns what its links suffer."""
        await self._apply({link: effect for link, effect in self.links().items() if name in link}, only=name)

    async def _apply(self, links: Mapping[Link, LinkFault], only: str | None) -> None:
        """Tell the sender, who loses, delays and doubles; of a cut also the receiver, who may be easier to reach."""
        orders: list[tuple[str, str, str, LinkFault]] = []
        for (source, target), effect in links.items():
            orders.append((source, target, "out", effect))
            cut = LinkFault(drop=1.0) if effect.drop >= 1.0 else LinkFault()
            orders.append((target, source, "in", cut))
        wanted = [order for order in orders if only in (None, order[0]) and self._cluster._answers(order[0])]
        results = await asyncio.gather(*(self._tell(*order) for order in wanted), return_exceptions=True)
        for order, result in zip(wanted, results, strict=True):
            # A node that died meanwhile has no links; one that lives must have heard.
            if isinstance(result, BaseException) and (
                not isinstance(result, GoStoreError) or self._cluster._answers(order[0])
            ):
                raise result

    async def _tell(self, node: str, peer: str, direction: str, effect: LinkFault) -> None:
        await self._cluster._connected().call_node(
            node, "admin", "set_link", peer, direction, effect.drop, effect.delay_s, effect.jitter_s,
            effect.duplicate, effect.reorder, timeout_s=LINK_TIMEOUT_S,
        )  # fmt: skip

    def _check(self, word: str, name: str) -> None:
        life = self._cluster.life_of(name)
        fits = {"kill": life.alive, "pause": life is Life.RUNNING, "resume": life is Life.PAUSED, "restart": True}
        if not fits[word]:
            raise BadRequest(f"{word} does not fit: {name} {self._cluster.why_ended(name)}")

    async def _kill(self, name: str) -> None:
        await self._cluster._kill_node(name)

    async def _restart(self, name: str) -> None:
        await self._cluster._restart_node(name)

    async def _pause(self, name: str) -> None:
        await self._cluster._pause_node(name)

    async def _resume(self, name: str) -> None:
        await self._cluster._resume_node(name)

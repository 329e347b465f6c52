"""db over the network: the :class:`~gostore.core.keyvalue.KeyValue` of clients.

A commit carries a request id, under which the cluster applies it once; so it may be sent again when no answer came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gostore.client.connection import Connection
from gostore.core.errors import TooLarge
from gostore.core.keyvalue import SCAN_LIMIT_MAX, Committed, Page, Path, Read, RequestId, Versioned, Write


class RemoteKeyValue:
    """``via``: the node to go through; None: any."""

    def __init__(self, connection: Callable[[], Connection], via: str | None = None) -> None:
        self._connection = connection
        self._via = via

    async def _ask(self, function: str, *args: Any, repeatable: bool = True, timeout_s: float | None = None) -> Any:
        connection = self._connection()
        reply = await connection.call("db", function, *args, via=self._via, repeatable=repeatable, timeout_s=timeout_s)
        return reply.value

    async def _read(self, function: str, *args: Any, timeout_s: float | None) -> Any:
        try:
            return await self._ask(function, *args, timeout_s=timeout_s)
        except TooLarge as error:
            error.definite = True  # of an answer, so it could not be known what its request had done: nothing
            raise

    async def create_container(
        self, name: str, *, separator: str | None = None, replication: str | None = None
    ) -> None:
        await self._ask("create_container", name, {"separator": separator, "replication": replication})

    async def drop_container(self, name: str) -> None:
        await self._ask("drop_container", name, repeatable=False)

    async def containers(self) -> dict[str, dict[str, Any]]:
        return dict(await self._ask("containers"))

    async def get(
        self,
        container: str,
        key: str,
        path: Path = (),
        *,
        snapshot: Mapping[int, int] | None = None,
        consistency: str = "linearizable",
        timeout_s: float | None = None,
    ) -> Versioned:
        args = (container, key, list(path), _pairs(snapshot), consistency)
        wire = await self._read("get", *args, timeout_s=timeout_s)
        return Versioned.from_wire(wire)

    async def scan(
        self,
        container: str,
        prefix: str = "",
        *,
        start: str = "",
        end: str | None = None,
        limit: int = SCAN_LIMIT_MAX,
        snapshot: Mapping[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Page:
        wire = await self._read("scan", container, prefix, start, end, limit, _pairs(snapshot), timeout_s=timeout_s)
        return Page.from_wire(wire)

    async def commit(
        self,
        reads: Iterable[Read],
        writes: Sequence[Write],
        *,
        request_id: RequestId | None = None,
        repeated: bool = False,
        timeout_s: float | None = None,
    ) -> Committed:
        connection = self._connection()
        request = request_id or connection.requests.new()
        item = ([read.to_wire() for read in reads], [write.to_wire() for write in writes], request.to_wire())
        try:
            return Committed.from_wire(await connection.commits.commit(item, self._via, timeout_s, repeated=repeated))
        finally:
            if request_id is None:
                connection.requests.settle(request)


def _pairs(snapshot: Mapping[int, int] | None) -> list[list[int]]:
    return [[shard, index] for shard, index in (snapshot or {}).items()]

"""Commits that share a call: what many tasks of one client commit in the same turn of the loop goes out together.

It costs a node several times less to take 30 transactions in one request than 30 requests. Nobody waits for that: a
batch leaves with the turn in which it was gathered, and a transaction that is alone goes as it always did. Each keeps
its own request id and its own outcome; they are not atomic together, and may be applied in any order.

Whatever the answer does not settle for one of them, it goes on alone: asked again, at other nodes, until its time is
over (see :mod:`.connection`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from gostore.comm import wire
from gostore.core.errors import BadRequest, Forgotten, GoStoreError, Timeout, Unavailable, Unreachable, error_from_wire

if TYPE_CHECKING:
    from gostore.client.connection import Connection

BATCH_MAX: Final = 64
"""Transactions in one call. More would delay the first of them, and hardly be cheaper."""

BATCH_SIZE_BYTES_MAX: Final = 64 * 1024
"""Of one call; a larger transaction goes alone."""

AGAIN: Final = (Unreachable, Unavailable, Timeout, Forgotten)
"""Errors after which somebody may be asked again."""

Item = tuple[list[Any], list[Any], list[Any]]
"""(reads, writes, request id), as they travel."""

Answers = list[Any]
"""What became of each of a batch: [[shard, version], ...], or an error."""


class _Batch:
    __slots__ = ("answers", "items", "size")

    def __init__(self) -> None:
        self.items: list[bytes] = []
        self.size = 0
        self.answers: list[asyncio.Future[Any]] = []


class Commits:
    """Of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._gathering: dict[str | None, _Batch] = {}

    async def commit(self, item: Item, via: str | None, timeout_s: float | None, *, repeated: bool = False) -> Any:
        """What the cluster answers: [[shard, version], ...]. Raises as :meth:`Connection.call`.

        ``repeated``: it was sent before, and may have had its effect.
        """
        try:
            packed = wire.pack(item)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(f"a value cannot be sent: {error}") from None
        if repeated or timeout_s is not None or len(packed) > BATCH_SIZE_BYTES_MAX:
            before = Timeout("nobody was asked; an earlier attempt may have had its effect") if repeated else None
            return await self._alone(item, via, timeout_s, after=before)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        answer = await self._gather(packed, via, loop)
        if answer is None:
            return await self._alone(item, via, None)
        if not isinstance(answer, GoStoreError):
            return answer
        left_s = self._connection.timeout_s - (loop.time() - begun_s)
        if not isinstance(answer, AGAIN) or left_s <= 0.0:
            raise answer
        return await self._alone(item, via, left_s, after=answer)

    async def _alone(
        self, item: Item, via: str | None, timeout_s: float | None, after: GoStoreError | None = None
    ) -> Any:
        reply = await self._connection.call(
            "db", "commit", *item, via=via, repeatable=True, tells_repeats=True, timeout_s=timeout_s, after=after
        )
        return reply.value

    def _gather(self, packed: bytes, via: str | None, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
        """None: it is alone."""
        batch = self._gathering.get(via)
        if batch is None or len(batch.items) >= BATCH_MAX or batch.size + len(packed) > BATCH_SIZE_BYTES_MAX:
            batch = self._gathering[via] = _Batch()
            loop.call_soon(self._flush, via, batch)
        future: asyncio.Future[Any] = loop.create_future()
        batch.items.append(packed)
        batch.size += len(packed)
        batch.answers.append(future)
        return future

    def _flush(self, via: str | None, batch: _Batch) -> None:
        if self._gathering.get(via) is batch:
            del self._gathering[via]
        if len(batch.items) == 1:
            _tell(batch, [None])
            return
        try:
            task = self._connection.env.tasks.start(self._send(via, batch), name="db-commits")
        except RuntimeError:
            _tell_all(batch, Unavailable("the connection is closed"))
            return
        # However it ends, perhaps before it began: nobody waits for ever.
        task.add_done_callback(
            lambda _: _tell_all(
                batch, Timeout("the connection was closed before the answer came; it may have happened")
            )
        )

    async def _send(self, via: str | None, batch: _Batch) -> None:
        try:
            reply = await self._connection.call(
                "db", "commits", batch.items, via=via, repeatable=True, tells_repeats=True
            )
        except GoStoreError as error:
            _tell_all(batch, error)
        else:
            _tell(batch, [value if error is None else error_from_wire(error) for value, error in reply.value])


def _tell_all(batch: _Batch, error: GoStoreError) -> None:
    if all(future.done() for future in batch.answers):
        return
    told = error.to_wire()  # whoever raises it needs one of his own
    _tell(batch, [error_from_wire(told) for _ in batch.items])


def _tell(batch: _Batch, answers: Answers) -> None:
    for future, answer in zip(batch.answers, answers, strict=True):
        if not future.done():
            future.set_result(answer)

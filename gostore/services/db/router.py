"""From any node to the primary of a shard, with retries while the cluster changes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from gostore.comm import Endpoint, current_call
from gostore.core.errors import (
    Fenced,
    Forgotten,
    GoStoreError,
    NotOwner,
    Timeout,
    Unavailable,
    Unreachable,
)

ATTEMPT_S: Final = (1.0, 4.0)
"""For one attempt at a primary that may be dead: from, doubling, to. It waits in vain at most so long; an attempt that
was only slow costs nothing but a message, because requests carry their ids."""

PAUSE_S: Final = (0.01, 0.5)
"""After an attempt that failed: from, doubling, to; a new view ends it."""

MARGIN: Final = (0.1, 0.2)
"""Of the time that a caller waits, this share, and at most so many seconds, are left for the answer to reach it: a
definite error that comes too late is a timeout to the caller, and indefinite."""

RETRIED: Final = (NotOwner, Fenced, Unreachable, Unavailable, Timeout, Forgotten)


def answer_by(deadline_s: float, now_s: float) -> float:
    """When to give up what a caller waits for until ``deadline_s``; loop times."""
    return deadline_s - min(MARGIN[0] * max(deadline_s - now_s, 0.0), MARGIN[1])


class Router:
    """``primary(shard)``: its name in this node's view, or None. ``serve``: the shard at this very node."""

    def __init__(
        self,
        endpoint: Endpoint,
        primary: Callable[[int], str | None],
        serve: Callable[[int, str, list[Any], float], Awaitable[Any]],
    ) -> None:
        self._endpoint = endpoint
        self._env = endpoint.env
        self._primary = primary
        self._serve = serve
        self._changed = asyncio.Event()
        self.retries = 0

    def deadline(self, timeout_s: float | None) -> float:
        """Loop time: after ``timeout_s``, or that of the request being handled, or the configured one."""
        now_s = asyncio.get_running_loop().time()
        if timeout_s is not None:
            return now_s + timeout_s
        handled = current_call.get()
        if handled is not None and not handled.finished:
            return answer_by(handled.deadline_s, now_s)
        return now_s + self._endpoint.config.timeout_s

    def on_view(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def call(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Any:
        """The answer of the shard's primary. For functions that may run twice."""
        return await self.call_again(shard, function, lambda repeated: args, deadline_s)

    async def read(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Any:
        """As :meth:`call`, for what has no effect: a failure is always definite."""
        try:
            return await self.call(shard, function, args, deadline_s)
        except Timeout as error:
            raise Unavailable(f"shard {shard} cannot be read: {error.details.get('why', error.message)}") from None

    async def call_again(self, shard: int, function: str, args: Callable[[bool], list[Any]], deadline_s: float) -> Any:
        """As :meth:`call`; ``args(repeated)`` is told whether an attempt before may have had its effect.

        Raises what the primary raised. When no primary answered in time: ``Timeout`` (indefinite) if an attempt may
        have had its effect, else ``Unavailable`` (definite).
        """
        loop = asyncio.get_running_loop()
        attempt_s, pause_s = ATTEMPT_S[0], PAUSE_S[0]
        repeated = False
        last: GoStoreError | None = None
        while (now_s := loop.time()) < deadline_s or last is None:
            name = self._primary(shard)
            try:
                if name is None:
                    raise Unavailable("nobody in this node's view of the cluster is online")
                if name == self._env.name:
                    return await self._serve(shard, function, args(repeated), deadline_s)
                until_s = min(deadline_s, now_s + attempt_s)
                reply = await self._endpoint.call(
                    name, "db", "shard", shard, function, args(repeated), timeout_s=until_s - now_s
                )
                return reply.value
            except RETRIED as error:
                last = error
                repeated = repeated or not error.definite
                self.retries += 1
            attempt_s = min(2 * attempt_s, ATTEMPT_S[1])
            await self._pause(pause_s, deadline_s)
            pause_s = min(2 * pause_s, PAUSE_S[1])
        where = f"shard {shard} ({function}) at {self._primary(shard)}"
        if repeated:
            raise Timeout(f"{where} did not answer in time, and it may have happened: {last.message}", why=last.message)
        raise Unavailable(f"{where} cannot be served: {last.message}")

    async def _pause(self, pause_s: float, deadline_s: float) -> None:
        until_s = asyncio.get_running_loop().time() + pause_s * self._env.rng.uniform(0.5, 1.0)
        try:
            async with asyncio.timeout_at(min(until_s, deadline_s)):
                await self._changed.wait()
        except TimeoutError:
            pass

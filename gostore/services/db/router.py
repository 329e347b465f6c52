"""From any node to the primary of a shard, with retries while the cluster changes.

Who serves a shard need not be the first on the ring: whoever is asked in vain names the primary that it knows
(``NotOwner``), and the router remembers who answered last. When nobody known answers, the owners are asked in turn.
"""

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

PAUSE_S: Final = (0.01, 0.25)
"""After an attempt that failed: from, doubling, to; a new view ends it."""

HOPS_MAX: Final = 3
"""So many hints of one request are followed at once; after that there is a pause, as leads may be changing."""

MARGIN: Final = (0.1, 0.2)
"""Of the time that a caller waits, this share, and at most so many seconds, are left for the answer to reach it: a
definite error that comes too late is a timeout to the caller, and indefinite."""

RETRIED: Final = (NotOwner, Fenced, Unreachable, Unavailable, Timeout, Forgotten)


def answer_by(deadline_s: float, now_s: float) -> float:
    """When to give up what a caller waits for until ``deadline_s``; loop times."""
    return deadline_s - min(MARGIN[0] * max(deadline_s - now_s, 0.0), MARGIN[1])


class Router:
    """``candidates(shard)``: whom to ask, in order. ``serve``: the shard at this very node."""

    def __init__(
        self,
        endpoint: Endpoint,
        candidates: Callable[[int], tuple[str, ...]],
        serve: Callable[[int, str, list[Any], float], Awaitable[Any]],
    ) -> None:
        self._endpoint = endpoint
        self._env = endpoint.env
        self._loop = asyncio.get_running_loop()
        self._candidates = candidates
        self._serve = serve
        self._leaders: dict[int, str] = {}  # one per shard
        self._changed = asyncio.Event()
        self.retries = 0

    def leader(self, shard: int) -> str | None:
        """Who answered last, as far as it is remembered."""
        return self._leaders.get(shard)

    def deadline(self, timeout_s: float | None) -> float:
        """Loop time: after ``timeout_s``, or that of the request being handled, or the configured one."""
        now_s = self._loop.time()
        if timeout_s is not None:
            return now_s + timeout_s
        handled = current_call.get()
        if handled is not None and not handled.finished:
            return answer_by(handled.deadline_s, now_s)
        return now_s + self._endpoint.config.timeout_s

    def on_view(self) -> None:
        """The cluster changed: whoever waits tries again, and asks first whom the new view names."""
        self._leaders.clear()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def call(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Awaitable[Any]:
        """The answer of the shard's primary. For functions that may run twice."""
        return self.call_again(shard, function, lambda repeated: args, deadline_s)

    async def read(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Any:
        """As :meth:`call`, for what has no effect: a failure is always definite."""
        try:
            return await self.call(shard, function, args, deadline_s)
        except Timeout as error:
            raise Unavailable(f"shard {shard} cannot be read: {error.details.get('why', error.message)}") from None

    async def read_stale(self, shard: int, args: list[Any], deadline_s: float) -> Any:
        """What some replica has applied: the one at this node, if it has one. A failure is always definite."""
        try:
            return await self._serve(shard, "stale", args, deadline_s)
        except NotOwner:
            return await self.read(shard, "stale", args, deadline_s)

    async def call_again(self, shard: int, function: str, args: Callable[[bool], list[Any]], deadline_s: float) -> Any:
        """As :meth:`call`; ``args(repeated)`` is told whether an attempt before may have had its effect.

        Raises what the primary raised. When no primary answered in time: ``Timeout`` (indefinite) if an attempt may
        have had its effect, else ``Unavailable`` (definite).
        """
        attempt_s, pause_s = ATTEMPT_S[0], PAUSE_S[0]
        repeated, hops, turn = False, 0, 0
        last: GoStoreError | None = None
        name: str | None = None
        while last is None or self._loop.time() < deadline_s:
            name = self._choose(shard, turn)
            try:
                if name is None:
                    raise Unavailable("nobody in this node's view of the cluster is online")
                if name == self._env.name:
                    answer = await self._serve(shard, function, args(repeated), deadline_s)
                else:
                    answer = await self._ask(name, shard, function, args(repeated), deadline_s, attempt_s)
                if function != "stale":  # which any replica answers
                    self._leaders[shard] = name
                return answer
            except RETRIED as error:
                last = error
                repeated = repeated or not error.definite
                self.retries += 1
                if self._follow(shard, name, error):
                    hops += 1
                    if hops <= HOPS_MAX:
                        continue
                else:
                    turn += 1
            attempt_s = min(2 * attempt_s, ATTEMPT_S[1])
            await self._pause(pause_s, deadline_s)
            pause_s = min(2 * pause_s, PAUSE_S[1])
        where = f"shard {shard} ({function}) at {name}"
        if repeated:
            raise Timeout(f"{where} did not answer in time, and it may have happened: {last.message}", why=last.message)
        raise Unavailable(f"{where} cannot be served: {last.message}")

    def _choose(self, shard: int, turn: int) -> str | None:
        """Who answered last or was named; without such a one the candidates, one after the other."""
        known = self._leaders.get(shard)
        if known is not None:
            return known
        candidates = self._candidates(shard)
        return candidates[turn % len(candidates)] if candidates else None

    def _follow(self, shard: int, name: str | None, error: GoStoreError) -> bool:
        """Forget who failed; whether somebody else was named."""
        self._leaders.pop(shard, None)
        owner = error.details.get("owner") if isinstance(error, NotOwner) else None
        if isinstance(owner, str) and owner != name:
            self._leaders[shard] = owner
            return True
        return False

    async def _ask(
        self, name: str, shard: int, function: str, args: list[Any], deadline_s: float, attempt_s: float
    ) -> Any:
        timeout_s = min(deadline_s - self._loop.time(), attempt_s)
        reply = await self._endpoint.call(name, "db", "shard", shard, function, args, timeout_s=timeout_s)
        return reply.value

    async def _pause(self, pause_s: float, deadline_s: float) -> None:
        until_s = self._loop.time() + pause_s * self._env.rng.uniform(0.5, 1.0)
        try:
            async with asyncio.timeout_at(min(until_s, deadline_s)):
                await self._changed.wait()
        except TimeoutError:
            pass

"""How fs commits: with request ids, again after conflicts, and with ids that nobody else has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from gostore.core.errors import Conflict, Forgotten, GoStoreError
from gostore.core.keyvalue import Committed, KeyValue, PointRead, Read, RequestId, RequestIds, Write
from gostore.env import Env

T = TypeVar("T")

CONFLICT_RETRIES_MAX: Final = 24
"""Runs of one transaction that keeps conflicting. More: hot names succeed later; fewer: callers learn sooner."""
BACK_OFF_S: Final = 0.002
"""First bound of the random pause after a conflict; doubles up to :data:`BACK_OFF_S_MAX`."""
BACK_OFF_S_MAX: Final = 0.1
COMMIT_REPEATS_MAX: Final = 3
"""Repeats, under one request id, of a commit whose outcome is unknown."""
SEALS_MAX: Final = 1024
"""Commits in doubt that one node seals at a time; what more leave behind waits for a collection of other causes."""
SEAL_PAUSE_S: Final = (0.25, 30.0)
"""Between the attempts to seal one, until db answers: from, doubling, to."""
NEVER: Final = 2**62
"""A version that no object has."""


class Transactions:
    """The commits of one node's fs. ``client``: a name for request ids that no other run of any node ever has."""

    def __init__(self, env: Env, kv: KeyValue, client: str) -> None:
        self._env = env
        self._kv = kv
        self._requests = RequestIds(client)
        self._sealing = 0
        self.conflicts = 0
        self.on_sealed: Callable[[], None] = lambda: None
        """Told when a commit, whose caller does not know what became of it, will do nothing more."""

    @property
    def sealing(self) -> int:
        """Commits in doubt that are being sealed."""
        return self._sealing

    async def commit(self, reads: Sequence[Read], writes: Sequence[Write]) -> Committed:
        """Commit, repeating while the outcome is unknown.

        Raises what db answers; and when it does not answer, the first error that left the outcome in doubt: that a
        repeat surely did nothing says nothing of the attempt before it.
        """
        request_id = self._requests.new()
        in_doubt = True
        try:
            committed = await self._attempts(request_id, reads, writes)
            in_doubt = False
            return committed
        except GoStoreError as error:
            in_doubt = not error.definite
            raise
        finally:
            if not (in_doubt and self._seal_later(request_id, writes)):
                self._requests.settle(request_id)

    async def _attempts(self, request_id: RequestId, reads: Sequence[Read], writes: Sequence[Write]) -> Committed:
        doubt: GoStoreError | None = None
        for _ in range(COMMIT_REPEATS_MAX + 1):
            try:
                return await self._kv.commit(reads, writes, request_id=request_id, repeated=doubt is not None)
            except Conflict:
                raise
            except GoStoreError as error:
                if doubt is None:
                    if error.definite:
                        raise
                    doubt = error
        assert doubt is not None, "only a doubt is repeated"
        raise doubt

    def _seal_later(self, request_id: RequestId, writes: Sequence[Write]) -> bool:
        """Whether it will be sealed."""
        if not writes or self._sealing >= SEALS_MAX:
            return False
        try:
            self._env.tasks.start(self._seal(request_id, writes[0]), name="seal a commit in doubt")
        except RuntimeError:  # the node is stopping
            return False
        self._sealing += 1
        return True

    async def _seal(self, request_id: RequestId, write: Write) -> None:
        """End a commit in doubt: have something that cannot hold committed under its request id, so that either that
        was first, or the commit was. Else it could still happen after a collection that thought it had not.

        Whichever shard coordinates a transaction is that of its first write, so both meet in one log.
        """
        impossible = PointRead(write.container, write.key, NEVER)
        pause_s, pause_max_s = SEAL_PAUSE_S
        try:
            while True:
                try:
                    await self._kv.commit([impossible], [], request_id=request_id, repeated=True)
                    return
                except (Conflict, Forgotten):  # Forgotten: it is older than what the log remembers, and so decided
                    return
                except GoStoreError as error:
                    self._env.log.info("a commit stays in doubt: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, pause_max_s)
        finally:
            self._sealing -= 1
            self._requests.settle(request_id)
            self.on_sealed()

    async def retry(self, attempt: Callable[[], Awaitable[T]], what: str, conflicted: Callable[[], None]) -> T:
        """Run an attempt until it does not conflict, at most :data:`CONFLICT_RETRIES_MAX` times.

        ``conflicted`` is called after each conflict.
        """
        for number in range(1, CONFLICT_RETRIES_MAX + 1):
            try:
                return await attempt()
            except Conflict as error:
                self.conflicts += 1
                conflicted()
                if number == CONFLICT_RETRIES_MAX:
                    raise Conflict(
                        f"{what}: others changed it during each of {number} attempts ({error.message}); try again"
                    ) from error
            await self.back_off(number)
        raise AssertionError("unreachable")

    async def back_off(self, number: int) -> None:
        await asyncio.sleep(self._env.rng.uniform(0, min(BACK_OFF_S * 2**number, BACK_OFF_S_MAX)))

    def new_id(self) -> str:
        """96 random bits: no two of a cluster's directories, writes or intents share one."""
        return f"{self._env.rng.getrandbits(96):024x}"

    def stamp(self) -> int:
        return self._env.hlc.tick(self._env.wall_ms())

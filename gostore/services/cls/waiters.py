"""Waiting for a view: who awaits a condition is resumed by the change that fulfils it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gostore.cluster import View
from gostore.core.errors import GoStoreError, Timeout


class Waiters:
    """Those who wait on one node."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: dict[asyncio.Future[View], Callable[[View], bool]] = {}

    async def wait(
        self, current: Callable[[], View], predicate: Callable[[View], bool], timeout_s: float | None
    ) -> View:
        """The first view, from ``current()`` on, for which ``predicate`` holds. Raises :class:`Timeout`."""
        if predicate(current()):
            return current()
        future: asyncio.Future[View] = asyncio.get_running_loop().create_future()
        self._waiting[future] = predicate
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            view = current()
            states = ", ".join(f"{name} {member.state}" for name, member in view.members.items()) or "nobody"
            raise Timeout(
                f"{self._name} waited {timeout_s} s for a view; it is at epoch {view.epoch}: {states:.500}"
            ) from None
        finally:
            self._waiting.pop(future, None)

    def tell(self, view: View) -> None:
        for future, predicate in tuple(self._waiting.items()):
            if not future.done() and predicate(view):
                future.set_result(view)

    def stop(self, error: GoStoreError) -> None:
        for future in tuple(self._waiting):
            if not future.done():
                future.set_exception(error)

"""What fs asks of the cluster: the view, calls to other nodes, and who owns a chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

from gostore.cluster.view import View
from gostore.cluster.watchers import Watchers
from gostore.comm import Reply

PEERS_ASKED_AT_ONCE: Final = 16


class ViewSource(Protocol):
    """Who knows the cluster (the cls service)."""

    @property
    def view(self) -> View: ...
    @property
    def watchers(self) -> Watchers: ...


class Peers(Protocol):
    """The part of an endpoint that fs uses."""

    @property
    def name(self) -> str: ...
    async def call(
        self,
        to: str,
        service: str,
        function: str,
        *args: Any,
        data: bytes | memoryview = b"",
        timeout_s: float | None = None,
    ) -> Reply: ...
    def cast(self, to: str, service: str, function: str, *args: Any) -> None: ...


def owners_of(view: View, key: str) -> tuple[str, ...]:
    """The online owners of a chunk in the order of preference. Its place on the ring is that of its name's text."""
    return view.resolve(key.encode()).owners


async def gather_bounded(jobs: Sequence[Callable[[], Awaitable[Any]]], limit: int = PEERS_ASKED_AT_ONCE) -> list[Any]:
    """The results of the jobs, in order, of which at most ``limit`` run at a time; the first error ends them all."""
    gate = asyncio.Semaphore(limit)

    async def run(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(job)) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]

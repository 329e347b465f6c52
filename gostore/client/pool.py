"""Work on many items with a bounded number under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def as_done(
    items: Iterable[T], work: Callable[[T], Coroutine[Any, Any, R]], in_flight: int
) -> AsyncGenerator[R, None]:
    """The results of ``work`` in the order in which they come; ``items`` are drawn when there is room.

    When the caller stops, or one fails, the others are cancelled and awaited.
    """
    source = iter(items)
    running: dict[asyncio.Task[R], None] = {}
    try:
        exhausted = False
        while True:
            while not exhausted and len(running) < in_flight:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                else:
                    running[asyncio.ensure_future(work(item))] = None
            if not running:
                return
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task.done()]:
                del running[task]
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        for task in running:
            await asyncio.wait([task])

"""Futures that fail when their time has come, with one timer for all of a node.

``asyncio.timeout`` costs 7 us, a tenth of what a command costs its leader; an entry in a heap costs half of one.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Any, Final

SWEEP_MIN: Final = 1024
"""Futures that are done leave the heap when their time has come, or when it has doubled; below this it is not swept."""


class Deadlines:
    """Made on the loop that it is for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[float, int, asyncio.Future[Any], Callable[..., Exception], tuple[Any, ...]]] = []
        self._number = 0
        self._sweep_at = SWEEP_MIN
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, future: asyncio.Future[Any], deadline_s: float, error: Callable[..., Exception], *args: Any) -> None:
        """Unless it is done by ``deadline_s`` (loop time), ``future`` fails with ``error(*args)``."""
        self._number += 1  # equal times fail in the order in which they were added
        heapq.heappush(self._heap, (deadline_s, self._number, future, error, args))
        if len(self._heap) > self._sweep_at:
            self._heap = [waiting for waiting in self._heap if not waiting[2].done()]
            heapq.heapify(self._heap)
            self._sweep_at = max(SWEEP_MIN, 2 * len(self._heap))
        if self._timer is None or deadline_s < self._timer_s:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap:
            self._timer_s = self._heap[0][0]
            self._timer = self._loop.call_at(self._timer_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now_s = self._loop.time()
        while self._heap and (self._heap[0][0] <= now_s or self._heap[0][2].done()):
            _, _, future, error, args = heapq.heappop(self._heap)
            if not future.done():
                future.set_exception(error(*args))
        self._arm()

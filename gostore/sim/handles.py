"""Scheduled callbacks."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gostore.sim.scheduler import Scheduler


def _nothing() -> None:
    """In place of a callback that was cancelled."""


class SimHandle:
    """A scheduled callback, as ``asyncio.Handle``."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context")

    cancelled_timer = False

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context) -> None:
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._forget()

    def _forget(self) -> None:
        """What was to be called need not live until its time has come."""
        self._callback = _nothing
        self._args = ()

    def cancelled(self) -> bool:
        return self._cancelled


class SimTimer(SimHandle):
    """A callback for a moment, as ``asyncio.TimerHandle``."""

    __slots__ = ("_scheduler", "_when", "cancelled_timer")

    def __init__(
        self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], context: Context, scheduler: Scheduler
    ) -> None:
        self._callback = callback
        self._args = args
        self._context = context
        self._cancelled = False
        self.cancelled_timer = False
        self._when = when
        self._scheduler: Scheduler | None = scheduler  # while it is in the heap

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._forget()
            if self._scheduler is not None:
                self.cancelled_timer = True
                self._scheduler.timer_cancelled()

    def when(self) -> float:
        return self._when

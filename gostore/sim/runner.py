"""Where the handles of a simulated cluster run: on a client's machine in the world, while the caller waits.

The world stands still unless somebody waits for something in it. Awaiting a handle from the program around the world
(a notebook cell, whose own loop is running) puts the coroutine on the client's loop, as a task, and steps the world
until that task ends. Several may be awaited at once (``asyncio.gather`` in a cell): whoever of them is running steps
the world for all, so they proceed side by side in virtual time. Between two slices of stepping the outer loop gets its
turn; slices are counted in callbacks, not in real time, so that a run does not depend on the speed of the machine.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, Final, NoReturn, TypeVar

from gostore.core.errors import GoStoreError, Unavailable
from gostore.sim import guard
from gostore.sim.errors import LimitError, locate
from gostore.sim.loop import SimTask
from gostore.sim.world import CALLBACKS_MAX, VIRTUAL_S_MAX, World

T = TypeVar("T")

SLICE_CALLBACKS: Final = 10_000
"""Callbacks between two turns of the outer loop, about a tenth of a second. Fewer: livelier; more: faster."""


class SimRunner:
    """A :class:`~gostore.core.twins.Runner`. It does not keep the world alive; whoever made the world does.

    Each run ends with a :class:`LimitError` after ``virtual_s_max`` seconds of virtual time or ``callbacks_max``
    callbacks. An error that a harness can do something about names seed and virtual time.
    """

    def __init__(
        self, world: World, *, virtual_s_max: float = VIRTUAL_S_MAX, callbacks_max: int = CALLBACKS_MAX
    ) -> None:
        self._virtual_s_max = virtual_s_max
        self._callbacks_max = callbacks_max
        self._world = weakref.ref(world)
        self._scheduler = world.scheduler
        # Only one thread at a time steps the world; the others (a view's) wait for their turn.
        self._turn = threading.RLock()
        self.over = False
        """Set by what runs inside: close the world when the stepping is done."""

    async def run(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Await ``coroutine`` in the world. Raises what it raises, and :class:`SimulationError`."""
        if self._inside():
            try:
                return await coroutine
            except GoStoreError as error:
                locate(error, self._scheduler.seed, self._scheduler.now)
                raise
        task = self._begin(coroutine)
        if task is None:
            return _run_by_hand(coroutine)
        limits = self._limits()
        try:
            while not task.done():
                # Whoever else wants to begin something at the same time can.
                await asyncio.sleep(0)
                self._drive(task, SLICE_CALLBACKS, *limits)
        except BaseException:
            task.cancel()
            raise
        finally:
            self._end()
        result: T = self._result(task)
        return result

    def run_sync(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Run ``coroutine`` to its end in the world. Raises what it raises, and :class:`SimulationError`."""
        if self._inside():
            coroutine.close()
            raise RuntimeError("a _sync twin was called inside the simulated world; await the coroutine instead")
        task = self._begin(coroutine)
        if task is None:
            return _run_by_hand(coroutine)
        limits = self._limits()
        try:
            while not task.done():
                self._drive(task, self._callbacks_max, *limits)
        except BaseException:
            task.cancel()
            raise
        finally:
            self._end()
        result: T = self._result(task)
        return result

    def _inside(self) -> bool:
        return guard.world_of_thread() is self._scheduler

    def _begin(self, coroutine: Coroutine[Any, Any, Any]) -> SimTask | None:
        """The coroutine as a task of the client; None when the world is closed."""
        world = self._world()
        if world is None or self._scheduler.dead:
            return None
        with self._turn:
            task = world.client().spawn(coroutine, name=getattr(coroutine, "__name__", "run"))
            # The run stops as soon as any of the tasks that somebody waits for has ended.
            task.add_done_callback(_halt)
            return task

    def _limits(self) -> tuple[float, int]:
        """(virtual time, index of the callback) at which a run that begins now is too long."""
        return self._scheduler.now + self._virtual_s_max, self._scheduler.count + self._callbacks_max

    def _drive(self, task: SimTask, callbacks: int, until_s: float, count_max: int) -> None:
        scheduler = self._scheduler
        with self._turn:
            if task.done():
                return
            before = scheduler.count
            scheduler.drive(until=until_s, count_max=max(0, min(callbacks, count_max - before)))
            if task.done():
                return
            if scheduler.count >= count_max:
                self._too_long(
                    task, f"callbacks_max = {self._callbacks_max:,} callbacks were not enough", "callbacks_max"
                )
            if scheduler.head_time() > until_s and not scheduler.halted and scheduler.head_time() < math.inf:
                self._too_long(
                    task, f"virtual_s_max = {self._virtual_s_max:g} s of virtual time were not enough", "virtual_s_max"
                )
            if scheduler.count == before:
                self._fail(task, "nothing happens any more, it can never end")

    def _too_long(self, task: SimTask, why: str, limit: str) -> NoReturn:
        self._fail(task, f"{why}; if it is to take longer: simulate(..., {limit}=...)")

    def _fail(self, task: SimTask, why: str) -> NoReturn:
        world, scheduler = self._world(), self._scheduler
        trouble = world.trouble() if world is not None else ""
        message = f"waited for {task.get_name().rpartition('/')[2]}: {why}{trouble}"
        raise LimitError(message, seed=scheduler.seed, time_s=scheduler.now)

    def _result(self, task: SimTask) -> Any:
        try:
            return task.result()
        except GoStoreError as error:
            locate(error, self._scheduler.seed, self._scheduler.now)
            raise

    def _end(self) -> None:
        world = self._world()
        if world is not None and not self._scheduler.running and not self._scheduler.dead:
            world.client().loop.sweep()
            if self.over:
                world.close()


def _halt(task: asyncio.Task[Any]) -> None:
    loop = task.get_loop()
    loop.scheduler.halt()  # type: ignore[attr-defined]


def _run_by_hand(coroutine: Coroutine[Any, Any, T]) -> T:
    """After the end of the world: what only remembers still answers, what would have to wait cannot."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    if inspect.getcoroutinestate(coroutine) != inspect.CORO_CLOSED:
        coroutine.close()
    raise Unavailable("this simulated cluster was stopped; simulate another one")

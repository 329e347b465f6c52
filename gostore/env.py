"""The real environment of a node: loop, wall clock, randomness, disk, tasks.

``Env`` is all that a node knows of its world. The simulator builds the same class from a virtual loop, an in-memory
network and a disk that can lose what was not synced; the node cannot tell.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from gostore.core.events import Events
from gostore.core.ports import Clock, Disk, Rng
from gostore.core.stamps import HybridClock


class RealClock:
    """The machine's wall clock."""

    def wall_s(self) -> float:
        return time.time()


class Tasks:
    """The owner of a node's background tasks: it cancels and awaits them all, in the order of their start.

    A task that ends with an error is reported (log, event, statistics), never lost; the others go on.
    """

    def __init__(self, name: str, report: Callable[[str, BaseException], None]) -> None:
        self._name = name
        self._report = report
        # A dictionary, not a set: its order does not depend on addresses.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._closed = False
        self.failed = 0

    def start(self, coroutine: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run a coroutine as a task of this node. Raises ``RuntimeError`` after :meth:`stop`."""
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"{self._name} is stopping; it starts no task {name!r}")
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}/{name}")
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed += 1
            self._report(task.get_name(), error)

    async def stop(self) -> None:
        """Cancel all and wait until each has ended. Safe to call from one of them."""
        self._closed = True
        current = asyncio.current_task()
        while tasks := [task for task in self._tasks if task is not current]:
            for task in tasks:
                task.cancel()
            for task in tasks:
                await asyncio.wait([task])

    def __len__(self) -> int:
        return len(self._tasks)


@dataclass
class Env:
    """One node's world. ``sockets``: already bound ones, by ``"tcp"``, ``"udp"``, ``"rest"`` (socket activation)."""

    name: str
    clock: Clock
    rng: Rng
    disk: Disk
    log: logging.Logger
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    events: Events = field(init=False)
    hlc: HybridClock = field(init=False)
    tasks: Tasks = field(init=False)
    on_fatal: Callable[[str], None] | None = None
    """Called once when the node cannot go on (a failed fsync); whoever owns the node stops it."""

    def __post_init__(self) -> None:
        self.hlc = HybridClock()
        self.events = Events(
            self.name,
            stamp=lambda: self.hlc.tick(self.wall_ms()),
            time_s=lambda: asyncio.get_running_loop().time(),
        )
        self.tasks = Tasks(self.name, self._task_failed)

    def wall_ms(self) -> int:
        """Wall time in whole milliseconds since 1970, for stamps."""
        return int(self.clock.wall_s() * 1000)

    def fatal(self, reason: str) -> None:
        """The node must not go on: stop it."""
        self.log.critical("%s: %s", self.name, reason)
        if self.on_fatal is not None:
            callback, self.on_fatal = self.on_fatal, None
            callback(reason)

    def _task_failed(self, task: str, error: BaseException) -> None:
        self.log.error("task %s failed", task, exc_info=error)
        self.events.publish("task_failed", task=task, error=f"{type(error).__name__}: {error}")


def real_rng(seed: int | None = None) -> Rng:
    """Randomness for a real node: from the operating system's entropy unless a seed is given."""
    return random.Random(seed)

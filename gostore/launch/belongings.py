"""What belongs to a cluster object and ends with it: its zygote with all nodes, its connection, its directory.

It ends in one of four ways. The cluster is stopped: everything is ended and awaited. The object becomes garbage: the
same, in the background. The interpreter exits: the same, before it is gone. The interpreter is killed: nothing of this
runs, and the zygote does it all (``gostore.launch.zygote``).
"""

from __future__ import annotations

import asyncio
import atexit
import os
from typing import Final

from gostore.client.connection import Connection
from gostore.client.thread import ClientThread
from gostore.launch.control import Control
from gostore.launch.place import Place

AT_EXIT_TIMEOUT_S: Final = 20.0
"""How long the interpreter's exit waits for the end of one cluster; then its zygote is killed, which ends the nodes."""


class Belongings:
    """What outlives the cluster object for as long as it takes to end it."""

    def __init__(self, place: Place, thread: ClientThread) -> None:
        self.place = place
        self.thread = thread
        self.pid = os.getpid()
        self.control: Control | None = None
        self.connection: Connection | None = None
        self._ending: asyncio.Task[None] | None = None
        _LIVE[id(self)] = self

    @property
    def ended(self) -> bool:
        """Whether the end has begun."""
        return self._ending is not None

    @property
    def ours(self) -> bool:
        """False in a process that was forked from the owner: it has a copy, and no business with the cluster."""
        return self.pid == os.getpid() and self.thread.usable

    async def end(self) -> None:
        """End the processes, wait for them, close the connection and leave the place. On the client thread's loop."""
        self._begin_to_end()
        assert self._ending is not None
        await asyncio.shield(self._ending)

    def drop(self) -> None:
        """The cluster object is garbage: end without waiting. From any thread, also in the middle of anything."""
        if not self.ended and self.ours:
            self.thread.loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end(), name="end of a cluster")

    async def _end(self) -> None:
        try:
            if self.connection is not None:
                await self.connection.close()
        finally:
            if self.control is not None:
                await self.control.ended()
                self.place.leave()
            else:
                self.place.abandon()
            _LIVE.pop(id(self), None)


_LIVE: dict[int, Belongings] = {}


def _end_all() -> None:
    """At the interpreter's exit: no process outlives it. (When it is killed, the zygotes see to that.)"""
    for belongings in list(_LIVE.values()):
        if belongings.ours:
            future = asyncio.run_coroutine_threadsafe(belongings.end(), belongings.thread.loop)
            try:
                future.result(AT_EXIT_TIMEOUT_S)
            except TimeoutError:
                belongings.place.process.kill()


atexit.register(_end_all)

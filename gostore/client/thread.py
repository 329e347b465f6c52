"""The one background thread of this interpreter that does all client input and output.

Why a thread: a notebook's own loop stands still while a cell computes or blocks, and a live view must go on moving.
Handles (``gostore.core.twins``) run their coroutines here, whether they are awaited from the user's loop or called by
their ``_sync`` twins. The thread is a daemon and starts with the first use; a process that was forked from this one
starts its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")

START_TIMEOUT_S = 30.0

SIGNAL_CHECK_S = 0.2
"""How often a waiting thread looks for an interrupt. Python runs signal handlers between two steps of the main thread,
so an interrupt that arrives in the last moment before a wait would otherwise be noticed when the wait is over."""


class ClientThread:
    """A :class:`~gostore.core.twins.Runner` on a loop of its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="gostore-client", daemon=True)
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._started.wait(START_TIMEOUT_S)
        assert self._loop is not None, "the client thread did not start"
        return self._loop

    @property
    def usable(self) -> bool:
        """False in a process that was forked from the one that started the thread."""
        return self._pid == os.getpid() and self._thread.is_alive()

    def _main(self) -> None:
        loop = _new_loop()
        asyncio.set_event_loop(loop)
        self._loop = loop
        self._started.set()
        loop.run_forever()

    async def run(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Await on the background loop, from any loop; cancelling the caller cancels the coroutine."""
        if asyncio.get_running_loop() is self.loop:
            return await coroutine
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def run_sync(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Wait in the calling thread. Ctrl-C (or a notebook's interrupt) cancels the coroutine and is raised here."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a _sync twin was called on gostore's own thread; await the coroutine instead")
        waiting = _Waiting(coroutine)
        try:
            self.loop.call_soon_threadsafe(waiting.start)
            while not waiting.done.acquire(timeout=SIGNAL_CHECK_S):
                pass
        except BaseException:
            self.loop.call_soon_threadsafe(waiting.cancel)
            raise
        return waiting.result()


class _Waiting(Generic[T]):
    """A coroutine on the client thread, and another thread that waits for it.

    ``concurrent.futures`` would do, but for interrupts: one that arrives just before its wait begins is not noticed
    until the wait ends, and one that arrives in the middle of its bookkeeping may leave its lock held for ever.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(lambda _: self.done.release())

    def cancel(self) -> None:
        if self._task is None:
            self._coroutine.close()
        else:
            self._task.cancel()

    def result(self) -> T:
        assert self._task is not None
        return self._task.result()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


_shared: ClientThread | None = None
_lock = threading.Lock()


def client_thread() -> ClientThread:
    """The thread of this process, started by the first call."""
    global _shared  # noqa: PLW0603 - one per process is the point
    with _lock:
        if _shared is None or not _shared.usable:
            _shared = ClientThread()
        return _shared


def _forget_after_fork() -> None:
    # The lock may have been held by a thread that does not exist in the child.
    global _lock, _shared  # noqa: PLW0603
    _lock = threading.Lock()
    _shared = None


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget_after_fork)

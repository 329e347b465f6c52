"""Coroutines and their blocking twins, on the client thread."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from collections.abc import AsyncIterator

import pytest

from gostore.client.thread import client_thread
from gostore.core.twins import SyncTwins, sync_iterator_twin, sync_twin


class Handle(SyncTwins):
    def __init__(self) -> None:
        self._runner = client_thread()
        self.closed = 0

    async def where(self, plus: int = 0, *, fail: bool = False) -> tuple[str, int]:
        """Tell the thread."""
        await asyncio.sleep(0)
        if fail:
            raise LookupError("as asked")
        return threading.current_thread().name, 1 + plus

    where_sync = sync_twin(where)

    async def outer(self) -> tuple[str, int]:
        return await self.where(5)

    outer_sync = sync_twin(outer)

    async def count(self, to: int) -> AsyncIterator[int]:
        """Count."""
        try:
            for number in range(to):
                await asyncio.sleep(0)
                yield number
        finally:
            self.closed += 1

    count_sync = sync_iterator_twin(count)

    async def hang(self, started: threading.Event) -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            self.closed += 1

    hang_sync = sync_twin(hang)

    async def interrupt(self) -> None:
        """The signal meets a thread that is not the waiting one, as one that comes just before the wait would."""
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            self.closed += 1

    interrupt_sync = sync_twin(interrupt)


class Child(Handle):
    async def where(self, plus: int = 0, *, fail: bool = False) -> tuple[str, int]:
        name, number = await super().where(plus, fail=fail)
        return name, 100 * number

    where_sync = sync_twin(where)


def test_both_forms_run_on_the_client_thread() -> None:
    handle = Handle()
    assert handle.where_sync(plus=2) == ("gostore-client", 3)
    assert asyncio.run(handle.where(2)) == ("gostore-client", 3)
    assert handle.outer_sync() == ("gostore-client", 6)
    with pytest.raises(LookupError, match="as asked"):
        handle.where_sync(fail=True)
    with pytest.raises(LookupError, match="as asked"):
        asyncio.run(handle.where(fail=True))


def test_a_twin_works_while_the_users_loop_runs() -> None:
    """As in a notebook cell, where a loop is running all the time."""

    async def cell() -> None:
        assert Handle().where_sync() == ("gostore-client", 1)

    asyncio.run(cell())


def test_overriding_the_coroutine_overrides_the_twin() -> None:
    assert Child().where_sync(1) == ("gostore-client", 200)
    assert Child().outer_sync() == ("gostore-client", 600)


def test_iterators_have_twins_and_are_closed() -> None:
    handle = Handle()
    assert list(handle.count_sync(3)) == [0, 1, 2]

    async def collect() -> list[int]:
        return [number async for number in handle.count(3)]

    assert asyncio.run(collect()) == [0, 1, 2]
    for number in handle.count_sync(10):
        if number == 2:
            break
    assert handle.closed == 3


def test_a_twin_is_a_documented_attribute_with_a_signature() -> None:
    assert str(inspect.signature(Handle.where_sync)).startswith("(self, plus: 'int' = 0, *, fail: 'bool' = False)")
    assert Handle.where_sync.__name__ == "where_sync"
    assert Handle.where_sync.__doc__ == "Tell the thread.\n\nBlocks until it is done; the same as ``where``."
    assert not inspect.iscoroutinefunction(Handle.where_sync)


def test_a_coroutine_without_a_twin_is_refused_where_the_class_is_made() -> None:
    with pytest.raises(TypeError, match="Wrong.lonely has no twin: add the line `lonely_sync = sync_twin"):

        class Wrong(SyncTwins):
            async def lonely(self) -> None: ...


def test_cancelling_the_caller_cancels_the_work() -> None:
    handle, started = Handle(), threading.Event()

    async def main() -> None:
        task = asyncio.ensure_future(handle.hang(started))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert handle.where_sync()  # the thread has gone through its turn since
    assert handle.closed == 1


def test_an_interrupt_ends_the_wait_and_the_work() -> None:
    handle = Handle()
    with pytest.raises(KeyboardInterrupt):
        handle.interrupt_sync()
    assert handle.where_sync()
    assert handle.closed == 1


def test_a_twin_on_the_client_thread_is_refused_instead_of_hanging() -> None:
    handle = Handle()

    async def wrong() -> None:
        handle.where_sync()

    with pytest.raises(RuntimeError, match="await the coroutine instead"):
        client_thread().run_sync(wrong())


def test_there_is_one_thread() -> None:
    assert client_thread() is client_thread()
    assert [thread.name for thread in threading.enumerate()].count("gostore-client") == 1

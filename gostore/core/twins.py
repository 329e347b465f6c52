"""Every public coroutine of a handle has a ``_sync`` twin, so that a notebook, a script and a REPL can all use it.

Inspired by ipyparallel's ``_async.py``, with two differences. The twin is declared, one line under its coroutine, so
that type checkers and editors see its signature:

    class FsHandle(SyncTwins):
        async def read(self, path: str) -> bytes: ...
        read_sync = sync_twin(read)

And both forms go through a :class:`Runner`, which decides where the coroutine runs: in the process world on the one
background loop of this interpreter, in the simulated world on the loop of virtual time. A subclass may override the
coroutine; the twin it inherits calls the override. A public coroutine without a twin is an error where its class is
made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
S = TypeVar("S", bound="SyncTwins")
T = TypeVar("T")

_END: Final = object()
_DISPATCHED: Final = "__gostore_dispatched__"


class Runner(Protocol):
    """Where the coroutines of handles run."""

    async def run(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Run it to its end from the caller's own event loop (which may be another one than the runner's)."""
        ...

    def run_sync(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Run it to its end while the calling thread waits. An interrupt ends the coroutine, then the wait."""
        ...


class SyncTwins:
    """Base of handles: its public coroutines and async generators run in :attr:`_runner`."""

    _runner: Runner

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in list(vars(cls).items()):
            if name.startswith("_") or hasattr(value, _DISPATCHED):
                continue
            if inspect.iscoroutinefunction(value):
                setattr(cls, name, _dispatch(value))
            elif inspect.isasyncgenfunction(value):
                setattr(cls, name, _dispatch_iterator(value))
            else:
                continue
            if not hasattr(cls, f"{name}_sync"):
                raise TypeError(f"{cls.__name__}.{name} has no twin: add the line `{name}_sync = sync_twin({name})`")


def sync_twin(
    function: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], T]:
    """The blocking twin of the coroutine method ``function``, with its signature and documentation."""

    def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        # By name: a subclass may have overridden the coroutine.
        coroutine: Coroutine[Any, Any, T] = getattr(self, function.__name__)(*args, **kwargs)
        return self._runner.run_sync(coroutine)

    return cast("Callable[Concatenate[S, P], T]", _describe(twin, function))


def sync_iterator_twin(
    function: Callable[Concatenate[S, P], AsyncIterator[T]],
) -> Callable[Concatenate[S, P], Iterator[T]]:
    """The blocking twin of the async generator method ``function``."""

    def twin(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        iterator = getattr(self, function.__name__)(*args, **kwargs)
        try:
            while (item := self._runner.run_sync(_step(iterator))) is not _END:
                yield cast(T, item)
        finally:
            self._runner.run_sync(iterator.aclose())

    return cast("Callable[Concatenate[S, P], Iterator[T]]", _describe(twin, function))


def _describe(twin: Any, function: Any) -> Any:
    functools.update_wrapper(twin, function)
    del twin.__wrapped__
    twin.__signature__ = inspect.signature(function)
    twin.__name__ = f"{function.__name__}_sync"
    twin.__qualname__ = f"{function.__qualname__}_sync"
    twin.__doc__ = (
        f"{inspect.cleandoc(function.__doc__ or '')}\n\nBlocks until it is done; the same as ``{function.__name__}``."
    )
    # An abstract coroutine makes its class abstract; its twin has nothing to be filled in.
    twin.__dict__.pop("__isabstractmethod__", None)
    return twin


def _dispatch(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    @functools.wraps(function)
    async def run(self: SyncTwins, /, *args: Any, **kwargs: Any) -> Any:
        return await self._runner.run(function(self, *args, **kwargs))

    setattr(run, _DISPATCHED, True)
    return run


def _dispatch_iterator(function: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
    @functools.wraps(function)
    async def run(self: SyncTwins, /, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        iterator = function(self, *args, **kwargs)
        try:
            while (item := await self._runner.run(_step(iterator))) is not _END:
                yield item
        finally:
            await self._runner.run(iterator.aclose())

    setattr(run, _DISPATCHED, True)
    return run


async def _step(iterator: Any) -> Any:
    return await anext(iterator, _END)

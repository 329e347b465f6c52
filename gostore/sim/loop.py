"""An asyncio event loop with virtual time; one per node, all on one scheduler.

Theory of operation
-------------------
A node uses asyncio's standard calls, so the simulator is an event loop. It is asyncio's own machinery that runs on it
(C tasks and futures, streams, locks, time-outs); the loop provides only what those ask of a loop: ready callbacks,
timers and transports.

*Processor.* A node has one processor. Every callback takes ``Processor.callback_s``, and every byte that is sent or
received ``Processor.byte_s`` more (:meth:`SimLoop.charge`). What becomes ready meanwhile waits in ``_ready``. ``_spin``
runs ready callbacks one after the other, each at the time at which the processor is free, until the ready queue is
empty or something else in the world is due first; then it leaves a wake-up in the heap. A node can therefore be
overloaded, and the callbacks of several nodes interleave in the order of virtual time.

*Identity.* What happens to a machine happens to its loop. A *paused* loop keeps collecting ready callbacks and runs
none (a stopped process: its timers are late when it goes on). A *crashed* loop runs nothing ever again, accepts
nothing, and keeps everything that it had: see ``_held``.

*A crash runs nobody's finally.* A suspended coroutine that is garbage collected gets ``GeneratorExit`` and runs its
``finally`` blocks: a dead node would act. Therefore a loop refers strongly to each of its unfinished tasks (asyncio
itself does so only weakly, which on a real loop makes unreferenced tasks vanish at random), and after a crash to every
callback it still had. When the world is closed :mod:`gostore.sim.graveyard` disposes of them without running them.

*Order.* asyncio keeps tasks in sets (``asyncio.wait``, task groups), which iterate by hash; here tasks and futures
hash by order of creation instead of by address. A task's default name is numbered per world, not per process.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gostore.sim import guard
from gostore.sim.clock import SimClock
from gostore.sim.handles import SimHandle, SimTimer
from gostore.sim.scheduler import Scheduler

if TYPE_CHECKING:
    from gostore.sim.net import Host

# Finished tasks are dropped from a loop's list of tasks when it has grown to this, or to twice what is unfinished.
SWEEP_MIN = 256

# Errors that nobody caught, kept for whoever examines the node; later ones are only logged and counted.
ERRORS_KEPT_MAX = 100


@dataclass(frozen=True, slots=True)
class Processor:
    """Service times. The defaults are those of a Python process on loopback, within a factor of two."""

    callback_s: float = 5e-6
    """Seconds for each callback, whatever it does: 200,000 callbacks a second keep a node busy."""
    byte_s: float = 1e-9
    """Seconds for each byte sent or received: 1 GB/s."""

    def __post_init__(self) -> None:
        if self.callback_s < 0 or self.byte_s < 0:
            raise ValueError(f"{self}: service times cannot be negative")


class SimTask(asyncio.Task[Any]):
    """A task that hashes by order of creation, so that sets of tasks iterate alike in every run."""

    __slots__ = ("_order",)

    def __init__(self, coro: Coroutine[Any, Any, Any], *, loop: SimLoop, order: int, **options: Any) -> None:
        self._order = order  # before asyncio's own constructor, which puts the task into a set
        super().__init__(coro, loop=loop, **options)

    def __hash__(self) -> int:
        return self._order


class SimFuture(asyncio.Future[Any]):
    """A future that hashes by the order in which futures were first hashed; most never are."""

    __slots__ = ("_order",)

    def __hash__(self) -> int:
        try:
            return self._order
        except AttributeError:
            loop = self.get_loop()
            assert isinstance(loop, SimLoop)
            self._order: int = loop.scheduler.next_order()
            return self._order


class SimLoop(asyncio.AbstractEventLoop):
    """The event loop of one incarnation of one node. A restarted node gets a new one.

    ``name`` and ``index`` identify it in traces, ``host`` is its place in the network, ``clock`` its wall clock.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        host: Host,
        clock: SimClock,
        processor: Processor,
        log: logging.Logger,
    ) -> None:
        self.scheduler = scheduler
        self.name = name
        self.host = host
        self.clock = clock
        self.processor = processor
        self.log = log
        self.index = len(scheduler.loops)
        self.errors: list[str] = []
        self.errors_count = 0
        self.dead = False
        self.paused = False
        self._ready: deque[SimHandle] = deque()
        self._armed = False  # a wake-up is in the heap, or _spin is at work, or the loop must not run
        self._token = 0  # a wake-up with another token is void
        self._free_at = 0.0  # when the processor has done what it was given
        self._debt_s = 0.0  # what the running callback costs beyond the fixed price
        self._tasks: list[SimTask] = []
        self._sweep_at = SWEEP_MIN
        self._held: list[Any] = []  # what a crash must not let go
        self._exception_handler: Callable[[asyncio.AbstractEventLoop, dict[str, Any]], Any] | None = None
        self._task_factory: Callable[..., Any] | None = None
        scheduler.loops.append(self)

    def __repr__(self) -> str:
        state = "dead" if self.dead else "paused" if self.paused else "alive"
        return f"<SimLoop {self.name} {state}>"

    # -- callbacks and timers

    def time(self) -> float:
        return self.scheduler.now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        handle = SimHandle(callback, args, copy_context() if context is None else context)
        if self.dead:
            handle._cancelled = True
            self._held.append(handle)
            return handle
        self._ready.append(handle)
        if not self._armed:
            self._arm()
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        if self.scheduler.running and not guard.inside():
            raise RuntimeError(f"{self!r}: another thread cannot call into a simulated world; it would not be replayed")
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_at(self.scheduler.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        scheduler = self.scheduler
        handle = SimTimer(when, callback, args, copy_context() if context is None else context, scheduler)
        if self.dead:
            handle._cancelled = True
            self._held.append(handle)
        else:
            scheduler.at(when, self._fire, handle)
        return handle

    def _fire(self, timer: SimTimer) -> None:
        """A timer has come due."""
        timer._scheduler = None
        if timer._cancelled:
            self.scheduler.cancelled -= 1
        else:
            self.post(timer)

    def post(self, handle: SimHandle) -> None:
        """The world hands the node a callback (a timer, a packet): it runs as soon as the processor is free."""
        if self.dead:
            self._held.append(handle)
            return
        self._ready.append(handle)
        if not self._armed:
            # Never inside another node's callback, which may have called into the world (a fault, a harness).
            if self._free_at <= self.scheduler.now and not self.scheduler.busy:
                self._armed = True
                self._spin(self._token)
            else:
                self._arm()

    def _arm(self) -> None:
        self._armed = True
        self.scheduler.at(self._free_at, self._spin, self._token)

    def _spin(self, token: int) -> None:
        """Run ready callbacks, each when the processor is free, until something else in the world comes first."""
        if token != self._token or self.paused or self.dead:
            return
        scheduler = self.scheduler
        if scheduler.current is not self:
            self._enter()
        scheduler.busy = True
        try:
            self._run_ready(token)
        finally:
            scheduler.busy = False

    def _run_ready(self, token: int) -> None:
        scheduler, ready, index = self.scheduler, self._ready, self.index
        heap, trace = scheduler._heap, scheduler.trace
        callback_s = self.processor.callback_s
        while ready:
            handle = ready.popleft()
            if handle._cancelled:
                continue
            now = scheduler.now
            scheduler.count += 1
            trace.callback(now, index, handle._callback)
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                self._pay(now + callback_s)
                raise
            except BaseException as error:
                self._callback_failed(handle, error)
            self._free_at = free_at = now + callback_s + self._debt_s
            self._debt_s = 0.0
            if scheduler.predicate is not None:
                scheduler.check()
            if self._token != token or self.dead or self.paused:
                return
            if scheduler.count >= scheduler.count_stop or (heap and heap[0][0] <= free_at):
                break
            if ready:
                if free_at > scheduler.until:
                    break
                scheduler.now = free_at
        if ready:
            self._arm()
        else:
            self._armed = False

    def _enter(self) -> None:
        """This node's code runs next: make it the running loop, and the owner of generators begun from here on."""
        self.scheduler.current = self
        asyncio._set_running_loop(self)
        sys.set_asyncgen_hooks(finalizer=self._asyncgen_dropped)

    def _pay(self, free_at: float) -> None:
        """A callback was interrupted from outside (Ctrl-C): leave the loop fit to go on."""
        self._free_at = free_at
        self._arm()

    def charge(self, size_bytes: int) -> None:
        """The running callback moves this many bytes; the processor is busy for so much longer."""
        self._debt_s += size_bytes * self.processor.byte_s

    def _asyncgen_dropped(self, generator: AsyncGenerator[Any, Any]) -> None:
        """An asynchronous generator was abandoned half way: close it as asyncio does, in a task."""
        if self.dead or self.scheduler.dead:
            return
        if self.scheduler.current is self:
            self.create_task(generator.aclose())
        else:
            # The garbage collector found it, at a moment that means nothing to the node: it stays as it is.
            self._held.append(generator)

    # -- tasks and futures

    def create_future(self) -> SimFuture:
        return SimFuture(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None, **options: Any) -> Any:
        if self.scheduler.dead:
            coro.close()  # it never began, so nothing of it runs
        if self._task_factory is not None:
            options = options if context is None else {**options, "context": context}
            task = self._task_factory(self, coro, **options)
            if name is not None:
                task.set_name(name)
        else:
            order = self.scheduler.next_order()
            # asyncio numbers unnamed tasks per process; a name may get into a log, so it is numbered per world here.
            name = name if name is not None else f"Task-{order}"
            task = SimTask(coro, loop=self, order=order, name=name, context=context, **options)
        if self.scheduler.dead:
            task._log_destroy_pending = False
            return task
        tasks = self._tasks
        tasks.append(task)
        if len(tasks) >= self._sweep_at:
            self.sweep()
        return task

    def tasks(self) -> list[SimTask]:
        """The unfinished tasks, in order of creation."""
        return [task for task in self._tasks if not task.done()]

    @property
    def ready(self) -> int:
        """How many callbacks wait for the processor."""
        return len(self._ready)

    def sweep(self) -> None:
        """Let go of finished tasks, and with them of their results."""
        self._tasks = self.tasks()
        self._sweep_at = max(SWEEP_MIN, 2 * len(self._tasks))

    def set_task_factory(self, factory: Any) -> None:
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        return self._task_factory

    # -- pause and crash

    def pause(self) -> None:
        """Stop running callbacks, as a process that gets SIGSTOP; what becomes due waits."""
        if not self.paused and not self.dead:
            self.paused = True
            self._armed = True
            self._token += 1

    def resume(self) -> None:
        """Go on with all that has become due meanwhile."""
        if self.paused and not self.dead:
            self.paused = False
            if self._ready:
                self._arm()
            else:
                self._armed = False

    def crash(self) -> None:
        """Run nothing ever again, not even a ``finally``."""
        if not self.dead:
            self.dead = True
            self._token += 1
            self._held.extend(self._ready)
            self._ready.clear()

    def hold(self, thing: Any) -> None:
        """Keep something of a crashed node from being collected, so that no finalizer of it runs."""
        self._held.append(thing)

    def dispose(self) -> None:
        """The world is over: let go of everything. Nothing runs of it, because it was silenced before."""
        self.dead = True
        for task in self._tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.clear()
        self._ready.clear()
        self._held.clear()

    # -- errors that nobody caught

    def _callback_failed(self, handle: SimHandle, error: BaseException) -> None:
        callback = getattr(handle._callback, "__qualname__", type(handle._callback).__name__)
        self.call_exception_handler({"message": f"Exception in callback {callback}", "exception": error})

    def set_exception_handler(self, handler: Any) -> None:
        self._exception_handler = handler

    def get_exception_handler(self) -> Any:
        return self._exception_handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.dead or self.scheduler.dead:
            return
        if self._exception_handler is None:
            self.default_exception_handler(context)
            return
        try:
            self._exception_handler(self, context)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.default_exception_handler({"message": "Unhandled error in exception handler", "exception": error})

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = context.get("message") or "Unhandled exception in event loop"
        self.errors_count += 1
        if len(self.errors) < ERRORS_KEPT_MAX:
            self.errors.append(f"{message}: {error!r}" if error is not None else message)
        self.log.error("%s", message, exc_info=error)

    # -- what asyncio asks about a loop

    def is_running(self) -> bool:
        return self.scheduler.running and not self.dead

    def is_closed(self) -> bool:
        return self.dead or self.scheduler.dead

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """Debug mode measures real time; it stays off."""

    def run_forever(self) -> NoReturn:
        raise RuntimeError(f"{self!r} is driven by its world: use World.run(coroutine)")

    def run_until_complete(self, future: Any) -> NoReturn:
        if asyncio.iscoroutine(future):
            future.close()
        raise RuntimeError(f"{self!r} is driven by its world: use World.run(coroutine)")

    def stop(self) -> NoReturn:
        raise RuntimeError(f"{self!r} is driven by its world: use World.crash(name)")

    def close(self) -> None:
        """A loop ends with its node (a crash) or its world."""

    async def shutdown_asyncgens(self) -> None:
        """Abandoned generators are closed one by one as they are dropped."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is no executor."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> NoReturn:
        guard.forbid(f"run_in_executor({getattr(func, '__qualname__', func)}): a thread's timing cannot be replayed")

    # -- the network

    async def create_datagram_endpoint(
        self, protocol_factory: Any, local_addr: Any = None, remote_addr: Any = None, **options: Any
    ) -> Any:
        return await self.host.net.create_datagram_endpoint(self, protocol_factory, local_addr, remote_addr, **options)

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        return await self.host.net.streams.create_server(self, protocol_factory, host, port, **options)

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        return await self.host.net.streams.create_connection(self, protocol_factory, host, port, **options)

    async def sock_connect(self, sock: Any, address: Any) -> None:
        await self.host.net.streams.sock_connect(self, sock, address)

    async def getaddrinfo(
        self, host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        """Literal IPv4 addresses, ``localhost`` and the names of nodes. Raises ``socket.gaierror`` for others."""
        return self.host.net.getaddrinfo(self.host, host, port, family, type, proto)

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> tuple[str, str]:
        if flags & (socket.NI_NUMERICHOST | socket.NI_NUMERICSERV):
            return str(sockaddr[0]), str(sockaddr[1])
        return self.host.net.name_of(sockaddr[0]), str(sockaddr[1])

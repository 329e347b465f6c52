"""A simulated world: machines, the network between them, and the means to run and to break them.

    with World(seed=7) as world:
        node = world.add_node("n1", main=serve)     # serve(node) is the coroutine function of the machine's process
        answer = world.run(ask(), timeout_s=10)     # a coroutine of a client; works inside a notebook cell, too
        world.crash("n1"); world.restart("n1")
        print(world.now, world.trace.sha256)

Times are virtual seconds since the world began. Whatever runs inside is a function of the seed.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Self, TypeVar

from gostore.env import Env
from gostore.sim import graveyard
from gostore.sim.clock import SimClock
from gostore.sim.disk import SimDisk
from gostore.sim.errors import LimitError, SimulationError
from gostore.sim.links import latency_factor
from gostore.sim.loop import Processor, SimLoop, SimTask
from gostore.sim.net import Host, NetConfig, Network
from gostore.sim.scheduler import Scheduler
from gostore.sim.trace import Trace

T = TypeVar("T")
Main = Callable[["SimNode"], Coroutine[Any, Any, Any]]

# A run that was given no limit ends here: an hour of virtual time. A scenario that never ends is an error.
VIRTUAL_S_MAX = 3600.0
CALLBACKS_MAX = 200_000_000

CLIENT = "client"

# Lines of its log that a node keeps.
LOG_LINES_MAX = 1_000

# How long a sync takes: a log-normal distribution around what a solid-state disk needs for one file. Seconds.
SYNC_S = 0.000_3
SYNC_SIGMA = 0.5


class SimNode:
    """One machine: its place in the network, its disk and clock, and the process that runs on it, if any.

    ``loop`` and ``env`` are those of the running process: new ones after every start. ``task`` is the process's main
    coroutine. ``incarnation`` counts the starts, from 1.
    """

    def __init__(self, world: World, name: str, host: Host, processor: Processor, main: Main | None) -> None:
        self.name = name
        self.host = host
        self.clock = SimClock(world.scheduler)
        self.disk = SimDisk(world.scheduler.rng(f"disk:{name}"), sync_s=self._sync_s)
        self.disk_slow_s = 0.0
        """A fault: every sync takes so much longer."""
        self.processor = processor
        self.main = main
        self.incarnation = 0
        self.log_lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        """What the node has logged, with its own wall clock; it outlives the processes."""
        self.task: SimTask | None = None
        self.loop: SimLoop
        self.env: Env
        self._scheduler = world.scheduler
        # Not one of logging's own: those are shared by all worlds, and are never freed.
        self._log = logging.Logger(f"gostore.{name}", logging.INFO)
        self._log.addHandler(_Lines(self.log_lines))
        self._disk_rng = world.scheduler.rng(f"sync:{name}")

    def __repr__(self) -> str:
        return f"<SimNode {self.name} {self.state}>"

    @property
    def address(self) -> str:
        return self.host.address

    @property
    def state(self) -> str:
        """``running``, ``paused`` or ``down``."""
        return "down" if self.loop.dead else "paused" if self.loop.paused else "running"

    def start(self) -> None:
        """Start a process on this machine: a new loop and environment, and ``main`` as its task."""
        scheduler = self._scheduler
        self.incarnation += 1
        self.host.down = False
        # typeshed calls abstract what asyncio lets raise NotImplementedError: descriptors, subprocesses, signals.
        self.loop = SimLoop(  # type: ignore[abstract]
            scheduler, self.name, self.host, self.clock, self.processor, self._log
        )
        self.env = Env(
            name=self.name,
            clock=self.clock,
            rng=scheduler.rng(f"node:{self.name}:{self.incarnation}"),
            disk=self.disk,
            log=self._log,
        )
        self.env.on_fatal = self._fatal
        if self.main is not None:
            self.task = self.spawn(self.main(self), name="main")

    def spawn(self, coroutine: Coroutine[Any, Any, Any], *, name: str) -> SimTask:
        """Run a coroutine on this machine, as a task of nobody's; for tests and harnesses."""
        # A context of its own: what the program around the world has set there must not leak in.
        task: SimTask = Context().run(self.loop.create_task, coroutine, name=f"{self.name}/{name}")
        return task

    def _sync_s(self) -> float:
        return SYNC_S * latency_factor(self._disk_rng, SYNC_SIGMA) + self.disk_slow_s

    def _fatal(self, reason: str) -> None:
        """The node says that it cannot go on; whoever runs a process would let it die."""
        scheduler = self._scheduler
        scheduler.trace.add(scheduler.now, f"{self.name} fatal: {reason}")
        self.stop_process()

    def stop_process(self) -> None:
        """The process dies here and now; its machine stays up and closes its connections."""
        if not self.loop.dead:
            self.loop.crash()
            self.loop.hold((self.env, self.task))
            self.host.net.process_died(self.host)
            self.disk.process_died()

    def cut_power(self) -> None:
        """The machine loses its power here and now."""
        self.host.net.power_cut(self.host)
        self.stop_process()
        self.disk.power_cut()


class _Lines(logging.Handler):
    """Keeps the last lines that were logged."""

    def __init__(self, lines: deque[str]) -> None:
        super().__init__()
        self._lines = lines
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        formatter.converter = time.gmtime  # the same lines in every time zone
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.extend(self.format(record).splitlines())


class World:
    """A world that is reproduced by its ``seed``.

    ``net`` configures the network, ``processor`` the default machine; ``trace_sink`` gets a readable line for
    everything that happens (slow). A context manager; :meth:`close` ends it.
    """

    def __init__(
        self,
        seed: int | str = 0,
        *,
        net: NetConfig | None = None,
        processor: Processor | None = None,
        trace_sink: Callable[[str], None] | None = None,
    ) -> None:
        self.scheduler = Scheduler(seed, Trace(trace_sink))
        self.net = Network(self.scheduler, net)
        self.processor = processor if processor is not None else Processor()
        self.nodes: dict[str, SimNode] = {}
        # The finalizer keeps the scheduler, and with it everything inside, alive until the world is closed or dropped:
        # the garbage collector never meets a suspended coroutine of a living world.
        self._finalizer = weakref.finalize(self, _dispose, self.scheduler)

    def __repr__(self) -> str:
        state = "closed" if self.scheduler.dead else f"{len(self.nodes)} nodes, {self.now:.3f} s"
        return f"<World seed={self.seed!r} {state}>"

    # -- what it is

    @property
    def seed(self) -> int | str:
        return self.scheduler.seed

    @property
    def now(self) -> float:
        """Virtual time in seconds."""
        return self.scheduler.now

    @property
    def trace(self) -> Trace:
        return self.scheduler.trace

    @property
    def callbacks(self) -> int:
        """How many callbacks have run: the index of the present moment (see :meth:`step`)."""
        return self.scheduler.count

    def statistics(self) -> dict[str, int]:
        """Counters: callbacks, messages (deliveries and drops), lost datagrams by reason, unhandled errors."""
        counts = {
            "callbacks": self.callbacks,
            "messages": self.trace.messages,
            "errors": sum(loop.errors_count for loop in self.scheduler.loops),
        }
        return counts | {f"dropped, {reason}": count for reason, count in sorted(self.net.drops.items())}

    def rng(self, purpose: str) -> Any:
        """A seeded stream for a harness: a nemesis, a workload. Equal purposes give equal streams."""
        return self.scheduler.rng(f"harness:{purpose}")

    # -- machines

    def add_node(self, name: str, main: Main | None = None, *, processor: Processor | None = None) -> SimNode:
        """Add a machine and start its process. ``main(node)`` is a coroutine function; without it the machine idles.

        Raises ``ValueError`` for a name that is taken.
        """
        node = SimNode(self, name, self.net.add_host(name), processor or self.processor, main)
        self.nodes[name] = node
        node.start()
        return node

    def node(self, name: str) -> SimNode:
        """Raises :class:`SimulationError` that names those that exist."""
        found = self.nodes.get(name)
        if found is None:
            known = ", ".join(self.nodes) or "none"
            raise SimulationError(f"there is no node {name!r}; there are: {known}", seed=self.seed, time_s=self.now)
        return found

    def client(self, name: str = CLIENT) -> SimNode:
        """A machine for clients: no process of its own, and a processor that costs nothing."""
        return self.nodes.get(name) or self.add_node(name, processor=Processor(0.0, 0.0))

    # -- faults of machines; those of the network are methods of ``net``

    def crash(self, name: str) -> None:
        """Kill the process, as SIGKILL does: no clean-up runs, the kernel closes its sockets, written bytes stay."""
        self._note("crash", name)
        self.node(name).stop_process()

    def power_cut(self, name: str) -> None:
        """The machine loses its power: peers are told nothing, and the disk may lose what was not synced."""
        self._note("power_cut", name)
        self.node(name).cut_power()

    def restart(self, name: str) -> SimNode:
        """Start the process again, with the same ``main``; a running one is killed first."""
        self._note("restart", name)
        node = self.node(name)
        node.stop_process()
        node.start()
        return node

    def pause(self, name: str) -> None:
        """Stop the process, as SIGSTOP does; its kernel goes on."""
        self._note("pause", name)
        self.node(name).loop.pause()

    def resume(self, name: str) -> None:
        self._note("resume", name)
        self.node(name).loop.resume()

    def _note(self, what: str, name: str) -> None:
        self.trace.add(self.now, f"{what} {name}")

    # -- running

    def at(self, when_s: float, function: Callable[[], None]) -> None:
        """Call a function of the harness at virtual time ``when_s``: a fault, a measurement. It belongs to no node."""

        scheduler = self.scheduler

        def call(_: None) -> None:
            scheduler.leave()
            function()

        scheduler.at(when_s, call)

    def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        on: str = CLIENT,
        timeout_s: float = VIRTUAL_S_MAX,
        callbacks_max: int = CALLBACKS_MAX,
    ) -> T:
        """Run a coroutine to its end on a client's machine, or on the node ``on``, and return its result.

        Raises what the coroutine raises; :class:`LimitError` when it takes longer than ``timeout_s`` of virtual time
        or more than ``callbacks_max`` callbacks, or when nothing is left that could wake it;
        :class:`DeterminismError`.
        """
        try:
            node = self.client() if on == CLIENT else self.node(on)
            self._check_idle()
        except BaseException:
            coroutine.close()
            raise
        task = node.spawn(coroutine, name="run")
        task.add_done_callback(lambda _: self.scheduler.halt())
        try:
            self._drive("the coroutine to end", timeout_s, callbacks_max, None, task.done)
        except BaseException:
            # It must not go on in the next run, in which nobody waits for it.
            task.cancel()
            raise
        result: T = task.result()
        return result

    def run_until(
        self,
        condition: Callable[[], bool],
        *,
        timeout_s: float = VIRTUAL_S_MAX,
        callbacks_max: int = CALLBACKS_MAX,
        what: str = "the condition",
    ) -> None:
        """Run until ``condition()`` is true; it is tried after every callback. Raises as :meth:`run`."""
        self._check_idle()
        held = False

        def check() -> bool:
            nonlocal held
            held = condition()
            return held

        self._drive(what, timeout_s, callbacks_max, check, lambda: held)

    def run_for(self, seconds: float, *, callbacks_max: int = CALLBACKS_MAX) -> None:
        """Run for so much virtual time, whatever happens. Raises :class:`LimitError` above ``callbacks_max``."""
        end = self.now + seconds
        self._check_idle()
        self._drive(f"virtual time {end:g} s", seconds, callbacks_max, None, lambda: self.now >= end)

    def step(self, callbacks: int = 1) -> int:
        """Run so many callbacks, fewer when nothing is left to do; returns how many ran."""
        self._check_idle()
        before = self.callbacks
        self.scheduler.drive(count_max=callbacks)
        return self.callbacks - before

    def _check_idle(self) -> None:
        if self.scheduler.running:
            raise SimulationError("the world is stepping already; await instead", seed=self.seed, time_s=self.now)

    def _drive(
        self,
        what: str,
        timeout_s: float,
        callbacks_max: int,
        predicate: Callable[[], bool] | None,
        done: Callable[[], bool],
    ) -> None:
        scheduler = self.scheduler
        until, before = scheduler.now + timeout_s, scheduler.count
        scheduler.drive(until=until, count_max=callbacks_max, predicate=predicate)
        if done():
            return
        if scheduler.count - before >= callbacks_max:
            reason = f"waited for {what}: callbacks_max = {callbacks_max:,} callbacks were not enough"
        elif scheduler.head_time() == math.inf:
            reason = f"waited for {what}: nothing is left to do, it can never come true"
        else:
            reason = f"waited for {what}: timeout_s = {timeout_s:g} s of virtual time were not enough"
        raise LimitError(reason + self.trouble(), seed=self.seed, time_s=self.now)

    def trouble(self) -> str:
        """What is not running, and the errors that nobody caught: where to look first."""
        lines = [f"\n  {node.name} is {node.state}" for node in self.nodes.values() if node.state != "running"]
        lines += [f"\n  {loop.name}: {error}" for loop in self.scheduler.loops for error in loop.errors[-3:]]
        return "".join(lines[:20])

    # -- the end

    def close(self) -> None:
        """End the world: everything in it stops where it is, and none of its code runs any more."""
        self._check_idle()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _dispose(scheduler: Scheduler) -> None:
    """Free all that a world holds without running any of it (see :mod:`gostore.sim.graveyard`)."""
    scheduler.dead = True
    graveyard.silence(scheduler.loops)
    for loop in scheduler.loops:
        loop.dispose()
    scheduler.clear()


def run(main: Callable[[World], Coroutine[Any, Any, T]], seed: int | str = 0, **options: Any) -> T:
    """Run ``main(world)`` as a client's coroutine in a new world, close it and return the result."""
    with World(seed, **options) as world:
        return world.run(main(world))


__all__ = ["CLIENT", "SimNode", "World", "run"]

"""One virtual clock and one heap of callbacks for all nodes of a world.

Theory of operation
-------------------
The heap holds ``(time, sequence, function, argument)``. The sequence number makes the order total, so that two entries
of one instant run in the order in which they were made; nothing ever depends on an address. An entry is either
something of the world (a packet arrives, a fault begins) or something of a node (a timer fires, the processor takes up
work again); the second kind goes through the node's :class:`~gostore.sim.loop.SimLoop`, which runs its ready callbacks
one at a time, each at a moment of its own, for as long as nothing else in the world comes first. So the whole world
is one sequence of callbacks, ordered by virtual time, exactly reproducible.

Reproducible means: a function of the seed alone. What could break it is taken away here or elsewhere:

* randomness: :meth:`Scheduler.rng` derives one stream per purpose from the seed, so that another draw for one purpose
  does not disturb the others;
* real time, threads, sockets, entropy: :mod:`gostore.sim.guard` patches them while the world steps;
* the garbage collector: it runs finalizers (``finally`` blocks of dropped generators, ``__del__``) whenever its
  counters say so, and those depend on what else the process did. While the world steps it is off, and is run by us
  after a fixed number of callbacks;
* addresses: tasks and futures hash by their order of creation (:mod:`gostore.sim.loop`).

Stepping happens inside :meth:`Scheduler.drive`; between two calls the world stands still. ``drive`` may be called
inside a running event loop (a notebook cell): the outer loop and its current task are put aside and restored.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any

from gostore.sim import guard
from gostore.sim.errors import SimulationError, Stopped
from gostore.sim.trace import Trace

if TYPE_CHECKING:
    from gostore.sim.loop import SimLoop

# Wall time at virtual time 0: 2026-01-01T00:00:00Z. Any constant does; a recent one makes dates look plausible.
EPOCH_S = 1_767_225_600.0

# Callbacks between two collections of young garbage, and between two full ones, while the world steps. More often:
# less memory; seldom: faster. Counted, not timed, so that finalizers run at the same point in every run.
COLLECT_YOUNG_EVERY = 50_000
COLLECT_ALL_EVERY = 2_000_000

# Cancelled timers stay in the heap until their time comes; above this many, and when they are more than half of it,
# the heap is rebuilt without them (a call's time-out is cancelled in a millisecond but would stay for seconds).
CANCELLED_MAX = 1_000

Entry = tuple[float, int, Callable[[Any], None], Any]


class Scheduler:
    """The clock, the heap, the random streams and the trace of one world.

    ``seed`` is any integer or string; ``trace`` receives everything that happens (see
    :class:`~gostore.sim.trace.Trace`).
    """

    __slots__ = (
        "__weakref__",
        "_collect_all_at",
        "_collect_at",
        "_heap",
        "_library_random",
        "_order",
        "_seq",
        "break_at",
        "busy",
        "cancelled",
        "count",
        "count_stop",
        "current",
        "dead",
        "failure",
        "halted",
        "loops",
        "now",
        "predicate",
        "running",
        "seed",
        "trace",
        "until",
    )

    def __init__(self, seed: int | str, trace: Trace | None = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.until = math.inf
        self.count = 0  # callbacks run so far: the index of an event, for limits and for stopping at one
        self.count_stop = 0
        self.break_at = sys.maxsize  # drive raises Stopped before the callback of this index
        self.trace = trace if trace is not None else Trace()
        self.loops: list[SimLoop] = []
        self.current: SimLoop | None = None
        self.running = False
        self.busy = False  # a node's callback is running
        self.dead = False
        self.halted = False
        self.predicate: Callable[[], bool] | None = None
        self.failure: BaseException | None = None
        self.cancelled = 0
        self._heap: list[Entry] = []
        self._library_random: random.Random | None = None
        self._seq = 0
        self._order = 0
        self._collect_at = COLLECT_YOUNG_EVERY
        self._collect_all_at = COLLECT_ALL_EVERY

    # -- what nodes, network and disks use

    def rng(self, purpose: str) -> random.Random:
        """A new random stream for one purpose: a function of the seed and that name only."""
        digest = hashlib.sha256(f"{self.seed}\0{purpose}".encode()).digest()
        return random.Random(int.from_bytes(digest[:16], "big"))

    @property
    def library_random(self) -> random.Random:
        """The stream for libraries that would use the process's global generator."""
        if self._library_random is None:
            self._library_random = self.rng("libraries")
        return self._library_random

    def at(self, when: float, function: Callable[[Any], None], argument: Any = None) -> None:
        """Call ``function(argument)`` at virtual time ``when``, or now if that has passed."""
        if self.dead:
            return
        self._seq = seq = self._seq + 1
        heappush(self._heap, (when if when > self.now else self.now, seq, function, argument))

    def after(self, delay_s: float, function: Callable[[Any], None], argument: Any = None) -> None:
        self.at(self.now + delay_s, function, argument)

    def next_order(self) -> int:
        """Numbers in order of creation, for the hashes of tasks and futures."""
        self._order = order = self._order + 1
        return order

    def head_time(self) -> float:
        """When the next entry is due; infinity when there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def timer_cancelled(self) -> None:
        """Somebody cancelled a timer that is still in the heap."""
        self.cancelled += 1
        if self.cancelled > CANCELLED_MAX and self.cancelled * 2 > len(self._heap):
            # In place: drive() and the loops hold the list itself.
            self._heap[:] = [entry for entry in self._heap if not getattr(entry[3], "cancelled_timer", False)]
            heapify(self._heap)
            self.cancelled = 0

    def fail(self, error: BaseException) -> None:
        """Stop the world with this error after the running callback; the first one wins."""
        if self.failure is None and not self.dead:
            self.failure = error
            self.halt()

    def halt(self) -> None:
        """Stop stepping after the running callback."""
        self.halted = True
        self.count_stop = 0

    def check(self) -> None:
        """Try the predicate of :meth:`drive`; the loops do so after every callback."""
        assert self.predicate is not None
        try:
            if self.predicate():
                self.halt()
        except Exception as error:
            self.fail(error)

    # -- stepping

    def drive(
        self,
        *,
        until: float = math.inf,
        count_max: int | None = None,
        predicate: Callable[[], bool] | None = None,
    ) -> None:
        """Step until virtual time ``until``, for ``count_max`` callbacks, until ``predicate()`` holds (it is tried
        after every callback), until :meth:`halt`, or until nothing is left to do; whichever comes first.

        Raises the error given to :meth:`fail`, :class:`DeterminismError` above all, :class:`Stopped` at ``break_at``,
        and :class:`SimulationError` when the world is closed or is stepping already.
        """
        if self.dead:
            raise SimulationError("this world is closed", seed=self.seed, time_s=self.now)
        if self.running:
            raise SimulationError("the world is stepping already; await instead", seed=self.seed, time_s=self.now)
        self.halted = False
        self.until = until
        self.predicate = predicate
        if predicate is not None and predicate():
            return
        limit = sys.maxsize if count_max is None else self.count + count_max
        with self._stepping():
            while not self.halted and self.count < limit:
                if self.count >= self._collect_at:
                    self._collect()
                if self.count >= self.break_at:
                    raise Stopped(f"stopped at event {self.count:,}", seed=self.seed, time_s=self.now)
                # The inner loop stops at the nearest of these; a node that never lets go is stopped there too.
                self.count_stop = min(limit, self._collect_at, self.break_at)
                if not self._step(until):
                    break
        self.predicate = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if not self.halted and self.count < limit and until < math.inf:
            self.now = max(self.now, until)

    def _step(self, until: float) -> bool:
        """Run entries up to ``count_stop``; false when none is due until ``until``."""
        heap = self._heap
        while heap:
            if self.count >= self.count_stop:
                return True
            entry = heap[0]
            if entry[0] > until:
                return False
            heappop(heap)
            self.now = entry[0]
            entry[2](entry[3])
        return self.count >= self.count_stop

    def _collect(self) -> None:
        everything = self.count >= self._collect_all_at
        self._collect_at = self.count + COLLECT_YOUNG_EVERY
        if everything:
            self._collect_all_at = self.count + COLLECT_ALL_EVERY
        self.trace.flush()
        self.leave()
        # What is collected may belong to the program around the world: its finalizers may use real things.
        with guard.suspended():
            gc.collect(2 if everything else 1)

    def leave(self) -> None:
        """No node is running: what follows is the world's own."""
        self.current = None
        asyncio._set_running_loop(None)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        outer = asyncio._get_running_loop()
        outer_task = None if outer is None else asyncio.current_task(outer)
        if outer is not None and outer_task is not None:
            asyncio.tasks._leave_task(outer, outer_task)
        hooks = sys.get_asyncgen_hooks()
        collecting = gc.isenabled()
        gc.collect(1)
        gc.disable()
        self.running = True
        try:
            with guard.installed(self):
                yield
        finally:
            self.running = False
            self.current = None
            asyncio._set_running_loop(outer)
            if outer is not None and outer_task is not None:
                asyncio.tasks._enter_task(outer, outer_task)
            sys.set_asyncgen_hooks(*hooks)
            if collecting:
                gc.enable()

    def wall_s(self) -> float:
        """The wall clock of whoever is running: the current node's, or the world's own."""
        return self.now + EPOCH_S if self.current is None else self.current.clock.wall_s()

    def clear(self) -> None:
        """Forget all that is scheduled; part of closing a world."""
        self._heap.clear()

"""While a world steps, its thread gets virtual time, and neither threads, sockets nor unseeded randomness.

Theory of operation ------------------- Nodes are given their clock, randomness and loop, but libraries (``logging``,
aiohttp's ``Date`` header) reach for ``time``, and a mistake may reach for anything. So for as long as a world steps,
the entry points are patched:

* ``time.time()`` and its relatives return the running node's virtual time;
* threads, processes, ``time.sleep``, entropy (``os.urandom``, ``uuid``, ``secrets``, an unseeded ``random.Random()``)
  and the global random generator raise :class:`DeterminismError` with the stack of the call, and stop the run;
* ``socket.socket()`` gives a :class:`~gostore.sim.sockets.SimSocket`, which the simulated loop can connect and which
  raises on any use of the operating system.

The patches decide by the identity of the calling thread: other threads of the process (a notebook's input and output
threads, another test) get the real thing, always. They are put in by the first world that steps and taken out after the
last, exception or not. The patched functions are made once, at import.

Out of reach: ``datetime.now()`` and C extensions that read the clock on their own; names taken by ``from time import
monotonic`` before (those of the libraries that we use are listed in ``_TAKEN``); reading files (imports and tracebacks
do).
"""

from __future__ import annotations

import _thread
import functools
import os
import random
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn

from gostore.sim.errors import DeterminismError

if TYPE_CHECKING:
    from gostore.sim.scheduler import Scheduler

_worlds: dict[int, Scheduler] = {}
"""The world that each thread is stepping."""

_lock = threading.Lock()
_saved: list[tuple[Any, str, Any]] = []

# Frames of these files say nothing about who is to blame.
_UNINTERESTING = (os.sep + "asyncio" + os.sep, __file__)


def inside() -> bool:
    """Whether the calling thread is stepping a world."""
    return get_ident() in _worlds


def world_of_thread() -> Scheduler | None:
    """The world that the calling thread is stepping."""
    return _worlds.get(get_ident())


def forbid(what: str) -> NoReturn:
    """Raise :class:`DeterminismError` with the stack, and have the run raise it too, should the caller swallow it."""
    frames = [f for f in traceback.extract_stack()[:-1] if not any(part in f.filename for part in _UNINTERESTING)]
    stack = "".join(traceback.format_list(frames[-12:]))
    world = world_of_thread()
    node = None if world is None or world.current is None else world.current.name
    error = DeterminismError(
        f"{what}\nThe same seed would not give the same run. The call came from:\n{stack}",
        seed="?" if world is None else world.seed,
        time_s=0.0 if world is None else world.now,
        node=node,
    )
    if world is not None:
        world.fail(error)
    raise error


@contextmanager
def installed(world: Scheduler) -> Iterator[None]:
    """Guard the calling thread, which is about to step ``world``."""
    thread = get_ident()
    with _lock:
        if not _worlds:
            _install()
        outer, _worlds[thread] = _worlds.get(thread), world
    try:
        yield
    finally:
        with _lock:
            if outer is None:
                del _worlds[thread]
            else:
                _worlds[thread] = outer
            if not _worlds:
                _restore()


@contextmanager
def suspended() -> Iterator[None]:
    """Lift the guard from the calling thread for a moment: for what a harness must do for real (a progress bar)."""
    thread = get_ident()
    world = _worlds.pop(thread, None)
    try:
        yield
    finally:
        if world is not None:
            _worlds[thread] = world


# -- the patches


def _virtual_time(real: Callable[[], Any], convert: Callable[[Scheduler], Any]) -> Callable[[], Any]:
    worlds = _worlds

    @functools.wraps(real)
    def patched() -> Any:
        world = worlds.get(get_ident())
        return real() if world is None else convert(world)

    return patched


def _defaults_to_now(real: Callable[..., Any], position: int) -> Callable[..., Any]:
    """A function of ``time`` whose argument at ``position`` defaults to the present."""

    @functools.wraps(real)
    def patched(*args: Any) -> Any:
        world = _worlds.get(get_ident())
        if world is None or (len(args) > position and args[position] is not None):
            return real(*args)
        if real is _real_strftime:
            return real(*args, time.localtime(world.wall_s()))
        if real is _real_asctime:
            return real(time.localtime(world.wall_s()))
        return real(world.wall_s())

    return patched


def _forbidden(real: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(real)
    def patched(*args: Any, **keywords: Any) -> Any:
        if get_ident() in _worlds:
            forbid(what)
        return real(*args, **keywords)

    return patched


def _new_socket(cls: Any, *args: Any, **keywords: Any) -> Any:
    world = _worlds.get(get_ident())
    if world is None:
        return _real_new_socket(cls)
    from gostore.sim.sockets import SimSocket  # it needs forbid()

    return SimSocket(*args, **keywords)


def _seed(self: random.Random, a: Any = None, version: int = 2) -> None:
    if a is None and get_ident() in _worlds:
        forbid("random.Random() without a seed takes one from the operating system; use env.rng")
    _real_seed(self, a, version)


_real_new_socket = socket.socket.__new__
_real_seed = random.Random.seed
_real_strftime = time.strftime
_real_asctime = time.asctime

_RANDOM_FUNCTIONS = [name for name in random.__all__ if callable(getattr(random, name)) and name[0].islower()]


_ENTROPY = "entropy of the operating system (os.urandom, secrets, uuid); use env.rng"
_THREADS = "a thread: its timing cannot be replayed; use a task"
_PROCESSES = "another process cannot be part of a simulated world"


def _patches() -> list[tuple[Any, str, Any]]:
    seconds: Callable[[Scheduler], float] = lambda world: world.now  # noqa: E731
    nanoseconds: Callable[[Scheduler], int] = lambda world: round(world.now * 1e9)  # noqa: E731
    patches: list[tuple[Any, str, Any]] = [
        (time, "time", _virtual_time(time.time, lambda world: world.wall_s())),
        (time, "time_ns", _virtual_time(time.time_ns, lambda world: round(world.wall_s() * 1e9))),
        (time, "sleep", _forbidden(time.sleep, "time.sleep blocks the whole world; use asyncio.sleep")),
        (time, "gmtime", _defaults_to_now(time.gmtime, 0)),
        (time, "localtime", _defaults_to_now(time.localtime, 0)),
        (time, "ctime", _defaults_to_now(time.ctime, 0)),
        (time, "asctime", _defaults_to_now(time.asctime, 0)),
        (time, "strftime", _defaults_to_now(time.strftime, 1)),
        (os, "urandom", _forbidden(os.urandom, _ENTROPY)),
        (random, "_urandom", _forbidden(os.urandom, _ENTROPY)),
        (uuid, "uuid1", _forbidden(uuid.uuid1, _ENTROPY)),
        (threading.Thread, "start", _forbidden(threading.Thread.start, _THREADS)),
        (_thread, "start_new_thread", _forbidden(_thread.start_new_thread, _THREADS)),
        (subprocess.Popen, "__init__", _forbidden(subprocess.Popen.__init__, _PROCESSES)),
        (random.Random, "seed", _seed),
        (socket.socket, "__new__", staticmethod(_new_socket)),
    ]
    for clock in ("monotonic", "perf_counter", "process_time", "thread_time"):
        patches.append((time, clock, _virtual_time(getattr(time, clock), seconds)))
        patches.append((time, f"{clock}_ns", _virtual_time(getattr(time, f"{clock}_ns"), nanoseconds)))
    for name, what in (("getrandom", _ENTROPY), ("fork", _PROCESSES), ("posix_spawn", _PROCESSES)):
        if hasattr(os, name):
            patches.append((os, name, _forbidden(getattr(os, name), what)))
    for name in ("socketpair", "fromfd", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo"):
        what = f"socket.{name} asks the operating system; use the loop's own methods"
        patches.append((socket, name, _forbidden(getattr(socket, name), what)))
    for name in _RANDOM_FUNCTIONS:
        what = f"random.{name} uses the generator that the whole process shares; use env.rng"
        patches.append((random, name, _forbidden(getattr(random, name), what)))
    return patches


class _WorldRandom:
    """In place of the module ``random`` in a library that needs no more than fairness from it."""

    def __getattr__(self, name: str) -> Any:
        world = _worlds.get(get_ident())
        return getattr(random if world is None else world.library_random, name)


_PATCHES = _patches()

# Names that libraries took for themselves when they were imported: (module, name, what they get instead).
_TAKEN = [
    ("aiohttp.connector", "monotonic", next(new for owner, name, new in _PATCHES if name == "monotonic")),
    ("aiohttp.connector", "random", _WorldRandom()),  # it shuffles the queues of waiters
]


def _install() -> None:
    for owner, name, new in _PATCHES:
        _saved.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, new)
    for module, name, new in _TAKEN:
        owner = sys.modules.get(module)
        if owner is not None and name in owner.__dict__:
            _saved.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, new)


def _restore() -> None:
    while _saved:
        owner, name, old = _saved.pop()
        if old is None:
            delattr(owner, name)  # it was inherited
        else:
            setattr(owner, name, old)

"""How a world ends: its suspended coroutines are freed without running a line of them.

Theory of operation ------------------- Dropping the last reference to a suspended coroutine or generator throws
``GeneratorExit`` into it: its ``finally`` blocks and ``async with`` exits run. For a node that has crashed that would
be life after death, and for a world that is over it would be life at a random moment. There is no call to drop a frame
silently, but there is a rule: an object's finalizer runs at most once (PEP 442), and CPython notes in a bit of the
object's garbage collection header that it has run (``gc.is_finalized`` reads it). We set that bit on every suspended
coroutine and generator of the world; freeing one then releases its frame and everything in it, and runs nothing.

They are found by walking the object graph from the world's tasks, through coroutines, their frames' values and
whatever those refer to, but not through modules, classes and functions, which lead out of the world. The walk is
bounded; should it miss something (or should the bit not be where we expect it: :func:`silencing_works` tries it), a
second line holds: a closed world ignores every call to its loops, and its network and disks are reachable only through
those.

Setting the bit on a generator of somebody else (a fixture that a test's closure refers to) has no effect on it unless
it, too, is dropped half way.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import sys
import types
from collections.abc import Generator, Iterable
from functools import cache
from typing import Any, Final

# The header lies directly before the object: two words, of which the second carries flags in its low bits
# (Include/internal/pycore_gc.h: _PyGC_PREV_MASK_FINALIZED).
_FLAGS_BEFORE_OBJECT_BYTES: Final = ctypes.sizeof(ctypes.c_size_t)
_FINALIZED: Final = 1

# Objects examined when a world closes. Five nodes have some ten thousand; above the bound the second line holds.
OBJECTS_MAX: Final = 1_000_000

_SUSPENDABLE: Final = frozenset({types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType})
_DEAD_ENDS: Final = frozenset(
    {
        # These refer to nothing of interest,
        *(str, bytes, bytearray, int, float, bool, type(None), types.CodeType, types.BuiltinFunctionType),
        # and these lead out of the world (a frame, to those that called it).
        *(types.ModuleType, type, types.FrameType, logging.Logger, logging.RootLogger),
    }
)
_BATCH: Final = 1_000


def silence(things: Iterable[Any]) -> int:
    """Make sure that no suspended coroutine or generator reachable from ``things`` runs when it is freed.

    Returns how many there were.
    """
    if not silencing_works():
        return 0
    found = _suspended(things)
    for suspended in found:
        _silence(suspended)
    return len(found)


def _silence(suspended: Any) -> None:
    ctypes.c_size_t.from_address(id(suspended) - _FLAGS_BEFORE_OBJECT_BYTES).value |= _FINALIZED


def _is_suspended(thing: Any) -> bool:
    match thing:
        case types.CoroutineType():
            return thing.cr_frame is not None and not thing.cr_running
        case types.AsyncGeneratorType():
            return thing.ag_frame is not None and not thing.ag_running
        case _:
            return thing.gi_frame is not None and not thing.gi_running


def _suspended(things: Iterable[Any]) -> list[Any]:
    """All suspended coroutines and generators reachable from ``things``, breadth first."""
    found: list[Any] = []
    layer: list[Any] = list(things)
    seen = {id(thing) for thing in layer}
    keep: list[Any] = [layer]  # an address means an object only as long as the object lives
    while layer and len(seen) < OBJECTS_MAX:
        found += [thing for thing in layer if type(thing) in _SUSPENDABLE and _is_suspended(thing)]
        following: list[Any] = []
        for start in range(0, len(layer), _BATCH):
            for thing in _referents(layer[start : start + _BATCH]):
                if type(thing) not in _DEAD_ENDS and id(thing) not in seen:
                    seen.add(id(thing))
                    following.append(thing)
        layer = following
        keep.append(layer)
    return found


def _referents(things: list[Any]) -> list[Any]:
    plain: list[Any] = []
    found: list[Any] = []
    for thing in things:
        if type(thing) is types.FunctionType:
            # Its globals are a module's; what it has closed over is the world's.
            found.extend((thing.__closure__ or ()) + (thing.__defaults__ or ()))
        elif isinstance(thing, (asyncio.AbstractEventLoop, type)) and not hasattr(thing, "scheduler"):
            continue  # the loop around the world; a class with a metaclass
        else:
            plain.append(thing)
    return found + gc.get_referents(*plain)


@cache
def silencing_works() -> bool:
    """Whether this interpreter keeps the bit where we expect it: tried on a generator of our own, once."""
    if sys.implementation.name != "cpython" or "free-threading" in sys.version:
        return False
    ran: list[bool] = []

    def generator() -> Generator[None, None, None]:
        try:
            yield
        finally:
            ran.append(True)

    victim = generator()
    next(victim)
    _silence(victim)
    flagged = gc.is_finalized(victim)
    del victim
    return flagged and not ran

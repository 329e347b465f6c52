"""What can go wrong with a simulation itself, as opposed to inside it."""

from __future__ import annotations

from typing import Final

from gostore.core.errors import BadRequest, GoStoreError, PolicyError, Timeout

LOCATED: Final = (BadRequest, PolicyError, Timeout)
"""What a harness did wrong, or waited for in vain: these say where in which run it was."""


def where(seed: int | str, time_s: float, node: str | None = None) -> str:
    """The end of a message: which run, and when in it."""
    return f" [seed {seed!r}, virtual time {time_s:.6f} s" + (f", node {node}]" if node else "]")


def locate(error: GoStoreError, seed: int | str, time_s: float) -> None:
    """Let an error that ends up with the harness name its run; seed and virtual time are in ``details``, too."""
    if isinstance(error, LOCATED) and "seed" not in error.details:
        first, newline, rest = error.message.partition("\n")  # below it: a line of code, the end of a log
        error.message = f"{first}{where(seed, time_s, error.details.get('node'))}{newline}{rest}"
        error.args = (error.message,)
        error.details |= {"seed": seed, "time_s": time_s}


class SimulationError(RuntimeError):
    """A run cannot go on or did not end; the message names seed and virtual time, and the node where there is one.

    ``seed``, ``time_s`` (virtual seconds) and ``node`` are attributes, so that a harness can build its replay from
    them.
    """

    def __init__(self, message: str, *, seed: int | str, time_s: float, node: str | None = None) -> None:
        super().__init__(f"{message}{where(seed, time_s, node)}")
        self.seed = seed
        self.time_s = time_s
        self.node = node


class DeterminismError(SimulationError):
    """Code inside the world touched real time, a thread, a real socket or unseeded randomness.

    The message carries the stack of the call. It is raised at the call and, should that be swallowed, again by the run.
    """


class LimitError(SimulationError):
    """The run reached its limit of virtual time or callbacks before what it waited for came true."""


class Stopped(SimulationError):
    """The run has reached the event at which it was told to stop; the world stands still and can be looked at."""

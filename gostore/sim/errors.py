"""What can go wrong with a simulation itself, as opposed to inside it."""

from __future__ import annotations


class SimulationError(RuntimeError):
    """A run cannot go on or did not end; the message names seed and virtual time, and the node where there is one.

    ``seed``, ``time_s`` (virtual seconds) and ``node`` are attributes, so that a harness can build its replay from
    them.
    """

    def __init__(self, message: str, *, seed: int | str, time_s: float, node: str | None = None) -> None:
        where = f"seed {seed!r}, virtual time {time_s:.6f} s" + (f", node {node}" if node else "")
        super().__init__(f"{message} [{where}]")
        self.seed = seed
        self.time_s = time_s
        self.node = node


class DeterminismError(SimulationError):
    """Code inside the world touched real time, a thread, a real socket or unseeded randomness.

    The message carries the stack of the call. It is raised at the call and, should that be swallowed, again by the run.
    """


class LimitError(SimulationError):
    """The run reached its limit of virtual time or callbacks before what it waited for came true."""

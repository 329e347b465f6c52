"""Hybrid logical clocks.

Kulkarni, Demirbas, Madappa, Avva, Leone: "Logical Physical Clocks" (OPODIS 2014), section 4. A stamp is one 64-bit
integer: 48 bits of wall-clock milliseconds above a 16-bit logical counter, so that stamps compare as integers, stay
close to wall time, and respect causality (send < receive).
"""

from __future__ import annotations

LOGICAL_BITS = 16
_LOGICAL_MASK = (1 << LOGICAL_BITS) - 1
STAMP_MAX = (1 << 64) - 1

# A peer whose clock runs ahead drags everybody's stamps with it; beyond this the stamp is ignored, not adopted.
# Larger: tolerates worse clocks; smaller: stamps stay nearer to wall time. Milliseconds.
DRIFT_MS_MAX = 60_000


def stamp_wall_ms(stamp: int) -> int:
    """The wall-clock part of a stamp, in milliseconds since 1970."""
    return stamp >> LOGICAL_BITS


class HybridClock:
    """The clock of one node; pure: wall time is an argument, in milliseconds since 1970."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = 0

    def tick(self, wall_ms: int) -> int:
        """The stamp of a local event or a send."""
        physical = wall_ms << LOGICAL_BITS
        # A counter that overflows carries into the milliseconds: the order is kept, the time is a little ahead.
        self.last = physical if physical > self.last else self.last + 1
        return self.last

    def peek(self, wall_ms: int) -> int:
        """The stamp of a local event that no message tells of: the clock is read and not advanced.

        So whoever watches a node changes no stamp that travels. It is not later than the next tick, unless the wall
        clock is set back in between.
        """
        return max(self.last, wall_ms << LOGICAL_BITS)

    def merge(self, remote: int, wall_ms: int) -> int:
        """The stamp of a receive: later than the sender's and than everything here."""
        if remote > self.last and stamp_wall_ms(remote) <= wall_ms + DRIFT_MS_MAX:
            self.last = remote
        return self.tick(wall_ms)

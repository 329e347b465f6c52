"""The wall clock of a simulated machine: it can be wrong, run fast or slow, and jump."""

from __future__ import annotations

from gostore.sim.scheduler import EPOCH_S, Scheduler


class SimClock:
    """``wall = base + (virtual time - since) * rate``. Monotonic time (``loop.time()``) is never affected."""

    __slots__ = ("_base", "_rate", "_scheduler", "_since")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._base = EPOCH_S + scheduler.now
        self._since = scheduler.now
        self._rate = 1.0

    def wall_s(self) -> float:
        return self._base + (self._scheduler.now - self._since) * self._rate

    def jump(self, seconds: float) -> None:
        """Set the clock forward, or back when negative, at once."""
        self._rebase(self.wall_s() + seconds, self._rate)

    def drift(self, rate: float) -> None:
        """From now on run at ``rate`` times true time: 1.0001 gains 100 ppm. Raises ``ValueError`` unless positive."""
        if not rate > 0:
            raise ValueError(f"rate = {rate!r}: a clock runs forward; expected a number above 0")
        self._rebase(self.wall_s(), rate)

    def set_offset(self, seconds: float) -> None:
        """Be this much ahead of true time (behind when negative)."""
        self._rebase(EPOCH_S + self._scheduler.now + seconds, self._rate)

    def offset_s(self) -> float:
        """How much it is ahead of true time."""
        return self.wall_s() - EPOCH_S - self._scheduler.now

    def heal(self) -> None:
        """True time and true rate again."""
        self._rebase(EPOCH_S + self._scheduler.now, 1.0)

    def _rebase(self, wall_s: float, rate: float) -> None:
        self._base = wall_s
        self._since = self._scheduler.now
        self._rate = rate

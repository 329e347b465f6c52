"""Faults in the transport: loss, delay, duplicates, reordering and partitions, per peer and direction.

They act on frames, between the calls and the packets: after the replay window on the way in and before the packet's
counter on the way out, so that an injected duplicate reaches the call table as a duplicate should. They need no
privileges and exist in both worlds. On a stream a lost frame cuts the connection: TCP delivers everything or breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gostore.core.errors import BadRequest
from gostore.core.ports import Rng

# A reordered frame, and the copy of a duplicated one, come up to this much later, so that others overtake. Seconds.
OVERTAKE_S_MAX: Final = 0.02
DELAY_S_MAX: Final = 60.0
# Frames held back by delays at one endpoint; beyond, they are dropped.
DELAYED_FRAMES_MAX: Final = 65_536
DIRECTIONS: Final = ("out", "in", "both")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the frames of one link in one direction; probabilities from 0 to 1, times in seconds."""

    drop: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop", "duplicate", "reorder"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise BadRequest(f"{name} = {getattr(self, name)!r}: allowed is a probability from 0 to 1")
        for name in ("delay_s", "jitter_s"):
            if not 0.0 <= getattr(self, name) <= DELAY_S_MAX:
                raise BadRequest(f"{name} = {getattr(self, name)!r}: allowed are 0 to {DELAY_S_MAX} seconds")

    def plan(self, rng: Rng) -> list[float]:
        """The delay of each copy of one frame that is to arrive; empty when it is lost."""
        if self.drop and rng.random() < self.drop:
            return []
        delays = [self.delay_s + (rng.uniform(0.0, self.jitter_s) if self.jitter_s else 0.0)]
        if self.reorder and rng.random() < self.reorder:
            delays[0] += rng.uniform(0.0, OVERTAKE_S_MAX)
        if self.duplicate and rng.random() < self.duplicate:
            delays.append(delays[0] + rng.uniform(0.0, OVERTAKE_S_MAX))
        return delays


class Links:
    """The faults of one endpoint's links. Empty mappings cost the hot path one test each."""

    __slots__ = ("incoming", "outgoing")

    def __init__(self) -> None:
        self.outgoing: dict[str, Fault] = {}
        self.incoming: dict[str, Fault] = {}

    def set(
        self,
        peer: str,
        direction: str = "both",
        *,
        drop: float = 0.0,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
    ) -> None:
        """Replace the faults between this endpoint and ``peer`` (``drop=1.0`` is a partition).

        Raises :class:`BadRequest` for values out of range.
        """
        if direction not in DIRECTIONS:
            raise BadRequest(f"direction = {direction!r}: allowed are {', '.join(DIRECTIONS)}")
        fault = Fault(drop, delay_s, jitter_s, duplicate, reorder)
        for name, faults in (("out", self.outgoing), ("in", self.incoming)):
            if direction in (name, "both"):
                if fault == Fault():
                    faults.pop(peer, None)
                else:
                    faults[peer] = fault

    def clear(self, peer: str | None = None) -> None:
        """End the faults of one link, or of all."""
        for faults in (self.outgoing, self.incoming):
            if peer is None:
                faults.clear()
            else:
                faults.pop(peer, None)

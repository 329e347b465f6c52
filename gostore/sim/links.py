"""What lies between two hosts: latency, loss, duplication, reordering and cuts, for each direction.

A link is a direction: ``links.get("n1", "n2")`` is what n1's packets to n2 meet. All directions share one default
until somebody changes one of them, so that a thousand nodes do not make a million links.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

# Points of the latency distribution kept in a table: drawing from it costs a tenth of drawing a logarithmic normal
# variate, and its largest value is the 1 - 1/2048 quantile, which bounds the natural latency.
_QUANTILES = 1024


@lru_cache(maxsize=64)
def _quantiles(sigma: float) -> tuple[float, ...]:
    normal = NormalDist()
    return tuple(math.exp(sigma * normal.inv_cdf((i + 0.5) / _QUANTILES)) for i in range(_QUANTILES))


def latency_factor(rng: random.Random, sigma: float) -> float:
    """A draw from the log-normal distribution of median 1 and shape ``sigma``."""
    return _quantiles(sigma)[int(rng.random() * _QUANTILES)]


@dataclass(slots=True)
class Link:
    """One direction between two hosts. Times in seconds, the others are probabilities from 0 to 1.

    Latency is ``latency_s`` times a log-normal factor of median 1 and shape ``sigma``, plus ``delay_s``, plus a
    uniform draw up to ``jitter_s``. ``reorder`` holds a datagram back by up to ten latencies; ``cut`` loses
    everything.
    """

    latency_s: float = 0.000_5
    sigma: float = 0.35
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    cut: bool = False

    def __post_init__(self) -> None:
        for name in ("latency_s", "sigma", "delay_s", "jitter_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected seconds, 0 or more")
        for name in ("loss", "duplicate", "reorder"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a probability from 0 to 1")

    def draw_s(self, rng: random.Random) -> float:
        """The latency of one packet."""
        latency_s = self.latency_s * _quantiles(self.sigma)[int(rng.random() * _QUANTILES)] + self.delay_s
        return latency_s + rng.random() * self.jitter_s if self.jitter_s else latency_s


class Links:
    """The links of a network: a default, and the directions that differ from it."""

    __slots__ = ("_special", "default")

    def __init__(self, default: Link) -> None:
        self.default = default
        self._special: dict[tuple[str, str], Link] = {}

    def get(self, source: str, target: str) -> Link:
        """What packets from ``source`` to ``target`` (names of nodes) meet."""
        if self._special:
            return self._special.get((source, target), self.default)
        return self.default

    def set(self, source: str, target: str, **changes: float | bool) -> None:
        """Change one direction; fields are those of :class:`Link`. Raises ``TypeError`` or ``ValueError``."""
        self._special[source, target] = dataclasses.replace(self.get(source, target), **changes)  # type: ignore[arg-type]

    def clear(self, source: str | None = None, target: str | None = None) -> None:
        """Put directions back to the default: those from ``source``, to ``target``, or all."""
        for pair in list(self._special):
            if source in (None, pair[0]) and target in (None, pair[1]):
                del self._special[pair]

    def __iter__(self) -> Iterator[tuple[str, str, Link]]:
        """The directions that differ, as (source, target, link), in the order in which they were changed."""
        for (source, target), link in self._special.items():
            yield source, target, link

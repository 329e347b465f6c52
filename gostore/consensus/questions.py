"""The reads at one replica: those that wait for an index, and those that wait until it is applied. Pure.

A follower asks its leader once for all reads of a turn. An answer that does not come in time, or a leader that is none
any more, fails them: nothing has happened, so whoever reads asks again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from gostore.consensus.ready import ReadState
from gostore.core.ports import Rng


class Questions:
    """``contexts`` are the driver's names for its reads."""

    def __init__(self, reads_max: int, timeout_s: float, rng: Rng) -> None:
        self._reads_max = reads_max
        self._timeout_s = timeout_s
        self._confirmed: deque[tuple[int, int]] = deque()  # (context, index) to be applied
        self._failed: list[int] = []
        self._new: list[int] = []
        self._asked: dict[int, tuple[list[int], float]] = {}  # number -> (contexts, until)
        # Never the number of an earlier life: an answer to that one would be too old.
        self._number = rng.getrandbits(60)

    @property
    def deadline_s(self) -> float:
        if not self._asked:
            return math.inf
        return min((until_s for _, until_s in self._asked.values()), default=math.inf)

    @property
    def full(self) -> bool:
        """So many have an index and wait for the state machine that no more are taken."""
        return len(self._confirmed) >= self._reads_max

    def add(self, context: int) -> bool:
        """One for the leader elsewhere. False: too many wait."""
        if len(self._new) + sum(len(contexts) for contexts, _ in self._asked.values()) >= self._reads_max:
            return False
        self._new.append(context)
        return True

    def ask(self, now_s: float) -> int | None:
        """The number of a question to the leader, for all that were added since the last one; None: there are none."""
        if not self._new:
            return None
        self._number += 1
        self._asked[self._number] = (self._new, now_s + self._timeout_s)
        self._new = []
        return self._number

    def answered(self, number: int, index: int | None) -> None:
        """By the leader; None: it does not lead."""
        contexts, _ = self._asked.pop(number, ([], 0.0))
        if index is None:
            self._failed += contexts
        else:
            self.confirm((context, index) for context in contexts)

    def confirm(self, reads: Iterable[tuple[int, int]]) -> None:
        """These contexts have their indices."""
        self._confirmed.extend(reads)

    def fail(self, contexts: Iterable[int]) -> None:
        self._failed += contexts

    def expire(self, now_s: float) -> None:
        for number in [number for number, (_, until_s) in self._asked.items() if now_s >= until_s]:
            self._failed += self._asked.pop(number)[0]

    def forget(self) -> None:
        """Who was asked does not lead any more."""
        self._failed += self._new
        for contexts, _ in self._asked.values():
            self._failed += contexts
        self._new = []
        self._asked.clear()

    def answerable(self, applied: int) -> bool:
        """Whether :meth:`take` would give anything."""
        return bool(self._failed or (self._confirmed and self._confirmed[0][1] <= applied))

    def take(self, applied: int) -> tuple[ReadState, ...]:
        """The answers that there are when so much is applied."""
        found = [ReadState(context, None) for context in self._failed]
        self._failed = []
        while self._confirmed and self._confirmed[0][1] <= applied:
            found.append(ReadState(*self._confirmed.popleft()))
        return tuple(found)

"""Failure detectors on a network that loses messages, in virtual time."""

import heapq
import random
from collections.abc import Callable

from gostore.services.cls.swim import (
    PROFILES,
    Message,
    Send,
    Swim,
)

FAST = PROFILES["fast"]


class Network:
    """Many detectors and a heap of messages in virtual time; everything is a function of the seed."""

    def __init__(self, count: int, seed: int, swim: type[Swim] = Swim, loss: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.loss = loss
        self.down: dict[str, None] = {}
        self.cut: Callable[[str, str], bool] = lambda source, to: False
        self.log: list[tuple[float, str, object]] = []
        self._heap: list[tuple[float, int, str, str, Message]] = []
        self._number = 0
        names = [f"n{i}" for i in range(count)]
        self.swims = {name: swim(name, 1, FAST, random.Random(f"{seed} {name}"), 0.0) for name in names}
        for one in self.swims.values():
            for name in names:
                one.add(name, 1)

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end_s = self.now_s + seconds
        while not until():
            live = [s for name, s in self.swims.items() if name not in self.down]
            timer_s, name = min((s.due_s, s.name) for s in live)
            message_s = self._heap[0][0] if self._heap else float("inf")
            if min(timer_s, message_s) > end_s:
                self.now_s = end_s
                return
            if message_s <= timer_s:
                self.now_s, _, source, to, message = heapq.heappop(self._heap)
                if to in self.swims and to not in self.down:
                    self.perform(to, self.swims[to].receive(source, message, self.now_s))
            else:
                self.now_s = max(self.now_s, timer_s)
                self.perform(name, self.swims[name].tick(self.now_s))

    def perform(self, name: str, effects: list[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                lost = self.rng.random() < self.loss or self.cut(name, effect.to)
                if not lost:
                    self._number += 1
                    arrival_s = self.now_s + self.rng.uniform(0.0002, 0.004)
                    heapq.heappush(self._heap, (arrival_s, self._number, name, effect.to, effect.message))
            else:
                self.log.append((self.now_s, name, effect))

    def of_kind(self, kind: type) -> list[tuple[float, str, object]]:
        return [entry for entry in self.log if isinstance(entry[2], kind)]

    def think(self, status: str, of: str) -> list[str]:
        return [n for n, s in self.swims.items() if n not in self.down and n != of and s.status(of) == status]


def pair(incarnation: int = 1) -> Swim:
    swim = Swim("a", incarnation, FAST, random.Random(1), 0.0)
    swim.add("b", 1)
    return swim


def sends(effects: list[object]) -> list[Send]:
    return [effect for effect in effects if isinstance(effect, Send)]

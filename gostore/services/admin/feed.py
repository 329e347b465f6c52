"""Sends a node's events to a journal elsewhere: in batches, acknowledged, bounded, with every gap visible.

A batch says ``after`` and ``upto``: all events of the wanted categories with ``after < number <= upto`` are in it, but
for ``sampled`` message events that the rate limit left out. What a full buffer dropped shows as a batch whose ``after``
is beyond the last ``upto``: the journal sees the gap, and a check answers "unknown" instead of "fine".
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from gostore.comm import Endpoint
from gostore.core.address import Address
from gostore.core.errors import GoStoreError
from gostore.core.events import Event
from gostore.env import Env

BATCH_EVENTS_MAX: Final = 256
BUFFER_EVENTS_MAX: Final = 8_192
"""Events that wait for a slow journal. More: rides out longer stalls; each takes about half a kilobyte."""

BATCH_INTERVAL_S: Final = 0.05
"""How long events gather. Longer: fewer messages; shorter: a livelier picture (20 a second is what the eye follows)."""

SILENCE_S_MAX: Final = 10.0
"""A journal that acknowledged nothing for this long is gone."""

DELIVERY_TIMEOUT_S: Final = 2.0


class Feed:
    """One subscription of one journal. ``message_rate``: message events a second; 0 none, below 0 all."""

    def __init__(
        self, env: Env, endpoint: Endpoint, subscription: str, to: Address, categories: list[str], message_rate: float
    ) -> None:
        self._env = env
        self._endpoint = endpoint
        self._subscription = subscription
        self._to = to
        self._rate = message_rate
        self._allowance = 1.0
        self._refilled_s = asyncio.get_running_loop().time()
        self._buffer: deque[Event] = deque()
        self._after = env.events.seq
        self._upto = self._after
        self._sampled = 0
        self._some = asyncio.Event()
        if message_rate == 0:
            categories = [category for category in categories if category != "message"]
        self._unsubscribe: Callable[[], None] = env.events.subscribe(self._on_event, categories)

    def close(self) -> None:
        self._unsubscribe()

    def _on_event(self, event: Event) -> None:
        self._upto = event.seq
        if event.category == "message" and not self._allowed():
            self._sampled += 1
            return
        if len(self._buffer) == BUFFER_EVENTS_MAX:
            # The oldest goes, and `after` moves past it: a gap that the journal sees.
            self._after = self._buffer.popleft().seq
        self._buffer.append(event)
        self._some.set()

    def _allowed(self) -> bool:
        """A token bucket that holds one tenth of a second's worth."""
        if self._rate < 0:
            return True
        now = asyncio.get_running_loop().time()
        self._allowance = min(max(1.0, self._rate / 10), self._allowance + (now - self._refilled_s) * self._rate)
        self._refilled_s = now
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True

    async def run(self) -> None:
        """Deliver until the journal has been silent for too long."""
        loop = asyncio.get_running_loop()
        heard_s = loop.time()
        while loop.time() - heard_s < SILENCE_S_MAX:
            await self._some.wait()
            batch = [self._buffer[i] for i in range(min(BATCH_EVENTS_MAX, len(self._buffer)))]
            whole = len(batch) == len(self._buffer)
            after, upto = self._after, self._upto if whole else batch[-1].seq
            sampled, self._sampled = self._sampled, 0
            if await self._deliver(after, upto, sampled, batch):
                heard_s = loop.time()
                self._settle(upto)
            else:
                self._sampled += sampled
            await asyncio.sleep(BATCH_INTERVAL_S if whole else 0)
        self.close()

    async def _deliver(self, after: int, upto: int, sampled: int, batch: list[Event]) -> bool:
        events: list[Any] = [event.to_wire() for event in batch]
        arguments = (self._subscription, self._env.name, self._endpoint.incarnation, after, upto, sampled, events)
        try:
            await self._endpoint.call(self._to, "journal", "deliver", *arguments, timeout_s=DELIVERY_TIMEOUT_S)
        except GoStoreError as error:
            self._env.log.debug("journal at %s: %s", self._to, error)
            return False
        return True

    def _settle(self, upto: int) -> None:
        """Forget what was delivered. Events that came meanwhile, or a gap made meanwhile, stay as they are."""
        while self._buffer and self._buffer[0].seq <= upto:
            self._buffer.popleft()
        self._after = max(self._after, upto)
        if not self._buffer:
            self._some.clear()

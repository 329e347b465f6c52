"""What a journal is told: everything, in order, or that something is missing."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.comm import Reply
from gostore.core.address import Address
from gostore.core.errors import Timeout
from gostore.core.events import Events
from gostore.services.admin import feed as module
from gostore.services.admin.feed import Feed


class World:
    """As much of ``Env`` and ``Endpoint`` as a feed needs; ``answers`` says which deliveries arrive."""

    def __init__(self, answers: list[bool]) -> None:
        self.name, self.incarnation, self.log = "n1", 1, logging.getLogger("test")
        self.events = Events("n1", stamp=lambda: 1, time_s=lambda: 0.0)
        self.answers = answers
        self.batches: list[tuple[int, int, int, list[int]]] = []
        self.delivered = asyncio.Event()

    async def call(self, to: Any, service: str, function: str, *args: Any, timeout_s: float) -> Reply:
        if self.answers and not self.answers.pop(0):
            raise Timeout("lost")
        _, _, _, after, upto, sampled, events = args
        self.batches.append((after, upto, sampled, [event[1] for event in events]))
        self.delivered.set()
        return Reply()


def run(bursts: list[int], answers: list[bool], *, rate: float = -1.0, buffer: int = 64, batch: int = 8) -> World:
    async def main() -> World:
        world = World(answers)
        world.events.subscribe(lambda event: None)  # numbers go on whoever listens
        feed = Feed(world, world, "s", Address("h", 1, 1), ["cls", "message"], rate)  # type: ignore[arg-type]
        task = asyncio.ensure_future(feed.run())
        for burst in bursts:
            for _ in range(burst):
                world.events.publish("view", epoch=1, online=[])
            await asyncio.sleep(0)
        while not world.batches or world.batches[-1][1] < world.events.seq:
            await world.delivered.wait()
            world.delivered.clear()
        task.cancel()
        await asyncio.wait([task])
        feed.close()
        return world

    saved = module.BUFFER_EVENTS_MAX, module.BATCH_EVENTS_MAX, module.BATCH_INTERVAL_S
    module.BUFFER_EVENTS_MAX, module.BATCH_EVENTS_MAX, module.BATCH_INTERVAL_S = buffer, batch, 0.0  # type: ignore[misc]
    try:
        return asyncio.run(asyncio.wait_for(main(), 30))
    finally:
        module.BUFFER_EVENTS_MAX, module.BATCH_EVENTS_MAX, module.BATCH_INTERVAL_S = saved  # type: ignore[misc]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), st.lists(st.booleans(), max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_event_arrives_or_its_absence_shows(bursts: list[int], answers: list[bool]) -> None:
    world = run(bursts, answers)
    known = 0
    for after, upto, _, numbers in world.batches:
        assert numbers == [n for n in range(max(after, 0) + 1, upto + 1)], "a batch says exactly what it holds"
        assert upto >= known
        known = upto
    assert known == sum(bursts)


def test_a_full_buffer_shows_as_a_gap() -> None:
    world = run([100], [False], buffer=10)
    first = world.batches[0]
    assert first[0] == 90, "what was dropped lies before `after`"
    assert [n for batch in world.batches for n in batch[3]] == list(range(91, 101))


def test_messages_beyond_the_rate_are_counted() -> None:
    async def main() -> World:
        world = World([])
        feed = Feed(world, world, "s", Address("h", 1, 1), ["cls", "message"], 10.0)  # type: ignore[arg-type]
        for _ in range(50):
            world.events.publish("drop", peer="n2", reason="tag", bytes=1)
        world.events.publish("view", epoch=1, online=[])
        task = asyncio.ensure_future(feed.run())
        await world.delivered.wait()
        task.cancel()
        await asyncio.wait([task])
        return world

    world = asyncio.run(asyncio.wait_for(main(), 30))
    _, upto, sampled, numbers = world.batches[0]
    assert upto == 51
    assert sampled + len(numbers) == 51
    assert sampled >= 40

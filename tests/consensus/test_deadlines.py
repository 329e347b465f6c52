"""Futures that fail in time, with one timer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.consensus.deadlines import SWEEP_MIN, Deadlines
from gostore.core.errors import Timeout
from gostore.sim.world import World


@pytest.fixture
def world() -> Any:
    with World(seed=1) as world:
        yield world


def late(what: str) -> Timeout:
    return Timeout(f"{what} is late")


@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 10.0)), max_size=30))
def test_each_fails_at_its_time_unless_it_is_done(given_s: list[tuple[float, float]]) -> None:
    """(deadline, when it is done) of each; whichever comes first counts."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        deadlines, begun_s = Deadlines(), loop.time()
        ended: dict[int, float] = {}
        futures: list[asyncio.Future[None]] = []
        for number, (deadline_s, done_s) in enumerate(given_s):
            future: asyncio.Future[None] = loop.create_future()
            future.add_done_callback(lambda _, number=number: ended.update({number: loop.time() - begun_s}))
            deadlines.add(future, begun_s + deadline_s, late, str(number))
            if done_s < deadline_s:
                loop.call_at(begun_s + done_s, future.set_result, None)
            futures.append(future)
        results = await asyncio.gather(*futures, return_exceptions=True)
        await asyncio.sleep(0)
        for number, ((deadline_s, done_s), result) in enumerate(zip(given_s, results, strict=True)):
            if done_s < deadline_s:
                assert result is None
            else:
                assert isinstance(result, Timeout)
                assert result.message == f"{number} is late"
            assert ended[number] == pytest.approx(min(deadline_s, done_s), abs=1e-6)

    with World(seed=1) as world:
        world.run(scenario())


def test_those_that_are_done_do_not_stay(world: World) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines()
        for _ in range(20 * SWEEP_MIN):
            future: asyncio.Future[None] = loop.create_future()
            deadlines.add(future, loop.time() + 1000.0, late, "it")
            future.set_result(None)
        assert len(deadlines) <= SWEEP_MIN + 1

    world.run(scenario())


def test_many_that_wait_are_all_kept(world: World) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines()
        futures = [loop.create_future() for _ in range(3 * SWEEP_MIN)]
        for number, future in enumerate(futures):
            deadlines.add(future, loop.time() + 1.0 + number / 1000, late, "it")
        done = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(one, Timeout) for one in done)
        assert len(deadlines) == 0

    world.run(scenario())

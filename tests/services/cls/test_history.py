from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from gostore.cluster import RingCache, RingSpec, View
from gostore.config import StorageConfig
from gostore.core.address import Address
from gostore.core.errors import Corrupt
from gostore.core.slots import PolicySource
from gostore.env import Env, real_env
from gostore.services.cls.history import (
    EVENTS_PER_SNAPSHOT,
    GROUP,
    INCARNATIONS_PER_LIFE,
    History,
    mark_of_disk,
    next_incarnation,
    reserve_incarnations,
)
from gostore.services.cls.masters import Install, Join, Master, NodeEvent, apply
from gostore.storage import Wal


def in_env(path: Path, work: Callable[[Env], Awaitable[None]], seed: int = 1) -> None:
    async def main() -> None:
        env = real_env("n1", path, seed=seed)
        try:
            await work(env)
        finally:
            await env.tasks.stop()
            env.disk.close()

    asyncio.run(main())


def test_every_life_begins_above_all_earlier_ones(tmp_path: Path) -> None:
    found: list[int] = []

    async def life(env: Env) -> None:
        found.append(await next_incarnation(env))
        assert not env.disk.exists("incarnation.tmp")

    for _ in range(3):
        in_env(tmp_path, life)
    assert found == [1, 1001, 2001]


def test_a_disk_keeps_its_mark_and_another_has_another(tmp_path: Path) -> None:
    marks: list[str] = []

    async def life(env: Env) -> None:
        await next_incarnation(env)
        await reserve_incarnations(env, 5_000)
        marks.append(mark_of_disk(env))

    for _ in range(2):
        in_env(tmp_path / "one", life)
    in_env(tmp_path / "two", life, seed=2)
    one, again, two = marks
    assert one == again != two
    assert len(one) == 16


def test_a_life_of_many_refutations_takes_another_block(tmp_path: Path) -> None:
    async def life(env: Env) -> None:
        assert await next_incarnation(env) == 1
        assert await reserve_incarnations(env, 1) == INCARNATIONS_PER_LIFE
        assert await reserve_incarnations(env, 950) == 2 * INCARNATIONS_PER_LIFE
        assert await reserve_incarnations(env, 5_000) >= 5_100

    in_env(tmp_path, life)

    async def next_life(env: Env) -> None:
        assert await next_incarnation(env) > 5_100

    in_env(tmp_path, next_life)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    tmp_path.joinpath("incarnation").write_text("12x")

    async def life(env: Env) -> None:
        with pytest.raises(Corrupt, match="incarnation holds '12x'"):
            await next_incarnation(env)

    in_env(tmp_path, life)


def some_events(count: int) -> tuple[View, list[NodeEvent]]:
    start = View("test", 0, {}, {"global": RingSpec(3, 8), "masters": RingSpec(3, 8)})
    join = Join(name="n1", address=Address("127.0.0.1", 1, 2), rest_port=0, incarnation=1)
    master = Master(
        "n1", expect=1, expect_timeout_s=1.0, masters_max=3, seat_timeout_s=1.0, found=lambda view: (("n1",),)
    )
    events, view = [], start
    for number in range(count):
        requests = [[join], []][number] if number < 2 else [Install(PolicySource(f"P{number}", "x"))]
        event = master.plan(view, 1, requests, 0.0).event
        assert event is not None
        events.append(event)
        view = apply(view, event)
    return start, events


@pytest.mark.parametrize("count", [1, 5, EVENTS_PER_SNAPSHOT + 3, 3 * EVENTS_PER_SNAPSHOT])
def test_what_was_saved_is_there_after_a_restart(tmp_path: Path, count: int) -> None:
    start, events = some_events(count)
    expected: list[View] = []

    async def life(env: Env) -> None:
        wal = await Wal.open(env, StorageConfig())
        history, view = History(wal), start
        assert history.load(RingCache()) is None
        for event in events:
            view = apply(view, event)
            history.append_event(event, view)
        await history.sync()
        expected.append(view)
        assert wal.last_index(GROUP) - wal.first_index(GROUP) <= EVENTS_PER_SNAPSHOT

    in_env(tmp_path, life)

    async def next_life(env: Env) -> None:
        view = History(await Wal.open(env, StorageConfig())).load(RingCache())
        assert view == expected[0]

    in_env(tmp_path, next_life)


def test_an_event_that_does_not_follow_is_damage(tmp_path: Path) -> None:
    start, events = some_events(2)

    async def life(env: Env) -> None:
        history = History(await Wal.open(env, StorageConfig()))
        view = apply(start, events[0])
        history.append_event(events[0], view)
        history.append_event(NodeEvent(9, 123, 1, "n2"), view)
        await history.sync()
        with pytest.raises(Corrupt, match="record 2 of the membership log"):
            history.load(RingCache())

    in_env(tmp_path, life)


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    async def life(env: Env) -> None:
        wal = await Wal.open(env, StorageConfig())
        wal.append(GROUP, 0, 1, b"\x93\x01\x02\x03", 2)
        with pytest.raises(Corrupt, match="record 1 of the membership log"):
            History(wal).load(RingCache())

    in_env(tmp_path, life)

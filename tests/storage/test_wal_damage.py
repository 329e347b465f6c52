"""What a crash or a flipped bit does to a log: everything acknowledged is there, in order, and nothing is invented."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gostore.core.errors import Corrupt, NotSupported, Unavailable
from gostore.storage import Wal
from gostore.storage.segments import RECORD_SIZE_BYTES, decode_head


class Driver:
    """Does the same to a log and to its model."""

    def __init__(self, kit: Any, model: Any) -> None:
        self.kit, self.model = kit, model
        self.wal: Wal

    def append(self, group: int, size: int, kind: int = 0) -> None:
        index = self.model.next(group)
        payload = index.to_bytes(4, "little") * (size // 4) + self.model.number.to_bytes(4, "little")
        self.wal.append(group, self.model.number // 7, index, payload, kind)
        self.model.append(group, self.model.number // 7, index, payload, kind)

    def truncate_suffix(self, group: int, back: int) -> None:
        first, entries = self.model.now.get(group, (1, ()))
        index = first + max(0, len(entries) - back)
        self.wal.truncate_suffix(group, index)
        self.model.truncate_suffix(group, index)

    def truncate_prefix(self, group: int, keep: int) -> None:
        index = self.model.next(group) - keep
        if index >= 0:
            self.wal.truncate_prefix(group, index)
            self.model.truncate_prefix(group, index)

    async def sync(self) -> None:
        number = self.model.number
        await self.wal.sync()
        self.model.acknowledged = max(self.model.acknowledged, number)

    def check_recovered(self, wal: Wal) -> None:
        self.wal = wal
        self.model.recovered(self.kit.state_of(wal))


async def workload(driver: Driver, seed: int, steps: int = 60) -> None:
    """A mixture in which segments are filled, pinned, cleaned and deleted."""
    rng = random.Random(seed)
    for _ in range(steps):
        for _ in range(rng.randrange(1, 4)):
            driver.append(rng.choice((0, 1, 1, 1)), rng.choice((0, 40, 400, 900)))
        chance = rng.random()
        if chance < 0.15:
            driver.truncate_suffix(1, rng.randrange(3))
        elif chance < 0.5:
            driver.truncate_prefix(1, rng.randrange(4))
        elif chance < 0.55:
            driver.truncate_prefix(0, 3)
        if rng.random() < 0.6:
            syncing = asyncio.ensure_future(driver.sync())
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            try:
                driver.append(0, 40)  # perhaps while the sync, or the rotation after it, is on its way
            finally:
                await asyncio.gather(syncing, return_exceptions=True)
            await syncing
    await driver.sync()


def test_a_crash_at_every_boundary(kit: Any) -> None:
    """The power goes before or after each write, sync, rename, removal; the log opens and goes on."""

    async def life(disk: Any, driver: Driver, seed: int) -> bool:
        """Recover, check and work; true when it came to the end."""
        try:
            async with kit.wal(disk, seed=seed) as wal:
                driver.check_recovered(wal)
                await workload(driver, seed, steps=60)
                await wal.close()
                copied.append(wal.statistics()["copied"])
        except (kit.Crash, Unavailable):
            return False
        return not getattr(disk, "crashed", False)

    async def main() -> tuple[int, set[str]]:
        boundary, points = 0, set()
        while True:
            real = kit.disk(boundary)
            disk, driver = kit.CrashingDisk(real, boundary), Driver(kit, kit.LogModel())
            await life(disk, driver, 1)
            points |= set(disk.log[-1:])
            # Again, and once more: recovery itself is interrupted too.
            second = kit.CrashingDisk(real, boundary % 7)
            await life(second, driver, 2)
            real.power_cut()
            assert await life(real, driver, 3)
            if not disk.crashed:
                return boundary, points
            boundary += 1

    copied: list[int] = []
    boundaries, points = kit.run(main())
    assert any(copied)
    assert boundaries > 150
    assert points >= {"append", "sync", "sync_dir", "rename", "open", "mkdir", "remove"}


def test_what_was_cut_off_does_not_come_back_between_new_records(kit: Any) -> None:
    """The cut is on the medium before anything is written there: old records might fit behind the new ones."""

    async def main(seed: int) -> tuple[bytes, ...]:
        disk = kit.disk(seed)
        async with kit.wal(disk) as wal:
            size = disk.open("wal/0000000001.wal").size()
            for index in (1, 2, 3):
                wal.append(1, 1, index, b"old" * 40)
            disk.stall()
            await flushed(wal)
        disk.resume()
        disk.corrupt("wal/0000000001.wal", size)  # a hole, with two good records behind it
        async with kit.wal(disk) as wal:
            assert wal.last_index(1) == 0
            # Ends where the second of the old ones begins: its note of what is synced takes the rest.
            wal.append(1, 1, 1, b"n" * (120 - RECORD_SIZE_BYTES))
            disk.stall()
            await flushed(wal)
            disk.power_cut()
        disk.resume()
        async with kit.wal(disk) as wal:
            return tuple(record.payload[:1] for record in wal.records(1))

    assert {kit.run(main(seed)) for seed in range(400)} == {(), (b"n",)}


async def flushed(wal: Wal) -> None:
    """The buffer is in the page cache; its sync is on its way."""
    wal._dirty.set()
    while wal.statistics()["buffered"]:  # noqa: ASYNC110 (there is no event for it)
        await asyncio.sleep(0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_any_prefix_of_the_last_segment_recovers_a_prefix(kit: Any, seed: int, clean: bool) -> None:
    async def main() -> None:
        disk, driver = kit.disk(seed), Driver(kit, kit.LogModel())
        async with kit.wal(disk) as driver.wal:
            await workload(driver, seed, steps=12)
            if clean:
                await driver.wal.close()
        name = f"wal/{disk.listdir('wal')[-1]}"
        start = decode_head(name, disk.read_bytes(name)).start
        file = disk.open(name)
        size = random.Random(seed).randrange(start, file.size() + 1)
        file.truncate(size)
        driver.model.acknowledged = 0
        try:
            async with kit.wal(disk) as wal:
                driver.check_recovered(wal)
                # It goes on as if nothing had been.
                await workload(driver, seed + 1, steps=5)
        except Corrupt as error:
            # The cut took copies of entries whose own segment is gone: no prefix of the history is left.
            if "is nowhere" not in error.message:
                raise

    kit.run(main())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_a_flipped_bit_is_refused_or_costs_what_no_later_write_vouches_for(kit: Any, seed: int, clean: bool) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        disk, driver = kit.disk(seed), Driver(kit, kit.LogModel())
        async with kit.wal(disk) as driver.wal:
            await workload(driver, seed, steps=12)
            before = driver.model.number
            driver.append(1, 40)
            driver.append(1, 40)
            await driver.sync()
            if clean:
                await driver.wal.close()
            else:
                disk.power_cut()
        name = "wal/" + rng.choice([name for name in disk.listdir("wal") if name.endswith(".wal")])
        offset = rng.randrange(len(disk.read_bytes(name)))
        disk.corrupt(name, offset, rng.randrange(8))
        # A clean end leaves its mark behind all entries; a power cut may take it, and with it the last batch's cover.
        driver.model.acknowledged = driver.model.number if clean else before
        try:
            async with kit.wal(disk) as wal:
                driver.check_recovered(wal)
                assert wal.statistics()["torn_bytes"] > 0
                note("cut off")
        except (Corrupt, NotSupported) as error:
            note(f"refused: {error}")

    kit.run(main())


class LogMachine(RuleBasedStateMachine):
    """Any order of what a node does to its log and what the world does to the node."""

    kit: Any
    coverage: Counter[str]

    @initialize(seed=st.integers(0, 1 << 16))
    def begin(self, seed: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.disk = self.kit.disk(seed)
        self.driver = Driver(self.kit, self.kit.LogModel())
        self.lives = 0
        self.open()

    def open(self) -> None:
        self.lives += 1
        self.env = self.kit.env(self.disk, self.lives)

        async def main() -> None:
            self.driver.check_recovered(await Wal.open(self.env, self.kit.CONFIG))

        self.loop.run_until_complete(main())

    def kill(self) -> None:
        self.coverage.update(self.driver.wal.statistics())
        self.disk.process_died()
        self.loop.run_until_complete(self.env.tasks.stop())

    @rule(group=st.integers(0, 2), size=st.sampled_from([0, 30, 500, 1400]), count=st.integers(1, 6))
    def append(self, group: int, size: int, count: int) -> None:
        for _ in range(count):
            self.driver.append(group, size)

    @rule(seed=st.integers(0, 1 << 16), steps=st.integers(1, 20))
    def work(self, seed: int, steps: int) -> None:
        self.loop.run_until_complete(workload(self.driver, seed, steps))

    @rule()
    def sync(self) -> None:
        self.loop.run_until_complete(self.driver.sync())

    @rule(turns=st.integers(1, 8))
    def turn(self, turns: int) -> None:
        """The flusher and the cleaner come some way."""

        async def main() -> None:
            self.driver.wal._dirty.set()
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(main())

    @rule(group=st.integers(0, 2), back=st.integers(0, 5))
    def truncate_suffix(self, group: int, back: int) -> None:
        self.driver.truncate_suffix(group, back)

    @rule(group=st.integers(0, 2), keep=st.integers(-2, 5))
    def truncate_prefix(self, group: int, keep: int) -> None:
        self.driver.truncate_prefix(group, keep)

    @rule()
    def restart(self) -> None:
        async def main() -> None:
            number = self.driver.model.number
            await self.driver.wal.close()
            self.driver.model.acknowledged = number

        self.loop.run_until_complete(main())
        self.kill()
        self.open()

    @rule()
    def killed(self) -> None:
        self.kill()
        self.open()

    @rule(times=st.integers(1, 2))
    def power_cut(self, times: int) -> None:
        for _ in range(times):
            self.disk.power_cut()
            self.kill()
            self.open()

    @precondition(lambda self: self.driver.model.number > self.driver.model.acknowledged)
    @rule()
    def failed_sync(self) -> None:
        async def main() -> None:
            self.disk.failing = True
            with pytest.raises(Unavailable):
                await self.driver.wal.sync()
            self.disk.failing = False
            assert len(self.env.fatals) == 1

        if self.driver.wal.statistics()["buffered"]:
            self.loop.run_until_complete(main())
            self.kill()
            self.open()

    @invariant()
    def what_is_read_is_what_was_appended(self) -> None:
        assert self.kit.state_of(self.driver.wal) == self.driver.model.now

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.kill()
            self.coverage.update(self.disk.coverage)
            self.loop.close()


def test_any_history(kit: Any) -> None:
    LogMachine.kit = kit
    LogMachine.coverage = Counter()
    # A history that fails is printed as it is: to shrink it takes longer than a test may.
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    options = settings(max_examples=100, stateful_step_count=50, deadline=None, phases=phases)
    run_state_machine_as_test(LogMachine, settings=options)
    quiet = [
        name
        for name in ("torn_bytes", "records", "failed_syncs", "kept", "dropped", "torn")
        if not LogMachine.coverage[name]
    ]
    assert not quiet, f"none of {quiet} happened: the runs proved little"

"""The log in one piece: groups, group commit, rotation, cleaning, failures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gostore.config import KIB, StorageConfig
from gostore.core.errors import Corrupt, NotFound, NotSupported, TooLarge, Unavailable
from gostore.storage import Record, Wal, files, segments, wal

BIG = StorageConfig()


def fill(log: Wal, group: int, count: int, size: int = 100) -> None:
    for _ in range(count):
        index = log.last_index(group) + 1
        log.append(group, index // 10 + 1, index, bytes([index % 256]) * size, kind=index % 3)


def test_entries_are_there_at_once_and_after_a_restart(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            assert (log.first_index(1), log.last_index(1), list(log.records(1))) == (1, 0, [])
            log.append(1, 5, 1, b"one", kind=9)
            log.append(2, 6, 40, b"forty")
            expected = {1: Record(1, 5, 1, 9, b"one"), 2: Record(2, 6, 40, 0, b"forty")}
            for synced in (False, True):
                if synced:
                    await log.sync()
                assert list(log.records(1)) == [expected[1]] == [log.entry(1, 1)]
                assert list(log.records(2)) == [expected[2]] == [log.entry(2, 40)]
            assert (log.first_index(2), log.last_index(2), log.term(2, 40)) == (40, 40, 6)
            await log.close()
        async with kit.wal(disk) as log:
            assert list(log.records(1)) + list(log.records(2)) == [expected[1], expected[2]]
            assert log.groups() == [1, 2]

    kit.run(main())


def test_records_from_an_index_on_and_while_the_log_changes(kit: Any) -> None:
    async def main() -> None:
        async with kit.wal(kit.disk()) as log:
            fill(log, 1, 20)
            await log.sync()
            fill(log, 1, 10)
            assert [record.index for record in log.records(1, 18)] == list(range(18, 31))
            assert [record.index for record in log.records(1, 31)] == []
            reader = log.records(1)
            assert next(reader).index == 1
            log.truncate_prefix(1, 10)
            assert next(reader).index == 10
            log.truncate_suffix(1, 12)
            log.append(1, 99, 12, b"new")
            assert [(record.index, record.term) for record in reader] == [(11, 2), (12, 99)]
            await log.sync()
            assert log.entry(1, 12).payload == b"new"

    kit.run(main())


def test_truncations(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            fill(log, 1, 10)
            log.truncate_suffix(1, 11)  # beyond the end: nothing
            log.truncate_prefix(1, 1)  # nothing
            log.truncate_suffix(3, 1)
            assert log.statistics()["buffered"] == 10
            log.truncate_suffix(1, 8)
            log.truncate_prefix(1, 4)
            with pytest.raises(ValueError, match="begins at 4"):
                log.truncate_suffix(1, 3)
            with pytest.raises(ValueError, match="out of the log's range"):
                log.truncate_prefix(2, -1)
            log.truncate_prefix(2, 50)  # as after a snapshot from elsewhere
            for missing in (3, 8):
                with pytest.raises(NotFound, match="it has 4 to 7"):
                    log.entry(1, missing)
            await log.sync()
        async with kit.wal(disk) as log:
            assert (log.first_index(1), log.last_index(1)) == (4, 7)
            assert (log.first_index(2), log.last_index(2)) == (50, 49)
            log.append(2, 1, 50, b"")
            log.append(1, 1, 8, b"")

    kit.run(main())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1, 1, 5, b""), ValueError),  # a gap
        ((1, 1, 3, b""), ValueError),  # there already
        ((2, 1, 1, bytes(BIG.record_size_bytes_max + 1)), TooLarge),
        ((-1, 1, 1, b""), ValueError),
        ((1 << 32, 1, 1, b""), ValueError),
        ((2, 1 << 64, 1, b""), ValueError),
        ((2, 1, -1, b""), ValueError),
        ((2, 1, 1, b"", 1 << 16), ValueError),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(kit: Any, arguments: Any, error: type[Exception]) -> None:
    async def main() -> None:
        async with kit.wal(kit.disk(), BIG) as log:
            fill(log, 1, 3)
            with pytest.raises(error):
                log.append(*arguments)
            assert (log.groups(), log.last_index(1), log.statistics()["buffered"]) == ([1], 3, 3)
            await log.sync()

    kit.run(main())


def test_the_buffer_is_bounded(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wal, "PENDING_SIZE_BYTES_MAX", 1000)

    async def main() -> None:
        async with kit.wal(kit.disk()) as log:
            fill(log, 1, 1, size=2000)  # one always fits, or it never would
            with pytest.raises(Unavailable, match="wait for the disk") as error:
                fill(log, 1, 1)
            assert error.value.definite
            assert log.last_index(1) == 1
            await log.sync()
            fill(log, 1, 1)
            await log.sync()

    kit.run(main())


def test_all_who_wait_share_one_sync(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk, BIG) as log:
            begun = disk.coverage["syncs"]
            disk.stall()
            seen: list[Any] = []
            log.env.events.subscribe(seen.append)

            async def one(group: int) -> None:
                fill(log, group, 1)
                await log.sync()

            first = asyncio.create_task(one(0))
            await until(lambda: log.last_index(0) == 1 and log.statistics()["buffered"] == 0)
            rest = [asyncio.create_task(one(group)) for group in range(1, 50)]
            again = asyncio.create_task(log.sync())  # nothing of its own: waits all the same for what is on its way
            await asyncio.sleep(0)
            assert not first.done()
            rest[3].cancel()  # one who gives up takes nobody with it
            disk.resume()
            await asyncio.gather(first, again, *rest[:3], *rest[4:])
            assert disk.coverage["syncs"] - begun == 2
            assert [event.data["records"] for event in seen if event.kind == "wal_sync"] == [1, 49]
            await log.sync()
            assert disk.coverage["syncs"] - begun == 2

    kit.run(main())


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (the conditions are states of the log, with no event of their own)
            await asyncio.sleep(0)


def test_sync_does_not_return_before_the_medium_has_it(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            disk.stall()
            fill(log, 1, 3)
            waiting = asyncio.create_task(log.sync())
            for _ in range(20):
                await asyncio.sleep(0)
            assert not waiting.done()
            disk.resume()
            await waiting
        disk.power_cut()
        async with kit.wal(disk) as log:
            assert log.last_index(1) == 3

    kit.run(main())


def test_a_failed_sync_stops_the_node_and_is_not_tried_again(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            seen: list[Any] = []
            log.env.events.subscribe(seen.append)
            fill(log, 1, 1)
            await log.sync()
            synced = disk.coverage["syncs"]
            disk.failing = True
            fill(log, 1, 1)
            answers = await asyncio.gather(log.sync(), log.sync(), return_exceptions=True)
            assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
            assert not any(answer.definite for answer in answers)
            disk.failing = False
            assert len(log.env.fatals) == 1
            assert "writing the log failed" in log.env.fatals[0]
            assert [event.data["what"] for event in seen if event.kind == "disk_failed"] == ["writing the log"]
            with pytest.raises(Unavailable) as refused:
                fill(log, 1, 1)
            assert refused.value.definite
            with pytest.raises(Unavailable) as refused:
                await log.sync()
            assert not refused.value.definite
            await log.close()
            assert (disk.coverage["failed_syncs"], disk.coverage["syncs"]) == (1, synced)
        async with kit.wal(disk) as log:  # the page cache still shows the second entry; the medium never had it
            assert log.last_index(1) == 1
            fill(log, 1, 1)
            await log.sync()
        disk.power_cut()
        async with kit.wal(disk) as log:
            assert log.last_index(1) == 2

    kit.run(main())


def test_a_full_disk_ends_the_log_and_loses_nothing(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            fill(log, 1, 5)
            await log.sync()
            disk.free_bytes = 50
            fill(log, 1, 1)
            with pytest.raises(Unavailable, match="no space"):
                await log.sync()
            assert len(log.env.fatals) == 1
        disk.free_bytes = None
        async with kit.wal(disk) as log:
            assert (log.last_index(1), log.statistics()["torn_bytes"]) == (5, 50)

    kit.run(main())


def test_a_disk_that_fails_at_the_opening(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        disk.failing = True
        env = kit.env(disk)
        with pytest.raises(Unavailable, match="opening the log failed"):
            await Wal.open(env, kit.CONFIG)
        assert len(env.fatals) == 1
        assert len(env.tasks) == 0

    kit.run(main())


def test_segments_come_and_go(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            for _ in range(100):
                fill(log, 1, 10)
                await log.sync()
            assert log.statistics()["segments"] > 20
            expected = kit.state_of(log)
            await log.close()
        async with kit.wal(disk) as log:
            assert kit.state_of(log) == expected
            log.truncate_prefix(1, 1001)
            await until(lambda: log.statistics()["segments"] == 1)
            await log.sync()
        assert len(disk.listdir("wal")) == 1
        disk.power_cut()
        async with kit.wal(disk) as log:
            assert (log.first_index(1), log.last_index(1)) == (1001, 1000)

    kit.run(main())


def test_a_group_that_is_never_truncated_does_not_pin_the_log(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            fill(log, 7, 5)
            fill(log, 8, 15, size=300)
            slow = [*log.records(7), *log.records(8)]
            sizes: list[int] = []
            for _ in range(300):
                fill(log, 1, 10)
                log.truncate_prefix(1, log.last_index(1) - 5)
                await log.sync()
                await until(lambda: not log._garbage.is_set())
                sizes.append(log.statistics()["size_bytes"])
            statistics = log.statistics()
            live = statistics["live_bytes"]
            # The bound, and one more segment and batch, which come before the cleaner does.
            assert max(sizes) < wal.GARBAGE_FACTOR * live + (wal.SLACK_SEGMENTS + 2) * 4 * KIB
            assert statistics["copied"] > 0
            assert [*log.records(7), *log.records(8)] == slow
            await log.close()
        for _ in range(2):
            async with kit.wal(disk) as log:
                assert [*log.records(7), *log.records(8)] == slow
                assert log.term(8, 12) == 2

    kit.run(main())


def test_few_files_are_open(kit: Any) -> None:
    async def main() -> None:
        async with kit.wal(kit.disk()) as log:
            for _ in range(60):
                fill(log, 1, 10)
                await log.sync()
            assert len(list(log.records(1))) == 600
            assert len(log._files._handles) <= files.HANDLES_MAX

    kit.run(main())


def test_old_segments_are_read_while_a_new_one_is_made(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            for _ in range(60):
                fill(log, 1, 10)
                await log.sync()
            segments_before = log.statistics()["segments"]
            disk.stall()
            fill(log, 1, 50)
            waiting = asyncio.create_task(log.sync())
            for _ in range(20):  # the sync of the batch, then each step of the rotation after it
                assert len(list(log.records(1))) == 650
                disk.resume()
                disk.stall()
                await asyncio.sleep(0)
            disk.resume()
            await waiting
            await until(lambda: log.statistics()["segments"] > segments_before)
            fill(log, 1, 1)
            await log.sync()
            assert log.env.fatals == []

    kit.run(main())


def test_an_unclean_end_then_a_clean_one(kit: Any) -> None:
    """What a killed node wrote and did not sync is found, and safe, after the next opening."""

    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            disk.stall()
            fill(log, 1, 10)
            log._dirty.set()
            await until(lambda: log.statistics()["buffered"] == 0)
        disk.resume()
        async with kit.wal(disk) as log:
            assert log.last_index(1) == 10
        disk.power_cut()
        async with kit.wal(disk) as log:
            assert log.last_index(1) == 10

    kit.run(main())


async def two_segments(kit: Any) -> Any:
    """A disk with a log of three segments that was closed cleanly."""
    disk = kit.disk()
    async with kit.wal(disk) as log:
        for _ in range(9):
            fill(log, 1, 10)
            await log.sync()
        assert log.statistics()["segments"] == 3
        await log.close()
    return disk


def test_a_missing_segment_is_noticed(kit: Any) -> None:
    async def main() -> None:
        for number, named in ((1, "0000000002.wal"), (2, "0000000002.wal")):
            disk = await two_segments(kit)
            disk.remove(f"wal/{number:010d}.wal")
            with pytest.raises(Corrupt, match=f"wal/{named} is damaged at offset 0"):
                async with kit.wal(disk):
                    pass

    kit.run(main())


def test_a_segment_under_another_name_is_noticed(kit: Any) -> None:
    async def main() -> None:
        disk = await two_segments(kit)
        disk.rename("wal/0000000003.wal", "wal/0000000002.wal")
        with pytest.raises(Corrupt, match="it is segment 3 under another name"):
            async with kit.wal(disk):
                pass

    kit.run(main())


def test_another_format_version_is_refused_by_name(kit: Any) -> None:
    async def main() -> None:
        disk = await two_segments(kit)
        disk.corrupt("wal/0000000001.wal", 4, bit=1)
        with pytest.raises(NotSupported, match=r"wal/0000000001.wal: the log has format version 3"):
            async with kit.wal(disk):
                pass

    kit.run(main())


def test_damage_after_the_opening_is_noticed_by_who_reads(kit: Any) -> None:
    async def main() -> None:
        disk = await two_segments(kit)
        async with kit.wal(disk) as log:
            size = segments.HEAD_SIZE_BYTES + segments.RECORD_SIZE_BYTES
            disk.corrupt("wal/0000000001.wal", size + 5)
            with pytest.raises(Corrupt, match=f"wal/0000000001.wal is damaged at offset {segments.HEAD_SIZE_BYTES}"):
                log.entry(1, 1)
            with pytest.raises(Corrupt):
                next(log.records(1))
            assert log.entry(1, 2).index == 2

    kit.run(main())


def test_the_cleaner_does_not_copy_damage(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with kit.wal(disk) as log:
            fill(log, 7, 1)
            for _ in range(9):
                fill(log, 1, 10)
                await log.sync()
            disk.corrupt("wal/0000000001.wal", 100)
            log.truncate_prefix(1, 90)
            await until(lambda: log.env.fatals)
            assert "cleaning the log failed: wal/0000000001.wal is damaged" in log.env.fatals[0]

    kit.run(main())


def test_an_older_clean_log_is_the_same_after_any_number_of_openings(kit: Any) -> None:
    async def main() -> None:
        disk = await two_segments(kit)
        for _ in range(3):
            async with kit.wal(disk) as log:
                assert log.last_index(1) == 90
                assert log.statistics()["torn_bytes"] == 0
                await log.close()
                await log.close()

    kit.run(main())

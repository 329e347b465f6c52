"""The simulated disk: what was synced stays, what was not may go, and the same seed loses the same."""

from __future__ import annotations

import asyncio
import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.sim.disk import SECTOR_SIZE_BYTES, SimDisk


def disk(seed: int = 0, **faults: Any) -> SimDisk:
    return SimDisk(random.Random(seed), **faults)


def durable(made: SimDisk, name: str, data: bytes) -> None:
    """A file that is on the medium."""

    async def main() -> None:
        parent = name.rpartition("/")[0]
        made.mkdir(parent)
        file = made.open(name, create=True)
        file.append(data)
        await file.sync()
        for directory in ("", parent):
            await made.sync_dir(directory)

    asyncio.run(main())


def test_it_is_a_file_system() -> None:
    made = disk()
    made.mkdir("a/b")
    made.mkdir("a/b")
    with pytest.raises(FileNotFoundError):
        made.open("a/f")
    with pytest.raises(FileNotFoundError):
        made.open("x/f", create=True)
    file = made.open("a/f", create=True)
    assert (file.append(b"hello"), file.append(bytearray(b" world")), file.size()) == (0, 5, 11)
    assert (file.read(4, 3), file.read(9, 100), file.read(50, 1)) == (b"o w", b"ld", b"")
    assert made.read_bytes("a/f") == b"hello world"
    file.truncate(5)
    assert made.open("a/f").read(0, 99) == b"hello"
    made.rename("a/f", "a/b/g")
    assert (made.listdir("a"), made.listdir("a/b"), made.listdir("nowhere")) == (["b"], ["g"], [])
    assert (made.exists("a/f"), made.exists("a/b/g"), made.exists("a")) == (False, True, True)
    made.open("a/z", create=True)
    made.rename("a/z", "a/b/g")
    assert made.read_bytes("a/b/g") == b""
    assert file.read(0, 99) == b"hello"  # who has it open keeps it
    assert made.files() == ["a/b/g"]
    made.remove("a/b/g")
    assert made.files() == []
    for call in (lambda: made.remove("a/b/g"), lambda: made.rename("q", "p"), lambda: made.read_bytes("q")):
        with pytest.raises(FileNotFoundError):
            call()
    with pytest.raises(IsADirectoryError):
        made.open("a")
    with pytest.raises(IsADirectoryError):
        made.remove("a/b")
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.size()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/"])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="no name in a data directory"):
        disk().open(name, create=True)


@settings(deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.integers(0, 2000), max_size=6), st.lists(st.integers(1, 2000), max_size=6))
def test_synced_bytes_survive_and_others_are_kept_dropped_or_torn(
    seed: int, synced: list[int], unsynced: list[int]
) -> None:
    made, rng = disk(seed), random.Random(seed)
    before = b"".join(rng.randbytes(size) for size in synced)
    durable(made, "d/f", before)
    file = made.open("d/f")
    after = b""
    for size in unsynced:
        after += (data := rng.randbytes(size))
        file.append(data)
    made.power_cut()
    found = made.read_bytes("d/f")
    assert found[: len(before)] == before
    assert len(found) <= len(before) + len(after)
    pieces = sum(made.coverage[name] for name in ("kept", "dropped", "torn"))
    assert bool(pieces) == bool(after)
    if found == before + after:
        assert made.coverage["dropped"] == made.coverage["torn"] == 0
    with pytest.raises(OSError, match="earlier life"):
        file.read(0, 1)
    made.power_cut()
    assert made.read_bytes("d/f") == found  # what survived is on the medium


def test_every_kind_of_loss_happens() -> None:
    outcomes = set()
    for seed in range(200):
        made = disk(seed)
        durable(made, "d/f", b"")
        file = made.open("d/f")
        for number in range(1, 5):
            file.append(bytes([number]) * SECTOR_SIZE_BYTES)
        made.power_cut()
        found = made.read_bytes("d/f")
        sectors = [found[at : at + SECTOR_SIZE_BYTES] for at in range(0, len(found), SECTOR_SIZE_BYTES)]
        whole = [sector == bytes([number]) * SECTOR_SIZE_BYTES for number, sector in enumerate(sectors, 1)]
        outcomes.add(
            "nothing" if not found else "all" if whole == [True] * 4 else "prefix" if all(whole[:-1]) else "hole"
        )
        if "hole" in outcomes and whole[-1:] == [True] and not whole[0]:
            outcomes.add("later ones without earlier ones")
    assert outcomes == {"nothing", "all", "prefix", "hole", "later ones without earlier ones"}


def test_names_survive_as_a_prefix_of_their_changes() -> None:
    seen = set()
    for seed in range(100):
        made = disk(seed)
        durable(made, "d/old", b"1")
        made.open("d/new.tmp", create=True)
        made.rename("d/new.tmp", "d/new")
        made.remove("d/old")
        made.power_cut()
        seen.add(tuple(made.listdir("d")))
    assert seen == {("old",), ("new.tmp", "old"), ("new", "old"), ("new",)}


def test_a_directory_that_was_not_synced_may_go_with_all_in_it() -> None:
    seen = set()
    for seed in range(50):
        made = disk(seed)

        async def main(made: SimDisk = made) -> None:
            made.mkdir("d")
            file = made.open("d/f", create=True)
            file.append(b"x")
            await file.sync()
            await made.sync_dir("d")

        asyncio.run(main())
        made.power_cut()
        seen.add(tuple(made.files()))
    assert seen == {(), ("d/f",)}


def test_a_rename_replaces_atomically() -> None:
    for seed in range(50):
        made = disk(seed)
        durable(made, "d/f", b"old")
        durable(made, "d/t", b"new")
        made.rename("d/t", "d/f")
        made.power_cut()
        assert made.read_bytes("d/f") in (b"old", b"new")
        assert made.exists("d/t") == (made.read_bytes("d/f") == b"old")


@given(st.integers(0, 1 << 32))
@settings(max_examples=30, deadline=None)
def test_the_same_seed_loses_the_same(seed: int) -> None:
    def history() -> dict[str, bytes]:
        made = disk(seed)
        for name in ("b/x", "a/y", "a/x"):
            durable(made, name, b"s" * 300)
            made.open(name).append(b"u" * 3000)
            made.open(f"{name}2", create=True)
        made.power_cut()
        return {name: made.read_bytes(name) for name in made.files()}

    assert history() == history()


def test_a_sync_carries_what_was_written_before_it() -> None:
    async def main(seed: int) -> bytes:
        made = disk(seed)
        made.mkdir("d")
        file = made.open("d/f", create=True)
        await made.sync_dir("")
        await made.sync_dir("d")
        made.stall()
        file.append(b"a" * 600)
        first = asyncio.ensure_future(file.sync())
        await asyncio.sleep(0)
        file.append(b"b" * 600)
        second = asyncio.ensure_future(file.sync())
        await asyncio.sleep(0)
        file.append(b"c" * 600)
        made.resume()
        await asyncio.gather(first, second)
        made.power_cut()
        return made.read_bytes("d/f")

    found = [asyncio.run(main(seed)) for seed in range(30)]
    assert all(data[:1200] == b"a" * 600 + b"b" * 600 for data in found)
    assert len(set(found)) > 2


def test_a_lost_truncation_brings_bytes_back_but_loses_none_that_stayed() -> None:
    seen = set()
    for seed in range(100):
        made = disk(seed)
        durable(made, "d/f", b"0123456789")
        file = made.open("d/f")
        file.truncate(4)
        file.append(b"x")
        made.power_cut()
        seen.add(made.read_bytes("d/f"))
    assert {b"0123456789", b"0123x"} <= seen
    assert all(data.startswith(b"0123") for data in seen)


def test_slow_stalled_and_in_one_queue() -> None:
    async def main() -> None:
        waits = iter([0.01, 0.02])
        made = disk(sync_s=lambda: next(waits))
        one, two = made.open("1", create=True), made.open("2", create=True)
        loop = asyncio.get_running_loop()
        begun, order = loop.time(), []

        async def sync(file: Any) -> None:
            await file.sync()
            order.append(file.name)

        await asyncio.gather(sync(one), sync(two))
        assert order == ["1", "2"]
        assert loop.time() - begun >= 0.03  # the second waits for the first; no upper bound is asserted
        made.sync_s = None
        made.stall()
        waiting = asyncio.ensure_future(one.sync())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        made.resume()
        await waiting
        assert made.coverage["syncs"] == 3

    asyncio.run(main())


def test_a_failed_sync_loses_its_writes_in_silence() -> None:
    async def main() -> None:
        made = disk()
        file = made.open("f", create=True)
        await made.sync_dir("")
        file.append(b"kept")
        await file.sync()
        file.append(b" lost")
        made.failing = True
        with pytest.raises(OSError, match="refused") as error:
            await file.sync()
        assert error.value.errno == errno.EIO
        with pytest.raises(OSError, match="refused"):
            await made.sync_dir("")
        made.failing = False
        await file.sync()  # reports success: the kernel calls the pages clean
        assert file.read(0, 99) == b"kept lost"
        file.drop_cache()
        assert file.read(0, 99) == b"kept"
        made.power_cut()
        assert made.read_bytes("f") == b"kept"

    asyncio.run(main())


def test_a_full_disk_takes_what_fits() -> None:
    made = disk(free_bytes=10)
    file = made.open("f", create=True)
    file.append(b"123456")
    with pytest.raises(OSError, match="no space") as error:
        file.append(b"789abcd")
    assert error.value.errno == errno.ENOSPC
    assert file.read(0, 99) == b"123456789a"
    file.truncate(2)
    assert made.free_bytes == 8
    made.remove("f")
    assert made.free_bytes == 10
    assert made.coverage["full"] == 1


def test_a_flipped_bit_survives_everything() -> None:
    made = disk()
    durable(made, "d/f", b"\x00\x00")
    made.corrupt("d/f", 1, bit=3)
    made.power_cut()
    assert made.read_bytes("d/f") == b"\x00\x08"
    made.open("d/f").append(b"\x00")
    made.corrupt("d/f", 2)
    asyncio.run(made.open("d/f").sync())
    made.power_cut()
    assert made.read_bytes("d/f") == b"\x00\x08\x01"
    for offset, bit in ((3, 0), (-1, 0), (0, 8)):
        with pytest.raises(ValueError, match="3 bytes of 8 bits"):
            made.corrupt("d/f", offset, bit)


def test_the_end_of_a_process_keeps_the_page_cache_and_ends_its_files() -> None:
    async def main() -> None:
        made = disk()
        file = made.open("f", create=True)
        file.append(b"x")
        made.stall()
        waiting = [asyncio.ensure_future(file.sync()), asyncio.ensure_future(made.sync_dir(""))]
        await asyncio.sleep(0)
        made.process_died()
        made.resume()
        for call in waiting:
            with pytest.raises(OSError, match="meanwhile"):
                await call
        with pytest.raises(OSError, match="earlier life"):
            file.append(b"y")
        assert made.open("f").read(0, 9) == b"x"
        made.close()
        assert made.read_bytes("f") == b"x"

    asyncio.run(main())

"""The chunk store: what was put is there, whole, after any crash."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from itertools import count as itercount
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.core.errors import BadRequest, Corrupt, NotFound, Unavailable
from gostore.storage import BlobStore, blobs


def key_of(data: bytes) -> str:
    return sha256(data).hexdigest()


def same_fan(count: int) -> list[bytes]:
    """Blobs whose keys share their first two digits."""
    return list(islice((data for number in itercount() if key_of(data := b"%d" % number).startswith("ab")), count))


@asynccontextmanager
async def opened(kit: Any, disk: Any) -> AsyncIterator[BlobStore]:
    env = kit.env(disk)
    try:
        store = await BlobStore.open(env)
        store.env = env  # type: ignore[attr-defined]
        yield store
    finally:
        await env.tasks.stop()
        disk.process_died()


def test_put_get_remove(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        data = [b"", b"one", bytes(100_000)]
        async with opened(kit, disk) as store:
            assert [await store.put(key_of(d), d) for d in data] == [True, True, True]
            assert await store.put(key_of(data[1]), memoryview(data[1])) is False
            assert list(store.keys()) == sorted(key_of(d) for d in data)
            assert [store.get(key_of(d)) for d in data] == data
            assert [store.size(key_of(d)) for d in data] == [0, 3, 100_000]
            assert await store.remove(key_of(data[1])) is True
            assert await store.remove(key_of(data[1])) is False
            assert not store.has(key_of(data[1]))
            for call in (store.get, store.size):
                with pytest.raises(NotFound, match=key_of(data[1])):
                    call(key_of(data[1]))
            counted = store.statistics()
            assert (counted["puts"], counted["known"], counted["removed"], counted["blobs"]) == (3, 1, 1, 2)
            assert counted["bytes"] == 100_000
        disk.power_cut()
        async with opened(kit, disk) as store:
            assert [store.get(key_of(d)) for d in (data[0], data[2])] == [data[0], data[2]]
            assert (len(store), store.statistics()["bytes"]) == (2, 100_000)

    kit.run(main())


@pytest.mark.parametrize("key", ["", "ab", "A" * 64, "../" + "a" * 61, "g" * 64, "a" * 65])
def test_a_malformed_key_is_refused(kit: Any, key: str) -> None:
    async def main() -> None:
        async with opened(kit, kit.disk()) as store:
            with pytest.raises(BadRequest, match="64 hexadecimal digits"):
                await store.put(key, b"")
            with pytest.raises(BadRequest):
                await store.remove(key)
            assert not store.has(key)
            with pytest.raises(NotFound):
                store.get(key)

    kit.run(main())


def test_other_data_than_the_key_names_are_refused(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with opened(kit, disk) as store:
            with pytest.raises(Corrupt, match="send them again") as error:
                await store.put(key_of(b"a"), b"b")
            assert error.value.definite
            assert (len(store), disk.files()) == (0, [])
            assert await store.put(key_of(b"a"), b"a")

    kit.run(main())


def test_damage_is_noticed_and_mended(kit: Any) -> None:
    async def main() -> None:
        disk, key = kit.disk(), key_of(b"data")
        async with opened(kit, disk) as store:
            await store.put(key, b"data")
            disk.corrupt(f"blobs/{key[:2]}/{key}", 2)
            with pytest.raises(Corrupt, match="does not match its checksum: remove it and copy it again") as error:
                store.get(key)
            assert error.value.details == {"key": key, "file": f"blobs/{key[:2]}/{key}"}
            await store.remove(key)
            assert await store.put(key, b"data")
            assert store.get(key) == b"data"
            disk.remove(f"blobs/{key[:2]}/{key}")
            with pytest.raises(Corrupt, match="cannot be read"):
                store.get(key)
            assert store.statistics()["corrupt"] == 2
            assert await store.remove(key)

    kit.run(main())


def test_a_key_that_is_being_put_is_put_once(kit: Any) -> None:
    async def main() -> None:
        disk, key = kit.disk(), key_of(b"data")
        async with opened(kit, disk) as store:
            disk.stall()
            puts = [asyncio.ensure_future(store.put(key, b"data")) for _ in range(4)]
            removal = asyncio.ensure_future(store.remove(key))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not any(put.done() for put in puts)
            assert not store.has(key)  # it is not on the medium yet
            puts[0].cancel()  # the next one takes over
            puts[2].cancel()
            disk.resume()
            answers = await asyncio.gather(*puts, removal, return_exceptions=True)
            assert [type(answer) for answer in (answers[0], answers[2])] == [asyncio.CancelledError] * 2
            assert [answers[1], answers[3], answers[4]] == [True, False, True]
            assert (store.statistics()["puts"], disk.files()) == (1, [])

    kit.run(main())


def test_puts_share_the_syncs_of_their_directory(kit: Any) -> None:
    async def main() -> None:
        disk, data = kit.disk(), same_fan(20)
        async with opened(kit, disk) as store:
            await store.put(key_of(data[0]), data[0])  # makes the directory
            begun = disk.coverage["directory_syncs"]
            assert all(await asyncio.gather(*(store.put(key_of(d), d) for d in data[1:])))
            # Their file syncs end one after the other, their directory is synced while others still come.
            assert disk.coverage["directory_syncs"] - begun < 19
            disk.stall()
            removals = [asyncio.ensure_future(store.remove(key_of(d))) for d in data]
            await asyncio.sleep(0)
            begun = disk.coverage["directory_syncs"]
            disk.resume()
            assert all(await asyncio.gather(*removals))
            assert disk.coverage["directory_syncs"] - begun <= 2

    kit.run(main())


def test_few_files_are_open_at_a_time(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "PUTS_IN_FLIGHT_MAX", 3)

    async def main() -> None:
        disk = kit.disk()
        async with opened(kit, disk) as store:
            disk.sync_s = lambda: 0.0
            temporaries: list[int] = []
            append = disk.append

            def counted(*arguments: Any) -> int:
                temporaries.append(sum(name.endswith(".tmp") for name in disk.files()))
                return append(*arguments)

            monkeypatch.setattr(disk, "append", counted)
            data = [b"%d" % number for number in range(30)]
            await asyncio.gather(*(store.put(key_of(d), d) for d in data))
            assert len(store) == 30
            assert max(temporaries) <= 3

    kit.run(main())


def test_a_full_disk_refuses_and_goes_on(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        async with opened(kit, disk) as store:
            disk.free_bytes = 100
            with pytest.raises(Unavailable, match="is full") as error:
                await store.put(key_of(bytes(200)), bytes(200))
            assert error.value.definite
            assert (disk.files(), disk.free_bytes, store.env.fatals) == ([], 100, [])
            assert await store.put(key_of(bytes(90)), bytes(90))
            disk.free_bytes = None
            assert await store.put(key_of(bytes(200)), bytes(200))

    kit.run(main())


@pytest.mark.parametrize("stage", ["file", "directory"])
def test_a_failed_sync_stops_the_node_and_is_not_tried_again(kit: Any, stage: str) -> None:
    async def main() -> None:
        disk, key = kit.disk(), key_of(b"data")
        async with opened(kit, disk) as store:
            other = same_fan(2)
            await store.put(key_of(other[0]), other[0])
            seen: list[Any] = []
            store.env.events.subscribe(seen.append)
            if stage == "directory":
                rename = disk.rename

                def fail(old: str, new: str) -> None:
                    rename(old, new)
                    disk.failing = True

                disk.rename = fail
            else:
                disk.failing = True
            with pytest.raises(Unavailable, match="storing a blob failed") as error:
                await store.put(key_of(other[1]), other[1])
            assert not error.value.definite
            disk.failing = False
            assert disk.coverage["failed_syncs"] == 1
            assert len(store.env.fatals) == 1
            assert [event.kind for event in seen] == ["disk_failed"]
            assert list(store.keys()) == [key_of(other[0])]
            with pytest.raises(Unavailable, match="cannot be changed"):
                await store.put(key, b"data")
            assert store.get(key_of(other[0])) == other[0]

    kit.run(main())


def test_a_disk_that_fails_at_the_opening(kit: Any) -> None:
    async def main() -> None:
        disk = kit.disk()
        disk.failing = True
        env = kit.env(disk)
        with pytest.raises(Unavailable, match="opening the blobs failed"):
            await BlobStore.open(env)
        assert len(env.fatals) == 1

    kit.run(main())


async def workload(store: BlobStore, seed: int, promised: dict[str, bool | None]) -> None:
    """Puts and removals, some at the same time; ``promised``: there (true), gone (false), in doubt (None)."""
    rng = random.Random(seed)
    pool = list(dict.fromkeys([*same_fan(4), b"", *(rng.randbytes(rng.choice((10, 2000))) for _ in range(5))]))

    async def one(data: bytes, remove: bool) -> None:
        promised[key_of(data)] = None
        if remove:
            await store.remove(key_of(data))
        else:
            await store.put(key_of(data), data)
        promised[key_of(data)] = not remove

    for _ in range(8):
        some = rng.sample(pool, rng.randrange(1, 5))
        removals = [rng.random() < 0.3 for _ in some]
        answers = await asyncio.gather(*map(one, some, removals), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer


def check(store: BlobStore, disk: Any, promised: dict[str, bool | None]) -> None:
    for key, there in sorted(promised.items()):
        if there is not None:
            assert store.has(key) == there
        if store.has(key):
            assert key_of(store.get(key)) == key
    assert sorted(disk.files()) == [f"blobs/{key[:2]}/{key}" for key in list(store.keys())]


def test_a_crash_at_every_boundary(kit: Any) -> None:
    """The power goes before or after each write, sync, rename, removal, also while the store is being opened."""

    async def life(disk: Any, seed: int, promised: dict[str, bool | None]) -> None:
        try:
            async with opened(kit, disk) as store:
                check(store, disk, promised)
                promised.update({key: store.has(key) for key in promised})
                await workload(store, seed, promised)
        except (kit.Crash, Unavailable):
            assert disk.crashed

    async def main() -> tuple[int, set[str]]:
        boundary, points = 0, set()
        while True:
            real, promised = kit.disk(boundary), {}
            disk = kit.CrashingDisk(real, boundary)
            await life(disk, 1, promised)
            points |= set(disk.log[-1:])
            await life(kit.CrashingDisk(real, boundary % 5), 2, promised)
            real.power_cut()
            for seed in (3, 4):
                async with opened(kit, real) as store:
                    check(store, real, promised)
                    await workload(store, seed, promised)
                real.power_cut()
            if not disk.crashed:
                return boundary, points
            boundary += 1

    boundaries, points = kit.run(main())
    assert boundaries > 100
    assert points >= {"append", "sync", "sync_dir", "rename", "open", "mkdir", "remove"}


def test_what_a_killed_node_left_is_on_the_medium_after_the_opening(kit: Any) -> None:
    """A name that only the page cache knew is found, promised, and must not go with the power afterwards."""

    async def main(seed: int) -> None:
        disk, key = kit.disk(seed), key_of(b"data")
        rename = disk.rename

        def die(old: str, new: str) -> None:
            rename(old, new)
            disk.stall()

        disk.rename = die
        async with opened(kit, disk) as store:
            putting = asyncio.ensure_future(store.put(key, b"data"))
            while not disk.exists(f"blobs/{key[:2]}/{key}"):  # noqa: ASYNC110 (there is no event for it)
                await asyncio.sleep(0)
            disk.process_died()
            await store.env.tasks.stop()
            putting.cancel()
            # The dead do not clean up: their file is still there.
            disk.remove = lambda name: None
            await asyncio.wait([putting])
            del disk.remove
        disk.resume()
        async with opened(kit, disk) as store:
            assert await store.put(key, b"data") is False
        disk.power_cut()
        async with opened(kit, disk) as store:
            assert store.get(key) == b"data"

    for seed in range(20):
        kit.run(main(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 400))
def test_whatever_is_cancelled_the_index_is_what_is_on_the_disk(kit: Any, seed: int, turns: int) -> None:
    async def main() -> None:
        disk, promised = kit.disk(seed), {}
        async with opened(kit, disk) as store:
            working = asyncio.ensure_future(workload(store, seed, promised))
            for _ in range(turns):
                await asyncio.sleep(0)
            working.cancel()
            await asyncio.wait([working])
            check(store, disk, promised)
            promised.clear()
            await workload(store, seed, promised)
            check(store, disk, promised)
        disk.power_cut()
        async with opened(kit, disk) as store:
            check(store, disk, promised)

    kit.run(main())

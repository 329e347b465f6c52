"""The real environment: the disk in its directory, tasks and their owner."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gostore import env as env_module
from gostore.config import StorageConfig
from gostore.core.errors import ConfigError
from gostore.env import LOCK_NAME, Env, RealDisk, Tasks, real_env
from gostore.storage import BlobStore, Wal


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    made = RealDisk(tmp_path / "node")
    yield made
    made.close()


def test_it_is_a_file_system(disk: RealDisk) -> None:
    disk.mkdir("a/b")
    disk.mkdir("a/b")
    with pytest.raises(FileNotFoundError):
        disk.open("a/f")
    file = disk.open("a/f", create=True)
    assert (file.append(b"hello"), file.append(memoryview(b" world")), file.size()) == (0, 5, 11)
    assert (file.read(4, 3), file.read(9, 100), file.read(50, 1)) == (b"o w", b"ld", b"")
    file.truncate(5)
    assert file.append(b"!") == 5
    assert disk.open("a/f").size() == 6
    assert disk.read_bytes("a/f") == b"hello!"
    disk.rename("a/f", "a/g")
    assert (disk.listdir("a"), disk.listdir("nowhere")) == (["b", "g"], [])
    assert (disk.exists("a/f"), disk.exists("a/g")) == (False, True)
    disk.remove("a/g")
    assert disk.listdir("a") == ["b"]
    file.drop_cache()
    file.close()
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.append(b"x")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b"])
def test_names_stay_inside(disk: RealDisk, name: str) -> None:
    for call in (disk.open, disk.read_bytes, disk.listdir, disk.exists, disk.mkdir, disk.remove):
        with pytest.raises(ValueError, match="no name in a data directory"):
            call(name)
    with pytest.raises(ValueError, match="no name in a data directory"):
        disk.rename("a", name)


def test_short_writes_are_finished_and_a_full_disk_counts_what_it_took(
    disk: RealDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write, room = disk.open("f", create=True), os.write, [100]

    def short(descriptor: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[: min(3, room[0])])
        room[0] -= written
        return written

    monkeypatch.setattr(env_module.os, "write", short)
    assert file.append(b"0123456789") == 0
    assert file.read(0, 99) == b"0123456789"
    room[0] = 4
    with pytest.raises(OSError, match="No space"):
        file.append(b"abcdefgh")
    assert (file.size(), file.read(0, 99)) == (14, b"0123456789abcd")


def test_short_reads_are_finished(disk: RealDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = disk.open("f", create=True), os.pread
    file.append(b"0123456789")
    monkeypatch.setattr(env_module.os, "pread", lambda fd, size, offset: read(fd, min(size, 3), offset))
    assert (file.read(1, 8), file.read(8, 8), file.read(10, 1)) == (b"12345678", b"89", b"")


def test_syncs_run_on_one_thread_of_their_own(disk: RealDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    sync = env_module._sync_descriptor

    def noted(descriptor: int) -> None:
        threads.append(threading.current_thread().name)
        sync(descriptor)

    monkeypatch.setattr(env_module, "_sync_descriptor", noted)

    async def main() -> None:
        files = [disk.open(str(number), create=True) for number in range(5)]
        await asyncio.gather(*(file.sync() for file in files), disk.sync_dir(""))

    asyncio.run(main())
    assert len(set(threads)) == 1
    assert threads[0] != threading.main_thread().name
    assert len(threads) == 5


def test_a_failed_sync_raises(disk: RealDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def main() -> None:
        file = disk.open("f", create=True)
        monkeypatch.setattr(env_module, "_sync_descriptor", fail)
        with pytest.raises(OSError, match="Input/output"):
            await file.sync()
        with pytest.raises(FileNotFoundError):
            await disk.sync_dir("nowhere")

    asyncio.run(main())


def test_a_file_closed_during_its_sync_is_closed_behind_it(disk: RealDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, errors = threading.Event(), threading.Event(), []

    def slow(descriptor: int) -> None:
        entered.set()
        leave.wait(30)
        try:
            os.fstat(descriptor)
        except OSError as error:
            errors.append(error)

    async def main() -> None:
        file = disk.open("f", create=True)
        descriptor = file._descriptor  # type: ignore[attr-defined]
        monkeypatch.setattr(env_module, "_sync_descriptor", slow)
        waiting = asyncio.ensure_future(file.sync())
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, 30)
        waiting.cancel()
        file.close()
        leave.set()
        await disk.sync_dir("")  # behind both on the one thread
        assert errors == []
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)

    asyncio.run(main())


def test_a_write_whose_waiter_is_gone_goes_into_its_own_file(disk: RealDisk) -> None:
    """Its descriptor is closed behind it: else its number would be that of the next file that is opened."""
    entered, leave = threading.Event(), threading.Event()

    def block(_: object) -> None:
        entered.set()
        leave.wait(30)

    async def main() -> None:
        blocking = asyncio.ensure_future(disk.on_worker(block, None))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, 30)
        file = disk.open("given up", create=True)
        waiting = asyncio.ensure_future(file.write([b"x" * 1000], sync=False))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        file.close()
        other = disk.open("other", create=True)
        other.append(b"its own")
        leave.set()
        await blocking
        await other.sync()  # behind all that was on its way
        assert (disk.root / "other").read_bytes() == b"its own"
        assert (disk.root / "given up").read_bytes() == b"x" * 1000

    asyncio.run(main())


def test_a_directory_belongs_to_one_node(tmp_path: Path) -> None:
    first = RealDisk(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"data_dir = '{tmp_path}': in use by another node \(process {os.getpid()}\)"
    ):
        RealDisk(tmp_path)
    first.close()
    first.close()
    second = RealDisk(tmp_path)
    with pytest.raises(OSError, match="the disk is closed"):
        asyncio.run(first.sync_dir(""))
    second.close()


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    code = "import sys; from gostore.env import RealDisk; RealDisk(sys.argv[1]); print('locked', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=rf"in use by another node \(process {process.pid}\)"):
            RealDisk(tmp_path)
        process.kill()
    RealDisk(tmp_path).close()


def test_a_directory_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path in (file, file / "below"):
        with pytest.raises(ConfigError, match=f"data_dir = '{path}': is not a directory"):
            RealDisk(path)
    with pytest.raises(ConfigError, match="cannot be created"):
        RealDisk(tmp_path / ("x" * 300))
    # The tests may run as root, whom no mode stops.
    monkeypatch.setattr(env_module.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="may not read and write it; check its owner and mode"):
        RealDisk(tmp_path)
    monkeypatch.undo()
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(ConfigError, match="cannot be used: Is a directory"):
        RealDisk(tmp_path)


def test_a_real_node_keeps_its_log_and_blobs(tmp_path: Path) -> None:
    async def life(expected: int) -> None:
        env = real_env("n1", tmp_path / "deep" / "node", seed=1)
        wal, blobs = await Wal.open(env, StorageConfig(segment_size_bytes_max=4096)), await BlobStore.open(env)
        assert wal.last_index(1) == expected == len(list(wal.records(1)))
        assert len(blobs) == (1 if expected else 0)
        for index in range(expected + 1, expected + 101):
            wal.append(1, 1, index, b"x" * 100)
            if index % 10 == 0:
                await wal.sync()
        await blobs.put("2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", b"x")
        await wal.close()
        await env.tasks.stop()
        env.disk.close()

    for expected in (0, 100, 200):
        asyncio.run(life(expected))
    assert sorted(path.name for path in (tmp_path / "deep" / "node").iterdir()) == ["blobs", LOCK_NAME, "wal"]


def test_a_seed_makes_randomness_repeat(tmp_path: Path) -> None:
    drawn = []
    for number in range(3):
        env = real_env("n1", tmp_path / str(number), seed=5 if number else None)
        drawn.append(env.rng.random())
        env.disk.close()
    assert drawn[1] == drawn[2] != drawn[0]


def test_tasks_are_owned_and_their_errors_reported() -> None:
    async def main() -> None:
        reported: list[tuple[str, str]] = []
        tasks = Tasks("n1", lambda name, error: reported.append((name, str(error))))
        ended: list[str] = []

        async def wait(name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        async def fail() -> None:
            raise ValueError("no")

        tasks.start(wait("a"), name="a")
        tasks.start(wait("b"), name="b")
        failed = tasks.start(fail(), name="c")
        await asyncio.wait([failed])
        assert (reported, tasks.failed, len(tasks)) == ([("n1/c", "no")], 1, 2)
        await tasks.stop()
        assert (ended, len(tasks)) == (["a", "b"], 0)
        with pytest.raises(RuntimeError, match="starts no task 'd'"):
            tasks.start(wait("d"), name="d")

    asyncio.run(main())


def test_fatal_is_said_once(tmp_path: Path) -> None:
    env: Env = real_env("n1", tmp_path)
    said: list[str] = []
    env.on_fatal = said.append
    env.fatal("first")
    env.fatal("second")
    env.disk.close()
    assert said == ["first"]


def test_a_lone_command_on_a_quick_disk_is_synced_at_once(disk: RealDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on the worker when the disk is slow, when much is written, or when the worker is at it already."""
    syncs: list[tuple[bool, bytes]] = []
    took_s, now_s = 0.0, 0.0

    def sync(descriptor: int) -> None:
        nonlocal now_s
        now_s += took_s
        content = os.pread(descriptor, 100_000, 0)
        syncs.append((threading.current_thread() is threading.main_thread(), content[-1:]))

    monkeypatch.setattr(env_module, "_sync_descriptor", sync)
    monkeypatch.setattr(env_module.time, "monotonic", lambda: now_s)
    file = disk.open("f", create=True)

    def write(*parts: bytes) -> list[bool]:
        """Whether each sync was at once."""
        syncs.clear()

        async def main() -> None:
            for part in parts:
                await file.write([part], sync=True)

        asyncio.run(main())
        assert [last for _, last in syncs] == [part[-1:] for part in parts], "what is synced was written before"
        return [at_once for at_once, _ in syncs]

    assert write(b"a") == [False], "nothing is known of it yet"
    for _ in range(100):
        write(b"b")
    assert write(b"c", b"d") == [True, True]
    assert write(b"." * (env_module.INLINE_SIZE_BYTES_MAX + 1)) == [False]
    took_s = 0.02
    assert write(b"e", b"f") == [True, False], "one slow sync is enough"
    took_s = 0.0
    assert write(b"g") == [False]
    assert [*(write(b"h")[0] for _ in range(50))][-1], "and it is trusted again"


def test_what_the_worker_has_begun_comes_first(disk: RealDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick disk with a sync under way: what is written later lies behind, and waits for its turn."""
    held, real = threading.Event(), env_module._sync_descriptor
    file = disk.open("f", create=True)

    async def main() -> None:
        disk._sync_s = 0.0
        monkeypatch.setattr(env_module, "_sync_descriptor", lambda descriptor: (held.wait(30), real(descriptor)))
        first = asyncio.create_task(file.write([b"1" * (env_module.INLINE_SIZE_BYTES_MAX + 1)], sync=True))
        await asyncio.sleep(0)
        second = asyncio.create_task(file.write([b"2"], sync=True))
        await asyncio.sleep(0)
        assert not first.done()
        held.set()
        await asyncio.gather(first, second)

    asyncio.run(main())
    assert file.read(file.size() - 2, 2) == b"12"

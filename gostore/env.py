"""The real environment of a node: loop, wall clock, randomness, disk, tasks.

``Env`` is all that a node knows of its world. The simulator builds the same class from a virtual loop, an in-memory
network and a disk that can lose what was not synced; the node cannot tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final

from gostore.core.errors import ConfigError
from gostore.core.events import Events
from gostore.core.ports import Clock, Disk, File, Rng
from gostore.core.stamps import HybridClock


class RealClock:
    """The machine's wall clock."""

    def wall_s(self) -> float:
        return time.time()


class Tasks:
    """The owner of a node's background tasks: it cancels and awaits them all, in the order of their start.

    A task that ends with an error is reported (log, event, statistics), never lost; the others go on.
    """

    def __init__(self, name: str, report: Callable[[str, BaseException], None]) -> None:
        self._name = name
        self._report = report
        # A dictionary, not a set: its order does not depend on addresses.
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._closed = False
        self.failed = 0

    def start(self, coroutine: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run a coroutine as a task of this node. Raises ``RuntimeError`` after :meth:`stop`."""
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"{self._name} is stopping; it starts no task {name!r}")
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}/{name}")
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed += 1
            self._report(task.get_name(), error)

    async def stop(self) -> None:
        """Cancel all and wait until each has ended. Safe to call from one of them."""
        self._closed = True
        current = asyncio.current_task()
        while tasks := [task for task in self._tasks if task is not current]:
            for task in tasks:
                task.cancel()
            for task in tasks:
                await asyncio.wait([task])

    def __len__(self) -> int:
        return len(self._tasks)


@dataclass
class Env:
    """One node's world. ``sockets``: already bound ones, by ``"tcp"``, ``"udp"``, ``"rest"`` (socket activation)."""

    name: str
    clock: Clock
    rng: Rng
    disk: Disk
    log: logging.Logger
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    events: Events = field(init=False)
    hlc: HybridClock = field(init=False)
    tasks: Tasks = field(init=False)
    on_fatal: Callable[[str], None] | None = None
    """Called once when the node cannot go on (a failed fsync); whoever owns the node stops it."""

    def __post_init__(self) -> None:
        self.hlc = HybridClock()
        self.events = Events(
            self.name,
            stamp=lambda: self.hlc.peek(self.wall_ms()),
            time_s=lambda: asyncio.get_running_loop().time(),
        )
        self.tasks = Tasks(self.name, self._task_failed)

    def wall_ms(self) -> int:
        """Wall time in whole milliseconds since 1970, for stamps."""
        return int(self.clock.wall_s() * 1000)

    def fatal(self, reason: str) -> None:
        """The node must not go on: stop it."""
        self.log.critical("%s: %s", self.name, reason)
        if self.on_fatal is not None:
            callback, self.on_fatal = self.on_fatal, None
            callback(reason)

    def _task_failed(self, task: str, error: BaseException) -> None:
        self.log.error("task %s failed", task, exc_info=error)
        self.events.publish("task_failed", task=task, error=f"{type(error).__name__}: {error}")


def real_rng(seed: int | None = None) -> Rng:
    """Randomness for a real node: from the operating system's entropy unless a seed is given."""
    return random.Random(seed)


INLINE_SIZE_BYTES_MAX: Final = 4096
"""What is written and synced without a hop to the worker, while the disk is quick: a lone command, and not a batch of
them, for then there is other work to do meanwhile."""

QUICK_S: Final = 0.001
"""A disk is quick while its syncs take less on average: then waiting for one costs hardly more than handing it over."""

_SHARE: Final = 1 / 8
"""Of the latest sync in the moving average: one of 10 ms hands the next ones to the worker."""

LOCK_NAME = "lock"
"""The file in a data directory by which its node keeps others out."""


class RealFile:
    """A file of a :class:`RealDisk`. This handle is its only writer, so the size is known without asking."""

    def __init__(self, disk: RealDisk, name: str, descriptor: int) -> None:
        self.name = name
        self._disk = disk
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._busy = 0  # calls on the worker

    def append(self, data: bytes | bytearray | memoryview) -> int:
        offset = self._size
        self._append(self._open(), data)
        return offset

    def _append(self, descriptor: int, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            # A disk that runs full takes a part: the size counts what has arrived even when the next write raises.
            written = os.write(descriptor, rest)
            self._size += written
            rest = rest[written:]

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._open(), size, offset)
        while 0 < len(data) < size and (more := os.pread(self._open(), size - len(data), offset + len(data))):
            data += more
        return data

    def size(self) -> int:
        return self._size

    def truncate(self, size: int) -> None:
        os.ftruncate(self._open(), size)
        self._size = size

    async def write(self, parts: Sequence[bytes | memoryview], *, sync: bool) -> None:
        descriptor, disk = self._open(), self._disk

        def write(_: None) -> None:
            for part in parts:
                self._append(descriptor, part)
            if sync:
                disk.sync_descriptor(descriptor)

        if sync and disk.quick and not self._busy and sum(map(len, parts)) <= INLINE_SIZE_BYTES_MAX:
            write(None)
        else:
            await self._on_worker(write, None)

    async def sync(self) -> None:
        await self._on_worker(self._disk.sync_descriptor, self._open())

    async def _on_worker(self, function: Callable[[Any], None], argument: Any) -> None:
        # Whoever waits may be cancelled, and the call is made all the same: the descriptor is busy until it has ended.
        self._busy += 1
        await self._disk.on_worker(function, argument, self._end)

    def _end(self) -> None:
        self._busy -= 1

    def drop_cache(self) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._open(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        self._disk.release(self, descriptor, busy=self._busy > 0)

    def _open(self) -> int:
        if self._descriptor < 0:
            raise OSError(errno.EBADF, "the file is closed", self.name)
        return self._descriptor


class Worker:
    """A thread that makes one call after the other.

    An executor does the same in 130 us for each call instead of 45, and three times the processor time: its futures are
    made for more than one waiting loop. A commit waits for a sync, so it waits for this.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[Any], None], Any, Callable[[Exception | None], object]] | None]
        self._calls = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, function: Callable[[Any], None], argument: Any, done: Callable[[Exception | None], object]
    ) -> None:
        """Make the call behind all others; ``done`` is told on the thread how it ended."""
        self._calls.put((function, argument, done))

    def shutdown(self) -> None:
        """Return when all calls have been made."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, argument, done = call
            error: Exception | None = None
            try:
                function(argument)
            except Exception as caught:  # whatever it is: whoever waits for the call raises it
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop that waited is closed
                done(error)


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


class RealDisk:
    """One directory of the real file system, locked for one node.

    Reads and small writes are plain system calls (the page cache answers them); what waits for the medium runs on one
    worker thread, so that a slow disk delays the syncs and not the event loop. A lone command on a :attr:`quick` disk
    is synced at once, as the way to the thread and back takes as long and keeps a client waiting. Raises
    :class:`~gostore.core.errors.ConfigError` when the directory cannot be used or belongs to a running node.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self._files: dict[RealFile, None] = {}
        self._worker: Worker | None = None
        self._sync_s = QUICK_S  # moving average
        _make_durably(self.root)
        self._lock = _lock(self.root)

    def open(self, name: str, *, create: bool = False) -> File:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        file = RealFile(self, name, os.open(self._path(name), flags, 0o600))
        self._files[file] = None
        return file

    def read_bytes(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def listdir(self, name: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path(name)))
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def mkdir(self, name: str) -> None:
        self._path(name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def rename(self, old: str, new: str) -> None:
        self._path(old).replace(self._path(new))

    def remove(self, name: str) -> None:
        self._path(name).unlink()

    async def sync_dir(self, name: str) -> None:
        await self.on_worker(_sync_directory, self._path(name))

    def close(self) -> None:
        """Close all files, wait for syncs under way and give the directory up; a second call does nothing."""
        if self._lock < 0:
            return
        for file in tuple(self._files):
            file.close()
        if self._worker is not None:
            self._worker.shutdown()
        os.close(self._lock)
        self._lock = -1

    @property
    def quick(self) -> bool:
        """Its syncs are as short as a turn of the loop."""
        return self._sync_s < QUICK_S

    def sync_descriptor(self, descriptor: int) -> None:
        begun_s = time.monotonic()
        _sync_descriptor(descriptor)
        self._sync_s += _SHARE * (time.monotonic() - begun_s - self._sync_s)

    async def on_worker(
        self, function: Callable[[Any], None], argument: Any, ended: Callable[[], None] = lambda: None
    ) -> None:
        """Run a call that waits for the medium on the disk's one thread; ``ended`` is told when it has been made."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def end(error: Exception | None) -> None:
            ended()
            _resolve(future, error)

        self._thread().submit(function, argument, lambda error: loop.call_soon_threadsafe(end, error))
        await future

    def release(self, file: RealFile, descriptor: int, *, busy: bool) -> None:
        """Close a file's descriptor; behind its syncs when some are ``busy``, as its number would be used again."""
        self._files.pop(file, None)
        if busy:
            # What the syncs before it told is known; that a close fails says nothing more, and nobody waits for it.
            self._thread().submit(os.close, descriptor, lambda error: None)
        else:
            os.close(descriptor)

    def _thread(self) -> Worker:
        if self._lock < 0:
            raise OSError(errno.EBADF, "the disk is closed", str(self.root))
        if self._worker is None:
            self._worker = Worker("gostore-disk")
        return self._worker

    def _path(self, name: str) -> Path:
        parts = name.split("/") if name else []
        if "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r} is no name in a data directory: relative names without '.' and '..' are")
        return self.root.joinpath(*parts)


def _sync_descriptor(descriptor: int) -> None:
    import fcntl  # absent on Windows, where only the simulated world runs

    if hasattr(fcntl, "F_FULLFSYNC"):
        # On macOS neither fsync nor fdatasync empties the drive's own cache.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_durably(root: Path) -> None:
    """Create a directory and its parents, on the medium too."""
    try:
        missing = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in missing:
            _sync_directory(path.parent)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"data_dir = {str(root)!r}: is not a directory; name one of this node alone") from None
    except OSError as error:
        raise ConfigError(f"data_dir = {str(root)!r}: cannot be created: {error.strerror}") from None


def _lock(root: Path) -> int:
    """Take the lock of a data directory; it lasts until the descriptor is closed or the process ends."""
    import fcntl

    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"data_dir = {str(root)!r}: this user may not read and write it; check its owner and mode")
    try:
        descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"data_dir = {str(root)!r}: cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(f"data_dir = {str(root)!r}: cannot be locked: {error.strerror}") from None
        raise ConfigError(
            f"data_dir = {str(root)!r}: in use by another node (process {holder or 'unknown'}); "
            "stop that one first or give this node a directory of its own"
        ) from None
    # For the message above only; a full disk may refuse it.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def real_env(
    name: str,
    data_dir: str | os.PathLike[str],
    *,
    sockets: dict[str, socket.socket] | None = None,
    seed: int | None = None,
) -> Env:
    """The world of a real node; whoever stops the node also calls ``env.disk.close()``.

    Raises :class:`~gostore.core.errors.ConfigError` when ``data_dir`` cannot be used or belongs to a running node.
    """
    return Env(
        name=name,
        clock=RealClock(),
        rng=real_rng(seed),
        disk=RealDisk(data_dir),
        log=logging.getLogger(f"gostore.{name}"),
        sockets=sockets or {},
    )

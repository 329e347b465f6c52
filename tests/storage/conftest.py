"""What the tests of the storage share: environments on simulated disks, a disk that crashes, a model of the log."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gostore.config import KIB, StorageConfig
from gostore.core.ports import File
from gostore.env import Env
from gostore.sim.disk import SimDisk
from gostore.storage import Wal

CONFIG = StorageConfig(segment_size_bytes_max=4 * KIB)


class FixedClock:
    def wall_s(self) -> float:
        return 1_700_000_000.0


class Crash(Exception):
    """The machine loses its power."""


class CrashingFile:
    def __init__(self, disk: CrashingDisk, file: File) -> None:
        self._disk, self._file = disk, file
        self.name = file.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def append(self, data: bytes) -> int:
        return self._disk.run("append", lambda: self._file.append(data))

    def truncate(self, size: int) -> None:
        return self._disk.run("truncate", lambda: self._file.truncate(size))

    async def write(self, parts: Sequence[bytes], *, sync: bool) -> None:
        for part in parts:
            self.append(part)
        if sync:
            await self.sync()

    async def sync(self) -> None:
        await self._disk.wait("sync", self._file.sync)


class CrashingDisk:
    """Loses its power at the ``crash_at``-th change, before it (even numbers) or after it (odd numbers)."""

    def __init__(self, disk: SimDisk, crash_at: int | None = None) -> None:
        self._disk, self._crash_at = disk, crash_at
        self.count = 0
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def open(self, name: str, *, create: bool = False) -> File:
        return CrashingFile(self, self.run("open", lambda: self._disk.open(name, create=create), free=not create))

    def mkdir(self, name: str) -> None:
        self.run("mkdir", lambda: self._disk.mkdir(name))

    def rename(self, old: str, new: str) -> None:
        self.run("rename", lambda: self._disk.rename(old, new))

    def remove(self, name: str) -> None:
        self.run("remove", lambda: self._disk.remove(name))

    async def sync_dir(self, name: str) -> None:
        await self.wait("sync_dir", lambda: self._disk.sync_dir(name))

    def run(self, what: str, call: Callable[[], Any], *, free: bool = False) -> Any:
        if free and not self.crashed:
            return call()
        self._point(what)
        answer = call()
        self._point(what)
        return answer

    async def wait(self, what: str, call: Callable[[], Awaitable[None]]) -> None:
        self._point(what)
        await call()
        self._point(what)

    @property
    def crashed(self) -> bool:
        return self._crash_at is not None and self.count > self._crash_at

    def _point(self, what: str) -> None:
        if self.crashed:
            raise Crash
        if self.count == self._crash_at:
            self._disk.power_cut()
        self.log.append(what)
        self.count += 1
        if self.crashed:
            raise Crash


Entries = tuple[int, tuple[tuple[int, int, bytes], ...]]  # first index, (term, kind, payload) of each
State = dict[int, Entries]


class LogModel:
    """All states that a log went through, and the one it may not fall behind."""

    def __init__(self) -> None:
        self.states: list[State] = [{}]
        self.acknowledged = 0

    @property
    def now(self) -> State:
        return self.states[-1]

    @property
    def number(self) -> int:
        return len(self.states) - 1

    def next(self, group: int) -> int:
        first, entries = self.now.get(group, (1, ()))
        return first + len(entries)

    def append(self, group: int, term: int, index: int, payload: bytes, kind: int) -> None:
        first, entries = self.now.get(group, (index, ()))
        assert index == first + len(entries)
        self._set(group, (first, (*entries, (term, kind, payload))))

    def truncate_suffix(self, group: int, index: int) -> None:
        first, entries = self.now.get(group, (1, ()))
        if index < first + len(entries):
            self._set(group, (first, entries[: index - first]))

    def truncate_prefix(self, group: int, index: int) -> None:
        first, entries = self.now.get(group, (-1, ()))
        if index > first:
            self._set(group, (index, entries[index - first :] if first >= 0 else ()))

    def _set(self, group: int, entries: Entries) -> None:
        self.states.append({**self.now, group: entries})

    def recovered(self, found: State) -> None:
        """Nothing acknowledged is missing, nothing was invented, and the order was kept: it is one of our states."""
        possible = [number for number in range(self.acknowledged, len(self.states)) if self.states[number] == found]
        assert possible, f"recovered {summary(found)}, expected one of {[summary(s) for s in self.states[-5:]]}"
        self.states = [found]
        self.acknowledged = 0


def summary(state: State) -> dict[int, tuple[int, int]]:
    return {group: (first, len(entries)) for group, (first, entries) in sorted(state.items())}


def state_of(wal: Wal) -> State:
    """What a log holds, read in both ways that it offers."""
    found: State = {}
    for group in wal.groups():
        records = list(wal.records(group))
        first = wal.first_index(group)
        assert [record.index for record in records] == list(range(first, wal.last_index(group) + 1))
        assert all(record.group == group for record in records)
        for record in records[:2] + records[-2:]:
            assert wal.entry(group, record.index) == record
        assert all(wal.term(group, record.index) == record.term for record in records)
        found[group] = (first, tuple((record.term, record.kind, record.payload) for record in records))
    return found


class Kit:
    """The helpers, for tests and fixtures of any scope."""

    CONFIG = CONFIG
    Crash = Crash
    CrashingDisk = CrashingDisk
    LogModel = LogModel
    state_of = staticmethod(state_of)

    @staticmethod
    def disk(seed: int = 0) -> SimDisk:
        return SimDisk(random.Random(seed))

    @staticmethod
    def env(disk: Any, seed: int = 0) -> Env:
        """``env.fatals`` lists what the node was stopped for."""
        log = logging.getLogger("gostore.tests.storage")
        log.disabled = True  # thousands of planned crashes
        env = Env("n1", FixedClock(), random.Random(seed), disk, log)
        env.fatals = fatals = []  # type: ignore[attr-defined]
        env.on_fatal = fatals.append
        return env

    @staticmethod
    @asynccontextmanager
    async def wal(disk: Any, config: StorageConfig = CONFIG, seed: int = 0) -> AsyncIterator[Wal]:
        """A log in one life of a process; it ends as a kill does unless the test closes it."""
        env = Kit.env(disk, seed)
        try:
            wal = await Wal.open(env, config)
            wal.env = env  # type: ignore[attr-defined]
            yield wal
        finally:
            await env.tasks.stop()
            disk.process_died()

    @staticmethod
    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(coroutine)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit

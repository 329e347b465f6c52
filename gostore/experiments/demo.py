"""The main job, without a browser: store a real directory tree, kill a node, recover, verify every byte."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sysconfig
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from gostore.core.errors import ConfigError, Corrupt, GoStoreError
from gostore.testbed import Testbed

T = TypeVar("T")

ROOT = "/demo"
Progress = Callable[[str], None]

FILES_IN_FLIGHT_MAX = 32
"""Files written or read at a time. More: better batches of syncs, more memory; each may hold a whole file."""

RECOVERY_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The figures of ``gostore demo --json``. Times in seconds, ``bytes`` before replication."""

    nodes: int
    ready_s: float
    files: int
    bytes: int
    written_s: float
    killed: str
    recovered_s: float
    read_s: float
    lost: int
    corrupt: int
    orphans: int
    under_replicated: int

    @property
    def fine(self) -> bool:
        return not (self.lost or self.corrupt or self.orphans or self.under_replicated)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def standard_library() -> Path:
    """The running Python's standard library: thousands of real files, a third of them under 4 KiB."""
    return Path(sysconfig.get_path("stdlib"))


def real_files(root: Path) -> list[tuple[str, Path]]:
    """(path below ``root``, file) of every regular file, sorted; caches and installed packages are left out.

    Raises :class:`ConfigError` when there is nothing to store.
    """
    found = list(_walk(root))
    if not found:
        raise ConfigError(f"path = {str(root)!r}: holds no files; name a directory tree to store")
    return found


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    if not root.is_dir():
        raise ConfigError(f"path = {str(root)!r}: not a directory; name a directory tree to store")
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in ("__pycache__", "site-packages", "dist-packages"))
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                yield str(file.relative_to(root)), file


async def run(cluster: Testbed, files: list[tuple[str, Path]], *, kill: str | None, progress: Progress) -> DemoResult:
    """Store, kill, recover, verify. ``kill``: a node's name; None: the one that holds the most chunks."""
    sums: dict[str, str] = {}
    sizes = 0
    begun = time.monotonic()

    async def store(entry: tuple[str, Path]) -> None:
        nonlocal sizes
        name, data = f"{ROOT}/{entry[0]}", entry[1].read_bytes()
        await cluster.fs.write(name, data)
        sums[name] = hashlib.sha256(data).hexdigest()
        sizes += len(data)

    await _for_each(iter(files), store)
    written_s = time.monotonic() - begun
    progress(f"stored {len(sums)} files, {sizes / 1e6:.1f} MB, in {written_s:.1f} s")

    victim = kill or await _fullest(cluster)
    begun = time.monotonic()
    await cluster.nodes[victim].kill()
    progress(f"killed {victim}")
    await cluster.wait_settled(timeout_s=RECOVERY_TIMEOUT_S)
    recovered_s = time.monotonic() - begun
    progress(f"recovered in {recovered_s:.1f} s: everything has its copies again")

    begun = time.monotonic()
    lost, corrupt = await _verify(cluster, sums)
    read_s = time.monotonic() - begun
    check = await cluster.fs.check()
    progress(f"read back {len(sums)} files in {read_s:.1f} s")
    return DemoResult(
        nodes=len(cluster.nodes), ready_s=round(cluster.ready_s, 3), files=len(sums), bytes=sizes,
        written_s=round(written_s, 3), killed=victim, recovered_s=round(recovered_s, 3), read_s=round(read_s, 3),
        lost=lost, corrupt=corrupt, orphans=check["orphans"], under_replicated=check["under_replicated"],
    )  # fmt: skip


async def _fullest(cluster: Testbed) -> str:
    statistics = await cluster.statistics()
    return max(sorted(statistics), key=lambda name: int(statistics[name]["blobs"]["blobs"]))


async def _verify(cluster: Testbed, sums: dict[str, str]) -> tuple[int, int]:
    """(files that cannot be read, files whose bytes differ), each read through the cluster anew."""
    lost = corrupt = 0

    async def read(path: str) -> None:
        nonlocal lost, corrupt
        try:
            data = await cluster.fs.read(path)
        except GoStoreError as error:
            corrupt += isinstance(error, Corrupt)
            lost += not isinstance(error, Corrupt)
        else:
            corrupt += hashlib.sha256(data).hexdigest() != sums[path]

    await _for_each(iter(sums), read)
    return lost, corrupt


async def _for_each(items: Iterator[T], work: Callable[[T], Coroutine[Any, Any, None]]) -> None:
    """Work on all items, ``FILES_IN_FLIGHT_MAX`` at a time; the first error ends it."""

    async def worker() -> None:
        for item in items:  # one iterator for all workers: each takes what comes next
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(FILES_IN_FLIGHT_MAX):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None

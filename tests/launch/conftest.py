"""Clusters of little nodes, and a watch on the processes that they leave."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gostore.launch.place import Place
from gostore.launch.processes import ProcessCluster

HERE = Path(__file__).parent
GONE_TIMEOUT_S = 20.0


def alive(pids: list[int]) -> list[int]:
    """Those that are still there; a zombie that its parent has not waited for counts."""
    return [pid for pid in pids if psutil.pid_exists(pid)]


def wait_gone(pids: list[int], timeout_s: float = GONE_TIMEOUT_S) -> None:
    """Wait until none of these processes is left; zombies of others (reaped by init) do not count."""
    deadline = time.monotonic() + timeout_s

    def left() -> list[int]:
        found = []
        for pid in pids:
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
            except psutil.NoSuchProcess:
                pass
        return found

    while rest := left():
        assert time.monotonic() < deadline, f"processes {rest} are still there"
        time.sleep(0.01)


def zygotes() -> list[int]:
    """Those of this process."""
    found = []
    for child in psutil.Process(os.getpid()).children():
        try:
            if "gostore.launch.zygote" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.ZombieProcess:
            found.append(child.pid)  # nobody has waited for it
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture(autouse=True)
def _entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zygote finds the little nodes where we do."""
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def little(tmp_path: Path) -> Iterator[Callable[..., ProcessCluster]]:
    """``little(3, path=..., **settings)``: a cluster of little nodes, not started; none is left at the end."""
    made: list[ProcessCluster] = []
    before = zygotes()

    def make(nodes: int | None = 3, *, path: Path | None = None, **keywords: Any) -> ProcessCluster:
        place = Place(path, entry="little_node:main")
        place.boot()
        options = {name: keywords.pop(name) for name in ("secret", "policies", "timeout_s", "name") if name in keywords}
        try:
            made.append(ProcessCluster(place, nodes, settings=keywords, **options))
        except BaseException:
            place.abandon()
            raise
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop_sync()
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while left := [pid for pid in zygotes() if pid not in before]:  # a dropped cluster ends in the background
        assert time.monotonic() < deadline, f"zygotes {left} were not waited for"
        time.sleep(0.01)

"""The zygote alone, spoken to over its pipes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gostore.core.errors import BadRequest, ConfigError, Unavailable
from gostore.launch.control import Control
from gostore.launch.spawn import start_zygote

from .conftest import HERE, wait_gone

TIMEOUT_S = 30.0


class Watched:
    """A zygote, and its events as they come."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        process = start_zygote(directory / "zygote.log", entry="trivial_node:main")
        self.pid = process.pid
        self.control = Control(process, directory / "zygote.log", self._on_event)

    def _on_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._news.set()

    async def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                self._news.clear()
                await self._news.wait()

    async def event(self, kind: str, node: str = "n1") -> dict[str, Any]:
        return await self.wait(lambda event: event["event"] == kind and event.get("node") == node)

    async def start(self, node: str = "n1", cluster: str = "calm") -> int:
        answer = await self.control.request("bind", node=node, host="127.0.0.1", tcp=0, udp=0, rest=0)
        self.ports = answer["ports"]
        config = {"name": node, "secret": "x" * 16, "data_dir": str(self.directory / node), "cluster": cluster}
        return int((await self.control.request("start", node=node, config=config))["pid"])


@asynccontextmanager
async def zygote(directory: Path) -> AsyncIterator[Watched]:
    watched = Watched(directory)
    await watched.control.open()
    try:
        await watched.control.hello()
        yield watched
    finally:
        await watched.control.ended()


def test_a_child_owns_its_sockets_and_nothing_of_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        async with zygote(tmp_path) as z:
            await z.control.request("bind", node="other", host="127.0.0.1", tcp=0, udp=0, rest=0)
            await z.start("n1")
            ready = await z.event("ready")
            assert ready["ports"] == z.ports
            # 0, 1, 2, three sockets, the pipe of its report, and the one that lists them.
            assert len(ready["open"]) == 8
            assert ready["session"] == z.pid != os.getsid(0)
            assert ready["sigterm"]

    asyncio.run(main())
    assert (tmp_path / "n1" / "node.log").read_text() == "n1 speaks\n"


def test_a_killed_childs_ports_refuse_and_can_be_bound_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with zygote(tmp_path) as z:
            pid = await z.start()
            ports = z.ports
            await z.event("ready")
            with socket.create_connection(("127.0.0.1", ports["tcp"])):
                await z.control.request("signal", node="n1", signal=signal.SIGKILL)
                exit_ = await z.event("exit")
            assert (exit_["pid"], exit_["status"]) == (pid, -signal.SIGKILL)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", ports["tcp"]))
            again = await z.control.request("bind", node="n1", host="127.0.0.1", **ports)
            assert again["ports"] == ports

    asyncio.run(main())


def test_a_port_in_use_is_one_clear_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with zygote(tmp_path) as z:
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                port = taken.getsockname()[1]
                for name in ("tcp", "rest"):
                    ports = {"tcp": 0, "udp": 0, "rest": 0, name: port}
                    with pytest.raises(ConfigError, match=rf"n1: (tcp_port|rest.port) = {port}: cannot be bound on"):
                        await z.control.request("bind", node="n1", host="127.0.0.1", **ports)
            with pytest.raises(ConfigError, match="host = '203.0.113.1': |cannot be bound on 203.0.113.1"):
                await z.control.request("bind", node="n1", host="203.0.113.1", tcp=0, udp=0, rest=0)

    asyncio.run(main())


def test_a_data_directory_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "n1").write_text("a file")

    async def main() -> None:
        async with zygote(tmp_path) as z:
            with pytest.raises(ConfigError, match=r"n1: data_dir = '.*n1': .*; expected a directory"):
                await z.start()

    asyncio.run(main())


def test_why_a_child_ends_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with zygote(tmp_path) as z:
            await z.start("n1", "refuses")
            assert (await z.event("failed"))["error"][:2] == ["config", "ring.replicas = 9: no"]
            assert (await z.event("exit"))["status"] == 1
            await z.start("n2", "crashes")
            assert (await z.event("exit", "n2"))["status"] == 70
            assert "RuntimeError: a bug in the node" in (tmp_path / "n2" / "node.log").read_text()
            await z.start("n3", "exits")
            assert (await z.event("exit", "n3"))["status"] == 3

    asyncio.run(main())


def test_children_that_end_all_at_once_are_all_told(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(40)]

    async def main() -> None:
        async with zygote(tmp_path) as z:
            await asyncio.gather(*(z.start(name, "exits") for name in names))
            assert [(await z.event("exit", name))["status"] for name in names] == [3] * 40

    asyncio.run(main())


def test_bad_requests_are_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with zygote(tmp_path) as z:
            with pytest.raises(BadRequest, match="do = 'dance': known are bind, start, signal, release"):
                await z.control.request("dance")
            with pytest.raises(BadRequest, match="n9 is not running"):
                await z.control.request("signal", node="n9", signal=9)
            with pytest.raises(BadRequest, match="n9 has no sockets"):
                await z.control.request("start", node="n9", config={})

    asyncio.run(main())


def test_children_end_with_the_zygote_also_when_stopped(tmp_path: Path) -> None:
    async def main() -> list[int]:
        async with zygote(tmp_path) as z:
            pids = [await z.start("n1"), await z.start("n2")]
            await z.event("ready")
            await z.event("ready", "n2")
            await z.control.request("signal", node="n2", signal=signal.SIGSTOP)
        return [*pids, z.pid]

    pids = asyncio.run(main())
    wait_gone(pids, timeout_s=0.5)  # they were waited for: nothing may be left


def test_children_end_when_the_zygote_is_killed(tmp_path: Path) -> None:
    async def main() -> list[int]:
        async with zygote(tmp_path) as z:
            pids = [await z.start("n1"), await z.start("n2")]
            await z.event("ready")
            await z.event("ready", "n2")
            await z.control.request("signal", node="n2", signal=signal.SIGSTOP)
            os.kill(z.pid, signal.SIGKILL)
            gone = await z.wait(lambda event: event["event"] == "gone")
            assert gone["expected"] is False
            with pytest.raises(Unavailable, match="the launcher process has ended"):
                await z.control.request("bind", node="n3", host="127.0.0.1", tcp=0, udp=0, rest=0)
            return pids

    wait_gone(asyncio.run(main()))


def test_a_zygote_that_cannot_import_the_node_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        process = start_zygote(tmp_path / "zygote.log", entry="no_such_module:main")
        control = Control(process, tmp_path / "zygote.log", lambda event: None)
        await control.open()
        with pytest.raises(Unavailable, match="No module named 'no_such_module'"):
            await control.hello()
        await control.ended()

    asyncio.run(main())


@pytest.mark.parametrize("forks", [False, True])
def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path, forks: bool) -> None:
    """``forks``: a fork of the owner holds the pipe open, and lives on."""
    command = [sys.executable, str(HERE / "zygote_owner.py"), str(tmp_path), str(forks)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    zygote_pid, node_pid, fork_pid = map(int, owner.stdout.readline().split())
    owner.kill()
    owner.wait()
    try:
        wait_gone([zygote_pid, node_pid])
    finally:
        if fork_pid:
            os.kill(fork_pid, signal.SIGKILL)
        owner.stdout.close()

"""The composition root: ``NodeConfig`` + ``Env`` -> ``Node``, and the ways a real node process runs.

The order of start: what lies on the disk, then the endpoint with every service registered (so that whoever watches can
subscribe before anything happens), then membership. A node counts as started when it answers calls; it is *ready* when
it is online in its own view.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

from gostore import fence
from gostore.comm import Endpoint
from gostore.config import NodeConfig
from gostore.consensus import PROFILES
from gostore.consensus.groups import Groups
from gostore.core.address import Address
from gostore.core.errors import GoStoreError
from gostore.core.slots import PolicySource
from gostore.env import Env, real_env
from gostore.services.admin import AdminService
from gostore.services.cls import ClsService, next_incarnation
from gostore.services.db import DbService
from gostore.services.fs import FsService, RestServer
from gostore.storage import BlobStore, Wal

EXIT_FATAL: Final = 70
"""Exit status of a node that could not go on (EX_SOFTWARE of sysexits.h)."""

EXIT_CONFIG: Final = 1

STOP_TIMEOUT_S: Final = 2.0
"""A graceful stop that takes longer is cut short: what was acknowledged is on the disk already."""


class _Members:
    """comm's resolver; it is needed before membership, which needs comm, exists."""

    def __init__(self) -> None:
        self.cls: ClsService | None = None

    def address(self, name: str) -> Address | None:
        return self.cls.address(name) if self.cls is not None else None


class Node:
    """One node: every service over one endpoint, one log and one chunk store."""

    def __init__(self, config: NodeConfig, env: Env) -> None:
        self.config = config
        self.env = env
        self.status = 0
        self._ended = asyncio.Event()
        self._stops: list[Callable[[], Coroutine[Any, Any, None]]] = []
        env.on_fatal = self._on_fatal

    async def start(self) -> None:
        """Return when the node answers calls; it joins its cluster in the background.

        Raises a :class:`GoStoreError` (``ConfigError``, ``Corrupt``) when it cannot; what had been started is stopped.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        config, env = self.config, self.env
        recovered = await fence.pass_fence(env, config.secret)
        self.wal = await Wal.open(env, config.storage)
        self._stops.append(self.wal.close)
        self.blobs = await BlobStore.open(env)
        members = _Members()
        self.endpoint = Endpoint(
            env, cluster=config.cluster, secret=config.secret, host=config.host, tcp_port=config.tcp_port,
            udp_port=config.udp_port, incarnation=await next_incarnation(env), resolver=members, config=config.comm,
        )  # fmt: skip
        self.groups = Groups(env, self.endpoint, self.wal, PROFILES[config.cls.profile])
        policy = config.policies.get("placement")
        self.cls = members.cls = ClsService(
            env, self.endpoint, self.wal, self.groups, config, PolicySource.from_wire(policy) if policy else None
        )
        self.db = DbService(env, self.endpoint, self.cls, self.wal, self.groups, config)
        self.fs = FsService(env, self.endpoint, self.cls, self.db.database, self.blobs, config, local=self.db.local)
        self.rest = RestServer(env, self.fs, config)
        self.admin = AdminService(
            env, self.endpoint, config, membership=self.cls, db=self.db, fs=self.fs, locator=self.fs,
            consensus=self.groups, storage={"wal": self.wal, "blobs": self.blobs}, stop=self.request_stop,
        )  # fmt: skip
        for service in (self.groups, self.cls, self.db, self.fs, self.admin):
            self.endpoint.register(service)
        await self._run(self.endpoint.start, self.endpoint.stop)
        await self._run(self.groups.start, self.groups.stop)
        await self._run(self.rest.start, self.rest.stop)
        self.cls.rest_port = self.rest.port
        await self._run(self.db.start, self.db.stop)
        await self._run(self.fs.start, self.fs.stop)
        env.events.publish("node_started", incarnation=self.endpoint.incarnation)
        if recovered is not None and recovered.lost:  # and not a node that came later
            env.log.warning("%s went through the recovery %s from a lost majority", env.name, recovered.id)
            env.events.publish(
                "lost_majority", recovery=recovered.id, groups=list(recovered.groups), lost=list(recovered.lost)
            )
        self._stops.append(self.cls.stop)
        env.tasks.start(self._join(), name="join")

    async def _run(
        self, start: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        self._stops.append(stop)
        await start()

    async def _join(self) -> None:
        try:
            await self.cls.start()
        except GoStoreError as error:
            self.env.fatal(f"cannot join: {error.message}")

    def _on_fatal(self, reason: str) -> None:
        self.env.events.publish("node_stopping", reason=reason)
        self.status = EXIT_FATAL
        self._ended.set()

    def request_stop(self) -> None:
        """End :meth:`wait_ended`; whoever waits there stops the node."""
        self._ended.set()

    async def wait_ended(self) -> None:
        """Return when the node was asked to stop, or cannot go on (``status`` is then not 0)."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Stop everything in the reverse order of its start. May be called again."""
        while self._stops:
            stop = self._stops.pop()
            try:
                await stop()
            except Exception:
                # The rest must be stopped all the same.
                self.env.log.exception("%s while stopping", stop)
        await self.env.tasks.stop()


def main_in_child(config: NodeConfig, sockets: dict[str, socket.socket], ready_fd: int) -> int:
    """The life of a node process that the zygote has forked; returns its exit status.

    ``sockets``: bound ones by ``"tcp"``, ``"udp"``, ``"rest"``. One JSON line on ``ready_fd`` tells that the node
    answers calls (``{"ready": {...}}``), or why it does not (``{"error": [...]}``, as ``GoStoreError.to_wire``).
    """

    def say(line: dict[str, Any]) -> None:
        os.write(ready_fd, json.dumps(line).encode() + b"\n")

    try:
        return _run_loop(_serve(config, sockets, lambda figures: say({"ready": figures})))
    except GoStoreError as error:
        say({"error": error.to_wire()})
        return EXIT_CONFIG


def run(config: NodeConfig, *, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """One node in this process until it is told to stop (SIGTERM, SIGINT).

    Raises a :class:`GoStoreError` when it cannot start, and ``SystemExit`` when it could not go on.
    """
    status = _run_loop(_serve(config, {}, on_ready))
    if status:
        raise SystemExit(status)


def _run_loop(main: Coroutine[Any, Any, int]) -> int:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.run(main)
    return uvloop.run(main)


async def _serve(
    config: NodeConfig, sockets: dict[str, socket.socket], on_ready: Callable[[dict[str, Any]], None]
) -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    env = real_env(config.name, config.data_dir, sockets=sockets)
    node = Node(config, env)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.request_stop)
    try:
        await node.start()
        address = node.endpoint.address
        on_ready(
            {
                "name": config.name,
                "incarnation": node.endpoint.incarnation,
                "host": address.host,
                "tcp_port": address.tcp_port,
                "udp_port": address.udp_port,
                "rest_port": node.rest.port,
            }
        )
        await node.wait_ended()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await node.stop()
        except TimeoutError:
            env.log.warning("the stop took longer than %s s and was cut short", STOP_TIMEOUT_S)
    finally:
        env.disk.close()
    return node.status

"""A client of a cluster that runs elsewhere: ``connect("HOST:PORT", secret)``, or by the cluster's directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gostore.client.connection import Connection, client_env
from gostore.client.files import FsHandle
from gostore.client.objects import DbHandle
from gostore.client.record import RECORD, read_record
from gostore.client.thread import client_thread
from gostore.config import split_host_port
from gostore.core.address import Address
from gostore.core.errors import ConfigError, Unavailable
from gostore.core.twins import Runner, SyncTwins, sync_twin

SECRET_VARIABLE = "GOSTORE_SECRET"  # noqa: S105 - the name of a variable
CLUSTER_VARIABLE = "GOSTORE_CLUSTER"
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a cluster is, and what proves that one belongs to it."""

    cluster: str
    secret: str = field(repr=False)
    members: Mapping[str, Address] = field(default_factory=dict)
    seeds: tuple[Address, ...] = ()


class AdminHandle(SyncTwins):
    """The control channel of single nodes."""

    def __init__(self, runner: Runner, connection: Callable[[], Connection]) -> None:
        self._runner = runner
        self._connection = connection

    async def members(self) -> dict[str, dict[str, Any]]:
        """Name -> state, address, rest_port, incarnation, as one node sees it."""
        connection = self._connection()
        status = (await connection.call("admin", "status", repeatable=True)).value
        connection.learn(status)
        return dict(status["members"])

    members_sync = sync_twin(members)

    async def status(self, node: str) -> dict[str, Any]:
        """What a node says of itself."""
        return dict((await self._connection().call_node(node, "admin", "status")).value)

    status_sync = sync_twin(status)

    async def statistics(self, node: str) -> dict[str, Any]:
        """Cumulative figures of a node since its start, by part."""
        return dict((await self._connection().call_node(node, "admin", "statistics")).value)

    statistics_sync = sync_twin(statistics)

    async def stop(self, node: str) -> None:
        """End a node, in order."""
        await self._connection().call_node(node, "admin", "stop")

    stop_sync = sync_twin(stop)


class Client(SyncTwins):
    """``fs``, ``db`` and ``admin`` of a cluster, inside ``async with`` or ``with``."""

    def __init__(self, target: Target) -> None:
        self._runner = client_thread()
        self._target = target
        self._open: Connection | None = None
        self.fs = FsHandle(self._runner, self._connected)
        self.db = DbHandle(self._runner, self._connected)
        self.admin = AdminHandle(self._runner, self._connected)

    def _connected(self) -> Connection:
        if self._open is None:
            raise Unavailable("this client is not connected; use it inside `async with` or `with`")
        return self._open

    async def open(self) -> Self:
        """Connect, and learn who the members are. Raises :class:`Unreachable` or :class:`Timeout` when nobody answers.

        A wrong secret looks like silence: packets that cannot be verified are dropped.
        """
        if self._open is None:
            target = self._target
            connection = Connection(
                client_env(), cluster=target.cluster, secret=target.secret, members=target.members,
                seeds=target.seeds, host=host_for([*target.members.values(), *target.seeds]),
            )  # fmt: skip
            await connection.open()
            try:
                await connection.refresh(CONNECT_TIMEOUT_S)
            except BaseException:
                await connection.close()
                raise
            self._open = connection
        return self

    open_sync = sync_twin(open)

    async def close(self) -> None:
        """End the connection; the cluster goes on. A second call does nothing."""
        if self._open is not None:
            connection, self._open = self._open, None
            await connection.close()

    close_sync = sync_twin(close)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        return self.open_sync()

    def __exit__(self, *_: object) -> None:
        self.close_sync()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.open().__await__()

    def __repr__(self) -> str:
        return f"<client of {self._target.cluster!r}>"


def connect(address: str, secret: str, *, cluster: str = "gostore") -> Client:
    """A client of the cluster that ``address`` (``HOST:PORT``, the TCP port of any member) belongs to.

    ``cluster``: its name. Raises :class:`ConfigError`.
    """
    host, port = split_host_port("address", address)
    if len(secret) < 16:
        raise ConfigError(f"secret: {len(secret)} characters; a cluster's secret has at least 16")
    return Client(Target(cluster, secret, seeds=(Address(host, port, 0),)))


def read_connection(at: str | os.PathLike[str]) -> Target:
    """Where the cluster is: ``at`` is its directory (``gostore up --path``), or ``HOST:PORT``.

    With the latter the secret is taken from ``GOSTORE_SECRET``, the cluster's name from ``GOSTORE_CLUSTER``. Raises
    :class:`ConfigError` that says what to do.
    """
    record = read_record(Path(at))
    if record is not None:
        members = {
            name: Address(facts["host"], facts["ports"]["tcp"], facts["ports"]["udp"])
            for name, facts in record["nodes"].items()
        }
        return Target(record["cluster"], record["secret"], members)
    text = os.fspath(at)
    if ":" not in text or os.sep in text:
        raise ConfigError(
            f"at = {text!r}: there is no {RECORD} in it; name the directory of a cluster (gostore up --path DIR), "
            f"or HOST:PORT with the secret in {SECRET_VARIABLE}"
        )
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        raise ConfigError(f"at = {text!r}: the secret is missing; put it into the variable {SECRET_VARIABLE}")
    host, port = split_host_port("at", text)
    return Target(os.environ.get(CLUSTER_VARIABLE, "gostore"), secret, seeds=(Address(host, port, 0),))


def connect_at(at: str | os.PathLike[str]) -> Client:
    """A client of the cluster at a place: see :func:`read_connection`."""
    return Client(read_connection(at))


def host_for(addresses: list[Address]) -> str:
    """Where to listen for answers: on loopback when the whole cluster is there."""
    if all(address.host in ("127.0.0.1", "localhost") for address in addresses):
        return "127.0.0.1"
    return "::" if any(":" in address.host for address in addresses) else "0.0.0.0"  # noqa: S104

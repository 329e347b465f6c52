"""Listening and connecting: the handshake of :mod:`gostore.sim.streams`."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextvars import copy_context
from typing import Any

from gostore.sim.handles import SimHandle
from gostore.sim.loop import SimLoop
from gostore.sim.net import ANY, LOOPBACK, Host, Network
from gostore.sim.sockets import SimSocket, SocketAddress
from gostore.sim.streams import SimServer, SimStream


def _os_error(number: int, what: str) -> OSError:
    return OSError(number, f"{os.strerror(number)}: {what}")


class _Attempt:
    """A connection being made."""

    __slots__ = ("future", "given_up", "near", "retry_s", "since", "target")

    def __init__(self, future: asyncio.Future[Any], near: SocketAddress, target: SocketAddress, now: float) -> None:
        self.future = future
        self.near = near
        self.target = target
        self.since = now
        self.retry_s = 0.0
        self.given_up = False


class Streams:
    """Connecting and listening, for all hosts of a network."""

    def __init__(self, net: Network) -> None:
        self._net = net

    async def create_server(
        self,
        loop: SimLoop,
        protocol_factory: Any,
        host: Any,
        port: Any,
        *,
        sock: SimSocket | None = None,
        backlog: int = 100,
        ssl: Any = None,
        start_serving: bool = True,
        reuse_port: bool | None = None,
        **options: Any,
    ) -> SimServer:
        """As asyncio's. Raises ``OSError`` when the address is taken, ``NotImplementedError`` for TLS."""
        _refuse_tls(ssl)
        server = SimServer(loop, protocol_factory, backlog)
        if sock is not None:
            host, port = sock.getsockname()
        wanted = [host] if host is None or isinstance(host, str) else list(host)
        number = int(port or 0)
        for name in wanted:
            local = name if name is None or name in ANY else self._net.resolve(loop.host, name)
            bound = loop.host.bind(socket.SOCK_STREAM, local, number, server, shared=bool(reuse_port))
            server.names.append(bound)
        if sock is not None:
            sock.name = server.names[0]
        if start_serving:
            await server.start_serving()
        return server

    async def create_connection(
        self,
        loop: SimLoop,
        protocol_factory: Any,
        host: Any,
        port: Any,
        *,
        sock: SimSocket | None = None,
        ssl: Any = None,
        local_addr: SocketAddress | None = None,
        **options: Any,
    ) -> tuple[SimStream, Any]:
        """As asyncio's. Raises ``OSError``: refused, timed out, no such host; ``NotImplementedError`` for TLS."""
        _refuse_tls(ssl)
        if sock is None:
            stream = await self.connect(loop, host, int(port), local_addr)
        elif sock.stream is not None:
            stream = sock.stream
        else:
            raise ValueError(f"{sock!r} is not connected; await loop.sock_connect(sock, address) first")
        if stream.gone:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        protocol = protocol_factory()
        stream.start(protocol)
        return stream, protocol

    async def sock_connect(self, loop: SimLoop, sock: SimSocket, address: SocketAddress) -> None:
        """Connect a socket that somebody made by himself."""
        stream = await self.connect(loop, address[0], int(address[1]), sock.name)
        sock.stream = stream
        sock.name, sock.peer = stream.get_extra_info("sockname"), stream.get_extra_info("peername")

    async def connect(self, loop: SimLoop, host: Any, port: int, local: SocketAddress | None) -> SimStream:
        """A connection without a protocol yet."""
        source = loop.host
        address = self._net.resolve(source, host or LOOPBACK)
        own = LOOPBACK if address.startswith("127.") else source.address
        near = (own, local[1] if local is not None and local[1] else source.free_port(socket.SOCK_STREAM))
        attempt = _Attempt(loop.create_future(), near, (address, port), self._net.scheduler.now)
        attempt.retry_s = self._net.config.connect_retry_s
        self._send_syn((loop, attempt))
        try:
            stream: SimStream = await attempt.future
        except BaseException:
            attempt.given_up = True
            raise
        return stream

    def _send_syn(self, item: tuple[SimLoop, _Attempt]) -> None:
        loop, attempt = item
        if attempt.given_up or loop.dead:
            return
        net, source = self._net, loop.host
        if net.scheduler.now - attempt.since >= net.config.tcp_timeout_s:
            _settle(loop, attempt, error=_os_error(errno.ETIMEDOUT, f"connect to {attempt.target}"))
            return
        host = net.find(source, attempt.target[0])
        if host is source:
            net.scheduler.after(net.config.loopback_latency_s, self._syn_arrives, (loop, attempt, host))
            return
        link = None if host is None else net.links.get(source.name, host.name)
        if host is not None and link is not None and not link.cut and not _lost(link.loss, source):
            net.scheduler.after(link.draw_s(source.rng), self._syn_arrives, (loop, attempt, host))
        else:
            self._retry(loop, attempt)

    def _retry(self, loop: SimLoop, attempt: _Attempt) -> None:
        """Nobody answered."""
        self._net.scheduler.after(attempt.retry_s, self._send_syn, (loop, attempt))
        attempt.retry_s *= 2

    def _syn_arrives(self, item: tuple[SimLoop, _Attempt, Host]) -> None:
        loop, attempt, host = item
        if attempt.given_up or loop.dead:
            return
        net, source = self._net, loop.host
        back_s = net.config.loopback_latency_s
        if host is not source:
            there, back = net.links.get(source.name, host.name), net.links.get(host.name, source.name)
            if host.down or there.cut or back.cut or _lost(back.loss, host):
                self._retry(loop, attempt)
                return
            back_s = back.draw_s(host.rng)
        # A loopback address of the target is not reachable from outside, which find() has seen to.
        server = host.sockets.get((socket.SOCK_STREAM, attempt.target[0], attempt.target[1]))
        net.scheduler.trace.message(net.scheduler.now, b"C", source.index, host.index, b"")
        if server is None or not server.is_serving():
            error = ConnectionRefusedError(
                errno.ECONNREFUSED, f"Connect call failed {attempt.target}: nobody listens there on {host.name}"
            )
            net.scheduler.after(back_s, _refused, (loop, attempt, error))
        elif not server.takes():
            self._retry(loop, attempt)
        else:
            near = SimStream.pair(net, (loop, attempt.near), (server.get_loop(), attempt.target))
            net.scheduler.after(back_s, _established, (loop, attempt, near))
            server.connected(near.outgoing.target)


def _lost(probability: float, host: Host) -> bool:
    return probability > 0 and host.rng.random() < probability


def _refused(item: tuple[SimLoop, _Attempt, OSError]) -> None:
    loop, attempt, error = item
    _settle(loop, attempt, error=error)


def _established(item: tuple[SimLoop, _Attempt, SimStream]) -> None:
    loop, attempt, stream = item
    if attempt.given_up:
        stream.abort()
    else:
        _settle(loop, attempt, stream=stream)


def _settle(loop: SimLoop, attempt: _Attempt, *, stream: SimStream | None = None, error: OSError | None = None) -> None:
    loop.post(SimHandle(_set_outcome, (attempt, stream, error), copy_context()))


def _set_outcome(attempt: _Attempt, stream: SimStream | None, error: OSError | None) -> None:
    future = attempt.future
    if future.done():
        if stream is not None:
            stream.abort()
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(stream)


def _refuse_tls(ssl: Any) -> None:
    if ssl:
        raise NotImplementedError("TLS draws on the operating system's entropy; the simulated network has none")

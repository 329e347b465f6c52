"""The asyncio protocols below an endpoint: its datagram socket, accepted connections, and one-shot outgoing streams.

Each direction between two endpoints has a connection of its own, opened by the side that has something large to say.
A stream begins with a packet without frames: until a first packet with a right tag has come, an accepted connection
may buffer no more than ``UNPROVEN_SIZE_BYTES_MAX``.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

from gostore.comm.wire import LENGTH_PREFIX_SIZE_BYTES, ProtocolError, StreamDecoder, length_prefix

UNPROVEN_SIZE_BYTES_MAX: Final = 1024
# Above this many queued bytes, senders that can wait do; casts are dropped above four times as many.
STREAM_QUEUE_SIZE_BYTES: Final = 1024 * 1024
STREAM_QUEUE_SIZE_BYTES_MAX: Final = 4 * STREAM_QUEUE_SIZE_BYTES
# Bytes that the peer's kernel does not take for this long break the connection, so that calls are sent again on a
# new one while they still have time. Seconds.
STREAM_STALL_S: Final = 3.0
# Asked for; the kernel gives what it allows. A burst of answers must not overflow it. Bytes.
DATAGRAM_BUFFER_SIZE_BYTES: Final = 4 * 1024 * 1024

Parts = list[bytes | memoryview]


class Datagrams(asyncio.DatagramProtocol):
    """The UDP side. ``full``: the socket's buffer is; packets are dropped (and sent again by their calls)."""

    def __init__(self, receive: Callable[[bytes, str, Inbound | None], bool]) -> None:
        self._receive = receive
        self.full = False
        self.errors = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        _set_option(transport, socket.SOL_SOCKET, socket.SO_RCVBUF, DATAGRAM_BUFFER_SIZE_BYTES)

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._receive(data, addr[0], None)

    def error_received(self, exc: Exception) -> None:
        # ICMP says that nobody listens there: the peer may be starting, so the calls' retries decide.
        self.errors += 1

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


class Inbound(asyncio.Protocol):
    """An accepted connection: packets come in, nothing goes out."""

    def __init__(
        self,
        receive: Callable[[bytes, str, Inbound | None], bool],
        accept: Callable[[Inbound], bool],
        lost: Callable[[Inbound], None],
        refuse: Callable[[str, int], None],
        limit: int,
    ) -> None:
        self._receive = receive
        self._accept = accept
        self._lost = lost
        self._refuse = refuse
        self._limit = limit
        self._decoder = StreamDecoder(UNPROVEN_SIZE_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._host = ""
        self.proven = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        name = transport.get_extra_info("peername")
        self._host = name[0] if name else ""
        if not self._accept(self):
            self.abort()

    def data_received(self, data: bytes) -> None:
        self._decoder.feed(data)
        try:
            while self._transport is not None and (packet := self._decoder.next()) is not None:
                if self._receive(packet, self._host, self):
                    if not self.proven:
                        self.proven = True
                        self._decoder.limit = self._limit
                elif not self.proven:
                    self.abort()
        except ProtocolError as error:
            self._refuse(error.reason, len(data))
            self.abort()

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost(self)


class Stream(asyncio.Protocol):
    """One outgoing connection: connecting, then open, then closed for good. Packets queue in order.

    ``serial`` tells connections apart: what was written to a stream that is still open arrives, or the stream breaks.
    """

    def __init__(self, serial: int, preamble: Parts, closed: Callable[[Stream], None]) -> None:
        self.serial = serial
        self.closed = False
        self.queued_bytes = 0
        self._queue: deque[tuple[Parts, int]] = deque()
        self._transport: asyncio.Transport | None = None
        self._full = False
        self._on_closed = closed
        self._waiters: deque[asyncio.Future[None]] = deque()
        self.send(preamble)

    def send(self, packet: Parts) -> None:
        size = sum(map(len, packet))
        self._queue.append(([length_prefix(size), *packet], size + LENGTH_PREFIX_SIZE_BYTES))
        self.queued_bytes += size + LENGTH_PREFIX_SIZE_BYTES
        self._pump()

    @property
    def congested(self) -> bool:
        """Whether those who can wait should, in :meth:`writable`."""
        return self.queued_bytes > STREAM_QUEUE_SIZE_BYTES

    async def writable(self) -> None:
        """Return when little is queued, or the stream is closed."""
        while self.congested and not self.closed:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def abort(self) -> None:
        """Break the connection at once; what is queued is lost."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        self._close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self.closed:
            cast(asyncio.Transport, transport).abort()
            return
        _set_option(
            transport, socket.IPPROTO_TCP, getattr(socket, "TCP_USER_TIMEOUT", None), int(STREAM_STALL_S * 1000)
        )
        self._transport = cast(asyncio.Transport, transport)
        self._pump()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._close()

    def _pump(self) -> None:
        while self._transport is not None and not self._full and self._queue:
            parts, size = self._queue.popleft()
            self.queued_bytes -= size
            self._transport.writelines(parts)
        if not self.congested:
            self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _close(self) -> None:
        if not self.closed:
            self.closed = True
            self._queue.clear()
            self.queued_bytes = 0
            self._wake()
            self._on_closed(self)


def _set_option(transport: asyncio.BaseTransport, level: int, option: int | None, value: int) -> None:
    """A wish to the kernel, where there is a kernel socket and it knows the option."""
    handle = transport.get_extra_info("socket")
    if handle is not None and option is not None:
        try:
            handle.setsockopt(level, option, value)
        except OSError:
            pass

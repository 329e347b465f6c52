"""Byte streams that behave like TCP, message by message instead of packet by packet.

Theory of operation
-------------------
A connection is two :class:`SimStream` transports and, between them, two :class:`Flow` objects, one for each direction.

*Sending.* ``write`` puts bytes into the transport's buffer (above the high-water mark the protocol is told to pause).
From there they go, in segments, as far as the window allows: bytes that are under way or not yet read by the
receiver's protocol are at most ``window_bytes``. A receiver that does not read therefore stops the sender:
back-pressure.

*Under way.* Segments arrive after the latency of the link and the time on the sender's interface, and are delivered in
order. One that is lost, or meets a cut link or a machine without power, waits in ``Flow.stalled`` until the
retransmission timer fires, or until three later ones have got through: loss costs time, never bytes. When the sender
has heard no acknowledgement for ``tcp_timeout_s`` (the link is cut, in either direction), its side of the connection is
reset with ``TimeoutError``. The other side learns nothing of it until it sends, as in reality.

*Ends.* ``close`` flushes and sends FIN; ``write_eof`` closes one direction; ``abort``, closing with unread bytes, and
bytes for a connection that is gone cause RST, which the other side sees as ``ConnectionResetError``. When a *process*
dies its kernel closes its connections, so its peers see the end at once. When the *power* is cut nobody says anything:
peers time out, or are reset by the restarted machine, which knows nothing of them.

*Connecting.* A SYN that is lost is sent again after ``connect_retry_s``, doubling, until ``tcp_timeout_s``; a port on
which nobody listens refuses; a backlog that is full ignores. The kernel answers, not the process: one can connect to a
paused node.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from gostore.sim.flow import Flow
from gostore.sim.handles import SimHandle
from gostore.sim.loop import SimLoop
from gostore.sim.sockets import SimSocket, SocketAddress

if TYPE_CHECKING:
    from gostore.sim.net import Host, Network

# As asyncio's defaults for socket transports.
HIGH_WATER_BYTES = 65_536
LOW_WATER_BYTES = 16_384
# As much as asyncio reads from a socket at once.
READ_BYTES_MAX = 262_144


class SimStream(asyncio.Transport):
    """One end of a connection: the transport that a node's protocol is given."""

    outgoing: Flow
    incoming: Flow

    def __init__(self, loop: SimLoop, host: Host, name: SocketAddress, peer: SocketAddress) -> None:
        described = SimSocket.named(socket.SOCK_STREAM, name, peer)
        super().__init__({"sockname": name, "peername": peer, "socket": described})
        self.host = host
        self.name = name
        self.started = False
        self.gone = False  # no process holds this end any more
        self.consumed_bytes = 0
        self.server: SimServer | None = None
        self._loop = loop
        self._protocol: Any = None
        self._context = copy_context()
        self._closing = False
        self._eof_wanted = False
        self._eof_sent = False
        self._lost = False  # connection_lost is called or about to be
        self._buffer: deque[bytes] = deque()
        self._buffer_bytes = 0
        self._high_bytes, self._low_bytes = HIGH_WATER_BYTES, LOW_WATER_BYTES
        self._protocol_paused = False
        self._received: deque[bytes] = deque()
        self._received_eof = False
        self._eof_told = False
        self._reading = True
        self._delivering = False
        host.streams[self] = None

    def __repr__(self) -> str:
        state = "gone" if self.gone else "closing" if self._closing else "open"
        return f"<SimStream {self.name} -> {self.get_extra_info('peername')} {state}>"

    @staticmethod
    def pair(net: Network, client: tuple[SimLoop, SocketAddress], server: tuple[SimLoop, SocketAddress]) -> SimStream:
        """A new connection; returns the client's end, whose ``outgoing.target`` is the server's."""
        near = SimStream(client[0], client[0].host, client[1], server[1])
        far = SimStream(server[0], server[0].host, server[1], client[1])
        near.outgoing = far.incoming = Flow(net, near, far)
        far.outgoing = near.incoming = Flow(net, far, near)
        return near

    def start(self, protocol: Any) -> None:
        """Hand the connection to its protocol."""
        self.started = True
        self._context = copy_context()
        self.set_protocol(protocol)
        protocol.connection_made(self)
        self._deliver_soon()

    # -- from the network; these run between the callbacks of the nodes

    def arrived(self, data: bytes, fin: bool) -> None:
        config, rng = self.host.net.config, self.host.rng
        if len(data) > 1 and rng.random() < config.split:
            cut = rng.randrange(1, len(data))
            self._received.append(data[:cut])
            # The second piece is read by itself: the first callback takes the first only.
            self._received.append(b"")
            self._received.append(data[cut:])
        elif data:
            self._received.append(data)
        if fin:
            self._received_eof = True
        self._deliver_soon()

    def window_opened(self, _: None) -> None:
        if not self.gone and self._buffer:
            self._loop.post(SimHandle(self._write_ready, (), self._context))
        elif self.gone and self._buffer:
            self._pump()  # the process has closed or died; its kernel goes on sending

    def broken(self, error: OSError) -> None:
        """The connection is lost: reset by the peer, or silent for too long."""
        self.outgoing.dead = self.incoming.dead = True
        self._received.clear()
        self._buffer.clear()
        self._buffer_bytes = 0
        if not self.gone:
            if self.started:
                self._loop.post(SimHandle(self._lose, (error,), self._context))
            else:
                self._leave()

    def process_died(self) -> None:
        """The node was killed: its kernel closes the connection."""
        if not self.gone:
            self.gone = True
            self._kernel_close()

    def vanish(self) -> None:
        """The machine lost its power."""
        self.gone = True
        self.outgoing.dead = True

    # -- reading, on the node's loop

    def _deliver_soon(self) -> None:
        if self._delivering or not self._reading or not self.started or self._lost:
            return
        if self._received or (self._received_eof and not self._eof_told):
            self._delivering = True
            self._loop.post(SimHandle(self._deliver, (), self._context))

    def _deliver(self) -> None:
        self._delivering = False
        if not self._reading or self._lost or self._closing:
            return
        if self._received:
            data = self._take_received()
            self.consumed_bytes += len(data)
            self._loop.charge(len(data))
            self.incoming.read()
            if isinstance(self._protocol, asyncio.BufferedProtocol):
                asyncio.protocols._feed_data_to_buffered_proto(self._protocol, data)  # type: ignore[attr-defined]
            else:
                self._protocol.data_received(data)
        elif self._received_eof and not self._eof_told:
            self._eof_told = True
            if not self._protocol.eof_received():
                self.close()
        self._deliver_soon()

    def _take_received(self) -> bytes:
        received, size = self._received, 0
        pieces: list[bytes] = []
        while received and size < READ_BYTES_MAX:
            piece = received.popleft()
            if not piece:  # a boundary of the network's making
                if pieces:
                    break
                continue
            pieces.append(piece)
            size += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._deliver_soon()

    # -- writing

    def write(self, data: Any) -> None:
        if self._eof_wanted:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or self._lost or self._loop.dead or not data:
            return
        data = bytes(data)
        self._loop.charge(len(data))
        self._buffer.append(data)
        self._buffer_bytes += len(data)
        self._pump()
        if self._buffer_bytes > self._high_bytes and not self._protocol_paused:
            self._protocol_paused = True
            self._tell("pause_writing")

    def _pump(self) -> None:
        """Move bytes from the buffer to the network, as far as the window allows; then FIN, if it is wanted."""
        buffer, flow = self._buffer, self.outgoing
        segment_max = self.host.net.config.segment_bytes_max
        while buffer and not flow.dead:
            room = min(flow.room(), segment_max)
            if room <= 0:
                return
            data = buffer[0]
            if len(data) > room:
                buffer[0] = data[room:]
                data = data[:room]
            else:
                buffer.popleft()
            self._buffer_bytes -= len(data)
            flow.send(data)
        if not buffer and self._eof_wanted and not self._eof_sent:
            self._eof_sent = True
            flow.send(b"", fin=True)

    def _write_ready(self) -> None:
        if self._lost:
            return
        self._pump()
        if self._protocol_paused and self._buffer_bytes <= self._low_bytes:
            self._protocol_paused = False
            self._tell("resume_writing")
        if self._closing and not self._buffer:
            self._lose(None)

    def _tell(self, what: str) -> None:
        try:
            getattr(self._protocol, what)()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._loop.call_exception_handler(
                {"message": f"protocol.{what}() failed", "exception": error, "transport": self}
            )

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._closing and not self._eof_wanted and not self._loop.dead:
            self._eof_wanted = True
            self._pump()

    def get_write_buffer_size(self) -> int:
        return self._buffer_bytes

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return (self._low_bytes, self._high_bytes)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER_BYTES if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high_bytes, self._low_bytes = high, low
        if self._buffer_bytes > high and not self._protocol_paused:
            self._protocol_paused = True
            self._tell("pause_writing")

    # -- ends

    def is_closing(self) -> bool:
        return self._closing or self.gone or self._loop.is_closed()

    def close(self) -> None:
        """Stop reading, send what is buffered, then FIN."""
        if self._closing or self._lost or self._loop.dead:
            return
        self._closing = True
        if not self._buffer:
            self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        """Drop what is buffered and reset the connection."""
        if self._lost or self._loop.dead:
            return
        self._closing = True
        self._buffer.clear()
        self._buffer_bytes = 0
        self.outgoing.reset()
        if self.started:
            self._loop.call_soon(self._lose, None)
        else:
            self._leave()

    def _lose(self, error: OSError | None) -> None:
        """The end, seen by the process."""
        if self._lost:
            return
        self._lost = self._closing = True
        try:
            self._protocol.connection_lost(error)
        finally:
            self._leave()
            if self.server is not None:
                self.server.detach()
            if error is None:
                self._kernel_close()

    def _leave(self) -> None:
        self.gone = True
        self.host.streams.pop(self, None)

    def _kernel_close(self) -> None:
        """FIN after what is buffered; RST when there are bytes that nobody has read."""
        if self._received:
            self.outgoing.reset()
            return
        self._eof_wanted = True
        self._pump()

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol


class SimServer(asyncio.AbstractServer):
    """A listening socket. ``backlog`` connections may wait to be accepted."""

    def __init__(self, loop: SimLoop, protocol_factory: Callable[[], Any], backlog: int) -> None:
        self._loop = loop
        self._factory = protocol_factory
        self._backlog = backlog
        self._context = copy_context()
        self._serving = False
        self._closed = False
        self._forever: asyncio.Future[None] | None = None
        self._waiting = 0
        self._open = 0
        self.names: list[SocketAddress] = []

    def __repr__(self) -> str:
        return f"<SimServer {self.names}>"

    @property
    def sockets(self) -> tuple[SimSocket, ...]:
        return () if self._closed else tuple(SimSocket.named(socket.SOCK_STREAM, name) for name in self.names)

    def takes(self) -> bool:
        """Whether the kernel would take another connection."""
        return self._serving and self._waiting < self._backlog

    def connected(self, stream: SimStream) -> None:
        """The kernel has a new connection for the process."""
        self._waiting += 1
        self._loop.post(SimHandle(self._accept, (stream,), self._context))

    def _accept(self, stream: SimStream) -> None:
        self._waiting -= 1
        if stream.gone or self._closed:
            stream.abort()
            return
        try:
            protocol = self._factory()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:
            stream.abort()
            raise
        stream.server = self
        self._open += 1
        stream.start(protocol)

    def detach(self) -> None:
        self._open -= 1

    def get_loop(self) -> SimLoop:
        return self._loop

    def is_serving(self) -> bool:
        return self._serving

    async def start_serving(self) -> None:
        self._serving = not self._closed

    async def serve_forever(self) -> None:
        if self._forever is not None:
            raise RuntimeError(f"server {self!r} is already being awaited on serve_forever()")
        if self._closed:
            raise RuntimeError(f"server {self!r} is closed")
        self._serving = True
        self._forever = self._loop.create_future()
        try:
            await self._forever
        finally:
            self._forever = None
            self.close()

    def close(self) -> None:
        if not self._closed and not self._loop.dead:
            self._closed = True
            self._serving = False
            self._loop.host.unbind(self)
            if self._forever is not None and not self._forever.done():
                self._forever.cancel()

    async def wait_closed(self) -> None:
        """Returns at once, as on uvloop, where real nodes run: connections outlive their server."""
        await asyncio.sleep(0)

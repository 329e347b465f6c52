"""The way out: frames -> faults -> packets -> datagrams and streams.

Frames for one peer that are sent in one turn of the loop share packets. What does not fit a datagram goes over the
peer's stream, which is connected when it is first needed and again when it broke.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any, Final

from gostore.comm.links import DELAYED_FRAMES_MAX, Links
from gostore.comm.peers import Peer
from gostore.comm.transport import STREAM_QUEUE_SIZE_BYTES_MAX, Datagrams, Stream
from gostore.comm.wire import CAST, KIND_NAMES, REQUEST, Codec, Frame, Identity
from gostore.core.address import Address
from gostore.core.events import EventId
from gostore.env import Env

CONNECT_TIMEOUT_S: Final = 1.0
# After a failed or broken connection frames are dropped for this long, before the next is tried. Seconds.
RECONNECT_WAIT_S: Final = 0.05
# A host name is looked up again after this, and after this when that failed. Seconds.
HOST_KNOWN_S: Final = 30.0
LOOK_UP_AGAIN_S: Final = 1.0
HOSTS_CACHED_MAX: Final = 4096


class Outbox:
    """Sends frames for one endpoint. ``resolve`` gives a peer's address, ``local`` takes frames to oneself."""

    def __init__(
        self,
        env: Env,
        codec: Codec,
        links: Links,
        datagram_size_bytes_max: int,
        resolve: Callable[[Peer], Address | None],
        local: Callable[[Frame], None],
    ) -> None:
        self._env = env
        self._codec = codec
        self._links = links
        self._datagram_max = datagram_size_bytes_max
        self._resolve = resolve
        self._local = local
        self._loop = asyncio.get_running_loop()
        self._dirty: dict[Peer, None] = {}
        self._flushing: asyncio.Handle  # while there are dirty ones
        self._streams: dict[int, Stream] = {}
        self._last_serial = 0
        self._sent_frames = 0
        self._delayed = 0
        self._hosts: dict[str, tuple[str | None, float]] = {}
        self._transport: asyncio.DatagramTransport | None = None
        self._datagrams: Datagrams | None = None
        self.identity: Identity
        self.paused = False
        self.closed = False
        self.statistics: dict[str, int] = {}

    def open(self, transport: asyncio.DatagramTransport, datagrams: Datagrams, identity: Identity) -> None:
        self._transport, self._datagrams, self.identity = transport, datagrams, identity

    def close(self) -> None:
        self.closed = True
        for stream in tuple(self._streams.values()):
            stream.abort()
        if self._transport is not None:
            self._transport.close()

    def count(self, what: str, amount: int = 1) -> None:
        self.statistics[what] = self.statistics.get(what, 0) + amount

    def drop(self, peer: str, reason: str, size_bytes: int, cause: EventId | None = None) -> None:
        """Count and tell what does not arrive. ``cause``: the event of its send."""
        self.count(f"dropped_{reason}")
        if self._env.events.messages:
            self._env.events.publish("drop", cause=cause, peer=peer, reason=reason, bytes=size_bytes)

    def send(self, peer: Peer, frame: Frame, *, stream: bool = False) -> int:
        """Send a frame as soon as this turn of the loop ends; the serial of the stream it goes over, 0 for a datagram.

        ``stream``: over the stream even when it is small, to keep its place behind what went there before.
        """
        env = self._env
        frame.stamp = env.hlc.tick(env.wall_ms())
        if peer.name == env.name:
            self._loop.call_soon(self._local, frame)
            return 0
        stream = stream or peer.overhead(self.identity) + frame.size_bytes > self._datagram_max
        if self.paused or self.closed:
            self.drop(peer.name, "paused" if self.paused else "closed", frame.size_bytes)
            return 0
        # Counted whether or not anybody listens, so that listening changes no byte on the wire.
        self._sent_frames += 1
        frame.cause = self._sent_frames
        if env.events.messages:
            self._publish(peer, frame, "tcp" if stream else "udp")
        if self._links.outgoing and (fault := self._links.outgoing.get(peer.name)) is not None:
            delays = fault.plan(env.rng)
            if not delays:
                self.drop(peer.name, "fault", frame.size_bytes, self._id_of(frame))
                if stream and peer.stream is not None:
                    peer.stream.abort()
                return 0
            serial = 0
            for delay_s in delays:
                serial = self._later(delay_s, peer, frame, stream)
            return serial
        return self._enqueue(peer, frame, stream)

    def _id_of(self, frame: Frame) -> EventId:
        """The event of this frame's latest send."""
        return (self._env.name, -frame.cause)

    def _publish(self, peer: Peer, frame: Frame, transport: str) -> None:
        service, _, function = frame.route.decode(errors="replace").partition(".")
        kind = "redirect" if frame.origin and frame.kind == REQUEST else KIND_NAMES[frame.kind]
        self._env.events.publish(
            "send",
            cause=frame.parent,
            stamp=frame.stamp,
            message=frame.cause,
            to=peer.name,
            service=service,
            function=function,
            frame=kind,
            request=frame.id,
            bytes=frame.size_bytes,
            transport=transport,
        )

    def _later(self, delay_s: float, peer: Peer, frame: Frame, stream: bool) -> int:
        if delay_s <= 0.0:
            return self._enqueue(peer, frame, stream)
        if self._delayed >= DELAYED_FRAMES_MAX:
            self.drop(peer.name, "overflow", frame.size_bytes, self._id_of(frame))
            return 0

        bound = (peer.incarnation, peer.conversation.session) if frame.kind in (REQUEST, CAST) else None

        def release() -> None:
            self._delayed -= 1
            if self.closed or (bound is not None and bound != (peer.incarnation, peer.conversation.session)):
                # Sent now it would be bound to another life of the peer, or another session.
                self.drop(peer.name, "stale", frame.size_bytes, self._id_of(frame))
            else:
                self._enqueue(peer, frame, stream)

        self._delayed += 1
        self._loop.call_later(delay_s, release)
        return 0

    def discard(self, peer: Peer) -> None:
        """The peer was reborn, or is forgotten: what was on its way to it must not arrive in another session."""
        peer.outbox.clear()
        if peer.stream is not None:
            peer.stream.abort()

    def _enqueue(self, peer: Peer, frame: Frame, stream: bool) -> int:
        encoded = frame.encode()
        if stream:
            return self._enqueue_stream(peer, frame, encoded)
        if frame.data:
            encoded += frame.data
        peer.outbox.append(encoded)
        if peer not in self._dirty:
            if not self._dirty:
                self._flushing = self._loop.call_soon(self._flush)
            self._dirty[peer] = None
        return 0

    def flush(self) -> None:
        """Send now what would go when this turn of the loop ends."""
        if self._dirty:
            self._flushing.cancel()
            self._flush()

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for peer in dirty:
            frames, peer.outbox = peer.outbox, []
            room = self._datagram_max - peer.overhead(self.identity)
            first, size = 0, 0
            for index, encoded in enumerate(frames):
                size += len(encoded)
                if size > room:
                    self._send_datagram(peer, frames[first:index])
                    first, size = index, len(encoded)
            if frames:
                self._send_datagram(peer, frames[first:] if first else frames)

    def _send_datagram(self, peer: Peer, frames: list[bytes]) -> None:
        address = self._resolve(peer)
        host = self._host(address.host) if address is not None else None
        if self._transport is None or self._transport.is_closing() or self._datagrams is None:
            reason = "closed"
        elif address is None or host is None:
            reason = "unresolved"
        elif self._datagrams.full:
            reason = "overflow"
        else:
            packet = b"".join(self._seal(peer, frames, stream=False))
            try:
                self._transport.sendto(packet, (host, address.udp_port))
            except ValueError:  # an address of another family than the socket's
                reason = "unresolved"
            else:
                self._sent("udp", len(packet), len(frames))
                return
        self.drop(peer.name, reason, sum(map(len, frames)))

    def _sent(self, transport: str, size: int, frames: int) -> None:
        statistics = self.statistics
        for key, amount in (
            ("sent_packets_" + transport, 1),
            ("sent_bytes_" + transport, size),
            ("sent_frames", frames),
        ):
            statistics[key] = statistics.get(key, 0) + amount

    def _seal(self, peer: Peer, parts: list[Any], *, stream: bool) -> list[bytes | memoryview]:
        conversation = peer.conversation
        return self._codec.seal(
            self.identity, peer.encoded, peer.incarnation, conversation.session, peer.next_counter(stream=stream), parts
        )

    def _enqueue_stream(self, peer: Peer, frame: Frame, encoded: bytes) -> int:
        stream = self._stream(peer)
        if stream is None:
            self.drop(peer.name, "unconnected", frame.size_bytes, self._id_of(frame))
            return 0
        if frame.kind == CAST and stream.queued_bytes > STREAM_QUEUE_SIZE_BYTES_MAX:
            self.drop(peer.name, "overflow", frame.size_bytes, self._id_of(frame))
            return 0
        packet = self._seal(peer, [encoded, frame.data], stream=True)
        stream.send(packet)
        self._sent("tcp", frame.size_bytes, 1)
        return stream.serial

    def _stream(self, peer: Peer) -> Stream | None:
        if peer.stream is not None:
            return peer.stream
        address = self._resolve(peer)
        if address is None or self._loop.time() - peer.stream_failed_s < RECONNECT_WAIT_S:
            return None

        def closed(stream: Stream) -> None:
            self._streams.pop(stream.serial, None)
            if peer.stream is stream:
                peer.stream = None
                peer.stream_failed_s = self._loop.time()

        self._last_serial += 1
        stream = Stream(self._last_serial, self._seal(peer, [], stream=True), closed)
        try:
            self._env.tasks.start(self._connect(stream, address), name=f"connect {peer.name or address}")
        except RuntimeError:  # the node is stopping
            return None
        peer.stream = self._streams[stream.serial] = stream
        return stream

    async def _connect(self, stream: Stream, address: Address) -> None:
        connected = False
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._loop.create_connection(lambda: stream, address.host, address.tcp_port)
                connected = True
        except (OSError, TimeoutError):
            self.count("connections_failed")  # whoever waits sends again
        finally:
            if not connected:
                stream.abort()

    def _host(self, host: str) -> str | None:
        """The IP address of a host; None while a name is being looked up, or when it cannot be."""
        found = self._hosts.get(host)
        if found is not None and found[1] > self._loop.time():
            return found[0]
        if len(self._hosts) >= HOSTS_CACHED_MAX:
            self._hosts.clear()
        if _is_ip(host):
            self._hosts[host] = (host, float("inf"))
            return host
        known = found[0] if found is not None else None
        self._hosts[host] = (known, self._loop.time() + LOOK_UP_AGAIN_S)
        try:
            self._env.tasks.start(self._look_up(host), name=f"look up {host}")
        except RuntimeError:  # the node is stopping
            pass
        return known

    async def _look_up(self, host: str) -> None:
        try:
            self._hosts[host] = (await look_up(host), self._loop.time() + HOST_KNOWN_S)
        except OSError as error:
            self._env.log.warning("host %r cannot be resolved: %s", host, error)


async def look_up(host: str) -> str:
    """The IP address of a host name, or of an address itself. Raises ``OSError``."""
    if _is_ip(host):
        return host
    found = await asyncio.get_running_loop().getaddrinfo(host, None)
    return str(found[0][4][0])


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

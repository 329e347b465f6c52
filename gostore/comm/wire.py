"""Packets and frames: bytes in, bytes out, nothing else.

Theory of operation
-------------------
A *packet* goes from one endpoint to one peer and carries any number of *frames*::

    version 1 | cluster id 8 | receiver incarnation 8 | session 4 | counter 8 | receiver length 1 | identity length 1
    receiver name | identity (incarnation 8, TCP port 2, UDP port 2, name length 1, name, host) | frames | tag 16

The tag is keyed BLAKE2b (RFC 7693) over everything before it, under a key that is derived from the cluster's secret:
one hash serves all frames of a packet, and nothing but version and cluster id is looked at before it is checked. The
*receiver's* name and incarnation are in the packet, so that what was meant for another node, or for an earlier life of
this one, is recognised. *Session* is the number under which the receiver remembers the sender (see ``calls``). The
*counter* rises with every packet to the receiver: :class:`ReplayWindow` refuses what it has seen, the classical sliding
bitmap (RFC 4303 section 3.4.3, RFC 6479). UDP overtakes TCP, so each has its own counter space: ``STREAM_BIT`` marks
TCP's.

A *frame* is one message: a header of fixed size, then route (``service.function``), origin (who asked first, when a
request was redirected), a msgpack body and raw data. On TCP a packet is preceded by its length in 4 bytes.

Sizes are checked before memory is taken. Whatever is wrong with what came from outside is one exception,
:class:`ProtocolError`, whose ``reason`` is one of :data:`REASONS`; the endpoint counts it and goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from hmac import compare_digest
from typing import Any, Final

import msgpack

from gostore.core import packing
from gostore.core.address import Address

VERSION: Final = 1
TAG_SIZE_BYTES: Final = 16
NAME_SIZE_BYTES_MAX: Final = 63
STREAM_BIT: Final = 1 << 63
REPLAY_WINDOW_PACKETS: Final = 1024
_WINDOW_MASK: Final = (1 << REPLAY_WINDOW_PACKETS) - 1
IDENTITIES_CACHED_MAX: Final = 8192
# What a packet needs beside body and data: header, names, route, origin, tag.
PACKET_OVERHEAD_BYTES_MAX: Final = 2048
LENGTH_PREFIX_SIZE_BYTES: Final = 4

HELLO: Final = 1
HELLO_ACK: Final = 2
REQUEST: Final = 3
RESPONSE: Final = 4
ERROR: Final = 5
CAST: Final = 6
WORKING: Final = 7
UNSEEN: Final = 8
REFUSED: Final = 9
KIND_NAMES: Final = (
    "",
    "hello",
    "hello_ack",
    "request",
    "response",
    "error",
    "cast",
    "working",
    "unseen",
    "refused",
)

# A retry on the connection that already carries the request: "have you got it?", without body and data.
POKE: Final = 1

REASONS: Final = ("truncated", "version", "foreign", "tag", "malformed", "oversized")

_HEADER = struct.Struct(">B8sQIQBB")
_IDENTITY = struct.Struct(">QHHB")
_FRAME = struct.Struct(">BBBBHIQQQQIII")
_LENGTH = struct.Struct(">I")
FRAME_HEADER_SIZE_BYTES: Final = _FRAME.size
PACKET_HEADER_SIZE_BYTES: Final = _HEADER.size
_PACKET_SIZE_BYTES_MIN: Final = _HEADER.size + _IDENTITY.size + 1 + TAG_SIZE_BYTES


class ProtocolError(Exception):
    """What arrived is not a packet of ours; ``reason`` is one of :data:`REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


pack: Final = packing.pack


def unpack(body: bytes | memoryview) -> Any:
    """The value in ``body``. Raises :class:`ProtocolError` (malformed)."""
    try:
        return msgpack.unpackb(body, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException):
        raise ProtocolError("malformed") from None


class Identity:
    """Who sent a packet: name, incarnation and the address at which it can be answered."""

    __slots__ = ("address", "encoded", "incarnation", "name")

    def __init__(self, name: str, incarnation: int, address: Address) -> None:
        self.name = name
        self.incarnation = incarnation
        self.address = address
        raw, host = name.encode(), address.host.encode()
        size = _IDENTITY.size + len(raw) + len(host)
        if not 0 < len(raw) <= NAME_SIZE_BYTES_MAX or size > 255:
            raise ValueError(f"name {name!r} or host {address.host!r} is empty or too long for a packet")
        self.encoded = _IDENTITY.pack(incarnation, address.tcp_port, address.udp_port, len(raw)) + raw + host

    @classmethod
    def parse(cls, encoded: bytes) -> Identity:
        """Raises :class:`ProtocolError`."""
        try:
            incarnation, tcp_port, udp_port, length = _IDENTITY.unpack_from(encoded)
            name = encoded[_IDENTITY.size : _IDENTITY.size + length]
            if not 0 < length <= NAME_SIZE_BYTES_MAX or len(name) != length:
                raise ProtocolError("malformed")
            host = encoded[_IDENTITY.size + length :]
            return cls(name.decode(), incarnation, Address(host.decode(), tcp_port, udp_port))
        except (struct.error, ValueError):
            raise ProtocolError("malformed") from None


class Origin:
    """Who asked first, in a request that was redirected; the answer goes there, under that request's id."""

    __slots__ = ("address", "id", "incarnation", "name")

    def __init__(self, name: str, incarnation: int, address: Address, request_id: int) -> None:
        self.name = name
        self.incarnation = incarnation
        self.address = address
        self.id = request_id

    def encode(self) -> bytes:
        return pack([self.name, self.incarnation, self.address.to_wire(), self.id])

    @classmethod
    def parse(cls, encoded: bytes) -> Origin:
        """Raises :class:`ProtocolError`."""
        match unpack(encoded):
            case [str(name), int(incarnation), address, int(request_id)] if (
                0 < len(name.encode(errors="replace")) <= NAME_SIZE_BYTES_MAX
                and 0 <= incarnation < 1 << 64
                and 0 <= request_id < 1 << 64
            ):
                try:
                    return cls(name, incarnation, Address.from_wire(address), request_id)
                except ValueError:
                    raise ProtocolError("malformed") from None
        raise ProtocolError("malformed")


class Frame:
    """One message. ``cause`` is its number among all that the sender sends, by which the event of its send is known.

    ``id`` is the request's (in an answer: the request that it answers). ``acknowledged``: the sender awaits no answer
    to a request below it; in a hello_ack and a refusal it is a session. ``remaining_ms``: until the deadline.
    ``parent`` does not travel: the event that made this side send, when the sending is put off. What the frame carries
    stays as it was made: ``size_bytes`` is taken once.
    """

    __slots__ = (
        "acknowledged",
        "body",
        "cause",
        "data",
        "epoch",
        "flags",
        "hops",
        "id",
        "kind",
        "origin",
        "parent",
        "remaining_ms",
        "route",
        "size_bytes",
        "stamp",
    )

    def __init__(
        self,
        kind: int,
        request_id: int = 0,
        route: bytes = b"",
        body: bytes = b"",
        data: bytes | memoryview = b"",
        *,
        flags: int = 0,
        hops: int = 0,
        acknowledged: int = 0,
        epoch: int = 0,
        stamp: int = 0,
        cause: int = 0,
        remaining_ms: int = 0,
        origin: bytes = b"",
    ) -> None:
        self.kind = kind
        self.id = request_id
        self.route = route
        self.body = body
        self.data = data
        self.flags = flags
        self.hops = hops
        self.acknowledged = acknowledged
        self.epoch = epoch
        self.stamp = stamp
        self.cause = cause
        self.remaining_ms = remaining_ms
        self.origin = origin
        self.parent: tuple[str, int] | None = None
        self.size_bytes = FRAME_HEADER_SIZE_BYTES + len(route) + len(origin) + len(body) + len(data)

    def encode(self) -> bytes:
        """The frame without its data, which follow it as they are (a large block is never copied to send it)."""
        return (
            _FRAME.pack(
                self.kind,
                self.flags,
                self.hops,
                len(self.route),
                len(self.origin),
                self.epoch,
                self.id,
                self.acknowledged,
                self.stamp,
                self.cause,
                self.remaining_ms,
                len(self.body),
                len(self.data),
            )
            + self.route
            + self.origin
            + self.body
        )


def parse_frames(buffer: bytes, start: int, end: int) -> list[Frame]:
    """The frames in ``buffer[start:end]``, which they must fill exactly. Raises :class:`ProtocolError` (malformed)."""
    frames = []
    unpack_from, header_size = _FRAME.unpack_from, _FRAME.size
    while start < end:
        at = start + header_size
        if at > end:
            raise ProtocolError("malformed")
        (
            kind,
            flags,
            hops,
            route_size,
            origin_size,
            epoch,
            request_id,
            acknowledged,
            stamp,
            cause,
            remaining_ms,
            body_size,
            data_size,
        ) = unpack_from(buffer, start)
        begin, start = start, at + route_size + origin_size + body_size + data_size
        if start > end or not HELLO <= kind <= REFUSED:
            raise ProtocolError("malformed")
        frame = Frame.__new__(Frame)  # __init__ with thirteen keywords costs more than all the rest here
        frame.size_bytes = start - begin
        frame.kind, frame.flags, frame.hops, frame.epoch, frame.id = kind, flags, hops, epoch, request_id
        frame.acknowledged, frame.stamp, frame.cause, frame.remaining_ms = acknowledged, stamp, cause, remaining_ms
        frame.route = buffer[at : at + route_size]
        at += route_size
        frame.origin = buffer[at : at + origin_size]
        at += origin_size
        frame.body = buffer[at : at + body_size]
        frame.data = buffer[start - data_size : start]
        frames.append(frame)
    return frames


class Packet:
    """What :meth:`Codec.open` found; its tag was right."""

    __slots__ = ("counter", "frames", "incarnation", "receiver", "sender", "session")

    def __init__(
        self, receiver: bytes, incarnation: int, session: int, counter: int, sender: Identity, frames: list[Frame]
    ) -> None:
        self.receiver = receiver
        self.incarnation = incarnation
        self.session = session
        self.counter = counter
        self.sender = sender
        self.frames = frames


class Codec:
    """Seals and opens the packets of one cluster for one endpoint."""

    def __init__(self, cluster: str, secret: str) -> None:
        self._cluster_id = blake2b(cluster.encode(), digest_size=8).digest()
        key = blake2b(secret.encode(), digest_size=32, person=b"gostore packet 1").digest()
        self._keyed = blake2b(key=key, digest_size=TAG_SIZE_BYTES)
        self._identities: dict[bytes, Identity] = {}

    def seal(
        self,
        sender: Identity,
        receiver: bytes,
        incarnation: int,
        session: int,
        counter: int,
        parts: Sequence[bytes | memoryview],
    ) -> list[bytes | memoryview]:
        """A packet around encoded frames, as parts to be sent one after the other."""
        identity = sender.encoded
        head = (
            _HEADER.pack(VERSION, self._cluster_id, incarnation, session, counter, len(receiver), len(identity))
            + receiver
            + identity
        )
        tag = self._keyed.copy()
        tag.update(head)
        packet: list[bytes | memoryview] = [head]
        for part in parts:
            tag.update(part)
            packet.append(part)
        packet.append(tag.digest())
        return packet

    def open(self, packet: bytes) -> Packet:
        """Check and take apart a packet. Raises :class:`ProtocolError`."""
        size = len(packet)
        if size < _PACKET_SIZE_BYTES_MIN:
            raise ProtocolError("truncated")
        version, cluster_id, incarnation, session, counter, receiver_size, identity_size = _HEADER.unpack_from(packet)
        if version != VERSION:
            raise ProtocolError("version")
        if cluster_id != self._cluster_id:
            raise ProtocolError("foreign")
        end = size - TAG_SIZE_BYTES
        tag = self._keyed.copy()
        tag.update(memoryview(packet)[:end])
        if not compare_digest(tag.digest(), packet[end:]):
            raise ProtocolError("tag")
        at = _HEADER.size + receiver_size
        start = at + identity_size
        if start > end:
            raise ProtocolError("malformed")
        sender = self._identity(packet[at:start])
        frames = parse_frames(packet, start, end)
        return Packet(packet[_HEADER.size : at], incarnation, session, counter, sender, frames)

    def _identity(self, encoded: bytes) -> Identity:
        identity = self._identities.get(encoded)
        if identity is None:
            identity = Identity.parse(encoded)
            if len(self._identities) >= IDENTITIES_CACHED_MAX:
                self._identities.clear()
            self._identities[encoded] = identity
        return identity


def length_prefix(size_bytes: int) -> bytes:
    """What precedes a packet of ``size_bytes`` on a stream."""
    return _LENGTH.pack(size_bytes)


class StreamDecoder:
    """Cuts a byte stream into packets. ``limit`` bounds what is buffered; raise it once the peer has proved itself."""

    __slots__ = ("_buffer", "_failed", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._failed = False

    def feed(self, data: bytes) -> None:
        """Take what arrived; :meth:`next` gives what it completes."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The next whole packet, or None. Raises :class:`ProtocolError` (oversized): then the stream is lost."""
        if self._failed:
            raise ProtocolError("oversized")
        buffer = self._buffer
        if len(buffer) < LENGTH_PREFIX_SIZE_BYTES:
            return None
        (size,) = _LENGTH.unpack_from(buffer)
        if size > self.limit:
            self._failed = True
            buffer.clear()
            raise ProtocolError("oversized")
        end = LENGTH_PREFIX_SIZE_BYTES + size
        if len(buffer) < end:
            return None
        with memoryview(buffer) as view:
            packet = bytes(view[LENGTH_PREFIX_SIZE_BYTES:end])
        del buffer[:end]
        return packet


class ReplayWindow:
    """Accepts every counter at most once, and none that lies ``REPLAY_WINDOW_PACKETS`` or more behind the newest.

    RFC 4303 section 3.4.3. Bit i of the map stands for the counter ``newest - i``.
    """

    __slots__ = ("_map", "_newest")

    def __init__(self) -> None:
        self._newest = -1
        self._map = 0

    def accept(self, counter: int) -> bool:
        ahead = counter - self._newest
        if ahead > 0:
            kept = self._map << ahead if ahead < REPLAY_WINDOW_PACKETS else 0
            self._map = (kept | 1) & _WINDOW_MASK
            self._newest = counter
            return True
        if ahead <= -REPLAY_WINDOW_PACKETS:
            return False
        bit = 1 << -ahead
        if self._map & bit:
            return False
        self._map |= bit
        return True

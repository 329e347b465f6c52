"""The way in: packets -> who sent them, and in which life -> replay window -> faults -> frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gostore.comm.directory import Directory
from gostore.comm.links import DELAYED_FRAMES_MAX, Links
from gostore.comm.outbox import Outbox
from gostore.comm.peers import Peer
from gostore.comm.transport import Inbound
from gostore.comm.wire import HELLO, PACKET_OVERHEAD_BYTES_MAX, VERSION, Codec, Frame, Packet, ProtocolError
from gostore.env import Env


class Receiver:
    """Takes packets from the datagram socket and from accepted connections; hands on what is new and meant for us.

    ``deliver(peer, packet, frame, stream)`` gets each frame; whatever else arrives is dropped and counted by reason.
    """

    def __init__(
        self,
        env: Env,
        codec: Codec,
        links: Links,
        directory: Directory,
        outbox: Outbox,
        deliver: Callable[[Peer, Packet, Frame, bool], None],
        message_size_bytes_max: int,
        connections_max: int,
    ) -> None:
        self._env = env
        self._codec = codec
        self._links = links
        self._directory = directory
        self._outbox = outbox
        self._deliver = deliver
        self._size_max = message_size_bytes_max + PACKET_OVERHEAD_BYTES_MAX
        self._connections_max = connections_max
        self._loop = asyncio.get_running_loop()
        self._inbound: dict[Inbound, None] = {}
        self._delayed = 0
        # Until `resume`: datagrams may arrive before there is anything to answer them with.
        self._paused = True
        self._closed = False
        self._warned = False  # of packets of another format version

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            for inbound in self._inbound:
                inbound.pause()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            for inbound in tuple(self._inbound):
                inbound.resume()

    def close(self) -> None:
        self._closed = True
        for inbound in tuple(self._inbound):
            inbound.abort()

    def make_inbound(self) -> Inbound:
        """The protocol of a connection that is about to be accepted."""
        return Inbound(
            self.on_packet,
            self._on_accepted,
            self._forget,
            lambda reason, size: self._outbox.drop("", reason, size),
            self._size_max,
        )

    def _forget(self, inbound: Inbound) -> None:
        self._inbound.pop(inbound, None)

    def _on_accepted(self, inbound: Inbound) -> bool:
        if self._closed:
            return False
        if len(self._inbound) >= self._connections_max:
            # Who has not shown that it knows the secret makes room.
            unproven = next((found for found in self._inbound if not found.proven), None)
            self._outbox.drop("", "connections", 0)
            if unproven is None:
                return False
            self._forget(unproven)
            unproven.abort()
        self._inbound[inbound] = None
        if self._paused:
            inbound.pause()
        return True

    def on_packet(self, data: bytes, host: str, inbound: Inbound | None) -> bool:
        """One packet from ``host``; False when it was dropped."""
        if self._closed:
            return False
        if self._paused and inbound is None:
            self._outbox.drop("", "paused", len(data))
            return False
        try:
            packet = self._codec.open(data)
        except ProtocolError as error:
            self._outbox.drop("", error.reason, len(data))
            if error.reason == "version" and not self._warned:
                self._warned = True
                self._env.log.warning(
                    "a packet from %s has wire format %d, and this release speaks %d: it is dropped, as all such will "
                    "be; run the same release on all nodes and clients",
                    host, data[0], VERSION,
                )  # fmt: skip
            return False
        sender = packet.sender
        peer = self._directory.get(sender.name)
        if peer is None or peer.incarnation != sender.incarnation:
            peer = self._directory.meet(sender)
        reason = self._objection(peer, packet)
        if reason or peer is None:
            self._outbox.drop(sender.name, reason, len(data))
            return False
        self._directory.heard(peer, sender.address, host, self._loop.time())
        transport = "udp" if inbound is None else "tcp"
        self._outbox.count("received_packets_" + transport)
        self._outbox.count("received_bytes_" + transport, len(data))
        self._outbox.count("received_frames", len(packet.frames))
        faulty = bool(self._links.incoming) and sender.name in self._links.incoming
        for frame in packet.frames:
            if faulty:
                self._damage(peer, packet, frame, inbound)
            else:
                self._deliver(peer, packet, frame, inbound is not None)
        return True

    def _objection(self, peer: Peer | None, packet: Packet) -> str:
        """Why this packet must be dropped, or nothing."""
        me = self._directory.me
        if peer is me:
            self._env.log.warning("another endpoint calls itself %r too; its packets are dropped", me.name)
            return "namesake"
        if not packet.receiver:
            # Somebody who knows an address and not yet a name may say hello, and nothing else. A hello does no harm
            # twice, and comes before the counters of this pair of names.
            greets = all(frame.kind == HELLO for frame in packet.frames)
            return ("" if peer is not None else "stale") if greets else "misdirected"
        if packet.receiver != me.encoded:
            return "misdirected"
        if peer is None:
            return "stale"
        return "" if peer.accept(packet.counter) else "replayed"

    def _damage(self, peer: Peer, packet: Packet, frame: Frame, inbound: Inbound | None) -> None:
        delays = self._links.incoming[peer.name].plan(self._env.rng) if peer.name in self._links.incoming else [0.0]
        if not delays:
            self._outbox.drop(peer.name, "fault", frame.size_bytes)
            if inbound is not None:
                inbound.abort()
        for delay_s in delays:
            if delay_s <= 0.0:
                self._deliver(peer, packet, frame, inbound is not None)
            elif self._delayed >= DELAYED_FRAMES_MAX:
                self._outbox.drop(peer.name, "overflow", frame.size_bytes)
            else:
                self._delayed += 1
                self._loop.call_later(delay_s, self._release, peer, packet, frame, inbound is not None)

    def _release(self, *late: Any) -> None:
        self._delayed -= 1
        peer, packet, frame, stream = late
        if self._closed or self._paused or packet.sender.incarnation != peer.incarnation:
            self._outbox.drop(peer.name, "stale", frame.size_bytes)
        else:
            self._deliver(peer, packet, frame, stream)

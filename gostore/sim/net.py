"""The in-memory network: hosts, addresses, datagrams. Byte streams are in :mod:`gostore.sim.streams`.

Every node is a host with an address of its own (10.0.0.1, 10.0.0.2, ...). ``127.0.0.1`` and ``localhost`` mean the
host itself, ``0.0.0.0`` all its addresses. A datagram is delivered after the latency of its link into the receive
buffer of the socket, which is bounded: a node that is paused or overloaded loses datagrams, as a real one does. Loss,
duplication, reordering and cuts are those of the :class:`~gostore.sim.links.Link`; a cut takes packets that are under
way, too.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import random
import socket
from collections.abc import Iterable
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gostore.sim.handles import SimHandle
from gostore.sim.links import Link, Links
from gostore.sim.scheduler import Scheduler
from gostore.sim.sockets import SimSocket, SocketAddress

if TYPE_CHECKING:
    from gostore.sim.loop import SimLoop

LOOPBACK = "127.0.0.1"
ANY = ("0.0.0.0", "", "::")  # noqa: S104  (nothing is bound for real)

# Largest datagram of UDP over IPv4.
DATAGRAM_BYTES_MAX = 65_507
# Bookkeeping of the kernel for each datagram in a receive buffer, so that many empty ones fill it as well.
DATAGRAM_OVERHEAD_BYTES = 512
# Ports for sockets that name none, as in RFC 6335, section 6.
EPHEMERAL_PORT_MIN, EPHEMERAL_PORT_MAX = 49_152, 65_535


@dataclass(frozen=True, slots=True)
class NetConfig:
    """Constants of the network; times in seconds, sizes in bytes. What faults change is in ``Link``."""

    link: Link = field(default_factory=Link)
    loopback_latency_s: float = 20e-6
    bandwidth_bytes_per_s: float = 1.25e9
    """Of each host's interface, outgoing: 10 Gbit/s."""
    receive_buffer_bytes: int = 212_992
    """Of a UDP socket: Linux's default."""
    window_bytes: int = 262_144
    """Of a TCP connection, each direction: bytes under way or not yet read by the receiver."""
    segment_bytes_max: int = 65_536
    split: float = 0.05
    """Chance that a segment arrives in two pieces: streams have no message boundaries, and this shows who thinks so."""
    retransmit_s: float = 0.2
    """First wait before lost bytes are sent again; doubles up to ``retransmit_s_max``."""
    retransmit_s_max: float = 2.0
    connect_retry_s: float = 1.0
    tcp_timeout_s: float = 20.0
    """Bytes unacknowledged for so long reset the connection (TCP_USER_TIMEOUT; Linux alone would take 15 minutes)."""


class Host:
    """One machine's place in the network. It outlives its processes: a restarted node has the same address."""

    __slots__ = ("_next_port", "address", "down", "index", "name", "net", "nic_free_at", "rng", "sockets", "streams")

    def __init__(self, net: Network, name: str, index: int, address: str) -> None:
        self.net = net
        self.name = name
        self.index = index
        self.address = address
        self.down = False
        self.nic_free_at = 0.0
        self.rng = net.scheduler.rng(f"net:{name}")
        self.sockets: dict[tuple[int, str, int], Any] = {}  # (kind, address, port) -> endpoint or listener
        self.streams: dict[Any, None] = {}  # open connections, in order
        self._next_port = EPHEMERAL_PORT_MIN

    def local_addresses(self, wanted: str | None) -> tuple[str, ...]:
        """The addresses that binding to ``wanted`` claims. Raises ``OSError`` when it is not this host's."""
        if wanted is None or wanted in ANY:
            return (self.address, LOOPBACK)
        if wanted in ("localhost", "::1") or wanted.startswith("127."):
            return (LOOPBACK,)
        if wanted in (self.address, self.name):
            return (self.address,)
        raise OSError(
            errno.EADDRNOTAVAIL, f"{wanted} is not an address of {self.name}; it has {self.address} and {LOOPBACK}"
        )

    def bind(self, kind: int, wanted: str | None, port: int, endpoint: Any, *, shared: bool = False) -> SocketAddress:
        """Claim an address; port 0 takes a free one. Raises ``OSError`` (EADDRINUSE, EADDRNOTAVAIL)."""
        addresses = self.local_addresses(wanted)
        port = port or self.free_port(kind)
        taken = [a for a in addresses if (kind, a, port) in self.sockets]
        if taken and not shared:
            raise OSError(
                errno.EADDRINUSE, f"{taken[0]}:{port} on {self.name}: {os.strerror(errno.EADDRINUSE).lower()}"
            )
        for address in addresses:
            self.sockets[kind, address, port] = endpoint
        return (self.address if wanted is None or wanted in ANY else addresses[0], port)

    def free_port(self, kind: int) -> int:
        for _ in range(EPHEMERAL_PORT_MAX - EPHEMERAL_PORT_MIN + 1):
            port = self._next_port
            self._next_port = port + 1 if port < EPHEMERAL_PORT_MAX else EPHEMERAL_PORT_MIN
            if (kind, self.address, port) not in self.sockets and (kind, LOOPBACK, port) not in self.sockets:
                return port
        raise OSError(errno.EADDRINUSE, f"{self.name} has no free port left")

    def unbind(self, endpoint: Any) -> None:
        for key in [key for key, value in self.sockets.items() if value is endpoint]:
            del self.sockets[key]

    def departs_at(self, now: float, size: int) -> float:
        """When a packet handed to the interface now has left it."""
        start = self.nic_free_at if self.nic_free_at > now else now
        self.nic_free_at = start = start + size / self.net.config.bandwidth_bytes_per_s
        return start


class Network:
    """All hosts and what is between them; ``links`` holds the faults, ``drops`` counts lost datagrams by reason."""

    def __init__(self, scheduler: Scheduler, config: NetConfig | None = None) -> None:
        from gostore.sim.connect import Streams

        self.scheduler = scheduler
        self.config = config if config is not None else NetConfig()
        self.links = Links(self.config.link)
        self.hosts: dict[str, Host] = {}
        self.by_address: dict[str, Host] = {}
        self.drops: dict[str, int] = {}
        self.streams = Streams(self)

    def add_host(self, name: str) -> Host:
        """A new machine with the next address. Raises ``ValueError`` for a name that is taken."""
        if name in self.hosts:
            raise ValueError(f"there is a host {name!r} already")
        index = len(self.hosts) + 1
        if index >= 1 << 16:
            raise ValueError("the network is full: it has 65,535 addresses")
        host = Host(self, name, index, f"10.0.{index >> 8}.{index & 255}")
        self.hosts[name] = self.by_address[host.address] = host
        return host

    # -- names

    def find(self, source: Host, address: str) -> Host | None:
        """The host behind an address as ``source`` sees it."""
        if address.startswith("127.") or address in ANY:
            return source
        return self.by_address.get(address)

    def name_of(self, address: str) -> str:
        host = self.by_address.get(address)
        return address if host is None else host.name

    def resolve(self, source: Host, name: str) -> str:
        """A literal address, ``localhost`` or the name of a node, as an address. Raises ``socket.gaierror``."""
        if name in ("localhost", "::1"):
            return LOOPBACK
        host = self.hosts.get(name)
        if host is not None:
            return host.address
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise socket.gaierror(socket.EAI_NONAME, f"{name!r}: Name or service not known in this world") from None

    def getaddrinfo(
        self, source: Host, host: Any, port: Any, family: int = 0, kind: int = 0, proto: int = 0
    ) -> list[tuple[Any, ...]]:
        """As ``socket.getaddrinfo``, without asking anybody."""
        name = host.decode("ascii") if isinstance(host, bytes) else host
        if family not in (0, socket.AF_INET):
            raise socket.gaierror(socket.EAI_ADDRFAMILY, "only IPv4 is simulated")
        address = LOOPBACK if name is None else "0.0.0.0" if name in ANY else self.resolve(source, name)  # noqa: S104
        try:
            number = int(port or 0)
        except ValueError:
            raise socket.gaierror(socket.EAI_SERVICE, f"{port!r}: Servname not supported") from None
        kinds = ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP))
        return [
            (socket.AF_INET, socket.SocketKind(k), p, "", (address, number))
            for k, p in kinds
            if kind in (0, k) and proto in (0, p)
        ]

    # -- datagrams

    async def create_datagram_endpoint(
        self,
        loop: SimLoop,
        protocol_factory: Any,
        local_addr: Any,
        remote_addr: Any,
        *,
        sock: Any = None,
        **options: Any,
    ) -> tuple[DatagramTransport, Any]:
        """As asyncio's. ``sock`` is a ``SimSocket`` that was bound."""
        host = loop.host
        if sock is not None:
            local_addr, remote_addr = sock.name, sock.peer
        wanted, port = (None, 0) if local_addr is None else (local_addr[0], int(local_addr[1]))
        remote = None
        if remote_addr is not None:
            remote = (self.resolve(host, remote_addr[0]), int(remote_addr[1]))
        transport = DatagramTransport(loop, host, remote)
        transport.bind(wanted, port, shared=bool(options.get("reuse_port")))
        protocol = protocol_factory()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        return transport, protocol

    def _dropped(self, reason: str, source: int, target: int, data: bytes) -> None:
        self.drops[reason] = self.drops.get(reason, 0) + 1
        self.scheduler.trace.message(self.scheduler.now, b"d", source, target, data)

    def send_datagram(self, source: Host, name: SocketAddress, target: SocketAddress, data: bytes) -> None:
        """Put a datagram on its way. It says nothing about success, as UDP."""
        scheduler = self.scheduler
        host = self.find(source, target[0])
        if host is None:
            self._dropped("no such host", source.index, 0, data)
            return
        if host is source:
            when = scheduler.now + self.config.loopback_latency_s
            scheduler.at(when, self._arrive, (source, host, None, (LOOPBACK, name[1]), target, data))
            return
        link = self.links.get(source.name, host.name)
        rng = source.rng
        if link.cut or (link.loss and rng.random() < link.loss):
            self._dropped("cut" if link.cut else "loss", source.index, host.index, data)
            return
        departs = source.departs_at(scheduler.now, len(data))
        packet = (source, host, link, name, target, data)
        scheduler.at(departs + self._latency(link, rng), self._arrive, packet)
        if link.duplicate and rng.random() < link.duplicate:
            scheduler.at(departs + self._latency(link, rng), self._arrive, packet)

    @staticmethod
    def _latency(link: Link, rng: random.Random) -> float:
        latency_s = link.draw_s(rng)
        if link.reorder and rng.random() < link.reorder:
            latency_s += 10 * link.latency_s * rng.random()
        return latency_s

    def _arrive(self, packet: tuple[Host, Host, Link | None, SocketAddress, SocketAddress, bytes]) -> None:
        source, host, link, name, target, data = packet
        if link is not None and (host.down or (self.links.get(source.name, host.name)).cut):
            self._dropped("down" if host.down else "cut", source.index, host.index, data)
            return
        address = LOOPBACK if link is None and target[0] != host.address else host.address
        endpoint = host.sockets.get((socket.SOCK_DGRAM, address, target[1]))
        if endpoint is None:
            self._dropped("no such port", source.index, host.index, data)
            return
        if address == host.address and link is None:
            name = (host.address, name[1])
        if not endpoint.has_room(data):
            self._dropped("buffer full", source.index, host.index, data)
            return
        self.scheduler.trace.message(self.scheduler.now, b"D", source.index, host.index, data)
        endpoint.receive(data, name)

    # -- faults, by the names of nodes

    def cut(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Lose everything from each of the sources to each of the targets: one way."""
        targets = list(targets)
        for source in sources:
            for target in targets:
                if source != target:
                    self.links.set(source, target, cut=True)

    def partition(self, *groups: Iterable[str]) -> None:
        """Cut every connection between different groups, both ways. Hosts that are in no group reach everybody."""
        sides = [list(group) for group in groups]
        for i, side in enumerate(sides):
            for other in sides[i + 1 :]:
                self.cut(side, other)
                self.cut(other, side)

    def heal(self) -> None:
        """Put every link back to the default."""
        self.links.clear()

    def reset(self, one: str, other: str) -> int:
        """Reset every connection between two nodes, seen by both; returns how many there were."""
        count = 0
        for stream in list(self.hosts[one].streams):
            peer = stream.outgoing.target
            if peer.host.name == other:
                count += 1
                error = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                for end in (stream, peer):
                    self.scheduler.at(self.scheduler.now, end.broken, error)
        return count

    def process_died(self, host: Host) -> None:
        """A process was killed: the kernel closes its sockets."""
        host.sockets.clear()
        for stream in list(host.streams):
            stream.process_died()
        host.streams.clear()

    def power_cut(self, host: Host) -> None:
        """The machine is gone without a word: its peers find out by themselves."""
        host.down = True
        host.sockets.clear()
        for stream in list(host.streams):
            stream.vanish()
        host.streams.clear()


class DatagramTransport(asyncio.DatagramTransport):
    """A UDP socket of a node."""

    def __init__(self, loop: SimLoop, host: Host, remote: SocketAddress | None) -> None:
        super().__init__()
        self._loop = loop
        self._host = host
        self._remote = remote
        self._protocol: Any = None
        self._context = copy_context()
        self._closing = False
        self._queued_bytes = 0
        self._name: SocketAddress = ("", 0)

    def bind(self, wanted: str | None, port: int, *, shared: bool) -> None:
        self._name = self._host.bind(socket.SOCK_DGRAM, wanted, port, self, shared=shared)
        described = SimSocket.named(socket.SOCK_DGRAM, self._name, self._remote)
        self._extra = {"sockname": self._name, "peername": self._remote, "socket": described}

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send a datagram; one that is too large is reported to ``error_received``, as by asyncio."""
        if self._closing or self._loop.dead:
            return
        target = addr if addr is not None else self._remote
        if target is None:
            raise ValueError("sendto() needs an address: this endpoint is not connected to one")
        data = bytes(data)
        if len(data) > DATAGRAM_BYTES_MAX:
            error = OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._loop.call_soon(self._protocol.error_received, error)
            return
        self._loop.charge(len(data))
        self._host.net.send_datagram(self._host, self._name, (target[0], target[1]), data)

    def has_room(self, data: bytes) -> bool:
        """Whether the receive buffer takes this datagram; it always takes one."""
        size = self._queued_bytes + len(data) + DATAGRAM_OVERHEAD_BYTES
        return not self._queued_bytes or size <= self._host.net.config.receive_buffer_bytes

    def receive(self, data: bytes, source: SocketAddress) -> None:
        """A datagram has arrived."""
        if self._remote is not None and source != self._remote:
            return  # a connected socket hears its peer only
        size = len(data) + DATAGRAM_OVERHEAD_BYTES
        self._queued_bytes += size
        self._loop.post(SimHandle(self._deliver, (data, source, size), self._context))

    def _deliver(self, data: bytes, source: SocketAddress, size: int) -> None:
        self._queued_bytes -= size
        if not self._closing:
            self._loop.charge(len(data))
            self._protocol.datagram_received(data, source)

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing and not self._loop.dead:
            self._closing = True
            self._host.unbind(self)
            self._loop.call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

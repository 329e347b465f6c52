"""What stands for a socket in the simulated world: a description, not a door to the operating system.

Libraries ask a transport for its socket to set options or to learn its addresses, and some (aiohttp's client) make the
socket themselves and hand it to the loop. Both work; reading, writing or connecting it without the loop does not.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, NoReturn

from gostore.sim import guard

if TYPE_CHECKING:
    from gostore.sim.streams import SimStream

SocketAddress = tuple[str, int]


class SimSocket:
    """A TCP or UDP socket over IPv4: options are accepted and kept, blocking calls are refused."""

    def __init__(
        self,
        family: int = socket.AF_INET,
        type: int = socket.SOCK_STREAM,
        proto: int = 0,
        fileno: int | None = None,
    ) -> None:
        family = socket.AF_INET if family == -1 else family
        type = socket.SOCK_STREAM if type == -1 else type
        if fileno is not None or family not in (socket.AF_INET, socket.AF_INET6):
            guard.forbid(f"socket.socket(family={family!r}, fileno={fileno!r}): only TCP and UDP are simulated")
        self.family = socket.AddressFamily(family)
        self.type = socket.SocketKind(type)
        self.proto = proto
        self.name: SocketAddress | None = None
        self.peer: SocketAddress | None = None
        self.stream: SimStream | None = None  # set when the loop has connected it
        self._options: dict[tuple[int, int], Any] = {}

    @classmethod
    def named(cls, type: int, name: SocketAddress, peer: SocketAddress | None = None) -> SimSocket:
        """The socket of a transport."""
        found = cls(socket.AF_INET, type, socket.IPPROTO_TCP if type == socket.SOCK_STREAM else socket.IPPROTO_UDP)
        found.name = name
        found.peer = peer
        return found

    def __repr__(self) -> str:
        return f"<SimSocket {self.type.name} {self.name} -> {self.peer}>"

    def fileno(self) -> int:
        """There is no descriptor."""
        return -1

    def getsockname(self) -> SocketAddress:
        return self.name if self.name is not None else ("0.0.0.0", 0)  # noqa: S104

    def getpeername(self) -> SocketAddress:
        if self.peer is None:
            raise OSError(107, "Transport endpoint is not connected")
        return self.peer

    def setsockopt(self, level: int, option: int, value: Any, *size: int) -> None:
        self._options[level, option] = value

    def getsockopt(self, level: int, option: int, *size: int) -> Any:
        return self._options.get((level, option), 0)

    def setblocking(self, flag: bool) -> None:
        """It never blocks; the loop does the work."""

    def settimeout(self, value: float | None) -> None:
        """Time-outs are the loop's."""

    def gettimeout(self) -> float:
        return 0.0

    def getblocking(self) -> bool:
        return False

    def set_inheritable(self, inheritable: bool) -> None:
        """There is nothing to inherit."""

    def bind(self, address: SocketAddress) -> None:
        """Noted; the loop claims the address when it is given the socket."""
        self.name = (address[0], address[1])

    def listen(self, backlog: int = 100) -> None:
        """The loop listens when it is given the socket."""

    def shutdown(self, how: int) -> None:
        if self.stream is not None:
            self.stream.write_eof()

    def close(self) -> None:
        if self.stream is not None and not self.stream.started:
            self.stream.abort()
        self.stream = None

    def detach(self) -> int:
        return -1

    def __enter__(self) -> SimSocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _blocking(self, *args: Any, **keywords: Any) -> NoReturn:
        guard.forbid("a socket used without the event loop; use asyncio's streams or transports")

    connect = connect_ex = accept = send = sendall = sendto = sendmsg = sendfile = _blocking
    recv = recv_into = recvfrom = recvfrom_into = recvmsg = makefile = dup = _blocking

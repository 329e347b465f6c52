"""What an endpoint remembers of each peer, and the bounded table of peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gostore.comm.calls import Conversation, Session
from gostore.comm.transport import Stream
from gostore.comm.wire import PACKET_HEADER_SIZE_BYTES, STREAM_BIT, TAG_SIZE_BYTES, Frame, Identity, ReplayWindow
from gostore.core.address import Address

# Casts that wait for the peer's hello; older ones, and more of them, are dropped.
CASTS_WAITING_MAX: Final = 64
CASTS_WAITING_S_MAX: Final = 1.0


class Peer:
    """One peer, by name. ``incarnation`` is the highest it was met in, 0 before."""

    __slots__ = (
        "_counters",
        "_windows",
        "address",
        "casts",
        "conversation",
        "encoded",
        "incarnation",
        "name",
        "outbox",
        "resolved",
        "session",
        "stream",
        "stream_failed_s",
    )

    def __init__(self, name: str, address: Address | None = None, counters: tuple[int, int] = (0, 0)) -> None:
        self.name = name
        self.encoded = name.encode()
        self.address = address
        self.resolved: Address | None = None  # what the resolver said last
        self.incarnation = 0
        self.conversation = Conversation(name)
        self.session: Session | None = None
        self.outbox: list[bytes] = []  # encoded frames of this turn of the loop
        self.casts: list[tuple[float, Frame]] = []
        self.stream: Stream | None = None
        self.stream_failed_s = float("-inf")
        self._counters = list(counters)
        self._windows = (ReplayWindow(), ReplayWindow())

    def next_counter(self, *, stream: bool) -> int:
        self._counters[stream] += 1
        return self._counters[stream] | (STREAM_BIT if stream else 0)

    def overhead(self, sender: Identity) -> int:
        """What a packet from ``sender`` to this peer needs beside its frames, in bytes."""
        return PACKET_HEADER_SIZE_BYTES + len(self.encoded) + len(sender.encoded) + TAG_SIZE_BYTES

    @property
    def counters(self) -> tuple[int, int]:
        """The last ones used, for packets and on streams."""
        return self._counters[0], self._counters[1]

    def accept(self, counter: int) -> bool:
        """Whether a packet with this counter is new."""
        if counter & STREAM_BIT:
            return self._windows[1].accept(counter ^ STREAM_BIT)
        return self._windows[0].accept(counter)

    def reborn(self, incarnation: int) -> None:
        """It lives in a later incarnation: its counters start again, and it must say hello."""
        self.incarnation = incarnation
        self.session = None
        self._windows = (ReplayWindow(), ReplayWindow())

    @property
    def idle(self) -> bool:
        """Whether it can be forgotten: no call to it or from it is under way."""
        busy = self.conversation.calls or self.outbox or (self.session is not None and self.session.running)
        return not busy


class PeerTable:
    """At most ``peers_max`` peers; the idle one that was unheard longest makes room."""

    def __init__(self, peers_max: int) -> None:
        self._max = peers_max
        self._peers: dict[str, Peer] = {}
        self._counters = (0, 0)
        self.evicted: list[Peer] = []
        """Peers that had to go since the driver last emptied this list."""

    def get(self, name: str) -> Peer | None:
        return self._peers.get(name)

    def add(self, name: str, address: Address | None) -> Peer | None:
        """A new peer; None when the table is full of busy ones."""
        if len(self._peers) >= self._max:
            idle = [peer for peer in self._peers.values() if peer.idle]
            if not idle:
                return None
            oldest = min(idle, key=lambda peer: peer.conversation.heard_s)
            self.remove(oldest.name)
            self.evicted.append(oldest)
        peer = self._peers[name] = Peer(name, address, self._counters)
        return peer

    def remove(self, name: str) -> Peer | None:
        peer = self._peers.pop(name, None)
        if peer is not None:
            # Who comes back here must not start below what its replay window has seen.
            self._counters = (max(self._counters[0], peer.counters[0]), max(self._counters[1], peer.counters[1]))
        return peer

    def __iter__(self) -> Iterator[Peer]:
        return iter(tuple(self._peers.values()))

    def __len__(self) -> int:
        return len(self._peers)

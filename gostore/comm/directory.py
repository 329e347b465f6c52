"""Whom this endpoint knows: peers by name, where they are, and which life of theirs this is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gostore.comm.peers import Peer, PeerTable
from gostore.comm.wire import Identity
from gostore.core.address import Address
from gostore.core.errors import Unavailable, Unreachable


class Resolver(Protocol):
    """Who knows the members' addresses."""

    def address(self, name: str) -> Address | None: ...


class Directory:
    """Peers are met in packets or looked up at the resolver; the latest news of either is where they are.

    ``reborn(peer)`` is told when a peer turns out to live in a later incarnation, ``dismissed(peer)`` when its record
    was dropped to make room.
    """

    def __init__(
        self,
        name: str,
        resolver: Resolver,
        peers_max: int,
        reborn: Callable[[Peer], None],
        dismissed: Callable[[Peer], None],
    ) -> None:
        self.name = name
        self.me = Peer(name)
        """The way to oneself, which never touches the network."""
        self._resolver = resolver
        self._peers_max = peers_max
        self._peers = PeerTable(peers_max)
        self._reborn = reborn
        self._dismissed = dismissed

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, name: str) -> Peer | None:
        return self.me if name == self.name else self._peers.get(name)

    def find(self, name: str) -> Peer:
        """The peer to send to.

        Raises :class:`Unreachable` for a name that neither the resolver nor any packet made known, and
        :class:`Unavailable` when there is no room for another peer.
        """
        peer = self.get(name)
        if peer is None:
            address = self._resolver.address(name)
            if address is None:
                raise Unreachable(f"{self.name} knows no {name!r}")
            peer = self._add(name, address)
            if peer is None:
                raise Unavailable(f"{self.name} talks to peers_max = {self._peers_max} peers; ask again later")
        return peer

    def meet(self, who: Identity) -> Peer | None:
        """The record of a peer in this incarnation; None for a past incarnation, or when there is no room."""
        if who.name == self.name:
            return self.me
        peer = self._peers.get(who.name)
        if peer is None:
            peer = self._add(who.name, who.address)
            if peer is None:
                return None
        if who.incarnation > peer.incarnation:
            peer.reborn(who.incarnation)
            self._reborn(peer)
        return peer if who.incarnation == peer.incarnation else None

    def heard(self, peer: Peer, address: Address, host: str, now_s: float) -> None:
        """A packet came from ``host``, and wants to be answered at ``address``."""
        peer.conversation.heard_s = now_s
        if not address.host:  # it listens on all its interfaces and does not know by which name we reach it
            address = Address(host, address.tcp_port, address.udp_port)
        if address != peer.address:
            peer.address = address

    def address_of(self, peer: Peer) -> Address | None:
        """Where to send."""
        known = self._resolver.address(peer.name) if peer.name else None
        if known is not None and known != peer.resolved:
            # The members' list has changed. (Had the peer moved and told us so first, the list is still the old one.)
            peer.resolved = peer.address = known
        return peer.address

    def forget(self, name: str) -> Peer | None:
        peer = self._peers.remove(name)
        if peer is not None:
            self._dismissed(peer)
        return peer

    def _add(self, name: str, address: Address) -> Peer | None:
        peer = self._peers.add(name, address)
        while self._peers.evicted:
            self._dismissed(self._peers.evicted.pop())
        if peer is not None:
            peer.resolved = self._resolver.address(name)
        return peer

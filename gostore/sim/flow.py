"""One direction of a TCP-like connection: see :mod:`gostore.sim.streams` for the theory of operation."""

from __future__ import annotations

import errno
import os
from bisect import insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gostore.sim.net import Network
    from gostore.sim.streams import SimStream

Segment = tuple[int, bytes, bool]
"""(number, bytes, is FIN)."""


class Flow:
    """One direction of a connection: from the kernel of ``source`` to the kernel of ``target``."""

    __slots__ = (
        "_backoff_s",
        "_last_arrival",
        "_number",
        "_retrying",
        "_silent_since",
        "dead",
        "net",
        "read_bytes",
        "sent_bytes",
        "source",
        "stalled",
        "target",
    )

    def __init__(self, net: Network, source: SimStream, target: SimStream) -> None:
        self.net = net
        self.source = source
        self.target = target
        self.sent_bytes = 0
        self.read_bytes = 0  # as far as the sender knows
        self.stalled: list[Segment] = []
        self.dead = False
        self._number = 0
        self._last_arrival = 0.0
        self._retrying = False
        self._silent_since = 0.0
        self._backoff_s = 0.0

    @property
    def local(self) -> bool:
        return self.source.host is self.target.host

    def room(self) -> int:
        """Bytes that the window has room for."""
        return self.net.config.window_bytes - (self.sent_bytes - self.read_bytes)

    def send(self, data: bytes, fin: bool = False) -> None:
        """Put a segment on its way; in order, whatever happens to it."""
        if self.dead:
            return
        self.sent_bytes += len(data)
        segment = (self._number, data, fin)
        self._number += 1
        if self.stalled or not self._depart(segment):
            self._stall(segment)

    def _passes(self, reverse: bool = False) -> bool:
        """Whether the link lets anything through (in the direction of acknowledgements when ``reverse``)."""
        source, target = self.source.host, self.target.host
        if source is target:
            return True
        if reverse:
            source, target = target, source
        return not target.down and not self.net.links.get(source.name, target.name).cut

    def _depart(self, segment: Segment) -> bool:
        """Schedule the arrival; false when the segment is lost."""
        scheduler, host = self.net.scheduler, self.source.host
        size = len(segment[1])
        if self.local:
            when = scheduler.now + self.net.config.loopback_latency_s
        else:
            link = self.net.links.get(host.name, self.target.host.name)
            if not self._passes() or (link.loss and host.rng.random() < link.loss):
                return False
            when = host.departs_at(scheduler.now, size) + link.draw_s(host.rng)
        self._last_arrival = when = max(when, self._last_arrival)
        scheduler.at(when, self._arrive, segment)
        return True

    def _arrive(self, segment: Segment) -> None:
        if self.dead:
            return
        if self.stalled or not self._passes():
            self._stall(segment)
            return
        _, data, fin = segment
        source, target = self.source, self.target
        self.net.scheduler.trace.message(
            self.net.scheduler.now, b"F" if fin else b"S", source.host.index, target.host.index, data
        )
        if not self._passes(reverse=True):
            self._retry_later()  # the acknowledgement is lost
        if target.gone:
            self.dead = True
            if data or not fin:
                target.outgoing.reset()  # nobody is there for these bytes
        else:
            target.arrived(data, fin)

    # -- retransmission

    def _stall(self, segment: Segment) -> None:
        insort(self.stalled, segment)
        self._retry_later()

    def _retry_later(self) -> None:
        if not self._retrying:
            self._retrying = True
            self._silent_since = self.net.scheduler.now
            self._backoff_s = self.net.config.retransmit_s
            self.net.scheduler.after(self._backoff_s, self._retry)

    def _retry(self, _: None) -> None:
        """The retransmission timer: send again what was lost, give up after too long a silence."""
        self._retrying = False
        if self.dead:
            return
        if self._passes() and self._passes(reverse=True):
            stalled, self.stalled = self.stalled, []
            for i, segment in enumerate(stalled):
                if not self._depart(segment):
                    self.stalled = stalled[i:]
                    if i:
                        self._silent_since = self.net.scheduler.now  # what got through was acknowledged
                    break
            else:
                self._acknowledge()
                return
        scheduler, config = self.net.scheduler, self.net.config
        if scheduler.now - self._silent_since >= config.tcp_timeout_s:
            self.dead = True
            self.source.broken(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            return
        self._retrying = True
        self._backoff_s = min(2 * self._backoff_s, config.retransmit_s_max)
        scheduler.after(self._backoff_s, self._retry)

    # -- the window

    def read(self) -> None:
        """The receiver has read; tell the sender if it waits for room and can be told."""
        if self._passes(reverse=True):
            self._acknowledge()
        else:
            self._retry_later()

    def _acknowledge(self) -> None:
        blocked = self.room() <= 0
        self.read_bytes = self.target.consumed_bytes
        if blocked and self.room() > 0 and not self.dead:
            scheduler = self.net.scheduler
            if self.local:
                delay_s = self.net.config.loopback_latency_s
            else:
                host = self.target.host
                delay_s = self.net.links.get(host.name, self.source.host.name).draw_s(host.rng)
            scheduler.after(delay_s, self.source.window_opened)

    # -- reset

    def reset(self) -> None:
        """Send RST to ``target``. A reset that is lost is not repeated."""
        self.dead = True
        scheduler, host = self.net.scheduler, self.source.host
        if self.local:
            scheduler.after(self.net.config.loopback_latency_s, self._reset_arrives)
        elif self._passes():
            link = self.net.links.get(host.name, self.target.host.name)
            # Not before the bytes that are under way, so that what was sent before an abort can still be read.
            when = max(scheduler.now + link.draw_s(host.rng), self._last_arrival)
            scheduler.at(when, self._reset_arrives)

    def _reset_arrives(self, _: None) -> None:
        if self._passes():
            self.net.scheduler.trace.message(
                self.net.scheduler.now, b"R", self.source.host.index, self.target.host.index, b""
            )
            self.target.broken(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))

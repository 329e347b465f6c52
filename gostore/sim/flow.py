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

# So many later segments that got through tell the sender that one is lost, before its timer does (RFC 5681, 3.2).
OVERTAKEN_MAX = 3


class Flow:
    """One direction of a connection: from the kernel of ``source`` to the kernel of ``target``."""

    __slots__ = (
        "_backoff_s",
        "_early",
        "_expected",
        "_last_arrival",
        "_number",
        "_overtaken",
        "_retrying",
        "_silent_since",
        "_timer",
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
        self._expected = 0  # the number that the receiver is waiting for
        self._early: dict[int, Segment] = {}  # what it has got beyond that
        self._last_arrival = 0.0
        self._overtaken = 0  # segments that got through while an earlier one is missing
        self._retrying = False
        self._timer = 0  # a retransmission timer with another number is void
        self._silent_since = 0.0
        self._backoff_s = 0.0

    @property
    def local(self) -> bool:
        return self.source.host is self.target.host

    def room(self) -> int:
        """Bytes that the window has room for."""
        return self.net.config.window_bytes - (self.sent_bytes - self.read_bytes)

    def send(self, data: bytes, fin: bool = False) -> None:
        """Put a segment on its way; it is delivered in order, whatever happens to it."""
        if self.dead:
            return
        self.sent_bytes += len(data)
        segment = (self._number, data, fin)
        self._number += 1
        if not self._depart(segment):
            self._stall(segment)
        elif self.stalled:
            self._overtaken += 1
            if self._overtaken == OVERTAKEN_MAX:
                link = self.net.links.get(self.source.host.name, self.target.host.name)
                self._set_timer(2 * link.draw_s(self.source.host.rng))

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
        if not self._passes():
            self._stall(segment)
            return
        if not self._passes(reverse=True):
            self._retry_later()  # the acknowledgement is lost
        self._early[segment[0]] = segment
        while not self.dead and (following := self._early.pop(self._expected, None)) is not None:
            self._expected += 1
            self._deliver(following)

    def _deliver(self, segment: Segment) -> None:
        _, data, fin = segment
        source, target, scheduler = self.source, self.target, self.net.scheduler
        scheduler.trace.message(scheduler.now, b"F" if fin else b"S", source.host.index, target.host.index, data)
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
            self._set_timer(self._backoff_s)

    def _set_timer(self, delay_s: float) -> None:
        self._timer += 1
        self._overtaken = 0
        self.net.scheduler.after(delay_s, self._retry, self._timer)

    def _retry(self, timer: int) -> None:
        """The retransmission timer: send again what was lost, give up after too long a silence."""
        if self.dead or timer != self._timer:
            return
        config, now = self.net.config, self.net.scheduler.now
        if self._passes() and self._passes(reverse=True):
            before = len(self.stalled)
            self.stalled = [segment for segment in self.stalled if not self._depart(segment)]
            if not self.stalled:
                self._retrying = False
                self._acknowledge()
                return
            if len(self.stalled) < before:  # what got through is acknowledged
                self._silent_since = now
                self._backoff_s = config.retransmit_s / 2
        if now - self._silent_since >= config.tcp_timeout_s:
            self.dead = True
            self.source.broken(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            return
        self._backoff_s = min(2 * self._backoff_s, config.retransmit_s_max)
        self._set_timer(self._backoff_s)

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

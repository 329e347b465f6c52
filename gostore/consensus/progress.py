"""What a leader knows of one follower, and how it sends to it. Pure.

``PROBE``      it is not known where the logs meet: one append at a time, until one is accepted
``REPLICATE``  they meet: appends follow each other without waiting (``next`` is optimistic), within a window
``SNAPSHOT``   it needs what is not in the log any more: one chunk at a time

(The states are those of etcd's raft, tracker/progress.go.)
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Final

from gostore.consensus.ready import Snapshot
from gostore.consensus.tunables import Tunables

PROBE: Final = "probe"
REPLICATE: Final = "replicate"
SNAPSHOT: Final = "snapshot"


class Transfer:
    """A snapshot on its way. ``data``: chunk ``number``, kept until it is acknowledged; None behind the last one."""

    __slots__ = ("data", "identity", "number", "sent_s", "snapshot")

    def __init__(self, identity: int, snapshot: Snapshot) -> None:
        self.identity = identity
        self.snapshot = snapshot
        self.number = 0
        self.data = next(snapshot.chunks, None)
        self.sent_s = -math.inf

    def advance(self) -> None:
        self.number += 1
        self.data = next(self.snapshot.chunks, None)
        self.sent_s = -math.inf


class Progress:
    """``match``: the follower has acknowledged so much. ``next``: the next index to send. ``told``: the commit index
    that it was last sent. ``heard_s``: when it last said anything. ``round``: the latest heartbeat that it answered.

    ``sent_s``: when the oldest append without an answer went; ``snapshot_s``: when a snapshot was last asked for.
    ``leaving``: it is no member any more, and is sent its dismissal only, until ``leave_s`` at most.
    """

    __slots__ = (
        "_inflight", "_inflight_size", "_sent_round", "heard_s", "leave_s", "leaving", "match", "next", "quiet",
        "round", "sent_s", "snapshot_s", "state", "told", "transfer",
    )  # fmt: skip

    def __init__(self, next_index: int, now_s: float) -> None:
        self.state = PROBE
        self.match = 0
        self.next = next_index
        self.told = 0
        self.round = 0
        self.heard_s = now_s
        self.sent_s = -math.inf
        self.snapshot_s = -math.inf
        self.quiet = False
        self.leaving = False
        self.leave_s = math.inf
        self.transfer: Transfer | None = None
        self._inflight: deque[tuple[int, int]] = deque()  # (last index, bytes) of appends that are not answered
        self._inflight_size = 0
        self._sent_round = 0

    def statistics(self) -> dict[str, Any]:
        """``state``, ``match``, ``next``; of a snapshot on its way also the ``chunk`` that is not acknowledged."""
        found = {"state": self.state, "match": self.match, "next": self.next}
        return found if self.transfer is None else {**found, "chunk": self.transfer.number}

    def may_send(self, tunables: Tunables) -> bool:
        if self.state == PROBE:
            return not self._inflight
        return (
            self.state == REPLICATE
            and len(self._inflight) < tunables.inflight_messages_max
            and self._inflight_size < tunables.inflight_size_bytes_max
        )

    def sent(self, last: int, size: int, number: int, now_s: float) -> None:
        """An append up to index ``last`` is on its way, behind the heartbeat ``number``."""
        if not self._inflight:
            self.sent_s = now_s
        self._inflight.append((last, size))
        self._inflight_size += size
        self._sent_round = number
        if self.state == REPLICATE:
            self.next = last + 1

    def accepted(self, match: int, now_s: float) -> bool:
        """It holds everything up to ``match``. Returns whether that is news."""
        while self._inflight and self._inflight[0][0] <= match:
            self._inflight_size -= self._inflight.popleft()[1]
            self.sent_s = now_s
        if self.state == PROBE or (self.state == SNAPSHOT and self._caught_up_with_snapshot(match)):
            self._enter(REPLICATE, max(match, self.match) + 1)
        self.next = max(self.next, match + 1)
        if match <= self.match:
            return False
        self.match = match
        return True

    def _caught_up_with_snapshot(self, match: int) -> bool:
        return self.transfer is not None and match >= self.transfer.snapshot.point.index

    def rejected(self, index: int, next_index: int) -> None:
        """What was sent behind ``index`` did not fit; try from ``next_index``. An old answer changes nothing."""
        if self.state == SNAPSHOT or index <= self.match or (self.state == PROBE and index != self.next - 1):
            return
        self._enter(PROBE, max(self.match + 1, min(next_index, index)))

    def probe_lost(self, number: int) -> bool:
        """It answers a heartbeat that was sent behind the probe, and not the probe: then it will not, most likely."""
        return self.state == PROBE and bool(self._inflight) and number > self._sent_round

    def overdue(self, now_s: float, tunables: Tunables) -> bool:
        """The oldest append without an answer is to be given up."""
        return bool(self._inflight) and now_s >= self.sent_s + tunables.retry_s

    def probe_again(self) -> None:
        self._enter(PROBE, self.match + 1 if self.state == REPLICATE else self.next)

    def send_snapshot(self, transfer: Transfer) -> None:
        self._enter(SNAPSHOT, self.next)
        self.transfer = transfer

    def _enter(self, state: str, next_index: int) -> None:
        self.state = state
        self.next = next_index
        self.transfer = None
        self._inflight.clear()
        self._inflight_size = 0

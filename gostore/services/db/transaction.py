"""May this transaction commit? A pure function of the store, the locks and what the transaction read and writes.

Optimistic concurrency control with backward validation (Kung and Robinson, "On Optimistic Methods for Concurrency
Control", TODS 1981, section 4), done when the log entry is applied, so that every replica decides alike: a transaction
may commit if every object that it read still has the version it saw, every range still has its fingerprint (so nothing
appeared in it: no phantoms), and no lock of a *prepared* transaction stands against it. Whoever passes is placed, in
the serial order, at the index of its entry.

Only transactions across shards hold locks: from their prepare to their decision, in the shards they touch. What they
read may be read by others and not written; what they write, neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gostore.core.keyvalue import PointRead, RangeRead, Read
from gostore.services.db.mvcc import Store

Place = tuple[str, str]
"""(container, key)."""


class Clash(NamedTuple):
    """Why a transaction may not commit. ``lock``: it may be possible as soon as a lock is gone."""

    container: str
    key: str
    why: str
    lock: bool


@dataclass(slots=True)
class _Held:
    reads: list[Place] = field(default_factory=list)
    ranges: list[RangeRead] = field(default_factory=list)
    writes: list[Place] = field(default_factory=list)


class LockTable:
    """The locks of prepared transactions in one shard. Pure."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}
        self._writers: dict[Place, str] = {}
        self._readers: dict[Place, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def acquire(self, transaction: str, reads: Iterable[Read], writes: Iterable[Place]) -> None:
        """Lock; nothing may stand against it (see :func:`find_clash`)."""
        held = self._held[transaction] = _Held(writes=list(dict.fromkeys(writes)))
        for read in reads:
            if isinstance(read, PointRead):
                place = (read.container, read.key)
                held.reads.append(place)
                self._readers[place] = self._readers.get(place, 0) + 1
            else:
                held.ranges.append(read)
        for place in held.writes:
            assert place not in self._writers, f"{place} is locked by {self._writers[place]} already"
            self._writers[place] = transaction

    def release(self, transaction: str) -> None:
        """Unlock all that a transaction holds; one that holds nothing is fine."""
        held = self._held.pop(transaction, None)
        if held is None:
            return
        for place in held.reads:
            self._readers[place] -= 1
            if not self._readers[place]:
                del self._readers[place]
        for place in held.writes:
            del self._writers[place]

    def against_read(self, container: str, key: str) -> bool:
        return (container, key) in self._writers

    def against_range(self, container: str, start: str, end: str | None) -> str | None:
        """A key of the range that is about to be written, if any."""
        for other, key in self._writers:
            if other == container and start <= key and (end is None or key < end):
                return key
        return None

    def against_write(self, container: str, key: str) -> bool:
        place = (container, key)
        if place in self._writers or place in self._readers:
            return True
        return any(
            read.container == container and read.start <= key and (read.end is None or key < read.end)
            for held in self._held.values()
            for read in held.ranges
        )


def find_clash(store: Store, locks: LockTable, reads: Sequence[Read], writes: Sequence[Place]) -> Clash | None:
    """What keeps a transaction from committing now, or None."""
    for read in reads:
        clash = _point_clash(store, locks, read) if isinstance(read, PointRead) else _range_clash(store, locks, read)
        if clash is not None:
            return clash
    for container, key in writes:
        if len(locks) and locks.against_write(container, key):
            return Clash(container, key, "is locked by a transaction across shards", lock=True)
    return None


def _point_clash(store: Store, locks: LockTable, read: PointRead) -> Clash | None:
    version = store.version(read.container, read.key)
    if version != read.version:
        was, now = (f"version {v}" if v else "absent" for v in (read.version, version))
        return Clash(read.container, read.key, f"was {was} when it was read and is {now}", lock=False)
    if locks.against_read(read.container, read.key):
        return Clash(read.container, read.key, "is locked by a transaction across shards", lock=True)
    return None


def _range_clash(store: Store, locks: LockTable, read: RangeRead) -> Clash | None:
    if store.fingerprint(read.container, read.start, read.end) != (read.count, read.version_max):
        return Clash(read.container, read.start, "begins a range that has changed since it was read", lock=False)
    locked = locks.against_range(read.container, read.start, read.end)
    if locked is not None:
        return Clash(read.container, locked, "is locked by a transaction across shards", lock=True)
    return None

"""The versioned store of one shard: containers of sorted keys with packed values, and a short memory of the past.

Every change carries the index of the log entry that made it; the version of an object is the index of its last change.
What a change replaced is kept in one list per shard, oldest first, so that a transaction can go on reading the state of
the index at which it began (a snapshot) while others commit. The list is bounded by :data:`HISTORY_CHANGES_MAX` and
:data:`HISTORY_SIZE_BYTES_MAX`, or holds the changes of the newest entry alone: the state before that entry can always
be read, and what it changed be told. A snapshot older than what is kept is refused with ``Conflict``, and its
transaction begins again.

A value is read at a snapshot by taking what the *first* change after the snapshot replaced, or, without such a change,
what is there now. One exception keeps transactions across shards in real-time order: a change that was prepared at or
before the snapshot, and decided after it, may already have been seen elsewhere when the snapshot was taken. Such a read
is refused too.

The same list tells whoever watches what was written (:meth:`Store.written`): a change made its object what the next
change of that object replaced, or, without such a change, what is there now.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from sortedcontainers import SortedDict

from gostore.core.errors import Compacted, Conflict

HISTORY_CHANGES_MAX = 4096
"""Replaced values kept per shard. Larger: longer transactions find their snapshot; smaller: less memory."""

HISTORY_SIZE_BYTES_MAX = 8 * 1024 * 1024
"""Bytes of replaced values kept per shard."""


class Stored(NamedTuple):
    version: int
    packed: bytes


class Change(NamedTuple):
    """At ``index`` the value ``previous`` (None: absent) was replaced; locked for it since ``prepared``."""

    index: int  # type: ignore[assignment]  # tuple.index is not missed here
    prepared: int
    container: str
    key: str
    previous: Stored | None


class Written(NamedTuple):
    """At ``index`` the object ``key`` became ``packed``; None: it was removed."""

    index: int  # type: ignore[assignment]  # tuple.index is not missed here
    key: str
    packed: bytes | None


class Row(NamedTuple):
    key: str
    version: int
    packed: bytes


class Store:
    """Pure: every method is a function of the calls before it."""

    def __init__(self) -> None:
        self._containers: dict[str, SortedDict] = {}
        self._changes: deque[Change] = deque()
        self._changes_size = 0
        self.floor = 0
        """The oldest index at which a snapshot can be read."""
        self.history_floor = 0
        """Every change after this index is kept. Lower than ``floor`` when a container was dropped since."""
        self.size_bytes = 0
        """Of all keys and packed values that are current."""
        self.objects = 0
        self.newest = 0
        """Index of the latest change since this store was made; not part of the state."""

    def current(self, container: str, key: str) -> Stored | None:
        entries = self._containers.get(container)
        return None if entries is None else entries.get(key)

    def version(self, container: str, key: str) -> int:
        """0 when absent."""
        stored = self.current(container, key)
        return 0 if stored is None else stored.version

    def containers(self) -> list[str]:
        return sorted(self._containers)

    def rows(self, container: str) -> list[Row]:
        """All current objects of a container: a copy that later changes do not touch (values are shared)."""
        entries = self._containers.get(container, {})
        return [Row(key, stored.version, stored.packed) for key, stored in entries.items()]

    def load(self, container: str, rows: list[Row]) -> None:
        """Put objects in place without history; for restoring."""
        entries = self._containers.setdefault(container, SortedDict())
        entries.update({row.key: Stored(row.version, row.packed) for row in rows})
        self.objects += len(rows)
        self.size_bytes += sum(_size(row.key, row.packed) for row in rows)

    def write(self, container: str, key: str, packed: bytes | None, index: int, prepared: int = 0) -> None:
        """Replace an object (None removes it) at ``index``, once per object and index; indices never fall."""
        entries = self._containers.get(container)
        if entries is None:
            if packed is None:
                return
            entries = self._containers[container] = SortedDict()
        previous: Stored | None = entries.get(key)
        if packed is None:
            if previous is None:
                return
            del entries[key]
            self.objects -= 1
            self.size_bytes -= _size(key, previous.packed)
            if not entries:
                del self._containers[container]
        elif previous is None:
            entries[key] = Stored(index, packed)
            self.objects += 1
            self.size_bytes += _size(key, packed)
        else:
            dict.__setitem__(entries, key, Stored(index, packed))  # the order of the keys stays as it is
            self.size_bytes += len(packed) - len(previous.packed)
        self.newest = index
        size = len(key) if previous is None else len(key) + len(previous.packed)
        self._remember(Change(index, prepared or index, container, key, previous), size)

    def drop(self, container: str, index: int) -> None:
        """Remove a whole container; snapshots older than ``index`` are refused afterwards.

        What was written in other containers is still told: whoever watches them has nothing to do with this one.
        """
        for key, stored in self._containers.pop(container, {}).items():
            self.objects -= 1
            self.size_bytes -= _size(key, stored.packed)
        self.newest = index
        self.floor = index

    def forget_history(self, floor: int) -> None:
        self._changes.clear()
        self._changes_size = 0
        self.floor = self.history_floor = floor

    def _remember(self, change: Change, size: int) -> None:
        changes, size = self._changes, self._changes_size + size
        changes.append(change)
        while len(changes) > HISTORY_CHANGES_MAX or size > HISTORY_SIZE_BYTES_MAX:
            oldest = changes[0]
            index = oldest.index
            if index == change.index:
                break  # whoever is told of this entry when it is applied must find all of it
            changes.popleft()
            size -= _change_size(oldest)
            self.history_floor = index
            self.floor = max(self.floor, index)
        self._changes_size = size

    def read(self, container: str, key: str, at: int | None = None) -> Stored | None:
        """The object now, or at the snapshot ``at``. Raises ``Conflict`` when that is not kept."""
        stored = self.current(container, key)
        if at is None:
            return stored
        self._check_snapshot(at)
        if stored is not None and stored.version <= at:
            return stored
        first: Change | None = None
        for change in reversed(self._changes):  # those since the snapshot: few, unless it is old
            if change.index <= at:
                break
            if change.key == key and change.container == container:
                first = change
        return stored if first is None else _replaced(first, at)

    def scan(self, container: str, start: str, end: str | None, at: int | None = None) -> Iterator[Row]:
        """The objects with ``start <= key < end`` in key order, now or at a snapshot. Raises as :meth:`read`.

        The store must not be changed while the iterator is in use.
        """
        entries = self._containers.get(container)
        keys: Iterator[str] = iter(()) if entries is None else entries.irange(start, end, (True, False))
        if at is None:
            for key in keys:
                yield Row(key, *self._present(container, key))
            return
        self._check_snapshot(at)
        changed: dict[str, Change] = {}
        for change in reversed(self._changes):
            if change.index <= at:
                break
            if change.container == container and start <= change.key and (end is None or change.key < end):
                changed[change.key] = change
        last: str | None = None
        for key in heapq.merge(keys, sorted(changed)):
            if key == last:
                continue
            last = key
            stored = _replaced(changed[key], at) if key in changed else self._present(container, key)
            if stored is not None:
                yield Row(key, *stored)

    def _present(self, container: str, key: str) -> Stored:
        stored: Stored = self._containers[container][key]
        return stored

    def written(self, container: str, start: str, end: str | None, after: int) -> list[Written]:
        """What became of the objects with ``start <= key < end`` after the index ``after``, in the order of the log.

        Equal on all stores that keep it. The container was never dropped. Raises ``Compacted`` when not all is kept.
        """
        if after < self.history_floor:
            raise Compacted(
                f"the changes after index {after} are no longer kept, only those after {self.history_floor}",
                kept_after=self.history_floor,
            )
        found: list[Written] = []
        later: dict[str, Stored | None] = {}
        for change in reversed(self._changes):
            if change.index <= after:
                break
            if change.container == container and start <= change.key and (end is None or change.key < end):
                stored = later[change.key] if change.key in later else self.current(container, change.key)
                found.append(Written(change.index, change.key, None if stored is None else stored.packed))
                later[change.key] = change.previous
        found.reverse()
        return found

    def fingerprint(self, container: str, start: str, end: str | None) -> tuple[int, int]:
        """(number of objects, greatest version) of a range; equal fingerprints mean that nothing changed."""
        entries = self._containers.get(container)
        if entries is None:
            return 0, 0
        versions = [entries[key].version for key in entries.irange(start, end, (True, False))]
        return len(versions), max(versions, default=0)

    def count(self, container: str, start: str, end: str | None) -> int:
        """Objects in a range, without looking at each."""
        entries = self._containers.get(container)
        if entries is None:
            return 0
        upto: int = len(entries) if end is None else entries.bisect_left(end)
        first: int = entries.bisect_left(start)
        return max(0, upto - first)

    def _check_snapshot(self, at: int) -> None:
        if at < self.floor:
            raise Conflict(
                f"the snapshot of index {at} is no longer kept (the oldest is {self.floor}): "
                "run the transaction again, and make it shorter"
            )


def _size(key: str, packed: bytes) -> int:
    return len(key) + len(packed)


def _change_size(change: Change) -> int:
    return len(change.key) + (0 if change.previous is None else len(change.previous.packed))


def _replaced(change: Change, at: int) -> Stored | None:
    if change.prepared <= at:
        raise Conflict(
            f"{change.key!r} was being changed by a transaction across shards at index {at}: run the transaction again"
        )
    return change.previous

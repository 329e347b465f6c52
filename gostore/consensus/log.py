"""The log of one replica as its core sees it: the latest entries in memory, the terms of all, who is a member. Pure.

Indices, in order: ``start`` (the snapshot) <= applied <= committed <= last; and, independent of these, ``durable`` <=
``handed`` <= last: what the driver reported as synced, and what it was given to write.

The terms of all entries are kept as runs (a term, and the first index that has it), so that no question of the protocol
reads the disk; only a follower that lags, and a replica that starts, have old entries read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable

from gostore.consensus.configuration import Configuration
from gostore.consensus.messages import CONFIGURATION, Entry, Point, size_of
from gostore.consensus.ready import Restored, Storage
from gostore.consensus.tunables import Tunables


class RaftLog:
    """``start``: the point before the first entry that exists. ``last``: the point of the last one."""

    def __init__(self, restored: Restored, storage: Storage, tunables: Tunables) -> None:
        self._storage = storage
        self._tunables = tunables
        self._outstanding: deque[tuple[int, int]] = deque()  # (number of a Ready, its last index)
        self._truncated: int | None = None
        self.committed = self.applied = 0
        self.durable = self.handed = 0
        self._restart(restored.start, restored.configuration)
        self._runs += restored.runs
        self._configurations += restored.configurations
        self.last = Point(max(restored.last, restored.start.index), self._runs[-1][1])
        self._cached_from = self.last.index + 1
        self.durable = self.handed = self.last.index
        self._warm()

    def _restart(self, start: Point, configuration: Configuration) -> None:
        self.start = self.last = start
        self._cached: list[Entry] = []
        self._cached_from = start.index + 1
        self._cached_size = 0
        self._runs: list[tuple[int, int]] = [(start.index, start.term)]  # (first index, term)
        self._configurations: list[tuple[int, Configuration]] = [(start.index, configuration)]
        self.committed = self.applied = self.handed = start.index
        self.durable = start.index

    def _warm(self) -> None:
        """Have the latest entries in memory, as before the start."""
        last, most = self.last.index, self._tunables.cache_entries_max
        wanted = max(self.start.index, last - most) + 1
        entries: list[Entry] = []
        while wanted + len(entries) <= last:
            entries += self._storage.entries(wanted + len(entries), last)
        size = size_of(entries)
        self._cached, self._cached_from, self._cached_size = entries, wanted, size
        while self._cached_size > self._tunables.cache_size_bytes_max:
            self._drop_cached(1)

    # what there is

    @property
    def configuration(self) -> Configuration:
        """The latest one, committed or not: the one in force."""
        return self._configurations[-1][1]

    @property
    def configuration_index(self) -> int:
        """Of the entry that made the one in force."""
        return self._configurations[-1][0]

    def configuration_at(self, index: int) -> Configuration:
        """The one in force after the entry ``index``, which is not below ``start``."""
        assert index >= self.start.index
        return [configuration for first, configuration in self._configurations if first <= index][-1]

    def may_stand(self, name: str) -> bool:
        """Whether it has a vote, or had one before a change that is not known to be committed.

        Such a one may be the only one with the entry that the others need to be without it (thesis 4.2.2).
        """
        if self.configuration.is_voter(name):
            return True
        return any(
            configuration.is_voter(name)
            for place, (_, configuration) in enumerate(self._configurations)
            if place + 1 == len(self._configurations) or self._configurations[place + 1][0] > self.committed
        )

    def term(self, index: int) -> int | None:
        """Of the entry, or of the point at ``start``; None for what is before or behind the log."""
        if not self.start.index <= index <= self.last.index:
            return None
        return self._runs[bisect_right(self._runs, index, key=lambda run: run[0]) - 1][1]

    def holds(self, point: Point) -> bool:
        return self.term(point.index) == point.term

    def last_not_above(self, point: Point) -> Point:
        """The last place up to index ``point.index`` whose term is not above ``point.term``; ``start`` if none is."""
        index = min(point.index, self.last.index)
        for first, term in reversed(self._runs):
            if first <= index:
                if term <= point.term:
                    return Point(index, term)
                index = first - 1
        return self.start

    def slice(self, first: int, last: int, size_max: int, count_max: int | None = None) -> list[Entry]:
        """The entries ``first`` .. ``last``, as many as the bounds allow, but at least one."""
        assert self.start.index < first <= last <= self.last.index, f"{first}..{last} of {self.start}..{self.last}"
        if count_max is not None:
            last = min(last, first + count_max - 1)
        source: Iterable[Entry]
        if first >= self._cached_from:
            source = self._cached[first - self._cached_from : last - self._cached_from + 1]
        else:
            source = self._storage.entries(first, min(last, self._cached_from - 1))
        found: list[Entry] = []
        size = 0
        for entry in source:
            size += len(entry.payload)
            if found and size > size_max:
                break
            found.append(entry)
        assert found, f"the storage has no entry {first}"
        assert found[0].index == first, f"the storage gave entry {found[0].index} for {first}"
        return found

    def size_between(self, first: int, last: int) -> int:
        """Payloads of the entries ``first`` .. ``last``, in bytes, as far as they are in memory."""
        from_here = max(0, first - self._cached_from)
        return size_of(self._cached[from_here : max(0, last + 1 - self._cached_from)])

    @property
    def unwritten(self) -> bool:
        """There is something that the driver was not given yet."""
        return self._truncated is not None or self.handed < self.last.index

    # changes

    def append(self, entries: Iterable[Entry]) -> None:
        last_index, last_term = self.last
        for entry in entries:
            term, index, kind, payload = entry
            assert index == last_index + 1, f"entry {index} behind {last_index}"
            assert term >= last_term, f"term {term} behind {last_term}"
            if term != last_term:
                self._runs.append((index, term))
            if kind == CONFIGURATION:
                self._configurations.append((index, Configuration.unpack(payload)))
            self._cached.append(entry)
            self._cached_size += len(payload)
            last_index, last_term = index, term
        self.last = Point(last_index, last_term)

    def truncate(self, index: int) -> None:
        """Void the entries from ``index`` on."""
        assert self.committed < index <= self.last.index, f"truncation from {index}, committed {self.committed}"
        if index <= self.handed:
            self._truncated = index if self._truncated is None else min(index, self._truncated)
            self.handed = index - 1
        self._forget_durable(index - 1)
        kept = max(0, index - self._cached_from)
        self._cached_size -= size_of(self._cached[kept:])
        del self._cached[kept:]
        self._cached_from = min(self._cached_from, index)
        while self._runs[-1][0] >= index:
            self._runs.pop()
        while self._configurations[-1][0] >= index:
            self._configurations.pop()
        self.last = Point(index - 1, self._runs[-1][1])

    def _forget_durable(self, index: int) -> None:
        """A sync that is reported later is one of what stood there before, and vouches for nothing behind ``index``."""
        self.durable = min(self.durable, index)
        self._outstanding = deque((number, min(last, index)) for number, last in self._outstanding)

    def commit(self, index: int) -> bool:
        """Whether that is news."""
        assert index <= self.last.index, f"commit {index} of {self.last.index}"
        if index <= self.committed:
            return False
        self.committed = index
        return True

    def install(self, point: Point, configuration: Configuration) -> None:
        """A snapshot stands for everything: the log begins behind it."""
        assert point.index > self.committed
        self._forget_durable(0)
        self._truncated = None
        self._restart(point, configuration)
        self.durable = 0  # until its sync is reported

    def compact(self, index: int) -> None:
        """A snapshot of this node's own, up to ``index``, is on the medium: what is before needs no place."""
        assert self.start.index <= index <= self.applied, f"compaction at {index}, applied {self.applied}"
        term = self.term(index)
        assert term is not None
        kept = bisect_right(self._runs, index, key=lambda run: run[0])
        self._runs[:kept] = [(index, term)]
        configuration = self.configuration_at(index)
        self._configurations = [(index, configuration), *(made for made in self._configurations if made[0] > index)]
        self.start = Point(index, term)
        if index >= self._cached_from:
            self._drop_cached(index + 1 - self._cached_from)

    def trim(self) -> None:
        """Keep in memory what is not applied and synced, and of the rest as much as the bounds allow."""
        most = self._tunables.cache_entries_max
        # With some slack, as taking away the first of a list moves all the others.
        if len(self._cached) <= 2 * most and self._cached_size <= 2 * self._tunables.cache_size_bytes_max:
            return
        allowed = min(self.applied, self.durable) + 1 - self._cached_from
        count, size = 0, self._cached_size
        while count < allowed and (len(self._cached) - count > most or size > self._tunables.cache_size_bytes_max):
            size -= len(self._cached[count].payload)
            count += 1
        self._drop_cached(count)

    def _drop_cached(self, count: int) -> None:
        self._cached_size -= size_of(self._cached[:count])
        del self._cached[:count]
        self._cached_from += count

    # what the driver does

    def hand_out(self, number: int) -> tuple[int | None, tuple[Entry, ...]]:
        """What is to be written with this Ready: from which index on to truncate, and the new entries."""
        truncated, entries = self._truncated, tuple(self._cached[self.handed + 1 - self._cached_from :])
        self._truncated = None
        self.handed = self.last.index
        self._outstanding.append((number, self.handed))
        return truncated, entries

    def persisted(self, number: int) -> None:
        """All Readys up to this one are on the medium."""
        while self._outstanding and self._outstanding[0][0] <= number:
            self.durable = max(self.durable, self._outstanding.popleft()[1])

    def next_committed(self) -> list[Entry]:
        """The next entries to apply; they count as applied from now on."""
        if self.applied >= self.committed:
            return []
        found = self.slice(self.applied + 1, self.committed, self._tunables.committed_size_bytes_max)
        self.applied = found[-1].index
        return found

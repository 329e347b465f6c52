"""What a log holds and where: the index that is kept in memory. Pure.

An entry costs 12 bytes here (8 for its location, 4 for its length) besides its group's runs of terms, a pair of numbers
for each change of leader; its payload stays on the disk.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

from gostore.storage import segments
from gostore.storage.segments import RECORD_SIZE_BYTES, RawRecord

# A location is segment number << 32 | offset, or, with the highest bit, the number of a record in the buffer.
_OFFSET_BITS: Final = 32
_OFFSET: Final = (1 << _OFFSET_BITS) - 1
BUFFERED: Final = 1 << 63
MISSING: Final = (1 << 64) - 1
"""The location of an entry that an outline names and whose record was not met yet."""

# Dropped places at the front are given back when there are more of them than this and than live ones: then the cost
# of moving the rest is constant per entry.
_DROPPED_MAX: Final = 1024

_PAIR: Final = struct.Struct("<QQ")
_ENTRIES: Final = (segments.ENTRY, segments.COPY)


def location_of(segment: int, offset: int) -> int:
    return segment << _OFFSET_BITS | offset


def place_of(location: int) -> tuple[int, int]:
    """(segment, offset) of a location that is neither buffered nor missing."""
    return location >> _OFFSET_BITS, location & _OFFSET


class GroupIndex:
    """The entries ``first`` .. ``next - 1`` of one group: locations, lengths of payloads, terms."""

    __slots__ = ("_dropped", "_lengths", "_locations", "_starts", "_terms", "first")

    def __init__(self, first: int) -> None:
        self.first = first
        self._dropped = 0
        self._locations = array("Q")
        self._lengths = array("I")
        self._starts: list[int] = []
        self._terms: list[int] = []

    @property
    def next(self) -> int:
        """The index that the next entry will have."""
        return self.first + len(self._locations) - self._dropped

    def append(self, term: int, location: int, length: int) -> None:
        if not self._terms or self._terms[-1] != term:
            self._starts.append(self.next)
            self._terms.append(term)
        self._locations.append(location)
        self._lengths.append(length)

    def location(self, index: int) -> int:
        return self._locations[index - self.first + self._dropped]

    def length(self, index: int) -> int:
        """Of the payload, in bytes."""
        return self._lengths[index - self.first + self._dropped]

    def term(self, index: int) -> int:
        return self._terms[bisect_right(self._starts, index) - 1]

    def relocate(self, index: int, location: int, length: int) -> None:
        place = index - self.first + self._dropped
        self._locations[place] = location
        self._lengths[place] = length

    def settle(self, index: int, before: int, after: int) -> bool:
        """The entry lies at ``after``, if it lay at ``before``; whether it did."""
        place = index - self.first + self._dropped
        if not self._dropped <= place < len(self._locations) or self._locations[place] != before:
            return False
        self._locations[place] = after
        return True

    def drop_suffix(self, index: int) -> list[tuple[int, int]]:
        """Forget the entries from ``index`` (at least ``first``) on; returns their (location, length)."""
        place = index - self.first + self._dropped
        gone = list(zip(self._locations[place:], self._lengths[place:], strict=True))
        del self._locations[place:]
        del self._lengths[place:]
        while self._starts and self._starts[-1] >= index:
            self._starts.pop()
            self._terms.pop()
        return gone

    def drop_prefix(self, index: int) -> list[tuple[int, int]]:
        """Forget the entries below ``index``, which may lie beyond the end; returns their (location, length)."""
        count = min(index, self.next) - self.first
        if index > self.next:
            gone = self.drop_suffix(self.first)
            self.first = index
            return gone
        end = self._dropped + count
        gone = list(zip(self._locations[self._dropped : end], self._lengths[self._dropped : end], strict=True))
        self.first = index
        self._dropped = end
        if self._dropped > max(_DROPPED_MAX, len(self._locations) - self._dropped):
            del self._locations[: self._dropped]
            del self._lengths[: self._dropped]
            self._dropped = 0
        # The run that holds `first` stays; with no entry left none does.
        runs = len(self._starts) if self.first == self.next else bisect_right(self._starts, self.first) - 1
        del self._starts[:runs]
        del self._terms[:runs]
        if self._starts:
            self._starts[0] = self.first
        return gone

    def missing(self) -> int | None:
        """The lowest index whose record was not met, ``None`` when all were."""
        for place in range(self._dropped, len(self._locations)):
            if self._locations[place] == MISSING:
                return place - self._dropped + self.first
        return None

    def outline(self) -> bytes:
        """What there is, without where: the next index and the runs of terms."""
        pairs = [(self.next, 0)]
        pairs += zip(self._starts, self._terms, strict=True)
        return b"".join(_PAIR.pack(*pair) for pair in pairs)

    @classmethod
    def from_outline(cls, first: int, outline: bytes | memoryview) -> GroupIndex:
        """A group of which every entry is :data:`MISSING`.

        Raises ``ValueError`` for what :meth:`outline` did not make.
        """
        if not outline or len(outline) % _PAIR.size:
            raise ValueError("not an outline")
        (end, _), *runs = _PAIR.iter_unpack(outline)
        starts = [start for start, _ in runs]
        if end < first or (starts[:1] or [first]) != [first] or (end > first) != bool(runs) or starts != sorted(starts):
            raise ValueError("not an outline")
        group = cls(first)
        group._locations = array("Q", [MISSING]) * (end - first)
        group._lengths = array("I", [0]) * (end - first)
        group._starts = starts
        group._terms = [term for _, term in runs]
        return group


class LogIndex:
    """All groups of a log, and how many bytes of entries are still needed in each segment (``live``)."""

    def __init__(self) -> None:
        self.groups: dict[int, GroupIndex] = {}
        self.live: dict[int, int] = {}

    def find(self, group: int, index: int) -> GroupIndex | None:
        """The group when it has this entry."""
        entries = self.groups.get(group)
        return entries if entries is not None and entries.first <= index < entries.next else None

    def append(self, group: int, term: int, index: int, length: int, location: int) -> None:
        """Raises ``ValueError`` when ``index`` is not the group's next one; the first entry of a group may be any."""
        entries = self.groups.get(group)
        if entries is None:
            entries = self.groups[group] = GroupIndex(index)
        elif index != entries.next:
            raise ValueError(f"entry {index} of group {group} cannot follow entry {entries.next - 1}")
        entries.append(term, location, length)
        if not location & BUFFERED:
            self._count(location, length, 1)

    def drop_suffix(self, group: int, index: int) -> None:
        for location, length in self.groups[group].drop_suffix(index):
            self._count(location, length, -1)

    def drop_prefix(self, group: int, index: int) -> None:
        entries = self.groups.get(group)
        if entries is None:
            self.groups[group] = GroupIndex(index)
            return
        for location, length in entries.drop_prefix(index):
            self._count(location, length, -1)

    def holds(self, record: RawRecord, location: int) -> bool:
        """True when this record, at this location, is an entry that is still needed."""
        if record.type not in _ENTRIES:
            return False
        entries = self.find(record.group, record.index)
        return entries is not None and entries.location(record.index) == location

    def settle(self, records: Iterable[RawRecord], buffered: int, location: int) -> None:
        """Records that were in the buffer, from ``buffered`` on, lie in a segment now, one behind the other.

        Those that are no entries, or are not needed any more, are passed over.
        """
        segment, live = location >> _OFFSET_BITS, 0
        for type_, group, _, index, _, payload in records:
            size = RECORD_SIZE_BYTES + len(payload)
            if type_ in _ENTRIES:
                entries = self.groups.get(group)
                if entries is not None and entries.settle(index, buffered, location):
                    live += size
            buffered += 1
            location += size
        self.live[segment] = self.live.get(segment, 0) + live

    def relocate(self, record: RawRecord, location: int) -> None:
        """An entry that is there lies elsewhere from now on."""
        entries = self.groups[record.group]
        self._count(entries.location(record.index), entries.length(record.index), -1)
        entries.relocate(record.index, location, len(record.payload))
        self._count(location, len(record.payload), 1)

    def replay(self, record: RawRecord, location: int, *, oldest: bool) -> None:
        """Do what a record says; ``oldest``: it stands in the oldest segment that there is.

        Raises ``ValueError`` when it does not follow from the records before.
        """
        type_, group, term, index, _, payload = record
        if type_ == segments.ENTRY:
            self.append(group, term, index, len(payload), location)
        elif type_ == segments.PREFIX:
            self.drop_prefix(group, index)
        elif type_ == segments.OUTLINE:
            self._outline(record, oldest=oldest)
        elif type_ in (segments.SUFFIX, segments.COPY):
            if self.find(group, index) is None:
                raise ValueError(f"there is no entry {index} in group {group}")
            if type_ == segments.SUFFIX:
                self.drop_suffix(group, index)
            else:
                self.relocate(record, location)
        elif type_ != segments.SYNCED:
            raise ValueError(f"there is no record type {type_}")

    def outlines(self) -> list[RawRecord]:
        """The records that make a later segment understandable without the earlier ones."""
        return [
            RawRecord(segments.OUTLINE, group, 0, entries.first, 0, entries.outline())
            for group, entries in sorted(self.groups.items())
        ]

    def missing(self) -> tuple[int, int] | None:
        """(group, index) of an entry that should be there and is not."""
        for group, entries in self.groups.items():
            if (index := entries.missing()) is not None:
                return group, index
        return None

    def _outline(self, record: RawRecord, *, oldest: bool) -> None:
        entries = self.groups.get(record.group)
        if oldest and entries is None:
            self.groups[record.group] = GroupIndex.from_outline(record.index, record.payload)
        elif entries is None or (entries.first, entries.outline()) != (record.index, record.payload):
            raise ValueError(f"group {record.group} does not hold what its outline says")

    def _count(self, location: int, length: int, sign: int) -> None:
        # Neither a missing nor a buffered entry takes space in a segment.
        if not location & BUFFERED:
            segment = location >> _OFFSET_BITS
            self.live[segment] = self.live.get(segment, 0) + sign * (RECORD_SIZE_BYTES + length)

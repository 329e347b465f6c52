"""Where the entries of one group are: the index of the log that is kept in memory. Pure.

An entry costs 12 bytes here (8 for its location, 4 for its length) besides a run of terms, which is one pair of numbers
for each change of leader; its payload stays on the disk.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from typing import Final

MISSING: Final = (1 << 64) - 1
"""The location of an entry that an outline names and whose record was not met yet."""

# Dropped places at the front are given back when there are more of them than this and than live ones: then the cost
# of moving the rest is constant per entry.
_DROPPED_MAX: Final = 1024

_PAIR: Final = struct.Struct("<QQ")


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
        pairs += [(max(start, self.first), term) for start, term in zip(self._starts, self._terms, strict=True)]
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

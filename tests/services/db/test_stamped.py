"""The log of the policy quorum: whatever the order in which entries come, the same log."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import Corrupt
from gostore.services.db import stamped
from gostore.services.db.stamped import Stamped, StampedLog, from_wire, pack_entry, to_wire, unpack_entry

ORIGINS = ("a", "b", "c")


def entries_of(stamps: dict[str, list[int]]) -> list[Stamped]:
    """Of each origin in the order of its stamps, as its clock would have it."""
    return [
        Stamped(stamp, origin, number, f"{origin}{number}".encode())
        for origin, values in stamps.items()
        for number, stamp in enumerate(sorted(values), 1)
    ]


def give(log: StampedLog, other: StampedLog) -> None:
    """``other`` takes what it lacks, message by message."""
    while found := log.lacking(other.vector):
        for entry in from_wire(*to_wire(found)):
            if other.is_next(entry):
                other.add(entry)


@given(
    st.dictionaries(st.sampled_from(ORIGINS), st.lists(st.integers(0, 9), max_size=8)), st.integers(1, 4), st.randoms()
)
def test_logs_that_exchange_become_equal(stamps: dict[str, list[int]], batch: int, rng: random.Random) -> None:
    """Stamps collide, entries are delivered in any order, some twice and some too early."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stamped, "BATCH_ENTRIES_MAX", batch)
        everything = entries_of(stamps)
        logs = [StampedLog() for _ in range(3)]
        for log in logs:
            for entry in rng.choices(everything, k=2 * len(everything)) if everything else []:
                if log.is_next(entry):
                    place = log.add(entry)
                    assert log.entries[place] == entry
        whole = StampedLog()
        for entry in everything:
            whole.add(entry)
        for log in logs:
            assert whole.covers(log.vector)
            held = {entry.name for entry in log.entries}
            lacking = whole.lacking(log.vector)
            assert len(lacking) <= batch
            assert not held & {entry.name for entry in lacking}
        logs.append(whole)
        for _ in range(2):
            for one, other in zip(logs, [*logs[1:], logs[0]], strict=True):
                give(one, other)
                give(other, one)
        assert [log.entries for log in logs] == [sorted(everything)] * 4
        assert all(log.vector == whole.vector and log.size_bytes == whole.size_bytes for log in logs)


def test_an_entry_whose_predecessor_is_missing_is_not_taken() -> None:
    log = StampedLog()
    assert not log.is_next(Stamped(5, "a", 2, b""))
    log.add(Stamped(4, "a", 1, b"x"))
    assert log.is_next(Stamped(5, "a", 2, b""))
    assert not log.is_next(Stamped(4, "a", 1, b"x")), "known"
    assert not log.covers({"a": 2})


def test_a_large_entry_travels_alone() -> None:
    log = StampedLog()
    for number in (1, 2):
        log.add(Stamped(number, "a", number, bytes(stamped.BATCH_SIZE_BYTES_MAX + 1)))
    assert [entry.number for entry in log.lacking({})] == [1]
    assert [entry.number for entry in log.lacking({"a": 1})] == [2]


def test_what_is_damaged_is_refused() -> None:
    entry = Stamped(1 << 60, "n1.3.1", 7, b"payload")
    assert unpack_entry(pack_entry(entry)) == entry
    heads, data = to_wire([entry])
    for broken in (data[:-1], data + b"x"):
        with pytest.raises(Corrupt, match="heads"):
            list(from_wire(heads, broken))
    for packed in (b"", b"\xc1", pack_entry(entry)[:-1], b"\x93\x01\x02\x03"):
        with pytest.raises(Corrupt, match="cannot be read"):
            unpack_entry(packed)

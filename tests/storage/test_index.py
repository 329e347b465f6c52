"""The index of a log, against a plain list."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.storage import index as index_module
from gostore.storage import segments
from gostore.storage.index import BUFFERED, MISSING, GroupIndex, LogIndex, location_of, place_of
from gostore.storage.segments import RECORD_SIZE_BYTES, RawRecord

steps = st.lists(
    st.tuples(st.sampled_from(["append", "append", "append", "suffix", "prefix", "beyond"]), st.floats(0, 1)),
    max_size=80,
)


@settings(deadline=None)
@given(st.integers(0, 1 << 40), steps)
def test_a_group_behaves_like_a_list(first: int, steps: list[tuple[str, float]]) -> None:
    group, expected = GroupIndex(first), []
    for number, (step, where) in enumerate(steps):
        place = int(where * len(expected))
        if step == "append":
            term = number // 5
            group.append(term, number, number * 3)
            expected.append((term, number, number * 3))
        elif step == "suffix":
            gone = group.drop_suffix(group.first + place)
            assert gone == [(at, length) for _, at, length in expected[place:]]
            del expected[place:]
        else:
            place = len(expected) + 7 if step == "beyond" else place
            first = group.first + place
            assert group.drop_prefix(first) == [(at, length) for _, at, length in expected[:place]]
            del expected[:place]
            assert group.first == first
        found = [
            (group.term(index), group.location(index), group.length(index)) for index in range(group.first, group.next)
        ]
        assert found == expected
        copy = GroupIndex.from_outline(group.first, group.outline())
        assert (copy.first, copy.next, copy.outline()) == (group.first, group.next, group.outline())
        assert [copy.term(index) for index in range(copy.first, copy.next)] == [term for term, *_ in expected]
        assert copy.missing() == (copy.first if expected else None)
        assert group.missing() is None


def test_dropped_places_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_DROPPED_MAX", 4)
    group = GroupIndex(1)
    for number in range(1, 101):
        group.append(1, number, 0)
        group.drop_prefix(number - 2)
        assert len(group._locations) < 12
    assert [group.location(index) for index in range(group.first, group.next)] == [98, 99, 100]


@pytest.mark.parametrize("outline", [b"", b"x", GroupIndex(9).outline(), GroupIndex(5).outline() * 2])
def test_what_is_no_outline_is_refused(outline: bytes) -> None:
    with pytest.raises(ValueError, match="not an outline"):
        GroupIndex.from_outline(6 if len(outline) == 16 and outline[0] == 5 else 5, outline)


def test_locations() -> None:
    for segment, offset in ((1, 0), (9_999_999_9, (1 << 32) - 1)):
        location = location_of(segment, offset)
        assert place_of(location) == (segment, offset)
        assert not location & BUFFERED
    assert MISSING & BUFFERED


def record(type_: int, index: int, payload: bytes = b"", term: int = 1) -> RawRecord:
    return RawRecord(type_, 7, term, index, 0, payload)


def test_live_bytes_follow_the_entries() -> None:
    log = LogIndex()
    size = RECORD_SIZE_BYTES + 10
    for index in range(1, 6):
        log.append(7, 1, index, 10, location_of(1, index * 100))
    assert log.live == {1: 5 * size}
    log.relocate(record(segments.COPY, 2, b"0123456789"), location_of(2, 0))
    assert log.live == {1: 4 * size, 2: size}
    log.relocate(record(segments.COPY, 3, b"0123456789"), BUFFERED | 1)
    assert log.live == {1: 3 * size, 2: size}
    log.drop_prefix(7, 3)
    assert log.live == {1: 2 * size, 2: 0}
    log.drop_suffix(7, 4)
    assert log.live == {1: 0, 2: 0}


@pytest.mark.parametrize(
    "bad",
    [
        record(segments.ENTRY, 5),
        record(segments.ENTRY, 2),
        record(segments.SUFFIX, 4),
        record(segments.COPY, 9),
        record(segments.OUTLINE, 1, GroupIndex(1).outline()),
        record(99, 1),
    ],
)
def test_a_record_that_does_not_follow_is_refused(bad: RawRecord) -> None:
    log = LogIndex()
    for index in range(1, 4):
        log.replay(record(segments.ENTRY, index), location_of(1, index), oldest=True)
    with pytest.raises(ValueError):
        log.replay(bad, location_of(1, 9), oldest=True)


def test_a_group_without_its_outline_is_refused() -> None:
    with pytest.raises(ValueError):
        LogIndex().replay(record(segments.OUTLINE, 1, GroupIndex(1).outline()), location_of(2, 9), oldest=False)


GROUPS = (1, 7, 300)
log_steps = st.lists(
    st.tuples(
        st.sampled_from(["append"] * 6 + ["copy", "buffer", "suffix", "prefix", "prefix", "beyond"]),
        st.sampled_from(GROUPS),
        st.floats(0, 1, exclude_max=True),
    ),
    min_size=1,
    max_size=60,
)


class Plain:
    """What a log is: for each group a first index and a list of (term, location, length)."""

    def __init__(self) -> None:
        self.groups: dict[int, tuple[int, list[tuple[int, int, int]]]] = {}
        self.log = LogIndex()

    def step(self, number: int, what: str, group: int, where: float) -> None:
        """Both sides take the same step, this one through the records that a log would hold."""
        first, entries = self.groups.setdefault(group, (1_000_000 * group, []))
        place = int(where * len(entries))
        location, length = location_of(number // 7 + 1, 1000 * number), 300 + number
        payload = b"x" * length
        if what == "append" or not entries:
            term = 500 + number // 9
            entries.append((term, location, length))
            self.replay(segments.ENTRY, group, term, first + len(entries) - 1, payload, location)
        elif what in ("copy", "buffer"):
            term = entries[place][0]
            location = location if what == "copy" else BUFFERED | number
            entries[place] = (term, location, length)
            self.replay(segments.COPY, group, term, first + place, payload, location)
        elif what == "suffix":
            del entries[place:]
            self.replay(segments.SUFFIX, group, 0, first + place, b"", location)
        else:
            place = len(entries) + 3 if what == "beyond" else place + 1
            del entries[:place]
            self.groups[group] = (first + place, entries)
            self.replay(segments.PREFIX, group, 0, first + place, b"", location)

    def replay(self, type_: int, group: int, term: int, index: int, payload: bytes, location: int) -> None:
        self.log.replay(RawRecord(type_, group, term, index, 0, payload), location, oldest=False)

    def check(self, log: LogIndex) -> None:
        live: dict[int, int] = {}
        for group, (first, entries) in self.groups.items():
            found = log.groups[group]
            assert (found.first, found.next) == (first, first + len(entries))
            for index in range(first - 2, first + len(entries) + 2):
                inside = first <= index < first + len(entries)
                assert log.find(group, index) is (found if inside else None)
                if inside:
                    term, location, length = entries[index - first]
                    assert (found.term(index), found.location(index), found.length(index)) == (term, location, length)
                    if not location & BUFFERED:
                        live[location >> 32] = live.get(location >> 32, 0) + 44 + length
                    for type_ in range(1, 7):
                        entry = RawRecord(type_, group, term, index, 0, b"")
                        assert log.holds(entry, location) == (type_ in (segments.ENTRY, segments.COPY))
                        assert not any(log.holds(entry, location + step) for step in (-1, 1))
                else:
                    assert not log.holds(RawRecord(segments.ENTRY, group, 0, index, 0, b""), location_of(1, 0))
        assert {segment: size for segment, size in log.live.items() if size} == live
        assert log.missing() is None

    def outlines(self) -> list[RawRecord]:
        """As the format has them: pairs of numbers, the next index first, then where each run of a term begins."""
        found = []
        for group, (first, entries) in sorted(self.groups.items()):
            pairs = [(first + len(entries), 0)]
            for place, (term, *_) in enumerate(entries):
                if place == 0 or entries[place - 1][0] != term:
                    pairs.append((first + place, term))
            payload = b"".join(struct.pack("<QQ", *pair) for pair in pairs)
            found.append(RawRecord(segments.OUTLINE, group, 0, first, 0, payload))
        return found


@settings(deadline=None)
@given(log_steps, st.sampled_from([0, 2, 1024]))
def test_a_log_behaves_like_lists(steps: list[tuple[str, int, float]], dropped_max: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_DROPPED_MAX", dropped_max)
        plain = Plain()
        for number, step in enumerate(steps):
            plain.step(number, *step)
            plain.check(plain.log)
            assert plain.log.outlines() == plain.outlines()


@settings(deadline=None)
@given(log_steps, st.sampled_from([0, 2, 1024]))
def test_what_an_outline_leaves_open_is_filled_by_copies(steps: list[tuple[str, int, float]], dropped_max: int) -> None:
    """A log whose older segments went: the outlines say what there is, the copies where."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_DROPPED_MAX", dropped_max)
        plain = Plain()
        for number, step in enumerate(steps):
            plain.step(number, *step)
        log = LogIndex()
        for outline in plain.outlines():
            log.replay(outline, location_of(9, 0), oldest=True)
            log.replay(outline, location_of(9, 0), oldest=True)
            log.replay(outline, location_of(9, 0), oldest=False)
        assert log.live == {}
        missing = [
            (group, first + place)
            for group, (first, entries) in sorted(plain.groups.items())
            for place in range(len(entries))
        ]
        assert all(log.groups[group].location(index) == MISSING for group, index in missing)
        assert all(log.groups[group].length(index) == 0 for group, index in missing)
        while missing:
            assert log.missing() == missing[0]
            group, index = missing.pop(0)
            first, entries = plain.groups[group]
            term, location, length = entries[index - first]
            log.replay(RawRecord(segments.COPY, group, term, index, 0, b"x" * length), location, oldest=False)
            if index % 5 == 0:  # what was met and is dropped is no longer missed
                plain.groups[group] = (index + 1, entries[index + 1 - first :])
                log.replay(RawRecord(segments.PREFIX, group, 0, index + 1, 0, b""), location, oldest=False)
        plain.check(log)
        assert log.outlines() == plain.outlines()


@pytest.mark.parametrize(
    ("pairs", "good"),
    [
        ([(5, 0)], True),
        ([(9, 0), (5, 1)], True),
        ([(9, 0), (5, 1), (7, 2), (8, 1)], True),
        ([(4, 0)], False),
        ([(4, 0), (5, 1)], False),
        ([(5, 0), (5, 1)], False),
        ([(6, 0)], False),
        ([(9, 0), (4, 1)], False),
        ([(9, 0), (6, 1)], False),
        ([(9, 0), (5, 1), (7, 2), (6, 3)], False),
        ([], False),
    ],
)
def test_an_outline_must_make_sense(pairs: list[tuple[int, int]], good: bool) -> None:
    outline = b"".join(struct.pack("<QQ", *pair) for pair in pairs)
    if good:
        assert (
            GroupIndex.from_outline(5, outline).outline() == GroupIndex.from_outline(5, memoryview(outline)).outline()
        )
        assert GroupIndex.from_outline(5, outline).outline() == outline
    for wrong in [outline + b"x", outline + bytes(8), *([] if good else [outline])]:
        with pytest.raises(ValueError, match="not an outline"):
            GroupIndex.from_outline(5, wrong)


def test_what_does_not_follow_is_named() -> None:
    log = LogIndex()
    for index in (257, 258, 259):
        log.replay(record(segments.ENTRY, index), location_of(1, index), oldest=False)
    for index in (256, 259, 261):
        with pytest.raises(ValueError, match=f"entry {index} of group 7 cannot follow entry 259"):
            log.replay(record(segments.ENTRY, index), location_of(1, 9), oldest=False)
    for type_ in (segments.SUFFIX, segments.COPY):
        for index in (256, 260):
            with pytest.raises(ValueError, match=f"there is no entry {index} in group 7"):
                log.replay(record(type_, index), location_of(1, 9), oldest=False)
        with pytest.raises(ValueError, match="there is no entry 1 in group 8"):
            log.replay(RawRecord(type_, 8, 1, 1, 0, b""), location_of(1, 9), oldest=False)
    for type_ in (0, 7, 255):
        with pytest.raises(ValueError, match=f"there is no record type {type_}"):
            log.replay(record(type_, 258), location_of(1, 9), oldest=False)
    outline = log.groups[7].outline()
    others = (record(segments.OUTLINE, 258, outline), record(segments.OUTLINE, 257, outline + bytes(16)))
    for other in others:
        for oldest in (False, True):
            with pytest.raises(ValueError, match="group 7 does not hold what its outline says"):
                log.replay(other, location_of(1, 9), oldest=oldest)
    before = log.outlines()
    log.replay(record(segments.SYNCED, 0), location_of(1, 9), oldest=False)
    log.replay(record(segments.OUTLINE, 257, outline), location_of(1, 9), oldest=False)
    assert log.outlines() == before
    assert log.holds(record(segments.ENTRY, 257), location_of(1, 257))


def test_a_group_may_begin_by_what_it_has_dropped() -> None:
    log = LogIndex()
    log.replay(record(segments.PREFIX, 10), location_of(1, 0), oldest=False)
    assert (log.groups[7].first, log.groups[7].next) == (10, 10)
    log.replay(record(segments.ENTRY, 10), location_of(1, 0), oldest=False)
    assert log.groups[7].next == 11


def test_dropped_places_are_kept_until_there_are_many() -> None:
    """More than 1,024 and more than what is live: then the cost of moving the rest is constant per entry."""
    group = GroupIndex(1)
    for number in range(1, 5001):
        group.append(1, number, 0)
    for index, places in ((1025, 5000), (2501, 5000), (2502, 2499)):
        group.drop_prefix(index)
        assert len(group._locations) == places
    group.drop_prefix(4001)
    assert len(group._locations) == len(group._lengths) == 1000
    group = GroupIndex(1)
    for number in range(1, 1031):
        group.append(1, number, 0)
    for index, places in ((1025, 1030), (1026, 5)):
        group.drop_prefix(index)
        assert len(group._locations) == places

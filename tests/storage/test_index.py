"""The index of a log, against a plain list."""

from __future__ import annotations

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

"""The record format: what is written is read, what is damaged is told from what is torn."""

from __future__ import annotations

from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.core.errors import Corrupt, NotSupported
from gostore.storage import segments
from gostore.storage.segments import HEAD_SIZE_BYTES, RECORD_SIZE_BYTES, Head, RawRecord, Scan

HEAD = Head(number=3, mark=0x9E37_79B9, start=HEAD_SIZE_BYTES)

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
records = st.builds(
    RawRecord,
    type=st.integers(1, 6),
    group=u32,
    term=u64,
    index=u64,
    kind=u16,
    payload=st.binary(max_size=200) | st.sampled_from([b"", HEAD.mark.to_bytes(4, "little") * 20]),
)
batches = st.lists(st.lists(records, min_size=1, max_size=5), max_size=5)


def build(batches: list[list[RawRecord]], head: Head = HEAD) -> tuple[bytes, list[int], list[int]]:
    """A segment in which each batch was synced before the next: its bytes, and where records and batches begin."""
    data, records, begins = bytearray(segments.encode_head(head)), [], []
    for batch in batches:
        begins.append(len(data))
        for record in batch:
            records.append(len(data))
            data += segments.record_header(head.mark, len(data), begins[-1], record) + record.payload
    return bytes(data), records, begins


def scan(data: bytes, *, last: bool = True, head: Head = HEAD) -> tuple[list[RawRecord], Scan]:
    found = Scan("wal/3", head, lambda offset, size: data[offset : offset + size], len(data), last=last)
    return [record._replace(payload=bytes(record.payload)) for _, record in found], found


def flat(batches: list[list[RawRecord]]) -> list[RawRecord]:
    return [record for batch in batches for record in batch]


@settings(deadline=None)
@given(batches, st.booleans())
def test_what_is_written_is_read(batches: list[list[RawRecord]], last: bool) -> None:
    data, offsets, _ = build(batches)
    found, scanned = scan(data, last=last)
    assert found == flat(batches)
    assert (scanned.end, scanned.torn) == (len(data), 0)
    for offset, record in zip(offsets, found, strict=True):
        assert segments.record_at(HEAD, offset, data[offset:]) == record


@settings(deadline=None)
@given(batches, st.data())
def test_a_file_that_ends_early_gives_a_prefix(batches: list[list[RawRecord]], draw: st.DataObject) -> None:
    data, offsets, _ = build(batches)
    size = draw.draw(st.integers(HEAD_SIZE_BYTES, len(data)), label="size")
    ends = [*offsets[1:], len(data)]
    whole = sum(end <= size for end in ends) if offsets else 0
    found, scanned = scan(data[:size])
    assert found == flat(batches)[:whole]
    assert scanned.end + scanned.torn == size
    if scanned.torn:
        with pytest.raises(Corrupt, match="later segment"):
            scan(data[:size], last=False)


@settings(deadline=None)
@given(batches.filter(bool), st.data())
def test_damage_in_an_earlier_batch_is_refused_and_in_the_last_one_cut_off(
    batches: list[list[RawRecord]], draw: st.DataObject
) -> None:
    data, offsets, begins = build(batches)
    place = draw.draw(st.integers(HEAD_SIZE_BYTES, len(data) - 1), label="place")
    damaged = bytearray(data)
    damaged[place] ^= draw.draw(st.integers(1, 255), label="flip")
    at = max(offset for offset in offsets if offset <= place)
    if place < begins[-1]:
        with pytest.raises(Corrupt, match=f"wal/3 is damaged at offset {at}, ") as error:
            scan(bytes(damaged))
        assert error.value.details == {"file": "wal/3", "offset": at}
    else:
        found, scanned = scan(bytes(damaged))
        assert found == flat(batches)[: offsets.index(at)]
        assert scanned.end == at


@settings(deadline=None)
@given(batches.filter(bool), st.binary(max_size=3000))
def test_unsynced_bytes_may_be_anything(batches: list[list[RawRecord]], garbage: bytes) -> None:
    data, *_ = build(batches)
    found, scanned = scan(data + garbage)
    assert found == flat(batches)
    assert scanned.torn == len(garbage)


def test_later_records_behind_a_hole_in_the_unsynced_tail_are_no_evidence() -> None:
    batch = [RawRecord(segments.ENTRY, 1, 1, index, 0, b"x" * 600) for index in range(8)]
    data, offsets, begins = build([batch[:2], batch[2:]])
    hole = bytearray(data)
    hole[offsets[3] : offsets[5]] = bytes(offsets[5] - offsets[3])
    found, scanned = scan(bytes(hole))
    assert found == batch[:3]
    assert scanned.torn == len(data) - offsets[3]
    # The same hole, once something was written that knew the batch to be synced.
    synced = RawRecord(segments.SYNCED, 0, 0, 0, 0, b"")
    hole += segments.record_header(HEAD.mark, len(hole), len(hole), synced)
    with pytest.raises(Corrupt, match=f"offset {offsets[3]}, and the record at {len(data)} shows"):
        scan(bytes(hole))
    assert begins[1] < offsets[3]


def test_evidence_is_found_across_the_blocks_in_which_a_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [RawRecord(segments.ENTRY, 1, 1, index, 0, b"x" * 100) for index in range(10)]
    data, offsets, _ = build([batch[:5], batch[5:6]])
    damaged = bytearray(data)
    damaged[offsets[0]] ^= 1
    for size in range(RECORD_SIZE_BYTES, 4 * RECORD_SIZE_BYTES):
        monkeypatch.setattr(segments, "BLOCK_SIZE_BYTES", size)
        assert scan(data)[0] == batch[:6]
        with pytest.raises(Corrupt, match=f"the record at {offsets[5]} shows"):
            scan(bytes(damaged))


def test_a_record_is_valid_in_its_place_only() -> None:
    """A log that is stored as a value in the log does not pass for evidence."""
    inner, offsets, _ = build([[RawRecord(segments.ENTRY, 1, 1, 1, 0, b"a")], [RawRecord(2, 1, 1, 2, 0, b"b")]])
    assert segments.record_at(HEAD, offsets[1], inner[offsets[1] :]) is not None
    assert segments.record_at(HEAD, offsets[1] + 1, inner[offsets[1] :]) is None
    outer, places, _ = build([[RawRecord(segments.ENTRY, 1, 1, 1, 0, inner)]])
    damaged = bytearray(outer)
    damaged[places[0]] ^= 1
    assert scan(bytes(damaged))[1].torn == len(outer) - places[0]


def test_damage_before_the_start_is_refused() -> None:
    head = Head(3, HEAD.mark, HEAD_SIZE_BYTES + RECORD_SIZE_BYTES)
    data, *_ = build([[RawRecord(segments.OUTLINE, 1, 0, 1, 0, b"")]], head)
    assert scan(data, head=head)[1].torn == 0
    with pytest.raises(Corrupt, match="before the segment was used"):
        scan(data[:-1], head=head)


@settings(deadline=None)
@given(u64, u32, u32)
def test_a_head_is_read_and_any_damage_to_it_refused(number: int, mark: int, start: int) -> None:
    data = segments.encode_head(Head(number, mark, start))
    assert len(data) == HEAD_SIZE_BYTES
    assert segments.decode_head("f", data + b"more") == Head(number, mark, start)
    for place in range(len(data)):
        with pytest.raises((Corrupt, NotSupported)):
            segments.decode_head("f", data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(Corrupt):
            segments.decode_head("f", data[:place])


@pytest.mark.parametrize(("version", "age"), [(0, "an older"), (2, "a newer")])
def test_another_format_version_is_refused_by_name(version: int, age: str) -> None:
    data = bytearray(segments.encode_head(HEAD))
    data[4:6] = version.to_bytes(2, "little")
    data[-4:] = crc32(data[:-4]).to_bytes(4, "little")
    with pytest.raises(NotSupported, match=f"wal/3: the log has format version {version}, {age} one") as error:
        segments.decode_head("wal/3", bytes(data))
    assert error.value.details == {"file": "wal/3", "version": version}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3))
def test_a_record_larger_than_a_block_is_read(blocks: int) -> None:
    batch = [
        RawRecord(segments.ENTRY, 1, 1, i, 0, bytes(segments.BLOCK_SIZE_BYTES * blocks - 40 + i)) for i in range(3)
    ]
    data, *_ = build([batch])
    assert scan(data)[0] == batch


# Segment 3 with one entry and the note that it was synced, as version 1 of the format has it.
GOLDEN = bytes.fromhex(
    "4753574c01000000b979379e03000000000000002c0000006a45efdb"
    "b979379e7018097d3458771d0500000000000000010000000200000000000000030000000000000004000100"
    "76616c7565"
    "b979379ef968b9c200000000000000004d000000000000000000000000000000000000000000000000000600"
)


def test_segments_of_the_first_version_are_read_and_written() -> None:
    """A node is upgraded with its data: whoever changes the format must change its version."""
    head = Head(3, HEAD.mark, 44)
    entry, note = RawRecord(1, 1, 2, 3, 4, b"value"), RawRecord(6, 0, 0, 0, 0, b"")
    assert segments.decode_head("wal/3", GOLDEN) == head
    assert scan(GOLDEN, head=head)[0] == [entry, note]
    data = segments.encode_head(head)
    data += segments.record_header(head.mark, len(data), 0, entry) + b"value"
    data += segments.record_header(head.mark, len(data), len(data), note)
    assert data == GOLDEN
    types = (segments.ENTRY, segments.COPY, segments.SUFFIX, segments.PREFIX, segments.OUTLINE, segments.SYNCED)
    assert types == (1, 2, 3, 4, 5, 6)
    assert (HEAD_SIZE_BYTES, RECORD_SIZE_BYTES, segments.FORMAT_VERSION) == (28, 44, 1)


def flips(data: bytes) -> list[tuple[int, bytes]]:
    """Every single bit of ``data`` flipped: where, and what comes of it."""
    return [
        (place, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        for place in range(len(data))
        for bit in range(8)
    ]


def test_every_flipped_bit_of_a_head_is_told_by_its_kind() -> None:
    """Magic, then version, then checksum: a log of another release is not called damaged."""
    data = segments.encode_head(HEAD)
    for place, damaged in flips(data):
        if 4 <= place < 6:
            with pytest.raises(NotSupported):
                segments.decode_head("wal/3", damaged)
            continue
        words = "does not begin like a segment" if place < 4 else "does not match its checksum"
        with pytest.raises(Corrupt, match=f"wal/3 is damaged at offset 0, .*{words}"):
            segments.decode_head("wal/3", damaged)


@pytest.mark.parametrize("payload", [b"", b"value"])
def test_every_flipped_bit_and_every_cut_of_a_record_is_noticed(payload: bytes) -> None:
    record = RawRecord(segments.ENTRY, 1, 2, 3, 4, payload)
    data = segments.record_header(HEAD.mark, 100, 50, record) + payload
    assert segments.record_at(HEAD, 100, data) == record
    assert segments.record_at(HEAD, 100, data + b"behind") == record
    assert [segments.record_at(HEAD, 100, damaged) for _, damaged in flips(data)] == [None] * (8 * len(data))
    assert [segments.record_at(HEAD, 100, data[:size]) for size in range(len(data))] == [None] * len(data)


@pytest.mark.parametrize("mark", [0, HEAD.mark - 1, HEAD.mark + 1, (1 << 32) - 1])
def test_a_record_of_another_segment_is_none_of_this(mark: int) -> None:
    """The disk may give back what once stood there: valid, and of a file that was removed."""
    other = Head(HEAD.number, mark, HEAD.start)
    batch = [RawRecord(segments.ENTRY, 1, 1, 1, 0, b"a")]
    data, *_ = build([batch])
    theirs, offsets, _ = build([batch], other)
    assert segments.record_at(other, offsets[0], theirs[offsets[0] :]) == batch[0]
    assert segments.record_at(HEAD, offsets[0], theirs[offsets[0] :]) is None
    found, scanned = scan(data[:HEAD_SIZE_BYTES] + theirs[HEAD_SIZE_BYTES:])
    assert found == []
    assert scanned.torn == len(theirs) - HEAD_SIZE_BYTES


def test_marks_and_places_are_added_modulo_their_size() -> None:
    """Also where the sum is just what fits, and just what does not."""
    for mark in ((1 << 32) - 1 - HEAD_SIZE_BYTES, (1 << 32) - HEAD_SIZE_BYTES, (1 << 32) - 1):
        head = Head(1, mark, HEAD_SIZE_BYTES)
        batch = [RawRecord(segments.ENTRY, 1, 1, index, 0, b"x") for index in range(3)]
        data, offsets, _ = build([batch], head)
        assert scan(data, head=head)[0] == batch
        expected = crc32(data[offsets[0] + 8 : offsets[0] + RECORD_SIZE_BYTES], (mark + offsets[0]) % (1 << 32))
        assert data[offsets[0] + 4 : offsets[0] + 8] == expected.to_bytes(4, "little")
        assert segments.record_at(head, offsets[1], data[offsets[1] :]) == batch[1]


def test_every_end_and_every_flipped_bit_of_a_small_segment() -> None:
    """What the properties draw, for one segment as a whole: three batches, of which two are surely synced."""
    batches = [[RawRecord(segments.ENTRY, 1, 1, 1, 0, b"one")], [RawRecord(segments.SYNCED, 0, 0, 0, 0, b"")]]
    batches.append([RawRecord(segments.ENTRY, 1, 1, 2, 0, b"two"), RawRecord(segments.ENTRY, 1, 1, 3, 0, b"")])
    data, offsets, begins = build(batches)
    for size in range(HEAD_SIZE_BYTES, len(data) + 1):
        whole = sum(end <= size for end in [*offsets[1:], len(data)])
        found, scanned = scan(data[:size])
        assert found == flat(batches)[:whole]
        assert scanned.end == [*offsets, len(data)][whole]
        assert scanned.torn == size - scanned.end
    for place, damaged in flips(data):
        if place < HEAD_SIZE_BYTES:
            continue
        at = max(offset for offset in offsets if offset <= place)
        if place < begins[-1]:
            with pytest.raises(Corrupt) as error:
                scan(damaged)
            assert error.value.details["offset"] == at
        else:
            found, scanned = scan(damaged)
            assert found == flat(batches)[: offsets.index(at)]
            assert (scanned.end, scanned.torn) == (at, len(data) - at)


def test_no_more_is_read_than_the_file_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that a broken writer made up costs no memory, whatever its checksum says."""
    monkeypatch.setattr(segments, "BLOCK_SIZE_BYTES", 100)
    data, *_ = build([[RawRecord(segments.ENTRY, 1, 1, 1, 0, b"x" * 300)]])
    body = segments._BODY.pack(0, 1 << 30, 0, 1, 1, 2, 0, segments.ENTRY)
    front = segments._FRONT.pack(HEAD.mark, crc32(body, (HEAD.mark + len(data)) % (1 << 32)))
    whole = data + front + body + b"y" * 50
    asked: list[tuple[int, int]] = []

    def read(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return whole[offset : offset + size]

    scanned = Scan("wal/3", HEAD, read, len(whole), last=True)
    assert len(list(scanned)) == 1
    assert (scanned.end, scanned.torn) == (len(data), RECORD_SIZE_BYTES + 50)
    assert max(size for _, size in asked) == 300 + RECORD_SIZE_BYTES


def test_a_file_is_read_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte about once: records are taken from the block that is there as long as they lie in it."""
    monkeypatch.setattr(segments, "BLOCK_SIZE_BYTES", 1000)
    data, *_ = build([[RawRecord(segments.ENTRY, 1, 1, index, 0, b"x" * 56) for index in range(1, 101)]])
    asked: list[int] = []

    def read(offset: int, size: int) -> bytes:
        asked.append(offset)
        return data[offset : offset + size]

    assert len(list(Scan("wal/3", HEAD, read, len(data), last=True))) == 100
    assert asked == list(range(HEAD_SIZE_BYTES, len(data), 1000))

"""Packets and frames: what was sealed opens, anything else is refused with a reason and nothing worse."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.comm import wire
from gostore.comm.wire import (
    CAST,
    REASONS,
    REFUSED,
    REPLAY_WINDOW_PACKETS,
    STREAM_BIT,
    Codec,
    Frame,
    Identity,
    Origin,
    Packet,
    ProtocolError,
    ReplayWindow,
    StreamDecoder,
    length_prefix,
    parse_frames,
)
from gostore.core.address import Address

CODEC = Codec("test", "0123456789abcdef")
SENDER = Identity("n1", 7, Address("127.0.0.1", 4000, 4001))
FIELDS = ("kind", "id", "route", "body", "data", "flags", "hops", "acknowledged", "epoch", "stamp", "cause", "origin")

u8, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 32, 64))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    return Frame(
        draw(st.integers(1, REFUSED)),
        draw(u64),
        draw(st.binary(max_size=255)),
        draw(st.binary(max_size=300)),
        draw(st.binary(max_size=300)),
        flags=draw(u8),
        hops=draw(u8),
        acknowledged=draw(u64),
        epoch=draw(u32),
        stamp=draw(u64),
        cause=draw(u64),
        remaining_ms=draw(u32),
        origin=draw(st.binary(max_size=100)),
    )


def seal(some: list[Frame], codec: Codec = CODEC, receiver: bytes = b"n2") -> bytes:
    parts = [part for frame in some for part in (frame.encode(), frame.data)]
    return b"".join(codec.seal(SENDER, receiver, 9, 3, 42, parts))


def fields(frame: Frame) -> list[object]:
    return [getattr(frame, name) for name in (*FIELDS, "remaining_ms")]


def refused(packet: bytes, codec: Codec = CODEC) -> str:
    with pytest.raises(ProtocolError) as caught:
        codec.open(packet)
    assert caught.value.reason in REASONS
    return caught.value.reason


@given(st.lists(frames(), max_size=4), st.binary(max_size=63))
def test_what_is_sealed_opens(some: list[Frame], receiver: bytes) -> None:
    packet: Packet = CODEC.open(seal(some, receiver=receiver))
    assert [fields(frame) for frame in packet.frames] == [fields(frame) for frame in some]
    assert (packet.receiver, packet.incarnation, packet.session, packet.counter) == (receiver, 9, 3, 42)
    assert (packet.sender.name, packet.sender.incarnation, packet.sender.address) == ("n1", 7, SENDER.address)


@given(frames())
def test_a_frame_knows_its_size(frame: Frame) -> None:
    assert frame.size_bytes == len(frame.encode()) + len(frame.data)


@given(frames(), st.data())
def test_every_change_of_a_packet_is_refused(frame: Frame, data: st.DataObject) -> None:
    packet = bytearray(seal([frame]))
    at = data.draw(st.integers(0, len(packet) - 1))
    packet[at] ^= data.draw(st.integers(1, 255))
    refused(bytes(packet))


@given(frames(), st.data())
def test_every_cut_of_a_packet_is_refused(frame: Frame, data: st.DataObject) -> None:
    packet = seal([frame])
    refused(packet[: data.draw(st.integers(0, len(packet) - 1))])
    refused(packet + data.draw(st.binary(min_size=1, max_size=20)))


@given(st.binary(max_size=2000))
def test_noise_is_refused(noise: bytes) -> None:
    refused(noise)


@given(st.binary(max_size=400))
def test_noise_from_one_who_knows_the_secret_is_refused_or_parsed(noise: bytes) -> None:
    packet = b"".join(CODEC.seal(SENDER, b"n2", 9, 3, 42, [noise]))
    with suppress(ProtocolError):
        CODEC.open(packet)


@given(st.binary(max_size=400))
def test_unpacking_noise_raises_nothing_else(noise: bytes) -> None:
    for parse in (wire.unpack, Origin.parse, Identity.parse):
        with suppress(ProtocolError):
            parse(noise)


def test_reasons() -> None:
    packet = seal([Frame(CAST)])
    assert refused(b"") == "truncated"
    assert refused(b"\x02" + packet[1:]) == "version"
    assert refused(packet, Codec("other", "0123456789abcdef")) == "foreign"
    assert refused(packet, Codec("test", "another secret....")) == "tag"
    assert refused(packet[:-1]) == "tag"


def test_a_frame_may_not_claim_more_than_there_is() -> None:
    whole = Frame(CAST, 1, b"a.b", b"body", b"data").encode() + b"data"
    for size in range(1, len(whole)):
        with pytest.raises(ProtocolError):
            parse_frames(whole, 0, size)
    assert len(parse_frames(whole, 0, len(whole))) == 1
    with pytest.raises(ProtocolError):
        parse_frames(bytes([REFUSED + 1]) + whole[1:], 0, len(whole))


@given(values)
def test_values_travel(value: object) -> None:
    assert wire.unpack(wire.pack(value)) == value


def test_a_value_that_cannot_be_packed_leaves_no_rest_behind() -> None:
    with pytest.raises(TypeError):
        wire.pack([1, 2, object()])
    assert wire.unpack(wire.pack([3])) == [3]


@given(st.text(min_size=1, max_size=15), u64, u64)
def test_origin(name: str, incarnation: int, request_id: int) -> None:
    found = Origin.parse(Origin(name, incarnation, SENDER.address, request_id).encode())
    assert (found.name, found.incarnation, found.address, found.id) == (name, incarnation, SENDER.address, request_id)


def test_identity_bounds() -> None:
    with pytest.raises(ValueError):
        Identity("", 1, SENDER.address)
    with pytest.raises(ValueError):
        Identity("n" * 64, 1, SENDER.address)


@given(st.lists(st.binary(max_size=200), max_size=8), st.data())
def test_a_stream_gives_the_same_packets_however_it_is_split(packets: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(length_prefix(len(packet)) + packet for packet in packets)
    decoder, found = StreamDecoder(200), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        decoder.feed(stream[:size])
        stream = stream[size:]
        while (packet := decoder.next()) is not None:
            found.append(packet)
    assert found == packets


def test_a_stream_refuses_an_oversized_packet_before_it_comes() -> None:
    decoder = StreamDecoder(100)
    decoder.feed(length_prefix(101))
    for _ in range(2):
        with pytest.raises(ProtocolError, match="oversized"):
            decoder.next()


@given(st.lists(st.integers(0, 3 * REPLAY_WINDOW_PACKETS), max_size=300))
def test_the_replay_window_accepts_once_and_nothing_old(counters: list[int]) -> None:
    window, seen, newest = ReplayWindow(), set(), -1
    for counter in counters:
        wanted = counter not in seen and counter > newest - REPLAY_WINDOW_PACKETS
        assert window.accept(counter) == wanted
        seen.add(counter)
        newest = max(newest, counter)


def test_the_replay_window_takes_large_leaps() -> None:
    window = ReplayWindow()
    assert window.accept(5)
    assert window.accept(STREAM_BIT)
    assert not window.accept(5)
    assert not window.accept(STREAM_BIT)
    assert window.accept(STREAM_BIT - REPLAY_WINDOW_PACKETS + 1)

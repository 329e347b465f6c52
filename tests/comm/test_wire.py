"""Packets and frames: what was sealed opens, anything else is refused with a reason and nothing worse."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.comm import wire
from gostore.comm.wire import (
    CAST,
    KIND_NAMES,
    POKE,
    REASONS,
    REFUSED,
    REPLAY_WINDOW_PACKETS,
    REQUEST,
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


# A request from n1 to n2 that n3 asked first, as version 1 of the format has it.
GOLDEN = bytes.fromhex(
    "0196ad3bb4a2d666d3000000000000000900000003800000000000002a0218"  # version, cluster, receiver, session, counter
    "6e3200000000000000070fa00fa1026e313132372e302e302e31"  # n2; n1 with its incarnation, ports and host
    "03010206000b0000000500000000000001020000000000000101000001000000000000000000000000"
    "09000005dc0000000300000003"
    "64622e67657494a26e330493a16801024d91a16b726177"  # route, origin, body, data
    "75f72f6aef498fb095b37b1a18d58bc8"  # tag
)


def test_packets_of_the_first_version_are_read_and_written() -> None:
    """A cluster is upgraded node by node: whoever changes the format must change its version."""
    origin = Origin("n3", 4, Address("h", 1, 2), 77)
    frame = Frame(
        REQUEST,
        258,
        b"db.get",
        wire.pack(["k"]),
        b"raw",
        flags=POKE,
        hops=2,
        acknowledged=257,
        epoch=5,
        stamp=1 << 40,
        cause=9,
        remaining_ms=1500,
        origin=origin.encode(),
    )
    parts = CODEC.seal(SENDER, b"n2", 9, 3, STREAM_BIT | 42, [frame.encode(), frame.data])
    assert b"".join(parts) == GOLDEN
    packet = CODEC.open(GOLDEN)
    assert [fields(found) for found in packet.frames] == [fields(frame)]
    assert packet.counter == (1 << 63) + 42
    assert frame.parent is None
    assert length_prefix(258) == b"\0\0\1\2"


def test_kinds_have_the_numbers_that_travel() -> None:
    kinds = ("hello", "hello_ack", "request", "response", "error", "cast", "working", "unseen", "refused")
    assert tuple(getattr(wire, kind.upper()) for kind in kinds) == tuple(range(1, 10))
    assert list(KIND_NAMES) == ["", *kinds]


def test_only_known_kinds_are_frames() -> None:
    rest = Frame(CAST, 1, b"a.b").encode()[1:]
    for kind in range(256):
        frame = bytes([kind]) + rest
        if 1 <= kind <= 9:
            assert parse_frames(frame, 0, len(frame))[0].kind == kind
        else:
            with pytest.raises(ProtocolError, match="malformed"):
                parse_frames(frame, 0, len(frame))


def test_frames_are_read_between_their_bounds_only() -> None:
    one, two = Frame(CAST, 1, b"a.b", data=b"d").encode() + b"d", Frame(CAST, 2).encode()
    buffer = b"before" + one + two + b"behind"
    found = parse_frames(buffer, 6, len(buffer) - 6)
    assert [(frame.id, bytes(frame.data)) for frame in found] == [(1, b"d"), (2, b"")]
    assert parse_frames(buffer, 6, 6) == []
    for end in range(7, len(buffer)):
        if end not in (6 + len(one), 6 + len(one) + len(two)):
            with pytest.raises(ProtocolError, match="malformed"):
                parse_frames(buffer, 6, end)


def refusal(parse: object, *arguments: object) -> str:
    with pytest.raises(ProtocolError) as caught:
        parse(*arguments)  # type: ignore[operator]
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


def test_the_shortest_packet_there_is() -> None:
    """One byte less can be no packet, whatever is in it, and nothing of it is looked at."""
    sender = Identity("n", 1, Address("", 0, 0))
    packet = b"".join(CODEC.seal(sender, b"", 0, 0, 0, []))
    assert CODEC.open(packet).frames == []
    assert refusal(CODEC.open, packet[:-1]) == "truncated"
    assert refusal(CODEC.open, b"\xff" + packet[1:-1]) == "truncated"
    assert refusal(CODEC.open, b"\xff" + packet[1:]) == "version"
    assert refusal(CODEC.open, b"\x00" + packet[1:]) == "version"


@pytest.mark.parametrize("sizes", [(255, 24), (0, 255), (200, 200)])
def test_names_that_reach_behind_the_frames_are_malformed(sizes: tuple[int, int]) -> None:
    """Only one who knows the secret can send this."""
    header = wire._HEADER.pack(1, CODEC._cluster_id, 9, 3, 42, *sizes)
    body = header + b"n2" + SENDER.encoded
    tag = CODEC._keyed.copy()
    tag.update(body)
    assert refusal(CODEC.open, body + tag.digest()) == "malformed"


def test_the_tag_covers_every_part() -> None:
    parts = [b"", Frame(CAST, data=b"x").encode(), b"x"]
    packet = CODEC.seal(SENDER, b"n2", 9, 3, 42, parts)
    assert packet[1:-1] == parts
    assert len(packet[-1]) == 16
    changed = b"".join([*packet[:-2], b"y", packet[-1]])
    assert refusal(CODEC.open, changed) == "tag"


def test_identities_within_their_bounds() -> None:
    for name, host in (("n", ""), ("n" * 63, "h"), ("ä" * 31, "h"), ("n" * 63, "h" * (255 - 13 - 63))):
        identity = Identity(name, (1 << 64) - 1, Address(host, 65_535, 0))
        found = Identity.parse(identity.encoded)
        assert (found.name, found.incarnation, found.address) == (name, (1 << 64) - 1, Address(host, 65_535, 0))
        assert found.encoded == identity.encoded
    for name, host in (("", "h"), ("n" * 64, "h"), ("ä" * 32, "h"), ("n" * 63, "h" * (255 - 13 - 62))):
        with pytest.raises(ValueError, match="empty or too long"):
            Identity(name, 1, Address(host, 1, 1))


def test_what_is_no_identity_is_malformed() -> None:
    good = SENDER.encoded
    assert Identity.parse(good).name == "n1"
    for size in range(len(good)):
        if size < 13 + 2:
            assert refusal(Identity.parse, good[:size]) == "malformed"
    for length in (0, 64, 255):
        assert refusal(Identity.parse, good[:12] + bytes([length]) + good[13:] + b"x" * 300) == "malformed"
    assert refusal(Identity.parse, good[:13] + b"\xff\xff" + good[15:]) == "malformed"


@pytest.mark.parametrize(
    "change",
    [
        {0: ""},
        {0: "n" * 64},
        {0: 1},
        {1: -1},
        {1: 1 << 63, 3: -1},
        {1: "1"},
        {2: []},
        {2: ["h", 1]},
        {2: ["h", 1, 1 << 40]},
        {3: -1},
        {3: None},
    ],
)
def test_what_is_no_origin_is_malformed(change: dict[int, object]) -> None:
    values: list[object] = ["n3", 4, ["h", 1, 2], 77]
    assert Origin.parse(wire.pack(values)).name == "n3"
    assert refusal(Origin.parse, wire.pack([change.get(at, value) for at, value in enumerate(values)])) == "malformed"
    assert refusal(Origin.parse, wire.pack(values[:-1])) == "malformed"
    assert refusal(Origin.parse, wire.pack([*values, 1])) == "malformed"


def test_origins_at_their_bounds() -> None:
    for name, number in (("n", 0), ("n" * 63, (1 << 64) - 1)):
        found = Origin.parse(Origin(name, number, SENDER.address, number).encode())
        assert (found.name, found.incarnation, found.id) == (name, number, number)


@pytest.mark.parametrize("noise", [b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\x91" * 5000, b"\xa1\xff"])
def test_what_is_no_value_is_malformed(noise: bytes) -> None:
    assert refusal(wire.unpack, noise) == "malformed"


def test_values_with_keys_of_any_type_are_read() -> None:
    assert wire.unpack(wire.pack({1: 2})) == {1: 2}


def test_identities_are_parsed_once_and_their_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "IDENTITIES_CACHED_MAX", 4)
    codec = Codec("test", "0123456789abcdef")

    def opened(incarnation: int) -> Identity:
        sender = Identity("n1", incarnation, SENDER.address)
        return codec.open(b"".join(codec.seal(sender, b"n2", 9, 3, 42, []))).sender

    first = [opened(incarnation) for incarnation in range(4)]
    assert [opened(incarnation) for incarnation in range(4)] == first, "the same objects"
    assert all(one is other for one, other in zip(first, map(opened, range(4)), strict=True))
    assert opened(4).incarnation == 4
    assert len(codec._identities) == 1


def test_a_packet_of_just_the_limit_passes_and_an_empty_one_too() -> None:
    decoder = StreamDecoder(100)
    decoder.feed(length_prefix(100) + b"x" * 99)
    assert decoder.next() is None
    decoder.feed(b"x" + length_prefix(0) + b"\0\0\0")
    assert decoder.next() == b"x" * 100
    assert decoder.next() == b""
    assert decoder.next() is None, "three bytes of a length are no length"
    decoder.limit = 1000
    decoder.feed(b"\xc8" + b"y" * 200)
    assert decoder.next() == b"y" * 200


def test_a_stream_that_failed_keeps_nothing_and_stays_failed() -> None:
    decoder = StreamDecoder(100)
    decoder.feed(length_prefix(101) + b"x" * 101)
    assert refusal(decoder.next) == "oversized"
    assert len(decoder._buffer) == 0
    decoder.feed(length_prefix(1) + b"x")
    assert refusal(decoder.next) == "oversized"


@given(st.integers(0, STREAM_BIT), st.integers(1, 3 * REPLAY_WINDOW_PACKETS))
def test_the_map_of_the_replay_window_is_as_large_as_the_window(first: int, leap: int) -> None:
    window = ReplayWindow()
    for counter in (0, first, first + leap):
        window.accept(counter)
    assert window._map.bit_length() <= 1024
    newest = first + leap
    assert [window.accept(newest - back) for back in (0, leap)] == [False, False], "seen, or too old to tell"
    if newest > 2000 and leap != 1023 and first != newest - 1023:
        assert window.accept(newest - 1023)
    assert not window.accept(newest - 1024)

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.consensus import CHUNK_SIZE_BYTES_MAX, COMMAND, CONFIGURATION, NOOP, Configuration, Entry, Point
from gostore.consensus.messages import (
    MESSAGES,
    NUMBER_MAX,
    Append,
    AppendReject,
    AppendReply,
    Chunk,
    ChunkReply,
    Heartbeat,
    HeartbeatReply,
    Message,
    ReadReply,
    ReadRequest,
    Stale,
    TimeoutNow,
    Vote,
    VoteReply,
    message_from_wire,
)
from gostore.consensus.tunables import APPEND_ENTRIES_MAX

number = st.integers(0, NUMBER_MAX)
term = st.integers(1, NUMBER_MAX)
point = st.builds(Point, number, number)
names = st.lists(st.sampled_from("abcdef"), unique=True, min_size=1, max_size=5).map(tuple)
configuration = st.builds(Configuration, names, st.just(()), st.just(()) | names)


@st.composite
def appends(draw: st.DrawFn) -> Append:
    terms = sorted(draw(st.lists(st.integers(1, 20), min_size=2, max_size=6)))
    previous = Point(draw(st.integers(0, 100)), terms[0])
    entries = []
    for index, own in enumerate(terms[1:-1], previous.index + 1):
        kind = draw(st.sampled_from((COMMAND, NOOP, CONFIGURATION)))
        payload = draw(configuration).pack() if kind == CONFIGURATION else draw(st.binary(max_size=10))
        entries.append(Entry(own, index, kind, payload))
    return Append(terms[-1], previous, tuple(entries), draw(number))


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    own, done = draw(term), draw(st.booleans())
    at = Point(draw(term), draw(st.integers(1, own)))
    data = b"" if done else draw(st.binary(max_size=20))
    return Chunk(own, draw(number), at, draw(configuration), draw(number), data, done)


messages = st.one_of(
    st.builds(Vote, term, point, st.booleans(), st.booleans()),
    st.builds(VoteReply, term, st.booleans(), st.booleans()),
    appends(),
    st.builds(AppendReply, term, number),
    st.builds(AppendReject, term, number, point),
    st.builds(Heartbeat, term, number, number, st.booleans()),
    st.builds(HeartbeatReply, term, number, st.booleans()),
    chunks(),
    st.builds(ChunkReply, term, number, number),
    st.builds(TimeoutNow, term),
    st.builds(ReadRequest, term, number),
    st.builds(ReadReply, term, number, st.none() | number),
    st.builds(Stale, term),
)


@given(messages)
def test_the_wire_gives_back_what_was_sent(message: Message) -> None:
    assert message_from_wire(msgpack.unpackb(msgpack.packb(message.to_wire()))) == message


def test_every_message_has_a_tag_of_its_own() -> None:
    assert len({kind.TAG for kind in MESSAGES}) == len(MESSAGES)


junk: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 64) | st.binary(max_size=3) | st.text(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@given(messages, st.data())
def test_a_message_with_one_field_replaced_is_read_or_refused(message: Message, data: st.DataObject) -> None:
    """Whatever a peer sends, the only error is ``ValueError``; and what is read is a message in itself."""
    wire = message.to_wire()
    wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(junk)
    try:
        read = message_from_wire(wire)
    except ValueError:
        return
    assert message_from_wire(read.to_wire()) == read
    assert read.term > 0


@given(junk)
def test_junk_is_refused(wire: Any) -> None:
    with pytest.raises(ValueError):
        message_from_wire(wire if not isinstance(wire, list) else ["", *wire])


ENTRY = [1, COMMAND, b""]
MEMBERS = [["a"], [], []]


@pytest.mark.parametrize(
    "wire",
    [
        [TimeoutNow.TAG, 0],
        [TimeoutNow.TAG, -1],
        [TimeoutNow.TAG, True],
        [TimeoutNow.TAG, 1, 1],
        [TimeoutNow.TAG, NUMBER_MAX + 1],
        [99, 1],
        [Vote.TAG, 1, [0], False, False],
        [Vote.TAG, 1, [0, 0], 0, False],
        [Append.TAG, 2, [0, 0], [[2, COMMAND, b""], ENTRY], 0],  # terms fall
        [Append.TAG, 1, [0, 0], [[2, COMMAND, b""]], 0],  # above the leader's own
        [Append.TAG, 1, [5, 2], [], 0],
        [Append.TAG, 1, [0, 0], [[0, COMMAND, b""]], 0],
        [Append.TAG, 1, [0, 0], [[1, COMMAND, "text"]], 0],
        [Append.TAG, 1, [0, 0], [[1, CONFIGURATION, b""]], 0],
        [Append.TAG, 1, [0, 0], [[1, CONFIGURATION, Configuration().pack()]], 0],
        [Append.TAG, 1, [0, 0], [ENTRY] * (APPEND_ENTRIES_MAX + 1), 0],
        [Append.TAG, 1, [0, 0], b"entries", 0],
        [Chunk.TAG, 1, 0, [0, 0], MEMBERS, 0, b"", False],  # of nothing
        [Chunk.TAG, 1, 0, [5, 2], MEMBERS, 0, b"", False],  # of a term to come
        [Chunk.TAG, 2, 0, [5, 1], [[], [], []], 0, b"", False],
        [Chunk.TAG, 2, 0, [5, 1], MEMBERS, 0, b"x", True],
        [Chunk.TAG, 2, 0, [5, 1], MEMBERS, 0, bytes(CHUNK_SIZE_BYTES_MAX + 1), False],
        [ReadReply.TAG, 1, 1, False],
    ],
)
def test_what_no_working_replica_sends_is_refused(wire: Any) -> None:
    with pytest.raises(ValueError):
        message_from_wire(wire)

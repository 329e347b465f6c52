from __future__ import annotations

import hashlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import BadRequest, Corrupt
from gostore.services.fs.header import Chunk, Content, Header, check_type


def chunked(sizes: list[int]) -> Content:
    data = [bytes([number % 256]) * size for number, size in enumerate(sizes)]
    chunks = tuple(Chunk(hashlib.sha256(piece).hexdigest(), len(piece)) for piece in data)
    return Content(sum(sizes), hashlib.sha256(b"".join(data)).hexdigest(), None, chunks)


CONTENTS = st.one_of(
    st.binary(max_size=50).map(lambda data: Content(len(data), hashlib.sha256(data).hexdigest(), data)),
    st.lists(st.integers(1, 40), max_size=6).map(chunked),
)


@given(CONTENTS, st.integers(1, 1 << 40), st.integers(0, (1 << 63) - 1))
def test_a_file_survives_db(content: Content, version: int, mtime: int) -> None:
    header = Header("/a/b", mtime, "text/plain", version, "w1", content)
    value = msgpack.unpackb(msgpack.packb(header.to_value()))
    assert Header.from_value("/a/b", value) == header


def test_a_directory_survives_db() -> None:
    header = Header("/a", 5, directory_id="d1")
    assert Header.from_value("/a", msgpack.unpackb(msgpack.packb(header.to_value()))) == header
    assert header.is_directory
    assert header.to_wire()["type"] == "inode/directory"


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_covering_names_exactly_the_bytes_asked_for(sizes: list[int], offset: int, size: int) -> None:
    content = chunked(sizes)
    whole = [(number, position) for number, length in enumerate(sizes) for position in range(length)]
    keys = [chunk.key for chunk in content.chunks]
    got = [
        (keys.index(chunk.key), position)
        for chunk, low, high in content.covering(offset, size)
        for position in range(low, high)
    ]
    assert got == whole[offset : offset + size]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "link"},
        {"size": -1},
        {"size": 4},
        {"checksum": "text"},
        {"version": None},
        {"data": None, "chunks": [[b"short", 3]]},
        {"data": None, "chunks": [[b"x" * 32, 0]]},
        {"data": None, "chunks": 7},
    ],
)
def test_what_is_no_header_is_refused(change: dict[str, object]) -> None:
    content = Content(3, hashlib.sha256(b"abc").hexdigest(), b"abc")
    value = Header("/f", 1, "text/plain", 1, "w", content).to_value() | change
    with pytest.raises(Corrupt, match="/f"):
        Header.from_value("/f", value)


@pytest.mark.parametrize("text", ["text/plain", "text/html; charset=utf-8", 'a/b;c="d e"', "application/vnd.x+json"])
def test_mime_types(text: str) -> None:
    assert check_type(text) == text


@pytest.mark.parametrize("text", ["text", "a/b\r\nSet-Cookie: x=1", "a/b; c", "ä/b", "a/" + "b" * 300])
def test_what_is_no_mime_type(text: str) -> None:
    with pytest.raises(BadRequest, match="MIME"):
        check_type(text)


def test_no_type_is_bytes() -> None:
    assert check_type("") == "application/octet-stream"

"""A snapshot as it travels and as it lies in the log: pieces of any size in fragments of a bounded one. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from gostore.core.errors import Corrupt

FRAGMENT_SIZE_BYTES_MAX: Final = 256 * 1024
"""Of one fragment, below ``CHUNK_SIZE_BYTES_MAX``. Larger: fewer round trips; smaller: shorter turns."""

_LENGTH: Final = struct.Struct("<I")


def fragments(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces, each behind its length, cut where a fragment is full."""
    buffer = bytearray()
    for piece in pieces:
        buffer += _LENGTH.pack(len(piece))
        buffer += piece
        while len(buffer) >= FRAGMENT_SIZE_BYTES_MAX:
            yield bytes(buffer[:FRAGMENT_SIZE_BYTES_MAX])
            del buffer[:FRAGMENT_SIZE_BYTES_MAX]
    if buffer:
        yield bytes(buffer)


def pieces_of(found: Iterable[bytes]) -> list[bytes]:
    """What :func:`fragments` was given. Raises ``Corrupt`` when it does not come out even."""
    stream = memoryview(b"".join(found))
    pieces, place = [], 0
    while place < len(stream):
        end = place + _LENGTH.size
        size = _LENGTH.unpack_from(stream, place)[0] if end <= len(stream) else len(stream)
        if end + size > len(stream):
            raise Corrupt(f"a snapshot of {len(stream)} bytes ends within its piece at {place}")
        pieces.append(bytes(stream[end : end + size]))
        place = end + size
    return pieces

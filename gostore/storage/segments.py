"""The record format of the write-ahead log, and how damage is told from a torn tail. Pure: reads are handed in.

Theory of operation
===================

A log is a row of *segments*, numbered files. A segment is a header followed by records; all numbers are little-endian.

======== ====== ================================================================================================
segment  ``4s`` magic
header   ``H``  format version: another one than ours is refused by name
         ``xx``
         ``I``  mark: a random number that begins every record of this segment
         ``Q``  the segment's number
         ``I``  start: up to here the file was synced before it got its name
         ``I``  CRC of the above
record   ``I``  mark
         ``I``  CRC of the rest of this header, begun at mark + offset, so that a record is valid in one place only
         ``I``  CRC of the payload
         ``I``  length of the payload
         ``I``  synced: up to here the file was known to be on the medium when the record was written
         ``I``  group
         ``Q``  term
         ``Q``  index
         ``H``  kind: the caller's own
         ``B``  type: see below
======== ====== ================================================================================================

A power cut leaves the end of a log in any state: bytes that were never synced may be there, missing, half written, and
*later ones may be there while earlier ones are not*, for the pages of a file reach the medium in no promised order.
None of them was acknowledged, so the log ends where they first fail to check, and whatever follows is cut off. A
damaged byte that had been synced is another matter: the entries behind it were acknowledged, others count on this node
having them, and to cut them off in silence would break every promise the cluster makes. Both look the same at the
damaged place; what tells them apart is evidence written later (the persist records of Alagappan et al., "Protocol-Aware
Recovery for Consensus-Based Storage", FAST 2018, do the same). Damage at offset p is *damage in the middle* when

- a later segment exists: a segment gets its name only after its predecessor was synced; or
- p lies before ``start``; or
- somewhere after p stands a valid record header whose ``synced`` is above p: p had been synced before that was written.

Otherwise it is a *torn tail*. The log helps with the evidence: a batch of records is written only when the batch before
it is synced, so each batch vouches for all before it; and when nothing more comes for a moment, a record of type
``SYNCED`` is added, which no one waits for. What remains in doubt, and must, is the last batch after a power cut that
also took this note: then a flipped bit in it cannot be told from a write that never arrived.

To look for evidence behind a hole, where the lengths that lead from record to record are lost, the rest of the file is
searched for the mark. User data cannot pass for evidence, as the mark is random and the CRC depends on the place.

Types of records: ``ENTRY`` adds an entry to a group. ``SUFFIX`` voids its entries from ``index`` on, ``PREFIX`` drops
those below. ``COPY`` repeats an entry whose segment is about to be deleted. ``OUTLINE`` stands at the head of a
segment, one per group: what the group holds in the segments before (see :mod:`gostore.storage.index`), so that the
older segments may go and the loss of one that may not is noticed. ``SYNCED`` is the evidence described above.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple
from zlib import crc32

from gostore.core.errors import Corrupt, NotSupported

FORMAT_VERSION: Final = 1
MAGIC: Final = b"GSWL"

ENTRY: Final = 1
COPY: Final = 2
SUFFIX: Final = 3
PREFIX: Final = 4
OUTLINE: Final = 5
SYNCED: Final = 6

_HEAD: Final = struct.Struct("<4sHxxIQI")
_CHECK: Final = struct.Struct("<I")
_FRONT: Final = struct.Struct("<II")
_BODY: Final = struct.Struct("<IIIIQQHBx")
_RECORD: Final = struct.Struct("<IIIIIIQQHBx")
_U32: Final = 0xFFFF_FFFF

_FRONT_SIZE: Final = _FRONT.size
HEAD_SIZE_BYTES: Final = _HEAD.size + _CHECK.size
RECORD_SIZE_BYTES: Final = _RECORD.size
"""What a record takes besides its payload."""

# Segments are read in pieces of this size: large enough that system calls do not count, small beside a node's memory.
BLOCK_SIZE_BYTES: Final = 1 << 20

Read = Callable[[int, int], bytes]
"""(offset, size) -> up to ``size`` bytes, fewer at the end of the file only."""


@dataclass(frozen=True, slots=True)
class Head:
    """The header of a segment."""

    number: int
    mark: int
    start: int


class RawRecord(NamedTuple):
    """A record as it is stored; ``payload`` is bytes when it is written and a view of the block when it is read."""

    type: int
    group: int
    term: int
    index: int  # type: ignore[assignment]  # tuple.index is not missed here
    kind: int
    payload: bytes | memoryview


def encode_head(head: Head) -> bytes:
    data = _HEAD.pack(MAGIC, FORMAT_VERSION, head.mark, head.number, head.start)
    return data + _CHECK.pack(crc32(data))


def decode_head(name: str, data: bytes) -> Head:
    """The header of the segment ``name``, of which ``data`` are the first bytes.

    Raises ``Corrupt``, and ``NotSupported`` for another format version.
    """
    if len(data) < HEAD_SIZE_BYTES or data[: len(MAGIC)] != MAGIC:
        raise damaged(name, 0, "it does not begin like a segment of a log")
    _, version, mark, number, start = _HEAD.unpack_from(data)
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an older"
        raise NotSupported(
            f"{name}: the log has format version {version}, {age} one; this release reads version {FORMAT_VERSION}: "
            "run the release that wrote it, or let this node join again with an empty data directory",
            file=name,
            version=version,
        )
    if _CHECK.unpack_from(data, _HEAD.size)[0] != crc32(data[: _HEAD.size]):
        raise damaged(name, 0, "its header does not match its checksum")
    return Head(number, mark, start)


def record_header(mark: int, offset: int, synced: int, record: RawRecord) -> bytes:
    """What stands before the payload when the record begins at ``offset`` of its segment."""
    type_, group, term, index, kind, payload = record
    body = _BODY.pack(crc32(payload), len(payload), synced, group, term, index, kind, type_)
    return _FRONT.pack(mark, crc32(body, (mark + offset) & _U32)) + body


def record_at(head: Head, offset: int, data: bytes | memoryview, at: int = 0) -> RawRecord | None:
    """The record that begins at ``offset``; ``None`` when it is not valid.

    Its bytes are those of ``data`` from ``at`` on, which end with it or later.
    """
    end = at + RECORD_SIZE_BYTES
    if len(data) < end:
        return None
    mark, check, payload_check, length, _, group, term, index, kind, type_ = _RECORD.unpack_from(data, at)
    payload = data[end : end + length]
    if (
        mark != head.mark
        or check != crc32(data[at + _FRONT_SIZE : end], (mark + offset) & _U32)
        or len(payload) != length
        or payload_check != crc32(payload)
    ):
        return None
    return RawRecord(type_, group, term, index, kind, payload)


class Scan:
    """All records of one segment with their offsets, in order; a payload is valid until the next one is asked for.

    Afterwards ``end`` is where they end and ``torn`` how many bytes follow. ``last``: no later segment exists.
    Iterating raises ``Corrupt`` for damage in the middle.
    """

    def __init__(self, name: str, head: Head, read: Read, size: int, *, last: bool) -> None:
        self.name = name
        self.head = head
        self.end = HEAD_SIZE_BYTES
        self.torn = 0
        self._read = read
        self._size = size
        self._last = last

    def __iter__(self) -> Iterator[tuple[int, RawRecord]]:
        # The hot loop of recovery: a record costs one unpacking and two checksums, and no copy.
        mark, size, offset = self.head.mark, self._size, self.end
        base, view = offset, memoryview(b"")
        while offset < size:
            at = offset - base
            if at + RECORD_SIZE_BYTES > len(view):
                base, at, view = offset, 0, memoryview(self._read(offset, BLOCK_SIZE_BYTES))
                if len(view) < RECORD_SIZE_BYTES:
                    break
            fields = _RECORD.unpack_from(view, at)
            body = view[at + _FRONT.size : at + RECORD_SIZE_BYTES]
            if fields[0] != mark or fields[1] != crc32(body, (mark + offset) & _U32):
                break
            length: int = fields[3]
            if at + RECORD_SIZE_BYTES + length > len(view):
                # The checksum vouches for the length; the size of the file bounds the memory all the same.
                wanted = RECORD_SIZE_BYTES + length
                if offset + wanted > size:
                    break
                base, at, view = offset, 0, memoryview(self._read(offset, max(wanted, BLOCK_SIZE_BYTES)))
            payload = view[at + RECORD_SIZE_BYTES : at + RECORD_SIZE_BYTES + length]
            if len(payload) != length or fields[2] != crc32(payload):
                break
            yield offset, RawRecord(fields[9], fields[5], fields[6], fields[7], fields[8], payload)
            offset += RECORD_SIZE_BYTES + length
            self.end = offset
        self._judge()

    def _judge(self) -> None:
        """Nothing valid stands at ``end``: is it the end, a torn tail, or damage in the middle?"""
        offset = self.end
        if offset < self.head.start:
            raise damaged(self.name, offset, "in what was synced before the segment was used")
        if offset == self._size:
            return
        if not self._last:
            raise damaged(self.name, offset, "and a later segment shows that all of this one was synced")
        witness = self._witness()
        if witness is not None:
            raise damaged(self.name, offset, f"and the record at {witness} shows that it had been synced")
        self.torn = self._size - offset

    def _witness(self) -> int | None:
        """The offset of a record behind ``end`` that was written when ``end`` had been synced."""
        mark = _CHECK.pack(self.head.mark)
        base = self.end + 1
        while base + RECORD_SIZE_BYTES <= self._size:
            view = self._read(base, BLOCK_SIZE_BYTES)
            at = view.find(mark)
            while 0 <= at <= len(view) - RECORD_SIZE_BYTES:
                fields = _RECORD.unpack_from(view, at)
                body = view[at + _FRONT.size : at + RECORD_SIZE_BYTES]
                if fields[1] == crc32(body, (fields[0] + base + at) & _U32) and fields[4] > self.end:
                    return base + at
                at = view.find(mark, at + 1)
            if len(view) < RECORD_SIZE_BYTES:
                break
            # A header may lie across the border of two blocks.
            base += len(view) - RECORD_SIZE_BYTES + 1
        return None


def damaged(name: str, offset: int, why: str) -> Corrupt:
    return Corrupt(
        f"{name} is damaged at offset {offset}, {why}; entries that were acknowledged may be lost: do not use this "
        "node's log, move its data directory away and let the node join again with an empty one",
        file=name,
        offset=offset,
    )

"""The file of a backup: records behind a versioned head, each with a checksum, and an end that vouches for all.

======== ====== ================================================================================================
head     ``8s`` magic
         ``H``  format version: another one than ours is refused by name
record   ``I``  length of the payload
         ``I``  CRC of the payload
         ...    the payload, a msgpack array whose first element is its kind
======== ====== ================================================================================================

All numbers are little-endian. The first record is ``["header", facts]``, then come ``["rows", container, [[key, packed
value], ...]]`` in any number (``container`` counts the containers of the header from 0), and the last one is ``["end",
records, objects, digest]``: the number of records before it, of objects in them, and BLAKE2b of all bytes of the file
before it. A file without an end was not finished, or is cut off; nothing may follow the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, BinaryIO, Final
from zlib import crc32

import msgpack

from gostore.core.errors import Corrupt, NotSupported

MAGIC: Final = b"GSBACKUP"
FORMAT_VERSION: Final = 1
RECORD_SIZE_BYTES_MAX: Final = 64 * 1024 * 1024
"""A longer one is damage, and is refused before memory is taken."""

_HEAD: Final = struct.Struct("<8sH")
_FRONT: Final = struct.Struct("<II")
_DIGEST_SIZE_BYTES: Final = 16


class Writer:
    """Writes a backup into a binary file; :meth:`finish` makes it one."""

    def __init__(self, file: BinaryIO, facts: dict[str, Any]) -> None:
        self._file = file
        self._digest = blake2b(digest_size=_DIGEST_SIZE_BYTES)
        self.records = 0
        self.objects = 0
        self.size_bytes = 0
        self._put(_HEAD.pack(MAGIC, FORMAT_VERSION))
        self._record(["header", facts])

    def rows(self, container: int, rows: list[list[Any]]) -> None:
        """``rows``: [[key, packed value], ...]"""
        self._record(["rows", container, rows])
        self.objects += len(rows)

    def finish(self) -> None:
        """All is there. The caller sees to it that it is on the medium."""
        self._record(["end", self.records, self.objects, self._digest.digest()])

    def _record(self, record: list[Any]) -> None:
        payload: bytes = msgpack.packb(record, use_bin_type=True)
        self._put(_FRONT.pack(len(payload), crc32(payload)) + payload)
        self.records += 1

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.size_bytes += len(data)


class Reader:
    """Reads a backup. ``facts``: those of the header. ``name`` is for errors.

    Opening and reading raise ``Corrupt`` for a file that is damaged or cut off, ``NotSupported`` for another version.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._digest = blake2b(digest_size=_DIGEST_SIZE_BYTES)
        self._records = 0
        self.objects = 0
        head = self._take(_HEAD.size)
        magic, version = _HEAD.unpack(head)
        if magic != MAGIC:
            raise self._wrong("it does not begin like one")
        if version != FORMAT_VERSION:
            age = "a newer" if version > FORMAT_VERSION else "an older"
            raise NotSupported(
                f"{name}: the backup has format version {version}, {age} one; this release reads version "
                f"{FORMAT_VERSION}: restore it with the release that wrote it"
            )
        record = self._next()
        if record[0] != "header" or len(record) != 2 or not isinstance(record[1], dict):
            raise self._wrong("it has no header")
        self.facts: dict[str, Any] = record[1]

    def rows(self) -> Iterator[tuple[int, list[list[Any]]]]:
        """(container, [[key, packed value], ...]) to the end. What came before an error may be of a damaged file."""
        while True:
            digest = self._digest.digest()
            match self._next():
                case ["rows", int(container), [*rows]]:
                    self.objects += len(rows)
                    yield container, rows
                case ["end", int(records), int(objects), bytes(expected)]:
                    if (records, objects, expected) != (self._records - 1, self.objects, digest):
                        raise self._wrong("its end does not match what is before: a part is missing or doubled")
                    if self._file.read(1):
                        raise self._wrong("something follows its end")
                    return
                case record:
                    raise self._wrong(f"a record of kind {record[0]!r:.20} where none can be")

    def _next(self) -> list[Any]:
        size, check = _FRONT.unpack(self._take(_FRONT.size))
        if size > RECORD_SIZE_BYTES_MAX:
            raise self._wrong(f"a record of {size} bytes")
        payload = self._take(size)
        if crc32(payload) != check:
            raise self._wrong(f"record {self._records} does not match its checksum")
        self._records += 1
        try:
            record = msgpack.unpackb(payload, strict_map_key=False)
        except (ValueError, msgpack.UnpackException) as error:
            raise self._wrong(f"record {self._records - 1} cannot be read: {error}") from None
        if not isinstance(record, list) or not record:
            raise self._wrong(f"record {self._records - 1} is none")
        return record

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise self._wrong("it ends early: it was not finished, or is cut off")
        self._digest.update(data)
        return data

    def _wrong(self, why: str) -> Corrupt:
        return Corrupt(f"{self._name} is no whole backup: {why}. Nothing of it is to be trusted: use another one")

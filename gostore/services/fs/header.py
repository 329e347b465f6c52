"""Headers: what is known of a file or a directory without touching its data.

In db an entry is a map (readable for whoever looks at the container ``fs``), made by :meth:`Header.to_value`:

=========  ==============================  =====================================================
field      of a file                       of a directory
=========  ==============================  =====================================================
kind       ``"file"``                      ``"dir"``
mtime      hybrid stamp of the write       hybrid stamp of its creation
type       MIME type
size       bytes
version    1, 2, ... since it was created
checksum   sha256 of the content, 32 bytes
write      id of the write that made it
data       the content, when it is small
chunks     else ``[[sha256, size], ...]``
id                                         the directory's id: its entries are ``"<id>/<name>"``
=========  ==============================  =====================================================

The content is the concatenation of the chunks, in order. A chunk is named by the sha256 of its bytes, so a header that
is known to be right proves every byte that it leads to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from gostore.core.errors import BadRequest, Corrupt
from gostore.core.stamps import stamp_wall_ms

DIRECTORY_TYPE: Final = "inode/directory"
DEFAULT_TYPE: Final = "application/octet-stream"

TYPE_SIZE_BYTES_MAX: Final = 255
# RFC 9110, sections 5.6.2 and 8.3.1: type "/" subtype *( OWS ";" OWS name "=" value ). Nothing that could end a line
# of an HTTP header gets through.
_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TYPE = re.compile(rf'{_WORD}/{_WORD}([ \t]*;[ \t]*{_WORD}=({_WORD}|"[ !#-\[\]-~]*"))*')


def check_type(text: str) -> str:
    """A MIME type; an empty one is ``application/octet-stream``. Raises ``BadRequest``."""
    if not text:
        return DEFAULT_TYPE
    if len(text) > TYPE_SIZE_BYTES_MAX or not _TYPE.fullmatch(text):
        raise BadRequest(f"type = {text!r:.100}: expected a MIME type such as text/plain")
    return text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a file's content. ``key``: sha256 of the bytes, 64 hexadecimal digits. ``size``: bytes."""

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Content:
    """Where the bytes of a file are: ``inline``, or in ``chunks`` (then ``inline`` is None)."""

    size: int
    checksum: str
    """sha256 of all bytes, 64 hexadecimal digits."""
    inline: bytes | None = None
    chunks: tuple[Chunk, ...] = ()

    def covering(self, offset: int, size: int) -> list[tuple[Chunk, int, int]]:
        """``(chunk, from, to)`` for each chunk with bytes of ``offset <= position < offset + size``."""
        found: list[tuple[Chunk, int, int]] = []
        start = 0
        for chunk in self.chunks:
            low, high = max(offset - start, 0), min(offset + size - start, chunk.size)
            if low < high:
                found.append((chunk, low, high))
            start += chunk.size
            if start >= offset + size:
                break
        return found


@dataclass(frozen=True, slots=True)
class Header:
    """A file (``content`` is set) or a directory (``directory_id`` is set)."""

    path: str
    mtime: int
    """Hybrid logical stamp (``core.stamps``)."""
    type: str = DIRECTORY_TYPE
    version: int = 1
    write_id: str = ""
    content: Content | None = None
    directory_id: str = ""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_directory(self) -> bool:
        return self.content is None

    @property
    def size(self) -> int:
        """Bytes; 0 for a directory."""
        return self.content.size if self.content is not None else 0

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.content.chunks if self.content is not None else ()

    @property
    def etag(self) -> str:
        """Changes with every write, also when a file is deleted and made anew. Without quotes."""
        return f"{self.version}-{self.write_id}"

    def to_value(self) -> dict[str, Any]:
        """The object in db."""
        if self.content is None:
            return {"kind": "dir", "id": self.directory_id, "mtime": self.mtime}
        value: dict[str, Any] = {
            "kind": "file",
            "type": self.type,
            "size": self.content.size,
            "version": self.version,
            "checksum": bytes.fromhex(self.content.checksum),
            "write": self.write_id,
            "mtime": self.mtime,
        }
        if self.content.inline is not None:
            value["data"] = self.content.inline
        else:
            value["chunks"] = chunks_to_value(self.content.chunks)
        return value

    @classmethod
    def from_value(cls, path: str, value: Any) -> Header:
        """Raises ``Corrupt`` on anything that :meth:`to_value` did not make."""
        match value:
            case {"kind": "dir", "id": str(directory_id), "mtime": int(mtime)}:
                return cls(path, mtime, directory_id=directory_id)
            case {
                "kind": "file",
                "type": str(type_),
                "size": int(size),
                "version": int(version),
                "checksum": bytes(checksum),
                "write": str(write_id),
                "mtime": int(mtime),
            }:
                content = _content(path, value, size, checksum.hex())
                return cls(path, mtime, type_, version, write_id, content)
        raise Corrupt(f"{path}: its entry in db is no header: {value!r:.200}")

    def to_wire(self) -> dict[str, Any]:
        """What a client is told: everything but inline data. ``mtime_ms``: wall clock, since 1970."""
        told: dict[str, Any] = {
            "path": self.path,
            "name": self.name,
            "exists": True,
            "directory": self.is_directory,
            "type": self.type,
            "size": self.size,
            "version": self.version,
            "next_version": self.version + 1,
            "mtime": self.mtime,
            "mtime_ms": stamp_wall_ms(self.mtime),
            "etag": self.etag,
        }
        if self.content is not None:
            told["checksum"] = self.content.checksum
            told["inline"] = self.content.inline is not None
            told["chunks"] = [[chunk.key, chunk.size] for chunk in self.content.chunks]
        return told

    def to_child(self) -> dict[str, Any]:
        """A line of a directory listing."""
        return {
            "name": self.name,
            "directory": self.is_directory,
            "type": self.type,
            "size": self.size,
            "version": self.version,
            "mtime_ms": stamp_wall_ms(self.mtime),
        }


def _content(path: str, value: Any, size: int, checksum: str) -> Content:
    match value:
        case {"data": bytes(inline)} if len(inline) == size:
            return Content(size, checksum, inline)
        case {"chunks": list(listed)}:
            chunks = chunks_from_value(path, listed)
            if sum(chunk.size for chunk in chunks) == size:
                return Content(size, checksum, None, chunks)
    raise Corrupt(f"{path}: its header says {size} bytes, and its data do not add up to that")


def chunks_from_value(where: str, listed: Any) -> tuple[Chunk, ...]:
    """``[[sha256, size], ...]`` as chunks. Raises ``Corrupt``."""
    found: list[Chunk] = []
    for item in listed:
        match item:
            case [bytes(key), int(size)] if len(key) == 32 and size > 0:
                found.append(Chunk(key.hex(), size))
            case _:
                raise Corrupt(f"{where}: not a chunk: {item!r:.100}")
    return tuple(found)


def chunks_to_value(chunks: tuple[Chunk, ...] | list[Chunk]) -> list[list[Any]]:
    return [[bytes.fromhex(chunk.key), chunk.size] for chunk in chunks]

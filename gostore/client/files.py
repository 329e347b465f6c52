"""The file system, as a client sees it: ``cluster.fs``."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from mimetypes import MimeTypes
from pathlib import Path
from typing import Any, BinaryIO, Final

from gostore.client.connection import Connection
from gostore.client.pool import as_done
from gostore.core.errors import (
    BadRequest,
    Corrupt,
    Forgotten,
    GoStoreError,
    NotFound,
    Timeout,
    Unavailable,
    Unreachable,
)
from gostore.core.twins import Runner, SyncTwins, sync_iterator_twin, sync_twin

PIECE_SIZE_BYTES: Final = 1024 * 1024
"""Content up to this travels in one call, more in pieces of it. Larger: fewer round trips; smaller: less memory."""

READ_SIZE_BYTES: Final = 4 * 1024 * 1024
"""What one call asks for; a node gives no more."""

READS_AHEAD: Final = 4
"""Pieces of one file that are read at a time."""

UPLOAD_ATTEMPTS_MAX: Final = 4
"""Nodes that an upload is begun at, when those before were lost in the middle of it."""

IN_FLIGHT: Final = 16
"""Files of a tree that are under way at a time."""

Content = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryIO
"""Bytes; text, which becomes UTF-8; the path of a local file; or an open binary file."""

Header = dict[str, Any]
"""``path``, ``name``, ``type``, ``size``, ``version``, ... of a file or directory."""


# Python's own table, not this machine's: the same name gives the same type everywhere.
TYPES: Final = MimeTypes(filenames=())


class FsHandle(SyncTwins):
    """Files and directories. Every call goes through any node; ``via`` names one.

    All raise :class:`NotFound`, :class:`NotADirectory`, :class:`IsADirectory`, :class:`BadRequest` (no proper path),
    :class:`Unavailable` (definite: try again) and :class:`Timeout` (of a write: it may have happened).
    """

    def __init__(self, runner: Runner, connection: Callable[[], Connection]) -> None:
        self._runner = runner
        self._connection = connection

    async def _ask(self, function: str, *args: Any, via: str | None, repeatable: bool = True) -> Any:
        return (await self._connection().call("fs", function, *args, via=via, repeatable=repeatable)).value

    # files

    async def write(self, path: str, content: Content, *, type: str = "", via: str | None = None) -> Header:
        """Write a whole file, with its missing parents; returns its header. It is there as a whole or not at all.

        ``type``: MIME type; guessed from the name by default. After a :class:`Timeout` read the file to see.
        """
        type = type or TYPES.guess_type(path)[0] or ""
        source = _open(content)
        try:
            first = source.read(PIECE_SIZE_BYTES)
            rest = source.read(1) if len(first) == PIECE_SIZE_BYTES else b""
            if rest:
                return await self._upload(path, type, source, first + rest, via)
            answer = await self._connection().call("fs", "write", path, type, data=first, via=via)
            return dict(answer.value)
        finally:
            if source is not content:
                source.close()

    write_sync = sync_twin(write)

    async def _upload(self, path: str, type_: str, source: BinaryIO, read: bytes, via: str | None) -> Header:
        """In pieces, all to one node. Before the commit nothing has happened, so another node may begin anew."""
        start = source.tell() - len(read) if source.seekable() else -1
        for attempt in range(1, UPLOAD_ATTEMPTS_MAX + 1):
            connection = self._connection()
            node = via or connection.pick()
            try:
                upload = await self._send_pieces(connection, node, path, type_, source, read)
            except (Timeout, Forgotten, Unreachable, Unavailable, NotFound) as error:
                if attempt == UPLOAD_ATTEMPTS_MAX or start < 0:
                    raise Unavailable(f"{path} was not written: {error.message}") from error
                connection.shun(node)
                source.seek(start)
                read = b""
            else:
                return dict((await connection.call_node(node, "fs", "commit", upload)).value)
        raise AssertionError("UPLOAD_ATTEMPTS_MAX is at least 1")

    async def _send_pieces(
        self, connection: Connection, node: str, path: str, type_: str, source: BinaryIO, read: bytes
    ) -> str:
        upload: str = (await connection.call_node(node, "fs", "begin", path, type_)).value
        size = 0
        try:
            while piece := read or source.read(PIECE_SIZE_BYTES):
                read = b""
                size = (await connection.call_node(node, "fs", "append", upload, size, data=piece)).value
        except BaseException:
            try:
                await asyncio.shield(connection.call_node(node, "fs", "abort", upload, timeout_s=1.0))
            except GoStoreError:
                pass  # the node aborts it when it has been silent for long enough
            raise
        return upload

    async def read(
        self,
        path: str,
        offset: int = 0,
        size: int | None = None,
        *,
        version: int = 0,
        local: bool = False,
        via: str | None = None,
    ) -> bytes:
        """Bytes of a file: ``size`` of them from ``offset`` (None: to the end); fewer at the end.

        ``version``: raise :class:`Conflict` unless the file has this one. ``local``: only what the node ``via`` holds
        itself (:class:`NotFound` when it is no replica).
        """
        pieces = [piece async for piece in self._pieces(path, offset, size, version, local, via)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    read_sync = sync_twin(read)

    async def stream(self, path: str, *, via: str | None = None) -> AsyncIterator[bytes]:
        """The bytes of a file in pieces of a few MiB, all of the same version."""
        async with aclosing(self._pieces(path, 0, None, 0, False, via)) as pieces:
            async for piece in pieces:
                yield piece

    stream_sync = sync_iterator_twin(stream)

    async def _pieces(
        self, path: str, offset: int, size: int | None, version: int, local: bool, via: str | None
    ) -> Any:
        """The first piece tells size and version; the others are of this version, or :class:`Conflict` is raised."""
        if size is not None and size < 0:
            raise BadRequest(f"size = {size}: allowed are 0 and more, or None for all that follow")
        wanted = -1 if size is None else size
        header, first = await self._read(path, offset, wanted, version, local, via)
        yield first
        end = header["size"] if size is None else min(offset + size, header["size"])
        starts = range(offset + len(first), end, READ_SIZE_BYTES) if first else range(0)

        async def read(start: int) -> bytes:
            wish = min(READ_SIZE_BYTES, end - start)
            _, piece = await self._read(path, start, wish, header["version"], local, via)
            if len(piece) != wish:
                raise Corrupt(f"{path}: {wish} bytes at {start} were asked for, {len(piece)} came")
            return piece

        for index in range(0, len(starts), READS_AHEAD):
            for piece in await asyncio.gather(*map(read, starts[index : index + READS_AHEAD])):
                yield piece

    async def _read(
        self, path: str, offset: int, size: int, version: int, local: bool, via: str | None
    ) -> tuple[Header, bytes]:
        reply = await self._connection().call(
            "fs", "read", path, offset, size, version, local, via=via, repeatable=True
        )
        return reply.value, bytes(reply.data)

    async def header(self, path: str, *, local: bool = False, via: str | None = None) -> Header:
        """The header of a file or directory: path, name, type, size, version, ..."""
        return dict(await self._ask("header", path, local, via=via))

    header_sync = sync_twin(header)

    async def stat(self, path: str, *, via: str | None = None) -> Header:
        """The header, and ``place``: where the entry and the chunks lie on the ring, and who holds them."""
        return dict(await self._ask("stat", path, via=via))

    stat_sync = sync_twin(stat)

    async def exists(self, path: str, *, via: str | None = None) -> bool:
        """Whether there is a file or directory."""
        return bool(await self._ask("exists", path, via=via))

    exists_sync = sync_twin(exists)

    async def delete(self, path: str, *, recursive: bool = False, via: str | None = None) -> int:
        """Delete a file or directory; returns how many entries are gone.

        Raises :class:`NotEmpty` for a directory that holds something, unless ``recursive``.
        """
        answer = await self._ask("delete", path, recursive, via=via, repeatable=False)
        return int(answer["entries"])

    delete_sync = sync_twin(delete)

    # directories

    async def mkdir(self, path: str, *, exist_ok: bool = True, via: str | None = None) -> Header:
        """Make a directory and its missing parents."""
        return dict(await self._ask("mkdir", path, exist_ok, via=via, repeatable=exist_ok))

    mkdir_sync = sync_twin(mkdir)

    async def list(self, path: str = "/", *, via: str | None = None) -> list[Header]:
        """The entries of a directory by name: name, directory, type, size, version, mtime_ms."""
        entries: list[Header] = []
        start: str | None = ""
        while start is not None:
            page = await self._ask("list", path, start, via=via)
            entries += page["children"]
            start = page["next_start"]
        return entries

    list_sync = sync_twin(list)

    # many

    async def write_many(self, files: Iterable[tuple[str, Content]], *, in_flight: int = IN_FLIGHT) -> dict[str, int]:
        """Write (path, content) pairs, drawn one by one, ``in_flight`` at a time; returns ``{"files", "bytes"}``.

        The first error ends it; files that were written stay.
        """
        total = {"files": 0, "bytes": 0}
        async with aclosing(as_done(files, lambda file: self.write(*file), in_flight)) as done:
            async for header in done:
                total["files"] += 1
                total["bytes"] += header["size"]
        return total

    write_many_sync = sync_twin(write_many)

    async def read_many(
        self, paths: Iterable[str], *, in_flight: int = IN_FLIGHT
    ) -> AsyncIterator[tuple[str, bytes | GoStoreError]]:
        """(path, its bytes or the error) of many files, in the order in which they come."""

        async def read(path: str) -> tuple[str, bytes | GoStoreError]:
            try:
                return path, await self.read(path)
            except GoStoreError as error:
                return path, error

        async with aclosing(as_done(paths, read, in_flight)) as done:
            async for result in done:
                yield result

    read_many_sync = sync_iterator_twin(read_many)

    async def put_tree(
        self, source: str | os.PathLike[str], path: str, *, in_flight: int = IN_FLIGHT
    ) -> dict[str, int]:
        """Store a local directory with everything in it below ``path``; returns ``{"files", "bytes"}``.

        Symbolic links and what is no regular file are left out. Raises :class:`BadRequest` when it is no directory.
        """
        files = _local_files(_local_directory(source), path.rstrip("/"))
        await self.mkdir(path)
        return await self.write_many(files, in_flight=in_flight)

    put_tree_sync = sync_twin(put_tree)

    async def get_tree(
        self, path: str, target: str | os.PathLike[str], *, in_flight: int = IN_FLIGHT
    ) -> dict[str, int]:
        """Write everything below ``path`` into a local directory; returns ``{"files", "bytes"}``."""
        root = Path(target)
        files = [(entry, root / relative) async for entry, relative in self._walk(path, Path())]

        async def fetch(file: tuple[str, Path]) -> int:
            size = 0
            with _create(file[1]) as out:
                async for piece in self._pieces(file[0], 0, None, 0, False, None):
                    size += out.write(piece)
            return size

        total = {"files": 0, "bytes": 0}
        async with aclosing(as_done(files, fetch, in_flight)) as done:
            async for size in done:
                total["files"] += 1
                total["bytes"] += size
        return total

    get_tree_sync = sync_twin(get_tree)

    async def _walk(self, path: str, relative: Path) -> AsyncIterator[tuple[str, Path]]:
        for entry in await self.list(path):
            below = f"{path.rstrip('/')}/{entry['name']}"
            if entry["directory"]:
                async for found in self._walk(below, relative / entry["name"]):
                    yield found
            else:
                yield below, relative / entry["name"]

    # housekeeping

    async def check(self) -> Mapping[str, int]:
        """Count what there is and what is wrong with it: files, chunks, ``orphans``, ``under_replicated``, ..."""
        return dict(await self._ask("check", via=None))

    check_sync = sync_twin(check)

    async def collect(self) -> Mapping[str, int]:
        """Remove, on all nodes, the chunks that nothing refers to; returns what was done."""
        return dict(await self._ask("collect", via=None))

    collect_sync = sync_twin(collect)

    def __repr__(self) -> str:
        return "<fs>"


def _local_directory(path: str | os.PathLike[str]) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise BadRequest(f"{str(root)!r} is not a directory; use write() for a file")
    return root


def _local_files(root: Path, base: str) -> Iterator[tuple[str, Content]]:
    """(path in the cluster, local file) of all regular files below ``root``, sorted."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                yield f"{base}/{file.relative_to(root).as_posix()}", file


def _create(file: Path) -> BinaryIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return open(file, "wb")
    except OSError as error:
        raise BadRequest(f"{str(file)!r} cannot be written: {error.strerror}") from None


def _open(content: Content) -> BinaryIO:
    if isinstance(content, str):
        return io.BytesIO(content.encode())
    if isinstance(content, (bytes, bytearray, memoryview)):
        return io.BytesIO(content)
    if isinstance(content, os.PathLike):
        try:
            return open(content, "rb")
        except OSError as error:
            raise BadRequest(f"{os.fspath(content)!r} cannot be read: {error.strerror}") from None
    if not hasattr(content, "read"):
        raise BadRequest(f"content is {type(content).__name__}; expected bytes, text, a path or an open binary file")
    return content

"""Writing: content comes in pieces, becomes chunks on the ring, and exists when its header is committed.

The order of a write with chunks: intent, chunks, header (:mod:`.intents` says why). A file that is small enough goes
into its header and needs no intent. Whoever writes in one call, in a session of several calls, or over REST uses the
same :class:`Writer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass, field
from typing import Final

from gostore.config import FsConfig
from gostore.core.errors import BadRequest, NotFound, Unavailable
from gostore.env import Env
from gostore.services.fs.collector import Collector
from gostore.services.fs.directory import Tree
from gostore.services.fs.header import Chunk, Content, Header, check_type
from gostore.services.fs.intents import Intent, Intents
from gostore.services.fs.replicas import Replicas
from gostore.services.fs.transactions import Transactions

BATCH_CHUNKS: Final = 4
"""Full chunks that a stream gathers before it stores them. More: fewer commits of its intent; each costs the memory."""
SESSIONS_MAX: Final = 64
"""Uploads in several calls under way on one node; each buffers up to ``BATCH_CHUNKS`` chunks and a message."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a writer works with."""

    env: Env
    config: FsConfig
    transactions: Transactions
    tree: Tree
    intents: Intents
    replicas: Replicas
    collector: Collector


class Writer:
    """One write of one file. Use :meth:`take` and :meth:`append`, then :meth:`commit`; or :meth:`abort`.

    Raises ``BadRequest`` for a bad path or type at once. After an error the write is over, and nothing of it stays.
    """

    def __init__(self, shop: Workshop, path: str, type_: str) -> None:
        self._shop = shop
        self._names = shop.tree.parts(path)
        if not self._names:
            raise BadRequest("/ is a directory; name a file in it")
        self.path = path
        self._type = check_type(type_)
        self._begun_s = asyncio.get_running_loop().time()
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._chunks: list[Chunk] = []
        self._intent: Intent | None = None
        self.size = 0

    def take(self, data: bytes | memoryview) -> None:
        """Add content without storing any of it yet (the caller bounds how much)."""
        self._hash.update(data)
        self._buffer += data
        self.size += len(data)

    async def append(self, data: bytes | memoryview) -> None:
        """Add content; stores what is gathered now and then, so that memory stays bounded."""
        self.take(data)
        if len(self._buffer) >= BATCH_CHUNKS * self._shop.config.chunk_size_bytes:
            try:
                await self._store(whole_chunks_only=True)
            except BaseException:
                self.abort()
                raise

    async def commit(self) -> Header:
        """Make it so: the file exists with this content when this returns. Raises what db and the holders raise."""
        try:
            if self._intent is None and (not self.size or self.size <= self._shop.config.inline_size_bytes_max):
                content = Content(self.size, self._hash.hexdigest(), bytes(self._buffer))
            else:
                await self._store()
                content = Content(self.size, self._hash.hexdigest(), None, tuple(self._chunks))
            header, before = await self._put(content)
        except BaseException:
            self.abort()
            raise
        if before is not None and before.chunks:
            self._shop.collector.want()
        self._shop.env.events.publish(
            "fs_write",
            path=header.path,
            size=header.size,
            version=header.version,
            chunks=len(header.chunks),
            duration_s=asyncio.get_running_loop().time() - self._begun_s,
        )
        return header

    async def _put(self, content: Content) -> tuple[Header, Header | None]:
        intent, intents = self._intent, self._shop.intents
        if intent is None:
            return await self._shop.tree.put(self.path, self._type, content)
        done = await self._shop.tree.put(self.path, self._type, content, lambda: intents.consume(intent))
        intents.consumed(intent)
        self._intent = None
        return done

    async def _store(self, *, whole_chunks_only: bool = False) -> None:
        """Announce and store what is buffered."""
        size = self._shop.config.chunk_size_bytes
        end = len(self._buffer) // size * size if whole_chunks_only else len(self._buffer)
        pieces: list[tuple[Chunk, bytes]] = []
        for offset in range(0, end, size):
            data = bytes(self._buffer[offset : min(offset + size, end)])
            pieces.append((Chunk(hashlib.sha256(data).hexdigest(), len(data)), data))
        del self._buffer[:end]
        if not pieces:
            return
        chunks = [chunk for chunk, _ in pieces]
        self._chunks += chunks
        if self._intent is None:
            directory_id = await self._shop.tree.directory(self._names[:-1])
            self._intent = await self._shop.intents.open(directory_id, chunks)
        else:
            await self._shop.intents.extend(self._intent, chunks)
        await self._shop.replicas.store(pieces)

    def abort(self) -> None:
        """The write does not happen; what it stored is collected."""
        intent, self._intent = self._intent, None
        self._buffer.clear()
        if intent is None:
            return
        with contextlib.suppress(RuntimeError):  # the node is stopping: a later collection gives the intent up
            self._shop.env.tasks.start(self._give_up(intent), name="give up an intent")

    async def _give_up(self, intent: Intent) -> None:
        await self._shop.intents.give_up(intent)
        self._shop.collector.want()


@dataclass(slots=True, eq=False)
class _Session:
    writer: Writer
    used_s: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sessions:
    """Uploads that take several calls: ``begin``, ``append`` with growing offsets, ``commit`` or ``abort``.

    A session that nobody used for the lease is aborted.
    """

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, path: str, type_: str) -> str:
        """Open a session. Raises ``BadRequest``, and ``Unavailable`` when there are :data:`SESSIONS_MAX`."""
        if len(self._sessions) >= SESSIONS_MAX:
            raise Unavailable(f"{self._shop.env.name} has {SESSIONS_MAX} uploads under way; try again or elsewhere")
        session = self._shop.transactions.new_id()
        self._sessions[session] = _Session(Writer(self._shop, path, type_), asyncio.get_running_loop().time())
        return session

    async def append(self, session: str, offset: int, data: bytes | memoryview) -> int:
        """Add the bytes at ``offset``, which is the size so far; returns the new size. Raises ``BadRequest``."""
        found = self._get(session)
        async with found.lock:
            self._get(session)  # it may have ended while this call waited
            if offset != found.writer.size:
                raise BadRequest(f"offset = {offset}: this upload has {found.writer.size} bytes, go on there")
            try:
                await found.writer.append(data)
            except BaseException:
                self._sessions.pop(session, None)
                raise
            return found.writer.size

    async def commit(self, session: str) -> Header:
        found = self._get(session)
        async with found.lock:
            self._get(session)
            del self._sessions[session]
            return await found.writer.commit()

    async def abort(self, session: str) -> None:
        found = self._get(session)
        async with found.lock:
            if self._sessions.pop(session, None) is not None:
                found.writer.abort()

    def _get(self, session: str) -> _Session:
        found = self._sessions.get(session)
        if found is None:
            raise NotFound(
                f"there is no upload {session!r:.50} on {self._shop.env.name}: it has ended, or was silent for longer "
                f"than {self._shop.config.intent_lease_s:g} s; begin again"
            )
        found.used_s = asyncio.get_running_loop().time()
        return found

    async def run(self) -> None:
        """Abort the sessions whose clients have gone, until cancelled."""
        loop, lease_s = asyncio.get_running_loop(), self._shop.config.intent_lease_s
        while True:
            await asyncio.sleep(lease_s / 4)
            for session, found in list(self._sessions.items()):
                if loop.time() - found.used_s > lease_s and not found.lock.locked():
                    del self._sessions[session]
                    found.writer.abort()

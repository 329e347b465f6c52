"""The chunk store of a node: immutable blobs, named by the SHA-256 of their bytes.

A blob is written under a temporary name, synced, renamed, and the directory synced; so whatever carries a blob's name
is complete, and a put that returned survives a power cut. The files fan out over 256 directories by the first two
digits of the key. Puts that need the same directory on the medium share its syncs. The index in memory holds keys and
sizes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from typing import Final, Self

from gostore.core.errors import BadRequest, Corrupt, NotFound, Unavailable
from gostore.env import Env

# Blobs being written at a time; more wait in order. Bounds the open files; a disk is busy with far fewer.
PUTS_IN_FLIGHT_MAX: Final = 64

_KEY: Final = re.compile(r"[0-9a-f]{64}")
_FAN_OUT: Final = 2
_FAN: Final = re.compile(r"[0-9a-f]{2}")
_TEMPORARY: Final = ".tmp"
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class DirectorySyncs:
    """Group commit for directories: all who ask while one is being synced share the next sync of it."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self.syncs = 0

    async def sync(self, name: str) -> None:
        """Return when what was created, renamed or removed in the directory is on the medium. Raises ``OSError``."""
        future = asyncio.get_running_loop().create_future()
        waiting = self._waiting.get(name)
        if waiting is None:
            # The task ends when nobody waits; it is not the caller's, whose cancellation concerns no other.
            self._env.tasks.start(self._run(name), name=f"sync-directory {name}")
            self._waiting[name] = [future]
        else:
            waiting.append(future)
        await future

    async def _run(self, name: str) -> None:
        served: list[asyncio.Future[None]] = []
        error: Exception | None = Unavailable("the node is stopping", definite=False)
        try:
            while self._waiting[name]:
                served, self._waiting[name] = self._waiting[name], []
                await self._env.disk.sync_dir(name)
                self.syncs += 1
                for future in served:
                    if not future.done():
                        future.set_result(None)
            error = None
        except OSError as failure:
            error = failure
        finally:
            # A sync that failed has failed for those too who came while it ran: it is not tried again.
            for future in served + self._waiting.pop(name):
                if not future.done():
                    future.set_exception(error or Unavailable("the node is stopping", definite=False))


class BlobStore:
    """Made by :meth:`open`."""

    def __init__(self, env: Env, directory: str) -> None:
        self._env = env
        self._directory = directory
        self._sizes: dict[str, int] = {}
        self._bytes = 0
        self._busy: dict[str, asyncio.Future[None]] = {}  # keys that a put or remove is at work on
        self._fans: dict[str, None] = {}  # fan-out directories that are on the medium
        self._slots = asyncio.Semaphore(PUTS_IN_FLIGHT_MAX)
        self._syncs = DirectorySyncs(env)
        self._failed: str | None = None
        self._statistics = dict.fromkeys(("puts", "put_bytes", "known", "removed", "unfinished", "corrupt"), 0)

    @classmethod
    async def open(cls, env: Env, directory: str = "blobs") -> Self:
        """Find what is there and drop what was not finished. All that is found is on the medium when this returns.

        Raises ``Unavailable`` when the disk fails.
        """
        store = cls(env, directory)
        try:
            await store._recover()
        except OSError as error:
            raise store._fail("opening the blobs", error) from error
        return store

    async def _recover(self) -> None:
        disk = self._env.disk
        disk.mkdir(self._directory)
        # A node that was killed may have left names that only the page cache knows: nobody may rely on them before
        # they are on the medium.
        await disk.sync_dir(self._directory.rpartition("/")[0])
        await disk.sync_dir(self._directory)
        for fan in disk.listdir(self._directory):
            if _FAN.fullmatch(fan) is None:
                continue
            path = f"{self._directory}/{fan}"
            for name in disk.listdir(path):
                if name.endswith(_TEMPORARY):
                    disk.remove(f"{path}/{name}")
                    self._statistics["unfinished"] += 1
                elif _KEY.fullmatch(name) is not None and name.startswith(fan):
                    with contextlib.closing(disk.open(f"{path}/{name}")) as file:
                        self._sizes[name] = file.size()
                        self._bytes += file.size()
            await disk.sync_dir(path)
            self._fans[fan] = None

    async def put(self, key: str, data: bytes | memoryview) -> bool:
        """Store a blob; it is on the medium when this returns. False: it was there already.

        Raises ``BadRequest`` for a malformed key, ``Corrupt`` when the data are not those that the key names,
        ``Unavailable`` when the disk is full (definite: nothing was stored; the node goes on) or fails (indefinite).
        """
        _check(key)
        async with self._exclusive(key):
            if key in self._sizes:
                self._statistics["known"] += 1
                return False
            digest = sha256(data).hexdigest()
            if digest != key:
                raise Corrupt(
                    f"{len(data)} bytes with the SHA-256 {digest} came as blob {key}: send them again", key=key
                )
            async with self._slots:
                await self._store(key, data)
            self._sizes[key] = len(data)
            self._bytes += len(data)
            self._statistics["puts"] += 1
            self._statistics["put_bytes"] += len(data)
        return True

    def get(self, key: str) -> bytes:
        """The bytes of a blob, verified. Raises ``NotFound``, and ``Corrupt`` when they are no longer what they were.

        A corrupt blob stays until it is removed; put it again after that.
        """
        if key not in self._sizes:
            raise NotFound(f"there is no blob {key} on {self._env.name}", key=key)
        try:
            data = self._env.disk.read_bytes(self._path(key))
        except OSError as error:
            self._statistics["corrupt"] += 1
            raise self._corrupt(key, f"cannot be read: {error.strerror}") from error
        if sha256(data).hexdigest() != key:
            self._statistics["corrupt"] += 1
            raise self._corrupt(key, "does not match its checksum")
        return data

    def has(self, key: str) -> bool:
        return key in self._sizes

    def size(self, key: str) -> int:
        """In bytes. Raises ``NotFound``."""
        if key not in self._sizes:
            raise NotFound(f"there is no blob {key} on {self._env.name}", key=key)
        return self._sizes[key]

    def keys(self) -> Iterator[str]:
        """All keys there are at the time of the call, sorted."""
        return iter(sorted(self._sizes))

    def __len__(self) -> int:
        return len(self._sizes)

    async def remove(self, key: str) -> bool:
        """Delete a blob, on the medium too; False: there was none. Raises ``Unavailable`` when the disk fails."""
        _check(key)
        async with self._exclusive(key):
            size = self._sizes.pop(key, None)
            if size is None:
                return False
            self._bytes -= size
            try:
                with contextlib.suppress(FileNotFoundError):
                    self._env.disk.remove(self._path(key))
                await self._syncs.sync(self._fan_path(key))
            except OSError as error:
                raise self._fail("removing a blob", error) from error
            self._statistics["removed"] += 1
        return True

    def statistics(self) -> dict[str, int]:
        """Counters since the opening, and what there is now: ``blobs`` and their ``bytes``.

        ``known``: puts of what was there; ``unfinished``: temporary files that the opening dropped.
        """
        return {
            **self._statistics,
            "directory_syncs": self._syncs.syncs,
            "blobs": len(self._sizes),
            "bytes": self._bytes,
        }

    @contextlib.asynccontextmanager
    async def _exclusive(self, key: str) -> AsyncIterator[None]:
        """One put or remove of a key at a time; the others look again when it is done."""
        while (other := self._busy.get(key)) is not None:
            await asyncio.wait([other])
        if self._failed is not None:
            raise Unavailable(f"the blobs of {self._env.name} cannot be changed: {self._failed}")
        busy = self._busy[key] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._busy[key]
            busy.set_result(None)

    async def _store(self, key: str, data: bytes | memoryview) -> None:
        path = self._path(key)
        try:
            await self._make_fan(key)
            await self._write(path + _TEMPORARY, data)
            with self._space():
                self._env.disk.rename(path + _TEMPORARY, path)
            await self._syncs.sync(self._fan_path(key))
        except OSError as error:
            self._undo(path)
            raise self._fail("storing a blob", error) from error
        except BaseException:
            self._undo(path)
            raise

    async def _write(self, name: str, data: bytes | memoryview) -> None:
        with self._space():
            file = self._env.disk.open(name, create=True)
        with contextlib.closing(file):
            with self._space():
                await file.write([data], sync=False)
            await file.sync()

    async def _make_fan(self, key: str) -> None:
        fan = key[:_FAN_OUT]
        if fan not in self._fans:
            with self._space():
                self._env.disk.mkdir(self._fan_path(key))
            await self._syncs.sync(self._directory)
            self._fans[fan] = None

    @contextlib.contextmanager
    def _space(self) -> Iterator[None]:
        """A full disk is no failed one: the put is undone and the node goes on. (A sync that fails is the end.)"""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise Unavailable(f"the disk of {self._env.name} is full: free space or store elsewhere") from error

    def _undo(self, path: str) -> None:
        """The put did not happen: what is in the index is what is on the disk."""
        for name in (path + _TEMPORARY, path):
            with contextlib.suppress(OSError):
                self._env.disk.remove(name)

    def _fan_path(self, key: str) -> str:
        return f"{self._directory}/{key[:_FAN_OUT]}"

    def _path(self, key: str) -> str:
        return f"{self._directory}/{key[:_FAN_OUT]}/{key}"

    def _corrupt(self, key: str, why: str) -> Corrupt:
        return Corrupt(
            f"blob {self._path(key)} on {self._env.name} {why}: remove it and copy it again from another node",
            key=key,
            file=self._path(key),
        )

    def _fail(self, what: str, error: OSError) -> Unavailable:
        if self._failed is None:
            self._failed = f"{what} failed: {error}"
            self._env.events.publish("disk_failed", what=what, error=str(error))
            self._env.fatal(f"{self._failed}; it is not tried again, as what was not synced may be gone already")
        return Unavailable(f"{self._env.name}: {self._failed}", definite=False)


def _check(key: str) -> None:
    if _KEY.fullmatch(key) is None:
        raise BadRequest(f"key = {key!r}: expected the SHA-256 of the blob, 64 hexadecimal digits in lower case")

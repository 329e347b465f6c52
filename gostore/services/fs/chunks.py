"""Chunks: immutable pieces of content, named by their sha256, held by the owners that the ring names.

Two parts: :class:`Holder` (this node's blobs, and the promises made about them), and :class:`ChunkService` (the same,
as remote functions for the other nodes). Storing on, and fetching from, whoever owns a chunk is in :mod:`.replicas`.

Who may remove a chunk
----------------------
A copy is removed for one of two reasons only: nothing references the chunk (:mod:`.collector`), or this node does not
own it and all owners hold it (:mod:`.repair`). Both decide on what they learnt from other nodes a while ago, and
meanwhile a writer may have come along who needs this very copy. So each promise *touches* the chunk: a put, and a pin
("I rely on your copy") that finds it, give it the next number of a counter. Whoever wants to remove takes a *mark* (the
counter) before he asks anybody anything, and the removal is refused when the chunk was touched after the mark. The
check and the beginning of the removal are one step; from then on the chunk counts as not held, and a put waits for the
end of the removal and stores it anew. A copy that is being copied to another node (*lent*) is not removed either, and
touched in the end: otherwise a collection could remove it, and miss the copy that was on its way.

Views fence it as well, because reads of db may be stale where views differ (a primary that does not know that it was
deposed). A sweep is for one view, and refused by a node that has another; and a node that served somebody with a newer
view than its own (*behind*) removes nothing until it has caught up.

No clock is involved, and nothing need survive a restart: marks of an earlier incarnation are refused, and a mark taken
after the restart is newer than every promise made before it.
"""

from __future__ import annotations

import asyncio
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from gostore.comm import Call, Reply, remote, service
from gostore.core.errors import BadRequest, Corrupt, Fenced, NotFound
from gostore.env import Env
from gostore.services.fs.peers import ViewSource

KEYS_MAX: Final = 4096
"""Chunk names in one message, 66 bytes each."""

_KEY = re.compile(r"[0-9a-f]{64}")


class Blobs(Protocol):
    """A node's blob store (``gostore.storage.blobs``)."""

    async def put(self, key: str, data: bytes) -> bool: ...
    def get(self, key: str) -> bytes: ...
    def has(self, key: str) -> bool: ...
    def size(self, key: str) -> int: ...
    def keys(self) -> Iterator[str]: ...
    async def remove(self, key: str) -> bool: ...
    def statistics(self) -> Mapping[str, int]: ...


def checked_key(key: Any) -> str:
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key
    raise BadRequest(f"chunk = {key!r:.100}: expected a sha256, 64 hexadecimal digits")


class Holder:
    """The chunks that this node holds.

    ``on_stored``: told the name of a new chunk, and whether the view is another than that of whoever sent it;
    ``on_corrupt``: the name of a damaged one (:mod:`.repair`). ``on_loose``: told that a chunk is here which somebody
    wanted to remove while it was still being stored, or which a node brought that collections do not ask
    (:mod:`.collector`).
    """

    def __init__(self, env: Env, blobs: Blobs, epoch: Callable[[], int]) -> None:
        """``epoch``: that of this node's view."""
        self._env = env
        self._blobs = blobs
        self._epoch = epoch
        self._heard = 0
        self._counter = 0
        # Chunk -> the counter at its last touch; only of chunks held, so the blob store bounds it.
        self._touched: dict[str, int] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._lent: dict[str, int] = {}
        self._arriving: dict[str, int] = {}
        self._loose: dict[str, None] = {}
        self.on_stored: Callable[[str, bool], None] = lambda _key, _outdated: None
        self.on_corrupt: Callable[[str], None] = lambda _key: None
        self.on_loose: Callable[[], None] = lambda: None
        self.removed = 0
        self.moved = 0

    def mark(self) -> int:
        """Promises made up to now do not prevent a removal that is asked for with this mark; later ones do."""
        return self._counter

    def heard(self, epoch: int) -> None:
        """Somebody with the view of this epoch relies on this node."""
        self._heard = max(self._heard, epoch)

    @property
    def behind(self) -> bool:
        """Others have a newer view."""
        return self._heard > self._epoch()

    def _touch(self, key: str) -> None:
        self._counter += 1
        self._touched[key] = self._counter

    def has(self, key: str) -> bool:
        return key not in self._leaving and self._blobs.has(key)

    def pin(self, key: str) -> bool:
        """Whether the chunk is held; if so it is not removed by anybody who took his mark before now."""
        if not self.has(key):
            return False
        self._touch(key)
        return True

    @contextmanager
    def lent(self, key: str) -> Iterator[None]:
        """While inside, the chunk is not removed; afterwards it is touched."""
        try:
            with _counted(self._lent, key):
                yield
        finally:
            self.pin(key)

    def keys(self, *, arriving: bool = False) -> list[str]:
        """Sorted. ``arriving``: with those that are being stored."""
        names = self._blobs.keys()
        held = [key for key in names if key not in self._leaving]
        return sorted({*held, *self._arriving}) if arriving and self._arriving else held

    def size(self, key: str) -> int:
        return self._blobs.size(key)

    def figures(self) -> tuple[int, int]:
        """(chunks, bytes) held."""
        figures = self._blobs.statistics()
        return figures["blobs"], figures["bytes"]

    async def put(self, key: str, data: bytes, epoch: int | None = None) -> bool:
        """Store a chunk; synced when it returns. False: it was here. ``epoch``: the sender's (None: this node's own).

        Raises ``Corrupt`` when name and data differ, ``Unavailable`` when the disk is full or fails.
        """
        epoch = self._epoch() if epoch is None else epoch
        try:
            with _counted(self._arriving, key):
                while (leaving := self._leaving.get(key)) is not None:
                    await asyncio.shield(leaving)
                self._touch(key)
                new = await self._blobs.put(key, data)
        finally:
            if key in self._loose and key not in self._arriving:
                del self._loose[key]
                self.on_loose()
        if new:
            self._env.events.publish("chunk_stored", chunk=key, bytes=len(data))
            self.on_stored(key, epoch != self._epoch())
        return new

    def get(self, key: str) -> bytes:
        """A whole chunk, verified. Raises ``NotFound`` and ``Corrupt`` (and has it healed)."""
        if not self.has(key):
            raise NotFound(f"{self._env.name} does not hold the chunk {key}")
        try:
            return self._blobs.get(key)
        except Corrupt:
            self.on_corrupt(key)
            raise

    async def remove(self, key: str, mark: int, *, moved: bool = False) -> bool:
        """Remove a chunk; False when it is not here, is lent, was touched after ``mark``, or the node is behind.

        ``moved``: its owners have it now; counted when it begins, as from then on the chunk is not listed.
        """
        if key in self._arriving:
            self._loose[key] = None
        if not self.has(key) or key in self._lent or self._touched.get(key, 0) > mark or self.behind:
            return False
        self.moved += moved
        with self._gone(key):
            await self._blobs.remove(key)
            self._touched.pop(key, None)
        self.removed += 1
        return True

    async def replace(self, key: str, data: bytes) -> None:
        """Put good ``data`` in the place of a damaged copy."""
        if not self.has(key):
            return
        with self._gone(key):
            await self._blobs.remove(key)
            await self._blobs.put(key, data)

    @contextmanager
    def _gone(self, key: str) -> Iterator[None]:
        """While inside, the chunk counts as not held, and puts of it wait."""
        done = self._leaving[key] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._leaving[key]
            done.set_result(None)


@contextmanager
def _counted(counts: dict[str, int], key: str) -> Iterator[None]:
    """While inside, ``counts`` has ``key``, as often as somebody is inside."""
    counts[key] = counts.get(key, 0) + 1
    try:
        yield
    finally:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]


@service("chunks")
class ChunkService:
    """A node's chunks for the other nodes: the remote functions between holders.

    A service of its own, whose functions ask nobody: however many requests of ``fs`` wait for chunks, there is room
    for the answers. ``intent_known``: see :mod:`.intents`. ``consider``: have a chunk's copies examined by repair.
    """

    def __init__(
        self,
        env: Env,
        holder: Holder,
        cls: ViewSource,
        incarnation: int,
        intent_known: Callable[[str], bool],
        consider: Callable[[str], None],
    ) -> None:
        self._env = env
        self._holder = holder
        self._cls = cls
        self._incarnation = incarnation
        self._intent_known = intent_known
        self._consider = consider

    @remote
    async def put(self, call: Call, key: str, repair: bool = False) -> bool:
        """Hold the chunk ``key``, whose bytes are the call's data; synced when answered. False: it was here."""
        self._holder.heard(call.epoch)
        new = await self._holder.put(checked_key(key), bytes(call.data), call.epoch)
        if new and repair:
            self._env.events.publish("chunk_copied", chunk=key, source=call.source, bytes=len(call.data))
            if call.source not in self._cls.view.online:
                self._holder.on_loose()  # while it was away, the chunk may have been collected everywhere else
        return new

    @remote
    async def get(self, call: Call, key: str, offset: int, size: int) -> Reply:
        """Bytes of a chunk; the whole is verified here before a part is given. Raises ``NotFound``, ``Corrupt``."""
        data = self._holder.get(checked_key(key))
        return Reply(len(data), memoryview(data)[offset : offset + size])

    @remote
    async def has(self, call: Call, keys: list[str]) -> list[bool]:
        """Which of the chunks are here. No promise: they may be gone a moment later."""
        return [self._holder.has(key) for key in _bounded(keys)]

    @remote
    async def pin(self, call: Call, keys: list[str]) -> list[Any]:
        """``[epoch, digest, [held, ...]]``: what is here is not removed on grounds older than this call."""
        self._holder.heard(call.epoch)
        held = [self._holder.pin(key) for key in _bounded(keys)]
        return [*self._cls.view.version, held]

    @remote
    async def names(self, call: Call, start: str = "", limit: int = KEYS_MAX, arriving: bool = False) -> list[str]:
        """Names of the chunks held, from ``start`` on, sorted; fewer than ``limit`` means that there are no more.

        ``arriving``: with those that are being stored.
        """
        keys = self._holder.keys(arriving=arriving)
        first = bisect_left(keys, start)
        return keys[first : first + min(max(limit, 1), KEYS_MAX)]

    @remote
    async def mark(self, call: Call) -> Any:
        """``[epoch, digest, incarnation, mark, moved]``; all but ``moved`` is to be given back to :meth:`sweep`.

        ``moved``: how many copies went from here to their owners in this life.
        """
        return [*self._cls.view.version, self._incarnation, self._holder.mark(), self._holder.moved]

    @remote
    async def sweep(self, call: Call, epoch: int, digest: int, incarnation: int, mark: int, keys: list[str]) -> Any:
        """Remove chunks that nothing references, as somebody found out after he took the mark.

        Returns ``[removed, bytes]``; those touched since are kept. Raises ``Fenced`` for the mark of another life or
        another view.
        """
        if incarnation != self._incarnation or (epoch, digest) != self._cls.view.version:
            raise Fenced(
                f"the mark is of incarnation {incarnation} and epoch {epoch}; "
                f"these are {self._incarnation} and {self._cls.view.epoch}"
            )
        removed = size_bytes = 0
        for key in _bounded(keys):
            size = self._holder.size(key) if self._holder.has(key) else 0
            if await self._holder.remove(key, mark):
                removed += 1
                size_bytes += size
        return [removed, size_bytes]

    @remote
    async def intents(self, call: Call, keys: list[str]) -> Any:
        """Which of the intents this node still works on."""
        return [self._intent_known(key) for key in keys[:KEYS_MAX]]

    @remote
    async def spread(self, call: Call, keys: list[str]) -> None:
        """These chunks, held here, lack copies on other owners: have them copied."""
        for key in _bounded(keys):
            self._consider(key)

    @remote
    async def suspect(self, call: Call, key: str) -> None:
        """The copy here may be damaged: verify it, and heal it if so."""
        try:
            self._holder.get(checked_key(key))
        except (NotFound, Corrupt):
            return


def _bounded(keys: Sequence[Any]) -> Iterable[str]:
    if len(keys) > KEYS_MAX:
        raise BadRequest(f"{len(keys)} chunks in one message; allowed are {KEYS_MAX}")
    return [checked_key(key) for key in keys]

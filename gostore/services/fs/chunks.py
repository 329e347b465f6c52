"""Chunks: immutable pieces of content, named by their sha256, held by the owners that the ring names.

Three parts: :class:`Holder` (this node's blobs, and the promises made about them), :class:`ChunkService` (the same, as
remote functions for the other nodes), :class:`Replicas` (storing on, and fetching from, whoever owns a chunk).

Who may remove a chunk
----------------------
A copy is removed for one of two reasons only: nothing references the chunk (:mod:`.collector`), or this node does not
own it and all owners hold it (:mod:`.repair`). Both decide on what they learnt from other nodes a while ago, and
meanwhile a writer may have come along who needs this very copy. So each promise *touches* the chunk: a put, and a pin
("I rely on your copy") that finds it, give it the next number of a counter. Whoever wants to remove takes a *mark* (the
counter) before he asks anybody anything, and the removal is refused when the chunk was touched after the mark. The
check and the beginning of the removal are one step; from then on the chunk counts as not held, and a put waits for the
end of the removal and stores it anew. A copy that is being copied to another node (*lent*) is not removed either, and
touched in the end: otherwise a collection could remove it, and miss the copy that was on its way. No clock is involved, and nothing need survive a restart: marks of an earlier
incarnation are refused, and a mark taken after the restart is newer than every promise made before it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from gostore.cluster.view import View
from gostore.cluster.watchers import Watchers
from gostore.comm import Call, Reply, remote, service
from gostore.core.errors import BadRequest, Corrupt, Fenced, GoStoreError, NotFound, Unavailable
from gostore.env import Env
from gostore.services.fs.header import Chunk

KEYS_MAX: Final = 4096
"""Chunk names in one message, 66 bytes each."""
PUT_TIMEOUT_S: Final = 4.0
"""For one chunk to reach an owner's disk."""
FETCH_TIMEOUT_S: Final = 2.0
"""For one holder to deliver a chunk, before the next is asked."""
ASK_TIMEOUT_S: Final = 0.5
"""For a node to say what it holds, when a person waits."""
STORE_ATTEMPTS_MAX: Final = 5
"""Rounds of storing, each with the view of its time. With the pauses between them about three seconds."""
STORE_BACK_OFF_S: Final = 0.2
"""First pause between rounds; doubles."""
STRAGGLER_S: Final = 1.0
"""How long the last owners are waited for once a majority has the chunks. Longer: writes stall longer on a node that
just died; shorter: more copies are made by repair."""
PIN_FIRST_BYTES: Final = 256 * 1024
"""Above this, owners are asked what they hold already before the bytes are sent."""

CHUNK_SIZE_BYTES_MAX: Final = 4 * 1024 * 1024
"""What the setting ``fs.chunk_size_bytes`` may be at most."""

_KEY = re.compile(r"[0-9a-f]{64}")


class ViewSource(Protocol):
    """Who knows the cluster (the cls service)."""

    @property
    def view(self) -> View: ...
    @property
    def watchers(self) -> Watchers: ...


class Peers(Protocol):
    """The part of an endpoint that fs uses."""

    @property
    def name(self) -> str: ...
    async def call(
        self,
        to: str,
        service: str,
        function: str,
        *args: Any,
        data: bytes | memoryview = b"",
        timeout_s: float | None = None,
    ) -> Reply: ...
    def cast(self, to: str, service: str, function: str, *args: Any) -> None: ...


class Blobs(Protocol):
    """A node's blob store (``gostore.storage.blobs``)."""

    async def put(self, key: str, data: bytes) -> bool: ...
    def get(self, key: str) -> bytes: ...
    def has(self, key: str) -> bool: ...
    def size(self, key: str) -> int: ...
    def keys(self) -> Iterator[str]: ...
    async def remove(self, key: str) -> bool: ...
    def statistics(self) -> Mapping[str, int]: ...


def owners_of(view: View, key: str) -> tuple[str, ...]:
    """The online owners of a chunk in the order of preference. Its place on the ring is that of its name's text."""
    return view.resolve(key.encode()).owners


def checked_key(key: Any) -> str:
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key
    raise BadRequest(f"chunk = {key!r:.100}: expected a sha256, 64 hexadecimal digits")


class Holder:
    """The chunks that this node holds. ``on_stored`` and ``on_corrupt`` are told a chunk's name (:mod:`.repair`)."""

    def __init__(self, env: Env, blobs: Blobs) -> None:
        self._env = env
        self._blobs = blobs
        self._counter = 0
        # Chunk -> the counter at its last touch; only of chunks held, so the blob store bounds it.
        self._touched: dict[str, int] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._lent: dict[str, int] = {}
        self.on_stored: Callable[[str], None] = lambda _key: None
        self.on_corrupt: Callable[[str], None] = lambda _key: None
        self.removed = 0

    def mark(self) -> int:
        """Promises made up to now do not prevent a removal that is asked for with this mark; later ones do."""
        return self._counter

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
        self._lent[key] = self._lent.get(key, 0) + 1
        try:
            yield
        finally:
            self._lent[key] -= 1
            if not self._lent[key]:
                del self._lent[key]
            self.pin(key)

    def keys(self) -> list[str]:
        """Sorted."""
        names = self._blobs.keys()
        return [key for key in names if key not in self._leaving]

    def size(self, key: str) -> int:
        return self._blobs.size(key)

    def figures(self) -> tuple[int, int]:
        """(chunks, bytes) held."""
        figures = self._blobs.statistics()
        return figures["blobs"], figures["bytes"]

    async def put(self, key: str, data: bytes) -> bool:
        """Store a chunk; synced when it returns. False: it was here.

        Raises ``Corrupt`` when name and data differ, ``Unavailable`` when the disk is full or fails.
        """
        while (leaving := self._leaving.get(key)) is not None:
            await asyncio.shield(leaving)
        self._touch(key)
        new = await self._blobs.put(key, data)
        if new:
            self._env.events.publish("chunk_stored", chunk=key, bytes=len(data))
            self.on_stored(key)
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

    async def remove(self, key: str, mark: int) -> bool:
        """Remove a chunk unless it is lent or was touched after ``mark`` (then False, as when it is not here)."""
        if not self.has(key) or key in self._lent or self._touched.get(key, 0) > mark:
            return False
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
        new = await self._holder.put(checked_key(key), bytes(call.data))
        if new and repair:
            self._env.events.publish("chunk_copied", chunk=key, source=call.source, bytes=len(call.data))
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
        held = [self._holder.pin(key) for key in _bounded(keys)]
        return [*self._cls.view.version, held]

    @remote
    async def names(self, call: Call, start: str = "", limit: int = KEYS_MAX) -> list[str]:
        """Names of the chunks held, from ``start`` on, sorted; fewer than ``limit`` means that there are no more."""
        keys = self._holder.keys()
        first = bisect_left(keys, start)
        return keys[first : first + min(max(limit, 1), KEYS_MAX)]

    @remote
    async def mark(self, call: Call) -> Any:
        """``[incarnation, mark]``, to be given back to :meth:`sweep`."""
        return [self._incarnation, self._holder.mark()]

    @remote
    async def sweep(self, call: Call, incarnation: int, mark: int, keys: list[str]) -> Any:
        """Remove chunks that nothing references, as somebody found out after he took the mark.

        Returns ``[removed, bytes]``; those touched since are kept. Raises ``Fenced`` for another life's mark.
        """
        if incarnation != self._incarnation:
            raise Fenced(f"the mark is of incarnation {incarnation}; this is {self._incarnation}")
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


class Replicas:
    """Storing chunks on their owners, and fetching them from whoever has them."""

    def __init__(self, env: Env, peers: Peers, cls: ViewSource, holder: Holder) -> None:
        self._env = env
        self._peers = peers
        self._cls = cls
        self._holder = holder

    # --- storing

    async def store(self, pieces: Sequence[tuple[Chunk, bytes]]) -> None:
        """Return when each chunk is synced on a majority of its owners; what then lacks is left to repair.

        An intent or a header must reference the chunks already. Raises ``Unavailable`` (definite).
        """
        for attempt in range(STORE_ATTEMPTS_MAX):
            if attempt:
                await asyncio.sleep(STORE_BACK_OFF_S * 2 ** (attempt - 1))
            pieces = await self._store_round(pieces)
            if not pieces:
                return
        raise Unavailable(
            f"{len(pieces)} chunks could not be stored on a majority of their owners in {STORE_ATTEMPTS_MAX} rounds; "
            "nothing was written, try again"
        )

    async def _store_round(self, pieces: Sequence[tuple[Chunk, bytes]]) -> list[tuple[Chunk, bytes]]:
        """One round with the present view; returns the pieces that did not reach a majority."""
        view = self._cls.view
        owners = {chunk.key: owners_of(view, chunk.key) for chunk, _ in pieces}
        plan: dict[str, dict[str, bytes]] = {}
        for chunk, data in pieces:
            for owner in owners[chunk.key]:
                plan.setdefault(owner, {})[chunk.key] = data
        acks: dict[str, list[str]] = {key: [] for key in owners}

        def lacking() -> list[str]:
            return [key for key, names in owners.items() if not names or len(acks[key]) <= len(names) // 2]

        tasks: list[asyncio.Task[None]] = []
        try:
            for node, wanted in plan.items():
                store = self._store_on(node, wanted, acks)
                tasks.append(self._env.tasks.start(store, name=f"store chunks on {node}"))
            waiting: Iterable[asyncio.Task[None]] = tasks
            while waiting and lacking():
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting:
                await asyncio.wait(waiting, timeout=STRAGGLER_S)
        finally:
            for task in tasks:
                task.cancel()
        missing = lacking()
        for key, names in acks.items():
            if key not in missing and len(names) < len(owners[key]):
                self._peers.cast(names[0], "chunks", "spread", [key])
        return [(chunk, data) for chunk, data in pieces if chunk.key in missing]

    async def _store_on(self, node: str, wanted: Mapping[str, bytes], acks: dict[str, list[str]]) -> None:
        """Put the chunks on one node, noting each success in ``acks``; ends at the first failure."""
        try:
            if node == self._peers.name:
                for key, data in wanted.items():
                    await self._holder.put(key, data)
                    acks[key].append(node)
                return
            held: list[bool] = [False] * len(wanted)
            if sum(map(len, wanted.values())) > PIN_FIRST_BYTES:
                reply = await self._peers.call(node, "chunks", "pin", list(wanted), timeout_s=PUT_TIMEOUT_S)
                held = reply.value[2]
            for (key, data), there in zip(wanted.items(), held, strict=True):
                if not there:
                    await self._peers.call(node, "chunks", "put", key, data=data, timeout_s=PUT_TIMEOUT_S)
                acks[key].append(node)
        except GoStoreError as error:
            self._env.log.info("chunks for %s: %s", node, error)

    # --- fetching

    async def fetch(self, chunk: Chunk, low: int = 0, high: int | None = None) -> bytes:
        """Bytes ``low <= position < high`` of a chunk, from the first node that delivers them intact.

        Owners are asked in the order of preference, then whoever else has it. Raises ``Unavailable``.
        """
        high = chunk.size if high is None else high
        if self._holder.has(chunk.key):
            try:
                return self._holder.get(chunk.key)[low:high]
            except (Corrupt, NotFound):
                pass  # it is being healed; others have it
        return await self._search(chunk.key, low, high - low, chunk.size)

    async def fetch_whole(self, key: str) -> bytes:
        """A whole chunk of unknown size from another node, verified. Raises ``Unavailable``."""
        return await self._search(key, 0, CHUNK_SIZE_BYTES_MAX, None)

    async def _search(self, key: str, offset: int, size: int, chunk_size: int | None) -> bytes:
        view = self._cls.view
        owners = [name for name in owners_of(view, key) if name != self._peers.name]
        silent: list[str] = []
        for name in owners:
            data = await self._fetch_from(name, key, offset, size, chunk_size, silent)
            if data is not None:
                return data
        others = [name for name in view.online if name not in owners and name != self._peers.name]
        for name in await self._who_has(key, others, silent):
            data = await self._fetch_from(name, key, offset, size, chunk_size, silent)
            if data is not None:
                return data
        raise Unavailable(
            f"no online node gave the chunk {key}"
            + (f"; no answer from {', '.join(dict.fromkeys(silent))}" if silent else "")
            + ": start the nodes that are down, or try again"
        )

    async def _fetch_from(
        self, name: str, key: str, offset: int, size: int, chunk_size: int | None, silent: list[str]
    ) -> bytes | None:
        """What one node gives, if it is right: by checksum when it is the whole, else its holder has checked it."""
        try:
            reply = await self._peers.call(name, "chunks", "get", key, offset, size, timeout_s=FETCH_TIMEOUT_S)
        except (NotFound, Corrupt):
            return None
        except GoStoreError:
            silent.append(name)
            return None
        data = bytes(reply.data)
        whole = chunk_size is None or size == chunk_size
        right = hashlib.sha256(data).hexdigest() == key if whole else len(data) == size
        if not right:
            self._peers.cast(name, "chunks", "suspect", key)
            return None
        return data

    async def holders(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """Of each chunk, the online nodes that have it, by name. Who does not answer soon is left out."""
        found: dict[str, list[str]] = {key: [] for key in keys}
        names = self._cls.view.online if keys else ()

        async def ask(name: str) -> list[bool]:
            held: list[bool] = []
            for first in range(0, len(keys), KEYS_MAX):
                some = list(keys[first : first + KEYS_MAX])
                try:
                    held += (await self._peers.call(name, "chunks", "has", some, timeout_s=ASK_TIMEOUT_S)).value
                except GoStoreError:
                    break
            return held

        for name, held in zip(
            names,
            await gather_bounded([lambda name=name: ask(name) for name in names]),  # type: ignore[misc]
            strict=True,
        ):
            for key, has in zip(keys, held, strict=False):
                if has:
                    found[key].append(name)
        return found

    async def _who_has(self, key: str, names: Sequence[str], silent: list[str]) -> list[str]:
        async def ask(name: str) -> bool:
            try:
                reply = await self._peers.call(name, "chunks", "has", [key], timeout_s=FETCH_TIMEOUT_S)
            except GoStoreError:
                silent.append(name)
                return False
            return bool(reply.value[0])

        answers = await gather_bounded([lambda name=name: ask(name) for name in names])  # type: ignore[misc]
        return [name for name, has in zip(names, answers, strict=True) if has]


PEERS_ASKED_AT_ONCE: Final = 16


async def gather_bounded(jobs: Sequence[Callable[[], Awaitable[Any]]], limit: int = PEERS_ASKED_AT_ONCE) -> list[Any]:
    """The results of the jobs, in order, of which at most ``limit`` run at a time; the first error ends them all."""
    gate = asyncio.Semaphore(limit)

    async def run(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(job)) for job in jobs]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]

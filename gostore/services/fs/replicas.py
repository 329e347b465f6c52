"""Storing chunks on their owners, and fetching them from whoever has them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from gostore.core.errors import Corrupt, GoStoreError, NotFound, Unavailable
from gostore.env import Env
from gostore.services.fs.chunks import KEYS_MAX, Holder
from gostore.services.fs.header import Chunk
from gostore.services.fs.peers import Peers, ViewSource, gather_bounded, owners_of

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


class Replicas:
    """Storing chunks on their owners, and fetching them from whoever has them."""

    def __init__(self, env: Env, peers: Peers, cls: ViewSource, holder: Holder) -> None:
        self._env = env
        self._peers = peers
        self._cls = cls
        self._holder = holder
        self.on_abandoned: Callable[[], None] = lambda: None
        """Told when nobody waits for the answer to a put any more, which may arrive still."""

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
        moved = self._cls.view.version != view.version  # these may be the owners of before
        for key, names in acks.items():
            if key not in missing and (moved or len(names) < len(owners[key])):
                self._env.tasks.start(self._spread(key, names), name="spread a chunk")
        return [(chunk, data) for chunk, data in pieces if chunk.key in missing]

    async def _spread(self, key: str, names: Sequence[str]) -> None:
        """Have a holder bring the chunk to the owners that lack it. Asked until one has heard: nobody else would notice
        before the view changes."""
        for name in names:
            try:
                await self._peers.call(name, "chunks", "spread", [key], timeout_s=PUT_TIMEOUT_S)
                return
            except GoStoreError as error:
                self._env.log.info("chunk %s lacks copies, and %s cannot be told: %s", key, name, error)

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
                    await self.put_on(node, key, data, timeout_s=PUT_TIMEOUT_S)
                acks[key].append(node)
        except GoStoreError as error:
            self._env.log.info("chunks for %s: %s", node, error)

    async def put_on(self, node: str, key: str, data: bytes, *, timeout_s: float, repair: bool = False) -> None:
        """Put a chunk on another node. Raises what the node answers, and ``Timeout``.

        Who does not wait for the answer leaves a request that may sit in some buffer while the network is cut, and
        arrive when the chunk's file is deleted and all collections are over. Each request to that node says which older
        ones nobody waits for (see :mod:`gostore.comm.calls`), and they are dropped: so collections have to follow.
        """
        try:
            await self._peers.call(node, "chunks", "put", key, repair, data=data, timeout_s=timeout_s)
        except BaseException as error:  # also a cancellation; it goes on to whoever waits
            if not (isinstance(error, GoStoreError) and error.definite):
                self.on_abandoned()
            raise

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

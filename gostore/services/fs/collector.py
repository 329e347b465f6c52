"""Collection of chunks that nothing references, and the check of what is there.

Why mark and sweep
------------------
A chunk may be shared: the same content in two files is one chunk. So whether it may go cannot be told from the file
that lost it. An index "chunk -> files" in db would tell, but would have to change with every header, across as many
shards as a file has chunks, and be repaired whenever it and the headers disagree. The headers are the truth; so they
are read. One scan serves all deletions since the last, on all nodes; it costs a page of db for every few hundred files,
and runs in the background at a bounded part of the time.

Why it is right
---------------
Chunks are referenced by *headers* and by *intents* (writers announce chunks before they store or rely on them, see
:mod:`.intents`). A collection, on whichever node, in this order:

1. gives up the intents of dead writers (their headers can no longer be committed);
2. takes a *mark* on each online node that has the same view, and then, from each, the list of the chunks it holds or is
   storing;
3. reads all intents, then all headers (linearizable reads): what they name is referenced;
4. if the view is the same still, tells each node to remove, of the chunks listed, those not referenced and not touched
   since the mark; a node that has another view by then refuses.

A chunk that some header names at the end was not removed: its writer's intent was committed before he touched any copy.
If that was before (3) read the intents, the chunk was seen there, or the intent had been consumed, so its header was
seen, for headers are read after intents and a consumption changes both at once. If it was later, the writer's touch
came after the mark, and (4) spares the chunk. A crash of anybody leaves chunks at worst, and the next collection takes
them. Nothing here reads a clock, and several collections may run at the same time.

A chunk that is still being stored (its disk stalls; its writer went on with a majority, and the file is deleted by now)
cannot be removed, so it counts as *kept*, and a collection that kept something is repeated; and its node wishes for
another when it is there. Nor does a copy escape that
repair makes meanwhile of a chunk which nothing references: when it arrives after its new holder was listed, its source
was lent or touched after the mark, so the source is kept. If the source is gone by the time it is listed, because the
owners have the chunk now, its node says that copies *moved* since the mark, and the collection is repeated as well.

What a node that is not reached holds stays until a later collection: one runs whenever a node comes online that holds
something, when a node that is not online brings a copy to an owner (the chunk may have been collected while it was
away), when one goes (what it was writing is nobody's), when a writer stopped waiting for a put that may arrive yet, and
when what became of a commit in doubt is settled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from gostore.core.errors import Conflict, Corrupt, Fenced, GoStoreError, TooLarge
from gostore.core.keyvalue import Entry, KeyValue, PointRead, Write
from gostore.env import Env
from gostore.services.fs.chunks import KEYS_MAX
from gostore.services.fs.directory import ENTRIES, INTENTS, Tree
from gostore.services.fs.header import Chunk, Header, chunks_from_value
from gostore.services.fs.peers import Peers, ViewSource, gather_bounded, owners_of
from gostore.services.fs.transactions import Transactions

T = TypeVar("T")

SCAN_PAGE: Final = 256
"""Headers read at a time; with inline data about 1 MiB. Halved while a page is too large for a message."""
NODE_TIMEOUT_S: Final = 10.0
"""For one node to answer one question of a collection."""
COLLECT_DELAY_S: Final = 0.2
"""Pause between a wish and the collection, so that many deletions share one."""
COLLECT_SHARE: Final = 4
"""A collection that was work for t is followed by a pause of four times t: at most a fifth of the time goes into it."""
QUESTION_WORK_S_MAX: Final = 0.5
"""What one question (for a page of names or of headers, or to remove some chunks) counts as work at most. A page is a
matter of milliseconds: an answer that takes longer was mostly waited for, as the network was cut, a node paused, or a
shard without a leader. (Removals may take longer; but each chunk is removed only once.) More: after an outage, chunks
wait for several times its length; less: where pages really take as long, the pauses are too short for them."""
COLLECT_ATTEMPTS_MAX: Final = 8
"""Attempts, after a wish, to reach everybody and to find nothing in use, before it becomes a matter of minutes."""
COLLECT_RETRY_S: Final = (0.5, 8.0)
"""Pause between these attempts: from, doubling, to. A new wish ends it."""
COLLECT_REST_S: Final = 60.0
"""Pause between the later ones."""
ABANDONED_S: Final = 15.0
"""Longer than nodes wait for each other's answers: then a request says that nobody waits for what was sent before."""
NAMED_MAX: Final = 20
"""Chunks that a check names of each kind; all are counted."""


@dataclass(slots=True)
class Work:
    """How long others worked on questions that were asked one after another."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def question(self) -> Iterator[None]:
        """Add the time inside, whatever comes of it: who fails to answer may have worked as well."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            yield
        finally:
            self.seconds += min(loop.time() - begun_s, QUESTION_WORK_S_MAX)


@dataclass(slots=True)
class Collected:
    """``kept``: unreferenced, but touched meanwhile; or nobody knows, as they moved. ``unreached``: nodes that did not
    take part. ``work``: what db and those who answered had of it."""

    chunks: int = 0
    bytes: int = 0
    kept: int = 0
    intents: int = 0
    unreached: list[str] = field(default_factory=list)
    work: Work = field(default_factory=Work)

    def to_wire(self) -> dict[str, Any]:
        return {
            "chunks": self.chunks,
            "bytes": self.bytes,
            "kept": self.kept,
            "intents": self.intents,
            "unreached": self.unreached,
        }


class Collector:
    """Collections and checks of one node, on wish or on demand."""

    def __init__(
        self, env: Env, peers: Peers, cls: ViewSource, kv: KeyValue, tree: Tree, transactions: Transactions
    ) -> None:
        self._env = env
        self._peers = peers
        self._cls = cls
        self._kv = kv
        self._tree = tree
        self._transactions = transactions
        self._wanted = asyncio.Event()
        self._late: asyncio.TimerHandle | None = None
        self._running = False
        self.collections = 0
        self.collected = 0

    @property
    def idle(self) -> bool:
        """No collection runs here or is going to, but in a matter of minutes."""
        return not self._wanted.is_set() and not self._running

    def want(self) -> None:
        """Something may have become collectable: collect soon."""
        self._wanted.set()

    def want_twice(self) -> None:
        """Something may be on its way that nobody waits for: collect soon, and when no older request is waited for."""
        self.want()
        if self._late is not None:
            self._late.cancel()
        self._late = asyncio.get_running_loop().call_later(ABANDONED_S, self.want)

    async def run(self) -> None:
        """Fulfil wishes until cancelled. One that is not fulfilled is not forgotten: only the pauses get longer."""
        attempt = 0  # since the last wish, or the last collection that left nothing
        while True:
            if not attempt or await self._wished_within(_pause_s(attempt)):
                await self._wanted.wait()
                attempt = 0
            await asyncio.sleep(COLLECT_DELAY_S)
            # Before it begins: a wish from now on may not be served by it.
            self._wanted.clear()
            self._running = True
            done = Collected()
            try:
                await self.collect(done)
                unfinished = bool(done.unreached or done.kept)
            except GoStoreError as error:
                self._env.log.info("collection: %s", error)
                unfinished = True
            attempt = min(attempt + 1, COLLECT_ATTEMPTS_MAX) if unfinished else 0
            self._running = 0 < attempt < COLLECT_ATTEMPTS_MAX
            await asyncio.sleep(done.work.seconds * COLLECT_SHARE)

    async def _wished_within(self, pause_s: float) -> bool:
        try:
            async with asyncio.timeout(pause_s):
                await self._wanted.wait()
        except TimeoutError:
            return False
        return True

    # --- collecting

    async def collect(self, done: Collected | None = None) -> Collected:
        """Remove what nothing references, everywhere; ``done`` is filled while it goes on.

        Raises what db raises; then nothing was removed.
        """
        done = Collected() if done is None else done
        await self._tree.ready()
        done.intents = await self._reap_intents(done.work)
        view = self._cls.view
        marks = await self._ask_all(view.online, self._mark, done)
        held = await self._ask_all(tuple(marks), lambda node, work: self._names(node, work, arriving=True), done)
        if any(held.values()):
            referenced = await self._referenced(done.work)
            if self._cls.view.version != view.version:
                raise Fenced("the view changed during the collection; nothing was removed")
            for node, keys in held.items():
                await self._sweep(node, marks[node][:4], [key for key in keys if key not in referenced], done)
        # An owner may have been listed before a copy came to it, and the source when it was gone: then it was missed.
        reached = [node for node in marks if node not in done.unreached]
        for node, (*_, incarnation, _, moved) in (await self._ask_all(reached, self._mark, done)).items():
            done.kept += moved - marks[node][4] if incarnation == marks[node][2] else 1
        self.collections += 1
        self.collected += done.chunks
        return done

    async def _ask_all(
        self, nodes: Sequence[str], ask: Callable[[str, Work], Awaitable[T]], done: Collected
    ) -> dict[str, T]:
        """The answers of those who answer; the others are noted as unreached."""
        longest_s = 0.0  # they work at the same time

        async def one(node: str) -> T | None:
            nonlocal longest_s
            work = Work()
            try:
                answer = await ask(node, work)
            except GoStoreError:
                done.unreached.append(node)  # and it is no work to wait for somebody who is silent
                return None
            longest_s = max(longest_s, work.seconds)
            return answer

        answers = await gather_bounded([lambda node=node: one(node) for node in nodes])  # type: ignore[misc]
        done.work.seconds += longest_s
        return {node: answer for node, answer in zip(nodes, answers, strict=True) if answer is not None}

    async def _mark(self, node: str, work: Work) -> list[int]:
        view = self._cls.view
        with work.question():
            mark: list[int] = (await self._peers.call(node, "chunks", "mark", timeout_s=NODE_TIMEOUT_S)).value
        if tuple(mark[:2]) != view.version:
            raise Fenced(f"{node} has the view of epoch {mark[0]}, not {view.epoch}")
        return mark

    async def _sweep(self, node: str, mark: Sequence[int], loose: list[str], done: Collected) -> None:
        for first in range(0, len(loose), KEYS_MAX):
            keys = loose[first : first + KEYS_MAX]
            try:
                with done.work.question():
                    reply = await self._peers.call(node, "chunks", "sweep", *mark, keys, timeout_s=NODE_TIMEOUT_S)
            except GoStoreError:
                done.unreached.append(node)
                return
            removed, size_bytes = reply.value
            done.chunks += removed
            done.bytes += size_bytes
            done.kept += len(keys) - removed

    async def _names(self, node: str, work: Work, *, arriving: bool = False) -> list[str]:
        """The chunks that a node holds, or also those that it is storing."""
        found: list[str] = []
        while True:
            args = (found[-1] + "0" if found else "", KEYS_MAX, arriving)
            with work.question():
                reply = await self._peers.call(node, "chunks", "names", *args, timeout_s=NODE_TIMEOUT_S)
            found += reply.value
            if len(reply.value) < KEYS_MAX:
                return found

    async def _referenced(self, work: Work) -> frozenset[str]:
        """Chunks named by intents, then by headers: in this order, see the module."""
        found: list[str] = []
        async for entry in self._scan(INTENTS, work):
            found += [chunk.key for chunk in _intent_chunks(entry)]
        async for entry in self._scan(ENTRIES, work):
            found += [chunk.key for chunk in _entry_chunks(entry)]
        return frozenset(found)

    async def _reap_intents(self, work: Work) -> int:
        """Give up the intents whose writers are gone; returns how many."""
        by_node: dict[str, list[Entry]] = {}
        async for entry in self._scan(INTENTS, work):
            node = entry.value.get("node") if isinstance(entry.value, dict) else None
            by_node.setdefault(str(node), []).append(entry)
        reaped = 0
        for node, entries in by_node.items():
            for first in range(0, len(entries), KEYS_MAX):
                some = entries[first : first + KEYS_MAX]
                alive = await self._alive(node, [entry.key for entry in some])
                for entry, works in zip(some, alive, strict=True):
                    if not works:
                        with contextlib.suppress(Conflict):  # consumed or extended after all
                            await self._transactions.commit(
                                [PointRead(INTENTS, entry.key, entry.version)], [Write("delete", INTENTS, entry.key)]
                            )
                            reaped += 1
        return reaped

    async def _alive(self, node: str, keys: list[str]) -> Sequence[bool]:
        if node not in self._cls.view.online:
            return [False] * len(keys)
        try:
            reply = await self._peers.call(node, "chunks", "intents", keys, timeout_s=NODE_TIMEOUT_S)
        except GoStoreError:
            return [True] * len(keys)  # it may well work on them
        answer: list[bool] = reply.value
        return answer

    async def _scan(self, container: str, work: Work) -> AsyncIterator[Entry]:
        """Everything in a container, page by page."""
        start: str | None = ""
        limit = SCAN_PAGE
        while start is not None:
            try:
                with work.question():
                    page = await self._kv.scan(container, start=start, limit=limit)
            except TooLarge:
                if limit == 1:
                    raise
                limit //= 2
                continue
            for entry in page.entries:
                yield entry
            start = page.next_start

    # --- checking

    async def check(self) -> dict[str, Any]:
        """Count what is there and what is wrong; exact while nobody writes.

        ``lost``: chunks of files that no online node holds. ``under_replicated``: held by fewer owners than there are.
        ``orphans``: chunks held somewhere that nothing references. ``dangling``: entries without their directory,
        directories without a link. ``corrupt``: entries that cannot be read. ``unreached``: nodes that did not answer.
        """
        await self._tree.ready()
        view, work = self._cls.view, Work()
        holders: dict[str, list[str]] = {}
        unreached: list[str] = []
        for node in view.online:
            try:
                for key in await self._names(node, work):
                    holders.setdefault(key, []).append(node)
            except GoStoreError:
                unreached.append(node)
        intents = [entry async for entry in self._scan(INTENTS, work)]
        announced = frozenset(chunk.key for entry in intents for chunk in _intent_chunks(entry))
        census = Census()
        async for entry in self._scan(ENTRIES, work):
            census.add(entry)
        lost = [key for key in census.chunks if key not in holders]
        under = [
            key
            for key in census.chunks
            if key in holders and any(owner not in holders[key] for owner in owners_of(view, key))
        ]
        orphans = [key for key in sorted(holders) if key not in census.chunks and key not in announced]
        return {
            "epoch": view.epoch,
            **census.figures(),
            "intents": len(intents),
            "lost": len(lost),
            "lost_chunks": lost[:NAMED_MAX],
            "under_replicated": len(under),
            "orphans": len(orphans),
            "orphan_chunks": orphans[:NAMED_MAX],
            "unreached": unreached,
        }


def _pause_s(attempt: int) -> float:
    """After so many attempts in vain."""
    first_s, most_s = COLLECT_RETRY_S
    return min(first_s * 2 ** (attempt - 1), most_s) if attempt < COLLECT_ATTEMPTS_MAX else COLLECT_REST_S


class Census:
    """Counts the entries of the container ``fs``, and looks whether they hang together."""

    def __init__(self) -> None:
        self.chunks: dict[str, int] = {}
        self._files = 0
        self._bytes = 0
        self._corrupt = 0
        self._own: dict[str, None] = {}
        self._linked: dict[str, None] = {}
        self._homes: dict[str, int] = {}

    def add(self, entry: Entry) -> None:
        directory_id, _, name = entry.key.partition("/")
        if not name:
            self._own[directory_id] = None
            return
        self._homes[directory_id] = self._homes.get(directory_id, 0) + 1
        try:
            header = Header.from_value(entry.key, entry.value)
        except Corrupt:
            self._corrupt += 1
            return
        if header.is_directory:
            self._linked[header.directory_id] = None
            return
        self._files += 1
        self._bytes += header.size
        for chunk in header.chunks:
            self.chunks[chunk.key] = chunk.size

    def figures(self) -> dict[str, int]:
        dangling = sum(count for directory_id, count in self._homes.items() if directory_id not in self._own)
        dangling += sum(directory_id not in self._own for directory_id in self._linked)
        dangling += sum(id_ not in self._linked for id_ in self._own if id_ != "root")
        return {
            "files": self._files,
            "directories": len(self._own),
            "bytes": self._bytes,
            "chunks": len(self.chunks),
            "corrupt": self._corrupt,
            "dangling": dangling,
        }


def _entry_chunks(entry: Entry) -> tuple[Chunk, ...]:
    """Raises ``Corrupt``: who cannot read a header does not know what it references, and must not collect."""
    if entry.key.endswith("/"):
        return ()
    return Header.from_value(entry.key, entry.value).chunks


def _intent_chunks(entry: Entry) -> tuple[Chunk, ...]:
    listed = entry.value.get("chunks", []) if isinstance(entry.value, dict) else []
    return chunks_from_value(entry.key, listed)

"""The distributed file system, as remote functions. Any node takes any call and does it itself: what a node needs of
others it asks db and the holders of chunks for, so there is no forwarding and no file has a master.

How it is built: :mod:`.directory` (names and headers, as objects of db), :mod:`.chunks` (content on the ring),
:mod:`.intents` and :mod:`.uploads` (how the two come together), :mod:`.collector` (what nothing references goes),
:mod:`.repair` (what lacks copies gets them), :mod:`.rest` (the same over HTTP).

*Local*: the original could force one node to answer from what it holds itself. Here the names on the way are looked up
as always, and then the entry is asked of this node's own replica of its shard, and the chunks of its own blob store.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

from gostore.cluster.members import MemberChange
from gostore.cluster.ring import token_of
from gostore.cluster.view import View
from gostore.comm import Call, Endpoint, Reply, remote, service
from gostore.config import NodeConfig
from gostore.core.errors import BadRequest, Conflict, IsADirectory, NotFound, NotSupported, Unavailable
from gostore.core.keyvalue import KeyValue, Versioned
from gostore.env import Env
from gostore.services.fs.chunks import Blobs, ChunkService, Holder
from gostore.services.fs.collector import Collector
from gostore.services.fs.directory import LIST_LIMIT_MAX, Removed, Tree
from gostore.services.fs.header import Chunk, Header
from gostore.services.fs.intents import Intents
from gostore.services.fs.peers import ViewSource, gather_bounded, owners_of
from gostore.services.fs.repair import Repair
from gostore.services.fs.replicas import Replicas
from gostore.services.fs.transactions import Transactions
from gostore.services.fs.uploads import Sessions, Workshop, Writer

READ_SIZE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Bytes that one call of ``read`` gives at most; the caller goes on at the offset behind them."""
READ_ATTEMPTS_MAX: Final = 4
"""Readings of a file that is overwritten, and whose old chunks are collected, while it is read."""
CHUNKS_AHEAD: Final = 4
"""Chunks that one read fetches at a time."""

LocalReplica = Callable[[str, str], Versioned | None]
"""``(container, key)`` -> what this node's own replica of the shard has; None when it holds none."""


@service("fs")
class FsService:
    """The file system of one node. Register it at the endpoint; it registers the service ``chunks`` itself.

    ``kv``: db, in this process. ``local``: this node's own replicas of db's shards, for what asks for local answers.
    """

    def __init__(
        self,
        env: Env,
        endpoint: Endpoint,
        cls: ViewSource,
        kv: KeyValue,
        blobs: Blobs,
        config: NodeConfig,
        *,
        local: LocalReplica | None = None,
    ) -> None:
        self._env = env
        self._cls = cls
        self._local = local
        self._config = config.fs
        # Request ids must differ between the lives of a node.
        self._transactions = Transactions(env, kv, f"{env.name}.{endpoint.incarnation}.fs")
        self.tree = Tree(kv, self._transactions, path_size_bytes_max=config.fs.path_size_bytes_max)
        self.holder = Holder(env, blobs, lambda: cls.view.epoch)
        self.replicas = Replicas(env, endpoint, cls, self.holder)
        self.intents = Intents(env.name, kv, self._transactions)
        self.collector = Collector(env, endpoint, cls, kv, self.tree, self._transactions)
        in_flight_max = config.fs.repairs_in_flight_max
        self.repair = Repair(env, endpoint, cls, self.holder, self.replicas, in_flight_max=in_flight_max)
        self._shop = Workshop(
            env, config.fs, self._transactions, self.tree, self.intents, self.replicas, self.collector
        )
        self._sessions = Sessions(self._shop)
        self._transactions.on_sealed = self.holder.on_loose = self.collector.want
        self.replicas.on_abandoned = self.collector.want_twice
        endpoint.register(
            ChunkService(env, self.holder, cls, endpoint.incarnation, self.intents.known, self.repair.consider)
        )
        self._unwatch: Callable[[], None] = lambda: None
        self._counts = dict.fromkeys(("reads", "read_bytes", "writes", "written_bytes", "deletes"), 0)

    # --- life

    async def start(self) -> None:
        """Begin to look after the chunks that are here. db need not be ready yet."""
        self._unwatch = self._cls.watchers.watch(self._view_changed)
        for name, loop in (("repair", self.repair), ("collector", self.collector), ("uploads", self._sessions)):
            self._env.tasks.start(loop.run(), name=f"fs {name}")
        self._look_around(self._cls.view)

    async def stop(self) -> None:
        """Stop watching; the tasks end with the node's."""
        self._unwatch()

    def _view_changed(self, old: View, new: View, _changes: Sequence[MemberChange]) -> None:
        me = self._env.name
        self.repair.view_changed()
        # A view may skip the epoch in which somebody was offline: then it shows him in another life.
        stayed = [name for name in old.online if name in new.online and _life(old, name) == _life(new, name)]
        if me not in stayed:
            self._look_around(new)
        first = next((name for name in new.online if name == me or name in stayed), "")
        if first == me and len(stayed) < len(old.online):
            # Somebody has gone, perhaps in the middle of a write; one of those left cleans up behind him.
            self.collector.want()

    def _look_around(self, view: View) -> None:
        """This node is online now: what it holds may have been deleted while it was not."""
        self.repair.view_changed()
        if self._env.name in view.online and self.holder.keys(arriving=True):
            self.collector.want()

    def status(self) -> dict[str, Any]:
        """``chunks``, ``bytes``: held here. ``repair``: this node's share. ``unsettled``: what is not as it should be.

        Cheap: it asks nobody.
        """
        repair = self.repair.status()
        chunks, size_bytes = self.holder.figures()
        unsettled = []
        if not repair.idle:
            unsettled.append(f"repair: {repair.missing} copies are missing, {repair.pending} chunks to look at")
        if not self.collector.idle:
            unsettled.append("collector: chunks wait to be collected")
        if self._transactions.sealing:
            unsettled.append(f"commits: nobody knows yet what became of {self._transactions.sealing}")
        return {
            "chunks": chunks,
            "bytes": size_bytes,
            "repair": {"active": not repair.idle, "missing": repair.missing, "copied": repair.copied},
            "unsettled": unsettled,
        }

    def statistics(self) -> dict[str, int]:
        return {
            **self._counts,
            "conflicts": self._transactions.conflicts,
            "intents_open": len(self.intents),
            "uploads_open": len(self._sessions),
            "repairs_pending": self.repair.status().pending,
            "chunks_copied": self.repair.copied,
            "chunks_healed": self.repair.healed,
            "surplus_removed": self.repair.removed,
            "chunks_removed": self.holder.removed,
            "collections": self.collector.collections,
        }

    # --- in this process (REST uses these)

    def writer(self, path: str, type_: str = "") -> Writer:
        """A write of a file in pieces. Raises ``BadRequest``."""
        return Writer(self._shop, path, type_)

    async def committed(self, writer: Writer) -> Header:
        header = await writer.commit()
        self._counts["writes"] += 1
        self._counts["written_bytes"] += header.size
        return header

    async def find(self, path: str) -> Header:
        return await self.tree.find(path)

    async def find_file(self, path: str) -> Header:
        """Raises ``IsADirectory``, ``NotFound``."""
        header = await self.tree.find(path)
        if header.is_directory:
            raise IsADirectory(f"{header.path} is a directory; list it")
        return header

    async def remove(self, path: str, *, recursive: bool = False) -> Removed:
        removed = Removed()
        try:
            await self.tree.remove(path, recursive=recursive, removed=removed)
        finally:
            if removed.chunks:
                self.collector.want()
        self._counts["deletes"] += 1
        self._env.events.publish("fs_delete", path=path, entries=removed.entries)
        return removed

    async def read_bytes(self, header: Header, offset: int, size: int) -> bytes:
        """Bytes of the version that ``header`` describes. Raises ``Unavailable`` when a chunk cannot be had."""
        content = header.content
        if content is None:
            raise IsADirectory(f"{header.path} is a directory; list it")
        if content.inline is not None:
            return content.inline[offset : offset + size]

        def fetch(chunk: Chunk, low: int, high: int) -> Callable[[], Any]:
            return lambda: self.replicas.fetch(chunk, low, high)

        return b"".join(await gather_bounded([fetch(*part) for part in content.covering(offset, size)], CHUNKS_AHEAD))

    async def stream(self, header: Header, offset: int, size: int) -> AsyncGenerator[bytes, None]:
        """The same, in pieces of at most a few MiB."""
        end = min(offset + size, header.size)
        while offset < end:
            piece = await self.read_bytes(header, offset, min(self._config.chunk_size_bytes, end - offset))
            self._counts["read_bytes"] += len(piece)
            yield piece
            offset += len(piece)

    async def _read(self, path: str, offset: int, size: int, version: int) -> tuple[Header, bytes]:
        for attempt in range(1, READ_ATTEMPTS_MAX + 1):
            header = await self.find_file(path)
            if version and header.version != version:
                raise Conflict(f"{header.path} has version {header.version} now, not {version}")
            try:
                return header, await self.read_bytes(header, offset, size)
            except Unavailable:
                # Were its chunks collected because it is no longer the newest version?
                if attempt == READ_ATTEMPTS_MAX or (await self.find_file(path)).etag == header.etag:
                    raise
        raise AssertionError("unreachable")

    async def locate(self, path: str) -> dict[str, Any]:
        """Where a file or directory lies: its entry on the ring, and of each chunk who should hold it and who does."""
        header, directory_id = await self.tree.find_home(path)
        view = self._cls.view
        place = directory_id.encode()
        holders = await self.replicas.holders([chunk.key for chunk in header.chunks])
        return {
            "path": header.path,
            "token": f"{token_of(place):016x}",
            "owners": [*view.resolve(place).owners],
            "chunks": [
                {
                    "chunk": chunk.key,
                    "size": chunk.size,
                    "token": f"{token_of(chunk.key.encode()):016x}",
                    "owners": [*owners_of(view, chunk.key)],
                    "held": holders[chunk.key],
                }
                for chunk in header.chunks
            ],
        }

    async def _find_local(self, path: str) -> Header:
        if self._local is None:
            raise NotSupported(f"{self._env.name} cannot tell its own replica of db from the others'")
        header = await self.tree.find_local(path, self._local)
        if header is None:
            raise NotFound(f"{self._env.name} itself holds nothing of {path}")
        return header

    async def _read_local(self, path: str, offset: int, size: int) -> tuple[Header, bytes]:
        header = await self._find_local(path)
        if header.content is None:
            raise IsADirectory(f"{header.path} is a directory; list it")
        if header.content.inline is not None:
            return header, header.content.inline[offset : offset + size]
        parts = header.content.covering(offset, size)
        return header, b"".join(self.holder.get(chunk.key)[low:high] for chunk, low, high in parts)

    # --- remote functions

    @remote
    async def write(self, call: Call, path: str, type: str = "") -> dict[str, Any]:
        """Write a whole file, whose content is the call's data; returns its header."""
        writer = self.writer(path, type)
        writer.take(call.data)
        return (await self.committed(writer)).to_wire()

    @remote
    async def begin(self, call: Call, path: str, type: str = "") -> str:
        """Begin to write a file that is too large for one message; returns the name of the upload, known here only."""
        return self._sessions.begin(path, type)

    @remote
    async def append(self, call: Call, upload: str, offset: int) -> int:
        """Add the call's data to an upload that has ``offset`` bytes; returns its size."""
        return await self._sessions.append(upload, offset, call.data)

    @remote
    async def commit(self, call: Call, upload: str) -> dict[str, Any]:
        """End an upload: the file exists, with this content, from now on. Returns its header."""
        header = await self._sessions.commit(upload)
        self._counts["writes"] += 1
        self._counts["written_bytes"] += header.size
        return header.to_wire()

    @remote
    async def abort(self, call: Call, upload: str) -> None:
        """End an upload: nothing of it stays."""
        await self._sessions.abort(upload)

    @remote
    async def read(
        self, call: Call, path: str, offset: int = 0, size: int = -1, version: int = 0, local: bool = False
    ) -> Reply:
        """The header as value, bytes as data: ``size`` of them (-1: to the end), at most 4 MiB a call.

        ``version``: refuse any other (``Conflict``); 0 takes the newest.
        """
        if offset < 0 or size < -1 or version < 0:
            raise BadRequest(
                f"offset = {offset}, size = {size}, version = {version}: allowed are 0 and more, and -1 as size"
            )
        size = READ_SIZE_BYTES_MAX if size == -1 else min(size, READ_SIZE_BYTES_MAX)
        header, data = await (
            self._read_local(path, offset, size) if local else self._read(path, offset, size, version)
        )
        self._counts["reads"] += 1
        self._counts["read_bytes"] += len(data)
        return Reply(header.to_wire(), data)

    @remote
    async def header(self, call: Call, path: str, local: bool = False) -> dict[str, Any]:
        """The header of a file or directory. Raises ``NotFound``, ``NotADirectory``."""
        return (await (self._find_local(path) if local else self.tree.find(path))).to_wire()

    @remote
    async def exists(self, call: Call, path: str) -> bool:
        """Whether there is a file or directory."""
        try:
            await self.tree.find(path)
        except NotFound:
            return False
        return True

    @remote
    async def mkdir(self, call: Call, path: str, exist_ok: bool = True) -> dict[str, Any]:
        """Make a directory and its missing parents; returns its header."""
        return (await self.tree.mkdir(path, exist_ok=exist_ok)).to_wire()

    @remote
    async def list(self, call: Call, path: str, start: str = "", limit: int = LIST_LIMIT_MAX) -> dict[str, Any]:
        """``children``: name, directory, type, size, version, mtime_ms of each entry, by name. ``next_start``: what to
        give as ``start`` for the next page, None at the end."""
        page = await self.tree.children(path, start, limit)
        return {"children": [child.to_child() for child in page.children], "next_start": page.next_start}

    @remote
    async def delete(self, call: Call, path: str, recursive: bool = False) -> dict[str, Any]:
        """Delete a file or directory; returns how many ``entries`` are gone. Raises ``NotEmpty`` (nothing happened)."""
        return {"entries": (await self.remove(path, recursive=recursive)).entries}

    @remote
    async def stat(self, call: Call, path: str) -> dict[str, Any]:
        """The header, and ``place``: see :meth:`locate`."""
        return {**(await self.tree.find(path)).to_wire(), "place": await self.locate(path)}

    @remote
    async def collect(self, call: Call) -> dict[str, Any]:
        """Remove, on all nodes, the chunks that nothing references; returns what was done."""
        return (await self.collector.collect()).to_wire()

    @remote
    async def check(self, call: Call) -> dict[str, Any]:
        """Count files, chunks, and what is wrong with them: see :meth:`.collector.Collector.check`."""
        return await self.collector.check()


def _life(view: View, name: str) -> int:
    return view.members[name].incarnation

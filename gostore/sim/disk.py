"""A disk in memory that keeps what was written and what is on the medium apart.

Theory of operation
===================

A write reaches the page cache at once and the medium at the next sync; a name that is created, renamed or removed
reaches it at the next sync of its directory. Both worlds read the page cache. So each file has two contents, ``cached``
and ``durable``, and the row of writes that lead from one to the other; each directory has two lists of entries and the
row of changes that lead from one to the other. A sync takes its time (``sync_s``), one after the other as on a disk
with one queue, and carries what had been written when it was called.

*Power cut*: the page cache is gone. For each file, the writes not synced are cut at sector borders, and the random
numbers decide for each piece whether it is on the medium, not there, or there in part: all of it, nothing, a prefix, or
any mixture, since pages reach the medium in no promised order. A piece that is missing before one that is there reads
as zeros or as old garbage. For each directory a prefix of the changes not synced survives (a journal keeps their order;
different directories are independent, which is more than today's file systems do, and all that POSIX promises).

*Process end* (``close``, ``process_died``): the page cache stays, and what was not synced may still be lost by a later
power cut.

*Failed sync*: the writes it was to carry are forgotten: still in the page cache, never on the medium, and the next sync
reports success without them, as Linux does (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).

Files opened before a power cut or the end of the process raise ``OSError`` afterwards.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from gostore.core.ports import Rng

# What a disk writes atomically.
SECTOR_SIZE_BYTES: Final = 512

_Change = TypeVar("_Change")


class _Pending(Generic[_Change]):
    """What was changed and is not on the medium, in order.

    Changes are numbered, so that a sync carries those up to its call, whatever other syncs do meanwhile.
    """

    __slots__ = ("changes", "number")

    def __init__(self) -> None:
        self.changes: list[_Change] = []
        self.number = 0
        """Of the next change."""

    def add(self, change: _Change) -> None:
        self.changes.append(change)
        self.number += 1

    def take(self, number: int) -> list[_Change]:
        """The changes below a number; they are no longer pending."""
        count = max(0, number - self.number + len(self.changes))
        taken, self.changes = self.changes[:count], self.changes[count:]
        return taken


# A write of bytes at an offset, or a truncation to a size.
_Write = tuple[int, bytes | None]


class _Inode:
    """A file's content; it lives on while a directory or a handle knows it."""

    __slots__ = ("cached", "durable", "pending")

    def __init__(self) -> None:
        self.cached = bytearray()
        self.durable = bytearray()
        self.pending: _Pending[_Write] = _Pending()

    def write(self, data: bytes) -> int:
        offset = len(self.cached)
        self.cached += data
        self.pending.add((offset, data))
        return offset

    def truncate(self, size: int) -> None:
        _apply(self.cached, (size, None))
        self.pending.add((size, None))


# Name -> what it stands for from now on; a rename inside of a directory is one change, hence atomic.
_Names = dict[str, "_Inode | _Directory | None"]


class _Directory:
    __slots__ = ("cached", "durable", "pending")

    def __init__(self) -> None:
        self.cached: dict[str, _Node] = {}
        self.durable: dict[str, _Node] = {}
        self.pending: _Pending[_Names] = _Pending()

    def change(self, change: _Names) -> None:
        _apply_names(self.cached, change)
        self.pending.add(change)


_Node = _Inode | _Directory


class SimFile:
    """A file of a :class:`SimDisk`, opened by one life of its node."""

    def __init__(self, disk: SimDisk, name: str, inode: _Inode) -> None:
        self.name = name
        self._disk = disk
        self._inode = inode
        self._life: int | None = disk.life

    def append(self, data: bytes | bytearray | memoryview) -> int:
        inode = self._open()
        return self._disk.append(inode, self.name, bytes(data))

    def read(self, offset: int, size: int) -> bytes:
        with memoryview(self._open().cached) as view:
            return bytes(view[offset : offset + size])

    def size(self) -> int:
        return len(self._open().cached)

    def truncate(self, size: int) -> None:
        inode = self._open()
        self._disk.freed(len(inode.cached) - size)
        inode.truncate(size)

    async def write(self, parts: Sequence[bytes | memoryview], *, sync: bool) -> None:
        for part in parts:
            self.append(part)
        if sync:
            await self.sync()

    async def sync(self) -> None:
        inode = self._open()
        number = inode.pending.number
        fails = await self._disk.wait_for_medium(self.name)
        self._open()  # the power may have been cut meanwhile
        changes = inode.pending.take(number)
        if fails:
            raise OSError(errno.EIO, "the medium refused the write", self.name)
        for change in changes:
            _apply(inode.durable, change)

    def drop_cache(self) -> None:
        inode = self._open()
        if not inode.pending.changes:
            inode.cached = bytearray(inode.durable)

    def close(self) -> None:
        self._life = None

    def _open(self) -> _Inode:
        if self._life is None:
            raise OSError(errno.EBADF, "the file is closed", self.name)
        if self._life != self._disk.life:
            raise OSError(errno.EBADF, "the file was opened in an earlier life of its node", self.name)
        return self._inode


class SimDisk:
    """The disk of one simulated machine; see the top of this file. It outlives the processes that use it.

    ``rng`` decides what a power cut leaves, and nothing else.

    Faults are attributes, which may change at any time:

    - ``sync_s``: called for the seconds that the next sync takes; ``None``: no time, but a turn of the loop.
    - ``failing``: syncs raise ``EIO``.
    - ``free_bytes``: how much still fits, ``None`` for no limit; a write that does not fit puts what fits and raises
      ``ENOSPC``.

    and methods: :meth:`stall`, :meth:`resume`, :meth:`corrupt`, :meth:`power_cut`. ``coverage`` counts what happened.
    """

    def __init__(self, rng: Rng, *, sync_s: Callable[[], float] | None = None, free_bytes: int | None = None) -> None:
        self._rng = rng
        self.sync_s = sync_s
        self.free_bytes = free_bytes
        self.failing = False
        self.life = 0
        self.coverage = dict.fromkeys(
            (
                "syncs",
                "directory_syncs",
                "failed_syncs",
                "full",
                "corrupted",
                "power_cuts",
                "kept",
                "dropped",
                "torn",
                "names_kept",
                "names_dropped",
            ),
            0,
        )
        self._root = _Directory()
        self._busy_until = 0.0
        self._stalled: list[asyncio.Future[None]] | None = None

    # the port

    def open(self, name: str, *, create: bool = False) -> SimFile:
        directory, last = self._parent(name)
        node = directory.cached.get(last)
        if node is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "no such file", name)
            node = _Inode()
            directory.change({last: node})
        if isinstance(node, _Directory):
            raise IsADirectoryError(errno.EISDIR, "is a directory", name)
        return SimFile(self, name, node)

    def read_bytes(self, name: str) -> bytes:
        return bytes(self._inode(name).cached)

    def listdir(self, name: str) -> list[str]:
        node = self._find(name)
        if node is None:
            return []
        if isinstance(node, _Inode):
            raise NotADirectoryError(errno.ENOTDIR, "is a file", name)
        return sorted(node.cached)

    def exists(self, name: str) -> bool:
        return self._find(name) is not None

    def mkdir(self, name: str) -> None:
        node = self._root
        for part in _parts(name):
            child = node.cached.get(part)
            if child is None:
                child = _Directory()
                node.change({part: child})
            if isinstance(child, _Inode):
                raise FileExistsError(errno.EEXIST, "is a file", name)
            node = child

    def rename(self, old: str, new: str) -> None:
        source, old_last = self._parent(old)
        target, new_last = self._parent(new)
        node = source.cached.get(old_last)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", old)
        replaced = target.cached.get(new_last)
        if isinstance(replaced, _Directory):
            raise IsADirectoryError(errno.EISDIR, "is a directory", new)
        if replaced is not None and replaced is not node:
            self.freed(len(replaced.cached))
        if source is target:
            source.change({old_last: None, new_last: node})
        else:
            target.change({new_last: node})
            source.change({old_last: None})

    def remove(self, name: str) -> None:
        self.freed(len(self._inode(name).cached))
        directory, last = self._parent(name)
        directory.change({last: None})

    async def sync_dir(self, name: str) -> None:
        node, life = self._find(name), self.life
        if not isinstance(node, _Directory):
            raise FileNotFoundError(errno.ENOENT, "no such directory", name)
        number = node.pending.number
        fails = await self.wait_for_medium(name, directory=True)
        if life != self.life:
            raise OSError(errno.EIO, "the node lost its disk meanwhile", name)
        if fails:
            raise OSError(errno.EIO, "the medium refused the write", name)
        for change in node.pending.take(number):
            _apply_names(node.durable, change)

    def close(self) -> None:
        self.process_died()

    # faults

    def process_died(self) -> None:
        """Files that are open raise from now on; what was written stays in the page cache."""
        self.life += 1
        self._busy_until = 0.0

    def stall(self) -> None:
        """No sync returns until :meth:`resume`."""
        if self._stalled is None:
            self._stalled = []

    def resume(self) -> None:
        stalled, self._stalled = self._stalled or [], None
        for future in stalled:
            if not future.done():
                future.set_result(None)

    def corrupt(self, name: str, offset: int, bit: int = 0) -> None:
        """Flip a bit of a file, in the page cache and on the medium. Raises ``ValueError`` outside of the file."""
        inode = self._inode(name)
        if not 0 <= offset < len(inode.cached) or not 0 <= bit < 8:
            raise ValueError(f"{name} has {len(inode.cached)} bytes of 8 bits: there is no bit {bit} at {offset}")
        inode.cached[offset] ^= 1 << bit
        if offset < len(inode.durable):
            inode.durable[offset] ^= 1 << bit
        if inode.pending.changes:
            # It goes to the medium with what was written and not synced.
            inode.pending.add((offset, bytes(inode.cached[offset : offset + 1])))
        self.coverage["corrupted"] += 1

    def power_cut(self) -> None:
        """Lose the page cache; the random numbers decide what of it had reached the medium."""
        self.process_died()
        self.coverage["power_cuts"] += 1
        self._cut_directory(self._root)

    def unsynced(self) -> dict[str, int]:
        """File -> bytes written that are not on the medium; files of which all is there are left out."""
        sizes = {name: sum(len(data or b"") for _, data in self._inode(name).pending.changes) for name in self.files()}
        return {name: size for name, size in sizes.items() if size}

    def files(self) -> list[str]:
        """The names of all files there are, sorted."""
        found: list[str] = []
        todo: list[tuple[str, _Directory]] = [("", self._root)]
        while todo:
            prefix, directory = todo.pop()
            for name, node in directory.cached.items():
                if isinstance(node, _Directory):
                    todo.append((f"{prefix}{name}/", node))
                else:
                    found.append(prefix + name)
        return sorted(found)

    # for the files

    def append(self, inode: _Inode, name: str, data: bytes) -> int:
        if self.free_bytes is not None:
            fits = min(len(data), max(self.free_bytes, 0))
            self.free_bytes -= fits
            if fits < len(data):
                self.coverage["full"] += 1
                inode.write(data[:fits])
                raise OSError(errno.ENOSPC, "no space left on the simulated disk", name)
        return inode.write(data)

    def freed(self, size: int) -> None:
        if self.free_bytes is not None:
            self.free_bytes += size

    async def wait_for_medium(self, name: str, *, directory: bool = False) -> bool:
        """Wait until the disk has come to this sync; true when it fails. Raises ``OSError`` after the node's end."""
        loop, life = asyncio.get_running_loop(), self.life
        begin = max(loop.time(), self._busy_until)
        self._busy_until = begin + (self.sync_s() if self.sync_s is not None else 0.0)
        await asyncio.sleep(max(0.0, self._busy_until - loop.time()))
        while self._stalled is not None and life == self.life:
            future = loop.create_future()
            self._stalled.append(future)
            await future
        if life != self.life:
            raise OSError(errno.EIO, "the node lost its disk meanwhile", name)
        self.coverage["failed_syncs" if self.failing else "directory_syncs" if directory else "syncs"] += 1
        return self.failing

    # the power cut

    def _cut_directory(self, directory: _Directory) -> None:
        changes = directory.pending.take(directory.pending.number)
        kept = self._rng.randrange(len(changes) + 1) if changes else 0
        self.coverage["names_kept"] += kept
        self.coverage["names_dropped"] += len(changes) - kept
        for change in changes[:kept]:
            _apply_names(directory.durable, change)
        directory.cached = dict(directory.durable)
        for _, node in sorted(directory.cached.items()):
            if isinstance(node, _Directory):
                self._cut_directory(node)
            else:
                self._cut_file(node)

    def _cut_file(self, inode: _Inode) -> None:
        changes = inode.pending.take(inode.pending.number)
        if changes:
            rng = self._rng
            # All, nothing, and a prefix are what happens most; a mixture is what breaks a careless log.
            survives = (_everything, _nothing, _Prefix(changes, rng), _Mixture(rng))[rng.randrange(4)]
            for offset, data in changes:
                if data is None:
                    if survives(offset, 1) > 0:
                        _apply(inode.durable, (offset, None))
                    continue
                for at, piece in _sectors(offset, data):
                    self._cut_piece(inode, at, piece, survives(at, len(piece)))
        inode.cached = bytearray(inode.durable)

    def _cut_piece(self, inode: _Inode, at: int, piece: bytes, kept: int) -> None:
        self.coverage["dropped" if kept == 0 else "kept" if kept == len(piece) else "torn"] += 1
        if kept == 0:
            return
        if (hole := at - len(inode.durable)) > 0:
            inode.durable += self._hole(hole)
        _apply(inode.durable, (at, piece[:kept]))

    def _hole(self, size: int) -> bytes:
        """What is read where nothing was written: zeros, or what some other file left there."""
        return bytes(size) if self._rng.random() < 0.5 else self._rng.getrandbits(8 * size).to_bytes(size, "little")

    # names

    def _find(self, name: str) -> _Node | None:
        node: _Node = self._root
        for part in _parts(name):
            child = node.cached.get(part) if isinstance(node, _Directory) else None
            if child is None:
                return None
            node = child
        return node

    def _inode(self, name: str) -> _Inode:
        node = self._find(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        if isinstance(node, _Directory):
            raise IsADirectoryError(errno.EISDIR, "is a directory", name)
        return node

    def _parent(self, name: str) -> tuple[_Directory, str]:
        *above, last = _parts(name) or [""]
        node = self._find("/".join(above))
        if not isinstance(node, _Directory):
            raise FileNotFoundError(errno.ENOENT, "no such directory", "/".join(above))
        return node, last


def _parts(name: str) -> list[str]:
    parts = name.split("/") if name else []
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is no name in a data directory: relative names without '.' and '..' are")
    return parts


def _apply(content: bytearray, change: _Write) -> None:
    offset, data = change
    if data is None:
        del content[offset:]
        data, offset = bytes(offset - len(content)), len(content)
    # After a lost truncation a write may land beyond the end, or inside of what should be gone.
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _apply_names(entries: dict[str, _Node], change: _Names) -> None:
    for name, node in change.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _sectors(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """A write cut at sector borders."""
    first = SECTOR_SIZE_BYTES - offset % SECTOR_SIZE_BYTES
    cuts = [0, *range(first, len(data), SECTOR_SIZE_BYTES), len(data)]
    return [(offset + a, data[a:b]) for a, b in itertools.pairwise(cuts) if a < b]


# How many bytes of a piece (offset, size) are on the medium.


def _everything(_: int, size: int) -> int:
    return size


def _nothing(_: int, size: int) -> int:
    return 0


class _Prefix:
    """What lies before one place in the file."""

    def __init__(self, changes: list[_Write], rng: Rng) -> None:
        begin = min(offset for offset, _ in changes)
        end = max(offset + len(data or b"") for offset, data in changes)
        self._place = rng.randrange(begin, end + 1)

    def __call__(self, offset: int, size: int) -> int:
        return max(0, min(size, self._place - offset))


class _Mixture:
    """Each piece for itself."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def __call__(self, offset: int, size: int) -> int:
        return (0, size, self._rng.randrange(size + 1))[self._rng.randrange(3)]

"""The tree of names: directory entries as objects of db, changed by transactions only.

Theory of operation
-------------------
A directory has an id, which is never used again. In the container ``fs`` (separator ``/``: all keys of one directory
are in one shard) it consists of

* its *own object*, key ``"<id>/"`` (the empty name, which no entry has): it exists exactly as long as the directory;
* its *entries*, keys ``"<id>/<name>"``: a file's header, or the link to a directory below (:mod:`.header`);
* the *link* to it in its parent. The root has the fixed id ``root`` and no link.

Three transactions keep these together; db performs each as a whole, also where it spans two shards:

=============  ================================================  ===========================================
               reads                                             writes
=============  ================================================  ===========================================
create entry   the parent's own object; that the entry is absent the entry (and, of a directory, its own object)
remove dir     that the range ``"<id>/..."`` holds nothing but   deletes the own object and the link
               the own object; the link
change, remove the entry                                         the entry
=============  ================================================  ===========================================

A create and a removal of the directory around it cannot both happen: each reads what the other changes. Creates in one
directory do not disturb each other: they only read its own object. Hence the invariant that everything here leans on:

    *whatever exists is reachable*: if an entry exists, so does its directory's own object, the link to it, and so on
    up to the root.

It holds after every single transaction, so a crash between two of them leaves a consistent tree and nothing dangling.
It also makes a cache of links safe without any invalidation: an id that was once found under a path can only be the
one that is there still, or belong to a directory that is gone, and then its own object and its entries are gone too.
An entry found through the cache is valid; one not found is looked for again from the root, unless the directory's own
object shows that the directory is still there. (A rename of directories will have to validate the links it passes.)

Recursive removal walks depth-first in bounded pages, removing leaves before what holds them; it is not atomic, but
every state on the way is a consistent tree. Whoever creates something below meanwhile either has it removed too or
makes a removal conflict, which is tried again a bounded number of times.

A commit whose outcome is unknown (``Timeout``) is repeated under its request id, which db applies once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    Conflict,
    IsADirectory,
    NotADirectory,
    NotEmpty,
    NotFound,
)
from gostore.core.keyvalue import KeyValue, PointRead, Read, Versioned, Write
from gostore.services.fs import path as paths
from gostore.services.fs.header import Content, Header
from gostore.services.fs.transactions import CONFLICT_RETRIES_MAX, Transactions

T = TypeVar("T")
Consume = Callable[[], Awaitable[tuple[Read, Write]]]

ENTRIES: Final = "fs"
"""The db container of directories and headers."""
INTENTS: Final = "fs.intents"
"""The db container of writes under way (:mod:`.intents`)."""
SEPARATOR: Final = "/"
ROOT_ID: Final = "root"

LINKS_CACHED_MAX: Final = 4096
"""Directories remembered by a node, about 300 bytes each."""
REMOVE_PAGE: Final = 128
"""Entries removed by one transaction of a recursive removal; twice as many operations, well below db's limit."""
LIST_LIMIT_MAX: Final = 1000
"""Entries of one page of a listing."""


def entry_key(directory_id: str, name: str) -> str:
    return f"{directory_id}{SEPARATOR}{name}"


def own_key(directory_id: str) -> str:
    """The key of the object that says: this directory exists."""
    return f"{directory_id}{SEPARATOR}"


@dataclass(frozen=True, slots=True)
class Listing:
    """A page of a directory. ``next_start``: where to go on, None at the end."""

    children: tuple[Header, ...]
    next_start: str | None


@dataclass(slots=True)
class Removed:
    """What a removal did: how many entries are gone, and whether some of them had chunks."""

    entries: int = 0
    chunks: bool = False

    def count(self, header: Header) -> None:
        self.entries += 1
        self.chunks = self.chunks or bool(header.chunks)


@dataclass(frozen=True, slots=True)
class _Link:
    """A directory on the way of a recursive removal: where it hangs, and its id."""

    parent_id: str
    name: str
    id: str
    path: str


class Tree:
    """Names, headers and directories; one for each node. All methods may be used concurrently.

    Every method raises ``BadRequest`` for a bad path, and what db raises when it is not available.
    """

    def __init__(self, kv: KeyValue, transactions: Transactions, *, path_size_bytes_max: int) -> None:
        self._kv = kv
        self._transactions = transactions
        self._path_size_bytes_max = path_size_bytes_max
        self._ready = False
        self._links: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._own: OrderedDict[str, int] = OrderedDict()

    # --- what is there

    def parts(self, path: str) -> tuple[str, ...]:
        return paths.parts(path, self._path_size_bytes_max)

    async def ready(self) -> None:
        """Make sure that containers and root exist; cheap once they do. The first use of a cluster creates them."""
        if self._ready:
            return
        for container in (ENTRIES, INTENTS):
            await self._kv.create_container(container, separator=SEPARATOR)
        root = await self._kv.get(ENTRIES, own_key(ROOT_ID))
        if not root.found:
            own = Write("set", ENTRIES, own_key(ROOT_ID), {"kind": "own", "mtime": self._transactions.stamp()})
            try:
                await self._transactions.commit([PointRead(ENTRIES, own_key(ROOT_ID), 0)], [own])
            except Conflict:
                pass  # another node made it at the same time
        self._ready = True

    async def find(self, path: str) -> Header:
        """The header of a file or directory. Raises ``NotFound``, ``NotADirectory``."""
        return (await self.find_home(path))[0]

    async def find_home(self, path: str) -> tuple[Header, str]:
        """The header, and the id of the directory that it is in (that of the root is in the root)."""
        names = self.parts(path)
        await self.ready()
        if not names:
            own = await self._kv.get(ENTRIES, own_key(ROOT_ID))
            return Header(paths.ROOT, _mtime(own), directory_id=ROOT_ID), ROOT_ID
        directory_id, header, _ = await self._find(names)
        return header, directory_id

    async def find_local(self, path: str, local: Callable[[str, str], Versioned | None]) -> Header | None:
        """What ``local(container, key)`` (this node's own replica, None where it holds none) has of the entry."""
        names = self.parts(path)
        await self.ready()
        directory_id = await self._walk(names[:-1])
        name = names[-1] if names else ""
        found = local(ENTRIES, entry_key(directory_id, name))
        if found is None or not found.found:
            return None
        if not names:
            return Header(paths.ROOT, _mtime(found), directory_id=ROOT_ID)
        return Header.from_value(paths.join(names), found.value)

    async def _find(self, names: tuple[str, ...]) -> tuple[str, Header, int]:
        """The entry of a path that is not the root: (id of its directory, header, version in db)."""

        async def attempt() -> tuple[str, Header, int]:
            directory_id = await self._walk(names[:-1])
            found = await self._kv.get(ENTRIES, entry_key(directory_id, names[-1]))
            if found.found:
                return directory_id, Header.from_value(paths.join(names), found.value), found.version
            await self._own_version(directory_id, names[:-1], trust=False)
            raise NotFound(f"{paths.join(names)} does not exist")

        return await self._retry(attempt, names)

    async def children(self, path: str, start: str = "", limit: int = LIST_LIMIT_MAX) -> Listing:
        """Entries of a directory by name, from ``start`` on (what the page before gave as ``next_start``).

        Raises ``NotFound``, ``NotADirectory``, and ``BadRequest`` for a limit out of 1 to :data:`LIST_LIMIT_MAX`.
        """
        if not 1 <= limit <= LIST_LIMIT_MAX:
            raise BadRequest(f"limit = {limit}: allowed are values from 1 to {LIST_LIMIT_MAX}")
        names = self.parts(path)
        await self.ready()

        async def attempt() -> Listing:
            directory_id = await self._walk(names)
            prefix = own_key(directory_id)
            # One more than asked for: the directory's own object comes first.
            page = await self._kv.scan(ENTRIES, prefix, start=prefix + start, limit=limit + (not start))
            if not page.entries:
                await self._own_version(directory_id, names, trust=False)
            where = paths.join(names)
            children = tuple(
                Header.from_value(paths.child(where, name), entry.value)
                for entry in page.entries
                if (name := entry.key[len(prefix) :])
            )
            return Listing(children, page.next_start[len(prefix) :] if page.next_start is not None else None)

        return await self._retry(attempt, names)

    # --- changes

    async def directory(self, names: tuple[str, ...]) -> str:
        """The id of a directory; it and its parents are made when they are missing. Raises ``NotADirectory``."""
        await self.ready()
        return await self._retry(lambda: self._walk(names, create=True), names)

    async def mkdir(self, path: str, *, exist_ok: bool = True) -> Header:
        """Make a directory and its missing parents. Raises ``AlreadyExists`` and ``NotADirectory``."""
        names = self.parts(path)
        await self.ready()
        if not names:
            if not exist_ok:
                raise AlreadyExists("/ exists always")
            return await self.find(path)

        async def attempt() -> Header:
            parent_id = await self._walk(names[:-1], create=True)
            found = await self._kv.get(ENTRIES, entry_key(parent_id, names[-1]))
            if not found.found:
                return await self._make(parent_id, names)
            header = Header.from_value(paths.join(names), found.value)
            if not header.is_directory or not exist_ok:
                raise AlreadyExists(f"{header.path} exists" + ("" if header.is_directory else " and is a file"))
            return header

        return await self._retry(attempt, names)

    async def put(
        self, path: str, type_: str, content: Content, consume: Consume | None = None
    ) -> tuple[Header, Header | None]:
        """Commit a new version of a file: the moment at which a write happens. Returns (new header, the one before).

        ``consume`` is awaited in each attempt for a read and a write that are to be part of the transaction (those of
        the intent). Raises ``IsADirectory``, ``NotADirectory``, and what ``consume`` raises.
        """
        names = self.parts(path)
        if not names:
            raise IsADirectory("/ is a directory")
        await self.ready()
        write_id = self._transactions.new_id()

        async def attempt() -> tuple[Header, Header | None]:
            directory_id = await self._walk(names[:-1], create=True)
            key = entry_key(directory_id, names[-1])
            found = await self._kv.get(ENTRIES, key)
            before = Header.from_value(paths.join(names), found.value) if found.found else None
            if before is not None and before.is_directory:
                raise IsADirectory(f"{before.path} is a directory")
            reads: list[Read] = [PointRead(ENTRIES, key, found.version)]
            if before is None:
                # An entry that is there proves its directory; a new one must make sure of it.
                own = await self._own_version(directory_id, names[:-1])
                reads.append(PointRead(ENTRIES, own_key(directory_id), own))
            version = before.version + 1 if before else 1
            header = Header(paths.join(names), self._transactions.stamp(), type_, version, write_id, content)
            writes = [Write("set", ENTRIES, key, header.to_value())]
            if consume is not None:
                read, write = await consume()
                reads.append(read)
                writes.append(write)
            await self._transactions.commit(reads, writes)
            return header, before

        return await self._retry(attempt, names)

    async def remove(self, path: str, *, recursive: bool = False, removed: Removed | None = None) -> Removed:
        """Remove a file or directory. Raises ``NotFound``, ``NotEmpty`` (nothing happened), ``BadRequest`` (root).

        A recursive removal that fails on the way has removed a part, which ``removed`` then tells; calling it again
        goes on.
        """
        names = self.parts(path)
        if not names:
            raise BadRequest("the root cannot be deleted; delete what is in it")
        await self.ready()
        removed = Removed() if removed is None else removed

        async def attempt() -> None:
            parent_id, header, version = await self._find(names)
            key = entry_key(parent_id, names[-1])
            if not header.is_directory:
                await self._transactions.commit([PointRead(ENTRIES, key, version)], [Write("delete", ENTRIES, key)])
                removed.count(header)
                return
            link = _Link(parent_id, names[-1], header.directory_id, header.path)
            if recursive:
                await self._remove_tree(link, removed)
            elif not await self._remove_directory(link, removed):
                raise NotFound(f"{header.path} does not exist")

        await self._retry(attempt, names)
        return removed

    async def _remove_tree(self, top: _Link, removed: Removed) -> None:
        """Everything below ``top`` and itself. The stack holds at most a page for each level."""
        stack = [top]
        conflicts = 0
        while stack:
            link = stack[-1]
            try:
                below, more = await self._remove_files(link, removed)
                if below or more:
                    stack.extend(below)
                    continue
                await self._remove_directory(link, removed)
                stack.pop()
            except (NotEmpty, Conflict) as error:
                # Somebody creates or changes entries below meanwhile.
                conflicts += 1
                if conflicts > CONFLICT_RETRIES_MAX:
                    raise Conflict(f"{link.path}: others keep changing it; a part of it is removed") from error
                await self._transactions.back_off(conflicts)

    async def _remove_files(self, link: _Link, removed: Removed) -> tuple[list[_Link], bool]:
        """Remove the files of the directory's first page; (the directories of that page, whether there are more)."""
        prefix = own_key(link.id)
        page = await self._kv.scan(ENTRIES, prefix, limit=REMOVE_PAGE)
        reads: list[Read] = []
        writes: list[Write] = []
        files: list[Header] = []
        below: list[_Link] = []
        for entry in page.entries:
            name = entry.key[len(prefix) :]
            if not name:
                continue
            header = Header.from_value(paths.child(link.path, name), entry.value)
            if header.is_directory:
                below.append(_Link(link.id, name, header.directory_id, header.path))
            else:
                files.append(header)
                reads.append(PointRead(ENTRIES, entry.key, entry.version))
                writes.append(Write("delete", ENTRIES, entry.key))
        if writes:
            await self._transactions.commit(reads, writes)
            for header in files:
                removed.count(header)
        return below, page.next_start is not None

    async def _remove_directory(self, link: _Link, removed: Removed) -> bool:
        """Remove an empty directory; False when it is gone already. Raises ``NotEmpty``, ``Conflict``."""
        key = entry_key(link.parent_id, link.name)
        found = await self._kv.get(ENTRIES, key)
        header = Header.from_value(link.path, found.value) if found.found else None
        if header is None or header.directory_id != link.id:
            return False
        prefix = own_key(link.id)
        page = await self._kv.scan(ENTRIES, prefix, limit=2)
        if any(entry.key != prefix for entry in page.entries):
            raise NotEmpty(f"{link.path} is not empty; delete it recursively, or what is in it first")
        await self._transactions.commit(
            [PointRead(ENTRIES, key, found.version), *page.ranges],
            [Write("delete", ENTRIES, prefix), Write("delete", ENTRIES, key)],
        )
        self._links.pop((link.parent_id, link.name), None)
        self._own.pop(link.id, None)
        removed.entries += 1
        return True

    async def _make(self, parent_id: str, names: tuple[str, ...]) -> Header:
        """Make one directory whose entry is absent: own object and link at once. Raises ``Conflict``."""
        key = entry_key(parent_id, names[-1])
        own = await self._own_version(parent_id, names[:-1])
        header = Header(paths.join(names), self._transactions.stamp(), directory_id=self._transactions.new_id())
        await self._transactions.commit(
            [PointRead(ENTRIES, own_key(parent_id), own), PointRead(ENTRIES, key, 0)],
            [
                Write("set", ENTRIES, own_key(header.directory_id), {"kind": "own", "mtime": header.mtime}),
                Write("set", ENTRIES, key, header.to_value()),
            ],
        )
        self._remember(parent_id, names[-1], header.directory_id)
        return header

    # --- the way from the root

    async def _walk(self, names: tuple[str, ...], *, create: bool = False) -> str:
        """The id of the directory at ``names``. Raises ``NotFound``, ``NotADirectory``, ``Conflict`` (stale cache)."""
        directory_id = ROOT_ID
        for depth, name in enumerate(names, 1):
            known = self._links.get((directory_id, name))
            if known is not None:
                self._links.move_to_end((directory_id, name))
                directory_id = known
                continue
            found = await self._kv.get(ENTRIES, entry_key(directory_id, name))
            here = names[:depth]
            if found.found:
                header = Header.from_value(paths.join(here), found.value)
                if not header.is_directory:
                    raise NotADirectory(f"{header.path} is a file, not a directory")
                self._remember(directory_id, name, header.directory_id)
                directory_id = header.directory_id
            elif create:
                directory_id = (await self._make(directory_id, here)).directory_id
            else:
                await self._own_version(directory_id, here[:-1], trust=False)
                raise NotFound(f"{paths.join(here)} does not exist")
        return directory_id

    async def _own_version(self, directory_id: str, names: tuple[str, ...], *, trust: bool = True) -> int:
        """The version of a directory's own object, from the cache when a commit will check it anyway (``trust``).

        Raises ``Conflict`` when the directory is gone, after forgetting the way that led to it.
        """
        known = self._own.get(directory_id) if trust else None
        if known is None:
            found = await self._kv.get(ENTRIES, own_key(directory_id))
            if not found.found:
                self._forget(names)
                raise Conflict(f"{paths.join(names)} was removed meanwhile")
            known = found.version
        self._own[directory_id] = known
        self._own.move_to_end(directory_id)
        while len(self._own) > LINKS_CACHED_MAX:
            self._own.popitem(last=False)
        return known

    async def _retry(self, attempt: Callable[[], Awaitable[T]], names: tuple[str, ...]) -> T:
        # Which of the reads conflicted? Perhaps a remembered own object: the next attempt looks.
        return await self._transactions.retry(attempt, paths.join(names), lambda: self._forget(names))

    def _remember(self, parent_id: str, name: str, directory_id: str) -> None:
        self._links[parent_id, name] = directory_id
        while len(self._links) > LINKS_CACHED_MAX:
            self._links.popitem(last=False)

    def _forget(self, names: Iterable[str]) -> None:
        """Drop what is cached of the way to ``names``."""
        directory_id: str | None = ROOT_ID
        for name in names:
            if directory_id is None:
                return
            following = self._links.pop((directory_id, name), None)
            self._own.pop(directory_id, None)
            directory_id = following
        if directory_id is not None:
            self._own.pop(directory_id, None)


def _mtime(own: Versioned) -> int:
    value: Any = own.value
    return int(value["mtime"]) if isinstance(value, dict) and isinstance(value.get("mtime"), int) else 0

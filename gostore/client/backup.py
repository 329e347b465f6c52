"""Backup and restore of the db containers of a running cluster.

*Backup.* A node takes a cut through all shards (:mod:`gostore.services.db.backup`): the state of one instant, with
every transaction wholly in it or not at all. The nodes that keep it are read page by page into a draft, a file of its
own beside the wanted one (``NAME.0123abcd.part``), which gets the wanted name when it is complete and on the medium.
However the backup ends, the draft goes; only a client that was killed leaves it behind, and then it may be deleted.
When one of the nodes is lost, the backup begins again with another cut.

*Restore.* The file is read to its end and checked before anything is written. Then each container is filled under a
staged name, in bounded transactions, and at last all get their names in one transaction: until then nobody sees any of
it. A restore that was interrupted is repeated as a whole, and begins with dropping what the earlier one has staged. (It
cannot go on with it: nodes remember which container a name stands for, so that a staged name is good for one run.)
Versions of objects are those of the new commits.

*Not covered*: files. The containers ``fs`` and ``fs.intents`` hold headers that name chunks, and the chunks lie outside
of db: headers alone would be a directory of files that are not there. Copy files with ``gostore fs get`` and ``put``.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from gostore.client.backup_file import Reader, Writer
from gostore.client.connection import PATIENCE_S, TIMEOUT_S, Connection
from gostore.client.keyvalue import RemoteKeyValue
from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    ConfigError,
    Conflict,
    Corrupt,
    Forgotten,
    GoStoreError,
    NotFound,
    Timeout,
    Unavailable,
    Unreachable,
)
from gostore.core.keyvalue import Write
from gostore.core.ports import Rng
from gostore.core.values import unpack

FILES: Final = ("fs", "fs.intents")
"""Containers of the directory of files."""

CONTAINERS: Final = ".containers"
"""The container of the containers."""

ATTEMPTS_MAX: Final = 8
"""Backups that are begun, until one is not disturbed."""

PAUSE_S: Final = 0.5

DRAFTS_MAX: Final = 8
"""Names that are tried for a draft, as a backup of a simulation draws the same ones each time."""

RENEW_S: Final = 10.0
"""How often the nodes of a cut are told that it is still read. They drop it after three times that."""

BATCH_OPERATIONS_MAX: Final = 256
BATCH_SIZE_BYTES_MAX: Final = 512 * 1024
"""Of one transaction of a restore; a larger object goes alone."""

NAMED_TOGETHER_MAX: Final = 128
"""Containers that get their names in one transaction; more take several."""

STAGED: Final = "restoring."
"""How the names of containers begin that are being filled; the backup, the run of the restore, and a number follow."""

_STAGED: Final = re.compile(rf"{re.escape(STAGED)}([0-9a-f]{{16}})\.[0-9a-f]{{16}}\.[0-9]+")

_IDENTITY: Final = re.compile(r"[0-9a-f]{16}")

_LOST: Final = (NotFound, Unavailable, Unreachable, Timeout, Forgotten, Conflict)
"""What ends a cut, and not the backup."""

_AGAIN: Final = (Conflict, Unavailable, Timeout, Unreachable, Forgotten)
"""After which a step of a restore is done again."""


async def backup(
    connection: Connection, path: str | os.PathLike[str], containers: Iterable[str] | None = None
) -> dict[str, Any]:
    """See :meth:`DbHandle.backup`."""
    target = _target(path)
    wanted = None if containers is None else tuple(dict.fromkeys(containers))
    _refuse_files(wanted or ())
    draft = _create_draft(target, connection.env.rng)
    try:
        figures = await _fill_draft(connection, wanted, draft, target)
        with _may_fail(target, "written"):
            draft.flush()
            os.fsync(draft.fileno())
            draft.close()
            os.replace(draft.name, target)
            _sync_directory(target.parent)
    finally:
        _discard(draft)
    return {"path": str(target), **figures}


async def _fill_draft(
    connection: Connection, wanted: tuple[str, ...] | None, draft: BinaryIO, target: Path
) -> dict[str, Any]:
    """Begin a backup until one is not disturbed; its figures."""
    last: GoStoreError | None = None
    for attempt in range(ATTEMPTS_MAX):
        if attempt:
            await asyncio.sleep(PAUSE_S * connection.env.rng.uniform(0.5, 1.0))
            with _may_fail(target, "written"):
                draft.seek(0)
                draft.truncate()
        try:
            return await _Backup(connection, wanted, draft, target).write()
        except _LOST as error:
            if error.details.get("asked"):
                raise
            last = error
    assert last is not None
    raise Unavailable(f"no backup was finished in {ATTEMPTS_MAX} attempts; the last: {last.message}")


class _Backup:
    """One attempt. ``target`` is for errors."""

    def __init__(self, connection: Connection, wanted: tuple[str, ...] | None, draft: BinaryIO, target: Path) -> None:
        self._connection = connection
        self._wanted = wanted
        self._draft = draft
        self._target = target
        self._cut = ""
        self._where: list[list[Any]] = []

    async def write(self) -> dict[str, Any]:
        """The figures. Raises what ends the cut, and ``NotFound`` for a container that is not there."""
        self._cut, self._where = (await self._connection.call("db", "backup_begin")).value
        shards = {node: shard for shard, (node, _) in enumerate(self._where)}
        renewals: list[asyncio.Task[None]] = []
        try:
            for node, shard in shards.items():
                renewals.append(self._connection.env.tasks.start(self._renew(node, shard), name="backup-renew"))
            return await self._write()
        finally:
            for renewal in renewals:
                renewal.cancel()
            await self._end()

    async def _renew(self, node: str, shard: int) -> None:
        """Until cancelled: have the node keep the cut, also while others are read. ``shard``: one that it keeps."""
        while True:
            await asyncio.sleep(RENEW_S)
            # Whether the node still keeps it is noticed by who reads it.
            with suppress(GoStoreError):
                # All that it asks for is a page of no container, which is empty.
                await self._ask(node, "backup_rows", shard, "", 0, timeout_s=RENEW_S)

    async def _write(self) -> dict[str, Any]:
        chosen = self._choose([row async for rows in self._rows(CONTAINERS) for row in rows])
        rng, env = self._connection.env.rng, self._connection.env
        names = list(chosen)
        facts = {
            "id": f"{rng.getrandbits(64):016x}",
            "cluster": self._connection.cluster,
            "time_ms": env.wall_ms(),
            "indices": [index for _, index in self._where],
            "containers": [[name, chosen[name]["separator"]] for name in names],
        }
        with _may_fail(self._target, "written"):
            writer = Writer(self._draft, facts)
        for number, name in enumerate(names):
            async for rows in self._rows(chosen[name]["physical"]):
                with _may_fail(self._target, "written"):
                    writer.rows(number, rows)
        with _may_fail(self._target, "written"):
            writer.finish()
        return {
            "containers": len(names), "objects": writer.objects, "bytes": writer.size_bytes, "shards": len(self._where)
        }  # fmt: skip

    def _choose(self, rows: list[list[Any]]) -> dict[str, Any]:
        """Name -> what the cluster knows of the container."""
        known = {str(key): unpack(packed) for key, packed in rows}
        there = [name for name in sorted(known) if not known[name]["dropping"] and name not in FILES]
        missing = [name for name in self._wanted or () if name not in there]
        if missing:
            known_names = ", ".join(there) or "none"
            raise NotFound(f"there is no container {missing[0]!r:.100}; there are {known_names}", asked=True)
        wanted = there if self._wanted is None else self._wanted
        return {name: known[name] for name in wanted if not _STAGED.fullmatch(name)}

    async def _rows(self, physical: str) -> Any:
        """The pages of a container, shard by shard."""
        for shard, (node, _) in enumerate(self._where):
            place: int | None = 0
            while place is not None:
                rows, place = await self._ask(node, "backup_rows", shard, physical, place)
                if rows:
                    yield rows

    async def _ask(self, node: str, function: str, *args: Any, timeout_s: float | None = None) -> Any:
        if node not in self._connection.members:
            await self._connection.refresh()
        return (await self._connection.call_node(node, "db", function, self._cut, *args, timeout_s=timeout_s)).value

    async def _end(self) -> None:
        for node in dict.fromkeys(node for node, _ in self._where):
            try:
                await self._connection.call_node(node, "db", "backup_end", self._cut, timeout_s=PAUSE_S)
            except GoStoreError:
                pass  # it forgets by itself


async def restore(
    connection: Connection,
    path: str | os.PathLike[str],
    containers: Iterable[str] | None = None,
    *,
    replace: bool = False,
) -> dict[str, Any]:
    """See :meth:`DbHandle.restore`."""
    name = _checked(path)
    with _open(name) as file:
        with _may_fail(name, "read"):
            facts, objects = _verify(file, name)
        separators = {str(container): separator for container, separator in facts["containers"]}
        wanted = tuple(dict.fromkeys(containers)) if containers is not None else tuple(separators)
        missing = [container for container in wanted if container not in separators]
        if missing:
            raise NotFound(f"{name} holds no container {missing[0]!r:.100}; it holds {', '.join(separators) or 'none'}")
        with _may_fail(name, "read"):
            file.seek(0)
            rows = _readable(Reader(file, name), name)
        restored = await _Restore(connection, separators, str(facts["id"]), wanted, replace).run(rows)
    return {"path": name, "containers": len(wanted), "objects": restored, "objects_in_file": objects}


def _verify(file: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """The facts, and how many objects it holds. Raises ``Corrupt`` unless the whole file is as it was written."""
    reader = Reader(file, name)
    facts = reader.facts
    match facts:
        case {"id": str() as identity, "containers": [*containers]} if all(
            isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in containers
        ) and _IDENTITY.fullmatch(identity):
            _refuse_files(one[0] for one in containers)
        case _:
            raise Corrupt(f"{name} is no whole backup: its header is not one")
    for container, rows in reader.rows():
        if not 0 <= container < len(containers) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
            raise Corrupt(f"{name} is no whole backup: it has rows of no container")
    return facts, reader.objects


class _Restore:
    def __init__(
        self,
        connection: Connection,
        separators: Mapping[str, str | None],
        identity: str,
        wanted: tuple[str, ...],
        replace: bool,
    ) -> None:
        self._connection = connection
        self._store = RemoteKeyValue(lambda: connection)
        self._separators = separators
        self._wanted = wanted
        self._replace = replace
        self._names = list(separators)
        self._identity = identity
        run = f"{connection.env.rng.getrandbits(64):016x}"
        self._staged = {name: f"{STAGED}{identity}.{run}.{number}" for number, name in enumerate(separators)}

    async def run(self, pages: Iterable[tuple[int, list[list[Any]]]]) -> int:
        """How many objects it has written. ``pages``: (container, [[key, packed value], ...])"""
        there = await self._store.containers()
        taken = [name for name in self._wanted if name in there]
        if taken and not self._replace:
            raise AlreadyExists(f"the container {taken[0]!r} exists: drop it, or say that it is to be replaced")
        for name in there:
            if (match := _STAGED.fullmatch(name)) and match[1] == self._identity:
                await self._drop(name)
        for name in self._wanted:
            await self._call("stage_container", self._staged[name], name, self._separators[name])
        objects = 0
        for container, rows in pages:
            if (name := self._names[container]) in self._wanted:
                await self._fill(self._staged[name], rows)
                objects += len(rows)
        for begin in range(0, len(self._wanted), NAMED_TOGETHER_MAX):
            names = {self._staged[name]: name for name in self._wanted[begin : begin + NAMED_TOGETHER_MAX]}
            await self._put_in_place(names, doubt=begin > 0)  # of several transactions the ones before have happened
        return objects

    async def _put_in_place(self, names: dict[str, str], doubt: bool) -> None:
        """Raises what came of the last attempt; ``Timeout`` (indefinite) if one before may have had its effect.

        It may run twice: what an earlier attempt has put in place is left there. But each attempt is a call that is
        not ``repeatable``, as that would not tell whether one before it is in doubt.
        """
        for attempt in range(ATTEMPTS_MAX):
            if attempt:
                await self._pause()
            try:
                # As in a repeatable call: a node that does not answer must not use up all the time.
                timeout_s = min(PATIENCE_S * 2**attempt, TIMEOUT_S)
                await self._connection.call("db", "put_in_place", names, self._replace, timeout_s=timeout_s)
                return
            except GoStoreError as error:
                if attempt == ATTEMPTS_MAX - 1 or not isinstance(error, _AGAIN):
                    if error.definite and doubt:
                        raise Timeout(
                            f"{error.message} (but what was done before that may have put containers in their places: "
                            "look which are there)"
                        ) from None
                    raise
                doubt = doubt or not error.definite

    async def _fill(self, staged: str, rows: list[list[Any]]) -> None:
        batch: list[Write] = []
        size = 0
        for key, packed in rows:
            size += len(key) + len(packed)
            if batch and (size > BATCH_SIZE_BYTES_MAX or len(batch) >= BATCH_OPERATIONS_MAX):
                await self._commit(batch)
                batch, size = [], len(key) + len(packed)
            batch.append(Write("set", staged, key, unpack(packed)))
        if batch:
            await self._commit(batch)

    async def _commit(self, batch: list[Write]) -> None:
        """Setting twice what nobody else writes is setting it once: it is repeated after any failure."""
        for attempt in range(ATTEMPTS_MAX):
            try:
                await self._store.commit((), batch)
                return
            except _AGAIN:
                if attempt == ATTEMPTS_MAX - 1:
                    raise
            await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(PAUSE_S * self._connection.env.rng.uniform(0.5, 1.0))

    async def _drop(self, name: str) -> None:
        try:
            await self._call("drop_container", name)
        except NotFound:
            pass  # an earlier attempt was not heard

    async def _call(self, function: str, *args: Any) -> None:
        await self._connection.call("db", function, *args, repeatable=True)


def _refuse_files(names: Iterable[str]) -> None:
    for name in names:
        if name in FILES:
            raise BadRequest(
                f"container = {name!r}: files are in no backup, as their chunks are not in db; copy them with "
                "`gostore fs get` and `gostore fs put`"
            )


def _checked(path: str | os.PathLike[str]) -> str:
    """Raises ``BadRequest`` for what is the path of no file."""
    name = os.fspath(path)
    with suppress(UnicodeEncodeError):
        if name and b"\0" not in os.fsencode(name):
            return name
    raise BadRequest(f"path = {name!r:.100}: give the path of a file, which is not empty and has no NUL in it")


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(_checked(path))
    with _may_fail(target, "written"):
        if target.is_dir():
            raise ConfigError(f"{target}: cannot be written: it is a directory; give the path of a file")
    return target


@contextmanager
def _may_fail(path: Path | str, what: str) -> Iterator[None]:
    """Raises ``ConfigError`` for an error of the file system; ``what``: written or read."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be {what}: {error.strerror or error}: see to that, or give another path"
        ) from None


def _create_draft(target: Path, rng: Rng) -> BinaryIO:
    """A new file beside ``target``. No two backups have the same one, though they were given the same ``target``."""
    with _may_fail(target, "written"):
        for _ in range(DRAFTS_MAX):
            with suppress(FileExistsError):
                return open(target.with_name(f"{target.name}.{rng.getrandbits(32):08x}.part"), "xb")
    raise ConfigError(f"{target}: cannot be written: delete the files {target.name}.*.part of backups that were killed")


def _discard(draft: BinaryIO) -> None:
    """Nothing to do for one that has got its name."""
    with suppress(OSError):
        draft.close()  # which writes again what could not be written
    with suppress(OSError):
        os.unlink(draft.name)


def _open(path: str) -> BinaryIO:
    with _may_fail(path, "read"):
        return open(path, "rb")


def _readable(reader: Reader, name: str) -> Iterator[tuple[int, list[list[Any]]]]:
    """As :meth:`Reader.rows`."""
    with _may_fail(name, "read"):
        yield from reader.rows()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

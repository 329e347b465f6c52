"""Backup and restore of the db containers of a running cluster.

*Backup.* A node takes a cut through all shards (:mod:`gostore.services.db.backup`): the state of one instant, with
every transaction wholly in it or not at all. The nodes that keep it are read page by page into a file, which gets its
name when it is complete and on the medium. When one of them is lost, the backup begins again with another cut.

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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from gostore.client.backup_file import Reader, Writer
from gostore.client.connection import Connection
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
from gostore.core.values import unpack

FILES: Final = ("fs", "fs.intents")
"""Containers of the directory of files."""

CONTAINERS: Final = ".containers"
"""The container of the containers."""

ATTEMPTS_MAX: Final = 8
"""Backups that are begun, until one is not disturbed."""

PAUSE_S: Final = 0.5

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


async def backup(
    connection: Connection, path: str | os.PathLike[str], containers: Iterable[str] | None = None
) -> dict[str, Any]:
    """See :meth:`DbHandle.backup`."""
    target = Path(path)
    draft = target.with_name(f"{target.name}.part")
    wanted = None if containers is None else tuple(dict.fromkeys(containers))
    _refuse_files(wanted or ())
    last: GoStoreError | None = None
    for attempt in range(ATTEMPTS_MAX):
        if attempt:
            await asyncio.sleep(PAUSE_S * connection.env.rng.uniform(0.5, 1.0))
        try:
            with _create(draft) as file:
                figures = await _Backup(connection, wanted).write(file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        except _LOST as error:
            if error.details.get("asked"):
                draft.unlink()
                raise
            last = error
            continue
        _sync_directory(target.parent)
        return {"path": str(target), **figures}
    draft.unlink(missing_ok=True)
    assert last is not None
    raise Unavailable(f"no backup was finished in {ATTEMPTS_MAX} attempts; the last: {last.message}")


class _Backup:
    """One attempt."""

    def __init__(self, connection: Connection, wanted: tuple[str, ...] | None) -> None:
        self._connection = connection
        self._wanted = wanted
        self._cut = ""
        self._where: list[list[Any]] = []

    async def write(self, file: BinaryIO) -> dict[str, Any]:
        """The figures. Raises what ends the cut, and ``NotFound`` for a container that is not there."""
        self._cut, self._where = (await self._connection.call("db", "backup_begin")).value
        try:
            return await self._write(file)
        finally:
            await self._end()

    async def _write(self, file: BinaryIO) -> dict[str, Any]:
        chosen = self._choose([row async for rows in self._rows(CONTAINERS) for row in rows])
        rng, env = self._connection.env.rng, self._connection.env
        names = list(chosen)
        writer = Writer(
            file,
            {
                "id": f"{rng.getrandbits(64):016x}",
                "cluster": self._connection.cluster,
                "time_ms": env.wall_ms(),
                "indices": [index for _, index in self._where],
                "containers": [[name, chosen[name]["separator"]] for name in names],
            },
        )
        for number, name in enumerate(names):
            async for rows in self._rows(chosen[name]["physical"]):
                writer.rows(number, rows)
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
        return {name: known[name] for name in self._wanted or there if not _STAGED.fullmatch(name)}

    async def _rows(self, physical: str) -> Any:
        """The pages of a container, shard by shard."""
        for shard, (node, _) in enumerate(self._where):
            place: int | None = 0
            while place is not None:
                rows, place = await self._ask(node, "backup_rows", shard, physical, place)
                if rows:
                    yield rows

    async def _ask(self, node: str, function: str, *args: Any) -> Any:
        if node not in self._connection.members:
            await self._connection.refresh()
        return (await self._connection.call_node(node, "db", function, self._cut, *args)).value

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
    name = os.fspath(path)
    with _open(path) as file:
        facts, objects = _verify(file, name)
        separators = {str(container): separator for container, separator in facts["containers"]}
        wanted = tuple(dict.fromkeys(containers)) if containers is not None else tuple(separators)
        missing = [container for container in wanted if container not in separators]
        if missing:
            raise NotFound(f"{name} holds no container {missing[0]!r:.100}; it holds {', '.join(separators) or 'none'}")
        file.seek(0)
        restored = await _Restore(connection, separators, str(facts["id"]), wanted, replace).run(Reader(file, name))
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

    async def run(self, reader: Reader) -> int:
        """How many objects it has written."""
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
        for container, rows in reader.rows():
            if (name := self._names[container]) in self._wanted:
                await self._fill(self._staged[name], rows)
                objects += len(rows)
        for begin in range(0, len(self._wanted), NAMED_TOGETHER_MAX):
            names = {self._staged[name]: name for name in self._wanted[begin : begin + NAMED_TOGETHER_MAX]}
            await self._call("put_in_place", names, self._replace)
        return objects

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
            except (Conflict, Unavailable, Timeout, Unreachable, Forgotten):
                if attempt == ATTEMPTS_MAX - 1:
                    raise
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


def _create(path: Path) -> BinaryIO:
    try:
        return open(path, "wb")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

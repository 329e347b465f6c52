"""The database, as a client sees it: ``cluster.db``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from gostore.client import backup
from gostore.client.connection import TIMEOUT_S, Connection
from gostore.client.keyvalue import RemoteKeyValue
from gostore.client.watch import Watch
from gostore.core.blocks import Block
from gostore.core.keyvalue import SCAN_LIMIT_MAX, Committed, Entry, Value, Write
from gostore.core.transaction import TRANSACTION_ATTEMPTS_MAX, Transaction, transact
from gostore.core.twins import Runner, SyncTwins, sync_twin

T = TypeVar("T")

RETRY_PAUSE_S: Final = 0.01
"""Mean pause before the second attempt of a transaction; it doubles, with jitter, up to 32 times this."""

Step = str | int


class TransactionHandle(SyncTwins):
    """A transaction: reads from a snapshot, private writes, one commit.

        async with db.transaction() as t:
            if await t.get("accounts", "alice", "balance") >= 10:
                t.add("accounts", "alice", -10, "balance")
                t.add("accounts", "bob", 10, "balance")

    Leaving the block commits, an exception aborts. The commit raises :class:`Conflict` (definite) when what was read
    has changed meanwhile; :meth:`DbHandle.transact` runs a function again then.
    """

    def __init__(self, runner: Runner, transaction: Transaction) -> None:
        self._runner = runner
        self._transaction = transaction

    async def get(self, container: str, key: str, *path: Step, default: Value = None) -> Value:
        """The value of an object, or at a place in it, own writes included; ``default`` where nothing is."""
        return await self._transaction.get(container, key, path, default)

    get_sync = sync_twin(get)

    async def exists(self, container: str, key: str) -> bool:
        """Whether there is such an object, own writes included."""
        return await self._transaction.exists(container, key)

    exists_sync = sync_twin(exists)

    async def scan(self, container: str, prefix: str = "", *, limit: int = SCAN_LIMIT_MAX) -> list[tuple[str, Value]]:
        """The first ``limit`` (key, value) with this prefix, by key; a new key among them is a conflict."""
        entries = await self._transaction.scan(container, prefix, limit=limit)
        return [(entry.key, entry.value) for entry in entries]

    scan_sync = sync_twin(scan)

    def set(self, container: str, key: str, value: Value, *path: Step) -> None:
        """Store a value, or put it at a place in an object; what is missing on the way is made."""
        self._transaction.set(container, key, value, path)

    def add(self, container: str, key: str, amount: float, *path: Step) -> None:
        """Add to a number (absent: 0). Two transactions that only add never conflict."""
        self._transaction.add(container, key, amount, path)

    def delete(self, container: str, key: str, *path: Step) -> None:
        """Remove an object, or a place in it; absent is fine."""
        self._transaction.delete(container, key, path)

    async def commit(self) -> Committed:
        """Make the writes happen, all or nothing; returns the new versions. Raises :class:`Conflict`."""
        return await self._transaction.commit()

    commit_sync = sync_twin(commit)

    def abort(self) -> None:
        """Forget the writes."""
        self._transaction.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self._runner.run(self._transaction.__aexit__(kind, error, trace))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._runner.run_sync(self._transaction.__aexit__(kind, error, trace))


class DbHandle(SyncTwins):
    """Containers of nested objects. Every call goes through any node; ``via`` names one.

    :meth:`watch` hears of every change of a key or of a prefix.

    All raise :class:`NotFound` for an unknown container, :class:`WrongType` for a path that does not fit the value,
    :class:`Unavailable` (definite: try again) and :class:`Timeout` (of a write: it may have happened).
    """

    def __init__(self, runner: Runner, connection: Callable[[], Connection]) -> None:
        self._runner = runner
        self._connection = connection

    def _store(self, via: str | None) -> RemoteKeyValue:
        return RemoteKeyValue(self._connection, via)

    # containers

    async def create_container(
        self, name: str, *, separator: str | None = None, replication: str | None = None
    ) -> None:
        """Make a container; one that is there with the same options is fine, else :class:`AlreadyExists`.

        ``separator``: keys that agree up to its first occurrence lie in the same shard.
        """
        await self._store(None).create_container(name, separator=separator, replication=replication)

    create_container_sync = sync_twin(create_container)

    async def drop_container(self, name: str) -> None:
        """Remove a container with everything in it."""
        await self._store(None).drop_container(name)

    drop_container_sync = sync_twin(drop_container)

    async def containers(self) -> dict[str, dict[str, Any]]:
        """Name -> options."""
        return await self._store(None).containers()

    containers_sync = sync_twin(containers)

    # objects

    async def get(
        self,
        container: str,
        key: str,
        *path: Step,
        default: Value = None,
        consistency: str = "linearizable",
        via: str | None = None,
    ) -> Value:
        """The value of an object, or at a place in it; ``default`` where nothing is.

        ``consistency="stale"``: what the nearest replica has applied. It is answered without a majority too, and may be
        old.
        """
        found = await self._store(via).get(container, key, path, consistency=consistency)
        return found.value if found.found else default

    get_sync = sync_twin(get)

    async def set(self, container: str, key: str, value: Value, *path: Step, via: str | None = None) -> int:
        """Store a value, or put it at a place in an object; returns the object's new version."""
        return await self._write(Write("set", container, key, value, path), via)

    set_sync = sync_twin(set)

    async def add(self, container: str, key: str, amount: float, *path: Step, via: str | None = None) -> int:
        """Add to a number (absent: 0); returns the object's new version."""
        return await self._write(Write("add", container, key, amount, path), via)

    add_sync = sync_twin(add)

    async def delete(self, container: str, key: str, *path: Step, via: str | None = None) -> int:
        """Remove an object, or a place in it; absent is fine. Returns the version of the removal."""
        return await self._write(Write("delete", container, key, None, path), via)

    delete_sync = sync_twin(delete)

    async def _write(self, write: Write, via: str | None) -> int:
        return (await self._store(via).commit((), [write])).version

    async def scan(
        self, container: str, prefix: str = "", *, limit: int | None = None, via: str | None = None
    ) -> list[tuple[str, Value]]:
        """All (key, value) with this prefix by key, or the first ``limit``. Pages are read one after the other."""
        entries: list[Entry] = []
        start: str | None = ""
        while start is not None and (limit is None or len(entries) < limit):
            wish = SCAN_LIMIT_MAX if limit is None else min(limit - len(entries), SCAN_LIMIT_MAX)
            page = await self._store(via).scan(container, prefix, start=start, limit=wish)
            entries += page.entries
            start = page.next_start
        return [(entry.key, entry.value) for entry in entries]

    scan_sync = sync_twin(scan)

    # transactions

    def transaction(self, *, via: str | None = None) -> TransactionHandle:
        """One attempt at a transaction, for ``async with`` or ``with``."""
        return TransactionHandle(self._runner, Transaction(self._store(via)))

    async def transact(
        self,
        body: Callable[[TransactionHandle], Awaitable[T]],
        *,
        attempts_max: int = TRANSACTION_ATTEMPTS_MAX,
        via: str | None = None,
    ) -> T:
        """Run ``body(t)`` in a transaction and commit, again after a conflict; returns what it returned.

        ``body`` may run several times, so it should have no effect but on ``t``. Raises the last :class:`Conflict`.
        """
        rng = self._connection().env.rng

        async def pause(attempt: int) -> None:
            await asyncio.sleep(RETRY_PAUSE_S * min(2.0**attempt, 32.0) * rng.uniform(0.5, 1.0))

        return await transact(
            self._store(via),
            lambda transaction: body(TransactionHandle(self._runner, transaction)),
            pause=pause,
            attempts_max=attempts_max,
        )

    transact_sync = sync_twin(transact)

    async def run(self, block: Block, *, via: str | None = None) -> list[Value]:
        """Run a block of operations as one transaction in one round trip; returns the values of its results.

        A node runs it again after a conflict. After a :class:`Timeout` it may have happened.
        """
        reply = await self._connection().call("db", "run", block.to_wire(), via=via)
        return list(reply.value)

    run_sync = sync_twin(run)

    def watch(
        self,
        container: str,
        *,
        key: str | None = None,
        prefix: str | None = None,
        since: int | Mapping[int, int] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Watch:
        """The changes of a key, or of all keys with a prefix ("": of the container), for ``async with`` or ``with``.

            async with db.watch("config", prefix="limits/") as watch:
                async for change in watch:
                    print(change.key, change.version, change.value)

        From now on, or after the version ``since``. ``timeout_s``: how long a shard may be without a leader. Raises
        :class:`BadRequest`. What it promises, and how it ends, is written in :mod:`gostore.client.watch`.
        """
        return Watch(
            self._runner, self._connection, container, key=key, prefix=prefix, since=since, timeout_s=timeout_s
        )

    async def shards(self) -> list[dict[str, Any]]:
        """Who holds what: of each shard its primary and its replicas."""
        return list((await self._connection().call("db", "shards", repeatable=True)).value)

    shards_sync = sync_twin(shards)

    # backup

    async def backup(self, path: str | os.PathLike[str], *, containers: Iterable[str] | None = None) -> dict[str, Any]:
        """Write the containers (all, without those of the files) as they are at one instant into a file.

        Every transaction, across shards too, is in it wholly or not at all; writers wait for a moment.
        Figures: path, containers, objects, bytes, shards. Raises :class:`NotFound` for a container that is not there,
        :class:`Unavailable` when a shard cannot be read.
        """
        return await backup.backup(self._connection(), path, containers)

    backup_sync = sync_twin(backup)

    async def restore(
        self, path: str | os.PathLike[str], *, containers: Iterable[str] | None = None, replace: bool = False
    ) -> dict[str, Any]:
        """Bring back the containers of a backup, or some of them; they appear all at once, at the end.

        A container that exists is refused (:class:`AlreadyExists`) unless ``replace``: then the one that is there goes,
        with everything in it. After an interruption do the same again. Figures: path, containers, objects. Raises
        :class:`Corrupt` for a file that is damaged or cut off, before anything is changed.
        """
        return await backup.restore(self._connection(), path, containers, replace=replace)

    restore_sync = sync_twin(restore)

    def __repr__(self) -> str:
        return "<db>"

"""A transaction as its owner sees it: reads from a snapshot, private writes, one commit.

    async def transfer(t: Transaction) -> None:
        t.add("accounts", "alice", -10, path=("balance",))
        t.add("accounts", "bob", 10, path=("balance",))
        if await t.get("accounts", "alice", ("balance",)) < 0:
            raise ValueError("alice is broke")  # nothing was changed

    await transact(store, transfer, pause=...)

Reads see the state of the shard at the first read from it, and the transaction's own writes. Nothing leaves the
transaction before :meth:`Transaction.commit`, which fails with ``Conflict`` when something that was read has changed
since; then :func:`transact` runs the function again. The class needs nothing but a :class:`KeyValue`: a service in a
node and a client on the other side of a network use the same one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from gostore.core.errors import BadRequest, Conflict
from gostore.core.keyvalue import (
    SCAN_LIMIT_MAX,
    Committed,
    Entry,
    KeyValue,
    Path,
    PointRead,
    Read,
    Value,
    Versioned,
    Write,
    prefix_end,
)
from gostore.core.values import (
    MISSING,
    add_at,
    check_path,
    check_value,
    delete_at,
    get_at,
    kind_of,
    private_copy,
    set_at,
)

T = TypeVar("T")

TRANSACTION_ATTEMPTS_MAX = 16
"""Runs of one transaction before its conflict is reported. Larger: more patience where many write the same objects."""

Place = tuple[str, str]


class Transaction:
    """One attempt. Use it from one task; after ``commit`` it is finished."""

    def __init__(self, store: KeyValue) -> None:
        self._store = store
        self._snapshot: dict[int, int] = {}
        self._reads: dict[Read, None] = {}
        self._seen: dict[Place, Versioned] = {}
        self._writes: dict[Place, list[Write]] = {}
        self._finished = False

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(self._reads)

    @property
    def writes(self) -> tuple[Write, ...]:
        return tuple(write for writes in self._writes.values() for write in writes)

    # reading

    async def get(self, container: str, key: str, path: Sequence[str | int] = (), default: Value = None) -> Value:
        """The value at a path, ``default`` where nothing is. The caller may change what it gets.

        Raises ``WrongType``, ``NotFound`` (container), ``Conflict`` (the snapshot is gone: run again).
        """
        self._check_open()
        accessors = _accessors(path)
        check_path(accessors)
        root = self._with_writes((container, key), await self._read(container, key))
        value = root if root is MISSING else get_at(root, accessors)
        return default if value is MISSING else value

    async def exists(self, container: str, key: str) -> bool:
        self._check_open()
        return self._with_writes((container, key), await self._read(container, key)) is not MISSING

    async def scan(
        self, container: str, prefix: str = "", *, start: str = "", end: str | None = None, limit: int = SCAN_LIMIT_MAX
    ) -> list[Entry]:
        """The first ``limit`` objects with ``prefix`` and ``start <= key < end``, own writes included.

        Own writes have version 0. What was scanned is validated as a whole: a new key in it is a conflict.
        """
        self._check_open()
        _check_strings(container=container, prefix=prefix, start=start, end="" if end is None else end)
        if type(limit) is not int:
            raise BadRequest(f"limit: expected an integer, not {kind_of(limit)}")
        start = max(start, prefix)
        bounds = [bound for bound in (end, prefix_end(prefix) if prefix else None) if bound is not None]
        stop = min(bounds) if bounds else None
        found: list[Entry] = []
        cursor: str | None = start
        while cursor is not None and len(found) < limit:
            page = await self._store.scan(
                container, prefix, start=cursor, end=end, limit=min(limit, SCAN_LIMIT_MAX), snapshot=self._snapshot
            )
            for shard, index in page.snapshot.items():
                self._snapshot.setdefault(shard, index)
            self._reads.update(dict.fromkeys(page.ranges))
            upto = stop if page.next_start is None else page.next_start
            found += self._merged(container, page.entries, cursor, upto)
            cursor = page.next_start
        return found[:limit]

    async def _read(self, container: str, key: str) -> Versioned:
        """The whole object as the snapshot has it; asked for once."""
        _check_strings(container=container, key=key)
        seen = self._seen.get((container, key))
        if seen is None:
            seen = await self._store.get(container, key, snapshot=self._snapshot)
            self._snapshot.setdefault(seen.shard, seen.index)
            self._seen[container, key] = seen
            self._reads[PointRead(container, key, seen.version)] = None
        return seen

    def _with_writes(self, place: Place, seen: Versioned) -> Value:
        """A private copy of the object after this transaction's own writes."""
        return self._replay(place, private_copy(seen.value) if seen.found else MISSING)

    def _replay(self, place: Place, root: Value) -> Value:
        for write in self._writes.get(place, ()):
            if not write.path and write.operation != "add":
                root = private_copy(write.value) if write.operation == "set" else MISSING
                continue
            if root is MISSING and write.operation == "delete":
                continue
            before = None if root is MISSING else root
            if write.operation == "set":
                root = set_at(before, write.path, private_copy(write.value))
            elif write.operation == "delete":
                root = delete_at(before, write.path)
            else:
                root = add_at(before, write.path, write.value)
        return root

    def _merged(self, container: str, entries: Sequence[Entry], start: str, end: str | None) -> list[Entry]:
        merged = {entry.key: entry for entry in entries}
        for place in self._writes:
            key = place[1]
            if place[0] != container or key < start or (end is not None and key >= end):
                continue
            entry = merged.pop(key, None)
            value = self._replay(place, MISSING if entry is None else private_copy(entry.value))
            if value is not MISSING:
                merged[key] = Entry(key, value, 0)
        return [merged[key] for key in sorted(merged)]

    # writing

    def set(self, container: str, key: str, value: Value, path: Sequence[str | int] = ()) -> None:
        """Store ``value``; with a path at that place of the object, creating what is missing on the way."""
        check_value(value)
        self._write(Write("set", container, key, private_copy(value), _accessors(path)))

    def delete(self, container: str, key: str, path: Sequence[str | int] = ()) -> None:
        """Remove the object, or what is at a path of it; absent is fine."""
        self._write(Write("delete", container, key, None, _accessors(path)))

    def add(self, container: str, key: str, amount: float, path: Sequence[str | int] = ()) -> None:
        """Add to the number at a path (absent: 0). Two transactions that only add never conflict."""
        check_value(amount)
        self._write(Write("add", container, key, amount, _accessors(path)))

    def _write(self, write: Write) -> None:
        self._check_open()
        _check_strings(container=write.container, key=write.key)
        check_path(write.path)
        place = (write.container, write.key)
        if not write.path and write.operation != "add":
            # Whatever was written to this object before is overwritten as a whole.
            self._writes[place] = [write]
        else:
            self._writes.setdefault(place, []).append(write)

    # ending

    async def commit(self, *, timeout_s: float | None = None) -> Committed:
        """Make the writes happen, all or nothing.

        A transaction that only read, and from one shard, needs no validation: it is serialised at its snapshot.
        """
        self._check_open()
        self._finished = True
        if not self._writes and len(self._snapshot) <= 1:
            return Committed({})
        return await self._store.commit(self.reads, self.writes, timeout_s=timeout_s)

    def abort(self) -> None:
        """Forget the writes."""
        self._finished = True

    def _check_open(self) -> None:
        if self._finished:
            raise BadRequest("this transaction is finished; begin another one")

    async def __aenter__(self) -> Transaction:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        """Commit, or abort after an exception."""
        if kind is not None:
            self.abort()
        elif not self._finished:
            await self.commit()


def _check_strings(**arguments: Any) -> None:
    """Raises ``BadRequest``."""
    for name, text in arguments.items():
        if not isinstance(text, str):
            raise BadRequest(f"{name}: expected a string, not {kind_of(text)}")


def _accessors(path: Any) -> Path:
    """Raises ``BadRequest``."""
    if not isinstance(path, (list, tuple)):
        raise BadRequest(f"path: expected a list or tuple of names and numbers, not {kind_of(path)}")
    for part in path:
        if not isinstance(part, (str, int)) or isinstance(part, bool):
            raise BadRequest(f"path: an accessor is a name or a number, not {kind_of(part)}")
    return tuple(path)


async def transact(
    store: KeyValue,
    body: Callable[[Transaction], Awaitable[T]],
    *,
    pause: Callable[[int], Awaitable[None]],
    attempts_max: int = TRANSACTION_ATTEMPTS_MAX,
) -> T:
    """Run ``body`` in a transaction and commit, again after a conflict; returns what ``body`` returned.

    ``body`` may run several times: it should have no effect but on its transaction. ``pause(n)`` waits before attempt
    n + 1, with jitter: without it those who collided would collide again. Raises the last ``Conflict`` after
    ``attempts_max`` attempts, and whatever ``body`` raises.
    """
    for attempt in range(1, attempts_max + 1):
        transaction = Transaction(store)
        try:
            result = await body(transaction)
            await transaction.commit()
        except Conflict:
            transaction.abort()
            if attempt == attempts_max:
                raise
            await pause(attempt)
        else:
            return result
    raise AssertionError("attempts_max is at least 1")

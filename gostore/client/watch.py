"""Watches: a client hears of every change of a key, or of all keys with a prefix, as it is committed.

    async with db.watch("config", prefix="limits/") as watch:
        seen = dict(await db.scan("config", "limits/"))  # what was there when the watch began is in it
        async for change in watch:
            ...  # change.key, change.value, change.deleted, change.version, change.shard

    with db.watch("config", key="mode") as watch:  # in a script or a notebook
        changes = watch.poll_sync(timeout_s=5.0)

What a watch promises
=====================

* *A change* (:class:`~gostore.core.keyvalue.Change`) is one object that one commit wrote or removed. Its version is the
  index of the commit in the log of its shard. Only what is committed is delivered.
* *From where.* A watch begins when its block is entered: everything that is committed after that is delivered. With
  ``since=``, it is everything after that version, as far as the changes are kept (a shard keeps its last 4,096, and at
  most 8 MiB of them; a replica that began with a snapshot, those since). A prefix spans all shards, each with a log and
  versions of its own, so there ``since`` is the ``position`` of another watch.
* *Order.* The changes of a shard, and so those of a key, come in the order of their versions, each at most once, none
  left out. There is no order between shards.
* *Transactions.* Each object that a transaction wrote is a change. Those of one shard have one version, and come one
  after the other; so do those of transactions that came to the shard together. Those of several shards come shard by
  shard, each with its own version, and others may be between.
* *Leaders.* A watch follows its shards when their leaders die or move: the next one goes on after the last version
  delivered. While a shard has no leader, the watch waits, ``timeout_s`` at most; then it raises ``Unavailable``, has
  lost nothing, and can be iterated again.
* *The end.* ``Compacted``: what comes next is no longer kept, because the watch was left alone for too long, or because
  the shard moved behind a snapshot; there is a gap, so read again, and watch anew. ``NotFound``: the container was
  dropped. What was received before is delivered first.
* *A slow consumer* is not waited for, and costs nothing: a watch asks only while somebody waits for a change, keeps
  the answer to one question for each shard at most, and ends with ``Compacted`` when the shard has forgotten what it
  did not fetch.
* With the policy ``primary_backup`` it is as good as the reads of that policy: a primary that was deposed and does not
  know it answers "nothing new", and what two primaries wrote has no one order. That is its lesson. With ``quorum``
  there is no order that stays: ``NotSupported``.

One consumer at a time. A wait that is cancelled (``asyncio.timeout``, an interrupt) loses no change.

How: every shard's primary is asked "what is new after ...", by a call that it may leave unanswered for
:data:`WAIT_S`; see ``gostore.services.db.watches``. Shards with the same primary are asked together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from gostore.client.connection import TIMEOUT_S, Connection
from gostore.core.errors import BadRequest, Compacted, GoStoreError, NotFound, NotOwner, Unavailable, error_from_wire
from gostore.core.keyvalue import Change
from gostore.core.twins import Runner, SyncTwins, sync_twin
from gostore.core.values import unpack

WAIT_S: Final = 2.0
"""How long a primary may wait for a change before it says that there is none. Longer: fewer messages of a quiet watch;
shorter: sooner away from one that is dead or deposed."""

ANSWER_S: Final = 1.5
"""For the answer beside that, read barrier and both ways."""

PAUSE_S: Final = (0.02, 0.5)
"""Before a shard is asked again whose primary was not found: from, doubling, to."""


@dataclass(slots=True)
class _Trouble:
    """A shard that did not answer. ``asked_s``: seconds that it was tried, up to ``last_s`` (loop time)."""

    error: GoStoreError
    last_s: float
    attempts: int = 0
    asked_s: float = 0.0


class Watch(SyncTwins):
    """See the module. Made by :meth:`DbHandle.watch`; use it in ``async with`` or ``with``.

    ``position``: shard -> the index up to which everything was handed out; the ``since`` of a watch that goes on from
    here. (In the middle of a transaction, it is the index before it.)
    """

    def __init__(
        self,
        runner: Runner,
        connection: Callable[[], Connection],
        container: str,
        *,
        key: str | None = None,
        prefix: str | None = None,
        since: int | Mapping[int, int] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if (key is None) == (prefix is None):
            raise BadRequest(f"watch(key={key!r:.100}, prefix={prefix!r:.100}): give one of them, and not both")
        for name, text in (("container", container), ("key", key), ("prefix", prefix)):
            if not isinstance(text, str | None):
                raise BadRequest(f"watch: {name} = {text!r:.100} is no string")
        if not timeout_s > 0:
            raise BadRequest(f"watch: timeout_s = {timeout_s}: allowed are values above 0")
        self._runner = runner
        self._connection = connection
        self._what = (container, key, prefix)
        self._from = _checked(since)
        self._timeout_s = timeout_s
        self._range: tuple[str, str, str | None] | None = None
        """The container's physical name, and the keys from, to."""
        self._closed = False
        self._since: dict[int, tuple[int, int]] = {}
        """Shard -> (index, skip): what was received, as the nodes count it."""
        self._leaders: dict[int, str] = {}
        self._free: dict[int, None] = {}
        """Shards that nobody is being asked for."""
        self._troubles: dict[int, _Trouble] = {}
        """Of the shards that cannot be asked."""
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._answers: deque[tuple[str, list[int], list[Any] | GoStoreError]] = deque()
        self._arrived = asyncio.Event()
        self._buffer: deque[Change] = deque()
        self._dropped = 0
        """Changes that have left the buffer."""
        self._taken = 0
        """Changes that were handed out. They leave the buffer with the next wait: one that was cancelled on its way to
        the consumer's loop is given again."""
        self._error: GoStoreError | None = None

    # beginning and end

    async def open(self) -> Self:
        """Begin. Raises ``BadRequest`` and ``Compacted`` because of ``since``, and what a read raises."""
        if self._closed:
            raise Unavailable("this watch was closed; make another one")
        if self._range is not None:
            return self
        connection = self._connection()
        reply = await connection.call("db", "watch", *self._what, repeatable=True, timeout_s=self._timeout_s)
        physical, start, end, ways = reply.value
        begin = self._begin({shard: (index, kept) for shard, index, kept, _ in ways})
        self._since = {shard: (index, 0) for shard, index in begin.items()}
        self._leaders = {shard: leader for shard, _, _, leader in ways}
        self._free = dict.fromkeys(self._since)
        self._range = (physical, start, end)
        return self

    open_sync = sync_twin(open)

    def _begin(self, known: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        """Shard -> index. ``known``: shard -> (its index now, the oldest from which changes are kept)."""
        since = self._from
        if since is None:
            return {shard: index for shard, (index, _) in known.items()}
        if isinstance(since, int):
            if len(known) > 1:
                raise BadRequest(
                    f"since = {since}: this prefix spans {len(known)} shards, each with versions of its own; give the "
                    "position of another watch"
                )
            since = dict.fromkeys(known, since)
        if missing := [shard for shard in known if shard not in since]:
            raise BadRequest(f"since = {dict(since)!r:.200}: names no version of shard {missing[0]}")
        for shard, (index, kept) in known.items():
            if since[shard] > index:
                raise BadRequest(f"since = {since[shard]}: shard {shard} has come to {index}, that is in the future")
            if since[shard] < kept:
                raise self._gap(Compacted(f"shard {shard} keeps what came after {kept}, not after {since[shard]}"))
        return {shard: since[shard] for shard in known}

    @staticmethod
    def _gap(error: Compacted) -> Compacted:
        return Compacted(f"{error.message}: read again, and begin a new watch before that", **error.details)

    async def close(self) -> None:
        """End it: whoever iterates comes to the end. A second call does nothing."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self._arrived.set()

    close_sync = sync_twin(close)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        return self.open_sync()

    def __exit__(self, *_: object) -> None:
        self.close_sync()

    def __repr__(self) -> str:
        container, key, prefix = self._what
        state = "closed" if self._closed else "not begun" if self._range is None else f"at {self.position}"
        return f"<watch of {container!r}, {f'key {key!r}' if prefix is None else f'prefix {prefix!r}'}: {state}>"

    # consuming

    @property
    def position(self) -> dict[int, int]:
        found = {shard: index for shard, (index, _) in self._since.items()}
        for change in reversed(list(self._buffer)[self._taken - self._dropped :]):
            found[change.shard] = change.version - 1
        return found

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        changes = await self._runner.run(self._wait(self._taken, None))
        if not changes:
            raise StopAsyncIteration
        self._taken += 1
        return changes[0]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        changes = self._runner.run_sync(self._wait(self._taken, None))
        if not changes:
            raise StopIteration
        self._taken += 1
        return changes[0]

    # Not `async def`: what was handed out must be counted in the consumer's loop, and not in the runner's.

    def poll(self, timeout_s: float = 1.0) -> Awaitable[list[Change]]:
        """The changes that are there; if none, those that come first in ``timeout_s``, or an empty list."""
        return self._poll(timeout_s)

    async def _poll(self, timeout_s: float) -> list[Change]:
        changes = await self._runner.run(self._wait(self._taken, timeout_s))
        self._taken += len(changes)
        return changes

    def poll_sync(self, timeout_s: float = 1.0) -> list[Change]:
        """The changes that are there; if none, those that come first in ``timeout_s``, or an empty list.

        Blocks until it is done; the same as ``poll``.
        """
        changes = self._runner.run_sync(self._wait(self._taken, timeout_s))
        self._taken += len(changes)
        return changes

    async def _wait(self, taken: int, timeout_s: float | None) -> list[Change]:
        """Everything received after the first ``taken`` changes, at least one; none after ``timeout_s``, or the end."""
        if self._range is None:
            raise Unavailable("this watch has not begun; use it inside `async with` or `with`")
        while self._dropped < taken:
            self._buffer.popleft()
            self._dropped += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._fill()
        except TimeoutError:
            pass
        return list(self._buffer)

    async def _fill(self) -> None:
        """Until something is in the buffer, or it is closed."""
        while True:
            while self._answers:
                self._take(*self._answers.popleft())
            if isinstance(self._error, Unavailable):
                error, self._error = self._error, None  # whoever iterates again, waits again
                raise error
            if self._buffer or self._closed:
                return
            if self._error is not None:
                raise self._error
            self._ask()
            self._arrived.clear()
            if not self._answers:
                await self._arrived.wait()

    # asking

    def _ask(self) -> None:
        """See to it that the primary of every shard is being asked."""
        connection = self._connection()
        groups: dict[tuple[str, int | None], list[int]] = {}
        for shard in self._free:
            node = self._leaders.get(shard) or connection.pick()
            # Whoever is in trouble keeps nobody else waiting.
            groups.setdefault((node, shard if shard in self._troubles else None), []).append(shard)
        for (node, _), shards in groups.items():
            trouble = self._troubles.get(shards[0])
            attempts = 0 if trouble is None else trouble.attempts
            task = connection.env.tasks.start(self._ask_one(connection, node, shards, attempts), name="watch")
            self._tasks[task] = None
            task.add_done_callback(lambda done: self._tasks.pop(done, None))
        self._free.clear()

    async def _ask_one(self, connection: Connection, node: str, shards: list[int], attempts: int) -> None:
        assert self._range is not None
        found: list[Any] | GoStoreError = Unavailable("the connection was closed")
        try:
            if attempts > 1:  # the first time, somebody was named perhaps, or will be by whoever is asked next
                pause_s = min(PAUSE_S[0] * 2.0 ** min(attempts, 16), PAUSE_S[1])
                await asyncio.sleep(pause_s * connection.env.rng.uniform(0.5, 1.0))
            since = [[shard, *self._since[shard]] for shard in shards]
            wait_s = 0.0 if attempts else WAIT_S
            reply = await connection.call_node(
                node, "db", "changes", *self._range, since, wait_s, timeout_s=wait_s + ANSWER_S
            )
            answers: list[Any] = reply.value
            found = answers
            if any(len(answer) == 2 and _is_dropped(answer[1]) for answer in answers):
                await self._check_dropped(connection)
        except GoStoreError as error:
            found = error
            if not isinstance(error, Unavailable):
                connection.shun(node)
        finally:
            self._answers.append((node, shards, found))
            self._arrived.set()

    async def _check_dropped(self, connection: Connection) -> None:
        """Raises ``Unavailable``, so that the shard is asked again, unless the container was dropped indeed.

        A shard that has forgotten some dropped containers takes for dropped what it does not know, until a node looks
        the container up; see :mod:`gostore.services.db.drops`.
        """
        assert self._range is not None
        try:
            reply = await connection.call("db", "watch", *self._what, repeatable=True, timeout_s=ANSWER_S)
        except NotFound:
            return
        except GoStoreError as error:
            raise Unavailable(f"whether the container was dropped is not known: {error.message}") from None
        if reply.value[0] == self._range[0]:
            raise Unavailable("the shard had forgotten that the container is there")

    def _take(self, node: str, shards: list[int], found: list[Any] | GoStoreError) -> None:
        if isinstance(found, GoStoreError):
            found = [[shard, found.to_wire()] for shard in shards]
        # Those that filled the answer come last in the next one.
        for answer in sorted(found, key=lambda answer: 0 if len(answer) == 2 else len(answer[4])):
            self._free[answer[0]] = None
            match answer:
                case [shard, None, index, skip, rows]:
                    self._troubles.pop(shard, None)
                    self._leaders[shard] = node
                    self._since[shard] = (index, skip)
                    self._buffer.extend(self._change(shard, *row) for row in rows)
                case [shard, wire]:
                    self._fail(shard, node, error_from_wire(wire))

    def _change(self, shard: int, key: str, version: int, packed: bytes | None) -> Change:
        value = None if packed is None else unpack(packed)
        return Change(self._what[0], key, version, shard, value, deleted=packed is None)

    def _fail(self, shard: int, node: str, error: GoStoreError) -> None:
        """It is asked again elsewhere, unless the error is the end, or it goes on for too long."""
        gap = isinstance(error, Compacted)
        if isinstance(error, NotFound) or (gap and not error.details.get("ahead")):
            self._error = self._gap(error) if isinstance(error, Compacted) else error
            return
        now_s = asyncio.get_running_loop().time()
        trouble = self._troubles.setdefault(shard, _Trouble(error, now_s))
        trouble.attempts += 1
        trouble.asked_s += min(now_s - trouble.last_s, PAUSE_S[1] + ANSWER_S)  # more is time in which nobody waited
        trouble.last_s = now_s
        self._leaders.pop(shard, None)
        if not isinstance(error, NotOwner):
            trouble.error = error
        elif isinstance(owner := error.details.get("owner"), str) and owner != node:
            self._leaders[shard] = owner
        if trouble.asked_s >= self._timeout_s:
            trouble.asked_s = 0.0
            self._error = self._error or self._given_up(shard, trouble.error)

    def _given_up(self, shard: int, error: GoStoreError) -> GoStoreError:
        if isinstance(error, Compacted):
            return self._gap(error)
        return Unavailable(f"shard {shard} cannot be watched for {self._timeout_s:g} s: {error.message}")


def _is_dropped(error: Any) -> bool:
    return isinstance(found := error_from_wire(error), NotFound) and "dropped" in found.details


def _checked(since: Any) -> int | Mapping[int, int] | None:
    versions = list(since.items()) if isinstance(since, Mapping) else [] if since is None else [(0, since)]
    for shard, version in versions:
        if type(shard) is not int or type(version) is not int or version < 0:
            raise BadRequest(f"since = {since!r:.200}: expected a version, or the position of another watch")
    return dict(versions) if isinstance(since, Mapping) else since

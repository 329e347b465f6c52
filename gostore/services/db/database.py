"""The key-value interface at a node: containers, limits, and the way of every request to its shards."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from gostore.cluster.ring import token_of
from gostore.config import DbConfig
from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    Conflict,
    GoStoreError,
    NotFound,
    NotSupported,
    TooLarge,
    Unavailable,
)
from gostore.core.keyvalue import (
    SCAN_LIMIT_MAX,
    Committed,
    Page,
    Path,
    PointRead,
    Read,
    RequestId,
    RequestIds,
    Versioned,
    Write,
    prefix_end,
)
from gostore.core.values import check_path, check_text, pack
from gostore.env import Env
from gostore.services.db.drops import admit_in, drop_in, drops_in
from gostore.services.db.pages import merge_pages
from gostore.services.db.replication import together
from gostore.services.db.router import RETRIED, Router
from gostore.services.db.shard import succeed

T = TypeVar("T")

Wanted = tuple[list[Read], list[Write], RequestId]
"""A transaction as it arrives: what it has read, what it writes, and its name."""

SYSTEM: Final = ".containers"
"""The container of the containers. Names that begin with a dot belong to the system."""

CONTAINERS_MAX: Final = 1024
"""Containers of a cluster. Every node remembers them all."""

TRANSACTION_SIZE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of all that one transaction reads and writes, packed: it becomes one entry of a log, and one message."""

CREATE_ATTEMPTS_MAX: Final = 8

LINEARIZABLE: Final = "linearizable"
CONSISTENCIES: Final = (LINEARIZABLE, "stale")
"""Of a read. ``stale`` costs no message where this node holds a copy, and may lag behind by any time."""

NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
"""Of a container."""


@dataclass(frozen=True, slots=True)
class Container:
    """``physical``: its name inside the shards, which no other container ever had or will have."""

    name: str
    physical: str
    separator: str | None
    replication: str
    dropping: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"separator": self.separator, "replication": self.replication}

    def to_value(self) -> dict[str, Any]:
        return {**self.options, "physical": self.physical, "dropping": self.dropping}

    @classmethod
    def from_value(cls, name: str, value: Mapping[str, Any]) -> Container:
        return cls(name, value["physical"], value["separator"], value["replication"], value["dropping"])


_SYSTEM = Container(SYSTEM, SYSTEM, None, "")


class Database:
    """``KeyValue`` in a node's own process. ``client``: a name that no other run of any node has."""

    def __init__(self, env: Env, router: Router, config: DbConfig, client: str) -> None:
        self._env = env
        self._router = router
        self._config = config
        self._client = client
        self._sequence = 0
        self._requests = RequestIds(client)
        self._known: dict[str, Container] = {}

    def shard_of(self, container: Container, key: str) -> int:
        partition = key.partition(container.separator)[0] if container.separator else key
        return token_of(partition.encode()) * self._config.shards >> 64

    # containers

    async def create_container(
        self, name: str, *, separator: str | None = None, replication: str | None = None, shown: str | None = None
    ) -> None:
        """See ``KeyValue``. ``shown``: the name that errors and events give to what is in it; else its own."""
        if not NAME.fullmatch(name):
            raise BadRequest(f"container = {name!r:.100}: allowed is what matches {NAME.pattern}")
        if separator is not None:
            check_text("separator", separator, 16)
        here = self._config.replication
        if replication not in (None, here):
            raise NotSupported(
                f"replication = {replication!r}: all shards of this cluster have {here!r}; it is chosen for a cluster, "
                "with the setting db.replication"
            )
        self._sequence += 1
        wanted = Container(name, f"{shown or name}@{self._client}.{self._sequence}", separator, here)
        for _ in range(CREATE_ATTEMPTS_MAX):
            found = await self._lookup(name)
            if found is not None:
                if found.dropping:
                    raise AlreadyExists(f"the container {name!r} is being dropped: drop it again to finish that")
                if found.options != wanted.options:
                    raise AlreadyExists(f"the container {name!r} exists with other options: {found.options}")
                return
            if len(await self.containers()) >= CONTAINERS_MAX:
                raise TooLarge(f"there are {CONTAINERS_MAX} containers already: drop one that is not needed")
            try:
                await self.commit([PointRead(SYSTEM, name, 0)], [Write("set", SYSTEM, name, wanted.to_value())])
            except Conflict:
                continue  # somebody else created it at the same time
            return
        raise Conflict(f"the container {name!r} changes all the time: try again")

    async def drop_container(self, name: str) -> None:
        """Remove a container and all that is in it. Raises ``NotFound``. If it fails half way, do it again.

        Others may drop it too, and create it anew meanwhile: only the one that was found here is touched.
        """
        stored = await self.get(SYSTEM, name)
        if not stored.found:
            raise self._unknown(name)
        physical = Container.from_value(name, stored.value).physical
        for _ in range(CREATE_ATTEMPTS_MAX):
            found = Container.from_value(name, stored.value) if stored.found else None
            if found is None or found.physical != physical:
                return  # somebody else has done it
            try:
                await self._drop(name, found, stored.version)
                return
            except Conflict:
                stored = await self.get(SYSTEM, name)
        raise Conflict(f"the container {name!r} changes all the time: try again", definite=False)

    async def _drop(self, name: str, found: Container, version: int) -> None:
        """``version``: of the record. Raises ``Conflict`` when that has changed; other errors are indefinite."""
        if not found.dropping:
            marked = Write("set", SYSTEM, name, replace(found, dropping=True).to_value())
            version = (await self.commit([PointRead(SYSTEM, name, version)], [marked])).version
        try:
            deadline_s = self._router.deadline(None)
            await self._all_shards(
                range(self._config.shards), lambda shard: drop_in(self._router, shard, found.physical, deadline_s)
            )
            self._known.pop(name, None)
            await self.commit([PointRead(SYSTEM, name, version)], [Write("delete", SYSTEM, name)])
        except GoStoreError as error:
            error.definite = False  # something of it is gone already
            raise

    async def stage_container(self, staged: str, name: str, separator: str | None) -> None:
        """A container to be filled before :meth:`put_in_place` gives it its name.

        ``staged`` must never have been used: nodes remember what a name stands for until that is dropped.
        """
        await self.create_container(staged, separator=separator, shown=name)

    async def put_in_place(self, names: Mapping[str, str], *, replace: bool) -> None:
        """Give staged containers (staged name -> name) their names, in one transaction.

        A container that has the name already is dropped afterwards if ``replace``, else it raises ``AlreadyExists``.
        Raises ``NotFound`` for one that is not staged (any more). If it fails half way, do it again.
        """
        reads: list[PointRead] = []
        writes: list[Write] = []
        replaced: list[str] = []
        for staged, name in names.items():
            if not NAME.fullmatch(name):
                raise BadRequest(f"container = {name!r:.100}: allowed is what matches {NAME.pattern}")
            new, old = await self.get(SYSTEM, staged), await self.get(SYSTEM, name)
            if old.found and old.value.get("staged") == staged and (not new.found or new.value["dropping"]):
                if new.found:
                    replaced.append(staged)
                continue  # an earlier call has done it, and was not heard
            if not new.found or new.value["dropping"]:
                raise NotFound(f"the container {staged!r} is not staged: begin the restore again")
            if old.found and not replace:
                raise AlreadyExists(f"the container {name!r} exists: drop it, or say that it is to be replaced")
            reads += PointRead(SYSTEM, staged, new.version), PointRead(SYSTEM, name, old.version)
            writes.append(Write("set", SYSTEM, name, {**new.value, "staged": staged}))
            if old.found:
                # Under the staged name, so that whoever goes on after an interruption finds what is to be dropped.
                writes.append(Write("set", SYSTEM, staged, {**old.value, "dropping": True}))
                replaced.append(staged)
            else:
                writes.append(Write("delete", SYSTEM, staged))
        await self.commit(reads, writes)
        for staged, name in names.items():
            self._known.pop(staged, None)
            self._known.pop(name, None)
        try:
            for staged in replaced:
                await self.drop_container(staged)
        except GoStoreError as error:
            error.definite = False  # the containers are in their places already
            raise

    async def containers(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        start: str | None = ""
        while start is not None:
            page = await self.scan(SYSTEM, start=start)
            for entry in page.entries:
                found[entry.key] = Container.from_value(entry.key, entry.value).options
            start = page.next_start
        return found

    def known(self, name: str) -> Container | None:
        """What this node remembers of a container."""
        return self._known.get(name)

    async def _lookup(self, name: str) -> Container | None:
        try:
            stored = await self.get(SYSTEM, name)
        except Conflict as error:
            # Of the name, and not of what the caller does: that would be a reason to run a transaction again.
            raise Unavailable(f"the container {name!r} is being put in its place: {error.message}") from None
        return Container.from_value(name, stored.value) if stored.found else None

    async def _container(self, name: str) -> Container:
        if name == SYSTEM:
            return _SYSTEM
        known = self._known.get(name)
        if known is None:
            found = await self._lookup(name) if NAME.fullmatch(name) else None
            if found is None or found.dropping:
                raise self._unknown(name)
            if len(self._known) >= CONTAINERS_MAX:
                self._known.clear()
            known = self._known[name] = found
        return known

    def _unknown(self, name: str) -> NotFound:
        return NotFound(f"there is no container {name!r:.100}: create it with create_container({name!r:.100})")

    async def _container_anew(self, name: str) -> Container:
        self._known.pop(name, None)
        return await self._container(name)

    async def _admitted(self, name: str) -> Container:
        """The container, admitted in all shards."""
        if name == SYSTEM:
            return _SYSTEM
        for _ in range(CREATE_ATTEMPTS_MAX):
            try:
                return await self._admit(name)
            except Conflict:
                continue  # something was dropped meanwhile, perhaps this
        raise Unavailable(f"the container {name!r} cannot be admitted: others are dropped all the time: try again")

    async def _admit(self, name: str) -> Container:
        """See :mod:`gostore.services.db.drops`, also for the order of the steps. Raises ``Conflict``."""
        shards, deadline_s = range(self._config.shards), self._router.deadline(None)
        drops = await self._all_shards(shards, lambda shard: drops_in(self._router, shard, deadline_s))
        found = await self._lookup(name)  # and not what was looked up before
        if found is None or found.dropping:
            raise self._unknown(name)
        await self._all_shards(
            shards, lambda shard: admit_in(self._router, shard, found.physical, drops[shard], deadline_s)
        )
        return found

    async def _with_containers(
        self, names: Iterable[str], run: Callable[[dict[str, Container]], Awaitable[T]], *, reading: bool = False
    ) -> T:
        """Run with the containers of these names; again when a shard says that one was dropped.

        Then what is remembered may be old; or the shard has forgotten so much that it takes for dropped what it does
        not know. ``reading``: it has no effect, so that a failure is always definite.
        """
        distinct = tuple(dict.fromkeys(names))
        found = {name: known for name in distinct if (known := self._known.get(name)) is not None}
        if len(found) < len(distinct):
            found = {name: await self._container(name) for name in distinct}
        for again in (self._container_anew, self._admitted):
            try:
                return await run(found)
            except NotFound as error:
                if "dropped" not in error.details:
                    raise
            try:
                found = {name: await again(name) for name in distinct}
            except RETRIED as error:
                # What was refused may be on its way a second time, and find the container admitted by then.
                raise Unavailable(error.message, definite=reading) from None
        return await run(found)

    # reading

    async def _read_with(self, container: str, run: Callable[[dict[str, Container]], Awaitable[T]]) -> T:
        try:
            return await self._with_containers([container], run, reading=True)
        except TooLarge as error:
            error.definite = True  # an answer that was too large for its message; of a read, so nothing has happened
            raise

    async def get(
        self,
        container: str,
        key: str,
        path: Path = (),
        *,
        snapshot: Mapping[int, int] | None = None,
        consistency: str = LINEARIZABLE,
        timeout_s: float | None = None,
    ) -> Versioned:
        """See ``KeyValue``. ``consistency``: ``stale`` takes what the nearest replica has applied, without asking."""
        if consistency not in CONSISTENCIES or (consistency != LINEARIZABLE and snapshot):
            raise BadRequest(
                f"consistency = {consistency!r:.50}: allowed are {', '.join(CONSISTENCIES)}, and with a snapshot only "
                f"{LINEARIZABLE}"
            )
        check_text("key", key, self._config.key_size_bytes_max)
        check_path(path)
        deadline_s = self._router.deadline(timeout_s)
        stale = consistency != LINEARIZABLE

        async def run(found: dict[str, Container]) -> Versioned:
            nonlocal stale
            holder = found[container]
            shard = self.shard_of(holder, key)
            if stale:
                stale = False  # again it is because the container is another one: the replica here may not know yet
                args: list[Any] = [holder.physical, key, list(path)]
                return Versioned.from_wire(await self._router.read_stale(shard, args, deadline_s))
            at = None if snapshot is None else snapshot.get(shard)
            args = [holder.physical, key, list(path), at]
            return Versioned.from_wire(await self._router.read(shard, "get", args, deadline_s))

        return await self._read_with(container, run)

    async def scan(
        self,
        container: str,
        prefix: str = "",
        *,
        start: str = "",
        end: str | None = None,
        limit: int = SCAN_LIMIT_MAX,
        snapshot: Mapping[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Page:
        if not 1 <= limit <= SCAN_LIMIT_MAX:
            raise BadRequest(f"limit = {limit}: allowed are values from 1 to {SCAN_LIMIT_MAX}")
        for name, text in (("prefix", prefix), ("start", start), ("end", end)):
            if text:
                check_text(name, text, self._config.key_size_bytes_max + 4)
        start = max(start, prefix)
        bounds = [bound for bound in (end, prefix_end(prefix) if prefix else None) if bound is not None]
        stop = min(bounds) if bounds else None
        deadline_s = self._router.deadline(timeout_s)

        async def run(found: dict[str, Container]) -> Page:
            holder = found[container]
            one = holder.separator is not None and holder.separator in prefix
            shards = [self.shard_of(holder, prefix)] if one else list(range(self._config.shards))

            async def scan_shard(shard: int) -> Any:
                at = None if snapshot is None else snapshot.get(shard)
                args = [holder.physical, start, stop, limit, at]
                return await self._router.read(shard, "scan", args, deadline_s)

            answers = await self._all_shards(shards, scan_shard)
            return merge_pages(container, start, stop, limit, dict(zip(shards, answers, strict=True)))

        return await self._read_with(container, run)

    async def ask_all(self, function: str, args: list[Any], deadline_s: float) -> list[Any]:
        """The answers of all shards' primaries, in order, asked at the same time; raises the first error."""
        return await self._all_shards(
            range(self._config.shards), lambda shard: self._router.call(shard, function, args, deadline_s)
        )

    async def watched(self, container: str, key: str | None, prefix: str | None) -> list[Any]:
        """What a watch of a key, or of a prefix, begins with.

        [the container's physical name, first key, end of the keys (null: none), [[shard, index, oldest index from which
        changes are kept, primary], ...]]. Everything that is committed from now on has a greater index. Raises
        ``NotFound``, ``BadRequest``, ``NotSupported`` with the policy ``quorum``, and ``Unavailable`` when a shard has
        no working primary.
        """
        if self._config.replication == "quorum":
            raise NotSupported(
                "db.replication = 'quorum': there is no log whose order is final, and so nothing that a watch could "
                "deliver once and for all; read again from time to time"
            )
        if (key is None) == (prefix is None):
            raise BadRequest(f"key = {key!r:.100}, prefix = {prefix!r:.100}: one of them is watched, and not both")
        text = key if key is not None else prefix or ""
        if text or key is not None:
            check_text("prefix" if key is None else "key", text, self._config.key_size_bytes_max)
        # Nothing lies between a string and the same string with the smallest character behind it.
        end = text + "\0" if key is not None else prefix_end(text) if text else None
        deadline_s = self._router.deadline(None)

        async def run(found: dict[str, Container]) -> list[Any]:
            holder = found[container]
            one = key is not None or (holder.separator is not None and holder.separator in text)
            shards = [self.shard_of(holder, text)] if one else list(range(self._config.shards))
            positions = await self._all_shards(
                shards, lambda shard: self._router.read(shard, "position", [holder.physical], deadline_s)
            )
            ways = [[shard, *position] for shard, position in zip(shards, positions, strict=True)]
            return [holder.physical, text, end, ways]

        return await self._read_with(container, run)

    async def _all_shards(self, shards: Iterable[int], run: Callable[[int], Awaitable[Any]]) -> list[Any]:
        """Ask shards at the same time; raises the first error."""

        async def guarded(shard: int) -> Any:
            try:
                return await run(shard)
            except GoStoreError as error:
                return error

        answers = await together(self._env, "db-shards", (guarded(shard) for shard in shards))
        for answer in answers:
            if isinstance(answer, GoStoreError):
                raise answer
        return answers

    # committing

    async def commit(
        self,
        reads: Iterable[Read],
        writes: Sequence[Write],
        *,
        request_id: RequestId | None = None,
        timeout_s: float | None = None,
        repeated: bool = False,
    ) -> Committed:
        """See ``KeyValue``. ``repeated``: this request id was sent before and may have had its effect."""
        all_reads = list(dict.fromkeys(reads)) if reads else []
        operands = self._check(all_reads, writes)
        request = self._requests.new() if request_id is None else request_id
        deadline_s = self._router.deadline(timeout_s)

        def run(found: dict[str, Container]) -> Awaitable[Committed]:
            return self._commit_parts(self._parts(all_reads, writes, operands, found), request, repeated, deadline_s)

        names = [write.container for write in writes] + [read.container for read in all_reads]
        try:
            return await self._with_containers(names, run)
        except (NotFound, *RETRIED) as error:
            if repeated:
                # An attempt before may have had its effect: nobody was reached now, or the container went after it.
                error.definite = False
            raise
        finally:
            if request_id is None:
                self._requests.settle(request)

    async def commit_all(self, wanted: Sequence[Wanted], *, repeated: bool = False) -> list[Committed | GoStoreError]:
        """Transactions that have nothing to do with one another: of each what :meth:`commit` returns or raises.

        Those of one shard go to it in one request. ``repeated``: some of these request ids may have been sent before.
        """
        deadline_s = self._router.deadline(None)
        answers: dict[int, Committed | GoStoreError] = {}
        shards: dict[int, list[tuple[int, list[Any]]]] = {}
        alone: list[int] = []
        for place, (reads, writes, request_id) in enumerate(wanted):
            try:
                parts = self._parts_if_known(reads, writes)
            except GoStoreError as error:
                answers[place] = error
                continue
            if parts is None or len(parts) != 1:
                alone.append(place)
            else:
                ((shard, *rest),) = parts
                shards.setdefault(shard, []).append((place, [request_id, *rest]))

        async def one(place: int, again: bool) -> None:
            reads, writes, request_id = wanted[place]
            timeout_s = deadline_s - asyncio.get_running_loop().time()
            try:
                answers[place] = await self.commit(
                    reads, writes, request_id=request_id, repeated=repeated or again, timeout_s=timeout_s
                )
            except GoStoreError as error:
                answers[place] = error

        async def several(shard: int, items: list[tuple[int, list[Any]]]) -> None:
            doubtful = False

            def args(again: bool) -> list[Any]:
                nonlocal doubtful
                doubtful = again  # an attempt before may have had its effect, whatever this one comes to
                return [[[self._logged(request, again or repeated), *rest] for _, (request, *rest) in items]]

            try:
                outcomes = await self._router.call_again(shard, "commits", args, deadline_s)
            except GoStoreError as error:
                answers.update((place, error) for place, _ in items)
                return
            left: list[tuple[int, bool]] = []
            for (place, (_, _, writes)), outcome in zip(items, outcomes, strict=True):
                try:
                    index = succeed(outcome)
                    answers[place] = Committed({shard: index} if writes else {})
                except RETRIED as error:
                    left.append((place, doubtful or not error.definite))
                except NotFound as error:
                    if "dropped" in error.details:
                        self._forget(wanted[place])  # so that the next attempt looks it up
                        left.append((place, doubtful))
                    else:
                        answers[place] = error
                except GoStoreError as error:
                    answers[place] = error
            await self._all(one(place, again) for place, again in left)

        await self._all(
            [*(several(shard, items) for shard, items in shards.items()), *(one(place, False) for place in alone)]
        )
        return [answers[place] for place in range(len(wanted))]

    async def _all(self, coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run them at the same time; a lone one needs no task."""
        work = list(coroutines)
        if len(work) == 1:
            await work[0]
        elif work:
            await together(self._env, "db-commits", work)

    def _parts_if_known(self, reads: Sequence[Read], writes: Sequence[Write]) -> list[list[Any]] | None:
        """As :meth:`_parts`; None when a container has to be looked up first. Raises as :meth:`_check`."""
        operands = self._check(reads, writes)
        found: dict[str, Container] = {}
        for operation in (*writes, *reads):
            known = _SYSTEM if operation.container == SYSTEM else self._known.get(operation.container)
            if known is None:
                return None
            found[operation.container] = known
        return self._parts(reads, writes, operands, found)

    def _forget(self, wanted: Wanted) -> None:
        reads, writes, _ = wanted
        for operation in (*reads, *writes):
            self._known.pop(operation.container, None)

    def _logged(self, request: RequestId, repeated: bool) -> list[Any]:
        """A request id as it stands in the log."""
        logged = [request.client, request.sequence, repeated]
        # Stamps are no order of time: what the client waited for before may be executed after what it asked for then.
        return logged if self._config.replication == "quorum" else [*logged, request.settled_below]

    async def _commit_parts(
        self, parts: list[list[Any]], request: RequestId, repeated: bool, deadline_s: float
    ) -> Committed:
        if not parts:
            return Committed({})
        shard, reads, writes = parts[0]
        if len(parts) == 1:
            outcome = await self._router.call_again(
                shard, "commit", lambda again: [self._logged(request, again or repeated), reads, writes], deadline_s
            )
            index = succeed(outcome)
            return Committed({shard: index} if writes else {})
        outcome, versions = await self._router.call_again(
            shard, "coordinate", lambda again: [self._logged(request, again or repeated), parts], deadline_s
        )
        index = succeed(outcome)
        written = {part[0] for part in parts if part[2]}
        return Committed({s: v for s, v in versions or [[shard, index]] if s in written})

    def _check(self, reads: Sequence[Read], writes: Sequence[Write]) -> list[bytes]:
        """Raises for what is beyond the limits; the packed values of the writes."""
        config = self._config
        operations = len(reads) + len(writes)
        if operations > config.transaction_operations_max:
            raise TooLarge(
                f"a transaction of {operations} reads and writes; transaction_operations_max allows "
                f"{config.transaction_operations_max}"
            )
        operands: list[bytes] = []
        size = 0
        for write in writes:
            check_text("key", write.key, config.key_size_bytes_max)
            check_path(write.path)
            operands.append(pack(write.value, config.value_size_bytes_max))
            size += len(operands[-1]) + len(write.key)
        for read in reads:
            if isinstance(read, PointRead):
                check_text("key", read.key, config.key_size_bytes_max)
                size += len(read.key)
            elif not 0 <= read.shard < config.shards:
                raise BadRequest(f"a range of shard {read.shard}: there are {config.shards}")
        if size > TRANSACTION_SIZE_BYTES_MAX:
            raise TooLarge(f"a transaction of {size} bytes; at most {TRANSACTION_SIZE_BYTES_MAX} are allowed")
        return operands

    def _parts(
        self, reads: Sequence[Read], writes: Sequence[Write], operands: Sequence[bytes], found: dict[str, Container]
    ) -> list[list[Any]]:
        """[shard, reads, writes] of every shard concerned; the first one that is written comes first."""
        parts: dict[int, list[Any]] = {}
        for write, operand in zip(writes, operands, strict=True):
            holder = found[write.container]
            shard = self.shard_of(holder, write.key)
            part = parts.setdefault(shard, [shard, [], []])
            part[2].append([write.operation, holder.physical, write.key, list(write.path), operand])
        for read in reads:
            holder = found[read.container]
            shard = self.shard_of(holder, read.key) if isinstance(read, PointRead) else read.shard
            part = parts.setdefault(shard, [shard, [], []])
            wire = read.to_wire()
            wire[1] = holder.physical
            part[1].append(wire)
        return list(parts.values())

"""The service ``db``: every node takes every call and passes it to the shard's primary."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, Final, Protocol, cast

from gostore.cluster.view import View, shard_key
from gostore.cluster.watchers import Watchers
from gostore.comm import Call, Endpoint, Reply, remote, service, wire
from gostore.comm.wire import ProtocolError
from gostore.config import NodeConfig
from gostore.consensus.groups import Compaction, Groups
from gostore.core.blocks import run_block
from gostore.core.errors import BadRequest, ConfigError, GoStoreError, PolicyError, Unavailable
from gostore.core.keyvalue import Committed, RequestId, Value, Versioned, Write, path_from_wire, read_from_wire
from gostore.core.slots import PolicySource, load_policy
from gostore.core.transaction import Transaction, transact
from gostore.env import Env
from gostore.services.db.backup import Pins, take_cut
from gostore.services.db.database import LINEARIZABLE, NAME, Database, Wanted
from gostore.services.db.primary_backup import PrimaryBackup
from gostore.services.db.quorum import QUORUM_FROM, Quorum
from gostore.services.db.raft import GROUPS_FROM, RaftReplication
from gostore.services.db.replication import Replication, together
from gostore.services.db.router import RETRIED, Router, answer_by
from gostore.services.db.shard import Shard, World
from gostore.services.db.watches import WAIT_S_MAX, Polls
from gostore.storage.wal import Wal

BLOCK_PAUSE_S: Final = (0.002, 0.2)
"""Before a transaction block is run again after a conflict: from, doubling, to."""

DESCRIBE_TIMEOUT_S: Final = 1.0

MOVES_MAX: Final = 2
"""Shards of which one node changes the members at a time. More: a join is over sooner; fewer: it disturbs less."""

POLICIES: Final[dict[str, type]] = {"raft": RaftReplication, "primary_backup": PrimaryBackup, "quorum": Quorum}
"""The default, and two lessons."""

LOGS_FROM: Final = {"raft": GROUPS_FROM, "primary_backup": 1, "quorum": QUORUM_FROM}
"""Policy -> the number of its first shard in the node's log."""


class Cluster(Protocol):
    """What db must know of the membership."""

    @property
    def view(self) -> View: ...

    @property
    def watchers(self) -> Watchers: ...


@service("db")
class DbService:
    """Register it at the endpoint. ``database`` is the key-value interface for services of the same node.

    Opening replays what the log holds; that needs no cluster. Raises ``Corrupt`` when it cannot be replayed,
    ``ConfigError`` when another policy wrote it, and ``PolicyError`` for a policy in the slot ``replication`` that does
    not fit.
    """

    def __init__(
        self,
        env: Env,
        endpoint: Endpoint,
        cls: Cluster,
        wal: Wal,
        groups: Groups,
        config: NodeConfig,
    ) -> None:
        self._env = env
        self._endpoint = endpoint
        self._cls = cls
        self._unwatch: Any = None
        self._complained = 0
        """The epoch whose ring cannot be asked: its placement raises."""
        self._started = False
        self._pins = Pins()
        self._cuts = 0
        self._router = Router(endpoint, self._candidates, self._serve)
        self.database = Database(env, self._router, config.db, f"{env.name}.{endpoint.incarnation}")
        world = World(
            env=env,
            wal=wal,
            groups=groups,
            moves=asyncio.Semaphore(MOVES_MAX),
            shards=self._router,
            send=self._send,
            view=lambda: cls.view,
            owners=self._owners,
            policy=cast(type[Replication], policy_of(config)),
            copies_min=config.db.in_sync_min,
            read_quorum=config.db.read_quorum,
            write_quorum=config.db.write_quorum,
            incarnation=endpoint.incarnation,
            compaction=Compaction(entries=config.db.snapshot_entries),
            value_size_bytes_max=config.db.value_size_bytes_max,
            pins=self._pins,
        )
        self._check_disk(wal, config)
        self._shards = [Shard(world, number) for number in range(config.db.shards)]
        self._polls = Polls(env, self._shards)

    def _check_disk(self, wal: Wal, config: NodeConfig) -> None:
        """Raises ``ConfigError`` when the log holds what another policy wrote: it would look like an empty db."""
        mine = config.db.replication
        for name, first in LOGS_FROM.items():
            if name != mine and any(wal.last_index(first + shard) for shard in range(config.db.shards)):
                raise ConfigError(
                    f"db.replication = {mine!r}: the data of {self._env.name} were written by {name!r}; set that, or "
                    "start with an empty data_dir"
                )

    async def start(self) -> None:
        """Take part: from now on this node serves the shards that the view gives it."""
        for shard in self._shards:
            await shard.start()
        self._started = True
        self._unwatch = self._cls.watchers.watch(lambda old, new, changes: self._on_view(new))
        self._on_view(self._cls.view)

    async def stop(self) -> None:
        """Take part no longer. The tasks are the node's, and end with it."""
        self._started = False
        self._pins.stop()
        self._polls.end()
        if self._unwatch is not None:
            self._unwatch()

    # the cluster

    def _on_view(self, view: View) -> None:
        for shard in self._shards:
            shard.replication.on_view(view)
        self._router.on_view()

    def _owners(self, view: View, shard: int) -> tuple[str, ...]:
        try:
            return view.ring().owners(shard_key(shard))
        except PolicyError as error:
            if self._complained != view.epoch:  # it is asked again and again; once for each ring is enough
                self._complained = view.epoch
                self._env.log.error("nobody owns shard %d: %s", shard, error.message)
                name = view.policy.name if view.policy is not None else ""
                self._env.events.publish("policy_failed", slot="placement", name=name, error=error.message)
            return ()

    def _primary(self, shard: int) -> str | None:
        """Who serves a shard, as far as this node knows."""
        known = self._shards[shard].replication.primary or self._router.leader(shard)
        return known or next(iter(self._owners(self._cls.view, shard)), None)

    def _candidates(self, shard: int) -> tuple[str, ...]:
        """Whom to ask for a shard: who serves it as its replica here knows, and the owners on the ring."""
        known = self._shards[shard].replication.primary
        owners = self._owners(self._cls.view, shard)
        return owners if known is None else tuple(dict.fromkeys((known, *owners)))

    def _shard(self, number: int) -> Shard:
        if not 0 <= number < len(self._shards):
            raise BadRequest(f"shard = {number}: allowed are values from 0 to {len(self._shards) - 1}")
        if not self._started:
            raise Unavailable(f"db at {self._env.name} has not started or is stopping")
        return self._shards[number]

    def _serve(self, number: int, function: str, args: list[Any], deadline_s: float) -> Awaitable[Any]:
        return self._shard(number).serve(function, args, deadline_s)

    async def _send(self, number: int, to: str, message: list[Any], data: bytes, timeout_s: float) -> Reply:
        return await self._endpoint.call(to, "db", "replicate", number, message, data=data, timeout_s=timeout_s)

    # between nodes

    @remote
    async def shard(self, call: Call, number: int, function: str, args: list[Any]) -> Any:
        """A request for a shard whose primary this node should be. Raises ``NotOwner`` when it is not."""
        now_s = asyncio.get_running_loop().time()
        return await self._shard(number).serve(function, args, answer_by(call.deadline_s, now_s))

    @remote
    async def replicate(self, call: Call, number: int, message: list[Any]) -> Reply:
        """A message of a shard's replication policy."""
        return await self._shard(number).replication.handle(call.source, message, call.data)

    @remote
    async def describe(self, call: Call) -> list[Any]:
        """The shards as this node has them."""
        return self.own_shards()

    # for clients

    @remote
    async def create_container(self, call: Call, name: str, options: dict[str, Any] | None = None) -> None:
        """Options: ``separator`` (null or a string), ``replication``."""
        given = dict(options or {})
        separator, replication = given.pop("separator", None), given.pop("replication", None)
        if given or not isinstance(separator, str | None) or not isinstance(replication, str | None):
            raise BadRequest(f"options = {options!r:.200}: allowed are separator (null or a string) and replication")
        await self.database.create_container(name, separator=separator, replication=replication)

    @remote
    async def drop_container(self, call: Call, name: str) -> None:
        await self.database.drop_container(name)

    @remote
    async def containers(self, call: Call) -> dict[str, Any]:
        return await self.database.containers()

    @remote
    async def get(
        self,
        call: Call,
        container: str,
        key: str,
        path: list[Any] | None = None,
        snapshot: list[Any] | None = None,
        consistency: str = LINEARIZABLE,
    ) -> list[Any]:
        """[value, version, found, shard, index]; ``snapshot``: [[shard, index], ...]; ``consistency``: or stale."""
        accessors = path_from_wire(path or [])
        found = await self.database.get(
            container, key, accessors, snapshot=_snapshot(snapshot), consistency=consistency
        )
        return found.to_wire()

    @remote
    async def scan(
        self,
        call: Call,
        container: str,
        prefix: str = "",
        start: str = "",
        end: str | None = None,
        limit: int = 1024,
        snapshot: list[Any] | None = None,
    ) -> list[Any]:
        """[[[key, value, version], ...], next_start, ranges, [[shard, index], ...]]."""
        page = await self.database.scan(
            container, prefix, start=start, end=end, limit=limit, snapshot=_snapshot(snapshot)
        )
        return page.to_wire()

    @remote
    async def watch(self, call: Call, container: str, key: str | None = None, prefix: str | None = None) -> list[Any]:
        """What a watch begins with; see :meth:`Database.watched`."""
        return await self.database.watched(container, key, prefix)

    @remote
    async def changes(
        self, call: Call, container: str, start: str, end: str | None, since: list[Any], wait_s: float
    ) -> list[Any]:
        """What is new in shards that this node serves; see :mod:`gostore.services.db.watches`.

        ``container``, ``start``, ``end``: as :meth:`watch` gives them; ``since``: [[shard, index, skip], ...].
        """
        if not 0 <= wait_s <= WAIT_S_MAX:
            raise BadRequest(f"wait_s = {wait_s}: allowed are values from 0 to {WAIT_S_MAX}")
        if not self._started:
            raise Unavailable(f"db at {self._env.name} has not started or is stopping")
        now_s = asyncio.get_running_loop().time()
        deadline_s = answer_by(call.deadline_s, now_s)
        return await self._polls.changes(container, start, end, since, min(now_s + wait_s, deadline_s), deadline_s)

    @remote
    async def commit(
        self,
        call: Call,
        reads: list[Any],
        writes: list[Any],
        request_id: list[Any] | None = None,
        repeated: bool = False,
    ) -> list[Any]:
        """[[shard, version], ...]. ``repeated``: this request id was sent before and may have had its effect."""
        committed = await self.database.commit(
            [read_from_wire(read) for read in reads],
            _writes(writes),
            request_id=None if request_id is None else RequestId.from_wire(request_id),
            repeated=repeated,
        )
        return committed.to_wire()

    @remote
    async def commits(self, call: Call, items: list[Any], repeated: bool = False) -> list[Any]:
        """Several transactions that have nothing to do with one another: what :meth:`commit` says of each.

        An item is the packed [reads, writes, request id]; of each [answer, null] or [null, error].
        """
        told: list[Any] = []
        wanted: list[Wanted] = []
        for item in items:
            try:
                wanted.append(_wanted(item))
                told.append(None)
            except GoStoreError as error:
                told.append([None, error.to_wire()])
        committed = iter(await self.database.commit_all(wanted, repeated=repeated))
        return [_outcome(next(committed), repeated) if known is None else known for known in told]

    @remote
    async def run(self, call: Call, block: list[Any]) -> list[Any]:
        """Execute a transaction block (``gostore.core.blocks``); returns what it returns."""
        return await self.run_block(block)

    @remote
    async def shards(self, call: Call) -> list[Any]:
        """Every shard of the cluster, as its primary has it; see :meth:`all_shards`."""
        return await self.all_shards()

    # for backups (gostore.client.backup)

    @remote
    async def backup_begin(self, call: Call) -> list[Any]:
        """Take a cut: [its name, [[node that keeps it, index], ...] for each shard in order]."""
        self._cuts += 1
        name = f"{self._env.name}.{self._endpoint.incarnation}.{self._cuts}"
        deadline_s = self._router.deadline(None)
        return list(await take_cut(self._env, self.database.ask_all, name, deadline_s))

    @remote
    async def backup_containers(self, call: Call, cut: str, shard: int) -> list[Any]:
        """[[name inside the shards, objects], ...] of a shard that this node keeps."""
        return self._pins.containers(cut, shard)

    @remote
    async def backup_rows(self, call: Call, cut: str, shard: int, container: str, place: int) -> list[Any]:
        """[[[key, packed value], ...], next place or null]; ``container``: its name inside the shards."""
        return self._pins.page(cut, shard, container, place)

    @remote
    async def backup_end(self, call: Call, cut: str) -> None:
        """Keep it no longer."""
        self._pins.drop(cut)

    @remote
    async def stage_container(self, call: Call, staged: str, name: str, separator: str | None) -> None:
        """A container to be filled, which :meth:`put_in_place` will call ``name``; ``staged`` is never used again."""
        await self.database.stage_container(staged, name, separator)

    @remote
    async def put_in_place(self, call: Call, names: dict[str, str], replace: bool) -> None:
        """Give staged containers their names, all at once: {staged name: name}."""
        await self.database.put_in_place(names, replace=replace)

    async def run_block(self, steps: list[Any]) -> list[Value]:
        """Run again on a conflict, a bounded number of times; then raises ``Conflict``."""

        async def body(transaction: Transaction) -> list[Value]:
            results = await run_block(transaction, steps)
            _check_writable(transaction.writes)
            return results

        async def pause(attempt: int) -> None:
            longest_s = min(BLOCK_PAUSE_S[0] * 2**attempt, BLOCK_PAUSE_S[1])
            await asyncio.sleep(self._env.rng.uniform(0, longest_s))

        return await transact(self.database, body, pause=pause)

    # what others see

    def own_shards(self) -> list[dict[str, Any]]:
        """This node's replicas and what they are: shard, role, primary, generation, replicas, last_index, ..."""
        statuses = [shard.status() for shard in self._shards]
        return [{**status.to_wire(), "node": self._env.name} for status in statuses]

    async def all_shards(self) -> list[dict[str, Any]]:
        """One description per shard: its primary's, or another replica's, or what the view says (role unknown)."""
        numbers = range(len(self._shards))
        asked = sorted(
            {name for n in numbers for name in self._candidates(n)} | {self._primary(n) or "" for n in numbers}
        )
        asked = [name for name in asked if name in self._cls.view.online]
        answers = await together(self._env, "db-describe", map(self._ask, asked))
        found = []
        for number in numbers:
            told = [answer[number] for answer in answers if answer and answer[number]["role"] != "idle"]
            planned = list(self._owners(self._cls.view, number))
            nothing = {
                "shard": number, "role": "unknown", "primary": self._primary(number), "generation": 0, "replicas": [],
                "planned": planned, "last_index": 0, "committed": 0, "settled": False, "node": self._primary(number),
            }  # fmt: skip
            found.append(max(told, key=lambda one: (one["role"] == "primary", one["generation"]), default=nothing))
        return found

    async def _ask(self, name: str) -> list[Any]:
        if name == self._env.name:
            return self.own_shards()
        try:
            reply = await self._endpoint.call(name, "db", "describe", timeout_s=DESCRIBE_TIMEOUT_S)
        except GoStoreError:
            return []
        return cast(list[Any], reply.value)

    def local(self, container: str, key: str) -> Versioned | None:
        """What this node's own replica has applied; None when it holds none, or nothing was asked of the container."""
        holder = self.database.known(container)
        if holder is None:
            return None
        shard = self._shards[self.database.shard_of(holder, key)]
        if shard.replication.role == "idle":
            return None
        return Versioned.from_wire(shard.read(holder.physical, key, (), None))

    def status(self) -> dict[str, Any]:
        """``leads``, ``holds``: numbers of shards. ``unsettled``: what is not as it should be. Asks nobody."""
        statuses = [shard.status() for shard in self._shards]
        leads = [status.shard for status in statuses if status.role == "primary"]
        holds = [status.shard for status in statuses if status.role != "idle"]
        unsettled = []
        if self._complained and self._complained == self._cls.view.epoch:
            unsettled.append("cannot know who should hold the shards: the placement raises")
        for status in statuses:
            if status.role == "recovering":
                unsettled.append(f"takes over shard {status.shard}: {status.details['obstacle']}")
            elif status.role == "primary" and not status.settled:
                missing = ", ".join(name for name in status.planned if name not in status.members)
                unsettled.append(f"copies shard {status.shard} to {missing}" if missing else f"moves {status.shard}")
            elif status.role == "backup" and "obstacle" in status.details:
                unsettled.append(f"waits for shard {status.shard}: {status.details['obstacle']}")
            elif status.role == "backup" and self._env.name not in status.planned:
                unsettled.append(f"still holds shard {status.shard}")
        return {"leads": leads, "holds": holds, "unsettled": unsettled}

    def counters(self) -> dict[str, int]:
        """Since the start. ``commits``, ``conflicts``: decided here as a primary."""
        return {
            "commits": sum(shard.commits for shard in self._shards),
            "conflicts": sum(shard.conflicts for shard in self._shards),
            "retries": self._router.retries,
        }

    def statistics(self) -> dict[str, int]:
        """The counters, and what there is now."""
        statuses = [shard.status() for shard in self._shards]
        return {
            **self.counters(),
            "shards_primary": sum(status.role == "primary" for status in statuses),
            "shards_held": sum(status.role != "idle" for status in statuses),
            **{
                name: sum(status.details[name] for status in statuses)
                for name in ("objects", "size_bytes", "prepared", "coordinated")
            },
        }


def policy_of(config: NodeConfig) -> type:
    """The class in the slot ``replication``. Raises ``PolicyError``."""
    source = config.policies.get("replication")
    if source is not None:
        return load_policy("replication", PolicySource.from_wire(source))
    return POLICIES[config.db.replication]


def _snapshot(wire: list[Any] | None) -> dict[int, int] | None:
    """Raises ``BadRequest`` unless it is [[shard, index], ...]."""
    if wire is None:
        return None
    try:
        return {int(shard): int(index) for shard, index in wire}
    except (TypeError, ValueError):
        raise BadRequest(f"snapshot = {wire!r:.100}: expected [[shard, index], ...]") from None


def _writes(wire: list[Any]) -> list[Write]:
    """Raises ``BadRequest``."""
    writes = [Write.from_wire(write) for write in wire]
    _check_writable(writes)
    return writes


def _check_writable(writes: Iterable[Write]) -> None:
    """Raises ``BadRequest`` for a container of the system: clients may read it, and only db itself writes there."""
    for write in writes:
        if write.container.startswith("."):
            raise BadRequest(
                f"container = {write.container!r:.100}: names that begin with a dot belong to the system, and can only "
                f"be read; allowed is what matches {NAME.pattern}"
            )


def _wanted(packed: Any) -> Wanted:
    """Raises ``BadRequest``."""
    try:
        reads, writes, request = wire.unpack(packed)
        return (
            list(dict.fromkeys(read_from_wire(read) for read in reads)),
            _writes(writes),
            RequestId.from_wire(request),
        )
    except (ProtocolError, TypeError, ValueError):
        raise BadRequest(
            "a transaction of several cannot be read: expected packed [reads, writes, request id]"
        ) from None


def _outcome(committed: Committed | GoStoreError, repeated: bool) -> list[Any]:
    if isinstance(committed, GoStoreError):
        if repeated and isinstance(committed, RETRIED):
            committed.definite = False  # nobody was asked this time; an attempt before may have had its effect
        return [None, committed.to_wire()]
    return [committed.to_wire(), None]

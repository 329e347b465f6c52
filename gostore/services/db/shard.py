"""One shard at one node: its state machine on top of its replicated log, and what its primary does for callers.

Reads wait for the locks of prepared transactions, so that nobody sees one half of a transaction across shards and
misses the other. Commits of one shard wait for them too (they hold nothing meanwhile, so nobody waits in a circle);
``begin`` and ``prepare`` never do: they are refused at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from gostore.cluster.view import View
from gostore.consensus.groups import Compaction, Groups
from gostore.core.errors import (
    BadRequest,
    Conflict,
    Forgotten,
    GoStoreError,
    InternalError,
    NotFound,
    NotOwner,
    Unavailable,
    error_from_wire,
)
from gostore.core.keyvalue import Path, Versioned, path_from_wire
from gostore.env import Env
from gostore.services.db.backup import HOLD_S, Gate, Pins
from gostore.services.db.coordinator import Coordinator
from gostore.services.db.machine import (
    Outcome,
    Restorer,
    ShardMachine,
    is_sound,
    is_transaction_id,
    pack_command,
    unpack_command,
)
from gostore.services.db.replication import Group, Replication, ShardStatus, together
from gostore.services.db.transaction import Place
from gostore.services.db.values import read_packed
from gostore.services.db.watches import Watches
from gostore.storage.wal import Wal

SCAN_SIZE_BYTES_MAX: Final = 1024 * 1024
"""Of the packed values in one answer to a scan; at least one entry is always returned."""

LOCK_WAIT_S: Final = 2.0
"""So long a request waits for the lock of a transaction across shards. Larger: fewer conflicts, slower answers."""

LOCK_WAITERS_MAX: Final = 4096

GATED: Final = ("commit", "commits", "coordinate", "drop")
"""What begins a change; it waits while a cut is taken."""

TOGETHER_MAX: Final = 64
"""Commits in one entry of the log. More would hardly be cheaper, and the first of them would wait longer."""

EVENT_KEYS_MAX: Final = 8
"""Keys named in one event."""


def _is_part(part: Any) -> bool:
    """Whether it is [shard, reads, writes], whatever these are."""
    match part:
        case [int(), [*_], [*_]]:
            return True
    return False


def display_name(container: str) -> str:
    """A container's name as its owner knows it; inside, it has the number of its creation behind an ``@``."""
    return container.rpartition("@")[0] or container


class Shards(Protocol):
    """How a shard reaches others, wherever their primaries are."""

    def call(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Awaitable[Any]: ...


@dataclass(slots=True)
class World:
    """What all shards of a node share. ``send(shard, to, message, data, timeout_s)``: to another replica's policy."""

    env: Env
    wal: Wal
    groups: Groups
    moves: asyncio.Semaphore
    shards: Shards
    send: Callable[..., Any]
    view: Callable[[], View]
    owners: Callable[[View, int], tuple[str, ...]]
    policy: type[Replication]
    copies_min: int
    read_quorum: int
    write_quorum: int
    incarnation: int
    compaction: Compaction
    value_size_bytes_max: int
    pins: Pins


class Shard:
    """See the module. Opening it replays its records; :meth:`start` lets it take part."""

    def __init__(self, world: World, number: int) -> None:
        self.number = number
        self._world = world
        self._env = world.env
        self.machine = ShardMachine(number, world.value_size_bytes_max)
        self._changed = asyncio.Event()
        self._waiting = 0
        self._gate: Gate | None = None
        self.commits = 0
        self.conflicts = 0
        self.coordinator = Coordinator(world.env, self, world.shards)
        self.watches = Watches(self)
        self.replication = world.policy(
            Group(
                env=world.env,
                name=world.env.name,
                shard=number,
                wal=world.wal,
                groups=world.groups,
                moves=world.moves,
                machine=self,
                send=self._send,
                view=world.view,
                owners=lambda view: world.owners(view, number),
                copies_min=world.copies_min,
                read_quorum=world.read_quorum,
                write_quorum=world.write_quorum,
                incarnation=world.incarnation,
                compaction=world.compaction,
            )
        )

    @property
    def name(self) -> str:
        """Of this node."""
        return self._env.name

    async def _send(self, to: str, message: list[Any], data: bytes, timeout_s: float) -> Any:
        return await self._world.send(self.number, to, message, data, timeout_s)

    async def start(self) -> None:
        await self.replication.start()

    # the state machine, as replication sees it

    @property
    def size_bytes(self) -> int:
        return self.machine.store.size_bytes

    def apply(self, index: int, payload: bytes) -> Outcome:
        command = unpack_command(payload)
        kind = command[0]
        decided = self.machine.prepared.get(command[1]) if kind == "decide" and is_sound(command) else None
        outcome = self.machine.apply(command, index)
        if kind in ("decide", "begin", "prepare") and outcome[0] != "error":
            self._wake()
            self.coordinator.notice(kind, command[1], outcome)
        if self.replication.role == "primary":
            if kind == "commits" and outcome[0] == "each":
                transactions = [(one, _written(item[2], one)) for item, one in zip(command[1], outcome[1], strict=True)]
            elif kind == "commit":
                transactions = [(outcome, _written(command[3], outcome))]
            else:
                transactions = [(outcome, list(decided.values) if decided is not None and command[2] else [])]
            self._count(transactions, index)
        if self.watches.parked:
            self.watches.notice(index)
        return outcome

    def skip(self, index: int) -> None:
        self.machine.skip(index)

    def snapshot(self) -> Iterator[bytes]:
        self.watches.flush()  # whoever begins with this snapshot has no history before it
        return self.machine.snapshot()

    def restore(self, pieces: list[bytes]) -> None:
        self.watches.flush()
        if pieces:
            restorer = Restorer(self.number, self._world.value_size_bytes_max)
            for piece in pieces:
                restorer.add(piece)
            self.machine = restorer.finish()
        else:
            self.machine = ShardMachine(self.number, self._world.value_size_bytes_max)
        self._wake()

    def serving(self) -> None:
        self.coordinator.serving()

    def _count(self, transactions: list[tuple[Outcome, list[Place]]], index: int) -> None:
        """Of each transaction of an entry: its outcome, and what it wrote."""
        events, places = self._env.events, []
        for outcome, written in transactions:
            places += written
            self.commits += bool(written)
            if outcome[0] == "conflict":
                self.conflicts += 1
                if events.active:
                    container = display_name(outcome[1])
                    events.publish("conflict", shard=self.number, container=container, key=outcome[2])
        if places and events.active:
            keys = list(dict.fromkeys(key for _, key in places))[:EVENT_KEYS_MAX]
            container = display_name(places[0][0])
            events.publish("commit", shard=self.number, container=container, keys=keys, index=index)

    # waiting for locks

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _readable(self, locked: Callable[[], Any], deadline_s: float) -> None:
        """Return when nothing is locked, and this node's state may be read. Raises ``Conflict`` after a while."""
        until_s = min(deadline_s, asyncio.get_running_loop().time() + LOCK_WAIT_S)
        await self.replication.read_barrier(deadline_s)
        while locked():
            await self._unlocked(locked, until_s)
            await self.replication.read_barrier(deadline_s)

    async def _unlocked(self, locked: Callable[[], Any], until_s: float) -> None:
        """Return when nothing is locked. Raises ``Conflict`` after a while."""
        while locked():
            if self._waiting >= LOCK_WAITERS_MAX:
                raise Unavailable(f"shard {self.number}: {LOCK_WAITERS_MAX} requests wait for locks: try again later")
            self._waiting += 1
            try:
                async with asyncio.timeout_at(until_s):
                    await self._changed.wait()
            except TimeoutError:
                raise Conflict(
                    f"shard {self.number}: what was asked for is locked by a transaction across shards: try again"
                ) from None
            finally:
                self._waiting -= 1

    # what a primary does for callers

    def serve(self, function: str, args: list[Any], deadline_s: float) -> Awaitable[Any]:
        """One request, from any node; raises ``NotOwner`` when this one is not the primary.

        Not a coroutine itself, but what it gives is one: each that stands between costs as much as a lookup.
        """
        if self._gate is not None and function in GATED:
            return self._serve_gated(function, args, deadline_s)
        match function, args:
            case "get", [str(container), str(key), path, at]:
                return self._get(container, key, path_from_wire(path), at, deadline_s)
            case "commit", [request, reads, writes]:
                return self._commit(request, reads, writes, deadline_s)
            case "commits", [[*items]] if is_sound(["commits", items]):
                return self._commit_all(items, deadline_s)
            case "stale", [str(container), str(key), path]:
                return self._stale(container, key, path_from_wire(path))
            case "scan", [str(container), str(start), end, int(limit), at]:
                return self._scan(container, start, end, limit, at, deadline_s)
            case "position", [str(container)]:
                return self.watches.position(container, deadline_s)
            case "coordinate", [request, [*parts]] if parts and all(map(_is_part, parts)):
                return self.coordinator.coordinate(request, parts, deadline_s)
            case ("prepare", [str(), int(), _, _]) | ("decide", [str(), bool()]) | ("drop", [str()]):
                # What is no such command must not come into the log.
                if not is_sound([function, *args]):
                    raise BadRequest(f"{function!r} of shard {self.number}: its arguments are not what they should be")
                return self.propose([function, *args], deadline_s)
            case "decision", [transaction] if is_transaction_id(transaction):
                return self.coordinator.decision(transaction, deadline_s)
            case (("hold" | "pin" | "confirm" | "release"), [str(cut), *more]):
                return self._take_part(function, cut, more, deadline_s)
        raise BadRequest(f"shard {self.number} has no {function!r} with {len(args)} such arguments")

    async def _serve_gated(self, function: str, args: list[Any], deadline_s: float) -> Any:
        await self._pass_gate(deadline_s)
        return await self.serve(function, args, deadline_s)

    # for a backup: see gostore.services.db.backup

    async def _take_part(self, function: str, cut: str, more: list[Any], deadline_s: float) -> Any:
        if function == "hold":
            await self.replication.read_barrier(deadline_s)
            self._hold(cut)
        elif function == "pin":
            await self._readable(lambda: self.machine.prepared, deadline_s)
            self._world.pins.keep(cut, self.number, self.machine.store)
            return [self._env.name, self.machine.applied]
        elif function == "confirm":
            await self.replication.read_barrier(deadline_s)
            unchanged = self._world.pins.unchanged(cut, self.number, self.machine.store)
            return unchanged and not self.machine.prepared
        else:
            self._release(cut, keep=more == [True])
        return None

    def _hold(self, cut: str) -> None:
        gate, self._gate = self._gate, Gate(cut, asyncio.get_running_loop().time() + HOLD_S)
        if gate is not None:
            gate.opened.set()

    async def _pass_gate(self, deadline_s: float) -> None:
        """Return when no cut is being taken. Raises ``Unavailable``."""
        loop = asyncio.get_running_loop()
        while (gate := self._gate) is not None and loop.time() < gate.until_s:
            if self._waiting >= LOCK_WAITERS_MAX or loop.time() >= deadline_s:
                raise Unavailable(f"shard {self.number} is held for a backup: try again later")
            self._waiting += 1
            try:
                async with asyncio.timeout_at(min(gate.until_s, deadline_s)):
                    await gate.opened.wait()
            except TimeoutError:
                pass
            finally:
                self._waiting -= 1
        self._gate = None

    def _release(self, cut: str, *, keep: bool) -> None:
        if self._gate is not None and self._gate.cut == cut:
            self._gate.opened.set()
            self._gate = None
        if not keep:
            self._world.pins.drop(cut)

    def propose(self, command: list[Any], deadline_s: float) -> Awaitable[Outcome]:
        return self.replication.propose(pack_command(command), deadline_s)

    async def _get(self, container: str, key: str, path: Path, at: int | None, deadline_s: float) -> list[Any]:
        await self.replication.read_barrier(deadline_s)
        if self.machine.locks.against_read(container, key):
            await self._readable(lambda: self.machine.locks.against_read(container, key), deadline_s)
        return self.read(container, key, path, at)

    async def _stale(self, container: str, key: str, path: Path) -> list[Any]:
        """What this replica has applied, whoever leads, and whatever is locked. Raises ``NotOwner`` if it is none."""
        if self.replication.role == "idle":
            raise NotOwner(f"shard {self.number}: {self._env.name} holds none of it", owner=self.replication.primary)
        return self.read(container, key, path, None)

    def read(self, container: str, key: str, path: Path, at: int | None) -> list[Any]:
        """The applied state of this replica, whatever its role; a :class:`Versioned` as it travels."""
        index = self._snapshot_index(container, at)
        stored = self.machine.store.read(container, key, at)
        value, found = read_packed(None if stored is None else stored.packed, path)
        return Versioned(value, 0 if stored is None else stored.version, found, self.number, index).to_wire()

    async def _scan(
        self, container: str, start: str, end: str | None, limit: int, at: int | None, deadline_s: float
    ) -> list[Any]:
        """[rows of key, version, packed; whether there are more; index]."""
        await self._readable(lambda: self.machine.locks.against_range(container, start, end) is not None, deadline_s)
        index = self._snapshot_index(container, at)
        rows: list[list[Any]] = []
        size = 0
        for row in self.machine.store.scan(container, start, end, at):
            size += len(row.packed)
            if len(rows) >= limit or (rows and size > SCAN_SIZE_BYTES_MAX):
                return [rows, True, index]
            rows.append(list(row))
        return [rows, False, index]

    def _snapshot_index(self, container: str, at: int | None) -> int:
        if self.machine.is_dropped(container):
            raise NotFound(f"the container {display_name(container)!r} was dropped", dropped=container)
        if at is None:
            return self.machine.applied
        if at > self.machine.applied:
            raise Conflict(f"shard {self.number} is at index {self.machine.applied} and knows nothing of {at}")
        return at

    async def _commit(self, request: Any, reads: Any, writes: Any, deadline_s: float) -> Outcome:
        # It only spares a refusal: whether it may commit is decided when it is applied.
        if self._waits(request, reads, writes):
            until_s = min(deadline_s, asyncio.get_running_loop().time() + LOCK_WAIT_S)
            await self._unlocked(lambda: self._locked(reads, writes), until_s)
        return await self.propose(["commit", request, reads, writes], deadline_s)

    async def _commit_all(self, items: list[Any], deadline_s: float) -> list[Outcome]:
        """Commits that have nothing to do with one another: of each its outcome, or ``["failed", error]``.

        Raises only when nothing was done.
        """
        locked = [place for place, item in enumerate(items) if self._waits(*item)]
        if not locked:
            return await self._propose_commits(items, deadline_s)
        free = [place for place in range(len(items)) if place not in locked]

        async def told(places: list[int], outcomes: Awaitable[list[Outcome]]) -> list[tuple[int, Outcome]]:
            try:
                return list(zip(places, await outcomes, strict=True))
            except GoStoreError as error:
                return [(place, _failed(error)) for place in places]

        async def alone(request: Any, reads: Any, writes: Any) -> list[Outcome]:
            return [await self._commit(request, reads, writes, deadline_s)]

        # Whoever must wait for a lock keeps nobody else waiting.
        work = [told([place], alone(*items[place])) for place in locked]
        if free:
            work.append(told(free, self._propose_commits([items[place] for place in free], deadline_s)))
        found = {place: outcome for some in await together(self._env, "db-commits", work) for place, outcome in some}
        return [found[place] for place in range(len(items))]

    async def _propose_commits(self, items: list[Any], deadline_s: float) -> list[Outcome]:
        propose_all = getattr(self.replication, "propose_all", None)
        if propose_all is None:  # not every policy can take several at once
            work = [self._told(pack_command(["commit", *item]), deadline_s) for item in items]
            told = await together(self._env, "db-commits", work)
            return [_failed(one) if isinstance(one, GoStoreError) else one for one in told]
        batches = apart(items)
        told = await propose_all([pack_command(["commits", batch]) for batch in batches], deadline_s)
        outcomes: list[Outcome] = []
        for batch, one in zip(batches, told, strict=True):
            outcomes += [_failed(one)] * len(batch) if isinstance(one, GoStoreError) else one[1]
        return outcomes

    async def _told(self, command: bytes, deadline_s: float) -> Outcome | GoStoreError:
        try:
            outcome: Outcome = await self.replication.propose(command, deadline_s)
            return outcome
        except GoStoreError as error:
            return error

    def _waits(self, request: Any, reads: Any, writes: Any) -> bool:
        """Whether it waits for a lock. A request that may have committed already is refused by nobody but the log."""
        repeated = request is not None and request[2]
        return not repeated and self._locked(reads, writes)

    def _locked(self, reads: Any, writes: Any) -> bool:
        locks = self.machine.locks
        if not len(locks):
            return False
        return (
            any(locks.against_write(write[1], write[2]) for write in writes)
            or any(locks.against_read(read[1], read[2]) for read in reads if read[0] == "p")
            or any(locks.against_range(*read[1:4]) is not None for read in reads if read[0] == "r")
        )

    def status(self) -> ShardStatus:
        status = self.replication.status()
        status.details = {
            **status.details,
            "applied": self.machine.applied,
            "objects": self.machine.store.objects,
            "size_bytes": self.machine.store.size_bytes,
            "prepared": len(self.machine.prepared),
            "coordinated": len(self.machine.coordinated),
        }
        return status


def succeed(outcome: Outcome) -> int:
    """The index of what was done. Raises the error that another outcome means."""
    match outcome:
        case ["ok", int(index)]:
            return index
        case ["conflict", str(container), str(key), str(why), bool()]:
            where = f"{display_name(container)}: {key!r} " if container else "the transaction "
            raise Conflict(f"{where}{why}: run it again", container=display_name(container), key=key)
        case ["error", str(code), str(message)]:
            raise error_from_wire([code, message, True, {}])
        case ["failed", error]:
            raise error_from_wire(error)
        case ["dropped", str(container)]:
            raise NotFound(f"the container {display_name(container)!r} was dropped", dropped=container)
        case ["forgotten"]:
            raise Forgotten("the outcome of this request id is no longer kept: read what it wrote to find out")
    raise InternalError(f"an outcome that cannot be: {outcome!r:.100}")


def apart(items: list[Any]) -> list[list[Any]]:
    """Commits, [request, reads, writes], in their order, in batches of which each writes no object twice."""
    batches: list[list[Any]] = []
    taken: set[Place] = set()
    for item in items:
        places = _places(item[2])
        if not batches or len(batches[-1]) >= TOGETHER_MAX or not taken.isdisjoint(places):
            batches.append([])
            taken = set()
        batches[-1].append(item)
        taken.update(places)
    return batches


def _places(writes: Any) -> list[Place]:
    """What writes would write: nothing if they cannot be read, as they are refused when they are applied.

    (And they may come under the request id of others, which were committed: the outcome is theirs.)
    """
    try:
        places = [(container, key) for _, container, key, _, _ in writes]
    except (TypeError, ValueError):
        return []
    return places if all(type(container) is type(key) is str for container, key in places) else []


def _written(writes: Any, outcome: Outcome) -> list[Place]:
    return _places(writes) if outcome[0] == "ok" else []


def _failed(error: GoStoreError) -> Outcome:
    return ["failed", error.to_wire()]


def refusal(error: GoStoreError) -> Outcome:
    """The outcome of a shard that could not be asked."""
    return ["error", error.code, error.message]

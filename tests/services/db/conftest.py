"""A db without network, disk or clock: the pure parts wired together, for tests of transactions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from typing import Any

import pytest

from gostore.core.errors import Conflict, GoStoreError, error_from_wire
from gostore.core.keyvalue import (
    SCAN_LIMIT_MAX,
    Committed,
    Entry,
    Page,
    PointRead,
    RangeRead,
    Read,
    Versioned,
    Write,
    prefix_end,
)
from gostore.core.values import pack, unpack
from gostore.services.db.machine import ShardMachine, pack_command, unpack_command
from gostore.services.db.values import read_packed


class Step:
    """``await Step()`` lets others run."""

    def __await__(self) -> Generator[None, None, None]:
        yield


def interleave(coroutines: Sequence[Coroutine[Any, Any, Any]], choose: Callable[[int], int]) -> list[Any]:
    """Run coroutines step by step; ``choose(n)`` says which of the n unfinished ones goes on. Returns their results."""
    waiting = list(enumerate(coroutines))
    results: list[Any] = [None] * len(coroutines)
    try:
        while waiting:
            place = choose(len(waiting))
            number, coroutine = waiting[place]
            try:
                coroutine.send(None)
            except StopIteration as stop:
                results[number] = stop.value
                del waiting[place]
    finally:
        for coroutine in coroutines:
            coroutine.close()
    return results


class MachineStore:
    """``KeyValue`` over pure shard machines; every command and every read is one step of :func:`interleave`."""

    def __init__(self, shards: int = 3) -> None:
        self.machines = [ShardMachine(shard, 1 << 20) for shard in range(shards)]
        self.steps = 0

    def shard_of(self, key: str) -> int:
        return zlib.crc32(key.partition("/")[0].encode()) % len(self.machines)

    def apply(self, shard: int, *command: Any) -> list[Any]:
        self.steps += 1
        machine = self.machines[shard]
        return machine.apply(unpack_command(pack_command(command)), machine.applied + 1)

    async def create_container(self, name: str, **options: Any) -> None:
        await Step()

    async def containers(self) -> dict[str, dict[str, Any]]:
        return {}

    async def get(
        self,
        container: str,
        key: str,
        path: tuple[str | int, ...] = (),
        *,
        snapshot: Mapping[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Versioned:
        shard = self.shard_of(key)
        machine = self.machines[shard]
        await Step()
        while machine.locks.against_read(container, key):
            await Step()
        self.steps += 1
        at = (snapshot or {}).get(shard)
        stored = machine.store.read(container, key, at)
        value, found = read_packed(None if stored is None else stored.packed, path)
        return Versioned(
            value, 0 if stored is None else stored.version, found, shard, machine.applied if at is None else at
        )

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
        start = max(start, prefix)
        bounds = [bound for bound in (end, prefix_end(prefix) if prefix else None) if bound is not None]
        stop = min(bounds) if bounds else None
        entries: list[Entry] = []
        ranges: list[RangeRead] = []
        seen: dict[int, int] = {}
        for shard, machine in enumerate(self.machines):
            await Step()
            while machine.locks.against_range(container, start, stop) is not None:
                await Step()
            self.steps += 1
            at = (snapshot or {}).get(shard)
            rows = list(machine.store.scan(container, start, stop, at))
            seen[shard] = machine.applied if at is None else at
            ranges.append(
                RangeRead(container, start, stop, shard, len(rows), max((row.version for row in rows), default=0))
            )
            entries += [Entry(row.key, unpack(row.packed), row.version) for row in rows]
        return Page(tuple(sorted(entries, key=lambda entry: entry.key)), None, tuple(ranges), seen)

    async def commit(
        self,
        reads: Iterable[Read],
        writes: Sequence[Write],
        *,
        request_id: Any = None,
        repeated: bool = False,
        timeout_s: float | None = None,
    ) -> Committed:
        parts: dict[int, tuple[list[Any], list[Any]]] = {}
        for write in writes:
            part = parts.setdefault(self.shard_of(write.key), ([], []))
            part[1].append([write.operation, write.container, write.key, list(write.path), pack(write.value, 1 << 20)])
        for read in reads:
            shard = self.shard_of(read.key) if isinstance(read, PointRead) else read.shard
            parts.setdefault(shard, ([], []))[0].append(read.to_wire())
        await Step()
        request = None if request_id is None else [*request_id.to_wire(), False]
        if len(parts) == 1:
            ((shard, (some_reads, some_writes)),) = parts.items()
            return Committed({shard: succeed(self.apply(shard, "commit", request, some_reads, some_writes))})
        return await self.two_phases(parts, request)

    async def two_phases(self, parts: dict[int, tuple[list[Any], list[Any]]], request: Any) -> Committed:
        first, *others = parts
        outcome = self.apply(first, "begin", request, *parts[first], others, 1)
        while outcome[0] == "pending":
            await Step()
            outcome = self.machines[first].outcome_of(*request[:2]) or ["forgotten"]
        if outcome[0] != "begun":
            return Committed({first: succeed(outcome)})
        refusal = None
        for shard in others:
            await Step()
            vote = self.apply(shard, "prepare", outcome[1], first, *parts[shard])
            if vote[0] != "ok":
                refusal = vote
                break
        await Step()
        self.apply(first, "decide", outcome[1], refusal is None)
        versions = {first: self.machines[first].applied}
        for shard in others:
            await Step()
            versions[shard] = self.apply(shard, "decide", outcome[1], refusal is None)[2]
        self.apply(first, "forget", outcome[1])
        if refusal is not None:
            succeed(refusal)
        return Committed(versions)


def succeed(outcome: list[Any]) -> int:
    match outcome:
        case ["ok", index]:
            return int(index)
        case ["conflict", container, key, why, _]:
            raise Conflict(f"{container}/{key} {why}")
        case ["error", code, message]:
            raise error_from_wire([code, message, True, {}])
    raise GoStoreError(f"unexpected: {outcome}")


@pytest.fixture(scope="session", name="machine_store")
def machine_store_class() -> type[MachineStore]:
    return MachineStore


@pytest.fixture(scope="session", name="interleave")
def interleave_function() -> Callable[..., list[Any]]:
    return interleave


@pytest.fixture(scope="session", name="step")
def step_class() -> type[Step]:
    return Step

"""What the tests of fs share: db, blobs and the network as small fakes that tell the truth about conflicts and loss."""

from __future__ import annotations

import asyncio
import logging
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from gostore.core.errors import Conflict, NotFound
from gostore.core.keyvalue import (
    SCAN_LIMIT_MAX,
    Committed,
    Entry,
    Page,
    PointRead,
    RangeRead,
    Read,
    RequestId,
    Versioned,
    Write,
    prefix_end,
)
from gostore.env import Env

SHARDS = 4


class FixedClock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def wall_s(self) -> float:
        self.now_s += 0.001
        return self.now_s


def make_env(name: str, seed: int = 0) -> Env:
    rng = random.Random(f"{name} {seed}")
    return Env(name, FixedClock(), rng, None, logging.getLogger(f"test.{name}"))  # type: ignore[arg-type]


class FakeKeyValue:
    """The KeyValue interface in memory: sharded versions, points and ranges validated at commit, request ids kept.

    ``before`` is called with ("get" | "scan" | "commit", details) and may raise; ``after`` is called after a commit was
    applied and may raise too (an outcome that the caller does not learn). Every operation lets others run first, a
    random number of turns, so that transactions interleave.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.objects: dict[str, dict[str, tuple[bytes, int]]] = {}
        self.separators: dict[str, str | None] = {}
        self.index = [0] * SHARDS
        self.outcomes: dict[RequestId, Committed] = {}
        self.before: Callable[[str, Any], None] = lambda _operation, _details: None
        self.after: Callable[[Any], None] = lambda _writes: None
        self.commits = 0

    def shard(self, container: str, key: str) -> int:
        separator = self.separators[container]
        part = key.split(separator, 1)[0] if separator else key
        return zlib.crc32(part.encode()) % SHARDS

    async def _turns(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    def _container(self, name: str) -> dict[str, tuple[bytes, int]]:
        if name not in self.objects:
            raise NotFound(f"there is no container {name!r}")
        return self.objects[name]

    async def create_container(self, name: str, *, separator: str | None = None, replication: str = "") -> None:
        await self._turns()
        self.separators[name] = separator
        self.objects.setdefault(name, {})

    async def containers(self) -> dict[str, dict[str, Any]]:
        return {name: {"separator": self.separators[name]} for name in sorted(self.objects)}

    async def get(self, container: str, key: str, path: Any = (), **_: Any) -> Versioned:
        await self._turns()
        self.before("get", (container, key))
        found = self._container(container).get(key)
        shard = self.shard(container, key)
        if found is None:
            return Versioned(None, 0, False, shard, self.index[shard])
        return Versioned(msgpack.unpackb(found[0]), found[1], True, shard, self.index[shard])

    async def scan(
        self,
        container: str,
        prefix: str = "",
        *,
        start: str = "",
        end: str | None = None,
        limit: int = SCAN_LIMIT_MAX,
        **_: Any,
    ) -> Page:
        await self._turns()
        self.before("scan", (container, prefix))
        assert 1 <= limit <= SCAN_LIMIT_MAX
        objects = self._container(container)
        low, high = max(prefix, start), prefix_end(prefix)
        if end is not None:
            high = end if high is None else min(end, high)
        keys = sorted(key for key in objects if low <= key and (high is None or key < high))
        next_start = keys[limit] if len(keys) > limit else None
        entries = [Entry(key, msgpack.unpackb(objects[key][0]), objects[key][1]) for key in keys[:limit]]
        one_shard = self.separators[container] is not None and self.separators[container] in prefix
        shards = [self.shard(container, prefix)] if one_shard else range(SHARDS)
        stop = next_start if next_start is not None else high
        ranges = [RangeRead(container, low, stop, shard, *self._print(container, low, stop, shard)) for shard in shards]
        return Page(tuple(entries), next_start, tuple(ranges))

    def _print(self, container: str, low: str, high: str | None, shard: int) -> tuple[int, int]:
        versions = [
            version
            for key, (_, version) in self._container(container).items()
            if low <= key and (high is None or key < high) and self.shard(container, key) == shard
        ]
        return len(versions), max(versions, default=0)

    async def commit(
        self,
        reads: Iterable[Read],
        writes: Sequence[Write],
        *,
        request_id: RequestId | None = None,
        timeout_s: float | None = None,
    ) -> Committed:
        await self._turns()
        self.before("commit", writes)
        if request_id is not None and request_id in self.outcomes:
            return self.outcomes[request_id]
        for read in reads:
            self._validate(read)
        shards = sorted({self.shard(write.container, write.key) for write in writes})
        for shard in shards:
            self.index[shard] += 1
        for write in writes:
            assert not write.path
            objects = self._container(write.container)
            if write.operation == "delete":
                objects.pop(write.key, None)
            else:
                version = self.index[self.shard(write.container, write.key)]
                objects[write.key] = (msgpack.packb(write.value), version)
        done = Committed({shard: self.index[shard] for shard in shards})
        if request_id is not None:
            self.outcomes[request_id] = done
        self.commits += 1
        self.after(writes)
        await self._turns()
        return done

    def _validate(self, read: Read) -> None:
        if isinstance(read, PointRead):
            _, version = self._container(read.container).get(read.key, (b"", 0))
            if version != read.version:
                raise Conflict(f"{read.container} {read.key} has version {version}, not {read.version}")
        else:
            now = self._print(read.container, read.start, read.end, read.shard)
            if now != (read.count, read.version_max):
                raise Conflict(f"{read.container} {read.start}..{read.end} has changed")

    # --- what a test looks at

    def values(self, container: str) -> dict[str, Any]:
        return {key: msgpack.unpackb(value) for key, (value, _) in sorted(self.objects.get(container, {}).items())}


def tree_problems(kv: FakeKeyValue) -> list[str]:
    """Whatever breaks the invariant "what exists is reachable"; empty when all is well."""
    entries = kv.values("fs")
    own = {key[:-1] for key in entries if key.endswith("/")}
    links = {value["id"]: key for key, value in entries.items() if value["kind"] == "dir"}
    problems = [f"{links[id_]} leads to no directory" for id_ in links if id_ not in own]
    problems += [f"directory {id_} is not linked" for id_ in sorted(own) if id_ != "root" and id_ not in links]
    problems += [f"{key} is in no directory" for key in entries if key.split("/")[0] not in own]
    if len(links) != sum(value["kind"] == "dir" for value in entries.values()):
        problems.append("a directory is linked twice")
    return problems


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    return SimpleNamespace(FakeKeyValue=FakeKeyValue, make_env=make_env, tree_problems=tree_problems)

"""What the tests of fs share: db, blobs and the network as small fakes that tell the truth about conflicts and loss."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import selectors
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from gostore.cluster import Member, NodeState, RingSpec, View, Watchers, changes_between
from gostore.comm import Call, Reply
from gostore.comm.service import functions_of
from gostore.config import FsConfig, NodeConfig, RestConfig
from gostore.core.address import Address
from gostore.core.errors import Conflict, Corrupt, GoStoreError, NotFound, Timeout, error_from_wire
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
from gostore.services.fs import FsService

SHARDS = 4
SECRET = "a secret of 16 characters"


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time jumps to the next timer instead of waiting for it (for tests without sockets)."""

    def __init__(self) -> None:
        self.now_s = 0.0
        super().__init__(selectors.SelectSelector())
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> Any:
            if timeout:
                self.now_s += timeout
            return select(0)

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now_s


def run(main: Callable[[], Coroutine[Any, Any, Any]], timeout_s: float = 3600.0) -> Any:
    """Run in virtual time; what hangs fails after an hour of it, which is soon."""

    async def bounded() -> Any:
        async with asyncio.timeout(timeout_s):
            return await main()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(bounded())


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

    ``before`` is called with ("get" | "scan" | "commit", details), may raise, and may return something to wait for;
    ``after`` is called after a commit was
    applied and may raise too (an outcome that the caller does not learn). Every operation lets others run first, a
    random number of turns, so that transactions interleave.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.objects: dict[str, dict[str, tuple[bytes, int]]] = {}
        self.separators: dict[str, str | None] = {}
        self.index = [0] * SHARDS
        self.outcomes: dict[RequestId, Committed | Conflict] = {}
        self.before: Callable[[str, Any], Any] = lambda _operation, _details: None
        self.after: Callable[[Any], None] = lambda _writes: None
        self.commits = 0

    def shard(self, container: str, key: str) -> int:
        separator = self.separators[container]
        part = key.split(separator, 1)[0] if separator else key
        return zlib.crc32(part.encode()) % SHARDS

    async def _turns(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    async def _hook(self, operation: str, details: Any) -> None:
        waiting = self.before(operation, details)
        if waiting is not None:
            await waiting

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
        await self._hook("get", (container, key))
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
        await self._hook("scan", (container, prefix))
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
        repeated: bool = False,
        timeout_s: float | None = None,
    ) -> Committed:
        await self._turns()
        await self._hook("commit", writes)
        if request_id is not None and request_id in self.outcomes:
            known = self.outcomes[request_id]
            if isinstance(known, Conflict):
                raise known
            return known
        try:
            for read in reads:
                self._validate(read)
        except Conflict as error:
            if request_id is not None:
                self.outcomes[request_id] = error
            raise
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


class FakeBlobs:
    """A node's blob store in memory; a put takes some turns before it is there."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.data: dict[str, bytes] = {}

    async def put(self, key: str, data: bytes) -> bool:
        if hashlib.sha256(data).hexdigest() != key:
            raise Corrupt("name and data differ")
        if key in self.data:
            return False
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        new = key not in self.data
        self.data[key] = bytes(data)
        return new

    def get(self, key: str) -> bytes:
        if key not in self.data:
            raise NotFound(key)
        if hashlib.sha256(self.data[key]).hexdigest() != key:
            raise Corrupt(key)
        return self.data[key]

    def has(self, key: str) -> bool:
        return key in self.data

    def size(self, key: str) -> int:
        return len(self.data[key])

    def keys(self) -> Iterator[str]:
        return iter(sorted(self.data))

    async def remove(self, key: str) -> bool:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)
        return self.data.pop(key, None) is not None

    def statistics(self) -> dict[str, int]:
        return {"blobs": len(self.data), "bytes": sum(map(len, self.data.values()))}


class FakeEndpoint:
    """Calls between the nodes of one :class:`Cluster`: typed, packed, at most once, lost when a node is down."""

    def __init__(self, cluster: Cluster, name: str, incarnation: int) -> None:
        self.cluster = cluster
        self.name = name
        self.incarnation = incarnation
        self.services: dict[str, dict[str, Any]] = {}

    def register(self, service: object) -> None:
        name, functions = functions_of(service)
        assert name not in self.services
        self.services[name] = functions

    async def call(
        self, to: str, service: str, function: str, *args: Any, data: Any = b"", timeout_s: float | None = None
    ) -> Reply:
        args = msgpack.unpackb(msgpack.packb(args))
        await self.cluster.turns()
        waiting = self.cluster.before_call(self.name, to, service, function, args)
        if waiting is not None:
            await waiting
        node = self.cluster.nodes.get(to)
        if node is None or self.cluster.cut(self.name, to):
            await asyncio.sleep(5.0 if timeout_s is None else timeout_s)
            raise Timeout(f"no answer from {to}")
        found = node.endpoint.services[service][function]
        epoch = self.cluster.nodes[self.name].view.epoch if self.name in self.cluster.nodes else 0
        found.check(list(args))
        call = Call(self.name, Address("h", 1, 1), bytes(data), 1e9, node.endpoint, epoch)  # type: ignore[arg-type]
        task = node.env.tasks.start(self._answer(found, call, args), name=function)
        await asyncio.wait([task])
        if task.cancelled():
            raise Timeout(f"{to} died")
        value, answer = task.result()
        await self.cluster.turns()
        if isinstance(value, GoStoreError):
            raise error_from_wire(msgpack.unpackb(msgpack.packb(value.to_wire())))
        return Reply(msgpack.unpackb(msgpack.packb(value)), answer)

    async def _answer(self, found: Any, call: Call, args: Sequence[Any]) -> Any:
        try:
            result = await found.run(call, *args)
        except GoStoreError as error:
            return error, b""
        return (result.value, bytes(result.data)) if isinstance(result, Reply) else (result, b"")

    def cast(self, to: str, service: str, function: str, *args: Any) -> None:
        async def tell() -> None:
            try:
                await self.call(to, service, function, *args)
            except GoStoreError:
                return

        self.cluster.nodes[self.name].env.tasks.start(tell(), name="cast")


def failed(error: BaseException) -> None:
    raise error


class Node:
    """One node of a :class:`Cluster`; as a view source it has ``view`` and ``watchers``."""

    def __init__(self, cluster: Cluster, name: str, incarnation: int, blobs: FakeBlobs) -> None:
        self.name = name
        self.incarnation = incarnation
        self.env = make_env(name, cluster.seed)
        self.blobs = blobs
        self.view = cluster.view
        self.watchers = Watchers(failed)
        self.endpoint = FakeEndpoint(cluster, name, incarnation)
        self.config = NodeConfig(
            name=name, secret=SECRET, data_dir="unused", fs=cluster.config, rest=RestConfig(body_size_bytes_max=100_000)
        )
        local = cluster.local(name)
        self.fs = FsService(self.env, self.endpoint, self, cluster.kv, blobs, self.config, local=local)
        self.endpoint.register(self.fs)

    def move_to(self, view: View) -> None:
        old, self.view = self.view, view
        self.watchers.notify(old, view, changes_between(old, view))


class Cluster:
    """Nodes with true views and rings over the fakes. All of it is driven by one seed."""

    def __init__(self, seed: int = 0, nodes: int = 5, *, replicas: int = 3, **config: Any) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.kv = FakeKeyValue(seed)
        self.config = FsConfig(**{"inline_size_bytes_max": 16, "chunk_size_bytes": 4096, **config})
        self.before_call: Callable[..., Any] = lambda *_: None
        self.cuts: list[tuple[str, str]] = []
        self.replicas = replicas
        self.nodes: dict[str, Node] = {}
        self.disks: dict[str, FakeBlobs] = {}
        self.lives: dict[str, int] = {}
        self.view = self.make_view(0, ())
        self.names = tuple(f"n{number}" for number in range(1, nodes + 1))

    def make_view(self, epoch: int, online: Iterable[str]) -> View:
        members = {
            name: Member(
                name=name,
                address=Address("h", 1, 1),
                state=NodeState.ONLINE,
                incarnation=max(self.lives.get(name, 1), 1),
            )
            for name in sorted(online)
        }
        return View("test", epoch, members, {"global": RingSpec(self.replicas, 8)}, digest=epoch)

    async def __aenter__(self) -> Cluster:
        for name in self.names:
            await self.start(name)
        self.online(*self.names)
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self.nodes):
            await self.kill(name)

    async def turns(self) -> None:
        for _ in range(self.rng.randrange(3)):
            await asyncio.sleep(0)

    def cut(self, one: str, other: str) -> bool:
        return (one, other) in self.cuts

    def partition(self, some: Iterable[str]) -> None:
        some = list(some)
        others = [name for name in self.names if name not in some]
        self.cuts = [(a, b) for a in some for b in others] + [(b, a) for a in some for b in others]

    def local(self, name: str) -> Callable[[str, str], Any]:
        """As if the first node of a shard's number, and the next, held replicas of it."""

        def look(container: str, key: str) -> Any:
            holders = [self.names[(self.kv.shard(container, key) + n) % len(self.names)] for n in range(2)]
            if name not in holders:
                return None
            value, version = self.kv.objects[container].get(key, (b"\xc0", 0))
            return SimpleNamespace(value=msgpack.unpackb(value), version=version, found=version > 0)

        return look

    async def start(self, name: str) -> Node:
        """Start a node, on the disk that it had."""
        self.lives[name] = self.lives.get(name, 0) + 1
        blobs = self.disks.setdefault(name, FakeBlobs(self.rng))
        node = self.nodes[name] = Node(self, name, self.lives[name], blobs)
        await node.fs.start()
        return node

    async def kill(self, name: str) -> None:
        """The node is gone from one moment to the next; its disk stays. The view does not know yet."""
        node = self.nodes.pop(name)
        await node.env.tasks.stop()

    def online(self, *names: str, told: Iterable[str] | None = None) -> None:
        """A new view, in which these are online; ``told``: who learns of it now (all)."""
        self.view = self.make_view(self.view.epoch + 1, names)
        for name in self.nodes if told is None else told:
            self.nodes[name].move_to(self.view)

    async def ask(self, name: str, function: str, *args: Any, data: bytes = b"") -> Any:
        """What a client does: a call of the service fs at a node."""
        reply = await FakeEndpoint(self, "client", 1).call(name, "fs", function, *args, data=data)
        return (reply.value, reply.data) if function == "read" else reply.value

    async def settle(self) -> None:
        """Until every node says that nothing is left to do."""
        deadline_s = asyncio.get_running_loop().time() + 3000
        while unsettled := [what for node in self.nodes.values() for what in node.fs.status()["unsettled"]]:
            assert asyncio.get_running_loop().time() < deadline_s, unsettled
            await asyncio.sleep(0.05)

    async def until(self, condition: Callable[[], bool], pause_s: float = 0.05) -> None:
        """Until it holds, with a pause of so much virtual time before it is looked at again."""
        deadline_s = asyncio.get_running_loop().time() + 3000
        while not condition():
            assert asyncio.get_running_loop().time() < deadline_s, condition
            await asyncio.sleep(pause_s)

    def copies(self, key: str) -> list[str]:
        return [name for name in self.nodes if self.nodes[name].blobs.has(key)]


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    return SimpleNamespace(
        Cluster=Cluster,
        FakeKeyValue=FakeKeyValue,
        make_env=make_env,
        run=run,
        secret=SECRET,
        tree_problems=tree_problems,
    )

"""A closed loop of clients against one store: what ``gostore bench db`` runs in processes of its own.

    python -m gostore.experiments.load '{"kind": "gostore", ...}'

It prints ``{}`` when it is connected, waits for a line, runs, prints one line of JSON, and waits for another. So
many *clients* each have one request on its way and send the next when the answer is there; all stores are asked in the
same way, over the best client that Python has for them. The values are random, ``value_size`` bytes; the keys are
``keys`` different ones.

Specification: ``kind`` (one of :data:`TARGETS`), ``at`` (how to reach it, by kind), ``operation`` (put, get, or fill:
put every key once), ``clients``, ``seconds``, ``keys``, ``value_size``. Result: ``operations``, ``seconds``,
``latency_ms`` (p50 and p99).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Protocol

Spec = dict[str, Any]
CONTAINER: Final = "bench"


class Target(Protocol):
    """A store. ``get`` is linearizable where the store has such a read; both raise what its client raises."""

    def __init__(self, spec: Spec) -> None: ...
    async def open(self) -> None: ...
    async def put(self, key: str, value: bytes) -> None: ...
    async def get(self, key: str) -> bytes: ...
    async def close(self) -> None: ...


class GoStore:
    """``at``: cluster, secret, members (name -> address as it travels), via (the node that leads the shard).

    The client's connection on this very loop, as a service in Python would have it; ``cluster.db`` adds the hop to the
    thread that it shares with notebooks. What its clients commit in one turn of the loop shares a request
    (:mod:`gostore.client.commits`).
    """

    def __init__(self, spec: Spec) -> None:
        from gostore.client.connection import Connection, client_env
        from gostore.client.keyvalue import RemoteKeyValue
        from gostore.core.address import Address
        from gostore.core.keyvalue import Write

        at = spec["at"]
        members = {name: Address.from_wire(address) for name, address in at["members"].items()}
        self._connection = Connection(client_env(), cluster=at["cluster"], secret=at["secret"], members=members)
        self._store = RemoteKeyValue(lambda: self._connection, at["via"])
        self._write = Write

    async def open(self) -> None:
        await self._connection.open()
        await self._store.containers()

    async def put(self, key: str, value: bytes) -> None:
        await self._store.commit((), [self._write("set", CONTAINER, key, value)])

    async def get(self, key: str) -> bytes:
        found: bytes = (await self._store.get(CONTAINER, key)).value
        return found

    async def close(self) -> None:
        await self._connection.close()


class Etcd:
    """``at``: HOST:PORT of the leader. gRPC (etcd's api/etcdserverpb/rpc.proto) with the few fields packed by hand."""

    def __init__(self, spec: Spec) -> None:
        import grpc.aio

        self._channel = grpc.aio.insecure_channel(spec["at"])
        self._put = self._channel.unary_unary("/etcdserverpb.KV/Put")
        self._range = self._channel.unary_unary("/etcdserverpb.KV/Range")

    async def open(self) -> None:
        await self._channel.channel_ready()

    async def put(self, key: str, value: bytes) -> None:
        await self._put(packed(1, key.encode()) + packed(2, value))

    async def get(self, key: str) -> bytes:
        answer = dict(fields(await self._range(packed(1, key.encode()))))
        found: bytes = dict(fields(answer[2]))[5]
        return found

    async def close(self) -> None:
        await self._channel.close()


def packed(number: int, content: bytes) -> bytes:
    """A field of bytes as protobuf has it."""
    assert len(content) < 128
    return bytes((number << 3 | 2, len(content))) + content


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(Number, value) of the fields of a protobuf message: an integer, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            size = varint()
            yield tag >> 3, message[place : place + size]
            place += size


class Redis:
    """``at``: the port on this machine. One connection for each client."""

    def __init__(self, spec: Spec) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis

        pool = BlockingConnectionPool(port=spec["at"], max_connections=spec["clients"])
        self._client = Redis(connection_pool=pool)

    async def open(self) -> None:
        await self._client.ping()

    async def put(self, key: str, value: bytes) -> None:
        await self._client.set(key, value)

    async def get(self, key: str) -> bytes:
        found = await self._client.get(key)
        assert isinstance(found, bytes)
        return found

    async def close(self) -> None:
        await self._client.aclose()


class PySyncObj:
    """``at``: own address, and those of the others: each process of this kind is one of the members.

    Only the one that leads puts anything; it is asked in its own process, so that there is no client between. Reads
    are of its own memory: there are no others.
    """

    def __init__(self, spec: Spec) -> None:
        from pysyncobj import SyncObj, SyncObjConf
        from pysyncobj.batteries import ReplDict

        own, others = spec["at"]
        self._values = ReplDict()
        conf = SyncObjConf(autoTick=False, appendEntriesPeriod=0.001, connectionRetryTime=0.1)
        self._node = SyncObj(own, others, conf=conf, consumers=[self._values])
        self._ready = asyncio.Event()
        self.leads = False

    async def open(self) -> None:
        self._tick()
        await self._ready.wait()

    def _tick(self) -> None:
        self._node.doTick(0.0)
        if self._node._getLeader() is not None and self._node.isReady():
            self.leads = self._node._isLeader()
            self._ready.set()
        asyncio.get_running_loop().call_later(0.001, self._tick)

    async def put(self, key: str, value: bytes) -> None:
        future = asyncio.get_running_loop().create_future()
        self._values.set(key, value, callback=lambda result, error: future.set_result(error))
        if error := await future:
            raise OSError(f"it was not committed: {error}")

    async def get(self, key: str) -> bytes:
        found: bytes = self._values[key]
        return found

    async def close(self) -> None:
        self._node.destroy()


TARGETS: Final[dict[str, Callable[[Spec], Target]]] = {
    "gostore": GoStore,
    "etcd": Etcd,
    "redis": Redis,
    "pysyncobj": PySyncObj,
}


async def closed_loop(spec: Spec, say: Callable[[Any], None], hear: Callable[[], Awaitable[None]]) -> None:
    """Run one specification; ``say`` gets what is to be printed, ``hear`` returns when it is to begin."""
    target = TARGETS[spec["kind"]](spec)
    await target.open()
    say({})
    await hear()
    latencies: list[float] = []
    operation, keys, size = spec["operation"], spec["keys"], spec["value_size"]
    begun = time.perf_counter()
    end = begun + spec["seconds"]

    async def client(number: int) -> None:
        rng = random.Random(number)
        while (before := time.perf_counter()) < end:
            key = f"key{rng.randrange(keys)}"
            if operation == "put":
                await target.put(key, rng.randbytes(size))
            else:
                assert len(await target.get(key)) == size
            latencies.append(time.perf_counter() - before)

    if operation == "fill":
        for number in range(keys):
            await target.put(f"key{number}", os.urandom(size))
    elif getattr(target, "leads", True):
        await asyncio.gather(*map(client, range(spec["clients"])))
    seconds = time.perf_counter() - begun
    latencies.sort()
    places = [latencies[int(part * (len(latencies) - 1))] * 1000 if latencies else 0.0 for part in (0.5, 0.99)]
    say({"operations": len(latencies), "seconds": seconds, "latency_ms": places})
    await hear()  # the others may not be ready yet, and some are members of the store
    await target.close()


def main() -> None:
    """See the module."""
    import uvloop

    async def hear() -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)

    uvloop.run(closed_loop(json.loads(sys.argv[1]), lambda what: print(json.dumps(what), flush=True), hear))


if __name__ == "__main__":
    main()

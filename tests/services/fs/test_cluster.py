"""The whole node in the simulated world: fs over the real db, membership, log, blobs and network, with faults."""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import Any

import pytest

from gostore.core.errors import GoStoreError, NotFound
from gostore.sim import simulate

SIZES = (0, 100, 5000, 9000, 20_000, 70_000)
FS = {"inline_size_bytes_max": 256, "chunk_size_bytes": 8192}
WRONG = ("lost", "under_replicated", "orphans", "dangling", "corrupt", "intents")


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


async def assert_sound(cluster: Any) -> None:
    check = await cluster.fs.check()
    assert {name: check[name] for name in WRONG} == dict.fromkeys(WRONG, 0)
    assert check["unreached"] == []


def test_files_survive_the_loss_of_a_node_and_its_return() -> None:
    async def main(cluster: Any) -> None:
        files = {f"/d{number % 3}/f{number}": content(number, SIZES[number % len(SIZES)]) for number in range(24)}
        for number, (path, data) in enumerate(files.items()):
            await cluster.fs.write(path, data, via=f"n{number % 5 + 1}")
        await cluster.wait_settled()
        await assert_sound(cluster)
        victim = (await cluster.fs.stat("/d2/f5"))["place"]["chunks"][0]["owners"][0]
        await cluster.nodes[victim].kill()
        for path, data in files.items():
            assert await cluster.fs.read(path) == data
        await cluster.wait_state(victim, "offline")
        await cluster.wait_settled()
        await assert_sound(cluster)
        for path in [path for path in files if path.startswith("/d1/")]:
            del files[path]
        await cluster.fs.delete("/d1", recursive=True)
        await cluster.fs.write("/d0/f0", content(99, 30_000))
        files["/d0/f0"] = content(99, 30_000)
        await cluster.faults.restart(victim)
        await cluster.wait_ready()
        await cluster.wait_settled()
        await assert_sound(cluster)
        for path, data in files.items():
            for node in cluster.nodes:
                assert await cluster.fs.read(path, via=node) == data
        assert [child["name"] for child in await cluster.fs.list("/")] == ["d0", "d2"]

    with simulate(5, seed=11, fs=FS) as cluster:
        cluster.run(main(cluster))


class Client:
    """Works on one path. It knows what was acknowledged last, and what was left in doubt and may happen still."""

    def __init__(self, path: str, seed: int) -> None:
        self.path = path
        self.rng = random.Random(f"{path} {seed}")
        self.now: bytes | None = None
        self.doubts: list[bytes | None] = []
        self.tried: list[bytes | None] = [None]
        self.acknowledged = 0

    async def step(self, cluster: Any) -> None:
        via = self.rng.choice(list(cluster.nodes))
        data = content(self.rng.randrange(6), self.rng.choice(SIZES))
        try:
            if self.rng.random() < 0.7:
                await self._change(data, cluster.fs.write(self.path, data, via=via))
            elif self.rng.random() < 0.5:
                await self._change(None, cluster.fs.delete(self.path, via=via))
            else:
                # A node that was deposed and does not know it may tell what was; but nothing that never was.
                assert await self.read(cluster, via) in self.tried
        except GoStoreError:
            return

    async def _change(self, wanted: bytes | None, change: Any) -> None:
        self.tried.append(wanted)
        try:
            await change
        except GoStoreError as error:
            if not error.definite:
                self.doubts.append(wanted)
            raise
        self.now = wanted
        self.acknowledged += 1

    async def read(self, cluster: Any, via: str) -> bytes | None:
        try:
            found: bytes = await cluster.fs.read(self.path, via=via)
        except NotFound:
            return None
        return found

    async def look(self, cluster: Any) -> None:
        """When all is quiet: every node has the same, and it is what was acknowledged last or left in doubt."""
        found = [await self.read(cluster, via) for via in cluster.nodes]
        assert [*map(digest, found)] == [digest(found[0])] * len(found)
        assert found[0] in [self.now, *self.doubts], (
            f"{self.path}: {digest(found[0])} instead of {digest(self.now)}; in doubt: {[*map(digest, self.doubts)]}"
        )


def digest(data: bytes | None) -> str:
    return "nothing" if data is None else f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:8]}"


async def havoc(cluster: Any, rng: random.Random) -> None:
    """One node at a time dies, loses its power, is cut off or stalls, and comes back."""
    for _ in range(5):
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        victim = rng.choice(list(cluster.nodes))
        fault = rng.randrange(4)
        if fault == 0:
            await cluster.faults.kill(victim)
        elif fault == 1:
            await cluster.faults.power_cut(victim)
        elif fault == 2:
            await cluster.faults.isolate(victim)
        else:
            await cluster.faults.pause(victim)
        await asyncio.sleep(rng.uniform(0.1, 6.0))
        if fault < 2:
            await cluster.faults.restart(victim)
        elif fault == 2:
            await cluster.faults.heal()
        else:
            await cluster.faults.resume(victim)
        await cluster.wait_ready(timeout_s=120)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_acknowledged_is_lost_and_nothing_deleted_comes_back(seed: int) -> None:
    async def main(cluster: Any) -> int:
        clients = [Client(f"/d{number % 2}/e/f{number}", seed) for number in range(6)]
        faults = asyncio.ensure_future(havoc(cluster, random.Random(seed)))

        async def work(client: Client) -> None:
            while not faults.done():
                await client.step(cluster)
                await asyncio.sleep(client.rng.uniform(0.0, 0.2))

        await asyncio.gather(*map(work, clients), faults)
        await cluster.wait_settled(timeout_s=300)
        for client in clients:
            await client.look(cluster)
        await cluster.fs.collect()
        await assert_sound(cluster)
        return sum(client.acknowledged for client in clients)

    with simulate(5, seed=seed, fs=FS) as cluster:
        assert cluster.run(main(cluster)) > 50

from __future__ import annotations

import asyncio
import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import BadRequest, Corrupt, Fenced, NotFound
from gostore.services.fs.chunks import Holder, checked_key

DATA = b"some content"
KEY = hashlib.sha256(DATA).hexdigest()


class SlowBlobs:
    """Blobs whose puts and removals end when the test says so."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def put(self, key: str, data: bytes) -> bool:
        await self.gate.wait()
        new = key not in self.data
        self.data[key] = data
        return new

    async def remove(self, key: str) -> bool:
        await self.gate.wait()
        return self.data.pop(key, None) is not None

    def has(self, key: str) -> bool:
        return key in self.data

    def get(self, key: str) -> bytes:
        return self.data[key]

    def keys(self) -> list[str]:
        return sorted(self.data)


def holder(kit: SimpleNamespace) -> tuple[Holder, Any]:
    blobs: Any = SlowBlobs()
    return Holder(kit.make_env("n1"), blobs, lambda: 5), blobs


def test_what_was_promised_after_the_mark_is_kept(kit: SimpleNamespace) -> None:
    async def main() -> None:
        held, _ = holder(kit)
        assert not held.pin(KEY)
        assert await held.put(KEY, DATA)
        mark = held.mark()
        assert not await held.put(KEY, DATA)  # it was here, and is promised again
        assert not await held.remove(KEY, mark)
        mark = held.mark()
        assert held.pin(KEY)
        assert not await held.remove(KEY, mark)
        assert held.has(KEY)
        assert await held.remove(KEY, held.mark())
        assert not held.has(KEY)
        assert not await held.remove(KEY, held.mark())

    asyncio.run(main())


def test_what_is_being_stored_is_told_to_those_who_ask_for_it(kit: SimpleNamespace) -> None:
    async def main() -> None:
        held, blobs = holder(kit)
        assert await held.put(KEY, DATA)
        blobs.gate.clear()
        other = "0" * 64
        puts = [asyncio.create_task(held.put(key, DATA)) for key in (other, other)]
        removal = asyncio.create_task(held.remove(KEY, held.mark()))
        await asyncio.sleep(0)
        puts.append(asyncio.create_task(held.put(KEY, DATA)))  # it waits for the removal, and comes after it
        await asyncio.sleep(0)
        assert held.keys() == []
        assert held.keys(arriving=True) == [other, KEY]
        assert not await held.remove(other, held.mark())
        blobs.gate.set()
        assert await removal
        await asyncio.gather(*puts)
        assert held.keys() == held.keys(arriving=True) == [other, KEY]

    asyncio.run(main())


def test_a_node_that_is_behind_removes_nothing_until_it_has_caught_up(kit: SimpleNamespace) -> None:
    async def main() -> None:
        epoch = 5
        held = Holder(kit.make_env("n1"), SlowBlobs(), lambda: epoch)  # type: ignore[arg-type]
        await held.put(KEY, DATA)
        held.heard(6)
        held.heard(4)
        assert not await held.remove(KEY, held.mark())
        epoch = 6
        assert await held.remove(KEY, held.mark())

    asyncio.run(main())


def test_a_chunk_that_is_lent_is_not_removed(kit: SimpleNamespace) -> None:
    async def main() -> None:
        held, _ = holder(kit)
        await held.put(KEY, DATA)
        mark = held.mark()
        with held.lent(KEY):
            assert not await held.remove(KEY, held.mark())
        assert not await held.remove(KEY, mark)
        assert await held.remove(KEY, held.mark())

    asyncio.run(main())


def test_a_chunk_that_is_being_removed_is_gone_and_a_put_brings_it_back(kit: SimpleNamespace) -> None:
    async def main() -> None:
        held, blobs = holder(kit)
        await held.put(KEY, DATA)
        blobs.gate.clear()
        removal = asyncio.ensure_future(held.remove(KEY, held.mark()))
        await asyncio.sleep(0)
        assert not held.has(KEY)
        assert not held.pin(KEY)
        with pytest.raises(NotFound):
            held.get(KEY)
        put = asyncio.ensure_future(held.put(KEY, DATA))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not put.done()
        before = held.mark()
        blobs.gate.set()
        assert await removal
        assert await put
        assert held.get(KEY) == DATA
        assert not await held.remove(KEY, before)

    asyncio.run(main())


def test_damage_is_told(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=1) as cluster:
            node = cluster.nodes["n1"]
            told: list[str] = []
            node.fs.holder.on_corrupt = told.append
            await node.fs.holder.put(KEY, DATA)
            node.blobs.data[KEY] = b"other content"
            with pytest.raises(Corrupt):
                node.fs.holder.get(KEY)
            assert told == [KEY]

    kit.run(main)


def test_functions_between_holders_check_what_they_are_given(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=2) as cluster:
            call = cluster.nodes["n1"].endpoint.call
            with pytest.raises(BadRequest, match="sha256"):
                await call("n2", "chunks", "put", "../../etc/passwd", data=b"x")
            with pytest.raises(Corrupt):
                await call("n2", "chunks", "put", KEY, data=b"x")
            with pytest.raises(BadRequest, match="4097 chunks"):
                await call("n2", "chunks", "has", [KEY] * 4097)
            epoch, digest, incarnation, mark, moved = (await call("n2", "chunks", "mark")).value
            assert moved == 0
            for wrong in [(epoch + 1, digest, incarnation), (epoch, digest + 1, incarnation), (epoch, digest, 9)]:
                with pytest.raises(Fenced):
                    await call("n2", "chunks", "sweep", *wrong, mark, [KEY])
            await call("n2", "chunks", "put", KEY, data=DATA)
            assert (await call("n2", "chunks", "names")).value == [KEY]
            assert (await call("n2", "chunks", "names", KEY + "0")).value == []
            reply = await call("n2", "chunks", "get", KEY, 5, 100)
            assert (reply.value, reply.data) == (len(DATA), DATA[5:])

    kit.run(main)


def test_keys() -> None:
    assert checked_key(KEY) == KEY
    for wrong in (KEY[:-1], KEY.upper(), "", 7, None):
        with pytest.raises(BadRequest):
            checked_key(wrong)

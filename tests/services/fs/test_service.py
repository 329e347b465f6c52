from __future__ import annotations

import asyncio
import hashlib
import random
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import (
    BadRequest,
    Conflict,
    GoStoreError,
    IsADirectory,
    NotADirectory,
    NotEmpty,
    NotFound,
    Timeout,
    Unavailable,
)
from gostore.services.fs.uploads import SESSIONS_MAX


def blob(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


async def read_all(cluster: Any, node: str, path: str) -> bytes:
    found, offset = b"", 0
    while True:
        header, data = await cluster.ask(node, "read", path, offset)
        found, offset = found + data, offset + len(data)
        if offset >= header["size"]:
            return found


@pytest.mark.parametrize("size", [0, 1, 16, 17, 4096, 4097, 20_000])
def test_what_one_node_wrote_any_other_reads_lists_and_describes_at_once(kit: SimpleNamespace, size: int) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(size)
            written = await cluster.ask("n1", "write", "/a/b/c", "text/plain", data=data)
            assert written["checksum"] == hashlib.sha256(data).hexdigest()
            for name in cluster.names:
                assert await read_all(cluster, name, "/a/b/c") == data
                assert await cluster.ask(name, "header", "/a/b/c") == written
                assert await cluster.ask(name, "exists", "/a/b/c")
                (child,) = (await cluster.ask(name, "list", "/a/b"))["children"]
                assert (child["name"], child["size"], child["type"]) == ("c", size, "text/plain")
                (above,) = (await cluster.ask(name, "list", "/a"))["children"]
                assert (above["name"], above["directory"]) == ("b", True)
            await cluster.settle()
            for key, _ in written["chunks"]:
                assert len(cluster.copies(key)) == 3
            check = await cluster.ask("n2", "check")
            assert (check["files"], check["bytes"]) == (1, size)
            assert {check[what] for what in ("lost", "under_replicated", "orphans", "dangling", "corrupt")} == {0}

    kit.run(main)


def test_reads_at_offsets_touch_only_their_chunks(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(30_000)
            written = await cluster.ask("n1", "write", "/f", data=data)
            fetched: list[str] = []

            def watch(_from: str, _to: str, service: str, function: str, args: Any) -> None:
                if (service, function) == ("chunks", "get"):
                    fetched.append(args[0])

            cluster.before_call = watch
            for offset, size in [(0, 1), (4095, 2), (8192, 4096), (29_999, 5), (30_000, 5), (40_000, 1), (100, 9000)]:
                for name in cluster.names:
                    fetched.clear()
                    _, got = await cluster.ask(name, "read", "/f", offset, size)
                    assert got == data[offset : offset + size]
                    first, last = offset // 4096, max(offset + size - 1, offset) // 4096
                    assert {*fetched} <= {key for key, _ in written["chunks"][first : last + 1]}
            with pytest.raises(BadRequest, match="offset = -1"):
                await cluster.ask("n1", "read", "/f", -1)

    kit.run(main)


def test_errors_name_what_is_wrong(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            await cluster.ask("n1", "write", "/d/f", data=b"x")
            for error, function, *args in [
                (NotFound, "read", "/e"),
                (IsADirectory, "read", "/d"),
                (IsADirectory, "write", "/d"),
                (BadRequest, "write", "/"),
                (BadRequest, "write", "d"),
                (BadRequest, "write", "/../d"),
                (BadRequest, "write", "/g", "no type"),
                (BadRequest, "begin", "/g", "no type"),
                (NotADirectory, "write", "/d/f/g"),
                (NotEmpty, "delete", "/d"),
                (NotFound, "delete", "/e", True),
                (BadRequest, "delete", "/", True),
                (NotFound, "header", "/e"),
                (NotADirectory, "list", "/d/f"),
                (Conflict, "read", "/d/f", 0, -1, 7),
                (NotFound, "append", "nothing", 0),
            ]:
                with pytest.raises(error):
                    await cluster.ask("n2", function, *args)
            assert not await cluster.ask("n3", "exists", "/e")
            assert await read_all(cluster, "n3", "/d/f") == b"x"

    kit.run(main)


def test_local_answers_come_from_the_node_itself(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(4096)
            written = await cluster.ask("n1", "write", "/f", data=data)
            (key, _), holders, readers = written["chunks"][0], [], []
            for name in cluster.names:
                try:
                    # The same version, size and type on every replica.
                    assert await cluster.ask(name, "header", "/f", True) == written
                    holders.append(name)
                    assert (await cluster.ask(name, "read", "/f", 0, -1, 0, True))[1] == data
                    readers.append(name)
                except NotFound:
                    pass
            assert len(holders) == 2
            assert readers == [name for name in holders if name in cluster.copies(key)]

    kit.run(main)


def test_an_upload_in_pieces(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(100_000)
            upload = await cluster.ask("n1", "begin", "/big", "video/mp4")
            for offset in range(0, len(data), 7000):
                piece = data[offset : offset + 7000]
                assert await cluster.ask("n1", "append", upload, offset, data=piece) == offset + len(piece)
                assert not await cluster.ask("n2", "exists", "/big")
            with pytest.raises(BadRequest, match="has 100000 bytes"):
                await cluster.ask("n1", "append", upload, 0, data=b"again")
            header = await cluster.ask("n1", "commit", upload)
            assert header["checksum"] == hashlib.sha256(data).hexdigest()
            assert len(header["chunks"]) == 25
            assert await read_all(cluster, "n5", "/big") == data
            with pytest.raises(NotFound, match="no upload"):
                await cluster.ask("n1", "commit", upload)
            assert cluster.kv.values("fs.intents") == {}

    kit.run(main)


def test_an_upload_that_ends_otherwise_leaves_nothing(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(intent_lease_s=10.0) as cluster:
            aborted = await cluster.ask("n1", "begin", "/a")
            await cluster.ask("n1", "append", aborted, 0, data=blob(50_000))
            silent = await cluster.ask("n2", "begin", "/b")
            await cluster.ask("n2", "append", silent, 0, data=blob(50_000, 2))
            assert len(cluster.kv.values("fs.intents")) == 2
            await cluster.ask("n1", "abort", aborted)
            await asyncio.sleep(20)
            with pytest.raises(NotFound, match="silent for longer than 10 s"):
                await cluster.ask("n2", "append", silent, 50_000, data=b"late")
            await cluster.settle()
            assert cluster.kv.values("fs.intents") == {}
            assert not any(disk.data for disk in cluster.disks.values())

    kit.run(main)


def test_uploads_are_bounded(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=1) as cluster:
            for number in range(SESSIONS_MAX):
                await cluster.ask("n1", "begin", f"/{number}")
            with pytest.raises(Unavailable, match="uploads under way"):
                await cluster.ask("n1", "begin", "/more")

    kit.run(main)


def test_deleting_and_overwriting_frees_the_chunks_that_nothing_else_uses(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            shared, own = blob(10_000), blob(10_000, 2)
            first = await cluster.ask("n1", "write", "/d/one", data=shared)
            await cluster.ask("n2", "write", "/d/two", data=shared)
            await cluster.ask("n3", "write", "/d/three", data=own)
            assert (await cluster.ask("n1", "check"))["chunks"] == 6
            await cluster.ask("n4", "delete", "/d/one")
            await cluster.ask("n5", "write", "/d/three", data=b"small")
            await cluster.settle()
            assert await read_all(cluster, "n1", "/d/two") == shared
            check = await cluster.ask("n1", "check")
            assert (check["chunks"], check["orphans"], check["under_replicated"]) == (3, 0, 0)
            assert sorted({key for disk in cluster.disks.values() for key in disk.data}) == sorted(
                key for key, _ in first["chunks"]
            )
            await cluster.ask("n4", "delete", "/d", True)
            await cluster.settle()
            assert not any(disk.data for disk in cluster.disks.values())

    kit.run(main)


@pytest.mark.parametrize("seed", range(25))
def test_writers_deleters_and_collections_at_once_lose_nothing(kit: SimpleNamespace, seed: int) -> None:
    """Few contents under few names, so that chunks are shared, freed and wanted again all the time."""

    async def main() -> None:
        async with kit.Cluster(seed) as cluster:
            rng = random.Random(seed)
            contents = [blob(size, size) for size in (5000, 9000, 4096)]
            sums = {hashlib.sha256(data).hexdigest(): data for data in contents}

            async def client(number: int) -> None:
                for _ in range(12):
                    node, path = rng.choice(cluster.names), f"/d/{rng.randrange(3)}"
                    action = rng.random()
                    try:
                        if action < 0.5:
                            await cluster.ask(node, "write", path, data=rng.choice(contents))
                        elif action < 0.7:
                            await cluster.ask(node, "delete", path)
                        elif action < 0.8:
                            await cluster.ask(node, "collect")
                        else:
                            header, data = await cluster.ask(node, "read", path)
                            assert sums[header["checksum"]] == data
                    except NotFound:
                        pass
                    await asyncio.sleep(rng.random() * 0.01)

            await asyncio.gather(*[client(number) for number in range(6)])
            await cluster.settle()
            for child in (await cluster.ask("n1", "list", "/d"))["children"]:
                header = await cluster.ask("n2", "header", f"/d/{child['name']}")
                assert await read_all(cluster, "n3", f"/d/{child['name']}") == sums[header["checksum"]]
            check = await cluster.ask("n1", "check")
            assert {check[what] for what in ("lost", "under_replicated", "orphans", "dangling", "intents")} == {0}
            assert kit.tree_problems(cluster.kv) == []

    kit.run(main)


def test_overwriting_alone_frees_the_old_chunks(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            await cluster.ask("n1", "write", "/f", data=blob(20_000))
            await cluster.ask("n2", "write", "/f", data=b"small")
            await cluster.settle()
            assert not any(disk.data for disk in cluster.disks.values())

    kit.run(main)


def test_a_reader_of_a_file_that_is_replaced_meanwhile_gets_the_new_one(kit: SimpleNamespace) -> None:
    """It has read the header when the file is replaced, and the chunks of that header are collected."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            old, new = blob(20_000, 1), blob(20_000, 2)
            await cluster.ask("n1", "write", "/f", data=old)
            replicas = cluster.nodes["n3"].fs.replicas
            fetch = replicas.fetch
            replaced = asyncio.Lock()
            done: list[Any] = []

            async def late(*args: Any) -> bytes:
                async with replaced:
                    if not done:
                        await cluster.ask("n2", "write", "/f", data=new)
                        done.append(await cluster.ask("n2", "collect"))
                return await fetch(*args)

            replicas.fetch = late
            header, got = await cluster.ask("n3", "read", "/f")
            assert got == new
            assert header["version"] == 2
            assert done[0]["chunks"] == 15

    kit.run(main)


def test_a_crash_of_the_writer_at_any_step_leaves_nothing_that_stays(kit: SimpleNamespace) -> None:
    """The node dies before its n-th call or transaction, for every n. No header is ever without its chunks."""

    async def one(step: int) -> bool:
        async with kit.Cluster() as cluster:
            data, old = blob(10_000), blob(5000, 2)
            await cluster.ask("n2", "write", "/d/f", data=old)
            await cluster.settle()
            left, dead = step, asyncio.Event()

            def count(name: str) -> None:
                nonlocal left
                if name == "n1" and not dead.is_set():
                    left -= 1
                    if left < 0:
                        dead.set()
                        raise Timeout("n1 is dying")

            cluster.before_call = lambda source, *_: count(source)
            cluster.kv.before = lambda *_: count("n1" if active else "")
            active = True
            write = asyncio.ensure_future(cluster.nodes["n1"].fs.write(SimpleNamespace(data=data), "/d/e/f"))
            died = asyncio.ensure_future(dead.wait())
            await asyncio.wait([write, died], return_when=asyncio.FIRST_COMPLETED)
            active = False
            died.cancel()
            cluster.before_call = lambda *_: None
            cluster.kv.before = lambda *_: None
            crashed = dead.is_set()
            if crashed:
                write.cancel()
                await cluster.kill("n1")
            await asyncio.gather(write, return_exceptions=True)
            assert kit.tree_problems(cluster.kv) == []
            # Whatever header exists has its content.
            if await cluster.ask("n3", "exists", "/d/e/f"):
                assert await read_all(cluster, "n3", "/d/e/f") == data
                expected = 5
            else:
                assert crashed
                expected = 2
            cluster.online(*(name for name in cluster.names if name in cluster.nodes))
            await cluster.settle()
            await cluster.ask("n3", "collect")
            check = await cluster.ask("n3", "check")
            assert (check["chunks"], check["orphans"], check["lost"], check["intents"]) == (expected, 0, 0, 0)
            assert await read_all(cluster, "n4", "/d/f") == old
            # The dead node comes back with what its disk holds: that goes too.
            if crashed:
                await cluster.start("n1")
                cluster.online(*cluster.names)
                await cluster.settle()
                check = await cluster.ask("n3", "check")
                assert (check["orphans"], check["lost"], check["under_replicated"]) == (0, 0, 0)
            return not crashed

    for step in range(100):
        if kit.run(lambda step=step: one(step)):
            break
    assert step > 10


# 16,384 bytes are stored when they come; of 20,000 some are left to store when the upload ends.
@pytest.mark.parametrize("size", [16_384, 20_000])
def test_a_writer_that_was_taken_for_dead_cannot_commit(kit: SimpleNamespace, size: int) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            upload = await cluster.ask("n1", "begin", "/f")
            await cluster.ask("n1", "append", upload, 0, data=blob(size))
            # The others believe that n1 is gone, collect what it wrote, and see it come back.
            cluster.online("n2", "n3", "n4", "n5")
            collected = await cluster.ask("n2", "collect")
            assert collected["intents"] == 1
            cluster.online(*cluster.names)
            with pytest.raises(GoStoreError, match="given up"):
                await cluster.ask("n1", "commit", upload)
            assert not await cluster.ask("n2", "exists", "/f")
            await cluster.settle()
            assert (await cluster.ask("n2", "check"))["orphans"] == 0
            assert not any(disk.data for disk in cluster.disks.values())

    kit.run(main)


def test_a_live_writers_chunks_are_not_collected(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(60_000)
            upload = await cluster.ask("n1", "begin", "/f")
            for offset in range(0, len(data), 5000):
                await cluster.ask("n1", "append", upload, offset, data=data[offset : offset + 5000])
                done = await cluster.ask("n2", "collect")
                assert (done["chunks"], done["intents"]) == (0, 0)
            await cluster.ask("n1", "commit", upload)
            assert await read_all(cluster, "n3", "/f") == data

    kit.run(main)


def test_a_file_that_comes_into_being_while_a_collection_reads_keeps_its_chunks(kit: SimpleNamespace) -> None:
    """The intent is consumed after the intents were read and before the headers are."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(16_384)
            upload = await cluster.ask("n1", "begin", "/f")
            await cluster.ask("n1", "append", upload, 0, data=data)
            scans: list[str] = []

            def commit(operation: str, details: Any) -> Any:
                if operation != "scan":
                    return None
                scans.append(details[0])
                return cluster.ask("n1", "commit", upload) if len(scans) == 3 else None

            cluster.kv.before = commit
            done = await cluster.ask("n2", "collect")
            assert len(scans) == 3
            assert done["chunks"] == 0
            assert await read_all(cluster, "n3", "/f") == data

    kit.run(main)


def test_a_file_that_wants_the_chunks_just_found_unreferenced_keeps_them(kit: SimpleNamespace) -> None:
    """Its writer comes when all has been read and nothing been removed."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(9000)
            for node in cluster.nodes.values():
                node.fs.collector.want = lambda: None
            await cluster.ask("n1", "write", "/old", data=data)
            await cluster.ask("n1", "delete", "/old")
            written = []

            def write(_from: str, _to: str, _service: str, function: str, _args: Any) -> Any:
                if function == "sweep" and not written:
                    written.append(1)
                    return cluster.ask("n4", "write", "/new", data=data)
                return None

            cluster.before_call = write
            done = await cluster.ask("n2", "collect")
            assert (done["chunks"], done["kept"]) == (0, 9)
            for name in cluster.names:
                assert await read_all(cluster, name, "/new") == data
            assert (await cluster.ask("n1", "check"))["under_replicated"] == 0

    kit.run(main)


def test_a_collection_with_an_old_view_removes_nothing(kit: SimpleNamespace) -> None:
    """What it read of db may be old as well: here it misses a file that was written with the new view."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            for node in cluster.nodes.values():
                node.fs.collector.want = lambda: None
            data = blob(9000)
            cluster.online("n1", "n2", "n3", "n4", "n5", told=["n4"])
            scan = cluster.kv.scan
            written = await cluster.ask("n4", "write", "/f", data=data)

            async def old(container: str, *args: Any, **options: Any) -> Any:
                page = await scan(container, *args, **options)
                return type(page)(tuple(e for e in page.entries if not e.key.endswith("/f")), page.next_start)

            cluster.kv.scan = old
            done = await cluster.ask("n1", "collect")
            assert done["chunks"] == 0
            assert sum(len(cluster.copies(key)) for key, _ in written["chunks"]) == 9

    kit.run(main)


def test_a_header_that_cannot_be_read_stops_every_collection(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(9000)
            await cluster.ask("n1", "write", "/f", data=data)
            packed, version = cluster.kv.objects["fs"]["root/f"]
            cluster.kv.objects["fs"]["root/f"] = (b"\xa3odd", version)
            with pytest.raises(GoStoreError, match="no header"):
                await cluster.ask("n2", "collect")
            assert (await cluster.ask("n2", "check"))["corrupt"] == 1
            cluster.kv.objects["fs"]["root/f"] = (packed, version)
            assert await read_all(cluster, "n3", "/f") == data

    kit.run(main)


def test_where_a_file_lies(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            written = await cluster.ask("n1", "write", "/d/f", data=blob(9000))
            await cluster.settle()
            place = (await cluster.ask("n2", "stat", "/d/f"))["place"]
            assert [chunk["chunk"] for chunk in place["chunks"]] == [key for key, _ in written["chunks"]]
            for chunk in place["chunks"]:
                assert sorted(chunk["owners"]) == chunk["held"]
                assert len(chunk["token"]) == 16
            assert len(place["owners"]) == 3

    kit.run(main)

from __future__ import annotations

import asyncio
import hashlib
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import Unavailable
from gostore.services.fs.peers import owners_of


def blob(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


async def fill(cluster: Any, files: int = 12) -> dict[str, bytes]:
    contents = {f"/d/{number}": blob(3000 + 1500 * number, number) for number in range(files)}
    names = list(cluster.nodes)
    for number, (path, data) in enumerate(contents.items()):
        await cluster.ask(names[number % len(names)], "write", path, data=data)
    return contents


async def verify(cluster: Any, contents: dict[str, bytes]) -> None:
    for path, data in contents.items():
        for name in cluster.nodes:
            assert (await cluster.ask(name, "read", path))[1] == data


async def problems(cluster: Any) -> set[Any]:
    check = await cluster.ask(next(iter(cluster.nodes)), "check")
    return {check[what] for what in ("lost", "under_replicated", "orphans", "dangling")} | {*check["unreached"]}


def exact(cluster: Any) -> None:
    """Every chunk is where its owners are, and nowhere else."""
    held = {key for node in cluster.nodes.values() for key in node.blobs.data}
    for key in held:
        assert sorted(cluster.copies(key)) == sorted(owners_of(cluster.view, key))


@pytest.mark.parametrize("seed", range(8))
def test_after_a_loss_all_copies_come_back_and_reads_go_on(kit: SimpleNamespace, seed: int) -> None:
    async def main() -> None:
        async with kit.Cluster(seed) as cluster:
            contents = await fill(cluster)
            victim = cluster.names[seed % 5]
            await cluster.kill(victim)
            await verify(cluster, contents)  # before anybody knows
            cluster.online(*cluster.nodes)
            await verify(cluster, contents)  # while it is repaired
            await cluster.settle()
            exact(cluster)
            assert await problems(cluster) == {0}
            assert sum(node.fs.repair.copied for node in cluster.nodes.values()) > 0
            await verify(cluster, contents)

    kit.run(main)


@pytest.mark.parametrize("seed", range(8))
def test_nodes_come_and_go_and_copies_follow(kit: SimpleNamespace, seed: int) -> None:
    async def main() -> None:
        async with kit.Cluster(seed) as cluster:
            contents = await fill(cluster)
            rng = random.Random(seed)
            for _ in range(6):
                down = [name for name in cluster.names if name not in cluster.nodes]
                if down and rng.random() < 0.6:
                    await cluster.start(rng.choice(down))
                elif len(cluster.nodes) > 3:
                    await cluster.kill(rng.choice(list(cluster.nodes)))
                    path = rng.choice(list(contents))
                    cluster.online(*cluster.nodes)
                    contents[path] = blob(rng.randrange(20_000), rng.randrange(1000))
                    await cluster.ask(rng.choice(list(cluster.nodes)), "write", path, data=contents[path])
                cluster.online(*cluster.nodes)
                if rng.random() < 0.5:
                    await asyncio.sleep(rng.random())
                else:
                    await cluster.settle()
                await verify(cluster, contents)
            await cluster.settle()
            exact(cluster)
            assert await problems(cluster) == {0}

    kit.run(main)


@pytest.mark.parametrize("seed", range(8))
def test_views_that_arrive_late_and_in_pieces_lose_nothing(kit: SimpleNamespace, seed: int) -> None:
    """Nodes act on different views for a while: each ring change is told to a part of them first."""

    async def main() -> None:
        async with kit.Cluster(seed) as cluster:
            contents = await fill(cluster)
            rng = random.Random(seed)
            for _ in range(12):
                online = rng.sample(cluster.names, rng.randrange(3, 6))
                told = [name for name in cluster.names if rng.random() < 0.5]
                cluster.online(*online, told=told)
                await asyncio.sleep(rng.random() * 2)
                for path, data in contents.items():
                    node = rng.choice(cluster.names)
                    if rng.random() < 0.2:
                        await cluster.ask(node, "write", path, data=data)
                held = {key for disk in cluster.disks.values() for key in disk.data}
                for node in cluster.nodes.values():
                    for path in contents:
                        header = await node.fs.find(path)
                        assert all(chunk.key in held for chunk in header.chunks)
            cluster.online(*cluster.names)
            await cluster.settle()
            exact(cluster)
            await verify(cluster, contents)
            assert await problems(cluster) == {0}

    kit.run(main)


@pytest.mark.parametrize("seed", range(30))
def test_a_node_that_comes_back_does_not_bring_back_what_was_deleted(kit: SimpleNamespace, seed: int) -> None:
    """Its repair copies old chunks to their owners while its collection finds that nothing references them."""

    async def main() -> None:
        async with kit.Cluster(seed) as cluster:
            contents = await fill(cluster)
            await cluster.kill("n3")
            cluster.online(*cluster.nodes)
            await cluster.settle()
            await cluster.ask("n1", "write", "/keep", data=contents["/d/5"])
            await cluster.ask("n1", "delete", "/d", True)
            await cluster.settle()
            rng = random.Random(seed)
            cluster.before_call = lambda *_: asyncio.sleep(rng.random())  # a slow network
            await cluster.start("n3")
            cluster.online(*cluster.names)
            await cluster.settle()
            assert await problems(cluster) == {0}
            exact(cluster)
            assert (await cluster.ask("n3", "read", "/keep"))[1] == contents["/d/5"]

    kit.run(main)


def test_what_a_dead_writer_left_is_collected_without_anybody_asking(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            upload = await cluster.ask("n2", "begin", "/f")
            await cluster.ask("n2", "append", upload, 0, data=blob(50_000))
            await cluster.kill("n2")
            cluster.online(*cluster.nodes)
            await cluster.settle()
            assert cluster.kv.values("fs.intents") == {}
            assert not any(node.blobs.data for node in cluster.nodes.values())

    kit.run(main)


def test_a_damaged_copy_is_passed_over_and_healed(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(4096)
            written = await cluster.ask("n1", "write", "/f", data=data)
            key = written["chunks"][0][0]
            await cluster.settle()
            for name in cluster.copies(key):
                disk = cluster.disks[name]
                disk.data[key] = disk.data[key][:-1] + bytes([disk.data[key][-1] ^ 1])
                for reader in cluster.names:
                    assert (await cluster.ask(reader, "read", "/f"))[1] == data
                    assert (await cluster.ask(reader, "read", "/f", 10, 10))[1] == data[10:20]
                await cluster.ask(name, "read", "/f")
                await cluster.settle()
                assert disk.get(key) == data
            assert sum(node.fs.repair.healed for node in cluster.nodes.values()) == 3

    kit.run(main)


def test_without_any_good_copy_the_damaged_ones_stay_and_the_error_says_so(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            written = await cluster.ask("n1", "write", "/f", data=blob(4096))
            key = written["chunks"][0][0]
            for name in cluster.copies(key):
                cluster.disks[name].data[key] = b"damaged"
            for reader in cluster.names:
                with pytest.raises(Unavailable, match=f"no online node gave the chunk {key}"):
                    await cluster.ask(reader, "read", "/f")
            assert len(cluster.copies(key)) == 3

    kit.run(main)


def test_a_write_goes_on_with_a_majority_and_repair_does_the_rest(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            await cluster.kill("n5")  # the view still counts on it
            contents = await fill(cluster)
            await verify(cluster, contents)
            await cluster.start("n5")
            cluster.online(*cluster.names)
            await cluster.settle()
            exact(cluster)
            assert await problems(cluster) == {0}

    kit.run(main)


def test_a_write_that_reaches_no_majority_fails_and_leaves_nothing(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=3) as cluster:
            cluster.partition(["n1"])
            with pytest.raises(Unavailable, match="majority"):
                await cluster.ask("n1", "write", "/f", data=blob(4096))
            cluster.cuts = []
            assert not await cluster.ask("n2", "exists", "/f")
            await asyncio.sleep(60)
            await cluster.settle()
            assert not any(disk.data for disk in cluster.disks.values())

    kit.run(main)


def test_a_writer_with_an_old_view_has_its_chunks_moved(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            cluster.online("n2", "n3", "n4", told=["n2", "n3", "n4", "n5"])
            data = blob(40_000)
            await cluster.ask("n1", "write", "/f", data=data)
            cluster.nodes["n1"].move_to(cluster.view)
            await cluster.settle()
            exact(cluster)
            assert (await cluster.ask("n2", "read", "/f"))[1] == data

    kit.run(main)


def test_a_surplus_copy_goes_only_when_the_owner_has_one(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=2) as cluster:
            data = blob(4096)
            written = await cluster.ask("n1", "write", "/f", data=data)
            key = written["chunks"][0][0]
            del cluster.disks["n2"].data[key]
            tries = 0

            def lose(_source: str, _to: str, _service: str, function: str, _args: Any) -> None:
                nonlocal tries
                if function == "put":
                    tries += 1
                    assert cluster.disks["n1"].data
                    if tries < 5:
                        raise Unavailable("the disk is full")

            cluster.before_call = lose
            cluster.online("n2")
            await cluster.settle()
            assert tries == 5
            assert cluster.copies(key) == ["n2"]

    kit.run(main)


def test_nodes_that_take_each_other_for_the_owner_do_not_both_let_go(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=2) as cluster:
            data = blob(4096)
            await cluster.ask("n1", "write", "/f", data=data)
            # A fork: two views of one epoch.
            cluster.online("n1", told=["n2"])
            cluster.nodes["n1"].move_to(replace(cluster.make_view(cluster.view.epoch, ["n2"]), digest=99))
            await asyncio.sleep(30)
            assert (await cluster.ask("n1", "read", "/f"))[1] == data
            cluster.online("n1")
            await cluster.settle()
            exact(cluster)
            assert (await cluster.ask("n2", "read", "/f"))[1] == data

    kit.run(main)


def test_a_surplus_copy_that_somebody_relied_on_meanwhile_stays_for_another_pass(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=2) as cluster:
            written = await cluster.ask("n1", "write", "/f", data=blob(4096))
            key = written["chunks"][0][0]
            passes: list[bool] = []

            def rely(source: str, to: str, _service: str, function: str, _args: Any) -> None:
                if (source, to, function) == ("n1", "n2", "pin"):
                    passes.append(cluster.nodes["n1"].fs.holder.pin(key) if not passes else True)

            cluster.before_call = rely
            cluster.online("n2")
            await cluster.settle()
            assert passes == [True, True]
            assert cluster.copies(key) == ["n2"]

    kit.run(main)


def test_a_surplus_copy_stays_while_its_owner_has_another_view(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=2) as cluster:
            written = await cluster.ask("n1", "write", "/f", data=blob(4096))
            key = written["chunks"][0][0]
            cluster.online("n2", told=["n1"])
            await asyncio.sleep(30)
            assert cluster.copies(key) == ["n1", "n2"]
            cluster.nodes["n2"].move_to(cluster.view)
            cluster.nodes["n1"].fs.repair.view_changed()
            await cluster.settle()
            assert cluster.copies(key) == ["n2"]

    kit.run(main)


def test_a_copy_that_a_writer_could_not_make_is_made_soon(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            lost: list[str] = []

            def lose(_from: str, to: str, _service: str, function: str, _args: Any) -> None:
                if function == "put" and not lost:
                    lost.append(to)
                    raise Unavailable("the disk is full")

            cluster.before_call = lose
            await cluster.ask("n1", "write", "/f", data=blob(4096))
            assert lost
            await asyncio.sleep(1)
            await cluster.settle()
            exact(cluster)
            assert await problems(cluster) == {0}

    kit.run(main)


def test_a_chunk_that_only_a_stranger_holds_is_found(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(4096)
            written = await cluster.ask("n1", "write", "/f", data=data)
            await cluster.settle()
            key = written["chunks"][0][0]
            owners = cluster.copies(key)
            stranger = next(name for name in cluster.names if name not in owners)
            cluster.disks[stranger].data[key] = data
            for name in owners:
                del cluster.disks[name].data[key]
            for name in cluster.names:
                assert (await cluster.ask(name, "read", "/f"))[1] == data

    kit.run(main)


def test_a_reader_believes_no_bytes_that_do_not_match(kit: SimpleNamespace) -> None:
    """The holder read them rightly, and they were damaged later."""

    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(4096)
            written = await cluster.ask("n1", "write", "/f", data=data)
            await cluster.settle()
            owners = cluster.copies(written["chunks"][0][0])
            reader = next(name for name in cluster.names if name not in owners)
            liar = cluster.nodes[owners_of(cluster.view, written["chunks"][0][0])[0]]
            liar.fs.holder.get = lambda _key: b"x" * 4096
            assert (await cluster.ask(reader, "read", "/f"))[1] == data

    kit.run(main)


def test_a_chunk_that_is_being_copied_is_not_collected_so_that_its_copy_is_seen(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            data = blob(4096)
            key = hashlib.sha256(data).hexdigest()
            gate = asyncio.Event()
            copying = asyncio.Event()

            async def wait() -> None:
                copying.set()
                await gate.wait()

            def hold(_from: str, _to: str, _service: str, function: str, _args: Any) -> Any:
                return wait() if function == "put" else None

            cluster.before_call = hold
            cluster.disks["n3"].data[key] = data
            cluster.nodes["n3"].fs.repair.consider(key)
            await copying.wait()
            done = await cluster.ask("n1", "collect")
            assert (done["chunks"], done["kept"]) == (0, 1)
            gate.set()
            await cluster.settle()
            assert (await cluster.ask("n1", "check"))["orphans"] == 1
            await cluster.ask("n1", "collect")
            assert await problems(cluster) == {0}

    kit.run(main)


def test_events_tell_of_a_repair(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster() as cluster:
            await fill(cluster)
            await cluster.kill("n3")
            seen: list[Any] = []
            for node in cluster.nodes.values():
                node.env.events.subscribe(seen.append)
            cluster.online(*cluster.nodes)
            await cluster.settle()
            started = [event for event in seen if event.kind == "repair_started"]
            copied = [event for event in seen if event.kind == "chunk_copied"]
            done = [event for event in seen if event.kind == "repair_done"]
            assert started
            assert sorted({event.node for event in started}) == sorted({event.node for event in done})
            assert sum(event.data["missing"] for event in started) >= len(copied) > 0
            assert all(event.data["source"] != event.node for event in copied)
            assert sum(event.data["copied"] for event in done) >= len(copied)

    kit.run(main)

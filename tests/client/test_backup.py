"""Backups of a running cluster: one instant, whole files only, and a restore that is all or nothing."""

from __future__ import annotations

import asyncio
import builtins
import io
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gostore as gs
from gostore.client import backup, backup_file
from gostore.client.backup_file import Reader, Writer
from gostore.client.connection import Connection
from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    ConfigError,
    Conflict,
    Corrupt,
    GoStoreError,
    NotFound,
    NotSupported,
    Timeout,
)
from gostore.core.values import unpack
from gostore.services.db import backup as pins
from gostore.services.db import database
from gostore.services.fs import directory
from gostore.sim.cluster import SimCluster

ACCOUNTS = 24
BALANCE = 100


def contents(path: Path) -> dict[str, dict[str, Any]]:
    """What is in a backup: container -> key -> value."""
    with open(path, "rb") as file:
        reader = Reader(file, str(path))
        names = [name for name, _ in reader.facts["containers"]]
        found: dict[str, dict[str, Any]] = {name: {} for name in names}
        for number, rows in reader.rows():
            found[names[number]].update({key: unpack(packed) for key, packed in rows})
    return found


def connection_of(cluster: SimCluster) -> Connection:
    connection = cluster._connection
    assert connection is not None
    return connection


async def stored(cluster: SimCluster, container: str) -> dict[str, Any]:
    return dict(await cluster.db.scan(container))


class Bank:
    """Money moves between accounts in all shards; and a pair of counters of which the second follows the first."""

    def __init__(self, cluster: SimCluster, seed: int) -> None:
        self.db = cluster.db
        self.rng = random.Random(seed)
        self.running = True
        self.transfers = 0

    async def open(self) -> None:
        await self.db.create_container("bank")
        async with self.db.transaction() as t:
            for number in range(ACCOUNTS):
                t.set("bank", f"a{number}", BALANCE)
        await self.db.set("bank", "first", 0)
        await self.db.set("bank", "second", 0)

    async def transfer(self) -> None:
        while self.running:
            one, other = self.rng.sample(range(ACCOUNTS), 2)
            amount = self.rng.randint(1, 10)
            try:
                async with self.db.transaction() as t:
                    t.add("bank", f"a{one}", -amount)
                    t.add("bank", f"a{other}", amount)
                self.transfers += 1
            except GoStoreError:
                await asyncio.sleep(0.01)

    async def count(self) -> None:
        number = 0
        while self.running:
            number += 1
            for key in ("first", "second"):  # the second only when the first is acknowledged
                while self.running:
                    try:
                        await self.db.set("bank", key, number)
                        break
                    except GoStoreError:
                        await asyncio.sleep(0.01)

    def work(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.transfer()) for _ in range(6)] + [asyncio.create_task(self.count())]


def judge(found: dict[str, Any]) -> None:
    assert sum(found[f"a{number}"] for number in range(ACCOUNTS)) == ACCOUNTS * BALANCE
    assert found["second"] <= found["first"] <= found["second"] + 1


def bank_run(seed: int, path: Path, faults: str, backups: int = 3) -> int:
    """Backups under load, each judged; returns the number of transfers."""
    with gs.simulate(5, seed=seed, db={"shards": 4}) as cluster:

        async def scenario() -> int:
            bank = Bank(cluster, seed)
            await bank.open()
            tasks = bank.work()
            try:
                for number in range(backups):
                    await asyncio.sleep(0.2)
                    trouble = asyncio.create_task(disturb(number))
                    file = path / f"{number}.backup"
                    await cluster.db.backup(file)
                    await trouble
                    judge(contents(file)["bank"])
            finally:
                bank.running = False
                await asyncio.gather(*tasks)
            return bank.transfers

        async def disturb(number: int) -> None:
            victim = f"n{number % 5 + 1}"
            # Virtual time: how long the fault lasts, and not a wait for anything.
            if faults == "kill":
                await asyncio.sleep(random.Random(f"{seed} {number}").uniform(0, 0.05))
                await cluster.nodes[victim].kill()
                await asyncio.sleep(1.0)
                await cluster.nodes[victim].restart()
            elif faults == "network":
                await cluster.faults.loss(0.1)
                await cluster.faults.isolate(victim)
                await asyncio.sleep(2.0)
                await cluster.faults.heal()

        return int(cluster.run(scenario()))


@pytest.mark.parametrize(("seed", "faults"), [(1, "none"), (2, "kill"), (3, "network")])
def test_a_backup_under_load_is_of_one_instant(tmp_path: Path, seed: int, faults: str) -> None:
    assert bank_run(seed, tmp_path, faults) > 50


def test_a_restore_brings_back_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "all.backup"
    with gs.simulate(3, seed=3, db={"shards": 4}) as cluster:

        async def fill() -> dict[str, Any]:
            await cluster.db.create_container("a")
            await cluster.db.create_container("tree", separator="/")
            await cluster.db.create_container("empty")
            for number in range(300):
                await cluster.db.set("a", f"k{number}", {"n": number, "bytes": b"\0" * 100, "list": [None, True, 1.5]})
                await cluster.db.set("tree", f"{number % 7}/{number}", number)
            await cluster.fs.write("/file", b"not covered")
            figures = await cluster.db.backup(file)
            assert (figures["containers"], figures["objects"], figures["shards"]) == (3, 600, 4)
            assert not file.with_name("all.backup.part").exists()
            return {name: await stored(cluster, name) for name in ("a", "tree", "empty")}

        before = cluster.run(fill())

    # Into an empty cluster of another size, with another number of shards.
    with gs.simulate(5, seed=4, db={"shards": 7}) as cluster:

        async def bring_back() -> None:
            figures = await cluster.db.restore(file)
            assert (figures["containers"], figures["objects"]) == (3, 600)
            assert await cluster.db.containers() == {
                "a": {"separator": None, "replication": "raft"},
                "empty": {"separator": None, "replication": "raft"},
                "tree": {"separator": "/", "replication": "raft"},
            }
            assert {name: await stored(cluster, name) for name in before} == before

            # Again: refused, nothing is touched; unless they are to be replaced.
            await cluster.db.set("a", "k0", "newer")
            await cluster.db.set("a", "extra", 1)
            with pytest.raises(AlreadyExists, match="'a' exists: drop it, or say that it is to be replaced"):
                await cluster.db.restore(file)
            assert await cluster.db.get("a", "k0") == "newer"
            await cluster.db.restore(file, replace=True, containers=["a"])
            assert await stored(cluster, "a") == before["a"]
            with pytest.raises(NotFound, match="holds no container 'b'; it holds a, empty, tree"):
                await cluster.db.restore(file, containers=["b"])
            assert list(await cluster.db.containers()) == ["a", "empty", "tree"]

        cluster.run(bring_back())


@pytest.mark.parametrize("replace", [False, True])
def test_an_interrupted_restore_is_invisible_and_is_repeated(tmp_path: Path, replace: bool) -> None:
    file = tmp_path / "all.backup"
    with gs.simulate(3, seed=5, db={"shards": 4}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            for number in range(200):
                await cluster.db.set("a", f"k{number}", number)
            await cluster.db.backup(file)
            if replace:
                await cluster.db.set("a", "k0", "newer")
            else:
                await cluster.db.drop_container("a")
            before = await stored(cluster, "a") if replace else None

            steps, done = 0, False
            connection = cluster._connection
            assert connection is not None
            real = connection.call
            while not done:  # a restore that ends before, or behind but unheard, its n-th call that changes something
                for heard in (False, True):
                    calls = 0

                    async def cut(*args: Any, at: int = steps, heard: bool = heard, **named: Any) -> Any:
                        nonlocal calls
                        if args[1] not in ("stage_container", "commit", "put_in_place"):
                            return await real(*args, **named)
                        calls += 1
                        if calls - 1 == at and not heard:
                            raise KeyboardInterrupt
                        reply = await real(*args, **named)
                        if calls - 1 == at:
                            raise KeyboardInterrupt
                        return reply

                    connection.call = cut  # type: ignore[method-assign]
                    try:
                        await backup.restore(connection, file, replace=replace)
                        done = True
                    except KeyboardInterrupt:
                        pass
                    finally:
                        connection.call = real  # type: ignore[method-assign]
                    there = await cluster.db.containers()
                    if "a" in there and (await cluster.db.get("a", "k0")) == 0:
                        break  # all of it is there
                    if replace:
                        assert await stored(cluster, "a") == before
                    else:
                        assert "a" not in there
                if "a" in there and (await cluster.db.get("a", "k0")) == 0:
                    assert await stored(cluster, "a") == {f"k{number}": number for number in range(200)}
                    break
                steps += 1
            assert steps >= 2
            await cluster.db.restore(file, replace=True)
            assert await stored(cluster, "a") == {f"k{number}": number for number in range(200)}
            assert list(await cluster.db.containers()) == ["a"]

        cluster.run(scenario())


def test_two_backups_at_a_time_and_writers_that_go_on_when_a_client_dies(tmp_path: Path) -> None:
    with gs.simulate(3, seed=6, db={"shards": 4}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.db.set("a", "k", 1)
            await asyncio.gather(*(cluster.db.backup(tmp_path / str(number)) for number in range(2)))
            connection = cluster._connection
            assert connection is not None
            # A client that takes a cut and is never seen again: the gates are open, and its pins go.
            await connection.call("db", "backup_begin")
            await cluster.db.set("a", "k", 2)
            await cluster.db.backup(tmp_path / "later")
            assert contents(tmp_path / "later") == {"a": {"k": 2}}
            # A cut whose taker dies while the gates are closed: writers wait, and go on.
            for shard in range(4):
                primary = (await cluster.db.shards())[shard]["primary"]
                await connection.call_node(primary, "db", "shard", shard, "hold", ["of a dead one"])
            assert await cluster.db.set("a", "k", 3) > 0
            await cluster.db.backup(tmp_path / "last")
            assert contents(tmp_path / "last") == {"a": {"k": 3}}

        cluster.run(scenario())


def test_a_pin_is_not_confirmed_when_a_transaction_was_prepared_or_executed_since() -> None:
    with gs.simulate(3, seed=8, db={"shards": 2}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            connection = cluster._connection
            assert connection is not None

            async def ask(shard: int, function: str, *args: Any) -> Any:
                primary = (await cluster.db.shards())[shard]["primary"]
                return (await connection.call_node(primary, "db", "shard", shard, function, list(args))).value

            for shard in range(2):
                await ask(shard, "pin", "one")
                assert await ask(shard, "confirm", "one") is True
                assert await ask(shard, "confirm", "another") is False
            # Its coordinator, shard 0, knows nothing of it: it will be aborted.
            writes = [["set", "a@x", "k", [], b"\x01"]]
            assert (await ask(1, "prepare", "0.1.1", 0, [], writes))[0] == "ok"
            assert await ask(1, "confirm", "one") is False
            assert (await ask(1, "decide", "0.1.1", False))[0] == "decided"
            assert await ask(1, "confirm", "one") is True
            for value in (b"\x01", b"\x02"):  # made, and replaced
                await ask(1, "commit", None, [], [["set", "a@x", "k", [], value]])
                assert await ask(1, "confirm", "one") is False
                await ask(1, "pin", "one")
                assert await ask(1, "confirm", "one") is True
            await ask(1, "commit", None, [], [["delete", "a@x", "k", [], b"\xc0"]])
            assert await ask(1, "confirm", "one") is False

        cluster.run(scenario())


def test_what_cannot_be_backed_up_is_said(tmp_path: Path) -> None:
    with gs.simulate(1, seed=7, db={"shards": 2}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            with pytest.raises(NotFound, match="there is no container 'b'; there are a"):
                await cluster.db.backup(tmp_path / "x", containers=["b"])
            with pytest.raises(BadRequest, match="files are in no backup"):
                await cluster.db.backup(tmp_path / "x", containers=["fs"])
            with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
                await cluster.db.backup(tmp_path / "nowhere" / "x")
            with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
                await cluster.db.restore(tmp_path / "x")
            (tmp_path / "y").write_bytes(b"something else entirely")
            with pytest.raises(Corrupt, match="does not begin like one"):
                await cluster.db.restore(tmp_path / "y")

        cluster.run(scenario())
    assert list(tmp_path.iterdir()) == [tmp_path / "y"]


def test_a_backup_over_a_slow_link_keeps_the_cut_at_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the shards of one node takes much longer than another one keeps a pin that nobody asks for."""
    monkeypatch.setattr(pins, "PAGE_SIZE_BYTES_MAX", 256)  # so that few objects are many pages
    with gs.simulate(3, seed=9, db={"shards": 4}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            for number in range(60):
                await cluster.db.set("a", f"k{number}", b"x" * 200)
            await cluster.wait_settled()
            assert len({shard["primary"] for shard in await cluster.db.shards()}) > 1
            connection = connection_of(cluster)
            real, asked = connection.call_node, 0
            begun: list[str] = []

            async def slow(node: str, service: str, function: str, *args: Any, **named: Any) -> Any:
                nonlocal asked
                asked += 1
                if function == "backup_rows":
                    begun.append(args[0])
                    if args[2]:  # the link carries 512 KiB in so long; a page of no container goes at once
                        await asyncio.sleep(8.0)
                return await real(node, service, function, *args, **named)

            monkeypatch.setattr(connection, "call_node", slow)
            loop = asyncio.get_running_loop()
            started_s = loop.time()
            await cluster.db.backup(tmp_path / "slow")
            assert loop.time() - started_s > 4 * pins.IDLE_S
            assert len(dict.fromkeys(begun)) == 1  # the first cut was the last
            assert len(contents(tmp_path / "slow")["a"]) == 60
            before = asked
            await asyncio.sleep(10 * backup.RENEW_S)
            assert asked == before

        cluster.run(scenario())


def test_a_cut_whose_client_is_gone_is_dropped_in_time() -> None:
    with gs.simulate(1, seed=10, db={"shards": 2}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            connection = connection_of(cluster)
            cut, where = (await connection.call("db", "backup_begin")).value

            async def ask(shard: int) -> Any:
                return (await connection.call_node(where[shard][0], "db", "backup_rows", cut, shard, "", 0)).value

            for _ in range(4):
                await asyncio.sleep(pins.IDLE_S - 1.0)
                assert await ask(0) == [[], None]  # asking for one of its shards renews all that the node keeps
            assert await ask(1) == [[], None]
            await asyncio.sleep(pins.IDLE_S + 1.0)
            for shard in range(2):
                with pytest.raises(NotFound, match="is not kept here for the backup"):
                    await ask(shard)

        cluster.run(scenario())


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("directory", ConfigError, "is a directory; give the path of a file"),
        (".", ConfigError, "is a directory; give the path of a file"),
        ("..", ConfigError, "is a directory; give the path of a file"),
        ("", BadRequest, "path = '': give the path of a file"),
        ("a\0b", BadRequest, r"path = 'a\\x00b': give the path of a file"),
        ("\ud800", BadRequest, r"path = '\\ud800': give the path of a file"),
        ("n" * 300, ConfigError, "cannot be written: File name too long"),
    ],
)
def test_a_path_of_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, error: type[GoStoreError], match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    with gs.simulate(1, seed=7, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            with pytest.raises(error, match=match) as refused:
                await cluster.db.backup(path)
            assert refused.value.definite
            with pytest.raises(error, match=match if error is BadRequest else "cannot be read"):
                await cluster.db.restore(path)

        cluster.run(scenario())
    assert os.listdir() == ["directory"]


def test_a_disk_that_is_full_or_broken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gs.simulate(1, seed=7, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.db.backup(tmp_path / "x")
            before = (tmp_path / "x").read_bytes()

            def full(path: Any, mode: str) -> Any:
                if mode == "rb":
                    return builtins.open(path, mode)
                os.symlink("/dev/full", path)
                return builtins.open(path, "wb")

            monkeypatch.setattr(backup, "open", full, raising=False)
            with pytest.raises(ConfigError, match="x: cannot be written: No space left on device"):
                await cluster.db.backup(tmp_path / "x")
            assert os.listdir(tmp_path) == ["x"]
            assert (tmp_path / "x").read_bytes() == before

            class Broken(io.BytesIO):
                def read(self, size: int | None = -1, /) -> bytes:
                    if self.tell() > 0:
                        raise OSError(5, "Input/output error")
                    return super().read(size)

            monkeypatch.setattr(backup, "open", lambda path, mode: Broken(before), raising=False)
            with pytest.raises(ConfigError, match="x: cannot be read: Input/output error"):
                await cluster.db.restore(tmp_path / "x")

        cluster.run(scenario())


def test_no_containers_are_none(tmp_path: Path) -> None:
    with gs.simulate(1, seed=7, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.db.set("a", "k", 1)
            assert (await cluster.db.backup(tmp_path / "none", containers=[]))["containers"] == 0
            assert contents(tmp_path / "none") == {}
            assert (await cluster.db.restore(tmp_path / "none"))["containers"] == 0
            assert (await cluster.db.backup(tmp_path / "all"))["containers"] == 1
            assert (await cluster.db.restore(tmp_path / "all", containers=[]))["containers"] == 0

        cluster.run(scenario())


def test_two_backups_into_one_file_do_not_mix(tmp_path: Path) -> None:
    with gs.simulate(3, seed=6, db={"shards": 4}) as cluster:

        async def scenario() -> None:
            for name in ("a", "b"):
                await cluster.db.create_container(name)
                for number in range(50):
                    await cluster.db.set(name, f"{name}{number}", number)
            figures = await asyncio.gather(
                *(cluster.db.backup(tmp_path / "x", containers=[name]) for name in ("a", "b"))
            )
            assert [one["objects"] for one in figures] == [50, 50]
            (name, found), *more = contents(tmp_path / "x").items()
            assert not more
            assert found == {f"{name}{number}": number for number in range(50)}
            assert os.listdir(tmp_path) == ["x"]

        cluster.run(scenario())


def test_a_draft_is_never_that_of_another_backup(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with backup._create_draft(target, random.Random(1)) as one, backup._create_draft(target, random.Random(1)) as other:
        assert one.name != other.name
    for _ in range(backup.DRAFTS_MAX - 2):
        backup._create_draft(target, random.Random(1)).close()
    with pytest.raises(ConfigError, match=r"delete the files x\.\*\.part of backups that were killed"):
        backup._create_draft(target, random.Random(1))


@pytest.mark.parametrize("how", ["conflict", "unheard", "undone"])
def test_putting_in_place_goes_on_after_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """``unheard``: an attempt before had its effect, and nobody heard of it; ``undone``: neither."""
    with gs.simulate(3, seed=5, db={"shards": 4}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.db.set("a", "k", 1)
            await cluster.db.backup(tmp_path / "x")
            await cluster.db.drop_container("a")
            connection = connection_of(cluster)
            real, calls = connection.call, 0

            async def call(*args: Any, **named: Any) -> Any:
                nonlocal calls
                if args[1] != "put_in_place":
                    return await real(*args, **named)
                calls += 1
                if calls == 1 and how != "conflict":
                    if how == "unheard":
                        await real(*args, **named)
                    raise Timeout("no answer")
                if calls <= 3:
                    raise Conflict("somebody else reads it")
                return await real(*args, **named)

            monkeypatch.setattr(connection, "call", call)
            await cluster.db.restore(tmp_path / "x")
            assert calls == 4
            assert await stored(cluster, "a") == {"k": 1}
            assert list(await cluster.db.containers()) == ["a"]

        cluster.run(scenario())


@pytest.mark.parametrize(
    ("answers", "definite", "calls"),
    [
        ([Conflict("busy")], True, backup.ATTEMPTS_MAX),
        ([Timeout("no answer"), Conflict("busy")], False, backup.ATTEMPTS_MAX),
        ([AlreadyExists("it is there")], True, 1),
        ([Timeout("no answer"), AlreadyExists("it is there")], False, 2),
        ([Conflict("half of it", definite=False), NotFound("not staged")], False, 2),
    ],
)
def test_a_failure_to_put_in_place_is_definite_only_if_none_may_have_had_its_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[GoStoreError], definite: bool, calls: int
) -> None:
    with gs.simulate(1, seed=5, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")
            await cluster.db.backup(tmp_path / "x")
            await cluster.db.drop_container("a")
            connection = connection_of(cluster)
            real, made = connection.endpoint.call, 0

            async def call(*args: Any, **named: Any) -> Any:
                nonlocal made
                if args[2] != "put_in_place":
                    return await real(*args, **named)
                made += 1
                raise answers[min(made, len(answers)) - 1]

            monkeypatch.setattr(connection.endpoint, "call", call)
            with pytest.raises(GoStoreError, match=answers[-1].message) as failed:
                await cluster.db.restore(tmp_path / "x")
            assert (failed.value.definite, made) == (definite, calls)

        cluster.run(scenario())


def test_a_later_transaction_that_fails_does_not_deny_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "NAMED_TOGETHER_MAX", 1)
    with gs.simulate(1, seed=5, db={"shards": 1}) as cluster:

        async def scenario() -> None:
            for name in ("a", "b"):
                await cluster.db.create_container(name)
            await cluster.db.backup(tmp_path / "x")
            for name in ("a", "b"):
                await cluster.db.drop_container(name)
            connection = connection_of(cluster)
            real = connection.call

            async def call(*args: Any, **named: Any) -> Any:
                if args[1] == "put_in_place" and "b" in args[2].values():
                    raise AlreadyExists("the container 'b' exists")
                return await real(*args, **named)

            monkeypatch.setattr(connection, "call", call)
            with pytest.raises(Timeout, match="'b' exists .*look which are there"):
                await cluster.db.restore(tmp_path / "x")
            assert "a" in await cluster.db.containers()

        cluster.run(scenario())


def test_the_names_agree_with_those_of_the_nodes() -> None:
    assert 3 * backup.RENEW_S == pins.IDLE_S
    assert (directory.ENTRIES, directory.INTENTS) == backup.FILES
    assert database.SYSTEM == backup.CONTAINERS


def small_file() -> bytes:
    file = io.BytesIO()
    writer = Writer(file, {"id": "0123456789abcdef", "containers": [["a", None]]})
    writer.rows(0, [["k", b"\x01"], ["l", b"\x02"]])
    writer.rows(0, [["m", b"\x03"]])
    writer.finish()
    return file.getvalue()


def read(data: bytes) -> list[tuple[int, list[list[Any]]]]:
    return list(Reader(io.BytesIO(data), "x").rows())


@given(st.data())
@settings(max_examples=200)
def test_a_file_that_is_cut_off_or_damaged_anywhere_is_no_backup(data: st.DataObject) -> None:
    whole = small_file()
    assert read(whole) == [(0, [["k", b"\x01"], ["l", b"\x02"]]), (0, [["m", b"\x03"]])]
    place = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(Corrupt):
        read(whole[:place])
    flipped = bytearray(whole)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((Corrupt, NotSupported)):
        read(bytes(flipped))
    with pytest.raises(Corrupt, match="something follows its end"):
        read(whole + b"x")


def test_a_record_that_is_missing_or_doubled_is_noticed() -> None:
    whole = small_file()
    places, place = [], backup_file._HEAD.size
    while place < len(whole):
        size = struct.unpack_from("<I", whole, place)[0] + backup_file._FRONT.size
        places.append((place, place + size))
        place += size
    begin, end = places[2]
    for wrong in (whole[:begin] + whole[end:], whole[:end] + whole[begin:]):
        with pytest.raises(Corrupt, match="its end does not match"):
            read(wrong)


def test_another_version_is_refused_by_name() -> None:
    for version, age in ((0, "an older"), (2, "a newer")):
        data = small_file()
        with pytest.raises(NotSupported, match=f"format version {version}, {age} one; this release reads version 1"):
            read(data[:8] + struct.pack("<H", version) + data[10:])

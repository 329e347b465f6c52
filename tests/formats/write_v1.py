"""Writes the files of format version 1 into ``tests/formats/v1``: run once, by the first release.

The files are kept as that release wrote them, and ``test_formats.py`` reads them with today's code. A later version of
a format gets files of its own beside them, written by a script like this one; these stay. So it refuses to overwrite.

    python tests/formats/write_v1.py
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import gostore as gs
from gostore import fence
from gostore.client.backup_file import Writer
from gostore.cluster import RingSpec, View
from gostore.cluster.members import Member, NodeState
from gostore.comm.wire import CAST, REQUEST, Codec, Frame, Identity, length_prefix, pack
from gostore.config import StorageConfig
from gostore.consensus.configuration import Configuration
from gostore.consensus.journal import Journal
from gostore.consensus.messages import COMMAND, CONFIGURATION, NOOP, Entry, Point
from gostore.consensus.pieces import fragments
from gostore.consensus.ready import HardState
from gostore.core.address import Address
from gostore.env import Env, real_env
from gostore.services.cls.history import History
from gostore.services.cls.machine import pack as pack_event
from gostore.services.cls.masters import NodeEvent, apply
from gostore.services.db.machine import ShardMachine, pack_command
from gostore.storage import Wal

V1 = Path(__file__).parent / "v1"

# What the files hold; the tests compare with it.

STORAGE = StorageConfig(segment_size_bytes_max=4096)
RAW, FOUNDED, COMPACTED, INSTALLED, MASTERS = 7, 8, 9, 10, 11
"""Groups of the log."""
VOTERS = Configuration(("n1", "n2", "n3"))
CHANGED = Configuration(("n1", "n2", "n4"), ("n5",), ("n1", "n2", "n3"))
PIECES = [b"one piece", b"", b"x" * 1000, "Stück".encode()]
SECRET = "the secret of version 1"
NODE_SECRET = "0123456789abcdef0123456789abcdef"
FENCE = fence.Fence("0123456789abcdef", ("masters", "shard 3"), ("n4", "n5"))
BACKUP = {"plain": {"k": {"n": [1, 2.5, None, True, b"\0\xff"]}, "ключ": "значение"}, "tree": {"a/b": 1}, "empty": {}}
LARGE = random.Random(1).randbytes(10_000)


def raw_entries() -> list[tuple[int, int, int, bytes]]:
    """(term, index, kind, payload) of the group RAW that are left."""
    return [(1 + index // 20, index, index % 3, bytes([index]) * index) for index in range(10, 60)]


def entries(first: int, last: int, term: int) -> list[Entry]:
    return [Entry(term, index, COMMAND, f"entry {index}".encode()) for index in range(first, last + 1)]


def member(name: str, state: NodeState, incarnation: int = 1) -> Member:
    return Member(
        name=name, address=Address("10.0.0.1", 7001, 7002), rest_port=8080, state=state, incarnation=incarnation,
        rings=("global", "masters"), weight=1.5, joined=1, disk="00112233445566ff",
    )  # fmt: skip


def view_and_events() -> tuple[View, list[NodeEvent]]:
    """A view of epoch 0, and the events that follow."""
    view = View("gostore", 0, {}, {})
    rings = {"global": RingSpec(3, 32), "masters": RingSpec(5, 32)}
    first = NodeEvent(1, view.digest, 1, "n1", (member("n1", NodeState.JOINING),), rings=rings)
    online = (member("n1", NodeState.ONLINE), member("n2", NodeState.JOINING), member("n2", NodeState.ONLINE))
    second = NodeEvent(2, first.digest, 1, "n1", online, founders=(("n1", "n2"), ("n2", "n1")))
    third = NodeEvent(3, second.digest, 4, "n2", (member("n1", NodeState.OFFLINE),))
    return view, [first, second, third]


def shard_commands() -> list[list[Any]]:
    """Of shard 2: objects, a session, a conflict, a dropped container, a transaction in doubt and one to coordinate."""
    one = ["set", "c@n1.1.1", "k", [], b"\xa5value"]
    five = ["add", "c@n1.1.1", "n", [], b"\x05"]
    return [
        ["commit", ["me", 1, False], [], [one, ["set", "c@n1.1.1", "gone", [], b"\x01"]]],
        ["commit", ["me", 2, False], [["p", "c@n1.1.1", "k", 7]], [one]],
        ["commit", ["me", 3, False], [], [["delete", "c@n1.1.1", "gone", [], b"\xc0"], five]],
        ["commit", None, [], [["set", "d@n1.1.2", "k", [], b"\x01"]]],
        ["drop", "d@n1.1.2"],
        ["prepare", "5.1.9", 5, [["r", "c@n1.1.1", "x", "y", 2, 0, 0]], [["set", "c@n1.1.1", "p", [], b"\x09"]]],
        ["begin", ["me", 4, False], [], [["set", "c@n1.1.1", "q", [], b"\x0a"]], [3, 4], 6],
    ]  # fmt: skip


def shard_machine() -> ShardMachine:
    machine = ShardMachine(2, 1 << 20)
    for index, command in enumerate(shard_commands(), 1):
        machine.apply(command, index)
    return machine


def frames() -> list[Frame]:
    return [
        Frame(
            REQUEST, 77, b"db.get", pack(["things", "k", [1, 2.5, None]]), b"raw data", hops=1, acknowledged=70,
            epoch=5, stamp=1 << 40, cause=123, remaining_ms=2500,
        ),
        Frame(CAST, 0, b"raft.messages", pack([[1, ["a"]]])),
    ]  # fmt: skip


# Writing.


async def write_log(env: Env) -> None:
    """A log of several segments, with a journal of each kind in it."""
    wal = await Wal.open(env, STORAGE)
    for term, index, kind, payload in [
        (1, 8, 0, b"dropped"),
        (1, 9, 0, b"dropped"),
        *raw_entries(),
        (9, 60, 0, b"void"),
    ]:
        wal.append(RAW, term, index, payload, kind)
        await wal.sync()
    wal.truncate_suffix(RAW, 60)
    wal.truncate_prefix(RAW, 10)
    founded = Journal(wal, FOUNDED)
    founded.found(VOTERS)
    founded.write_hard(HardState(2, "n2", 0))
    for entry in [Entry(2, 1, NOOP, b""), *entries(2, 5, 2)]:
        founded.append(entry)
    founded.truncate(5)
    founded.append(Entry(3, 5, CONFIGURATION, CHANGED.pack()))
    founded.write_hard(HardState(3, None, 4))
    compacted = Journal(wal, COMPACTED)
    compacted.found(VOTERS)
    for entry in entries(1, 20, 1):
        compacted.append(entry)
    compacted.write_hard(HardState(1, "n1", 18))
    compacted.begin_compaction(Point(15, 1), VOTERS, tail_max=4)
    for fragment in fragments(PIECES):
        compacted.add_piece(fragment)
    compacted.append(Entry(1, 21, COMMAND, b"entry 21"))
    position = compacted.end_compaction()
    await wal.sync()
    compacted.drop(position)
    installed = Journal(wal, INSTALLED)
    installed.found(Configuration())
    installed.write_hard(HardState(5, "n1", 0))
    installed.begin_installation(Point(100, 5), CHANGED)
    for fragment in fragments(PIECES):
        installed.add_part(fragment)
    installed.end_installation()
    installed.append(Entry(5, 101, COMMAND, b"entry 101"))
    installed.clear(HardState(6, None, 0), Point(101, 5))
    installed.begin_installation(Point(200, 6), VOTERS)
    for fragment in fragments(PIECES):
        installed.add_part(fragment)
    installed.end_installation()
    view, events = view_and_events()
    masters = Journal(wal, MASTERS)
    masters.found(Configuration(("n1",)))
    history = History(wal)
    for index, event in enumerate(events, 1):
        masters.append(Entry(event.term, index, COMMAND, pack_event(event)))
        view = apply(view, event)
        history.append_event(event, view)
    await wal.close()


async def write_node(path: Path) -> None:
    """The directory of a cluster of one node, as `gostore up` leaves it."""
    cluster = gs.launch(
        1, path=path, secret=NODE_SECRET, db={"shards": 2, "snapshot_entries": 16}, rest={"port": -1},
        fs={"chunk_size_bytes": 4096}, storage={"segment_size_bytes_max": 16 * 1024},
    )  # fmt: skip
    async with cluster:
        await cluster.db.create_container("plain")
        await cluster.db.create_container("tree", separator="/")
        for number in range(60):
            await cluster.db.set("plain", f"k{number}", {"n": number})
            await cluster.db.set("tree", f"{number % 3}/{number}", number)
        await cluster.db.delete("plain", "k7")
        await cluster.fs.write("/small.txt", b"small")
        await cluster.fs.write("/folder/large.bin", LARGE)


def in_env(path: Path, work: Callable[[Env], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        env = real_env("n1", path, seed=1)
        try:
            return await work(env)
        finally:
            await env.tasks.stop()
            env.disk.close()

    return asyncio.run(main())


def packet() -> bytes:
    identity = Identity("n1", 1001, Address("127.0.0.1", 7001, 7002))
    parts: list[bytes | memoryview] = []
    for frame in frames():
        parts += [frame.encode(), frame.data]
    sealed = b"".join(Codec("gostore", SECRET).seal(identity, b"n2", 2001, 3, 42, parts))
    return length_prefix(len(sealed)) + sealed


def main() -> None:
    if V1.exists():
        sys.exit(f"{V1} is there, as the first release wrote it: it stays as it is")
    V1.mkdir()
    in_env(V1 / "log", write_log)
    machine = shard_machine()
    (V1 / "shard.snapshot").write_bytes(b"".join(machine.snapshot()))
    (V1 / "shard.commands").write_bytes(
        b"".join(len(p).to_bytes(4, "little") + p for p in map(pack_command, shard_commands()))
    )
    (V1 / "packet").write_bytes(packet())
    in_env(V1 / "recovered", lambda env: fence.write(env, FENCE))
    with open(V1 / "backup", "wb") as file:
        separators = {"plain": None, "tree": "/", "empty": None}
        containers = [[name, separators[name]] for name in BACKUP]
        facts = {"id": "0123456789abcdef", "cluster": "gostore", "time_ms": 1, "indices": [], "containers": containers}
        writer = Writer(file, facts)
        for number, name in enumerate(BACKUP):
            for key, value in BACKUP[name].items():
                writer.rows(number, [[key, pack(value)]])
        writer.finish()
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(write_node(Path(temporary) / "cluster"))
        shutil.copytree(Path(temporary) / "cluster", V1 / "cluster")
    record = json.loads((V1 / "cluster" / "cluster.json").read_text())
    for facts in record["nodes"].values():
        facts["ports"] = {}  # whatever is free where it is read
    (V1 / "cluster" / "cluster.json").write_text(json.dumps(record, indent=1) + "\n")
    for name in ("lock", "zygote.log", "n1/lock", "n1/node.log"):
        (V1 / "cluster" / name).unlink(missing_ok=True)
    for name in ("log/lock", "recovered/lock"):
        (V1 / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()

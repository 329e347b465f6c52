"""What the first version wrote is read, and what a later one writes is refused by name, with what to do.

The files in ``v1`` were written by ``write_v1.py``, which also says what is in them.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import msgpack
import pytest
from write_v1 import (
    BACKUP,
    CHANGED,
    COMPACTED,
    FENCE,
    FOUNDED,
    INSTALLED,
    LARGE,
    MASTERS,
    NODE_SECRET,
    PIECES,
    RAW,
    SECRET,
    STORAGE,
    V1,
    VOTERS,
    entries,
    frames,
    in_env,
    packet,
    raw_entries,
    shard_commands,
    shard_machine,
    view_and_events,
)

import gostore as gs
from gostore import fence
from gostore.client.backup_file import Reader
from gostore.client.record import read_record
from gostore.cluster import RingCache, View
from gostore.comm.endpoint import Endpoint
from gostore.comm.wire import Codec, ProtocolError, StreamDecoder
from gostore.config import CommConfig
from gostore.consensus.journal import Journal
from gostore.consensus.messages import CONFIGURATION, NOOP, ORIGIN, Entry, Point
from gostore.consensus.ready import HardState
from gostore.core.errors import ConfigError, GoStoreError, NotSupported
from gostore.core.values import unpack
from gostore.env import Env
from gostore.services.cls import history, machine, masters
from gostore.services.db import journal as lesson
from gostore.services.db.machine import Restorer, ShardMachine, unpack_command
from gostore.storage import Wal


def on_log(path: Path, work: Callable[[Wal], Any]) -> Any:
    """On a copy of the log of version 1."""
    if not (path / "log").exists():
        shutil.copytree(V1 / "log", path / "log")

    async def opened(env: Env) -> Any:
        wal = await Wal.open(env, STORAGE)
        try:
            return work(wal)
        finally:
            await wal.close()

    return in_env(path / "log", opened)


def test_the_log(tmp_path: Path) -> None:
    def look(wal: Wal) -> None:
        found = [(record.term, record.index, record.kind, record.payload) for record in wal.records(RAW)]
        assert found == raw_entries()
        assert wal.statistics()["segments"] > 1

    on_log(tmp_path, look)
    on_log(tmp_path, look)  # and as today's code has left it


def test_the_records_of_consensus(tmp_path: Path) -> None:
    def look(wal: Wal) -> None:
        journal = Journal(wal, FOUNDED)
        restored = journal.restored()
        assert (restored.hard_state, restored.start) == (HardState(3, None, 4), ORIGIN)
        assert restored.configuration == VOTERS
        changed = Entry(3, 5, CONFIGURATION, CHANGED.pack())
        assert list(journal.standing()) == [Entry(2, 1, NOOP, b""), *entries(2, 4, 2), changed]

        journal = Journal(wal, COMPACTED)
        restored = journal.restored()
        assert (restored.hard_state, restored.start) == (HardState(1, "n1", 18), Point(15, 1))
        assert list(journal.standing()) == entries(16, 21, 1)
        assert list(journal.entries(12, 15)) == entries(12, 15, 1)  # the tail in front of the snapshot
        assert journal.take_state() == PIECES

        journal = Journal(wal, INSTALLED)
        restored = journal.restored()
        assert (restored.hard_state, restored.start) == (HardState(6, None, 0), Point(200, 6))
        assert (restored.configuration, journal.tomb) == (VOTERS, Point(101, 5))
        assert list(journal.standing()) == []
        assert journal.take_state() == PIECES

    on_log(tmp_path, look)


def test_the_history_of_the_cluster(tmp_path: Path) -> None:
    view, events = view_and_events()
    for event in events:
        view = masters.apply(view, event)

    def look(wal: Wal) -> None:
        assert history.History(wal).load(RingCache()) == view
        found = [machine.unpack(entry.payload) for entry in Journal(wal, MASTERS).standing()]
        assert found == events

    on_log(tmp_path, look)


def test_the_commands_and_the_snapshot_of_a_shard() -> None:
    data, place = (V1 / "shard.commands").read_bytes(), 0
    commands = []
    while place < len(data):
        end = place + 4 + int.from_bytes(data[place : place + 4], "little")
        commands.append(unpack_command(data[place + 4 : end]))
        place = end
    assert commands == shard_commands()
    restorer = Restorer(2, 1 << 20)
    restorer.add((V1 / "shard.snapshot").read_bytes())
    restored, replayed = restorer.finish(), shard_machine()
    assert restored.digest() == replayed.digest()
    assert restored.store.rows("c@n1.1.1") == [("k", 1, b"\xa5value"), ("n", 3, b"\x05")]
    assert restored.outcome_of("me", 1) == ["ok", 1]
    assert restored.is_dropped("d@n1.1.2")
    assert list(restored.prepared) == ["5.1.9", "2.6.7"]
    assert restored.coordinated["2.6.7"].shards == [3, 4]
    for one in (restored, replayed):
        one.apply(["decide", "2.6.7", True], 8)
        one.apply(["decide", "5.1.9", False], 9)
    assert restored.digest() == replayed.digest()


def test_a_packet() -> None:
    data = (V1 / "packet").read_bytes()
    assert data == packet()  # what is sent today is understood by version 1
    decoder = StreamDecoder(1 << 16)
    decoder.feed(data)
    sealed = decoder.next()
    assert sealed is not None
    found = Codec("gostore", SECRET).open(sealed)
    assert (found.receiver, found.incarnation, found.session, found.counter) == (b"n2", 2001, 3, 42)
    assert (found.sender.name, found.sender.incarnation, found.sender.address.udp_port) == ("n1", 1001, 7002)
    names = [name for name in type(frames()[0]).__slots__ if name not in ("data", "parent")]
    for got, sent in zip(found.frames, frames(), strict=True):
        assert {name: getattr(got, name) for name in names} == {name: getattr(sent, name) for name in names}
        assert bytes(got.data) == bytes(sent.data)


def test_a_backup_and_the_mark_of_a_recovery() -> None:
    with open(V1 / "backup", "rb") as file:
        reader = Reader(file, "backup")
        containers = reader.facts["containers"]
        found: dict[str, Any] = {name: {} for name, _ in containers}
        for number, rows in reader.rows():
            found[containers[number][0]].update({key: unpack(packed) for key, packed in rows})
    assert found == BACKUP
    assert containers == [["plain", None], ["tree", "/"], ["empty", None]]

    class Disk:
        def exists(self, name: str) -> bool:
            return (V1 / "recovered" / name).exists()

        def read_bytes(self, name: str) -> bytes:
            return (V1 / "recovered" / name).read_bytes()

    assert fence.read(Disk()) == FENCE  # type: ignore[arg-type]


@pytest.mark.processes
def test_a_whole_cluster_starts_from_what_version_1_left(tmp_path: Path) -> None:
    shutil.copytree(V1 / "cluster", tmp_path / "cluster")
    assert (read_record(tmp_path / "cluster") or {})["secret"] == NODE_SECRET
    for _ in range(2):  # and once more from what today's code has left
        with gs.launch(path=tmp_path / "cluster") as cluster:
            plain = dict(cluster.db.scan_sync("plain"))
            tree = dict(cluster.db.scan_sync("tree"))
            assert plain == {f"k{number}": {"n": number} for number in range(60) if number != 7}
            assert tree == {f"{number % 3}/{number}": number for number in range(60)}
            assert cluster.db.containers_sync()["tree"]["separator"] == "/"
            assert cluster.fs.read_sync("/small.txt") == b"small"
            assert cluster.fs.read_sync("/folder/large.bin") == LARGE
            cluster.db.set_sync("plain", "k0", {"n": 0})


# What a later version writes.


def refused(work: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(GoStoreError) as found:
        work()
    assert isinstance(found.value, (NotSupported, ConfigError))
    for part in parts:
        assert part in found.value.message


def test_a_later_log_is_refused(tmp_path: Path) -> None:
    shutil.copytree(V1 / "log", tmp_path / "log")
    last = max((tmp_path / "log" / "wal").iterdir())
    head = bytearray(last.read_bytes())
    struct.pack_into("<H", head, 4, 2)
    struct.pack_into("<I", head, 24, crc32(head[:24]))
    last.write_bytes(head)
    before = {path: path.read_bytes() for path in (tmp_path / "log" / "wal").iterdir()}
    refused(
        lambda: on_log(tmp_path, lambda wal: None),
        "wal/0000000003.wal: the log has format version 2, a newer one; this release reads version 1",
        "run the release that wrote it",
    )
    assert {path: path.read_bytes() for path in (tmp_path / "log" / "wal").iterdir()} == before


def test_a_later_log_of_a_group_is_refused(tmp_path: Path) -> None:
    def look(wal: Wal) -> None:
        head = msgpack.unpackb(next(iter(wal.records(FOUNDED))).payload)
        wal.append(50, 0, 1, msgpack.packb([2, *head[1:], "more"]), 3)
        refused(
            lambda: Journal(wal, 50),
            "the log of group 50 has format version 2; this release reads version 1: run the release that wrote it",
        )
        wal.append(51, 0, 1, msgpack.packb([0, 0, None, False, "more"]), lesson.BEGIN)
        refused(lambda: lesson.Journal(wal, 51, lambda pieces: None), "run the release that wrote it")  # type: ignore
        wal.append(history.GROUP, 0, wal.last_index(history.GROUP) + 1, b"", 3)
        refused(
            lambda: history.History(wal).load(RingCache()),
            "record 4 of the membership log is of kind 3, which this release does not know: run the release that wrote",
        )

    on_log(tmp_path, look)


def test_a_later_state_is_refused() -> None:
    view, events = view_and_events()
    later = {**masters.apply(view, events[0]).to_wire(), "version": 2}
    words = "a view of the cluster has format version 2; this release reads version 1: run the release that wrote it"
    refused(lambda: View.from_wire(later), words)
    member = machine.Machine(view, lambda event, view: None)
    refused(lambda: member.restore([msgpack.packb(later)]), words)
    wire = [*events[0].to_wire(), "more"]
    refused(lambda: machine.unpack(msgpack.packb(wire)), "has 9 fields; this release reads 8: run the release that")
    piece = msgpack.packb(["header", 2, 2, 7, False])
    refused(
        lambda: Restorer(2, 1 << 20).add(piece),
        "a snapshot of shard 2 has format version 2; this release reads version 1: run the release that wrote it",
    )
    refused(lambda: ShardMachine(2, 1 << 20).apply(["commit2"], 1), "'commit2'", "run the release that wrote it")


def test_a_later_packet_is_dropped_and_told_of_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    later = bytes([2]) + (V1 / "packet").read_bytes()[5:]
    with pytest.raises(ProtocolError, match="version"):
        Codec("gostore", SECRET).open(later)

    async def receive(env: Env) -> None:
        class Nobody:
            def address(self, name: str) -> None:
                return None

        endpoint = Endpoint(
            env, cluster="gostore", secret=SECRET, host="127.0.0.1", incarnation=1, resolver=Nobody(),
            config=CommConfig(),
        )  # fmt: skip
        await endpoint.start()
        for _ in range(2):
            endpoint._receiver.on_packet(later, "127.0.0.1", None)
        assert endpoint.statistics()["dropped_version"] == 2
        await endpoint.stop()

    in_env(tmp_path / "node", receive)
    told = [record.getMessage() for record in caplog.records if "wire format" in record.getMessage()]
    assert told == [
        "a packet from 127.0.0.1 has wire format 2, and this release speaks 1: it is dropped, as all such will be; run "
        "the same release on all nodes and clients"
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("incarnation", b"v2 5001 00ff\n", "incarnation has format v2, a newer one: run the release that wrote it"),
        ("recovered", b'{"version": 2}', "recovered has format version 2; this release reads version 1"),
    ],
)
def test_a_later_small_file_is_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / name).write_bytes(content)

    async def start(env: Env) -> None:
        await fence.pass_fence(env, SECRET)
        await history.next_incarnation(env)

    job: Callable[[Env], Awaitable[None]] = start
    refused(lambda: in_env(tmp_path / "node", job), words)
    assert (tmp_path / "node" / name).read_bytes() == content


def test_a_later_record_of_a_cluster_is_refused(tmp_path: Path) -> None:
    text = (V1 / "cluster" / "cluster.json").read_text()
    (tmp_path / "cluster.json").write_text(text.replace('"version": 1', '"version": 2'))
    refused(lambda: read_record(tmp_path), "has version 2; this program reads version 1")


def test_the_files_of_version_1_are_not_written_again() -> None:
    """Whoever changes a format adds files of the new version, and keeps these."""
    import write_v1

    with pytest.raises(SystemExit, match="it stays as it is"):
        write_v1.main()

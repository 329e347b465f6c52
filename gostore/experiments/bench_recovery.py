"""How long a replica with a long log and no snapshot takes from its start until it serves."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import uvloop

from gostore.comm import Endpoint
from gostore.config import KIB, CommConfig, StorageConfig
from gostore.consensus import PROFILES
from gostore.consensus.configuration import Configuration
from gostore.consensus.groups import Compaction, Groups
from gostore.consensus.journal import Journal
from gostore.consensus.messages import COMMAND, Entry
from gostore.consensus.ready import HardState
from gostore.core.address import Address
from gostore.core.values import pack
from gostore.env import Env, RealClock, RealDisk, real_rng
from gostore.services.db.machine import ShardMachine, pack_command, unpack_command
from gostore.services.db.raft import GROUPS_FROM
from gostore.storage.wal import Wal

KEYS: Final = 1_000
VALUE_SIZE_BYTES: Final = 64


def recovery_s(entries: int) -> float:
    """Seconds for a log of so many transactions that each set one object of 64 bytes; its building is not counted."""
    with tempfile.TemporaryDirectory(prefix="gostore-bench-") as directory:
        uvloop.run(_build_log(Path(directory), entries))
        return uvloop.run(_recover(Path(directory), entries))


async def _build_log(directory: Path, entries: int) -> None:
    """The log of the only voter of a group: so many transactions that each set one object."""
    env = _env(directory)
    wal = await Wal.open(env, StorageConfig())
    journal = Journal(wal, GROUPS_FROM)
    journal.found(Configuration(("n1",)))
    journal.write_hard(HardState(1, "n1", 0))
    for index in range(1, entries + 1):
        writes = [["set", "bench", f"key{index % KEYS}", [], pack(os.urandom(VALUE_SIZE_BYTES), KIB)]]
        command = pack_command(["commit", ["client", index, False], [], writes])
        journal.append([Entry(1, index, COMMAND, command)])
        if index % 10_000 == 0:
            await wal.sync()
    await wal.sync()
    await wal.close()
    await env.tasks.stop()
    env.disk.close()


async def _recover(directory: Path, entries: int) -> float:
    """Seconds from the opening of the log until everything is applied and the replica serves."""
    env, machine = _env(directory), Machine()
    begun = time.perf_counter()
    wal = await Wal.open(env, StorageConfig())
    endpoint = Endpoint(
        env, cluster="bench", secret=secrets.token_hex(16), host="127.0.0.1", incarnation=2, resolver=Nobody(),
        config=CommConfig(),
    )  # fmt: skip
    groups = Groups(env, endpoint, wal, PROFILES["fast"])
    group = groups.open(GROUPS_FROM, "shard 0", machine, Compaction(2 * entries * KIB, 2 * entries))
    await groups.start()
    serves = asyncio.Event()
    group.on_change = lambda: serves.set() if group.serves else None
    group.campaign()
    await serves.wait()
    seconds = time.perf_counter() - begun
    assert machine.shard.applied == entries + 1, machine.shard.applied
    await groups.stop()
    await wal.close()
    await env.tasks.stop()
    env.disk.close()
    return seconds


def _env(directory: Path) -> Env:
    return Env("n1", RealClock(), real_rng(), RealDisk(directory), logging.getLogger("gostore.bench"))


class Nobody:
    """The address book of one alone."""

    def address(self, name: str) -> Address | None:
        return None


class Machine:
    """A shard's state machine without its service."""

    def __init__(self) -> None:
        self.shard = ShardMachine(0, KIB)

    @property
    def size_bytes(self) -> int:
        return self.shard.store.size_bytes

    def apply(self, index: int, payload: bytes) -> Any:
        return self.shard.apply(unpack_command(payload), index)

    def skip(self, index: int) -> None:
        self.shard.skip(index)

    def snapshot(self) -> Iterator[bytes]:
        return self.shard.snapshot()

    def restore(self, pieces: list[bytes]) -> None:
        assert not pieces, "there is no snapshot"

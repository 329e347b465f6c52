"""Scenarios of the write-ahead log on a simulated disk: what survives, what is cut off, and what is refused.

Commands:

``open``              start the machine, and open the log on it: what recovery found. ``segment=BYTES``: how large a
                      segment may get; ``seed=S`` decides what a power cut leaves
``append a b c``      add entries to a group, in memory; ``group=G``, ``times=N``: as often
``write``             the entries are written to the file, and the sync begins but does not end
``sync``              wait until all is on the medium
``drop 5``            the entries below index 5 are not needed any more; ``group=G``
``void 5``            the entries from index 5 on are void; ``group=G``
``entries``           what the log holds
``files``             the segments on the disk, and how many of their bytes are not on the medium yet
``crash``             the process dies: what it had written stays
``power_cut``         the machine loses its power: what was not synced may be there, in part, or not
``flip FILE 100``     flip a bit in a file, so many bytes from its begin (negative: from its end)
``cut FILE 10``       take so many bytes off the end of a file
"""

from __future__ import annotations

import pytest

from gostore.config import StorageConfig
from gostore.core.errors import GoStoreError
from gostore.sim import World
from gostore.storage import Wal

SEGMENT_SIZE_BYTES = 4096
ENTRIES_SHOWN_MAX = 6


class Machine:
    def __init__(self) -> None:
        self.world: World | None = None
        self.wal: Wal | None = None
        self.config = StorageConfig()

    @property
    def node(self):
        return self.world.node("n1")

    def open(self, seed: int, segment: int) -> str:
        if self.world is None:
            self.world = World(seed)
            self.world.add_node("n1")
            self.config = StorageConfig(segment_size_bytes_max=segment)
        elif self.node.state == "down":
            self.world.restart("n1")
        try:
            self.wal = self.world.run(Wal.open(self.node.env, self.config), on="n1")
        except GoStoreError as error:
            return f"refused: {error.message}"
        torn = self.wal.statistics()["torn_bytes"]
        return f"{self.held()}, {f'a torn tail of {torn} bytes was cut off' if torn else 'nothing torn'}"

    def held(self) -> str:
        count = sum(self.wal.last_index(group) - self.wal.first_index(group) + 1 for group in self.wal.groups())
        return f"{count} {'entry' if count == 1 else 'entries'}" if count else "an empty log"

    def append(self, payloads: list[str], group: int, times: int) -> str:
        for payload in payloads * times:
            self.wal.append(group, 1, self.wal.last_index(group) + 1, payload.encode())
        return f"up to index {self.wal.last_index(group)} in memory"

    def sync(self) -> str:
        self.world.run(self.wal.sync(), on="n1")
        self.settle()
        return f"{self.held()} on the medium"

    def settle(self) -> None:
        """Until the note that all is synced, and the cleaner, are through."""
        self.world.run_for(1.0)

    def write(self) -> str:
        self.node.spawn(self.wal.sync(), name="sync")
        before = self.unsynced()  # the note that all is synced waits for nobody's sync
        self.world.run_until(lambda: self.unsynced() > before)
        return self.files()

    def unsynced(self) -> int:
        return sum(self.node.disk.unsynced().values())

    def entries(self) -> str:
        lines = []
        for group in self.wal.groups():
            first, last = self.wal.first_index(group), self.wal.last_index(group)
            shown = [record.payload.decode() for record in self.wal.records(group)]
            text = " ".join(shown[:ENTRIES_SHOWN_MAX]) + (" ..." if len(shown) > ENTRIES_SHOWN_MAX else "")
            lines.append(f"group {group}: {f'{first} to {last}: {text}' if shown else f'nothing, {first} comes next'}")
        return "\n".join(lines)

    def files(self) -> str:
        disk, lines = self.node.disk, []
        for name in disk.files():
            size, unsynced = len(disk.read_bytes(name)), disk.unsynced().get(name, 0)
            lines.append(f"{name}: {size} bytes" + (f", {unsynced} of them not on the medium" if unsynced else ""))
        return "\n".join(lines) or "none"

    def flip(self, name: str, offset: int) -> None:
        self.node.disk.corrupt(name, offset % len(self.node.disk.read_bytes(name)))

    def cut(self, name: str, size: int) -> None:
        file = self.node.disk.open(name)
        file.truncate(file.size() - size)
        self.world.run(file.sync())
        file.close()

    def close(self) -> None:
        if self.world is not None:
            self.world.close()


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


def test_log(scenario, transcript, machine):
    def handle(step):
        options = step.options
        group = int(options.get("group", 1))
        match step.name, step.args:
            case "open", []:
                return machine.open(int(options.get("seed", 1)), int(options.get("segment", SEGMENT_SIZE_BYTES)))
            case "append", payloads:
                return machine.append(payloads, group, int(options.get("times", 1)))
            case "write", []:
                return machine.write()
            case "sync", []:
                return machine.sync()
            case "drop", [index]:
                machine.wal.truncate_prefix(group, int(index))
            case "void", [index]:
                machine.wal.truncate_suffix(group, int(index))
            case "entries", []:
                return machine.entries()
            case "files", []:
                return machine.files()
            case "crash", []:
                machine.world.crash("n1")
            case "power_cut", []:
                machine.world.power_cut("n1")
                return machine.files()
            case "flip", [name, offset]:
                machine.flip(name, int(offset))
            case "cut", [name, size]:
                machine.cut(name, int(size))
            case _:
                raise ValueError(f"no such command: {step.name} {step.args}")
        return "ok"

    transcript(scenario, handle)

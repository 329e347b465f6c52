"""Nodes of a simulated world with nothing but a log and groups, and a machine that adds numbers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any

from gostore.comm import Endpoint
from gostore.config import KIB, CommConfig, StorageConfig
from gostore.consensus import Tunables
from gostore.consensus.group import Group
from gostore.consensus.groups import Compaction, Groups
from gostore.core.address import Address
from gostore.core.events import Event
from gostore.sim.world import SimNode, World
from gostore.storage import Wal

SECRET = "0123456789abcdef"
NAMES = ("n1", "n2", "n3")
TUNABLES = Tunables(election_timeout_s=0.5, heartbeat_s=0.1, retry_s=0.25, quiet_after_s=1.0)
STORAGE = StorageConfig(segment_size_bytes_max=16 * KIB)


class Everybody:
    """Knows where every node of a world listens."""

    def __init__(self, world: World) -> None:
        self.world = world

    def address(self, name: str) -> Address | None:
        node = self.world.nodes.get(name)
        return None if node is None else Address(node.address, 7000, 7000)


class Register:
    """Adds numbers; the outcome is (the number before, the index). Its state is all that was added, in order."""

    def __init__(self) -> None:
        self.applied = 0
        self.values: list[int] = []

    @property
    def size_bytes(self) -> int:
        return 8 * len(self.values)

    def apply(self, index: int, payload: bytes) -> tuple[int, int]:
        assert index == self.applied + 1
        self.applied = index
        self.values.append(struct.unpack("<q", payload[:8])[0])
        return len(self.values), index

    def skip(self, index: int) -> None:
        assert index == self.applied + 1
        self.applied = index

    def snapshot(self) -> Iterator[bytes]:
        return iter([struct.pack("<q", self.applied), *(struct.pack("<q", value) for value in self.values)])

    def restore(self, pieces: list[bytes]) -> None:
        numbers = [struct.unpack("<q", piece)[0] for piece in pieces] or [0]
        self.applied, self.values = numbers[0], numbers[1:]


class Cluster:
    """Nodes with nothing but a log and groups. ``count``: how many; all are founded by ``founders``, the ``late`` ones
    of whom do not know it yet."""

    def __init__(
        self,
        world: World,
        names: tuple[str, ...] = NAMES,
        founders: tuple[str, ...] = NAMES,
        count: int = 1,
        compaction: Compaction | None = None,
        late: tuple[str, ...] = (),
    ) -> None:
        self.world = world
        self.late = late
        self.founders = founders
        self.count = count
        self.compaction = compaction
        self.events: list[Event] = []
        self.groups: dict[str, Groups] = {}
        self.machines: dict[str, list[Register]] = {}
        self._of: dict[str, list[Group]] = {}
        for name in names:
            world.add_node(name, self._main)

    async def _main(self, node: SimNode) -> None:
        env = node.env
        env.events.subscribe(self.events.append, ("cls", "fault"))
        wal = await Wal.open(env, STORAGE)
        endpoint = Endpoint(
            env, cluster="test", secret=SECRET, host=node.address, tcp_port=7000, udp_port=7000,
            incarnation=node.incarnation, resolver=Everybody(self.world), config=CommConfig(),
        )  # fmt: skip
        groups = Groups(env, endpoint, wal, TUNABLES)
        endpoint.register(groups)
        await endpoint.start()
        machines = [Register() for _ in range(self.count)]
        opened = [
            groups.open(7 + number, f"group {number}", machine, self.compaction)
            for number, machine in enumerate(machines)
        ]
        self.groups[node.name], self.machines[node.name], self._of[node.name] = groups, machines, opened
        await groups.start()
        founder = node.name in self.founders
        for number, group in enumerate(opened):
            if node.name in self.late:
                continue
            group.begin(self.founders if founder else ())
            if founder and node.name == self.founders[number % len(self.founders)] and group.last.index == 0:
                group.campaign()

    def restart(self, name: str) -> None:
        """Another life, or the first one after a crash; until it has opened its log, there are no groups."""
        self._of.pop(name, None)
        self.world.restart(name)

    def group(self, name: str, number: int = 0) -> Group:
        return self._of[name][number]

    def running(self) -> list[str]:
        return [name for name, node in self.world.nodes.items() if node.state == "running" and name in self._of]

    def leader(self, number: int = 0) -> str | None:
        """Who serves with the greatest term."""
        serving = [name for name in self.running() if self.group(name, number).serves]
        return max(serving, key=lambda name: self.group(name, number).status.term, default=None)

    def wait_leader(self, number: int = 0, among: tuple[str, ...] | None = None) -> str:
        def there() -> bool:
            found = self.leader(number)
            return found is not None and (among is None or found in among)

        self.world.run_until(there, timeout_s=20.0, what="a leader")
        found = self.leader(number)
        assert found is not None
        return found

    def propose(self, name: str, value: int, number: int = 0, timeout_s: float = 5.0, size: int = 8) -> Any:
        async def main() -> Any:
            payload = struct.pack("<q", value).ljust(size, b"\0")
            return await self.group(name, number).propose(payload, asyncio.get_running_loop().time() + timeout_s)

        return self.world.run(main(), on=name)

    def read(self, name: str, number: int = 0, timeout_s: float = 5.0) -> list[int]:
        async def main() -> list[int]:
            await self.group(name, number).read_barrier(asyncio.get_running_loop().time() + timeout_s)
            return list(self.machines[name][number].values)

        return self.world.run(main(), on=name)

    def change(
        self, name: str, voters: tuple[str, ...], learners: tuple[str, ...] = (), timeout_s: float = 5.0
    ) -> None:
        async def main() -> None:
            await self.group(name).change(voters, learners, asyncio.get_running_loop().time() + timeout_s)

        self.world.run(main(), on=name)

    def wait_equal(self, names: tuple[str, ...] = NAMES, number: int = 0) -> None:
        def equal() -> bool:
            states = [(self.machines[name][number].applied, self.machines[name][number].values) for name in names]
            return all(state == states[0] for state in states)

        self.world.run_until(equal, timeout_s=20.0, what="equal machines")

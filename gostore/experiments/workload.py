"""A mixed load on a testbed, recorded as histories that can be judged: registers, transfers between accounts, files.

Every value that is written is unique, so that a read tells exactly which write it saw. Operations have a deadline; what
ends in an indefinite error, or never, stays open in the history.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gostore.check import History
from gostore.core.errors import GoStoreError, NotFound
from gostore.core.ports import Rng
from gostore.testbed import Testbed

REGISTERS: Final = 6
ACCOUNTS: Final = 5
BALANCE: Final = 100
FILES: Final = 4
CLIENTS: Final = 4
PAUSE_S: Final = (0.01, 0.3)
"""Between two operations of one client. Shorter: more load, and more work for the checks."""

FILE_SIZES: Final = (10, 3_000, 20_000, 90_000)


@dataclass(slots=True)
class Totals:
    """What the readers of all accounts saw, when it was not the sum that was put in."""

    reads: int
    wrong: list[str]


class Workload:
    """``registers`` and ``files`` are histories of the model ``register``."""

    def __init__(self, testbed: Testbed, rng: Rng, now: Callable[[], float]) -> None:
        self._testbed = testbed
        self._rng = rng
        self._next = 0
        self.registers = History("register", now=now)
        self.files = History("register", now=now)
        self.totals = Totals(0, [])
        self.transfers = 0
        self.refused = 0

    async def prepare(self) -> None:
        """The containers and accounts; before any fault."""
        db = self._testbed.db
        await db.create_container("registers")
        await db.create_container("accounts")
        async with db.transaction() as transaction:
            for number in range(ACCOUNTS):
                transaction.set("accounts", f"a{number}", BALANCE)

    async def run(self, seconds: float) -> None:
        """``CLIENTS`` at work at the same time, for ``seconds``."""
        stop_s = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(f"c{number}", stop_s))

    async def _client(self, name: str, stop_s: float) -> None:
        loop = asyncio.get_running_loop()
        jobs = (self._write, self._write, self._read, self._read, self._transfer, self._sum, self._store, self._load)
        while (left_s := stop_s - loop.time()) > 0:
            try:
                async with asyncio.timeout(max(left_s, 0.1)):
                    await self._rng.choice(jobs)(name)
            except (GoStoreError, TimeoutError):
                self.refused += 1
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))

    def _unique(self) -> int:
        self._next += 1
        return self._next

    async def _write(self, client: str) -> None:
        key, value = f"r{self._rng.randrange(REGISTERS)}", self._unique()
        await self.registers.record(client, "write", key, value, self._set(key, value))

    async def _set(self, key: str, value: int) -> None:
        await self._testbed.db.set("registers", key, value)

    async def _read(self, client: str) -> None:
        key = f"r{self._rng.randrange(REGISTERS)}"
        await self.registers.record(client, "read", key, None, self._testbed.db.get("registers", key))

    async def _transfer(self, client: str) -> None:
        one, other = self._rng.sample(range(ACCOUNTS), 2)
        amount = self._rng.randrange(1, 20)
        async with self._testbed.db.transaction() as transaction:
            if await transaction.get("accounts", f"a{one}") >= amount:
                transaction.add("accounts", f"a{one}", -amount)
                transaction.add("accounts", f"a{other}", amount)
        self.transfers += 1

    async def _sum(self, client: str) -> None:
        async with self._testbed.db.transaction() as transaction:
            balances = [await transaction.get("accounts", f"a{number}") for number in range(ACCOUNTS)]
        # Only what a commit has validated counts: before it, a transaction may have seen a state that never was.
        self.totals.reads += 1
        if sum(balances) != ACCOUNTS * BALANCE or min(balances) < 0:
            self.totals.wrong.append(f"{client} saw the balances {balances}, together {sum(balances)}")

    async def _store(self, client: str) -> None:
        number, value = self._rng.randrange(FILES), self._unique()
        data = f"{value}:".encode().ljust(self._rng.choice(FILE_SIZES), b".")
        await self.files.record(client, "write", f"f{number}", value, self._write_file(number, data))

    async def _write_file(self, number: int, data: bytes) -> None:
        await self._testbed.fs.write(f"/load/f{number}", data)

    async def _load(self, client: str) -> None:
        number = self._rng.randrange(FILES)
        await self.files.record(client, "read", f"f{number}", None, self._read_file(number))

    async def _read_file(self, number: int) -> int | None:
        try:
            data = await self._testbed.fs.read(f"/load/f{number}")
        except NotFound:
            return None
        return int(data.partition(b":")[0])

    async def read_all(self) -> None:
        """Read everything once more, when all is quiet: the end of every history. Raises what a read raises."""
        for number in range(REGISTERS):
            key = f"r{number}"
            await self.registers.record("last", "read", key, None, self._testbed.db.get("registers", key))
        for number in range(FILES):
            await self.files.record("last", "read", f"f{number}", None, self._read_file(number))
        await self._sum("last")


def describe(workload: Workload) -> dict[str, Any]:
    """How much was done: a run that did nothing proves nothing."""
    return {
        "operations": len(workload.registers) + len(workload.files),
        "transfers": workload.transfers,
        "sums": workload.totals.reads,
        "refused": workload.refused,
    }

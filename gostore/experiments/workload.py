"""A mixed load on a testbed, recorded so that it can be judged.

==============  ============================================  ====================================================
part            what the clients do                           what is judged
==============  ============================================  ====================================================
``registers``   write, read and delete objects of db          linearizable, key by key
``files``       write, read and delete files, also in         the same
                directories that are made and removed
``cells``       transactions that read some objects, or a     strictly serializable: no cycle of dependencies
                range, and write some of what they read;
                half of the objects are in one shard
accounts        transfers, and sums over all                  the sum stays, and no balance falls below 0
counters        blind additions                               what was acknowledged was added once, no more
pulse           one write in every shard, after the heal      how long that takes: progress
==============  ============================================  ====================================================

Every value that is written to a register or a file is unique, so that a read tells exactly which write it saw; deleting
writes None. Operations have a deadline; what ends in an indefinite error, or never, stays open in the history.

A cell holds ``[version, attempt]``. Whoever writes one has read it, and raises its version by one: so the values tell
who wrote what in which order, and two who write the same version have lost an update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from gostore.check import Access, History, Outcome, Transaction
from gostore.client.objects import TransactionHandle
from gostore.cluster.ring import token_of
from gostore.core.errors import Conflict, GoStoreError, NotEmpty, NotFound
from gostore.core.keyvalue import prefix_end
from gostore.core.ports import Rng
from gostore.testbed import Testbed

REGISTERS: Final = 6
ACCOUNTS: Final = 5
BALANCE: Final = 100
CELLS: Final = ("p/0", "p/1", "p/2", "q/0", "q/1", "q/2")
CELL_RANGES: Final = ("p/", "q/")
"""Each is in one shard: to read a range costs no more than to read an object."""
COUNTERS: Final = 3
FILES: Final = 4
DIRECTORIES: Final = 2
"""Each holds one file, and comes and goes with it."""

WRITES_TOGETHER_MAX: Final = 4

CLIENTS: Final = 4
PAUSE_S: Final = (0.01, 0.3)
"""Between two operations of one client. Shorter: more load, and more work for the checks."""

THINK_S: Final = (0.005, 0.15)
"""Between what half of the transactions on the cells read and their commit: what comes between is what they are for."""

LAST_ATTEMPTS_MAX: Final = 8
LAST_PAUSE_S: Final = 0.5
"""How often, and how far apart, the transactions that read everything at the end are tried."""

FILE_SIZES: Final = (10, 3_000, 20_000, 90_000)


@dataclass(slots=True)
class Totals:
    """What the readers of all accounts saw, when it was not the sum that was put in."""

    reads: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Counter:
    """``added``: acknowledged; ``doubtful``: may have been added. ``final``: what it is at the end."""

    added: int = 0
    doubtful: int = 0
    final: int | None = None


@dataclass(slots=True)
class Attempt:
    """A transaction on the cells: key -> (version, attempt) that it read, key -> version that it wrote.

    ``ranges``: prefixes of which it read all. ``invoked``, ``returned``: positions in the order of all of these.
    """

    number: int
    client: str
    invoked: int
    returned: int | None = None
    outcome: Outcome = Outcome.INFO
    ranges: tuple[str, ...] = ()
    reads: dict[str, tuple[int, int]] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)


class Workload:
    """``registers`` and ``files`` are histories of the model ``register``; for the rest see the page above."""

    def __init__(self, testbed: Testbed, rng: Rng, now: Callable[[], float]) -> None:
        self._testbed = testbed
        self._rng = rng
        self._next = 0
        self._position = 0
        self.registers = History("register", now=now)
        self.files = History("register", now=now)
        self.cells: list[Attempt] = []
        self.counters = {f"k{number}": Counter() for number in range(COUNTERS)}
        self.totals = Totals()
        self.transfers = 0
        self.refused = 0

    async def prepare(self) -> None:
        """The containers and accounts; before any fault."""
        db = self._testbed.db
        for container in ("registers", "accounts", "counters", "pulse"):
            await db.create_container(container)
        await db.create_container("cells", separator="/")
        async with db.transaction() as transaction:
            for number in range(ACCOUNTS):
                transaction.set("accounts", f"a{number}", BALANCE)

    async def run(self, seconds: float, clients: int = CLIENTS) -> None:
        """So many clients at work at the same time, for ``seconds``."""
        stop_s = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(f"c{number}", stop_s))

    async def _client(self, name: str, stop_s: float) -> None:
        loop = asyncio.get_running_loop()
        jobs = (
            *(self._write, self._write_together, self._read, self._read, self._delete),
            *(self._transfer, self._sum, self._transact, self._transact, self._count),
            *(self._store, self._store, self._load, self._load, self._remove),
        )
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

    # registers

    async def _write(self, client: str) -> None:
        key, value = f"r{self._rng.randrange(REGISTERS)}", self._unique()
        await self.registers.record(client, "write", key, value, self._set(key, value))

    async def _write_together(self, client: str) -> None:
        """Several at the same moment, whose commits share a request: as many clients as there are writes."""
        some = [self._write(f"{client}.{number}") for number in range(self._rng.randrange(1, WRITES_TOGETHER_MAX))]
        done = await asyncio.gather(*some, self._count(client), return_exceptions=True)
        for error in done:
            if error is not None:
                raise error

    async def _delete(self, client: str) -> None:
        key = f"r{self._rng.randrange(REGISTERS)}"
        await self.registers.record(client, "write", key, None, self._set(key, None))

    async def _set(self, key: str, value: int | None) -> None:
        if value is None:
            await self._testbed.db.delete("registers", key)
        else:
            await self._testbed.db.set("registers", key, value)

    async def _read(self, client: str) -> None:
        key = f"r{self._rng.randrange(REGISTERS)}"
        await self.registers.record(client, "read", key, None, self._testbed.db.get("registers", key))

    # accounts and counters

    async def _transfer(self, client: str) -> None:
        one, other = self._rng.sample(range(ACCOUNTS), 2)
        amount = self._rng.randrange(1, 20)
        async with self._testbed.db.transaction() as transaction:
            if await transaction.get("accounts", f"a{one}", default=0) >= amount:
                transaction.add("accounts", f"a{one}", -amount)
                transaction.add("accounts", f"a{other}", amount)
        self.transfers += 1

    async def _sum(self, client: str) -> None:
        async with self._testbed.db.transaction() as transaction:
            balances = [await transaction.get("accounts", f"a{number}", default=0) for number in range(ACCOUNTS)]
        # Only what a commit has validated counts: before it, a transaction may have seen a state that never was.
        self.totals.reads += 1
        if sum(balances) != ACCOUNTS * BALANCE or min(balances) < 0:
            self.totals.wrong.append(f"{client} saw the balances {balances}, together {sum(balances)}")

    async def _count(self, client: str) -> None:
        name, amount = self._rng.choice(list(self.counters)), self._rng.randrange(1, 10)
        counter = self.counters[name]
        counter.doubtful += amount
        try:
            await self._testbed.db.add("counters", name, amount)
        except GoStoreError as error:
            counter.doubtful -= amount if error.definite else 0
            raise
        counter.doubtful -= amount
        counter.added += amount

    # cells

    async def _transact(self, client: str) -> None:
        keys = self._rng.sample(CELLS, self._rng.randrange(2, 4))
        written = keys[: self._rng.randrange(len(keys) + 1)]
        ranges = (self._rng.choice(CELL_RANGES),) if self._rng.random() < 0.4 else ()
        await self._attempt(client, keys, written, ranges)

    async def _attempt(self, client: str, keys: list[str], written: list[str], ranges: tuple[str, ...]) -> None:
        attempt = Attempt(len(self.cells), client, self._tick(), ranges=ranges)
        self.cells.append(attempt)
        try:
            async with self._testbed.db.transaction() as transaction:
                await self._read_cells(transaction, attempt, keys)
                if self._rng.random() < 0.5:
                    await asyncio.sleep(self._rng.uniform(*THINK_S))
                for key in written:
                    attempt.writes[key] = attempt.reads[key][0] + 1
                    transaction.set("cells", key, [attempt.writes[key], attempt.number])
            attempt.outcome = Outcome.OK
        except GoStoreError as error:
            attempt.outcome = Outcome.FAIL if error.definite else Outcome.INFO
            raise
        finally:
            attempt.returned = self._tick()

    async def _read_cells(self, transaction: TransactionHandle, attempt: Attempt, keys: list[str]) -> None:
        for prefix in attempt.ranges:
            for key, (version, writer) in await transaction.scan("cells", prefix):
                attempt.reads[key] = version, writer
        for key in keys:
            version, writer = await transaction.get("cells", key, default=(0, -1))
            attempt.reads[key] = version, writer

    def _tick(self) -> int:
        self._position += 1
        return self._position

    def transactions(self) -> list[Transaction]:
        """What happened to the cells, for :func:`~gostore.check.check_serializable`.

        The values tell who wrote them, so that of every attempt whose outcome is unknown it is known whether anybody
        saw its effect; one that nobody saw does not count. One that failed and was seen all the same appears with what
        it wrote, as aborted.
        """
        seen = {writer: None for attempt in self.cells for _, writer in attempt.reads.values()}
        return [self._as_transaction(attempt, attempt.number in seen) for attempt in self.cells]

    @staticmethod
    def _as_transaction(attempt: Attempt, seen: bool) -> Transaction:
        counts = attempt.outcome is Outcome.OK or seen
        return Transaction(
            f"T{attempt.number} of {attempt.client}",
            tuple(Access(key, version) for key, (version, _) in attempt.reads.items()) if counts else (),
            tuple(Access(key, version) for key, version in attempt.writes.items()) if counts else (),
            ranges=tuple((prefix, prefix_end(prefix)) for prefix in attempt.ranges) if counts else (),
            outcome=attempt.outcome,
            invoked=attempt.invoked,
            returned=attempt.returned if attempt.outcome is Outcome.OK else None,
        )

    # files

    def _some_file(self) -> str:
        number = self._rng.randrange(FILES + DIRECTORIES)
        return f"f{number}" if number < FILES else f"d{number - FILES}/f"

    async def _store(self, client: str) -> None:
        name, value = self._some_file(), self._unique()
        data = f"{value}:".encode().ljust(self._rng.choice(FILE_SIZES), b".")
        await self.files.record(client, "write", name, value, self._write_file(name, data))

    async def _write_file(self, name: str, data: bytes) -> None:
        await self._testbed.fs.write(f"/load/{name}", data)

    async def _load(self, client: str) -> None:
        name = self._some_file()
        await self.files.record(client, "read", name, None, self._read_file(name))

    async def _read_file(self, name: str) -> int | None:
        try:
            data = await self._testbed.fs.read(f"/load/{name}")
        except NotFound:
            return None
        value, _, rest = data.partition(b":")
        # What is no whole file that somebody wrote counts as a value that nobody wrote.
        return int(value) if value.isdigit() and len(data) in FILE_SIZES and not rest.strip(b".") else -1

    async def _remove(self, client: str) -> None:
        name = self._some_file()
        await self.files.record(client, "write", name, None, self._delete_file(name))
        directory, slash, _ = name.partition("/")
        if slash:
            try:
                await self._testbed.fs.delete(f"/load/{directory}")
            except (NotEmpty, NotFound):
                pass  # somebody was faster

    async def _delete_file(self, name: str) -> None:
        try:
            await self._testbed.fs.delete(f"/load/{name}")
        except NotFound:
            pass  # it is not there, and at some moment of this call it was not

    # the end

    async def progress(self) -> None:
        """Until a write was acknowledged in every shard. Raises what a write raises."""
        db, status = self._testbed.db, await self._testbed.call(next(iter(self._testbed.nodes)), "admin", "status")
        shards = status["shard_count"]
        keys: dict[int, str] = {}
        number = 0
        while len(keys) < shards:
            keys.setdefault(token_of(f"{number}".encode()) * shards >> 64, f"{number}")
            number += 1
        async with asyncio.TaskGroup() as group:
            for key in keys.values():
                group.create_task(db.set("pulse", key, 1))

    async def read_all(self) -> None:
        """Read everything once more, when all is quiet: the end of every history. Raises what a read raises."""
        db = self._testbed.db
        for number in range(REGISTERS):
            await self.registers.record("last", "read", f"r{number}", None, db.get("registers", f"r{number}"))
        for name in self._file_names():
            await self.files.record("last", "read", name, None, self._read_file(name))
        for name, counter in self.counters.items():
            counter.final = await db.get("counters", name, default=0)
        await self._insist(lambda: self._attempt("last", list(CELLS), [], CELL_RANGES))
        await self._insist(lambda: self._sum("last"))

    async def _insist(self, transaction: Callable[[], Awaitable[None]]) -> None:
        """A conflict is no error, but it cannot go on for ever when nobody else is at work."""
        for attempt in range(1, LAST_ATTEMPTS_MAX + 1):
            try:
                await transaction()
                return
            except Conflict:
                if attempt == LAST_ATTEMPTS_MAX:
                    raise
            await asyncio.sleep(LAST_PAUSE_S)

    def _file_names(self) -> Iterator[str]:
        yield from (f"f{number}" for number in range(FILES))
        yield from (f"d{number}/f" for number in range(DIRECTORIES))


def describe(workload: Workload) -> dict[str, Any]:
    """How much was done: a run that did nothing proves nothing."""
    return {
        "operations": len(workload.registers) + len(workload.files),
        "transactions": sum(attempt.outcome is Outcome.OK for attempt in workload.cells),
        "transfers": workload.transfers,
        "sums": workload.totals.reads,
        "refused": workload.refused,
    }

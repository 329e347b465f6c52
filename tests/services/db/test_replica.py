"""One replica: what it promises, accepts, truncates and applies."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import Fenced, NotFound, Unavailable
from gostore.services.db import replica as replica_module
from gostore.services.db.entries import COMMAND, CONFIGURATION, LogEntry, Point, Promise, pack_members
from gostore.services.db.replica import Replica


class Log:
    """The part of the node's log that a journal uses."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.synced = 0

    def last_index(self, group: int) -> int:
        return len(self.all)

    def append(self, group: int, term: int, index: int, payload: bytes, kind: int = 0) -> None:
        self.all.append((term, kind, payload))

    async def sync(self) -> None:
        await asyncio.sleep(0)
        self.synced = len(self.all)

    def truncate_prefix(self, group: int, index: int) -> None:
        pass

    def records(self, group: int) -> Any:
        return iter(())


class Machine:
    """Remembers what it was told."""

    size_bytes = 0

    def __init__(self) -> None:
        self.told: list[Any] = []

    def apply(self, index: int, payload: bytes) -> Any:
        if payload == b"poison":
            raise ValueError("cannot be")
        self.told.append((index, payload))
        return index * 10

    def skip(self, index: int) -> None:
        self.told.append((index, None))

    def snapshot(self) -> Any:
        return iter([b"one", b"two"])

    def restore(self, pieces: list[bytes]) -> None:
        self.told = list(pieces)


def make() -> tuple[Replica, Log, Machine, list[str]]:
    log, machine, fatal = Log(), Machine(), []
    group: Any = SimpleNamespace(
        env=SimpleNamespace(log=logging.getLogger("test"), fatal=fatal.append),
        name="me",
        shard=0,
        wal=log,
        machine=machine,
    )
    return Replica(group), log, machine, fatal


def entry(index: int, term: int = 1, payload: bytes = b"x") -> LogEntry:
    return LogEntry(term, index, COMMAND, payload)


def promise(generation: int, primary: str = "a") -> Promise:
    return Promise(generation, primary, ("a", "b", "c"), 2)


def test_a_promise_is_kept() -> None:
    async def main() -> None:
        replica, log, _, _ = make()
        await replica.promise(promise(5))
        assert log.synced == len(log.all) == 1, "it must outlive a loss of power"
        await replica.promise(promise(5))
        for generation, primary in ((4, "a"), (5, "b")):
            with pytest.raises(Fenced) as caught:
                await replica.promise(promise(generation, primary))
            assert caught.value.details["generation"] == 5
            with pytest.raises(Fenced):
                replica.check(generation, primary)
        report = await replica.promise(promise(6, "b"))
        assert [made.generation for made in report.promises] == [5], "what was promised before is evidence"

    asyncio.run(main())


def test_whoever_is_asked_twice_at_a_time_obeys_the_newer_one() -> None:
    async def main() -> None:
        replica, _, _, _ = make()
        results = await asyncio.gather(
            replica.promise(promise(5)), replica.promise(promise(6, "b")), return_exceptions=True
        )
        assert isinstance(results[0], Fenced), "its answer would have come after the newer promise"
        assert replica.generation == 6

    asyncio.run(main())


def test_what_is_accepted_is_durable_and_replaces_what_differs() -> None:
    async def main() -> None:
        replica, log, _, _ = make()
        assert await replica.accept(Point(0, 0), [entry(1), entry(2), entry(3)])
        assert log.synced == len(log.all) == 3
        replica.advance(1)
        waiter = replica.waiters[3] = asyncio.get_running_loop().create_future()
        assert await replica.accept(Point(1, 1), [entry(2), entry(3, 2, b"other"), entry(4, 2)])
        assert [replica.journal.term(index) for index in (1, 2, 3, 4)] == [1, 1, 2, 2]
        assert replica.journal.entry(3).payload == b"other"
        with pytest.raises(Unavailable) as caught:
            waiter.result()
        assert not caught.value.definite
        assert await replica.accept(Point(2, 1), [entry(3, 2, b"other")]), "an old message again"
        assert replica.journal.last == Point(4, 2)
        assert not await replica.accept(Point(3, 1), [entry(4, 3)]), "another history"
        assert not await replica.accept(Point(0, 0), [entry(1, 9)]), "what is committed stays"

    asyncio.run(main())


def test_a_message_that_overtook_another_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        replica, _, _, _ = make()
        second = asyncio.ensure_future(replica.accept(Point(1, 1), [entry(2)]))
        await asyncio.sleep(0)
        assert await replica.accept(Point(0, 0), [entry(1)])
        assert await second
        monkeypatch.setattr(replica_module, "GAP_WAIT_S", 0.001)
        assert not await replica.accept(Point(9, 1), [entry(10)])

    asyncio.run(main())


def test_what_is_committed_is_applied_once_in_order() -> None:
    async def main() -> None:
        replica, _, machine, _ = make()
        waiter = replica.waiters[2] = asyncio.get_running_loop().create_future()
        await replica.accept(Point(0, 0), [entry(1), entry(2), LogEntry(1, 3, CONFIGURATION, pack_members(("a",), 1))])
        replica.advance(2)
        assert waiter.result() == 20
        replica.advance(99)
        replica.advance(1)
        assert machine.told == [(1, b"x"), (2, b"x"), (3, None)]
        assert (replica.committed, replica.applied) == (3, 3)

    asyncio.run(main())


def test_an_entry_that_cannot_be_applied_stops_the_node() -> None:
    async def main() -> None:
        replica, _, _, fatal = make()
        await replica.accept(Point(0, 0), [entry(1, payload=b"poison")])
        with pytest.raises(ValueError):
            replica.advance(1)
        assert "entry 1 cannot be applied" in fatal[0]

    asyncio.run(main())


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "BATCH_SIZE_BYTES_MAX", 10)

    async def main() -> None:
        replica, _, _, _ = make()
        sizes = [4, 4, 4, 50, 4]
        await replica.accept(Point(0, 0), [entry(n, payload=b"y" * size) for n, size in enumerate(sizes, 1)])
        assert [[e.index for e in replica.batch(start)] for start in (1, 3, 4, 5, 6)] == [[1, 2], [3], [4], [5], []]
        monkeypatch.setattr(replica_module, "BATCH_ENTRIES_MAX", 1)
        assert len(replica.batch(1)) == 1

    asyncio.run(main())


def test_open_snapshots_are_bounded_and_read_in_order() -> None:
    replica, _, _, _ = make()
    number, at, configuration = replica.open_snapshot()
    assert (at, configuration) == (Point(0, 0), None)
    assert [bytes(replica.piece(number, piece).data) for piece in (0, 0, 1)] == [b"one", b"one", b"two"]
    with pytest.raises(NotFound, match="begin again"):
        replica.piece(number, 0)
    assert replica.piece(number, 2).value is True
    with pytest.raises(NotFound):
        replica.piece(number, 2)
    first = replica.open_snapshot()[0]
    for _ in range(replica_module.SNAPSHOTS_OPEN_MAX):
        replica.open_snapshot()
    with pytest.raises(NotFound):
        replica.piece(first, 0)

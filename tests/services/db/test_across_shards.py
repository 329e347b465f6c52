"""Transactions across shards while nodes die: all or nothing, and no lock stays."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gostore.core.errors import (
    Conflict,
    GoStoreError,
    Unavailable,
)
from gostore.core.events import Event
from gostore.core.keyvalue import Write
from gostore.core.transaction import Transaction, transact
from gostore.core.values import pack
from gostore.services.db import coordinator

from .bed import ONE_LOG, Cluster, begin, play, put, until

COMMITS = 40


@pytest.mark.parametrize("replication", ONE_LOG)
def test_transactions_across_shards_keep_the_bank_in_balance_while_nodes_die(replication: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        rng = cluster.world.rng("test")
        accounts = [f"account{n}" for n in range(12)]
        await db.commit([], [put(name, 100) for name in accounts])
        done = False
        moved = audited = 0

        async def pause(attempt: int) -> None:
            await asyncio.sleep(rng.uniform(0.0, 0.02 * 2 ** min(attempt, 4)))

        async def mover() -> None:
            nonlocal moved
            while not done:
                source, target = rng.sample(accounts, 2)

                async def body(t: Transaction, source: str = source, target: str = target) -> None:
                    balance = await t.get("t", source)
                    if balance >= 10:
                        t.set("t", source, balance - 10)
                        t.add("t", target, 10)

                await asyncio.sleep(rng.uniform(0.0, 0.2))
                try:
                    await transact(cluster.db(rng.choice(cluster.running)), body, pause=pause)
                    moved += 1
                except (GoStoreError, KeyError):
                    await asyncio.sleep(0.05)

        async def auditor() -> None:
            nonlocal audited
            while not done:

                async def body(t: Transaction) -> int:
                    return sum(entry.value for entry in await t.scan("t"))

                await asyncio.sleep(rng.uniform(0.0, 0.2))
                try:
                    total = await transact(cluster.db(rng.choice(cluster.running)), body, pause=pause)
                except (GoStoreError, KeyError):
                    await asyncio.sleep(0.05)
                    continue
                assert total == 1200
                audited += 1

        tasks = [asyncio.ensure_future(run) for run in (mover(), mover(), mover(), auditor())]
        for _ in range(3):
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            victim = rng.choice(cluster.names)
            cluster.crash(victim, power=rng.random() < 0.5)
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            await cluster.restart(victim)
        done = True
        await asyncio.gather(*tasks)
        await cluster.settled()
        # No lock stays: everything can be written again.
        await until(lambda: all(cluster.services[n].statistics()["prepared"] == 0 for n in cluster.names))
        page = await cluster.db("n0").scan("t")
        assert sum(entry.value for entry in page.entries) == 1200

        async def all_at_once(t: Transaction) -> None:
            for name in accounts:
                t.set("t", name, 1)

        # The leads may still be on their way home, and a transaction that meets that is refused, and run again.
        await transact(cluster.db("n0"), all_at_once, pause=pause)
        await cluster.converged()
        assert moved > 20
        assert audited > 0

    play(scenario, nodes=4, replication=replication)


@pytest.mark.parametrize("replication", ONE_LOG)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_coordinator_that_dies_leaves_no_lock(monkeypatch: pytest.MonkeyPatch, when: str, replication: str) -> None:
    """Its successor aborts what was not decided, and tells what was."""

    async def scenario(cluster: Cluster) -> None:
        await begin(cluster)
        await cluster.settled()
        keys = [cluster.key_of(shard) for shard in range(4)]
        coordinating = cluster.primary(0)
        client = next(name for name in cluster.names if name != coordinating)
        reached: list[bool] = []
        seen: list[Event] = []
        for node in cluster.names:
            if node != coordinating:
                cluster.world.nodes[node].env.events.subscribe(seen.append)
        cut = coordinator.Coordinator._tell if when == "after" else coordinator.Coordinator._prepare_all

        async def stuck(self: Any, *args: Any) -> Any:
            """The driver gets here, and never any further."""
            if self._env.name != coordinating or self._env is not cluster.world.nodes[coordinating].env:
                return await cut(self, *args)
            if when == "before":
                await cut(self, *args)
            reached.append(True)
            await asyncio.Event().wait()
            return None

        name = "_tell" if when == "after" else "_prepare_all"
        monkeypatch.setattr(coordinator.Coordinator, name, stuck)

        async def commit() -> None:
            await cluster.db(client).commit([], [put(key, "new") for key in keys], timeout_s=20.0)

        task = asyncio.ensure_future(commit())
        await until(lambda: bool(reached))
        cluster.crash(coordinating)
        try:
            await task
            happened = True
        except Conflict:
            happened = False
        assert happened == (when == "after")
        values = [(await cluster.db(client).get("t", key)).value for key in keys]
        assert values == (["new"] * 4 if happened else [None] * 4)
        await until(lambda: all(cluster.services[n].statistics()["prepared"] == 0 for n in cluster.running))
        await until(lambda: all(cluster.services[n].statistics()["coordinated"] == 0 for n in cluster.running))
        await cluster.db(client).commit([], [put(key, "again") for key in keys])
        recovered = [event.data["outcome"] for event in seen if event.kind == "transaction_recovered"]
        assert recovered == ["commit" if happened else "abort"]

    play(scenario, nodes=4, replication=replication)


def test_a_late_prepare_is_resolved_by_asking() -> None:
    """The message that was delayed arrives when the transaction was aborted and forgotten long ago."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        key = cluster.key_of(1)
        shard = cluster.services[cluster.primary(1)]._shards[1]
        physical = cluster.services["n0"].database.known("t").physical
        write = ["set", physical, key, [], pack("late", 100)]

        async def prepare() -> Any:
            now_s = asyncio.get_running_loop().time()
            return await shard.propose(["prepare", "0.1000.99999", 0, [], [write]], now_s + 5)

        assert (await cluster.on(cluster.primary(1), prepare()))[0] == "ok"
        await db.commit([], [put(key, "mine")])
        assert (await db.get("t", key)).value == "mine"

    play(scenario)


def test_a_prepare_that_comes_twice_is_executed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the message was delayed; a third shard has not heard the decision, so that nobody has forgotten it."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        keys = [cluster.key_of(shard) for shard in range(3)]
        copies: list[Any] = []
        prepare, tell = coordinator.Coordinator._prepare, coordinator.Coordinator._tell
        heard = asyncio.Event()

        async def copied(self: Any, transaction: str, part: Any, deadline_s: float) -> Any:
            if part[0] == 1:
                copies.append(["prepare", transaction, 0, *part[1:]])
            return await prepare(self, transaction, part, deadline_s)

        async def deaf(self: Any, shard: int, *args: Any) -> Any:
            if shard == 2:
                while not heard.is_set():  # noqa: ASYNC110 - the event lies in another process
                    await asyncio.sleep(0.01)
            return await tell(self, shard, *args)

        monkeypatch.setattr(coordinator.Coordinator, "_prepare", copied)
        monkeypatch.setattr(coordinator.Coordinator, "_tell", deaf)
        committing = asyncio.ensure_future(db.commit([], [put(key, "old") for key in keys]))
        primary = cluster.primary(1)
        machine = cluster.machine(primary, 1)
        physical = cluster.services["n0"].database.known("t").physical
        await until(lambda: machine.store.version(physical, keys[1]) > 0)
        assert not machine.prepared
        await db.commit([], [put(keys[1], "new")])

        async def late() -> None:
            shard = cluster.services[primary]._shards[1]
            await shard.propose(copies[0], asyncio.get_running_loop().time() + 5)

        await cluster.on(primary, late())
        await until(lambda: not machine.prepared)
        assert (await db.get("t", keys[1])).value == "new"
        heard.set()
        await committing
        await until(lambda: all(cluster.services[n].statistics()["coordinated"] == 0 for n in cluster.running))

    play(scenario)


def test_read_only_transactions_across_shards_are_validated() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        first, second = cluster.key_of(0), cluster.key_of(1)
        await db.commit([], [put(first, 1), put(second, 1)])
        t = Transaction(db)
        assert await t.get("t", first) == 1
        await db.commit([], [put(first, 2), put(second, 2)])
        assert await t.get("t", second) == 2, "another shard, a later snapshot"
        with pytest.raises(Conflict):
            await t.commit()

    play(scenario)


def tasks_of_transactions(cluster: Cluster) -> list[str]:
    """Of the coordinators at running nodes."""
    kinds = ("db-transaction", "db-prepare", "db-decide", "db-forget", "db-abort")
    names = [task.get_name() for node in cluster.running for task in cluster.world.nodes[node].env.tasks._tasks]
    return [name for name in names if name.partition("/")[2].startswith(kinds)]


def test_refused_transactions_leave_nothing_while_a_shard_lacks_its_majority() -> None:
    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()

        # Whose primary stays: it logs what it is asked to prepare, and must get rid of it later.
        lost = next(shard for shard in range(4) if cluster.names[0] not in cluster.owners(shard)[1:])
        down = cluster.owners(lost)[1:]
        good = next(shard for shard in range(4) if len(set(cluster.owners(shard)) & set(down)) < 2)
        accounts = [cluster.key_of(good, number) for number in range(COMMITS)]
        partners = [cluster.key_of(lost, number) for number in range(COMMITS)]
        for name in (*accounts, *partners):
            await db.commit([], [put(name, 100)])
        for node in down:
            cluster.crash(node, told=False)

        async def move(source: str, target: str) -> None:
            # The coordinator is the shard that is written first.
            writes = [Write("add", "t", source, -10), Write("add", "t", target, 10)]
            await db.commit([], writes, timeout_s=20.0)

        answers = await asyncio.gather(*map(move, accounts, partners), return_exceptions=True)
        assert all(isinstance(answer, Unavailable | Conflict) and answer.definite for answer in answers), answers
        await until(lambda: all(cluster.services[n].statistics()["coordinated"] == 0 for n in cluster.running))
        await until(lambda: not tasks_of_transactions(cluster))
        for node in down:
            await cluster.restart(node)
        await cluster.settled()
        await until(lambda: all(cluster.services[n].statistics()["prepared"] == 0 for n in cluster.names))
        page = await db.scan("t")
        assert [entry.value for entry in page.entries] == [100] * 2 * COMMITS
        await asyncio.gather(*map(move, accounts, partners))
        page = await db.scan("t")
        assert sum(entry.value for entry in page.entries) == 100 * 2 * COMMITS
        await until(lambda: all(cluster.services[n].statistics()["coordinated"] == 0 for n in cluster.names))
        await cluster.converged()

    play(scenario, nodes=5)


def test_a_participant_that_missed_the_abort_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once; when that is lost, its locks stay until it has asked, and the coordinator knows of nothing."""

    async def scenario(cluster: Cluster) -> None:
        db = await begin(cluster)
        await cluster.settled()
        keys = [cluster.key_of(shard) for shard in range(3)]
        lost: list[str] = []
        asked: list[tuple[str, bool]] = []
        decision = coordinator.Coordinator.decision

        async def heard(self: Any, transaction: str, deadline_s: float) -> Any:
            asked.append((transaction, transaction in self._shard.machine.coordinated))
            return await decision(self, transaction, deadline_s)

        class Network:
            """Shard 1 cannot prepare, and no decision reaches shard 2."""

            def __init__(self, shards: Any) -> None:
                self._shards = shards

            async def call(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Any:
                if (shard, function) == (1, "prepare"):
                    # Not before the other has its locks, so that it is told after that.
                    await until(lambda: bool(participant.prepared))
                    raise Unavailable("lost")
                if (shard, function) == (2, "decide"):
                    lost.append(args[0])
                    raise Unavailable("lost")
                return await self._shards.call(shard, function, args, deadline_s)

        monkeypatch.setattr(coordinator.Coordinator, "decision", heard)
        participant = cluster.machine(cluster.primary(2), 2)
        driver = cluster.services[cluster.primary(0)]._shards[0].coordinator
        driver._shards = Network(driver._shards)
        with pytest.raises(Unavailable):
            await db.commit([], [put(key, "aborted") for key in keys])
        await until(lambda: all(cluster.services[n].statistics()["coordinated"] == 0 for n in cluster.running))
        assert participant.prepared, "nothing has reached it"
        await until(lambda: not participant.prepared)
        assert asked == [(lost[0], False)], "the coordinator did not know it any more"
        assert len(lost) == 1
        await db.commit([], [put(keys[2], "mine")])
        assert [(await db.get("t", key)).value for key in keys] == [None, None, "mine"]

    play(scenario)

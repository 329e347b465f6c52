"""The coordinator of one shard alone: telling decisions, and asking for them. The other shards are a function."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import GoStoreError, Timeout, Unavailable
from gostore.core.values import pack
from gostore.env import Env
from gostore.services.db import coordinator
from gostore.services.db.coordinator import TELLERS_MAX, Coordinator
from gostore.services.db.machine import ShardMachine
from gostore.sim.world import World

from .bed import until

Answer = Callable[[int, str, list[Any]], Awaitable[Any]]


class Shard:
    """Number 0: what is proposed is applied at once."""

    number = 0

    def __init__(self, env: Env, answer: Answer) -> None:
        self.machine = ShardMachine(0, 1 << 20)
        self.replication = SimpleNamespace(role="primary", status=lambda: SimpleNamespace(generation=1))
        self.coordinator = Coordinator(env, self, self)  # type: ignore[arg-type]
        self._answer = answer
        self.refuse: Callable[[list[Any]], GoStoreError | None] = lambda command: None
        """What a proposal fails with, without having been applied."""

    def apply(self, *command: Any) -> Any:
        outcome = self.machine.apply(list(command), self.machine.applied + 1)
        if command[0] in ("decide", "begin", "prepare"):
            self.coordinator.notice(command[0], command[1], outcome)
        return outcome

    async def propose(self, command: list[Any], deadline_s: float) -> Any:
        error = self.refuse(command)
        if error is not None:
            raise error
        return self.apply(*command)

    async def call(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Any:
        return await self._answer(shard, function, args)

    async def commit(self, number: int, *, repeated: bool = False) -> Any:
        """A transaction of its own of this shard and shard 1, with a request id of its own."""
        request = ["me", number, repeated]
        parts = [[0, [], [write(f"k{number}")]], [1, [], [write(f"k{number}")]]]
        return await self.coordinator.coordinate(request, parts, asyncio.get_running_loop().time() + 10)


class Other:
    """Shard 1: it prepares whatever it is asked to, if it ``votes``, and executes decisions, if it ``hears`` them."""

    def __init__(self) -> None:
        self.votes = self.hears = True
        self.told: list[tuple[str, bool]] = []
        self.telling = self.telling_most = 0

    async def answer(self, number: int, function: str, args: list[Any]) -> Any:
        if function == "prepare":
            if not self.votes:
                raise Unavailable("no majority")
            return ["ok", 1]
        self.told.append((args[0], args[1]))
        self.telling += 1
        self.telling_most = max(self.telling_most, self.telling)
        await asyncio.sleep(0.01)
        self.telling -= 1
        if not self.hears:
            raise Unavailable("no majority")
        return ["decided", args[1], 5]


class Lead:
    """Lost by :meth:`lose`, and won again right after the role was looked at ``looks`` times."""

    def __init__(self, looks: int, won: Callable[[], None]) -> None:
        self.lost = False
        self._looks = looks
        self._won = won

    def lose(self) -> None:
        self.lost = True
        if not self._looks:
            asyncio.get_running_loop().call_soon(self._win)

    @property
    def role(self) -> str:
        if not self.lost:
            return "primary"
        self._looks -= 1
        if not self._looks:
            asyncio.get_running_loop().call_soon(self._win)
        return "backup"

    def _win(self) -> None:
        self.lost = False
        self._won()


def write(key: str) -> list[Any]:
    return ["set", "c", key, [], pack(key, 100)]


def run(scenario: Callable[[Env], Awaitable[None]]) -> None:
    with World(1) as world:
        node = world.add_node("n0")

        async def main() -> None:
            await scenario(node.env)

        world.run(main(), on="n0", timeout_s=300.0)
        assert not node.env.tasks.failed


@pytest.mark.parametrize("looks", [0, 1])
def test_a_lead_that_is_lost_and_won_while_a_decision_is_told_ends_what_it_began(looks: int) -> None:
    """The one that tells it has given up, or does so in this moment; whoever begins again must not rely on it."""

    async def scenario(env: Env) -> None:
        told: list[int] = []

        async def answer(number: int, function: str, args: list[Any]) -> Any:
            told.append(number)
            if told == [1]:
                lead.lose()
                raise Unavailable("not now")
            return ["decided", True, 5]

        shard = Shard(env, answer)
        lead = Lead(looks, shard.coordinator.serving)
        shard.replication = lead  # type: ignore[assignment]
        _, transaction = shard.apply("begin", None, [], [write("k")], [1], 1)
        shard.apply("decide", transaction, True)
        shard.coordinator.serving()
        await until(lambda: not shard.machine.coordinated)
        assert told == [1, 1]

    run(scenario)


def test_who_was_told_already_is_not_told_again() -> None:
    async def scenario(env: Env) -> None:
        told: list[int] = []

        async def answer(number: int, function: str, args: list[Any]) -> Any:
            told.append(number)
            if told.count(1) == 1 and number == 1:
                lead.lose()
                raise Unavailable("not now")
            return ["decided", True, 10 + number]

        shard = Shard(env, answer)
        lead = Lead(1, shard.coordinator.serving)
        shard.replication = lead  # type: ignore[assignment]
        _, transaction = shard.apply("begin", None, [], [write("k")], [1, 2], 1)
        shard.apply("decide", transaction, True)
        telling = shard.coordinator._finish(transaction)
        await until(lambda: not shard.machine.coordinated)
        assert telling is not None
        assert (telling.versions, told.count(1), told.count(2)) == ({1: 11, 2: 12}, 2, 1)

    run(scenario)


def test_a_coordinator_that_does_not_answer_delays_no_other_doubt() -> None:
    """Neither those of the same round, nor those that come later."""

    async def scenario(env: Env) -> None:
        asked: list[int] = []

        async def answer(number: int, function: str, args: list[Any]) -> Any:
            asked.append(number)
            if number == 7:
                await asyncio.Event().wait()
            return ["decided", True, 1]

        shard = Shard(env, answer)
        for number in (7, 8):
            shard.apply("prepare", f"{number}.1.1", number, [], [write(f"k{number}")])
        await until(lambda: 7 in asked and "8.1.1" not in shard.machine.prepared)
        shard.apply("prepare", "9.1.1", 9, [], [write("k9")])
        await until(lambda: list(shard.machine.prepared) == ["7.1.1"])
        assert asked.count(7) == 1, "one question at a time"

    run(scenario)


def test_an_abort_is_told_once_and_forgotten_by_a_coordinator_whose_participant_does_not_answer() -> None:
    async def scenario(env: Env) -> None:
        other = Other()
        other.votes = other.hears = False
        shard = Shard(env, other.answer)
        before = len(env.tasks)
        outcomes = await asyncio.gather(*(shard.commit(number) for number in range(10 * TELLERS_MAX)))
        assert all(outcome == "error" for (outcome, *_), _ in outcomes)
        await until(lambda: not shard.machine.coordinated and len(env.tasks) == before)
        assert 1 <= other.telling_most <= TELLERS_MAX
        assert len(set(other.told)) == len(other.told), "one attempt"
        assert not shard.machine.prepared

    run(scenario)


def test_an_abort_that_a_predecessor_left_is_forgotten_too() -> None:
    async def scenario(env: Env) -> None:
        other = Other()
        other.hears = False
        shard = Shard(env, other.answer)
        before = len(env.tasks)
        _, decided = shard.apply("begin", None, [], [write("a")], [1], 1)
        shard.apply("decide", decided, False)
        _, pending = shard.apply("begin", None, [], [write("b")], [1], 1)
        shard.coordinator.serving()
        await until(lambda: not shard.machine.coordinated and len(env.tasks) == before)
        assert sorted(other.told) == [(decided, False), (pending, False)]
        assert await shard.coordinator.decision(decided, 0.0) == ["decided", False, 0]

    run(scenario)


def test_a_shard_that_does_not_answer_is_told_by_one_task_until_it_does() -> None:
    async def scenario(env: Env) -> None:
        other = Other()
        other.hears = False
        shard = Shard(env, other.answer)
        count = 10 * TELLERS_MAX
        commits = [asyncio.ensure_future(shard.commit(number)) for number in range(count)]
        await until(lambda: len(other.told) > TELLERS_MAX)
        assert other.telling_most <= TELLERS_MAX
        other.telling_most = 0
        seen = len(other.told)
        await until(lambda: len(other.told) > seen + 3)
        assert other.telling_most == 1
        assert len(shard.machine.coordinated) == count, "whoever committed is not forgotten"
        other.hears = True
        await until(lambda: not shard.machine.coordinated)
        assert 1 < other.telling_most <= TELLERS_MAX
        assert all(
            (outcome, versions[1:]) == ("ok", [[1, 5]]) for (outcome, _), versions in await asyncio.gather(*commits)
        )

    run(scenario)


def test_more_than_so_many_transactions_that_have_not_ended_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "COORDINATED_MAX", 5)

    async def scenario(env: Env) -> None:
        other = Other()
        other.hears = False
        shard = Shard(env, other.answer)
        commits = [asyncio.ensure_future(shard.commit(number)) for number in range(8)]
        await until(lambda: len(shard.machine.coordinated) == 5 and all(commit.done() for commit in commits[5:]))
        for commit in commits[5:]:
            with pytest.raises(Unavailable, match="bring back the nodes") as refused:
                await commit
            assert refused.value.definite
        await until(lambda: not shard.machine.prepared)
        assert (await shard.commit(0, repeated=True))[0][0] == "ok", "what has its outcome begins nothing"
        with pytest.raises(Unavailable):
            await shard.commit(6, repeated=True)
        other.hears = True
        await until(lambda: not shard.machine.coordinated)
        assert [(await commit)[0][0] for commit in commits[:5]] == ["ok"] * 5
        assert (await shard.commit(6, repeated=True))[0][0] == "ok"

    run(scenario)


def test_only_who_serves_refuses_more_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another replica holds them as well, but must say that it does not serve."""
    monkeypatch.setattr(coordinator, "COORDINATED_MAX", 1)

    async def scenario(env: Env) -> None:
        shard = Shard(env, Other().answer)
        shard.apply("begin", None, [], [write("a")], [1], 1)
        shard.replication.role = "backup"
        shard.refuse = lambda command: Unavailable("not the primary")
        with pytest.raises(Unavailable, match="not the primary"):
            await shard.commit(1)

    run(scenario)


@pytest.mark.parametrize("commit", [True, False])
def test_what_could_not_be_forgotten_is_forgotten_later(commit: bool) -> None:
    async def scenario(env: Env) -> None:
        other = Other()
        other.votes = commit
        shard = Shard(env, other.answer)
        attempts: list[str] = []
        failures = 3

        def refuse(command: list[Any]) -> GoStoreError | None:
            if command[0] == "forget":
                attempts.append(command[1])
                if len(attempts) <= failures:
                    return Timeout("the log takes nothing")
            return None

        shard.refuse = refuse
        before = len(env.tasks)
        await shard.commit(1)
        await until(lambda: not shard.machine.coordinated and len(env.tasks) == before)
        assert len(attempts) == failures + 1
        attempts.clear()
        failures = 1_000_000
        await shard.commit(2)
        await until(lambda: len(attempts) > 5)
        assert len(shard.machine.coordinated) == 1
        shard.replication.role = "backup"
        await until(lambda: len(env.tasks) == before)
        # It serves again: what it knew to have ended need not be told again.
        told = len(other.told)
        failures = 0
        shard.replication.role = "primary"
        shard.coordinator.serving()
        await until(lambda: not shard.machine.coordinated)
        assert len(other.told) == told

    run(scenario)


def test_a_decision_that_was_forgotten_though_nobody_was_told_so_is_not_forgotten_twice() -> None:
    async def scenario(env: Env) -> None:
        shard = Shard(env, Other().answer)
        attempts: list[str] = []

        def refuse(command: list[Any]) -> GoStoreError | None:
            if command[0] != "forget":
                return None
            attempts.append(command[1])
            shard.apply(*command)
            return Timeout("it took too long")

        shard.refuse = refuse
        before = len(env.tasks)
        await shard.commit(1)
        await until(lambda: bool(attempts) and len(env.tasks) == before)
        assert len(attempts) == 1

    run(scenario)


def test_a_caller_does_not_wait_for_a_coordinator_that_serves_no_more() -> None:
    """It committed; whoever serves next tells the others."""

    async def scenario(env: Env) -> None:
        other = Other()
        other.hears = False
        shard = Shard(env, other.answer)
        before = len(env.tasks)
        commit = asyncio.ensure_future(shard.commit(1))
        await until(lambda: len(other.told) > 2)
        shard.replication.role = "backup"
        assert await commit == [["ok", 2], [[0, 2]]]
        await until(lambda: len(env.tasks) == before)

    run(scenario)


def test_a_commit_that_no_other_shard_takes_part_in_is_forgotten() -> None:
    async def scenario(env: Env) -> None:
        shard = Shard(env, Other().answer)
        parts = [[0, [], [write("k")]]]
        deadline_s = asyncio.get_running_loop().time() + 10
        assert await shard.coordinator.coordinate(["me", 1, False], parts, deadline_s) == [["ok", 2], [[0, 2]]]
        await until(lambda: not shard.machine.coordinated)

    run(scenario)

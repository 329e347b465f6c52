"""The coordinator of one shard alone: telling decisions, and asking for them. The other shards are a function."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gostore.core.errors import Unavailable
from gostore.core.values import pack
from gostore.env import Env
from gostore.services.db.coordinator import Coordinator
from gostore.services.db.machine import ShardMachine
from gostore.sim.world import World

from .bed import until

Answer = Callable[[int, str, list[Any]], Awaitable[Any]]


class Shard:
    """Number 0: what is proposed is applied at once."""

    number = 0

    def __init__(self, env: Env, answer: Answer) -> None:
        self.machine = ShardMachine(0, 1 << 20)
        self.replication = SimpleNamespace(role="primary")
        self.coordinator = Coordinator(env, self, self)  # type: ignore[arg-type]
        self._answer = answer

    def apply(self, *command: Any) -> Any:
        outcome = self.machine.apply(list(command), self.machine.applied + 1)
        if command[0] in ("decide", "begin", "prepare"):
            self.coordinator.notice(command[0], command[1], outcome)
        return outcome

    async def propose(self, command: list[Any], deadline_s: float) -> Any:
        return self.apply(*command)

    async def call(self, shard: int, function: str, args: list[Any], deadline_s: float) -> Any:
        return await self._answer(shard, function, args)


class Lead:
    """Lost by ``lost = True``, and won again right after the role was looked at ``looks`` times."""

    def __init__(self, looks: int, won: Callable[[], None]) -> None:
        self.lost = False
        self._looks = looks
        self._won = won

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


@pytest.mark.parametrize("looks", [1, 2])
def test_a_lead_that_is_lost_and_won_while_a_decision_is_told_ends_what_it_began(looks: int) -> None:
    """The one that tells it has given up, or does so in this moment; whoever begins again must not rely on it."""

    async def scenario(env: Env) -> None:
        told: list[int] = []

        async def answer(number: int, function: str, args: list[Any]) -> Any:
            told.append(number)
            if told == [1]:
                lead.lost = True
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
                lead.lost = True
                raise Unavailable("not now")
            return ["decided", True, 10 + number]

        shard = Shard(env, answer)
        lead = Lead(1, shard.coordinator.serving)
        shard.replication = lead  # type: ignore[assignment]
        _, transaction = shard.apply("begin", None, [], [write("k")], [1, 2], 1)
        shard.apply("decide", transaction, True)
        versions = await shard.coordinator._finish(transaction)
        assert (versions, told.count(2)) == ({1: 11, 2: 12}, 1)

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

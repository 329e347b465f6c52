"""The nemesis: a schedule of faults drawn from a seed, as data, and the hand that carries it out in either world.

Each run enables a random subset of its profile's words ("swarm testing": Groce et al., ISSTA 2012): runs in which
everything happens at once all look alike, and some failures need the *absence* of other faults. Every schedule ends
with a heal, so that liveness can be checked as well. Being data, a schedule can be printed, replayed and made smaller.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from gostore.core.errors import BadRequest, GoStoreError
from gostore.core.ports import Rng
from gostore.faults.vocabulary import WORDS, Fault, Faults, unknown_fault

Arguments = dict[str, Any]

NETWORK: Final = ("partition", "one_way", "isolate", "delay", "loss", "duplicate", "reorder")
PROCESSES: Final = ("kill", "power_cut", "pause")
MACHINES: Final = ("slow_disk", "skew")

PROFILES: Final[dict[str, tuple[str, ...]]] = {
    "none": (),
    "crash": ("kill", "power_cut"),
    "network": NETWORK,
    # What the services of today promise to survive without a wrong answer: everything that does not make one node
    # doubt a live one for so long that two views of the cluster exist.
    "promised": ("kill", "power_cut", "loss", "delay", "duplicate", "reorder", "slow_disk", "skew"),
    "swarm": NETWORK + PROCESSES + MACHINES,
}
"""Profile -> words. Asymmetric partitions and stalled disks are in the last."""

GAP_S: Final = (0.5, 4.0)
"""Between the beginnings of two faults: uniformly from, to."""

LASTING_S: Final = (0.5, 6.0)
"""How long a fault lasts."""


@dataclass(frozen=True, slots=True)
class Step:
    """One fault: begins at ``at_s``, is undone at ``until_s`` (seconds from the start of the schedule)."""

    at_s: float
    until_s: float
    word: str
    arguments: Arguments = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.at_s:8.3f} .. {self.until_s:8.3f} s  {self.word}({arguments})"


def draw(rng: Rng, nodes: Sequence[str], seconds: float, profile: str) -> list[Step]:
    """A schedule of ``seconds``; no fault outlives it. Raises :class:`BadRequest` for an unknown profile.

    At most a minority of the nodes is down (killed, without power, paused) at a time, and no node twice at once.
    """
    if profile not in PROFILES:
        raise BadRequest(f"faults = {profile!r}: there is no such profile; there are {', '.join(PROFILES)}")
    enabled = [word for word in PROFILES[profile] if rng.random() < 0.5] or list(PROFILES[profile])
    steps: list[Step] = []
    at_s = rng.uniform(*GAP_S) if enabled else seconds
    while at_s < seconds:
        until_s = min(at_s + rng.uniform(*LASTING_S), seconds)
        word = rng.choice(enabled)
        busy = [step.arguments["node"] for step in steps if step.until_s > at_s and step.word in PROCESSES]
        arguments = _arguments(rng, word, nodes, busy)
        if arguments is not None:
            steps.append(Step(round(at_s, 3), round(until_s, 3), word, arguments))
        at_s += rng.uniform(*GAP_S)
    return steps


def _arguments(rng: Rng, word: str, nodes: Sequence[str], down: Sequence[str]) -> Arguments | None:
    """None: this word cannot be used now."""
    if word in PROCESSES:
        free = [node for node in nodes if node not in down]
        if len(down) >= max(1, (len(nodes) - 1) // 2) or len(free) < 2:
            return None
        return {"node": rng.choice(free)}
    match word:
        case "partition" | "one_way" if len(nodes) > 1:
            some = rng.sample(list(nodes), rng.randrange(1, len(nodes)))
            return {"group": sorted(some)}
        case "isolate" if len(nodes) > 1:
            return {"node": rng.choice(nodes), "direction": rng.choice(["in", "out", "both"])}
        case "delay":
            return {"delay_s": round(math.exp(rng.uniform(-6.0, -1.0)), 4), "jitter_s": round(rng.uniform(0.0, 0.1), 4)}
        case "loss" | "duplicate" | "reorder":
            return {"probability": round(rng.uniform(0.01, 0.3), 3)}
        case "slow_disk":
            return {"node": rng.choice(nodes), "sync_s": round(math.exp(rng.uniform(-5.0, 0.5)), 4)}
        case "skew":
            return {"node": rng.choice(nodes), "offset_s": round(rng.uniform(-60.0, 60.0), 3)}
    return None


def check_schedule(schedule: Sequence[Step], nodes: Collection[str]) -> None:
    """Raises :class:`BadRequest` that names the step with an unknown word, an unknown node or a wrong argument."""
    for step in schedule:
        try:
            _check_step(step, nodes)
        except (GoStoreError, TypeError) as error:
            raise BadRequest(f"step `{str(step).strip()}`: {error}") from None


def _check_step(step: Step, nodes: Collection[str]) -> None:
    if not 0.0 <= step.at_s <= step.until_s:
        raise BadRequest("it must begin at 0 or later and end after it has begun")
    if step.word in ("partition", "one_way"):
        if list(step.arguments) != ["group"]:
            raise BadRequest("its one argument is `group`, the nodes of one side")
    elif step.word in WORDS:
        inspect.signature(getattr(Faults, step.word)).bind(None, **step.arguments)
    else:
        raise unknown_fault(step.word)
    named = step.arguments.get("group", [step.arguments["node"]] if "node" in step.arguments else [])
    for name in named:
        if name not in nodes:
            raise BadRequest(f"there is no node {name!r}; there are {', '.join(nodes)}")


class Target(Protocol):
    """What is needed of a testbed."""

    @property
    def faults(self) -> Faults: ...
    @property
    def nodes(self) -> Any: ...


class Nemesis:
    """Carries a schedule out. Run it where the testbed's coroutines run (in the simulation: inside the world).

    Raises :class:`BadRequest` for a schedule that cannot be carried out (see :func:`check_schedule`).
    """

    def __init__(self, target: Target, schedule: Sequence[Step]) -> None:
        check_schedule(schedule, target.nodes)
        self._target = target
        self._schedule = sorted(schedule, key=lambda step: (step.at_s, step.until_s, step.word))
        self._links: dict[int, Fault] = {}
        self.done: dict[str, int] = {}
        """Word -> how often it was carried out."""

    async def run(self, seconds: float) -> None:
        """From now on for ``seconds``; then everything is healed."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        moments = [(step.at_s, index, True) for index, step in enumerate(self._schedule)]
        moments += [(step.until_s, index, False) for index, step in enumerate(self._schedule)]
        for at_s, index, begins in sorted(moments):
            await asyncio.sleep(max(0.0, begun_s + min(at_s, seconds) - loop.time()))
            if at_s >= seconds and begins:
                continue
            await (self._begin if begins else self._end)(index, self._schedule[index])
        await asyncio.sleep(max(0.0, begun_s + seconds - loop.time()))
        await self.heal()

    async def _begin(self, index: int, step: Step) -> None:
        faults, arguments = self._target.faults, step.arguments
        try:
            match step.word:
                case "partition" | "one_way":
                    one_way = step.word == "one_way"
                    self._links[index] = await faults.partition(arguments["group"], one_way=one_way)
                case "isolate" | "delay" | "loss" | "duplicate" | "reorder":
                    self._links[index] = await getattr(faults, step.word)(**arguments)
                case _:
                    await getattr(faults, step.word)(**arguments)
        except BadRequest:
            return  # the node is in no state for it, as when it has ended by itself
        self.done[step.word] = self.done.get(step.word, 0) + 1

    async def _end(self, index: int, step: Step) -> None:
        if index in self._links:
            await self._target.faults.heal(self._links.pop(index))
            return
        match step.word:
            case "kill" | "power_cut" | "pause":
                await self._revive(step.arguments["node"])
            case "slow_disk":
                await self._target.faults.slow_disk(step.arguments["node"], 0.0)

    async def heal(self) -> None:
        """Undo everything that is in force: links, stopped nodes, slow disks."""
        await self._target.faults.heal()
        self._links.clear()
        for step in self._schedule:
            if step.word == "slow_disk":
                await self._target.faults.slow_disk(step.arguments["node"], 0.0)
        for name in self._target.nodes:
            await self._revive(name)

    async def _revive(self, name: str) -> None:
        life = str(self._target.nodes[name].life)
        try:
            if life == "paused":
                await self._target.faults.resume(name)
            elif life in ("killed", "crashed", "stopped"):
                await self._target.faults.restart(name)
        except GoStoreError as error:
            raise type(error)(f"{name} does not come back: {error.message}", definite=error.definite) from error

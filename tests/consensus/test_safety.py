"""The safety properties of Raft after every step in a hostile world, and progress after the heal.

Hypothesis drives it step by step (then a failure shrinks), and seeds drive it for long.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from .storms import (
    NAMES,
    Node,
    World,
    run,
)

SEEDS = 40
STEPS_EACH = 700

INTERESTING = {
    "elections won": 150,
    "truncations": 25,
    "crashes with loss": 25,
    "snapshots installed": 12,
    "compactions": 50,
    "changes applied": 200,
    "changes refused": 100,
    "reads answered": 150,
    "reads failed": 100,
    "reads forwarded": 200,
    "old entries read": 1000,
    "proposals": 1500,
    "proposals to the deposed": 8,
    "AppendReject": 500,
    "TimeoutNow": 20,
    "Stale": 50,
    "quiet heartbeats": 80,
    "quiet at the end": SEEDS,
}
"""What all the random worlds together must have seen at least."""


def test_random_worlds_are_safe_and_recover() -> None:
    total: Counter[str] = Counter()
    for seed in range(SEEDS):
        try:
            total += run(seed, STEPS_EACH)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {STEPS_EACH} steps: {error!r}") from error
    missing = {what: (total[what], least) for what, least in INTERESTING.items() if total[what] < least}
    assert not missing, f"too little happened: (seen, expected) {missing}"


def test_the_same_seed_gives_the_same_run() -> None:
    assert run(7, 300) == run(7, 300)


class Machine(RuleBasedStateMachine):
    """Hypothesis chooses every step, and shrinks what fails."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(0)
        first = self.world.nodes["n1"]
        first.raft.campaign(self.world.now_s)
        first.work()

    names = st.sampled_from(NAMES)

    def live(self, name: str) -> Node:
        """This node, or the next one that is up."""
        order = NAMES[NAMES.index(name) :] + NAMES
        return next(self.world.nodes[each] for each in order if self.world.nodes[each].up)

    def leader_or(self, name: str) -> Node:
        return self.world.leader() or self.live(name)

    @rule(places=st.lists(st.integers(0, 1 << 16), min_size=1, max_size=8), keep=st.booleans())
    def deliver(self, places: list[int], keep: bool) -> None:
        for place in places:
            if self.world.flying:
                self.world.deliver(place % len(self.world.flying), keep=keep)

    @precondition(lambda self: self.world.flying)
    @rule(place=st.integers(0, 1 << 16))
    def lose(self, place: int) -> None:
        self.world.flying.pop(place % len(self.world.flying))

    @rule(seconds=st.sampled_from((0.01, 0.2, 0.5, 1.0, 2.0)))
    def time(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule(name=names, count=st.integers(1, 4))
    def sync(self, name: str, count: int) -> None:
        self.live(name).sync(count)

    @rule()
    def sync_all(self) -> None:
        for node in self.world.nodes.values():
            if node.up:
                node.sync(len(node.waiting))

    @rule(name=names, payloads=st.lists(st.binary(max_size=30), min_size=1, max_size=3))
    def propose(self, name: str, payloads: list[bytes]) -> None:
        node = self.leader_or(name)
        node.propose(payloads)
        node.work()

    @rule(name=names)
    def read(self, name: str) -> None:
        node = self.live(name)
        node.read()
        node.work()

    @rule(name=names)
    def compact(self, name: str) -> None:
        self.live(name).compact()

    @precondition(lambda self: sum(node.up for node in self.world.nodes.values()) > 1)
    @rule(name=names, kept=st.integers(0, 8))
    def crash(self, name: str, kept: int) -> None:
        node = self.live(name)
        node.crash(min(kept, len(node.unsynced)))

    @rule(name=names)
    def start(self, name: str) -> None:
        node = self.world.nodes[name]
        if not node.up:
            node.start()
            node.work()

    @rule(
        name=names,
        voters=st.lists(names, unique=True, min_size=1, max_size=4),
        learners=st.lists(names, unique=True, max_size=3),
    )
    def change(self, name: str, voters: list[str], learners: list[str]) -> None:
        node = self.leader_or(name)
        node.change(tuple(voters), tuple(each for each in learners if each not in voters))
        node.work()

    @rule(name=names, to=names)
    def transfer(self, name: str, to: str) -> None:
        node = self.leader_or(name)
        node.transfer(to)
        node.work()

    @rule(name=names, suspected=st.booleans())
    def wake(self, name: str, suspected: bool) -> None:
        node = self.live(name)
        node.raft.wake(self.world.now_s, leader_suspected=suspected)
        if suspected:
            node.raft.campaign(self.world.now_s)
        node.work()

    @rule(source=names, to=names)
    def cut(self, source: str, to: str) -> None:
        self.world.cut[source, to] = True

    @rule()
    def mend(self) -> None:
        self.world.cut.clear()

    @rule(seconds=st.sampled_from((0.3, 1.0, 3.0)))
    def calm(self, seconds: float) -> None:
        self.world.settle(seconds)

    def teardown(self) -> None:
        self.world.check_progress()


def test_any_steps_are_safe() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=60, deadline=None))

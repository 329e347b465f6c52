"""The rules by which a new primary takes over, against a model of replicas that crash, lag and come back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.services.db.entries import Configuration, Point, Promise, remember
from gostore.services.db.recovery import Report, answers_needed, judge, start_quorum

NODES = ["a", "b", "c", "d", "e"]


def report(
    index: int = 0, term: int = 0, members: str = "", promise: tuple[int, str, int] | None = None, copies_min: int = 2
) -> Report:
    configuration = Configuration(tuple(members), copies_min, index, term) if members else None
    made = () if promise is None else (Promise(promise[0], promise[1][0], tuple(promise[1]), promise[2]),)
    return Report(Point(index, term), configuration, made)


def test_a_shard_that_nobody_knows_is_new_when_everybody_says_so() -> None:
    reports = {name: report() for name in "ab"}
    assert judge("a", reports, "abc", 5).waits == ("c",)
    assert judge("a", {**reports, "c": report()}, "abc", 5).virgin


def test_the_most_advanced_member_is_the_source() -> None:
    reports = {"a": report(7, 3, "abc"), "b": report(9, 3, "abc"), "d": report(99, 2, "def")}
    assert judge("d", reports, NODES, 5).source == "b"
    assert judge("d", {**reports, "c": report(8, 4, "abc")}, NODES, 5).source == "c", "a later term wins"
    reports = {"a": report(7, 3, "abc"), "b": report(7, 3, "abc")}
    assert judge("a", reports, NODES, 5).source == "a", "its own log needs no copying"
    assert judge("b", reports, NODES, 5).source == "b"


def test_who_is_no_member_is_no_source() -> None:
    """It was being copied to, and may lack what was acknowledged."""
    reports = {"d": report(9, 3, "abc"), "a": report(8, 3, "abc"), "b": report(8, 3, "abc")}
    assert judge("d", reports, NODES, 5).source in "ab"


def test_too_few_members() -> None:
    verdict = judge("a", {"a": report(7, 3, "abc")}, NODES, 5)
    assert verdict.waits == ("b", "c")
    assert "2 of its replicas a, b, c" in verdict.why
    assert judge("a", {"a": report(7, 3, "ab")}, NODES, 5).waits == ("b",)
    assert judge("a", {"a": report(7, 3, "ab")}, "ab", 5).source == "a", "there is no third"


def test_who_left_for_good_is_not_waited_for() -> None:
    assert judge("a", {"a": report(7, 3, "abc"), "d": report()}, "abde", 5).waits == ("b", "c")
    assert judge("a", {"a": report(7, 3, "abc"), "d": report()}, "ade", 5).source == "a"
    reports = {"a": report(7, 3, "abc", (5, "cde", 2)), "b": report(7, 3, "abc")}
    assert judge("a", reports, "abe", 6).source == "a"


def test_a_generation_that_may_have_begun_elsewhere() -> None:
    reports = {"a": report(7, 3, "abc", (5, "cde", 2)), "b": report(7, 3, "abc")}
    verdict = judge("a", reports, NODES, 6)
    assert verdict.waits == ("c", "d", "e")
    assert "generation 5 may have begun" in verdict.why
    reports |= {"c": report(7, 3, "abc"), "d": report()}
    assert judge("a", reports, NODES, 6).source == "a", "of c, d, e only one can have begun, and that needs two"


@pytest.mark.parametrize(
    ("planned", "copies_min", "quorum"), [(1, 2, 1), (2, 2, 2), (3, 2, 2), (3, 3, 3), (4, 2, 3), (5, 2, 3), (5, 1, 3)]
)
def test_quorums(planned: int, copies_min: int, quorum: int) -> None:
    assert start_quorum(planned, copies_min) == quorum
    assert answers_needed(planned, 5) == planned // 2 + 1


@dataclass
class Node:
    """A replica of the model. Entries are (term, members or a value)."""

    log: list[tuple[int, Any]] = field(default_factory=list)
    promises: tuple[Promise, ...] = ()

    def report(self) -> Report:
        last = Point(len(self.log), self.log[-1][0] if self.log else 0)
        found = [
            Configuration(what, 2, index, term) for index, (term, what) in enumerate(self.log, 1) if type(what) is tuple
        ]
        return Report(last, found[-1] if found else None, self.promises)


class Model:
    """One shard, one epoch after the other. Whatever fails, what was acknowledged must be in every log taken over."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nodes = {name: Node() for name in NODES}
        self.acknowledged: list[int] = []
        self.values = 0
        self.begun = 0

    def some(self, names: list[str], least: int = 0) -> list[str]:
        return self.rng.sample(names, self.rng.randint(min(least, len(names)), len(names)))

    def epoch(self, generation: int) -> None:
        up = self.some(NODES, self.rng.choice([1, 3, 4, 4, 5]))
        planned = tuple(self.rng.sample(up, min(3, len(up))))
        primary = planned[0]
        quorum = start_quorum(len(planned), 2)
        promise = Promise(generation, primary, planned, quorum)
        # Who hears the question promises, even when the answer is lost.
        reports = {}
        for name in dict.fromkeys([primary, *self.some(up, len(up) - self.rng.randrange(2))]):
            answer = self.nodes[name].report()
            self.nodes[name].promises = remember(self.nodes[name].promises, promise)
            if name == primary or self.rng.random() < 0.8:
                reports[name] = answer
        verdict = judge(primary, reports, NODES, generation)
        if verdict.waits:
            return
        log = [] if verdict.virgin else list(self.nodes[str(verdict.source)].log)
        self.check(log)
        self.nodes[primary].log = list(log)
        self.begin(primary, planned, quorum, generation, log)

    def check(self, log: list[tuple[int, Any]]) -> None:
        values = [what for _, what in log if type(what) is int]
        missing = [value for value in self.acknowledged if value not in values]
        assert not missing, (missing, log)

    def begin(
        self, primary: str, planned: tuple[str, ...], quorum: int, generation: int, log: list[tuple[int, Any]]
    ) -> None:
        """The configuration entry, and writes; each step may be the last one."""
        followers = [name for name in planned if name != primary]
        members = [primary, *self.rng.sample(followers, self.rng.randint(quorum - 1, len(followers)))]
        for name in members:
            self.follow(name, primary)
            self.nodes[name].log = list(log)
            if self.rng.random() < 0.03:
                return
        if not self.append(members, (generation, tuple(members))):
            return
        self.begun += 1
        for _ in range(self.rng.randrange(4)):
            lacking = [name for name in planned if name not in members]
            if lacking and self.rng.random() < 0.4:
                newcomer = self.rng.choice(lacking)
                self.follow(newcomer, primary)
                # It may get any part of what it lacks before it fails.
                whole = self.nodes[primary].log
                self.nodes[newcomer].log = whole[: self.rng.randint(len(log), len(whole))]
                if len(self.nodes[newcomer].log) < len(whole):
                    continue
                members.append(newcomer)
                if not self.append(members, (generation, tuple(members))):
                    return
                continue
            if len(members) < 2:
                continue  # too few copies for a write
            self.values += 1
            if not self.append(members, (generation, self.values)):
                return
            self.acknowledged.append(self.values)
        if sorted(members) == sorted(planned):
            for name in self.some([name for name in NODES if name not in planned]):
                self.follow(name, primary)
                self.nodes[name].log = []

    def follow(self, name: str, primary: str) -> None:
        promise = self.nodes[primary].promises[-1]
        if self.nodes[name].promises[-1:] != (promise,):
            self.nodes[name].promises = remember(self.nodes[name].promises, promise)

    def append(self, members: list[str], entry: tuple[int, Any]) -> bool:
        """Acknowledged when all members have it; it may reach some only."""
        reached = members if self.rng.random() < 0.85 else self.some(members)
        for name in reached:
            self.nodes[name].log.append(entry)
        return len(reached) == len(members)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 40))
def test_what_was_acknowledged_is_in_every_log_that_is_taken_over(seed: int) -> None:
    model = Model(seed)
    for generation in range(1, 40):
        model.epoch(generation)


def test_the_model_makes_progress() -> None:
    models = [Model(seed) for seed in range(50)]
    for model in models:
        for generation in range(1, 40):
            model.epoch(generation)
    assert sum(model.begun for model in models) > 300
    assert sum(len(model.acknowledged) for model in models) > 300

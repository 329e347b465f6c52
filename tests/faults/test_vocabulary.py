"""The words, their arguments, and what each link suffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.client.thread import client_thread
from gostore.core.errors import BadRequest, NotSupported
from gostore.faults import NO_FAULT, Faults, Link, LinkFault


class Recorded(Faults):
    """A world that does what it is told, and notes it."""

    def __init__(self, *names: str) -> None:
        super().__init__(
            client_thread(), lambda: names, lambda kind, arguments: self.events.append((kind, dict(arguments)))
        )
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.applied: dict[Link, LinkFault] = {}
        self.lives: list[tuple[str, str]] = []

    async def _set_links(self, changed: Mapping[Link, LinkFault]) -> None:
        self.applied.update(changed)
        self.applied = {link: effect for link, effect in self.applied.items() if effect != NO_FAULT}

    async def _kill(self, name: str) -> None:
        self.lives.append(("kill", name))

    async def _restart(self, name: str) -> None:
        self.lives.append(("restart", name))

    async def _pause(self, name: str) -> None:
        self.lives.append(("pause", name))

    async def _resume(self, name: str) -> None:
        self.lives.append(("resume", name))

    async def _skew(self, name: str, offset_s: float, drift: float) -> None:
        self.lives.append((f"skew {offset_s} {drift}", name))

    def _check(self, word: str, name: str) -> None:
        if ("kill", name) in self.lives:
            raise BadRequest(f"{word}: {name} is dead")


def cut(faults: Recorded) -> str:
    return " ".join(f"{a}{b}" for (a, b), effect in sorted(faults.applied.items()) if effect.drop == 1.0)


@pytest.fixture
def faults() -> Recorded:
    return Recorded("a", "b", "c")


def test_partition_cuts_both_ways_between_groups(faults: Recorded) -> None:
    faults.partition_sync(["a"], ["b", "c"])
    assert cut(faults) == "ab ac ba ca"
    assert faults.events == [("partition", {"groups": [["a"], ["b", "c"]]})]


def test_partition_with_one_group_is_against_all_others(faults: Recorded) -> None:
    faults.partition_sync("b")
    assert cut(faults) == "ab ba bc cb"


def test_partition_may_leave_nodes_connected_to_both_sides(faults: Recorded) -> None:
    faults.partition_sync("a", "b")
    assert cut(faults) == "ab ba"


def test_a_one_way_partition_loses_what_the_first_group_sends(faults: Recorded) -> None:
    faults.partition_sync("a", one_way=True)
    assert cut(faults) == "ab ac"


@pytest.mark.parametrize(("direction", "expected"), [("both", "ab ac ba ca"), ("out", "ab ac"), ("in", "ba ca")])
def test_isolate(faults: Recorded, direction: str, expected: str) -> None:
    faults.isolate_sync("a", direction=direction)
    assert cut(faults) == expected


def test_faults_add_up_and_heal_one_by_one(faults: Recorded) -> None:
    slow = faults.delay_sync(0.1, jitter_s=0.05, source="a")
    more = faults.delay_sync(0.2, source="a", target="b")
    faults.loss_sync(0.5, target="b")
    faults.loss_sync(0.5, source="a", target="b")
    assert faults.applied["a", "b"] == LinkFault(drop=0.75, delay_s=pytest.approx(0.3), jitter_s=0.05)
    assert faults.applied["a", "c"] == LinkFault(delay_s=0.1, jitter_s=0.05)
    assert faults.applied["c", "b"] == LinkFault(drop=0.5)
    faults.heal_sync(more)
    faults.heal_sync(more)  # again: nothing happens
    assert faults.applied["a", "b"] == LinkFault(drop=0.75, delay_s=0.1, jitter_s=0.05)
    faults.heal_sync(slow)
    assert ("a", "c") not in faults.applied
    faults.heal_sync()
    assert faults.applied == {}
    assert [kind for kind, _ in faults.events] == ["delay", "delay", "loss", "loss", "heal", "heal", "heal"]


def test_duplicate_and_reorder_concern_every_link_by_default(faults: Recorded) -> None:
    faults.duplicate_sync(0.1)
    faults.reorder_sync(0.2)
    assert set(faults.applied.values()) == {LinkFault(duplicate=0.1, reorder=0.2)}
    assert len(faults.applied) == 6


@pytest.mark.parametrize(
    ("word", "arguments", "keywords", "message"),
    [
        ("partition", (), {}, "partition needs groups"),
        ("partition", (["a"], ["a", "b"]), {}, "a is in two groups"),
        ("partition", (["a", "b", "c"],), {}, "a group is empty"),
        ("partition", (["d"],), {}, "there is no node 'd'; there are a, b, c"),
        ("isolate", ("d",), {}, "there is no node 'd'"),
        ("isolate", (3,), {}, "there is no node 3"),
        ("isolate", ("a",), {"direction": "up"}, "direction = 'up': allowed are out, in, both"),
        ("loss", (1.5,), {}, "probability = 1.5: allowed are values from 0 to 1"),
        ("loss", ("half",), {}, "probability = 'half'"),
        ("delay", (-1,), {}, "delay_s = -1: allowed are 0 to 60 seconds"),
        ("delay", (1, 61), {}, "jitter_s = 61"),
        ("delay", (1,), {"source": "d"}, "there is no node 'd'"),
        ("kill", ("d",), {}, "there is no node 'd'"),
        ("slow_disk", ("a", -1), {}, "sync_s = -1"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_happens(
    faults: Recorded, word: str, arguments: tuple[Any, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        getattr(faults, f"{word}_sync")(*arguments, **keywords)
    assert (faults.events, faults.applied, faults.active) == ([], {}, ())


def test_lives_are_events_and_a_word_that_does_not_fit_is_none(faults: Recorded) -> None:
    for word in ("pause", "resume", "restart", "kill"):
        getattr(faults, f"{word}_sync")("a")
    with pytest.raises(BadRequest, match="pause: a is dead"):
        faults.pause_sync("a")
    assert faults.lives == [("pause", "a"), ("resume", "a"), ("restart", "a"), ("kill", "a")]
    assert faults.events == [(word, {"node": "a"}) for word, _ in faults.lives]


def test_a_world_says_what_it_cannot_do(faults: Recorded) -> None:
    with pytest.raises(NotSupported, match="faults.power_cut: this world cannot do that"):
        faults.power_cut_sync("a")
    faults.skew_sync("a", 2.0, drift=0.1)
    assert faults.lives == [("skew 2.0 0.1", "a")]
    assert faults.events == [("skew", {"node": "a", "offset_s": 2.0, "drift": 0.1})]


fault_lists = st.lists(
    st.tuples(st.sampled_from(("partition", "isolate", "delay", "loss")), st.sampled_from("abc"), st.booleans()),
    max_size=8,
)


@given(fault_lists)
def test_what_was_applied_is_always_what_is_in_force(steps: list[tuple[str, str, bool]]) -> None:
    faults = Recorded("a", "b", "c")
    for word, node, heals in steps:
        if word in ("partition", "isolate"):
            getattr(faults, f"{word}_sync")(node)
        else:
            getattr(faults, f"{word}_sync")(0.5, source=node)
        if heals:
            faults.heal_sync(faults.active[0])
        assert faults.applied == faults.links()
    faults.heal_sync()
    assert faults.applied == {} == faults.links()

"""Many failure detectors together: they agree, and accuse nobody wrongly; the classical mistakes are found."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.services.cls.swim import (
    ALIVE,
    DEAD,
    PROFILES,
    SUSPECT,
    Died,
    Rumour,
    Send,
    Suspected,
    Swim,
)

from .detectors import FAST, Network


@pytest.mark.parametrize("count", [2, 5, 20, 60])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_crash_all_survivors_agree(count: int, seed: int) -> None:
    network = Network(count, seed, loss=0.05)
    network.run(3.0)
    victim = network.rng.choice(list(network.swims))
    network.down[victim] = None
    crashed_s = network.now_s
    network.run(30.0, until=lambda: len(network.think(DEAD, victim)) == count - 1)
    assert network.think(DEAD, victim) == [name for name in network.swims if name != victim]
    # Formula of Tunables, with room for loss: some round of probes, the suspicion, the spreading of the rumour.
    assert network.now_s - crashed_s < FAST.suspicion_s(count) + 12 * FAST.period_s
    assert [entry for entry in network.of_kind(Died) if entry[2].name != victim] == []  # type: ignore[attr-defined]


def false_deaths(swim: type[Swim], loss: float, seeds: range, seconds: float = 30.0) -> int:
    total = 0
    for seed in seeds:
        network = Network(8, seed, swim, loss)
        network.run(seconds)
        total += len(network.of_kind(Died))
    return total


def test_moderate_loss_kills_nobody() -> None:
    assert false_deaths(Swim, 0.10, range(6)) == 0


class WithoutIncarnation(Swim):
    """The classical mistake: who is suspected cannot say "but this was later"."""

    def hear(self, rumour: Rumour, now_s: float) -> list[object]:  # type: ignore[override]
        before = self.incarnation
        effects = super().hear(replace(rumour, incarnation=1), now_s)
        self.incarnation = before
        # It must not say so either, or each answer would make it say so again.
        return [effect for effect in effects if not isinstance(effect, Send)]


class WithoutSuspicion(Swim):
    """One failed probe kills."""

    def _suspect(self, peer, incarnation, by, now_s):  # type: ignore[no-untyped-def]
        effects = super()._suspect(peer, incarnation, by, now_s)
        return [*effects, *(Died(peer.name, incarnation) for _ in effects)]


class WithoutHelp(WithoutSuspicion):
    def _probe_indirectly(self, probe):  # type: ignore[no-untyped-def]
        return []


@pytest.mark.parametrize("mistake", [WithoutIncarnation, WithoutSuspicion])
def test_the_simulation_finds_the_classical_mistakes(mistake: type[Swim]) -> None:
    assert false_deaths(mistake, 0.25, range(6)) > 0


class WithoutWord(Swim):
    """Suspicions and refutations wait for the next probe."""

    def _announce(self, about):  # type: ignore[no-untyped-def]
        return []


def test_saying_so_at_once_makes_mistakes_rarer() -> None:
    waiting, at_once = (false_deaths(swim, 0.30, range(6)) for swim in (WithoutWord, Swim))
    assert at_once < waiting / 2


def test_who_joined_after_a_refutation_accuses_the_right_incarnation() -> None:
    """It knows the incarnation that the master admitted; its accusation of that one would count nowhere."""
    network = Network(5, 1)
    network.run(1.0)
    network.perform("n0", network.swims["n0"].hear(Rumour("n0", SUSPECT, 1), network.now_s))
    network.run(2.0)
    newcomer = Swim("n5", 1, FAST, random.Random(5), network.now_s)
    for name, swim in network.swims.items():
        newcomer.add(name, 1)
        swim.add("n5", 1)
    network.swims["n5"] = newcomer
    network.run(2 * 6 * FAST.period_s)
    assert [swim.in_status(ALIVE).get("n0") for swim in network.swims.values()] == [None, 2, 2, 2, 2, 2]


def test_asking_others_makes_mistakes_rarer() -> None:
    alone, helped = (false_deaths(swim, 0.10, range(4)) for swim in (WithoutHelp, WithoutSuspicion))
    assert helped < alone / 4


@pytest.mark.parametrize("seed", range(5))
def test_a_link_that_is_cut_between_two_kills_nobody(seed: int) -> None:
    network = Network(5, seed)
    network.cut = lambda source, to: {source, to} == {"n1", "n2"}
    network.run(20.0)
    assert network.of_kind(Died) == []
    assert network.of_kind(Suspected) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_false_suspicion_is_refuted(seed: int) -> None:
    """For less than a suspicion's time nobody hears n1: all suspect it, it lives on in a higher incarnation."""
    network = Network(6, seed)
    network.run(2.0)
    network.cut = lambda source, to: "n1" in (source, to)
    network.run(10.0, until=lambda: bool(network.think(SUSPECT, "n1")))
    network.cut = lambda source, to: False
    network.run(10.0)
    suspects = [effect.name for _, _, effect in network.of_kind(Suspected)]  # type: ignore[attr-defined]
    assert "n1" in suspects
    assert network.of_kind(Died) == []
    assert network.swims["n1"].incarnation > 1
    for name, swim in network.swims.items():
        if name != "n1":
            assert swim.in_status(ALIVE)["n1"] == network.swims["n1"].incarnation
            assert swim.in_status(SUSPECT, DEAD) == {}


@settings(max_examples=15)
@given(st.integers(0, 1 << 30), st.integers(2, 12), st.floats(0.0, 0.3))
def test_everybody_agrees_once_the_network_is_good_again(seed: int, count: int, loss: float) -> None:
    network = Network(count, seed, loss=loss)
    network.run(15.0)
    network.loss = 0.0
    network.run(20.0)
    for swim in network.swims.values():
        assert swim.in_status(SUSPECT, DEAD) == {}


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        network = Network(10, 42, loss=0.2)
        network.run(10.0)
        runs.append(network.log)
    assert runs[0] == runs[1]
    assert runs[0]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
def test_profiles_are_consistent(profile) -> None:  # type: ignore[no-untyped-def]
    assert profile.direct_timeout_s < profile.period_s
    assert profile.suspicion_s(10) == pytest.approx(profile.suspicion_periods * profile.period_s)
    assert profile.suspicion_s(1000) == pytest.approx(3 * profile.suspicion_s(10))
    assert profile.late_s < profile.direct_timeout_s

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.services.cls.swim import (
    ACK,
    ALIVE,
    DEAD,
    PING,
    PING_REQ,
    PROFILES,
    RELAYS_MAX,
    RUMOURS_MAX,
    SUSPECT,
    Cleared,
    Died,
    Message,
    Refuted,
    Rumour,
    Send,
    Suspected,
    Swim,
)

FAST = PROFILES["fast"]


class Network:
    """Many detectors and a heap of messages in virtual time; everything is a function of the seed."""

    def __init__(self, count: int, seed: int, swim: type[Swim] = Swim, loss: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.loss = loss
        self.down: dict[str, None] = {}
        self.cut: Callable[[str, str], bool] = lambda source, to: False
        self.log: list[tuple[float, str, object]] = []
        self._heap: list[tuple[float, int, str, str, Message]] = []
        self._number = 0
        names = [f"n{i}" for i in range(count)]
        self.swims = {name: swim(name, 1, FAST, random.Random(f"{seed} {name}"), 0.0) for name in names}
        for one in self.swims.values():
            for name in names:
                one.add(name, 1)

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end_s = self.now_s + seconds
        while not until():
            live = [s for name, s in self.swims.items() if name not in self.down]
            timer_s, name = min((s.due_s, s.name) for s in live)
            message_s = self._heap[0][0] if self._heap else float("inf")
            if min(timer_s, message_s) > end_s:
                self.now_s = end_s
                return
            if message_s <= timer_s:
                self.now_s, _, source, to, message = heapq.heappop(self._heap)
                if to in self.swims and to not in self.down:
                    self._perform(to, self.swims[to].receive(source, message, self.now_s))
            else:
                self.now_s = max(self.now_s, timer_s)
                self._perform(name, self.swims[name].tick(self.now_s))

    def _perform(self, name: str, effects: list[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                lost = self.rng.random() < self.loss or self.cut(name, effect.to)
                if not lost:
                    self._number += 1
                    arrival_s = self.now_s + self.rng.uniform(0.0002, 0.004)
                    heapq.heappush(self._heap, (arrival_s, self._number, name, effect.to, effect.message))
            else:
                self.log.append((self.now_s, name, effect))

    def of_kind(self, kind: type) -> list[tuple[float, str, object]]:
        return [entry for entry in self.log if isinstance(entry[2], kind)]

    def think(self, status: str, of: str) -> list[str]:
        return [n for n, s in self.swims.items() if n not in self.down and n != of and s.status(of) == status]


def pair(incarnation: int = 1) -> Swim:
    swim = Swim("a", incarnation, FAST, random.Random(1), 0.0)
    swim.add("b", 1)
    return swim


def sends(effects: list[object]) -> list[Send]:
    return [effect for effect in effects if isinstance(effect, Send)]


def test_every_member_is_probed_once_a_round() -> None:
    swim = Swim("a", 1, FAST, random.Random(3), 0.0)
    for i in range(7):
        swim.add(f"n{i}", 1)
    for _ in range(5):
        probed = []
        for _ in range(7):
            (ping,) = [send for send in sends(swim.tick(swim.due_s)) if send.message.kind == PING]
            probed.append(ping.to)
            swim.receive(ping.to, Message(ACK, ping.message.seq), swim.due_s - FAST.period_s)
        assert sorted(probed) == [f"n{i}" for i in range(7)]


def test_silence_leads_to_indirect_probes_then_suspicion_then_death() -> None:
    swim = Swim("a", 1, FAST, random.Random(1), 0.0)
    for name in ("b", "c", "d", "e", "f"):
        swim.add(name, 1)
    (ping,) = sends(swim.tick(swim.due_s))
    direct = sends(swim.tick(swim.due_s))
    assert [send.message.kind for send in direct] == [PING_REQ] * FAST.indirect
    assert {send.message.target for send in direct} == {ping.to}
    assert ping.to not in {send.to for send in direct}
    assert all(send.message.seq == ping.message.seq for send in direct)
    effects = swim.tick(swim.due_s)
    assert Suspected(ping.to, 1, True) in effects
    assert swim.in_status(SUSPECT) == {ping.to: 1}
    deaths = []
    while not deaths:
        deaths = [effect for effect in swim.tick(swim.due_s) if isinstance(effect, Died)]
    assert deaths[0].name in ("b", "c", "d", "e", "f")
    assert swim.status(deaths[0].name) == DEAD


@pytest.mark.parametrize("helper", [False, True])
def test_an_answer_ends_the_probe_directly_or_by_another(helper: bool) -> None:
    swim = pair()
    swim.add("c", 1)
    (ping,) = sends(swim.tick(swim.due_s))
    if helper:
        swim.tick(swim.due_s)
    assert swim.receive("c" if helper else ping.to, Message(ACK, ping.message.seq), 0.2) == []
    effects = swim.tick(swim.due_s)
    assert not [effect for effect in effects if isinstance(effect, Suspected)]


def test_a_helper_pings_and_passes_the_answer_on() -> None:
    swim = pair()
    (ping,) = sends(swim.receive("x", Message(PING_REQ, 77, "b"), 1.0))
    assert (ping.to, ping.message.kind) == ("b", PING)
    (ack,) = sends(swim.receive("b", Message(ACK, ping.message.seq), 1.0))
    assert ack == Send("x", Message(ACK, 77))
    assert sends(swim.receive("b", Message(ACK, ping.message.seq), 1.0)) == []


def test_only_the_suspect_itself_raises_its_incarnation() -> None:
    swim = pair(incarnation=3)
    assert swim.hear(Rumour("a", SUSPECT, 2), 0.0) == []
    assert swim.incarnation == 3
    assert swim.hear(Rumour("a", SUSPECT, 3), 0.0) == [Refuted(4)]
    assert swim.incarnation == 4
    (ack,) = sends(swim.receive("b", Message(PING, 1), 0.0))
    assert Rumour("a", ALIVE, 4) in ack.message.rumours


def test_who_does_not_know_a_refutation_is_told_again() -> None:
    """A member that joined later knows the older incarnation; without this its suspicion would stand."""
    swim = pair(incarnation=3)
    (ack,) = sends(swim.receive("b", Message(PING, 1, "", (Rumour("a", SUSPECT, 1),)), 0.0))
    assert ack.message.rumours == (Rumour("a", ALIVE, 3),)


def test_a_suspect_is_told_so_with_whatever_it_is_sent() -> None:
    swim = pair()
    swim.hear(Rumour("b", SUSPECT, 1), 0.0)
    for _ in range(50):
        (ack,) = sends(swim.receive("b", Message(PING, 1), 0.1))
        assert Rumour("b", SUSPECT, 1) in ack.message.rumours


statuses = st.sampled_from([ALIVE, SUSPECT])
rumours = st.builds(Rumour, st.just("b"), statuses, st.integers(0, 6))


@given(st.lists(rumours, max_size=20))
def test_rumours_in_any_order_lead_to_the_same_state(heard: list[Rumour]) -> None:
    """Higher incarnations override lower ones; in the same incarnation suspicion overrides life."""
    swim = pair()
    for rumour in heard:
        swim.hear(rumour, 0.0)
    best = max([(1, False), *((r.incarnation, r.status == SUSPECT) for r in heard)])
    assert (swim.in_status(ALIVE, SUSPECT)["b"], swim.status("b") == SUSPECT) == best


@given(rumours)
def test_rumours_survive_the_wire(rumour: Rumour) -> None:
    assert Rumour.from_wire(rumour.to_wire()) == rumour


@pytest.mark.parametrize("wire", [None, [], ["b", "dead", 1], ["b", "alive", -1], [1, "alive", 1], ["b", "alive", "1"]])
def test_refuses_what_is_no_rumour(wire: object) -> None:
    with pytest.raises(ValueError):
        Rumour.from_wire(wire)


def test_an_old_suspicion_does_not_kill_who_refuted_it() -> None:
    swim = pair()
    swim.hear(Rumour("b", SUSPECT, 1), 0.0)
    assert swim.hear(Rumour("b", ALIVE, 2), 0.5) == [Cleared("b", 2)]
    assert swim.hear(Rumour("b", SUSPECT, 1), 0.6) == []
    now_s = 0.6
    while now_s < 5.0:
        now_s = swim.due_s
        for effect in swim.tick(now_s):
            assert not isinstance(effect, Died)
            if isinstance(effect, Send):
                swim.receive(effect.to, Message(ACK, effect.message.seq), now_s)


def test_a_suspicion_of_the_next_life_starts_its_own_clock() -> None:
    swim = pair()
    swim.hear(Rumour("b", SUSPECT, 1), 0.0)
    swim.hear(Rumour("b", SUSPECT, 2), 0.9)
    deaths = []
    while not deaths:
        now_s = swim.due_s
        deaths = [effect for effect in swim.tick(now_s) if isinstance(effect, Died)]
    assert deaths == [Died("b", 2)]
    assert now_s == pytest.approx(0.9 + FAST.suspicion_s(2))


def test_the_dead_come_back_by_their_own_answer_a_new_life_or_the_roll_call() -> None:
    def dead() -> Swim:
        swim = pair()
        swim.hear(Rumour("b", SUSPECT, 1), 0.0)
        while swim.status("b") != DEAD:
            swim.tick(swim.due_s)
        return swim

    swim = dead()
    assert Cleared("b", 1) in swim.receive("b", Message(ACK, 12345), 9.0)
    swim = dead()
    assert swim.hear(Rumour("b", ALIVE, 2), 9.0) == [Cleared("b", 2)]
    swim = dead()
    assert swim.vouch("b") == [Cleared("b", 1)]
    assert swim.vouch("b") == []
    swim = dead()
    swim.add("b", 1001)
    assert swim.in_status(ALIVE) == {"b": 1001}
    swim = dead()
    assert swim.hear(Rumour("b", SUSPECT, 1), 9.0) == []
    assert swim.status("b") == DEAD


def test_who_was_late_himself_accuses_nobody() -> None:
    """The process was stopped for a minute: the answers wait unread in its sockets."""
    swim = pair()
    swim.add("c", 1)
    (ping,) = sends(swim.tick(swim.due_s))
    swim.hear(Rumour("c", SUSPECT, 1), 0.2)
    woke_s = 60.0
    assert [effect for effect in swim.tick(woke_s) if not isinstance(effect, Send)] == []
    assert swim.due_s > woke_s
    swim.receive(ping.to, Message(ACK, ping.message.seq), woke_s)
    swim.hear(Rumour("c", ALIVE, 2), woke_s)
    effects = swim.tick(swim.due_s)
    assert not [effect for effect in effects if isinstance(effect, (Suspected, Died))]
    assert swim.counts["late"] == 1


def test_members_come_and_go_in_the_middle_of_a_round() -> None:
    rng = random.Random(5)
    swim = Swim("a", 1, FAST, random.Random(5), 0.0)
    present: dict[str, None] = {}
    for step in range(500):
        name = f"n{rng.randrange(12)}"
        if rng.random() < 0.5:
            swim.add(name, step + 1)
            present[name] = None
        else:
            swim.remove(name, lost=rng.random() < 0.5)
            present.pop(name, None)
        assert sorted(swim._order) == sorted(present) == sorted(swim._peers)
        assert 0 <= swim._position <= len(swim._order)
        for send in sends(swim.tick(swim.due_s)):
            assert send.to in present or send.to in swim._lost
        assert not any(name in present for name in swim._lost)


def test_the_lost_are_looked_for() -> None:
    swim = pair()
    swim.add("c", 1)
    swim.remove("c", lost=True)
    pinged: list[str] = []
    for _ in range(200):
        for send in sends(swim.tick(swim.due_s)):
            pinged.append(send.to)
            swim.receive(send.to, Message(ACK, send.message.seq), swim.due_s - FAST.period_s)
    # Once in ``reconnect_periods`` by both of two members together.
    assert 200 / FAST.reconnect_periods / 2 / 3 < pinged.count("c") < 200 / FAST.reconnect_periods
    swim.remove("c")
    assert not any(send.to == "c" for _ in range(100) for send in sends(swim.tick(swim.due_s)))


def test_what_is_remembered_is_bounded() -> None:
    swim = pair()
    for seq in range(RELAYS_MAX + 100):
        swim.receive("x", Message(PING_REQ, seq, "b"), 0.0)
    assert len(swim._relays) == RELAYS_MAX
    for number in range(RUMOURS_MAX + 100):
        swim.add(f"n{number}", 1)
        swim.hear(Rumour(f"n{number}", SUSPECT, 1), 0.0)
    assert len(swim._rumours) == RUMOURS_MAX
    (ack,) = sends(swim.receive("x", Message(PING, 1), 0.0))
    assert len(ack.message.rumours) == FAST.rumours_per_message_max


def test_a_rumour_is_told_a_logarithmic_number_of_times() -> None:
    swim = pair()
    for i in range(50):
        swim.add(f"n{i}", 1)
    swim.hear(Rumour("b", SUSPECT, 1), 0.0)
    told = sum(
        rumour.name == "b"
        for number in range(100)
        for send in sends(swim.receive(f"n{number % 50}", Message(PING, 1), 0.0))
        for rumour in send.message.rumours
    )
    assert told == FAST.tellings(51)


# Many together


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
        return list(effects)


class WithoutSuspicion(Swim):
    """One failed probe kills."""

    def _suspect(self, peer, incarnation, now_s, *, first_hand):  # type: ignore[no-untyped-def]
        effects = super()._suspect(peer, incarnation, now_s, first_hand=first_hand)
        return [*effects, *(Died(peer.name, incarnation) for _ in effects)]


class WithoutHelp(WithoutSuspicion):
    def _probe_indirectly(self, probe):  # type: ignore[no-untyped-def]
        return []


@pytest.mark.parametrize("mistake", [WithoutIncarnation, WithoutSuspicion])
def test_the_simulation_finds_the_classical_mistakes(mistake: type[Swim]) -> None:
    assert false_deaths(mistake, 0.25, range(6)) > 0


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

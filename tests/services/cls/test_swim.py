from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.services.cls.swim import (
    ACK,
    ALIVE,
    DEAD,
    NACK,
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
    Tunables,
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

    def _suspect(self, peer, incarnation, by, now_s):  # type: ignore[no-untyped-def]
        effects = super()._suspect(peer, incarnation, by, now_s)
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


# One detector by its exact times: chance is an argument, so they are known


class Dice(random.Random):
    """Says ``number`` for every number between 0 and 1, and draws the rest from its seed."""

    def __init__(self, number: float = 0.5, seed: int = 0) -> None:
        super().__init__(seed)
        self.number = number

    def random(self) -> float:
        return self.number


def detector(*others: str, start_s: float = 100.0, number: float = 0.5, tunables: Tunables = FAST) -> Swim:
    swim = Swim("a", 1, tunables, Dice(number), start_s)
    for name in others:
        swim.add(name, 1)
    return swim


def answer(swim: Swim, effects: list[object], now_s: float) -> None:
    for send in sends(effects):
        if send.message.kind == PING:
            swim.receive(send.to, Message(ACK, send.message.seq), now_s)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())
def test_the_times_of_a_probe_that_nobody_answers(profile: Tunables) -> None:
    swim = detector("b", "c", tunables=profile)
    began_s = 100.0 + profile.period_s / 2  # at a random time of the first period
    assert swim.due_s == began_s
    assert swim.tick(began_s - 1e-6) == []
    (ping,) = sends(swim.tick(began_s))
    assert ping.message == Message(PING, 1)
    assert swim.due_s == began_s + profile.direct_timeout_s
    assert swim.tick(began_s) == []
    (request,) = swim.tick(swim.due_s)
    other = "c" if ping.to == "b" else "b"
    assert request == Send(other, Message(PING_REQ, 1, ping.to))
    assert swim.due_s == began_s + profile.period_s
    suspected, second = swim.tick(swim.due_s)
    assert suspected == Suspected(ping.to, 1, True)
    assert isinstance(second, Send)
    assert (second.to, second.message.kind, second.message.seq) == (other, PING, 2)
    counts = {"probes": 2, "indirect": 1, "suspected": 1, "cleared": 0, "died": 0, "refuted": 0, "late": 0}
    assert swim.counts == counts
    assert swim.due_s == began_s + profile.period_s + 2 * profile.direct_timeout_s, "nobody said anything: is it us?"
    died_s = began_s + profile.period_s + profile.patience_s(3, 0)
    now_s, effects = 0.0, []
    while now_s < died_s:
        now_s = swim.due_s
        effects = swim.tick(now_s)
        assert (Died(ping.to, 1) in effects) == (now_s >= died_s)
        answer(swim, [send for send in sends(effects) if send.to == other], now_s)
    assert now_s == pytest.approx(died_s)
    assert swim.counts["died"] == 1
    assert swim.in_status(DEAD) == {ping.to: 1}


def test_the_profiles_are_those_of_their_descriptions() -> None:
    """The lan profile has memberlist's DefaultLANConfig; the fast one finds a death in about two seconds."""
    lan, fast = PROFILES["lan"], PROFILES["fast"]
    assert (lan.period_s, lan.direct_timeout_s, lan.indirect, lan.suspicion_periods) == (1.0, 0.5, 3, 4.0)
    assert (lan.suspicion_factor, lan.confirmations, lan.health_max) == (6.0, 3, 8)
    assert fast.period_s * (1.6 + 1 / 2) + fast.suspicion_s(5) < 2.0
    for profile in (lan, fast):
        assert profile.rumours_per_message_max * 40 < 500
        with pytest.raises(FrozenInstanceError):
            profile.period_s = 1.0  # type: ignore[misc]


def test_formulas_of_suspicion_and_tellings() -> None:
    for members, factor in ((0, 1.0), (1, 1.0), (10, 1.0), (100, 2.0), (1000, 3.0)):
        assert FAST.suspicion_s(members) == pytest.approx(5.0 * 0.2 * factor)
    assert [FAST.tellings(members) for members in (1, 2, 8, 50, 1000)] == [2, 3, 5, 8, 14]
    # By hand: 3 - 2 x log(c + 1) / log(4), in seconds; with fewer members there are fewer who could confirm.
    assert [round(FAST.patience_s(5, confirmed), 3) for confirmed in range(6)] == [3.0, 2.0, 1.415, 1.0, 1.0, 1.0]
    assert [round(FAST.patience_s(4, confirmed), 3) for confirmed in range(4)] == [3.0, 1.738, 1.0, 1.0]
    assert [FAST.patience_s(members, 0) for members in (1, 2, 3)] == [1.0, 1.0, 3.0]
    assert FAST.patience_s(100, 0) == pytest.approx(6.0)


@pytest.mark.parametrize("late_s", [0.0, FAST.late_s, FAST.late_s + 0.001, 7.0])
def test_who_is_late_puts_off_all_that_others_should_have_done(late_s: float) -> None:
    swim = detector("b", "c", "d", start_s=0.0)
    (ping,) = sends(swim.tick(swim.due_s))
    suspect = next(name for name in "bcd" if name != ping.to)
    swim.hear(Rumour(suspect, SUSPECT, 1), 0.1)
    deadline_s, direct_s = 0.1 + FAST.patience_s(4, 0), 0.2
    assert swim.due_s == direct_s
    late = late_s > FAST.late_s
    shift_s = late_s + FAST.direct_timeout_s if late else 0.0
    effects = swim.tick(direct_s + late_s)
    assert swim.counts["late"] == late
    assert bool(sends(effects)) == (not late)
    if late:
        assert swim.due_s == pytest.approx(direct_s + shift_s)
        assert sends(swim.tick(swim.due_s)), "the probe goes on where it stood"
    assert swim.due_s == pytest.approx(0.1 + FAST.period_s + shift_s)
    now_s = 0.0
    while swim.status(suspect) == SUSPECT:
        now_s = swim.due_s
        answer(swim, [send for send in sends(swim.tick(now_s)) if send.to != suspect], now_s)
    assert now_s == pytest.approx(deadline_s + shift_s)


def test_a_rumour_heard_when_asleep_does_not_shorten_the_next_period() -> None:
    """A tick that comes a whole period late begins the next one from now, not many at once."""
    swim = detector("b", start_s=0.0)
    answer(swim, swim.tick(0.1), 0.1)
    effects = swim.tick(0.1 + FAST.period_s + FAST.late_s / 2)
    assert len(sends(effects)) == 1
    assert swim.due_s == pytest.approx(0.1 + FAST.period_s + FAST.direct_timeout_s + FAST.late_s / 2)
    answer(swim, effects, 0.3)
    assert swim.due_s == pytest.approx(0.1 + 2 * FAST.period_s)
    slow = detector("b", start_s=0.0, tunables=replace(FAST, late_s=100.0))
    answer(slow, slow.tick(0.1), 0.1)
    answer(slow, slow.tick(10.0), 10.0)
    assert slow.due_s == pytest.approx(10.0 + FAST.period_s)
    assert slow.tick(10.0) == []


def test_what_was_passed_on_is_remembered_for_a_period() -> None:
    exact = replace(FAST, period_s=0.25, direct_timeout_s=0.125)
    for at_s, passed in ((0.126, [Send("x", Message(ACK, 77))]), (0.125, [])):
        swim = detector(start_s=0.0, tunables=exact)
        swim.tick(0.125)
        (ping,) = sends(swim.receive("x", Message(PING_REQ, 77, "y"), at_s))
        assert (ping.to, ping.message.kind) == ("y", PING)
        assert swim.tick(at_s + 0.1) == [Send("x", Message(NACK, 77))]
        swim.tick(0.375)
        assert sends(swim.receive("y", Message(ACK, ping.message.seq), 0.375)) == passed


def test_the_oldest_of_too_many_pings_for_others_is_forgotten() -> None:
    swim = detector()
    pings = [sends(swim.receive("x", Message(PING_REQ, number, "y"), 0.0))[0] for number in range(1025)]
    assert len(dict.fromkeys(ping.message.seq for ping in pings)) == 1025
    passed = [sends(swim.receive("y", Message(ACK, ping.message.seq), 0.1)) for ping in pings]
    assert passed == [[], *([Send("x", Message(ACK, number))] for number in range(1, 1025))]


def test_a_helper_without_an_answer_says_so_once() -> None:
    swim = detector(start_s=0.0)
    swim.tick(0.1)
    (ping,) = sends(swim.receive("x", Message(PING_REQ, 7, "y"), 0.11))
    (other,) = sends(swim.receive("x", Message(PING_REQ, 8, "z"), 0.12))
    swim.receive("z", Message(ACK, other.message.seq), 0.13)
    assert swim.due_s == pytest.approx(0.11 + 0.8 * FAST.direct_timeout_s)
    assert swim.tick(swim.due_s) == [Send("x", Message(NACK, 7))]
    assert swim.tick(swim.due_s) == [], "z has answered"
    assert swim.due_s == pytest.approx(0.1 + FAST.period_s)
    late = sends(swim.receive("y", Message(ACK, ping.message.seq), 0.25))
    assert late == [Send("x", Message(ACK, 7))], "a late answer is passed on all the same"


def failed_probe(swim: Swim, nacks: int) -> None:
    """The next probe is answered by nobody; so many helpers say that they had no answer."""
    (ping,) = [send for send in sends(swim.tick(swim.due_s)) if send.message.kind == PING]
    helpers = [send.to for send in sends(swim.tick(swim.due_s)) if send.message.kind == PING_REQ]
    for helper in helpers[:nacks]:
        swim.receive(helper, Message(NACK, ping.message.seq), swim.due_s - 0.001)
    swim.receive("x", Message(NACK, ping.message.seq + 9), swim.due_s - 0.001)


def test_silence_of_all_speaks_against_oneself_and_answers_for_it() -> None:
    lan = PROFILES["lan"]
    swim = detector(*"bcdef", start_s=0.0, tunables=lan)
    failed_probe(swim, nacks=3)
    effects = swim.tick(swim.due_s)
    assert swim.health == 0, "the helpers hear us, and we hear them"
    answer(swim, effects, swim.due_s - 0.9)
    assert swim.health == 0, "it never falls below"
    failed_probe(swim, nacks=1)
    before_s = swim.due_s
    effects = swim.tick(before_s)
    assert swim.health == 2
    assert swim.due_s == pytest.approx(before_s + 3 * lan.direct_timeout_s)
    answer(swim, effects, before_s + 0.1)
    assert swim.health == 1
    assert swim.due_s == pytest.approx(before_s + 3 * lan.period_s)
    swim.hear(Rumour("a", SUSPECT, 1), before_s + 0.2)
    assert swim.health == 2
    swim.hear(Rumour("a", SUSPECT, 1), before_s + 0.2)
    assert swim.health == 2, "refuted already"
    while swim.health < lan.health_max:
        swim.tick(swim.due_s)
    for _ in range(20):
        swim.tick(swim.due_s)
    assert swim.health == lan.health_max
    alone = detector("b", start_s=0.0)
    alone.tick(alone.due_s)
    alone.tick(alone.due_s)
    alone.tick(alone.due_s)
    assert alone.health == 1, "there was nobody to ask"


def test_those_who_find_the_same_shorten_a_suspicion() -> None:
    swim = detector(*"bcdef", start_s=0.0)
    assert swim.hear(Rumour("b", SUSPECT, 1, ("c",)), 0.1) == [Suspected("b", 1, False)]
    peer = swim._peers["b"]
    assert peer.deadline_s == pytest.approx(0.1 + FAST.patience_s(6, 0))
    assert swim.hear(Rumour("b", SUSPECT, 1, ("c",)), 0.2) == []
    assert peer.deadline_s == pytest.approx(0.1 + FAST.patience_s(6, 0)), "the same accuser again proves nothing"
    assert swim.hear(Rumour("b", SUSPECT, 1, ("d", "c")), 0.3) == []
    assert peer.deadline_s == pytest.approx(0.1 + FAST.patience_s(6, 1)), "from when it began"
    (told,) = swim._pick_rumours("e")
    assert told == Rumour("b", SUSPECT, 1, ("c", "d")), "what one has heard is told on"
    swim.hear(Rumour("b", SUSPECT, 1, ("e", "f", "x", "y")), 0.4)
    assert peer.accusers == ("c", "d", "e", "f"), "more change nothing"
    assert peer.deadline_s == pytest.approx(0.1 + FAST.suspicion_s(6))
    now_s = 0.0
    while swim.status("b") == SUSPECT:
        now_s = swim.due_s
        answer(swim, [send for send in sends(swim.tick(now_s)) if send.to != "b"], now_s)
    assert now_s == pytest.approx(0.1 + FAST.suspicion_s(6))
    assert swim.counts["suspected"] == swim.counts["died"] == 1
    assert swim.hear(Rumour("b", SUSPECT, 1, ("g",)), 9.0) == [], "it is dead"


def test_an_accusation_of_the_next_life_counts_anew() -> None:
    swim = detector(*"bcde", start_s=0.0)
    swim.hear(Rumour("b", SUSPECT, 1, ("c", "d", "e")), 0.1)
    assert swim.hear(Rumour("b", SUSPECT, 2, ("d",)), 0.5) == [Suspected("b", 2, False)]
    assert swim._peers["b"].accusers == ("d",)
    assert swim._peers["b"].deadline_s == pytest.approx(0.5 + FAST.patience_s(5, 0))


def test_a_probe_of_the_former_life_does_not_accuse_the_next() -> None:
    swim = detector("b", start_s=0.0)
    swim.tick(swim.due_s)
    swim.tick(swim.due_s)
    swim.add("b", 1001)
    assert not [effect for effect in swim.tick(swim.due_s) if isinstance(effect, Suspected)]
    assert swim.status("b") == ALIVE


class Indifferent(Swim):
    """Lifeguard's local health taken away."""

    def _feel(self, worse: int) -> None:
        pass


def accusations_of_a_deaf_member(swim: type[Swim]) -> int:
    """How often a member suspects others that loses nine of ten messages which are for it."""
    suspicions = 0
    for seed in range(6):
        network, rng = Network(6, seed, swim), random.Random(seed)
        network.cut = lambda source, to, rng=rng: to == "n0" and rng.random() < 0.9  # type: ignore[misc]
        network.run(30.0)
        suspicions += sum(name == "n0" and effect.first_hand for _, name, effect in network.of_kind(Suspected))
    return suspicions


def test_a_member_in_trouble_accuses_less() -> None:
    with_health, without = accusations_of_a_deaf_member(Swim), accusations_of_a_deaf_member(Indifferent)
    assert with_health < 0.6 * without


def test_the_least_told_goes_first_and_no_more_than_fit() -> None:
    swim = detector(*(f"n{number}" for number in range(12)))
    for number in range(12):
        swim.hear(Rumour(f"n{number}", ALIVE, 5), 0.0)
    heard: dict[str, int] = {}
    for told in (8, 8, 8):
        (ack,) = sends(swim.receive("x", Message(PING, 3), 0.0))
        assert (ack.to, ack.message.kind, ack.message.seq, ack.message.target) == ("x", ACK, 3, "")
        assert len(ack.message.rumours) == told
        for rumour in ack.message.rumours:
            assert rumour == Rumour(rumour.name, ALIVE, 5)
            heard[rumour.name] = heard.get(rumour.name, 0) + 1
        assert max(heard.values()) - min(heard.get(f"n{number}", 0) for number in range(12)) <= 1
    assert list(heard.values()) == [2] * 12
    while rumours := sends(swim.receive("x", Message(PING, 3), 0.0))[0].message.rumours:
        for rumour in rumours:
            heard[rumour.name] += 1
    assert list(heard.values()) == [FAST.tellings(12)] * 12


def test_nobody_is_told_about_himself_but_the_suspect() -> None:
    swim = detector("b", "c", "d")
    swim.hear(Rumour("b", ALIVE, 2), 0.0)
    swim.hear(Rumour("c", SUSPECT, 1), 0.0)
    told = {
        name: sends(swim.receive(name, Message(PING, 1), 0.0))[0].message.rumours
        for name in ("b", "c", "d", "stranger")
    }
    alive, suspect = Rumour("b", ALIVE, 2), Rumour("c", SUSPECT, 1)
    assert {name: set(rumours) for name, rumours in told.items()} == {
        "b": {suspect},
        "c": {suspect, alive},
        "d": {alive, suspect},
        "stranger": {alive, suspect},
    }
    assert all(len(set(rumours)) == len(rumours) for rumours in told.values())
    # The word to the suspect himself takes one of the places.
    crowd = detector(*(f"n{number}" for number in range(20)))
    for number in range(20):
        crowd.hear(Rumour(f"n{number}", SUSPECT, 1), 0.0)
    (ack,) = sends(crowd.receive("n3", Message(PING, 1), 0.0))
    assert ack.message.rumours[0] == Rumour("n3", SUSPECT, 1)
    assert len(ack.message.rumours) <= FAST.rumours_per_message_max


def test_of_too_many_rumours_the_most_told_goes() -> None:
    swim = detector(*(f"n{number}" for number in range(1025)))
    for number in range(1024):
        swim.hear(Rumour(f"n{number}", ALIVE, 5), 0.0)
    told = [rumour.name for rumour in sends(swim.receive("x", Message(PING, 1), 0.0))[0].message.rumours]
    swim.hear(Rumour("n3", ALIVE, 6), 0.0)  # takes the place of its own
    swim.hear(Rumour("n1024", ALIVE, 5), 0.0)
    assert len(swim._rumours) == 1024
    assert "n1024" in swim._rumours
    assert [name for name in told if name not in swim._rumours] == [next(name for name in told if name != "n3")]


def test_words_about_oneself() -> None:
    swim = detector("b")
    swim.rise(4)
    assert swim.incarnation == 5
    swim.rise(2)
    assert swim.incarnation == 5
    for rumour, effects, incarnation in (
        (Rumour("a", ALIVE, 9), [], 5),
        (Rumour("a", SUSPECT, 4), [], 5),
        (Rumour("a", SUSPECT, 5), [Refuted(6)], 6),
        (Rumour("a", SUSPECT, 8), [Refuted(9)], 9),
    ):
        assert swim.hear(rumour, 0.0) == effects
        assert swim.incarnation == incarnation
    assert swim.counts["refuted"] == 2
    assert swim.hear(Rumour("nobody", SUSPECT, 5), 0.0) == []
    swim.add("a", 3)
    assert swim.incarnation == 9
    swim.add("a", 12)
    assert swim.incarnation == 12
    assert swim.in_status(ALIVE, SUSPECT, DEAD) == {"b": 1}
    swim.remove("a", lost=True)
    assert swim._lost == {}


def test_an_old_record_of_a_member_changes_nothing_and_a_newer_one_clears_it() -> None:
    swim = detector("b")
    swim.hear(Rumour("b", SUSPECT, 3), 0.0)
    swim.add("b", 3)
    swim.add("b", 2)
    assert swim.in_status(SUSPECT) == {"b": 3}
    swim.add("b", 4)
    assert swim.in_status(ALIVE) == {"b": 4}
    assert swim.vouch("b") == swim.vouch("nobody") == []
    swim.hear(Rumour("b", SUSPECT, 4), 0.0)
    assert swim.vouch("b") == [Cleared("b", 4)]
    assert swim.hear(Rumour("b", ALIVE, 4), 0.0) == []
    assert swim.hear(Rumour("b", ALIVE, 5), 0.0) == [], "nobody had doubted it"
    assert (swim.counts["cleared"], swim.counts["suspected"]) == (1, 2)
    assert swim.status("nobody") is None


def test_what_was_suspected_and_is_cleared_is_told_only_with_a_new_incarnation() -> None:
    swim = detector("b", "c")
    swim.hear(Rumour("b", SUSPECT, 1), 0.0)
    swim.vouch("b")
    assert sends(swim.receive("c", Message(PING, 1), 0.0))[0].message.rumours == ()
    swim.hear(Rumour("b", SUSPECT, 1), 0.0)
    swim.hear(Rumour("b", ALIVE, 2), 0.0)
    assert sends(swim.receive("c", Message(PING, 1), 0.0))[0].message.rumours == (Rumour("b", ALIVE, 2),)
    swim.remove("b")
    assert sends(swim.receive("c", Message(PING, 1), 0.0))[0].message.rumours == ()


def test_the_dead_are_probed_on_but_help_nobody() -> None:
    swim = detector("b", "c", "d", "e", start_s=0.0)
    swim.hear(Rumour("e", SUSPECT, 1), 0.0)
    now_s, asked = 0.0, []
    probed: list[str] = []
    while len(probed) < 40:
        now_s = swim.due_s
        effects = swim.tick(now_s)
        for send in sends(effects):
            if send.message.kind == PING_REQ:
                asked.append((swim.status("e"), send.to))
            else:
                probed.append(send.to)
                if send.to != "d":
                    answer(swim, [send], now_s) if send.to != "e" else None
    assert probed.count("e") == 10
    assert (DEAD, "e") not in asked
    assert (SUSPECT, "e") in asked
    assert swim.counts["died"] == 2


@pytest.mark.parametrize("removed", range(6))
@pytest.mark.parametrize("after", range(6))
def test_who_goes_in_the_middle_of_a_round_takes_nobody_with_him(removed: int, after: int) -> None:
    names = [f"n{number}" for number in range(6)]
    swim = detector(*names, start_s=0.0)
    probed: list[str] = []

    def probe(times: int) -> None:
        for _ in range(times):
            effects = swim.tick(swim.due_s)
            probed.extend(send.to for send in sends(effects))
            answer(swim, effects, swim.due_s)

    probe(6)
    probed.clear()
    probe(after)
    swim.remove(names[removed])
    left = [name for name in names if name != names[removed]]
    probe(5 - after + (names[removed] in probed))
    assert sorted(name for name in probed if name != names[removed]) == left
    probed.clear()
    probe(5)
    assert sorted(probed) == left


@pytest.mark.parametrize("seed", range(20))
def test_who_comes_in_the_middle_of_a_round_is_probed_in_it(seed: int) -> None:
    swim = Swim("a", 1, FAST, random.Random(seed), 0.0)
    for number in range(5):
        swim.add(f"n{number}", 1)
    probed: list[str] = []
    for step in range(6):
        if step == 3:
            swim.add("new", 1)
        effects = swim.tick(swim.due_s)
        probed.extend(send.to for send in sends(effects))
        answer(swim, effects, swim.due_s)
    assert sorted(probed) == ["n0", "n1", "n2", "n3", "n4", "new"]


@pytest.mark.parametrize("members", [0, 1, 4])
def test_the_cluster_as_a_whole_pings_one_of_the_lost_every_so_many_periods(members: int) -> None:
    """Each member with one chance in ``reconnect_periods x members``, itself counted."""
    chance = 1 / (FAST.reconnect_periods * (members + 1))
    for number, expected in ((chance * 0.999, 1), (chance * 1.001, 0), (0.0, 1), (0.999, 0)):
        swim = detector(*(f"n{i}" for i in range(members)), start_s=0.0, number=number)
        swim.remove("gone", lost=True)
        pings = sends(swim.tick(swim.due_s))
        assert sum(ping.to == "gone" for ping in pings) == expected
        assert len(pings) == (members > 0) + expected
        assert len({ping.message.seq for ping in pings}) == len(pings)
    swim.add("gone", 2)
    assert swim._lost == {}
    swim.remove("gone", lost=True)
    swim.remove("gone")
    assert swim._lost == {}


def test_a_probe_ends_with_its_target() -> None:
    swim = detector("b", "c", start_s=0.0)
    (ping,) = sends(swim.tick(0.1))
    other = "c" if ping.to == "b" else "b"
    swim.remove(other)
    assert swim.due_s == 0.1 + FAST.direct_timeout_s
    swim.remove(ping.to)
    assert swim.due_s == pytest.approx(0.1 + FAST.period_s)
    assert swim.tick(swim.due_s) == []


def test_records_are_values() -> None:
    records = [Rumour("b", ALIVE, 1), Message(PING, 1), Send("b", Message(PING, 1)), Suspected("b", 1, True)]
    records += [Cleared("b", 1), Died("b", 1), Refuted(1)]  # type: ignore[list-item]
    for record in records:
        assert hash(record) == hash(replace(record))
        with pytest.raises(FrozenInstanceError):
            setattr(record, next(iter(record.__dataclass_fields__)), "other")
    assert Rumour.from_wire(["b", "suspect", 0, ["c"]]) == Rumour("b", SUSPECT, 0, ("c",))

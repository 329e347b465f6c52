"""One detector by its exact times: chance is an argument, so they are known."""

import random
from dataclasses import FrozenInstanceError, replace

import pytest

from gostore.services.cls.swim import (
    ACK,
    ALIVE,
    DEAD,
    NACK,
    PING,
    PING_REQ,
    PROFILES,
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

from .detectors import FAST, Network, sends


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
    suspected, word, second = swim.tick(swim.due_s)
    assert suspected == Suspected(ping.to, 1, True)
    assert word == Send(other, Message(PING, 2, "", (Rumour(ping.to, SUSPECT, 1, ("a",)),)))
    assert isinstance(second, Send)
    assert (second.to, second.message.kind, second.message.seq) == (other, PING, 3)
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
        (Rumour("a", SUSPECT, 5), [Refuted(6), Send("b", Message(PING, 1, "", (Rumour("a", ALIVE, 6),)))], 6),
        (Rumour("a", SUSPECT, 8), [Refuted(9), Send("b", Message(PING, 2, "", (Rumour("a", ALIVE, 9),)))], 9),
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

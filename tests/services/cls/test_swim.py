"""One failure detector: probes, suspicions, refutations, rumours."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.services.cls.swim import (
    ACK,
    ALIVE,
    DEAD,
    PING,
    PING_REQ,
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

from .detectors import FAST, pair, sends


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
    refuted, word = swim.hear(Rumour("a", SUSPECT, 3), 0.0)
    assert refuted == Refuted(4)
    assert word == Send("b", Message(PING, 1, "", (Rumour("a", ALIVE, 4),))), "it is said at once"
    assert swim.incarnation == 4


def test_who_does_not_know_a_refutation_is_told_again() -> None:
    """A member that joined later knows the older incarnation; without this its suspicion would stand."""
    swim = pair(incarnation=3)
    (ack,) = sends(swim.receive("b", Message(PING, 1, "", (Rumour("a", SUSPECT, 1),)), 0.0))
    assert ack.message.rumours == (Rumour("a", ALIVE, 3),)
    for _ in range(50):
        (ack,) = sends(swim.receive("b", Message(PING, 1), 0.1))
        assert ack.message.rumours == (Rumour("a", ALIVE, 3),), "and so is whoever comes"


def test_own_accusations_are_announced_at_once() -> None:
    swim = Swim("a", 1, FAST, random.Random(1), 0.0)
    for name in ("b", "c", "d", "e", "f"):
        swim.add(name, 1)
    assert swim.hear(Rumour("b", SUSPECT, 1, ("c",)), 0.0) == [Suspected("b", 1, False)], "those of others are not"
    effects: list[object] = []
    while not (accused := [name for name, peer in swim._peers.items() if "a" in peer.accusers]):
        effects = swim.tick(swim.due_s)
    told = [send for send in sends(effects) if accused[0] in {rumour.name for rumour in send.message.rumours}]
    words = told[: FAST.indirect]
    assert len({send.to for send in words} - {"a", accused[0]}) == FAST.indirect
    for send in words:
        assert send.message.kind == PING
        assert swim.receive(send.to, Message(ACK, send.message.seq), swim.due_s) == [], "no answer is waited for"


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

"""Happened-before, against a model that knows it while it makes the run."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_journals import Run, runs

from gostore.client.thread import client_thread
from gostore.core.errors import BadRequest
from gostore.core.events import Event
from gostore.trace import Causality, Journal


def journal(run: Run) -> Journal:
    j = Journal(client_thread())
    for event in run.events:
        j.append(event)
    return j


@given(runs())
def test_the_relation_is_that_of_the_run(run: Run) -> None:
    j = journal(run)
    for index, event in enumerate(run.events):
        past = [run.events.index(e) for e in j.causal_past(event)]
        assert sum(1 << i for i in past) == run.before[index]
        for other, before in enumerate(run.events):
            assert j.happens_before(before, event) == bool(run.before[index] >> other & 1)


@given(runs())
def test_the_order_respects_the_relation_and_holds_everything_once(run: Run) -> None:
    order = [run.events.index(event) for event in Causality([*run.events, *run.events]).events]
    assert sorted(order) == list(range(len(run.events)))
    place = {index: position for position, index in enumerate(order)}
    for index, before in enumerate(run.before):
        assert all(place[other] < place[index] for other in place if before >> other & 1)


@given(runs(restarts=False))
def test_the_order_is_that_of_the_stamps_unless_a_wall_clock_was_set_back(run: Run) -> None:
    """Messages alone never contradict their stamps: these are pure hybrid clocks."""
    order = [event.stamp for event in Causality(e for e in run.events if e.category == "message").events]
    assert order == sorted(order)


@given(runs(), st.randoms(use_true_random=False))
def test_nodes_may_deliver_their_events_in_any_interleaving(run: Run, rng: random.Random) -> None:
    lines = {node: [e for e in run.events if e.node == node] for node in {e.node: None for e in run.events}}
    shuffled: list[Event] = []
    while any(lines.values()):
        node = rng.choice([node for node in lines if lines[node]])
        shuffled.append(lines[node].pop(0))
    assert Causality(shuffled).events == Causality(run.events).events


@given(runs())
def test_vector_clocks_are_the_relation(run: Run) -> None:
    """Mattern: a before b exactly if the clock of b counts a."""
    clocks = list(Causality(run.events).clocks())
    for a, clock_a in clocks:
        for b, clock_b in clocks:
            before = run.before[run.events.index(b)] >> run.events.index(a) & 1
            assert bool(before) == (a is not b and clock_a[a.node] <= clock_b.get(a.node, 0))


def event(node: str, seq: int, time_s: float, cause: tuple[str, int] | None = None, stamp: int = 0) -> Event:
    return Event(node, seq, "view", stamp or round(time_s * 1000), time_s, cause, {"epoch": 1, "online": []})


def test_a_receive_before_its_send_by_the_stamps_still_comes_after_it() -> None:
    """A wall clock far ahead is not adopted, so the stamps may lie; the message does not."""
    common = {
        "service": "",
        "function": "",
        "frame": "cast",
        "request": 1,
        "bytes": 1,
        "transport": "udp",
        "message": 1,
    }
    send = Event("n2", 1, "send", 900, 1.0, None, {**common, "to": "n1"})
    recv = Event("n1", 1, "recv", 100, 1.1, ("n2", -1), {**common, "from": "n2"})
    causality = Causality([recv, send])
    assert causality.events == [send, recv]
    assert causality.cause(recv) is send
    assert causality.happens_before(send, recv)


def test_a_cause_of_several_lives_is_the_one_of_its_time() -> None:
    first, second = event("n1", 1, 1.0), event("n1", 1, 3.0)
    early, late = event("n2", 1, 2.0, ("n1", 1)), event("n2", 2, 4.0, ("n1", 1))
    causality = Causality([first, second, early, late])
    assert causality.cause(early) is first
    assert causality.cause(late) is second
    assert not causality.happens_before(second, early)


def test_batches_of_two_subscriptions_are_one_program() -> None:
    """Clocks of loops may tick in milliseconds, so the numbers decide."""
    events = [event("n1", seq, 1.0, stamp=5) for seq in range(1, 7)]
    assert Causality([*events[1::2], *events[::2]]).events == events
    assert Causality([*events[1::2], *events[::2]]).happens_before(events[0], events[1])


def test_what_was_not_collected_is_no_cause() -> None:
    alone = event("n1", 7, 1.0, ("n9", 3))
    causality = Causality([alone])
    assert causality.cause(alone) is None
    assert causality.past(alone) == []


def test_events_that_wait_for_each_other_end_the_wait_and_not_the_program() -> None:
    """No run makes them, a damaged file may: by time and stamps each could be the other's cause."""
    a1, a2 = event("a", 1, 1.0, ("b", 2), stamp=5), event("a", 2, 1.0, stamp=1)
    b1, b2 = event("b", 1, 1.0, ("a", 2), stamp=5), event("b", 2, 1.0, stamp=1)
    assert Causality([a1, a2, b1, b2]).events == [a1, a2, b1, b2]
    assert Causality([event("a", 1, 1.0, ("a", 1))]).cause(event("a", 1, 1.0)) is None


def test_an_event_of_another_journal_is_refused() -> None:
    with pytest.raises(BadRequest, match="event 9 of n1 .view. is not in this journal"):
        Journal(client_thread()).causal_past(event("n1", 9, 1.0))


def test_the_answer_is_kept_until_an_event_arrives() -> None:
    j = Journal(client_thread())
    j.append(event("n1", 1, 1.0))
    first = j.causality()
    assert j.causality() is first
    j.append(event("n1", 2, 2.0))
    assert len(j.causality()) == 2

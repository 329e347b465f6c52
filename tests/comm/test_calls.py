"""At most once, in a simulated world.

Whatever happens, a request runs at most once, a call ends by its deadline, and one that succeeded ran exactly once;
when the channel heals in time, all succeed.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.comm import calls
from gostore.comm.calls import Callee, Caller, CallLimits, Conversation
from gostore.core.errors import Unavailable

from .channel import LIMITS, CalleeNode, World

OPERATIONS = ("call", "call", "call", "call", "restart_callee", "restart_caller", "forget")


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    loss=st.sampled_from([0.0, 0.1, 0.4, 0.8]),
    duplicate=st.sampled_from([0.0, 0.3, 0.8]),
    kept=st.sampled_from([2, 16, 1000]),
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.floats(0, 8)), max_size=40),
)
def test_at_most_once_whatever_happens(
    seed: int, loss: float, duplicate: float, kept: int, operations: list[tuple[str, float]]
) -> None:
    limits = CallLimits(0.25, 8, 1000, kept)
    world = World(seed, loss, duplicate, delay_s=0.3, handler_s=0.5, limits=limits)

    def perform(operation: str, name: str) -> None:
        if operation == "call":
            world.caller(name).call(world.rng.uniform(0.1, 6.0), world.rng.choice([None, 1, 3]))
        elif operation == "restart_callee":
            world.restart_callee()
        elif operation == "restart_caller":
            world.restart_caller(name)
        else:
            world.callee.forget(name)

    for operation, when_s in operations:
        world.at(when_s, perform, operation, world.rng.choice("ab"))
    world.run()
    world.check()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    healed_s=st.floats(0, 5),
    duplicate=st.sampled_from([0.0, 0.5]),
    count=st.integers(1, 20),
)
def test_a_channel_that_heals_in_time_lets_every_call_succeed_once(
    seed: int, healed_s: float, duplicate: float, count: int
) -> None:
    # Eight sends with back-off take at least 0.8 * (0.25 + 0.5 + 1 + 4 * 2) = 7.8 s: more than 5.
    world = World(seed, loss=1.0, duplicate=duplicate, limits=CallLimits(0.25, 8, 1000, 1000))
    for _ in range(count):
        world.at(0.0, lambda: world.caller("a").call(30.0, None))

    def heal() -> None:
        world.loss = 0.0

    world.at(healed_s, heal)
    world.run()
    world.check()
    assert [outcome.ended for outcome in world.outcomes] == ["answered"] * count
    assert len(world.ran) == count


def test_a_lost_answer_is_sent_again_and_nothing_runs_twice() -> None:
    world = World(1)
    answers = iter([True, True, False])
    world.drop_next = lambda what: what == "answer" and next(answers, False)
    world.caller("a").call(10.0, None)
    world.run()
    world.check()
    assert world.outcomes[0].ended == "answered"
    assert list(world.ran.values()) == [1]


def test_a_restart_between_run_and_answer_is_forgotten_and_not_run_again() -> None:
    world = World(1)
    world.drop_next = lambda what: what == "answer"
    world.caller("a").call(10.0, None)
    world.at(0.3, world.restart_callee)
    world.run()
    world.check()
    assert world.outcomes[0].ended == "forgotten"
    assert list(world.ran.values()) == [1]


def test_an_evicted_caller_is_refused_and_not_run_again() -> None:
    world = World(1)
    world.drop_next = lambda what: what == "answer"
    world.caller("a").call(10.0, None)
    world.at(0.3, lambda: world.callee.forget("a"))
    world.run()
    world.check()
    assert world.outcomes[0].ended == "forgotten"
    assert list(world.ran.values()) == [1]


def test_an_evicted_answer_is_forgotten_and_not_run_again() -> None:
    limits = CallLimits(0.25, 8, 1000, 2)
    world = World(1, limits=limits)
    world.drop_next = lambda what: what == "answer" and world.now_s < 2.0
    for _ in range(5):
        world.caller("a").call(10.0, None)
    world.run()
    world.check()
    ended = [outcome.ended for outcome in world.outcomes]
    assert set(ended) == {"answered", "forgotten"}


def test_after_a_restart_the_next_call_succeeds() -> None:
    world = World(1)
    caller = world.caller("a")
    caller.call(10.0, None)
    world.at(1.0, world.restart_callee)
    world.at(1.0 + calls.HELLO_IDLE_S, caller.call, 10.0, None)  # idle so long: it says hello first
    world.run()
    world.check()
    assert [outcome.ended for outcome in world.outcomes] == ["answered", "answered"]


def test_no_peer_no_hang() -> None:
    world = World(1, loss=1.0)
    world.caller("a").call(3.0, 1)
    world.run()
    world.check()
    assert world.outcomes[0].ended == "timeout"
    assert world.outcomes[0].ended_s == pytest.approx(3.0)
    assert not world.ran


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_request_is_sent_at_most_as_often_as_allowed(attempts: int) -> None:
    world = World(1)
    world.drop_next = lambda what: what == "request"
    sent: list[float] = []
    world.caller("a").call(60.0, attempts)
    core = world.caller("a").core
    original = core.sent
    core.sent = lambda call: (sent.append(world.now_s), original(call))[1]  # type: ignore[method-assign]
    world.run()
    world.check()
    assert len(sent) == attempts
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    # The first wait began with the hello; from then on each is about twice the one before.
    for index, gap in enumerate(gaps[1:], start=1):
        wait_s = 0.25 * min(2**index, calls.BACKOFF_MAX)
        assert (1 - calls.JITTER) * wait_s <= gap + 1e-6 <= (1 + calls.JITTER) * wait_s + 1e-3


def test_a_callee_at_work_is_waited_for() -> None:
    world = World(1, handler_s=0.0)
    world.callee.finish = lambda *args: None  # type: ignore[method-assign]
    world.caller("a").call(40.0, 2)
    finish = CalleeNode.finish
    session_args: list[Any] = []
    world.callee.finish = lambda *args: session_args.append(args)  # type: ignore[method-assign]
    world.at(39.0, lambda: finish(world.callee, *session_args[0]))
    world.run()
    world.check()
    assert world.outcomes[0].ended == "answered"


def test_a_poke_tells_what_has_not_been_seen() -> None:
    callee = Callee(LIMITS)
    number = callee.hello("a", 1)
    session = callee.session("a")
    assert session is not None
    assert callee.request(session, number, 1, 1, poke=True) == calls.UNSEEN
    assert callee.request(session, number, 1, 1) == calls.RUN
    assert callee.request(session, number, 1, 1, poke=True) == calls.WORKING
    assert callee.finish(session, 1, "answer", 6)
    assert callee.request(session, number, 1, 1, poke=True) == calls.RESEND
    assert callee.kept(session, 1) == "answer"
    assert callee.request(session, number, 2, 2) == calls.RUN
    assert callee.released == ["answer"]
    assert callee.request(session, number, 1, 1) == calls.DROP


def test_kept_answers_are_bounded_in_number_and_bytes() -> None:
    callee = Callee(LIMITS)
    number = callee.hello("a", 1)
    session = callee.session("a")
    assert session is not None
    for request_id in range(1, 200):
        assert callee.request(session, number, request_id, 1) == calls.RUN
        callee.finish(session, request_id, "", calls.ANSWERS_SIZE_BYTES_MAX // 4)
        assert len(session.done) <= 4
        assert callee.kept_bytes <= calls.ANSWERS_SIZE_BYTES_MAX
    assert callee.request(session, number, 1, 1) == calls.FORGOTTEN
    assert callee.request(session, number, 199, 1) == calls.RESEND
    assert callee.request(session, number, 200, 200) == calls.RUN
    assert not session.done
    assert callee.kept_bytes == 0


def test_the_bound_of_bytes_is_shared_by_all_callers() -> None:
    callee, third = Callee(LIMITS), calls.ANSWERS_SIZE_BYTES_MAX // 3
    for name in "abcde":
        number = callee.hello(name, 1)
        session = callee.session(name)
        assert callee.request(session, number, 1, 1) == calls.RUN
        assert session is not None
        callee.finish(session, 1, name, third)
    assert callee.kept_bytes == 3 * third
    verdicts = []
    for name in "abcde":
        session = callee.session(name)
        assert session is not None
        verdicts.append(callee.request(session, session.number, 1, 1))
    assert verdicts == [calls.FORGOTTEN] * 2 + [calls.RESEND] * 3
    for name in "cde":
        callee.forget(name)
    assert callee.kept_bytes == 0
    late = callee.session("a")
    assert late is not None
    assert callee.request(late, late.number, 2, 1) == calls.RUN
    callee.forget("a")
    callee.finish(late, 2, "late", third)  # its handler ends after the caller was forgotten
    assert callee.kept_bytes == 0


def test_calls_in_flight_are_bounded_and_a_cancelled_one_makes_room() -> None:
    core, conversation = Caller(LIMITS, random.Random(1)), Conversation("b")
    started = [core.start(conversation, 0.0, 5.0)[0] for _ in range(LIMITS.calls_in_flight_max)]
    with pytest.raises(Unavailable):
        core.start(conversation, 0.0, 5.0)
    assert core.acknowledged_below(conversation) == started[0].id
    core.end(started[0])
    core.end(started[0])
    assert core.acknowledged_below(conversation) == started[1].id
    core.start(conversation, 0.0, 5.0)


def test_passive_calls_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    core, conversation = Caller(LIMITS, random.Random(1)), Conversation("b")
    large = calls.PASSIVE_SIZE_BYTES_MAX // 2
    held = [core.start(conversation, 0.0, 5.0, passive=True, size_bytes=large)[0] for _ in range(2)]
    with pytest.raises(Unavailable, match="redirected"):
        core.start(conversation, 0.0, 5.0, passive=True, size_bytes=1)
    core.start(conversation, 0.0, 5.0)  # they leave room for calls
    core.end(held[0])
    core.start(conversation, 0.0, 5.0, passive=True, size_bytes=large)
    monkeypatch.setattr(calls, "PASSIVE_MAX", 2)
    core.end(held[1])
    core.start(conversation, 0.0, 5.0, passive=True)
    with pytest.raises(Unavailable, match="redirected"):
        core.start(conversation, 0.0, 5.0, passive=True)


def test_a_passive_call_waits_to_be_nudged() -> None:
    core, conversation = Caller(LIMITS, random.Random(1)), Conversation("b")
    call, action = core.start(conversation, 0.0, 5.0, passive=True)
    assert action == calls.HELLO
    assert core.next_due_s() == 5.0
    core.met(conversation, 1)
    hello_id = core.greeting(conversation, 0.0)
    assert core.greeted(conversation, hello_id, 1, 9, 0.1) == ([], [call])
    core.sent(call)
    assert core.due(4.9) == []
    assert core.nudge(call, 4.9) == calls.SEND
    assert core.answered(call.id) is None
    assert core.due(5.0) == [(calls.TIMEOUT, call)]
    assert core.nudge(call, 5.1) == calls.WAIT


def test_a_new_session_takes_the_old_ones_calls_with_it() -> None:
    core, conversation = Caller(LIMITS, random.Random(1)), Conversation("b")
    call, _ = core.start(conversation, 0.0, 50.0)
    core.met(conversation, 1)
    core.greeted(conversation, core.greeting(conversation, 0.0), 1, 9, 0.0)
    core.sent(call)
    later, action = core.start(conversation, 10.0, 50.0)  # idle for long
    assert action == calls.HELLO
    hello_id = core.greeting(conversation, 10.0)
    assert core.greeted(conversation, hello_id + 1, 1, 10, 10.0) == ([], [])  # some hello of the past
    assert core.greeted(conversation, hello_id, 1, 10, 10.0) == ([call], [later])
    assert call.done


def test_a_request_of_a_former_session_is_refused() -> None:
    callee = Callee(LIMITS)
    former = callee.hello("a", 1)
    assert callee.hello("a", 1) == former
    callee.forget("a")
    number = callee.hello("a", 1)
    assert number > former
    assert callee.request(callee.session("a"), former, 1, 1) == calls.REFUSE
    assert callee.request(callee.session("a"), number, 1, 1) == calls.RUN
    assert callee.request(None, number, 2, 1) == calls.REFUSE

"""The two sides by their exact numbers: jitter is an argument, so time is exact."""

from __future__ import annotations

import random

import pytest

from gostore.comm import calls
from gostore.comm.calls import Callee, Caller, CallLimits, Conversation, Session
from gostore.core.errors import Unavailable

from .channel import LIMITS


class Steady(random.Random):
    """Draws one number for ever: 0.5 is no jitter at all, 0 and 1 are its ends."""

    def __init__(self, number: float = 0.5) -> None:
        super().__init__(0)
        self.number = number

    def random(self) -> float:
        return self.number


def linked(jitter: float = 0.5, limits: CallLimits = LIMITS, now_s: float = 0.0) -> tuple[Caller, Conversation]:
    """A caller that has just met its callee: incarnation 7, session 3."""
    core, conversation = Caller(limits, Steady(jitter)), Conversation("b")
    core.met(conversation, 7)
    assert core.greeted(conversation, core.greeting(conversation, now_s), 7, 3, now_s) == ([], [])
    return core, conversation


@pytest.mark.parametrize(("jitter", "factor"), [(0.5, 1.0), (0.0, 0.8), (1.0, 1.2)])
def test_waits_double_up_to_eight_times_the_first_and_end_with_the_attempts(jitter: float, factor: float) -> None:
    core, conversation = linked(jitter, now_s=100.0)
    call, action = core.start(conversation, 100.0, 200.0)
    assert action == calls.SEND
    core.sent(call)
    now_s, waits = 100.0, []
    while (due_s := core.next_due_s()) is not None and due_s < 200.0:
        assert core.due(due_s - 1e-9) == []
        effects = core.due(due_s)
        waits.append(due_s - now_s)
        now_s = due_s
        assert core.due(due_s) == []
        if effects:
            assert effects == [(calls.SEND, call)]
            core.sent(call)
    # Eight sends, and after the last a wait like the others before only the deadline is left.
    assert waits == pytest.approx([factor * 0.25 * wait for wait in (1, 2, 4, 8, 8, 8, 8, 8)])
    assert call.sends == 8
    assert core.due(200.0) == [(calls.TIMEOUT, call)]
    assert (call.done, len(core), core.next_due_s()) == (True, 0, None)


def test_no_wait_is_longer_than_the_deadline() -> None:
    core, conversation = linked()
    call, _ = core.start(conversation, 0.0, 0.1)
    assert core.next_due_s() == 0.1
    assert core.due(0.1) == [(calls.TIMEOUT, call)]
    call, _ = core.start(conversation, 1.0, 1.6)
    assert core.next_due_s() == 1.25
    assert core.due(1.25) == [(calls.SEND, call)]
    assert core.next_due_s() == 1.6
    assert conversation.calls == {call.id: call}
    assert core.due(1.6) == [(calls.TIMEOUT, call)]
    assert conversation.calls == {}


def test_a_callee_at_work_costs_no_attempt_and_puts_the_next_one_off() -> None:
    core, conversation = linked()
    call, _ = core.start(conversation, 0.0, 50.0, attempts=1)
    core.sent(call)
    assert call.attempts_left == 0
    core.working(call.id, 0.1)
    assert (call.attempts_left, core.next_due_s()) == (1, 0.1 + 8 * 0.25)
    assert core.due(2.0) == []
    assert core.due(2.1) == [(calls.SEND, call)]
    core.working(12345, 3.0)  # of a call that has ended
    passive, _ = core.start(conversation, 0.0, 9.0, passive=True)
    core.working(passive.id, 1.0)
    assert (passive.attempts_left, passive.due_s) == (LIMITS.attempts_max, 9.0)


def test_one_who_was_heard_just_now_needs_no_hello() -> None:
    for idle_s, expected in ((0.0, calls.SEND), (2.999, calls.SEND), (3.0, calls.HELLO), (1e9, calls.HELLO)):
        core, conversation = linked(now_s=10.0)
        assert core.start(conversation, 10.0 + idle_s, 1e10)[1] == expected
    assert Caller(LIMITS, Steady()).start(Conversation("new"), -1e9, 0.0)[1] == calls.HELLO
    # What was sent once is sent again without a hello: it is bound to a session.
    core, conversation = linked()
    call, _ = core.start(conversation, 0.0, 1e9, passive=True)
    core.sent(call)
    assert core.nudge(call, 1e6) == calls.SEND


def test_one_hello_at_a_time_under_one_id_until_it_is_answered() -> None:
    core, conversation = Caller(LIMITS, Steady()), Conversation("b")
    core.met(conversation, 7)
    hello_id = core.greeting(conversation, 10.0)
    assert hello_id > 0
    assert core.greeting(conversation, 10.124) == 0
    assert core.greeting(conversation, 10.125) == hello_id
    assert core.greeting(conversation, 10.2) == 0
    assert core.greeting(conversation, 10.25) == hello_id
    for other in ((hello_id + 1, 7), (hello_id - 1, 7), (hello_id, 6), (hello_id, 8)):
        assert core.greeted(conversation, *other, 3, 10.3) == ([], [])
        assert conversation.session == 0
    core.greeted(conversation, hello_id, 7, 3, 10.3)
    assert (conversation.session, conversation.heard_s) == (3, 10.3)
    again = core.greeting(conversation, 10.3)
    assert again not in (0, hello_id), "an answered hello is over: the next may come at once"


def test_numbers_are_given_once_and_count_from_one() -> None:
    core, conversation = Caller(LIMITS, Steady()), Conversation("b")
    assert core.acknowledged_below(conversation) == 1
    ids = [core.new_id(), core.start(conversation, 0.0, 1.0)[0].id, core.greeting(conversation, 0.0), core.new_id()]
    assert ids == [1, 2, 3, 4]
    assert core.acknowledged_below(conversation) == 2
    assert core.acknowledged_below(Conversation("c")) == 5
    assert [call.id for call in core.outstanding()] == [2]
    assert core.get(2) is core.outstanding()[0]
    assert core.get(3) is None


def test_an_answer_ends_the_call_that_was_sent_and_no_other() -> None:
    core, conversation = linked()
    call, _ = core.start(conversation, 0.0, 5.0)
    assert core.answered(call.id) is None, "nothing was sent: this answers a call of an earlier life"
    assert core.answered(call.id + 1) is None
    core.sent(call)
    assert core.answered(call.id) is call
    assert core.answered(call.id) is None
    assert (len(core), core.next_due_s(), call.done) == (0, None, True)


def test_a_peer_that_restarted_takes_with_it_what_was_sent() -> None:
    core, conversation = linked()
    sent, _ = core.start(conversation, 0.0, 5.0)
    core.sent(sent)
    kept, _ = core.start(conversation, 0.0, 5.0)
    assert core.met(conversation, 7) == []
    assert conversation.session == 3
    assert core.met(conversation, 8) == [sent]
    assert (conversation.incarnation, conversation.session, sent.done, kept.done) == (8, 0, True, False)
    assert core.greeted(conversation, core.greeting(conversation, 1.0), 8, 4, 1.0) == ([], [kept])


def test_a_hello_that_keeps_the_session_loses_nothing() -> None:
    core, conversation = linked()
    call, _ = core.start(conversation, 0.0, 50.0)
    core.sent(call)
    assert core.greeted(conversation, core.greeting(conversation, 9.0), 7, 3, 9.0) == ([], [])
    assert not call.done


def test_bounds_of_calls_are_what_the_constants_say() -> None:
    core, conversation = linked(limits=CallLimits(0.25, 8, 2, 16))
    held = [core.start(conversation, 0.0, 5.0, passive=True)[0] for _ in range(16_384)]
    with pytest.raises(Unavailable, match=r"^16384 redirected requests"):
        core.start(conversation, 0.0, 5.0, passive=True)
    own = [core.start(conversation, 0.0, 5.0)[0] for _ in range(2)]
    with pytest.raises(Unavailable, match="calls_in_flight_max = 2 allows no more"):
        core.start(conversation, 0.0, 5.0)
    core.end(own[0])
    core.start(conversation, 0.0, 5.0)
    for call in held:
        core.end(call)
    core.end(held[0])
    assert len(core) == 2
    with pytest.raises(Unavailable, match="calls_in_flight_max"):
        core.start(conversation, 0.0, 5.0)

    half, all_of_it = 128 * 1024 * 1024, 256 * 1024 * 1024
    for sizes in ([all_of_it], [half, half], [1, all_of_it - 1]):
        held = [core.start(conversation, 0.0, 5.0, passive=True, size_bytes=size)[0] for size in sizes]
        with pytest.raises(Unavailable, match="redirected"):
            core.start(conversation, 0.0, 5.0, passive=True, size_bytes=1)
        for call in held:
            core.end(call)


def test_what_is_to_be_done_has_one_number_each() -> None:
    actions = (calls.WAIT, calls.SEND, calls.HELLO, calls.TIMEOUT)
    verdicts = (calls.RUN, calls.WORKING, calls.RESEND, calls.DROP, calls.REFUSE, calls.FORGOTTEN, calls.UNSEEN)
    assert len(dict.fromkeys((*actions, *verdicts))) == 11


def answering(kept_max: int = 4) -> tuple[Callee, Session]:
    callee = Callee(CallLimits(0.25, 8, 64, kept_max))
    callee.hello("a", 1)
    session = callee.session("a")
    assert session is not None
    return callee, session


def ask(callee: Callee, session: Session, request_id: int, below: int = 0, size_bytes: int = 1) -> None:
    assert callee.request(session, session.number, request_id, below) == calls.RUN
    assert callee.finish(session, request_id, f"answer {request_id}", size_bytes)


def test_answers_are_kept_up_to_their_number_in_the_order_of_completion() -> None:
    callee, session = answering(kept_max=4)
    for request_id in (5, 3, 9, 1):
        ask(callee, session, request_id)
    assert list(session.done) == [5, 3, 9, 1]
    ask(callee, session, 7)
    assert list(session.done) == [3, 9, 1, 7]
    assert session.evicted_below == 6
    number = session.number
    verdicts = {request_id: callee.request(session, number, request_id, 0, poke=True) for request_id in range(1, 10)}
    kept = dict.fromkeys((1, 3, 7, 9), calls.RESEND)
    assert verdicts == {**dict.fromkeys((2, 4, 5), calls.FORGOTTEN), **dict.fromkeys((6, 8), calls.UNSEEN), **kept}
    ask(callee, session, 2000)
    assert session.evicted_below == 6, "the bound never falls, though 3 went after 5"
    assert callee.kept(session, 7) == "answer 7"
    assert callee.kept(session, 5) is None
    assert callee.kept_bytes == 4


def test_what_is_acknowledged_is_released_and_never_run_again() -> None:
    callee, session = answering()
    for request_id in (3, 1, 2):
        ask(callee, session, request_id, size_bytes=10)
    assert callee.request(session, session.number, 4, 3) == calls.RUN
    assert (callee.released, callee.kept_bytes) == (["answer 1", "answer 2"], 10)
    assert [callee.request(session, session.number, n, 1) for n in (1, 2, 3)] == [calls.DROP, calls.DROP, calls.RESEND]
    assert session.acknowledged == 3, "an older acknowledgement that comes late changes nothing"
    assert callee.request(session, session.number, 5, 5) == calls.RUN
    assert callee.released == ["answer 1", "answer 2", "answer 3"]
    assert not callee.finish(session, 4, "late", 1), "4 is below what is awaited"
    assert callee.finish(session, 5, "in time", 1)
    assert (list(session.done), callee.kept_bytes) == ([5], 1)
    assert callee.request(session, session.number, 4, 5) == calls.DROP


def test_as_many_run_at_a_time_as_are_kept() -> None:
    callee, session = answering(kept_max=2)
    number = session.number
    assert [callee.request(session, number, n, 0) for n in (1, 2, 3)] == [calls.RUN, calls.RUN, calls.DROP]
    assert callee.request(session, number, 2, 0) == calls.WORKING
    callee.finish(session, 1, "", 0)
    assert callee.request(session, number, 3, 0) == calls.RUN


def test_the_memory_of_ids_is_bounded_however_many_are_evicted() -> None:
    callee, session = answering(kept_max=4)
    for request_id in range(1, 100):
        ask(callee, session, request_id)
        assert len(session._ids) <= 8
        assert list(session.done) == list(range(max(1, request_id - 3), request_id + 1))
    assert callee.request(session, session.number, 100, 98) == calls.RUN
    assert callee.released == ["answer 96", "answer 97"]


def test_answers_take_as_many_bytes_as_the_constant_says_and_the_last_one_stays() -> None:
    all_of_it = 256 * 1024 * 1024
    callee, session = answering()
    ask(callee, session, 1, size_bytes=1)
    ask(callee, session, 2, size_bytes=all_of_it - 1)
    assert list(session.done) == [1, 2], "just the bound"
    ask(callee, session, 3, size_bytes=0)
    assert list(session.done) == [1, 2, 3]
    ask(callee, session, 4, size_bytes=1)
    assert list(session.done) == [2, 3, 4]
    assert callee.kept_bytes == all_of_it
    ask(callee, session, 5, size_bytes=2 * all_of_it)
    assert (list(session.done), callee.kept_bytes) == ([5], 2 * all_of_it), "it is needed, whatever its size"


def test_sessions_count_up_and_belong_to_one_life_of_the_caller() -> None:
    callee = Callee(LIMITS)
    assert [callee.hello("a", 1), callee.hello("b", 1), callee.hello("a", 1)] == [1, 2, 1]
    first = callee.session("a")
    assert first is not None
    ask(callee, first, 1, size_bytes=5)
    assert callee.hello("a", 2) == 3
    assert (callee.kept_bytes, first.closed) == (0, True)
    now = callee.session("a")
    assert now is not None
    assert (now.incarnation, now.number, now.closed, now.done) == (2, 3, False, {})
    callee.forget("nobody")
    callee.forget("a")
    assert callee.session("a") is None
    assert callee.session("b") is not None


def test_calls_of_one_callee_do_not_hold_up_those_of_another() -> None:
    core, one = linked()
    other = Conversation("c")
    first, _ = core.start(one, 0.0, 9.0)
    second, _ = core.start(other, 0.0, 9.0)
    core.sent(first)
    assert core.met(other, 5) == []
    assert core.lost(one) == [first]
    assert core.outstanding() == [second]
    assert (core.acknowledged_below(one), core.acknowledged_below(other)) == (second.id + 1, second.id)

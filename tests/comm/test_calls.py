"""At most once, in a simulated world: a channel that loses, duplicates and reorders, and peers that restart.

No asyncio and no clock: the two cores, a heap of messages, and virtual time. Whatever happens, a request runs at most
once, a call ends by its deadline, and one that succeeded ran exactly once; when the channel heals in time, all succeed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.comm import calls
from gostore.comm.calls import Callee, Caller, CallLimits, Conversation, OutCall, Session
from gostore.core.errors import Unavailable

LIMITS = CallLimits(attempt_timeout_s=0.25, attempts_max=8, calls_in_flight_max=64, answers_kept_max=16)


@dataclass
class Outcome:
    caller: str
    incarnation: int
    id: int
    deadline_s: float
    ended: str = ""
    ended_s: float = 0.0


@dataclass
class World:
    """One callee, some callers, and the channel between them, under virtual time."""

    seed: int
    loss: float = 0.0
    duplicate: float = 0.0
    delay_s: float = 0.05
    handler_s: float = 0.1
    limits: CallLimits = LIMITS
    now_s: float = 0.0
    ran: dict[tuple[str, int, int], int] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    drop_next: Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = 0
        self.callee = CalleeNode(self, 1)
        self.callers: dict[str, CallerNode] = {}

    def at(self, delay_s: float, act: Callable[..., None], *args: Any) -> None:
        self.order += 1
        heapq.heappush(self.queue, (self.now_s + delay_s, self.order, act, args))

    def send(self, what: str, act: Callable[..., None], *args: Any) -> None:
        copies = 1 + (self.rng.random() < self.duplicate)
        for _ in range(copies):
            if self.drop_next is not None and self.drop_next(what):
                continue
            if self.rng.random() >= self.loss:
                # A few are very late, so that they meet another session or incarnation.
                late = 20 if self.rng.random() < 0.05 else 1
                self.at(self.rng.uniform(0, self.delay_s * late), act, *args)

    def caller(self, name: str) -> CallerNode:
        if name not in self.callers:
            self.callers[name] = CallerNode(self, name, 1)
        return self.callers[name]

    def restart_caller(self, name: str) -> None:
        old = self.caller(name)
        for outcome in old.outcomes.values():
            outcome.ended = outcome.ended or "crashed"
        self.callers[name] = CallerNode(self, name, old.incarnation + 1)

    def restart_callee(self) -> None:
        self.callee = CalleeNode(self, self.callee.incarnation + 1)

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self.queue:
            when, _, act, args = heapq.heappop(self.queue)
            assert when < 10_000, "it goes on for ever"
            self.now_s = max(self.now_s, when)
            act(*args)

    def check(self) -> None:
        assert all(count == 1 for count in self.ran.values()), self.ran
        for outcome in self.outcomes:
            assert outcome.ended, outcome
            if outcome.ended == "answered":
                assert self.ran.get((outcome.caller, outcome.incarnation, outcome.id)) == 1, outcome
            if outcome.ended in ("answered", "timeout"):
                assert outcome.ended_s <= outcome.deadline_s + 1e-6


class CallerNode:
    """Does for ``Caller`` what an endpoint does."""

    def __init__(self, world: World, name: str, incarnation: int) -> None:
        self.world, self.name, self.incarnation = world, name, incarnation
        self.core = Caller(world.limits, world.rng)
        self.conversation = Conversation("callee")
        self.outcomes: dict[int, Outcome] = {}

    @property
    def alive(self) -> bool:
        return self.world.callers.get(self.name) is self

    def call(self, timeout_s: float, attempts: int | None) -> None:
        if not self.alive:
            return
        now_s = self.world.now_s
        call, action = self.core.start(self.conversation, now_s, now_s + timeout_s, attempts)
        outcome = Outcome(self.name, self.incarnation, call.id, call.deadline_s)
        self.outcomes[call.id] = outcome
        self.world.outcomes.append(outcome)
        self.act(action, call)
        self.arm()

    def arm(self) -> None:
        due_s = self.core.next_due_s()
        if due_s is not None:
            self.world.at(max(0.0, due_s - self.world.now_s), self.tick)

    def tick(self) -> None:
        if self.alive:
            effects = self.core.due(self.world.now_s)
            for action, call in effects:
                self.act(action, call)
            if effects or self.core.next_due_s() is not None:
                self.arm_once()

    def arm_once(self) -> None:
        due_s = self.core.next_due_s()
        if due_s is not None and due_s > self.world.now_s:
            self.world.at(due_s - self.world.now_s, self.tick)

    def act(self, action: int, call: OutCall) -> None:
        if action == calls.SEND:
            self.request(call)
        elif action == calls.HELLO:
            hello_id = self.core.greeting(self.conversation, self.world.now_s)
            if hello_id:
                self.world.send("hello", lambda: self.world.callee.hello(self, hello_id))
        elif action == calls.TIMEOUT:
            self.end(call.id, "timeout")

    def request(self, call: OutCall) -> None:
        known, session = self.conversation.incarnation, self.conversation.session
        acknowledged = self.core.acknowledged_below(self.conversation)
        self.core.sent(call)
        args = (self, known, session, call.id, acknowledged)
        self.world.send("request", lambda: self.world.callee.request(*args))

    def end(self, request_id: int, how: str) -> None:
        outcome = self.outcomes[request_id]
        assert not outcome.ended, f"{outcome} ended again as {how}"
        outcome.ended, outcome.ended_s = how, self.world.now_s

    def met(self, incarnation: int) -> bool:
        if not self.alive or incarnation < self.conversation.incarnation:
            return False
        for call in self.core.met(self.conversation, incarnation):
            self.end(call.id, "forgotten")
        self.conversation.heard_s = self.world.now_s
        return True

    def hello_ack(self, incarnation: int, hello_id: int, session: int) -> None:
        if self.met(incarnation):
            lost, ready = self.core.greeted(self.conversation, hello_id, incarnation, session, self.world.now_s)
            for call in lost:
                self.end(call.id, "forgotten")
            for call in ready:
                self.request(call)

    def answer(self, incarnation: int, request_id: int, how: str) -> None:
        if self.met(incarnation) and self.core.answered(request_id) is not None:
            self.end(request_id, how)

    def refused(self, incarnation: int, session: int) -> None:
        if self.met(incarnation) and session == self.conversation.session:
            for call in self.core.lost(self.conversation):
                self.end(call.id, "forgotten")

    def working(self, incarnation: int, request_id: int) -> None:
        if self.met(incarnation):
            self.core.working(request_id, self.world.now_s)
            self.arm()


class CalleeNode:
    """Does for ``Callee`` what an endpoint does."""

    def __init__(self, world: World, incarnation: int) -> None:
        self.world, self.incarnation = world, incarnation
        self.core = Callee(world.limits)
        self.known: dict[str, int] = {}
        self.linked: dict[str, Session | None] = {}

    def meet(self, caller: CallerNode) -> bool:
        known = self.known.get(caller.name, 0)
        if caller.incarnation < known:
            return False
        if caller.incarnation > known:
            self.known[caller.name] = caller.incarnation
            self.linked[caller.name] = None
        return True

    def forget(self, name: str) -> None:
        self.core.forget(name)
        self.known.pop(name, None)
        self.linked.pop(name, None)

    def hello(self, caller: CallerNode, hello_id: int) -> None:
        if self.meet(caller):
            number = self.core.hello(caller.name, caller.incarnation)
            self.linked[caller.name] = self.core.session(caller.name)
            self.world.send("hello_ack", caller.hello_ack, self.incarnation, hello_id, number)

    def request(self, caller: CallerNode, known: int, number: int, request_id: int, acknowledged: int) -> None:
        if not self.meet(caller):
            return
        session = self.linked[caller.name]
        if session is None or known != self.incarnation:
            self.world.send("refused", caller.refused, self.incarnation, number)
            return
        verdict = self.core.request(session, number, request_id, acknowledged)
        if verdict == calls.RUN:
            key = (caller.name, caller.incarnation, request_id)
            self.world.ran[key] = self.world.ran.get(key, 0) + 1
            self.world.at(self.world.rng.uniform(0, self.world.handler_s), self.finish, caller, session, request_id)
        elif verdict == calls.RESEND:
            assert self.core.kept(session, request_id) == request_id
            self.world.send("answer", caller.answer, self.incarnation, request_id, "answered")
        elif verdict == calls.WORKING:
            self.world.send("working", caller.working, self.incarnation, request_id)
        elif verdict == calls.FORGOTTEN:
            self.world.send("answer", caller.answer, self.incarnation, request_id, "forgotten")
        elif verdict == calls.REFUSE:
            self.world.send("refused", caller.refused, self.incarnation, number)

    def finish(self, caller: CallerNode, session: Session, request_id: int) -> None:
        if self.world.callee is self and self.core.finish(session, request_id, request_id, 10):
            self.world.send("answer", caller.answer, self.incarnation, request_id, "answered")


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


# The two sides by their exact numbers: jitter is an argument, so time is exact.


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

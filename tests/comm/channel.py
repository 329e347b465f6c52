"""A channel that loses, duplicates and reorders, and peers that restart: a simulated world for the cores of calls.

No asyncio and no clock: the two cores, a heap of messages, and virtual time.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gostore.comm import calls
from gostore.comm.calls import Callee, Caller, CallLimits, Conversation, OutCall, Session

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

"""Scenarios of remote calls: one caller, one callee, a network in which every message waits to be delivered or lost.

Commands:

``call a timeout=5``      the caller calls ``a``; it has up to 5 seconds (``attempts=N`` sendings at most)
``deliver``               the oldest message arrives; ``deliver all``: all that wait, and what they lead to
``lose``                  the oldest message is lost; ``lose all``
``duplicate``             the network will deliver the oldest message once more, after all that wait
``delay``                 the oldest message will arrive after all that wait
``pass 0.5``              seconds pass; the caller does what is due
``finish a``              the callee's handler of ``a`` has run and returns
``restart``               the callee restarts; it remembers nothing
``forget``                the callee forgets the caller, for want of room
``network``               what waits
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gostore.comm import calls
from gostore.comm.calls import Callee, Caller, CallLimits, Conversation, OutCall, Session

LIMITS = CallLimits(attempt_timeout_s=0.25, attempts_max=4, calls_in_flight_max=64, answers_kept_max=16)
MESSAGES_MAX = 1_000


class NoJitter:
    """In the middle of its range: a person wants to follow the figures."""

    def random(self) -> float:
        return 0.5


@dataclass(frozen=True)
class Message:
    """``request`` has (incarnation, session, id, acknowledged below), the others what they need of it."""

    to: str
    kind: str
    numbers: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return f"{'caller' if self.to == 'callee' else 'callee'} -> {self.to}: {self.text}"


class Line:
    """Does for both cores what their endpoints do."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.network: deque[Message] = deque()
        self.lines: list[str] = []
        self.caller = Caller(LIMITS, NoJitter())  # type: ignore[arg-type]  # no other of its methods is used
        self.conversation = Conversation("callee")
        self.names: dict[int, str] = {}
        self.incarnation = 0
        self.restart()

    def restart(self) -> None:
        self.incarnation += 1
        self.callee = Callee(LIMITS)
        self.session: Session | None = None

    # the caller

    def call(self, name: str, timeout_s: float, attempts: int | None) -> None:
        call, action = self.caller.start(self.conversation, self.now_s, self.now_s + timeout_s, attempts)
        self.names[call.id] = name
        self._act(action, call)

    def elapse(self, seconds: float) -> None:
        """Up to the end of the span, one deadline after the other."""
        end_s = self.now_s + seconds
        while (due_s := self.caller.next_due_s()) is not None and due_s <= end_s:
            self.now_s = max(self.now_s, due_s)
            for action, call in self.caller.due(self.now_s):
                self._act(action, call)
        self.now_s = end_s

    def _act(self, action: int, call: OutCall) -> None:
        if action == calls.SEND:
            self._request(call)
        elif action == calls.HELLO:
            hello_id = self.caller.greeting(self.conversation, self.now_s)
            if hello_id:
                self._send("callee", "hello", (hello_id,), "hello")
        elif action == calls.TIMEOUT:
            may = "it may have run" if call.bound else "it was never sent"
            self.lines.append(f"{self.now_s:.2f} s  {self.names[call.id]}: Timeout, {may}")

    def _request(self, call: OutCall) -> None:
        below = self.caller.acknowledged_below(self.conversation)
        again = " again" if call.sends else ""
        self.caller.sent(call)
        numbers = (self.conversation.incarnation, self.conversation.session, call.id, below)
        self._send("callee", "request", numbers, f"request {call.id}, {self.names[call.id]}{again}")

    def _lost(self, ended: list[OutCall]) -> None:
        self.lines += [f"{self.now_s:.2f} s  {self.names[call.id]}: Forgotten, it may have run" for call in ended]

    def _to_caller(self, message: Message) -> None:
        incarnation, *numbers = message.numbers
        if incarnation < self.conversation.incarnation:
            self.lines.append("  from a former life of the callee: dropped")
            return
        self._lost(self.caller.met(self.conversation, incarnation))
        self.conversation.heard_s = self.now_s
        match message.kind, numbers:
            case "welcome", [hello_id, session]:
                lost, ready = self.caller.greeted(self.conversation, hello_id, incarnation, session, self.now_s)
                self._lost(lost)
                for call in ready:
                    self._request(call)
            case "answer", [request_id]:
                ended = self.caller.answered(request_id) is not None
                what = f"{self.names[request_id]}: returns" if ended else "nobody waits for it: dropped"
                self.lines.append(f"{self.now_s:.2f} s  {what}" if ended else f"  {what}")
            case "working", [request_id]:
                self.caller.working(request_id, self.now_s)
            case "refused", [session] if session == self.conversation.session:
                self._lost(self.caller.lost(self.conversation))

    # the callee

    def _to_callee(self, message: Message) -> None:
        if message.kind == "hello":
            number = self.callee.hello("caller", 1)
            self.session = self.callee.session("caller")
            self._reply("welcome", (*message.numbers, number), f"welcome to incarnation {self.incarnation}")
            return
        incarnation, session, request_id, below = message.numbers
        if incarnation != self.incarnation:
            self._reply("refused", (session,), f"I am incarnation {self.incarnation} and know nothing of this")
            return
        verdict = self.callee.request(self.session, session, request_id, below)
        name = self.names[request_id]
        if verdict == calls.RUN:
            self.lines.append(f"  the callee runs {name}")
        elif verdict == calls.RESEND:
            self.lines.append(f"  the callee has run {name} and kept its answer")
            self._reply("answer", (request_id,), f"answer {request_id}")
        elif verdict == calls.WORKING:
            self.lines.append(f"  the callee is running {name}")
            self._reply("working", (request_id,), f"still at work on {request_id}")
        elif verdict == calls.DROP:
            self.lines.append(f"  the caller has the answer of {name}: dropped")
        else:
            self._reply("refused", (session,), "I do not know you any more")

    def finish(self, name: str) -> None:
        assert self.session is not None
        request_id = next(number for number in self.session.running if self.names[number] == name)
        if self.callee.finish(self.session, request_id, name, 10):
            self._reply("answer", (request_id,), f"answer {request_id}")

    def _reply(self, kind: str, numbers: tuple[int, ...], text: str) -> None:
        self._send("caller", kind, (self.incarnation, *numbers), text)

    # the network

    def _send(self, to: str, kind: str, numbers: tuple[int, ...], text: str) -> None:
        message = Message(to, kind, numbers, text)
        self.network.append(message)
        assert len(self.network) <= MESSAGES_MAX
        self.lines.append(f"{self.now_s:.2f} s  {message}")

    def deliver(self) -> None:
        message = self.network.popleft()
        self.lines.append(f"delivered: {message.text}")
        if message.to == "callee":
            self._to_callee(message)
        else:
            self._to_caller(message)


def test_calls(scenario, transcript):
    line = Line()

    def handle(step):
        match step.name, step.args:
            case "call", [name]:
                attempts = int(step.options["attempts"]) if "attempts" in step.options else None
                line.call(name, float(step.options.get("timeout", 5)), attempts)
            case "deliver", []:
                line.deliver()
            case "deliver", ["all"]:
                while line.network:
                    line.deliver()
            case "lose", []:
                line.lines.append(f"lost: {line.network.popleft().text}")
            case "lose", ["all"]:
                line.lines += [f"lost: {message.text}" for message in line.network]
                line.network.clear()
            case "duplicate", []:
                line.network.append(line.network[0])
            case "delay", []:
                line.network.append(line.network.popleft())
            case "pass", [seconds]:
                line.elapse(float(seconds))
            case "finish", [name]:
                line.finish(name)
            case "restart", []:
                line.restart()
            case "forget", []:
                line.callee.forget("caller")
                line.session = None
            case "network", []:
                line.lines += [str(message) for message in line.network]
            case _:
                raise ValueError(f"no such command: {step.name} {step.args}")
        printed, line.lines = line.lines, []
        return "\n".join(printed) or "ok"

    transcript(scenario, handle)

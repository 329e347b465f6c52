"""Scenarios of failure detection: detectors side by side, every message delivered by hand or by ``run``.

Commands:

``members n1 n2 n3``     detectors that know each other, with the ``fast`` profile
``cut n1 n2``            what n1 sends to n2 is lost (``both=yes``: and back); ``heal`` ends all cuts
``kill n3``              it sends and hears nothing any more; ``start n3 incarnation=1001`` starts its next life
``add n3 incarnation=I`` the master has told everybody that n3 is back
``run``                  let time pass: ``periods=N``; or ``until=suspected|cleared|died|refuted``. What is printed are
                         the messages that matter (no probe that is answered at once) and what members conclude,
                         with the time in periods; ``show=conclusions``: these alone
``hear n1 n3 suspect 2`` a rumour reaches n1: n3 is suspect (or alive) in incarnation 2
``think n3``             what everybody thinks of n3
"""

from __future__ import annotations

import heapq
import random

from gostore.services.cls.swim import (
    ACK,
    NACK,
    PING,
    PING_REQ,
    PROFILES,
    Cleared,
    Died,
    Effect,
    Message,
    Refuted,
    Rumour,
    Send,
    Suspected,
    Swim,
)

TUNABLES = PROFILES["fast"]
DELAY_S = 0.002
PERIODS_MAX = 200


class Group:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.swims: dict[str, Swim] = {}
        self.down: list[str] = []
        self.cuts: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.brief = False
        self._heap: list[tuple[float, int, str, str, Message]] = []
        self._sent = 0
        self.concluded: list[str] = []

    # commands

    def members(self, *names: str) -> None:
        for name in names:
            self.swims[name] = Swim(name, 1, TUNABLES, random.Random(name), self.now_s)
        for name in names:
            for other in names:
                if other != name:
                    self.swims[name].add(other, 1)

    def start(self, name: str, incarnation: int) -> None:
        self.down.remove(name)
        self.swims[name] = swim = Swim(name, incarnation, TUNABLES, random.Random(name), self.now_s)
        for other in self.swims:
            if other != name:
                swim.add(other, self.swims[other].incarnation)
        self.add(name, incarnation)

    def add(self, name: str, incarnation: int) -> None:
        for other, swim in self.swims.items():
            if other != name:
                swim.add(name, incarnation)

    def run(self, periods: int, until: str, brief: bool) -> None:
        self.brief = brief
        end_s = self.now_s + periods * TUNABLES.period_s
        self.concluded.clear()
        while until not in self.concluded:
            timers = [(swim.due_s, name) for name, swim in self.swims.items() if name not in self.down]
            due_s, name = min(timers)
            arrival_s = self._heap[0][0] if self._heap else float("inf")
            if min(due_s, arrival_s) > end_s:
                self.now_s = end_s
                return
            if arrival_s <= due_s:
                self.now_s, _, source, to, message = heapq.heappop(self._heap)
                if to not in self.down:
                    self.conclude(to, self.swims[to].receive(source, message, self.now_s))
            else:
                self.now_s = due_s
                self.conclude(name, self.swims[name].tick(due_s))

    # what happens

    def conclude(self, name: str, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(name, effect)
            else:
                self.concluded.append(type(effect).__name__.lower())
                self.lines.append(f"{name}: {_conclusion(effect)}   (period {self.now_s / TUNABLES.period_s:.1f})")

    def _send(self, source: str, send: Send) -> None:
        to, message = send.to, send.message
        lost = (source, to) in self.cuts or to in self.down
        rumours = [
            f"{r.name} is {r.status} {r.incarnation}" + (f" by {' '.join(r.by)}" if r.by else "")
            for r in message.rumours
        ]
        about = f" [{', '.join(rumours)}]" if rumours else ""
        if not self.brief and (lost or message.kind in (PING_REQ, NACK) or about):
            text = {PING: "ping", ACK: "ack", PING_REQ: f"ping {message.target} for me", NACK: "no answer"}[
                message.kind
            ]
            self.lines.append(f"{source} -> {to}: {text}{about}{', lost' if lost else ''}")
        if not lost:
            self._sent += 1
            heapq.heappush(self._heap, (self.now_s + DELAY_S, self._sent, source, to, message))


def _conclusion(effect: Effect) -> str:
    match effect:
        case Suspected(name, incarnation, first_hand):
            return f"suspects {name}, incarnation {incarnation}" + ("" if first_hand else ", because it was told so")
        case Cleared(name, incarnation):
            return f"{name} is alive after all, incarnation {incarnation}"
        case Died(name, incarnation):
            return f"{name} is dead, incarnation {incarnation}"
        case Refuted(incarnation):
            return f"I am alive! incarnation {incarnation}"
    raise AssertionError(effect)


def test_swim(scenario, transcript):
    group = Group()

    def handle(step):
        match step.name, step.args:
            case "members", names:
                group.members(*names)
            case "cut", [source, to]:
                group.cuts += [(source, to), (to, source)] if step.options.get("both") == "yes" else [(source, to)]
            case "heal", []:
                group.cuts.clear()
            case "kill", [name]:
                group.down.append(name)
            case "start", [name]:
                group.start(name, int(step.options["incarnation"]))
            case "run", []:
                group.run(
                    int(step.options.get("periods", PERIODS_MAX)),
                    step.options.get("until", ""),
                    step.options.get("show") == "conclusions",
                )
            case "hear", [name, about, status, incarnation]:
                rumour = Rumour(about, status, int(incarnation))
                group.conclude(name, group.swims[name].hear(rumour, group.now_s))
            case "think", [name]:
                group.lines += [
                    f"{other}: {name} is {swim.status(name)}"
                    for other, swim in group.swims.items()
                    if other != name and other not in group.down
                ]
            case _:
                raise ValueError(f"no such command: {step.name} {step.args}")
        printed, group.lines = group.lines, []
        return "\n".join(printed) or "ok"

    transcript(scenario, handle)

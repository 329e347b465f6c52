"""Scenarios of dissemination: events travel from member to member, message by message.

Commands:

``members n1 n2 n3``        members at epoch 0
``publish n1``              n1, the master, makes the next event
``restart n2``              what n2 knows it has only read from its disk
``tick n1``                 n1 tells those whose turn it is; what it sends is printed and waits in the network
``deliver``                 all that waits in the network arrives; ``deliver n1 n2``: what n1 sent to n2 alone
``lose n1 n2``              what waits from n1 to n2 is lost
``probe n1 n2``             a probe tells n2 at which epoch n1 is
``wait n2``                 n2's patience passes
``views``                   the epoch of everybody
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from gostore.services.cls.gossip import PROFILES, Deliver, Gossip, Item, Pull, Tell

TUNABLES = PROFILES["fast"]


@dataclass(frozen=True)
class Change:
    """An event without content."""

    epoch: int
    previous: int
    digest: int

    def __str__(self) -> str:
        return f"event {self.epoch}"


class Member:
    def __init__(self, name: str, epoch: int = 0) -> None:
        self.gossip: Gossip[Change] = Gossip(name, TUNABLES, random.Random(name))
        self.version = (epoch, 0)


class Group:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.members: dict[str, Member] = {}
        self.network: list[tuple[str, str, tuple[Item[Change], ...]]] = []
        self.lines: list[str] = []

    def publish(self, name: str) -> None:
        member = self.members[name]
        epoch, previous = member.version
        event = Change(epoch + 1, previous, (epoch + 1) * 10)
        member.version = (event.epoch, event.digest)
        member.gossip.publish(event, len(self.members), self.now_s)
        self.lines.append(f"{name}: makes {event}")

    def tick(self, name: str) -> None:
        gossip = self.members[name].gossip
        self.now_s = max(self.now_s, min(gossip.due_s, self.now_s + TUNABLES.period_s))
        peers = [other for other in self.members if other != name]
        self._perform(name, gossip.tick(peers, self.now_s))

    def deliver(self, source: str | None, target: str | None) -> None:
        waiting, self.network = self.network, []
        for message in waiting:
            if source is not None and message[:2] != (source, target):
                self.network.append(message)
                continue
            sender, to, items = message
            member = self.members[to]
            before = member.gossip.counts["duplicates"], member.gossip.counts["held"]
            effects = member.gossip.receive(sender, items, member.version, len(self.members), self.now_s)
            after = member.gossip.counts["duplicates"], member.gossip.counts["held"]
            if after[0] > before[0]:
                self.lines.append(f"{to}: knows that already")
            if after[1] > before[1]:
                self.lines.append(f"{to}: too early, is held")
            self._perform(to, effects)

    def pull(self, name: str, source: str) -> None:
        """The whole state comes; the service does this."""
        member, theirs = self.members[name], self.members[source].version
        if theirs > member.version:
            member.version = theirs
            self.lines.append(f"{name}: takes over the view of {source}, epoch {theirs[0]}")
            self._perform(name, member.gossip.adopted(theirs, len(self.members), self.now_s))

    def _perform(self, name: str, effects: list) -> None:
        for effect in effects:
            match effect:
                case Tell(to, items):
                    self.lines.append(f"{name} -> {to}: {', '.join(str(item.event) for item in items)}")
                    self.network.append((name, to, items))
                case Deliver(event, path):
                    self.members[name].version = (event.epoch, event.digest)
                    self.lines.append(f"{name}: applies {event}, which came by {' '.join(path)}")
                case Pull(source):
                    self.lines.append(f"{name}: asks {source} for its view")
                    self.pull(name, source)


def test_gossip(scenario, transcript):
    group = Group()

    def handle(step):
        match step.name, step.args:
            case "members", names:
                group.members = {name: Member(name) for name in names}
            case "publish", [name]:
                group.publish(name)
            case "restart", [name]:
                group.members[name] = Member(name, group.members[name].version[0])
            case "tick", [name]:
                group.tick(name)
            case "deliver", [] | [_, _] as words:
                group.deliver(*(words or (None, None)))
            case "lose", [source, target]:
                group.network = [message for message in group.network if message[:2] != (source, target)]
            case "probe", [source, target]:
                theirs, ours = group.members[source].version[0], group.members[target].version[0]
                group.members[target].gossip.heard(source, theirs, ours, group.now_s)
            case "wait", [name]:
                group.now_s += TUNABLES.patience_s
                group.tick(name)
            case "views", []:
                group.lines += [f"{name}: epoch {member.version[0]}" for name, member in group.members.items()]
            case _:
                raise ValueError(f"no such command: {step.name} {step.args}")
        printed, group.lines = group.lines, []
        return "\n".join(printed) or "ok"

    transcript(scenario, handle)

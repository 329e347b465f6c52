"""One core on a bench: what it is told, and what it hands out."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from gostore.consensus import (
    COMMAND,
    LEADER,
    ORIGIN,
    Configuration,
    Entry,
    HardState,
    Message,
    Point,
    Raft,
    ReadState,
    Restored,
    Snapshot,
    Tunables,
)
from gostore.consensus.messages import (
    AppendReply,
    Chunk,
    VoteReply,
)

TUNABLES = Tunables(election_timeout_s=1.0, heartbeat_s=0.25, retry_s=0.4, quiet_after_s=100.0)
THREE = Configuration(("n1", "n2", "n3"))
NOW = 50.0


class Bench:
    """A core whose disk is as fast as it is told to be."""

    def __init__(self, terms: Iterable[int] = (), *, term: int = 0, vote: str | None = None, commit: int = 0,
                 configuration: Configuration = THREE, start: Point = ORIGIN, now_s: float = NOW,
                 payload: bytes = b"", **tunables: Any) -> None:  # fmt: skip
        self.log = [Entry(own, index, COMMAND, payload) for index, own in enumerate(terms, start.index + 1)]
        self.now_s = now_s
        self.applied: list[Entry] = []
        self.hard: list[HardState] = []
        self.chunks: list[Chunk] = []
        self.reads: list[ReadState] = []
        self.numbers: list[int] = []
        self.asked = 0
        self.state = [b"state"]
        self.full = False
        self.later: list[tuple[str, Message]] = []
        restored = Restored.of(HardState(term, vote, commit), start, configuration, list(self.log))
        self.raft = Raft("n1", restored, self, replace(TUNABLES, **tunables), random.Random(0), now_s)

    def entries(self, first: int, last: int) -> Iterable[Entry]:
        self.asked += 1
        return [entry for entry in self.log if first <= entry.index <= last]

    def snapshot(self) -> Snapshot | None:
        if self.full:
            return None
        at = self.raft.log.applied
        term = self.raft.log.term(at)
        assert term is not None
        return Snapshot(Point(at, term), self.raft.configuration_at(at), iter(self.state))

    def take(self, *, sync: bool = True) -> list[tuple[str, Message]]:
        """Do the work; the messages that may go: without a sync those that promise nothing."""
        sent: list[tuple[str, Message]] = []
        while (ready := self.raft.ready(self.now_s)) is not None:
            sent += ready.messages
            self.later += ready.messages_synced
            self.hard += [ready.hard_state] if ready.hard_state else []
            if any(chunk.done for chunk in ready.chunks):
                self.log = []
            self.chunks += ready.chunks
            if ready.truncate_from is not None:
                self.log = [entry for entry in self.log if entry.index < ready.truncate_from]
            self.log += ready.entries
            self.applied += ready.committed
            self.reads += ready.reads
            self.numbers.append(ready.number)
            if sync or not ready.must_sync:
                sent += self.sync()
        return sent

    def sync(self) -> list[tuple[str, Message]]:
        sent, self.later = self.later, []
        self.raft.persisted(self.numbers[-1], self.now_s)
        return sent

    def receive(self, source: str, message: Message, *, sync: bool = True) -> list[tuple[str, Message]]:
        self.raft.receive(source, message, self.now_s)
        return self.take(sync=sync)

    def answer(self, source: str, message: Message) -> Message:
        """The only message that follows, and it goes back."""
        [(to, reply)] = self.receive(source, message)
        assert to == source
        return reply

    def at(self, now_s: float) -> list[tuple[str, Message]]:
        self.now_s = now_s
        self.raft.timeout(now_s)
        return self.take()

    def lead(self) -> list[tuple[str, Message]]:
        """Make it the leader of the next term; its first messages."""
        self.raft.campaign(self.now_s)
        self.take()
        voters = [name for name in self.raft.configuration.members if name != "n1"]
        for pre in (True, False):
            term = self.raft.term + pre
            for name in voters:
                if self.raft.role != LEADER:
                    self.raft.receive(name, VoteReply(term, True, pre), self.now_s)
                    sent = self.take()
        if not voters:
            sent = self.take()
        assert self.raft.role == LEADER
        return sent

    def settle(self) -> None:
        """Everybody holds all that the leader has."""
        for name in self.raft.configuration.members:
            if name != "n1":
                self.receive(name, AppendReply(self.raft.term, self.raft.log.last.index))


def kinds(sent: Iterable[tuple[str, Message]], kind: type[Message]) -> list[tuple[str, Any]]:
    return [(to, message) for to, message in sent if isinstance(message, kind)]


def entry(term: int, index: int) -> Entry:
    return Entry(term, index, COMMAND, b"")

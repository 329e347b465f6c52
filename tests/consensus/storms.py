"""Cores in a hostile world, whose safety is looked at after every step.

The world loses, doubles, delays and reorders messages, syncs when it likes, and crashes a replica so that any suffix of
what was not synced is gone.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import msgpack

from gostore.consensus import (
    CONFIGURATION,
    FOLLOWER,
    LEADER,
    ORIGIN,
    Configuration,
    Entry,
    HardState,
    Message,
    Point,
    Raft,
    Ready,
    Restored,
    Snapshot,
    Tunables,
    message_from_wire,
)
from gostore.consensus.messages import Append, Heartbeat
from gostore.core.errors import GoStoreError

NAMES = ("n1", "n2", "n3", "n4", "n5")
VOTERS = NAMES[:3]

TUNABLES = Tunables(
    election_timeout_s=1.0,
    heartbeat_s=0.2,
    retry_s=0.3,
    quiet_after_s=1.0,
    append_entries_max=3,
    append_size_bytes_max=60,
    inflight_messages_max=3,
    uncommitted_size_bytes_max=400,
    committed_size_bytes_max=100,
    cache_entries_max=4,
    cache_size_bytes_max=100,
    learner_lag_entries_max=2,
)


class Medium:
    """What the records of one replica amount to, when they are replayed."""

    def __init__(self) -> None:
        self.hard = HardState()
        self.start = ORIGIN
        self.configuration = Configuration()
        self.state = b""
        self.entries: list[Entry] = []
        self.pieces: list[bytes] = []

    def copy(self) -> Medium:
        other = copy(self)
        other.entries, other.pieces = list(self.entries), list(self.pieces)
        return other

    def term(self, index: int) -> int | None:
        if index == self.start.index:
            return self.start.term
        place = index - self.start.index - 1
        return self.entries[place].term if 0 <= place < len(self.entries) else None

    def take(self, kind: str, value: Any) -> None:
        if kind == "hard":
            self.hard = value
        elif kind == "chunk":
            if value.number == 0:
                self.pieces = []
            assert value.done or value.data
            self.pieces.append(value.data)
            if value.done:
                self.start, self.configuration = value.point, value.configuration
                self.state, self.entries = b"".join(self.pieces), []
        elif kind == "truncate":
            assert value > self.start.index
            del self.entries[value - self.start.index - 1 :]
        elif kind == "entry":
            assert value.index == self.start.index + len(self.entries) + 1
            self.entries.append(value)
        elif kind == "compact":
            point, configuration, state = value
            if point.index > self.start.index:
                self.entries = [entry for entry in self.entries if entry.index > point.index]
                self.start, self.configuration, self.state = point, configuration, state


class Node:
    """One replica with its disk and its state machine, which is a checksum of all it has applied."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.lives = 0
        self.medium = Medium()
        if name in VOTERS:
            self.medium.configuration = Configuration(VOTERS)
        self.reads: dict[int, int] = {}
        self.start()

    def start(self) -> None:
        self.lives += 1
        self.up = True
        self.written = self.medium.copy()
        self.unsynced: list[tuple[str, Any]] = []
        self.waiting: deque[tuple[int, Ready | None, int]] = deque()  # (records, Ready or None, compaction)
        self.restore(self.medium.state, self.medium.start)
        rng = random.Random(f"{self.world.seed} {self.name} {self.lives}")
        medium = self.medium
        restored = Restored.of(medium.hard, medium.start, medium.configuration, list(medium.entries))
        self.raft = Raft(self.name, restored, self, self.world.tunables, rng, self.world.now_s)

    def restore(self, state: bytes, point: Point) -> None:
        self.applied, self.digest = msgpack.unpackb(state) if state else (0, 0)
        assert self.applied == point.index, "a snapshot stands for another point than it says"
        assert self.digest == self.world.digests[self.applied], "a snapshot holds another state"

    # the storage of its core

    def entries(self, first: int, last: int) -> Iterable[Entry]:
        self.world.count["old entries read"] += 1
        start = self.written.start.index
        return self.written.entries[first - start - 1 : min(last, first + 1) - start]

    def snapshot(self) -> Snapshot | None:
        if self.world.rng.random() < 0.2:
            return None
        term = self.written.term(self.applied)
        assert term is not None
        state = msgpack.packb((self.applied, self.digest))
        size = self.world.rng.randrange(1, 4)
        pieces = [state[place : place + size] for place in range(0, len(state), size)]
        configuration = self.raft.configuration_at(self.applied)
        return Snapshot(Point(self.applied, term), configuration, iter(pieces))

    # the driver

    def write(self, kind: str, value: Any) -> None:
        self.written.take(kind, value)
        self.unsynced.append((kind, value))

    def work(self) -> None:
        while self.up and (ready := self.raft.ready(self.world.now_s)) is not None:
            self.world.send(self.name, ready.messages)
            before = len(self.unsynced)
            if ready.hard_state is not None:
                assert ready.hard_state.term >= self.written.hard.term
                self.write("hard", ready.hard_state)
            for chunk in ready.chunks:
                self.write("chunk", chunk)
                if chunk.done:
                    self.world.count["snapshots installed"] += 1
                    assert chunk.point.index > self.applied, "a snapshot took the state back"
                    self.restore(self.written.state, chunk.point)
            if ready.truncate_from is not None:
                self.world.count["truncations"] += 1
                assert ready.truncate_from > self.applied, "applied entries were truncated"
                self.write("truncate", ready.truncate_from)
            for entry in ready.entries:
                self.world.check_entry(entry, self.written.term(entry.index - 1))
                self.write("entry", entry)
            for entry in ready.committed:
                self.apply(entry)
            for read in ready.reads:
                floor = self.reads.pop(read.context)
                self.world.count["reads answered" if read.index is not None else "reads failed"] += 1
                if read.index is not None:
                    assert self.applied >= read.index >= floor, f"a read at {read.index} misses {floor}"
            if ready.must_sync:
                self.waiting.append((len(self.unsynced) - before, ready, 0))
            else:
                assert not any(records for records, waiting, _ in self.waiting if waiting is not None)
                self.world.send(self.name, ready.messages_synced)
        self.world.check(self)

    def apply(self, entry: Entry) -> None:
        assert entry.index == self.applied + 1, f"entry {entry.index} applied behind {self.applied}"
        assert self.written.term(entry.index) == entry.term, "applied what was not handed out for writing"
        self.applied = entry.index
        self.digest = zlib.crc32(entry.payload, zlib.crc32(b"%d %d" % (entry.term, entry.kind), self.digest))
        self.world.check_applied(entry, self.digest)

    def sync(self, count: int) -> None:
        """The oldest ``count`` Readys reach the medium."""
        if not self.up:
            return
        for _ in range(min(count, len(self.waiting))):
            records, ready, compacted = self.waiting.popleft()
            for kind, value in self.unsynced[:records]:
                self.medium.take(kind, value)
                if kind == "compact":
                    self.written.take(kind, value)
            del self.unsynced[:records]
            if ready is not None:
                self.world.send(self.name, ready.messages_synced)
                self.raft.persisted(ready.number, self.world.now_s)
            elif compacted > self.raft.log.start.index:
                self.raft.compact(compacted)
        self.work()

    def compact(self) -> None:
        if self.applied > self.raft.log.start.index:
            self.world.count["compactions"] += 1
            term = self.written.term(self.applied)
            state = msgpack.packb((self.applied, self.digest))
            configuration = self.raft.configuration_at(self.applied)
            # Nothing is dropped before it is on the medium, as the core may still ask for it.
            self.unsynced.append(("compact", (Point(self.applied, term), configuration, state)))
            self.waiting.append((1, None, self.applied))

    def crash(self, kept: int) -> None:
        """Of what was not synced, the first ``kept`` records got to the medium nevertheless."""
        self.world.count["crashes"] += 1
        self.world.count["crashes with loss"] += kept < len(self.unsynced)
        for record in self.unsynced[:kept]:
            self.medium.take(*record)
        self.up = False
        self.reads.clear()

    def propose(self, payloads: list[bytes]) -> None:
        try:
            point = self.raft.propose(payloads, self.world.now_s)
            assert point == Point(self.raft.log.last.index - len(payloads) + 1, self.raft.term)
            self.world.count["proposals"] += len(payloads)
        except GoStoreError as error:
            self.world.refused("proposals refused", error)

    def read(self) -> None:
        self.world.contexts += 1
        try:
            floor = self.world.committed_max
            self.raft.read(self.world.contexts, self.world.now_s)
            self.reads[self.world.contexts] = floor
            self.world.count["reads forwarded"] += self.raft.role != LEADER
        except GoStoreError as error:
            self.world.refused("reads refused", error)

    def change(self, voters: tuple[str, ...], learners: tuple[str, ...]) -> None:
        try:
            self.raft.change(voters, learners, self.world.now_s)
        except GoStoreError as error:
            self.world.refused("changes refused", error)

    def transfer(self, to: str | None) -> None:
        try:
            self.raft.transfer(to, self.world.now_s)
            self.world.count["transfers begun"] += 1
        except GoStoreError as error:
            self.world.refused("transfers refused", error)


def majority(voters: Iterable[str], holders: dict[str, bool]) -> bool:
    names = list(voters)
    return 2 * sum(holders[name] for name in names) > len(names)


class World:
    """Nodes, the messages between them, time, and what must hold."""

    def __init__(self, seed: int, tunables: Tunables = TUNABLES) -> None:
        self.seed = seed
        self.tunables = tunables
        self.rng = random.Random(seed)
        self.now_s = 100.0
        self.count: Counter[str] = Counter()
        self.flying: list[tuple[str, str, Any]] = []
        self.cut: dict[tuple[str, str], bool] = {}
        self.contexts = 0
        self.leaders: dict[int, str] = {}
        self.entries_known: dict[tuple[int, int], tuple[int, bytes, int]] = {}
        self.applied: dict[int, Entry] = {}
        self.digests: dict[int, int] = {0: 0}
        self.committed: dict[int, int] = {0: 0}
        self.committed_max = 0
        self.led: dict[str, tuple[int, int]] = {}
        self.terms: dict[str, int] = {}
        self.nodes = {name: Node(self, name) for name in NAMES}

    # what must hold

    def check_entry(self, entry: Entry, previous: int | None) -> None:
        """Log matching: the same index and term, the same entry and the same before it."""
        assert previous is not None
        body = (entry.kind, entry.payload, previous)
        known = self.entries_known.setdefault((entry.index, entry.term), body)
        assert known == body, f"log matching: {entry} and {known}"

    def check_applied(self, entry: Entry, digest: int) -> None:
        """State machine safety."""
        known = self.applied.setdefault(entry.index, entry)
        assert known == entry, f"state machine safety: {entry} and {known}"
        assert self.digests.setdefault(entry.index, digest) == digest
        self.count["changes applied"] += entry.kind == CONFIGURATION

    def check(self, node: Node) -> None:
        """Election safety, leader append-only, leader completeness; and a commit is held by a quorum on its disks."""
        if not node.up:
            self.led.pop(node.name, None)
            return
        raft, log = node.raft, node.raft.log
        assert raft.term >= self.terms.get(node.name, 0) or node.lives > 1
        self.terms[node.name] = raft.term
        if raft.role != LEADER:
            self.led.pop(node.name, None)
        else:
            assert self.leaders.setdefault(raft.term, node.name) == node.name, f"two leaders in term {raft.term}"
            term, last = self.led.get(node.name, (0, 0))
            if term != raft.term:
                self.count["elections won"] += 1
                self.check_complete(node)
            else:
                assert log.last.index >= last, "a leader truncated its log"
            self.led[node.name] = (raft.term, log.last.index)
        for index in range(self.committed_max + 1, log.committed + 1):
            self.check_commit(node, index)
        known = self.committed[log.committed]
        assert log.term(log.committed) == known, f"{node.name} committed another entry {log.committed}"

    def check_complete(self, node: Node) -> None:
        log = node.raft.log
        assert log.last.index >= self.committed_max, f"{node.name} leads and lacks committed entries"
        for index in range(log.start.index, self.committed_max + 1):
            assert log.term(index) == self.committed[index], f"{node.name} leads with another entry {index}"

    def check_commit(self, node: Node, index: int) -> None:
        raft = node.raft
        term = raft.log.term(index)
        assert term is not None
        self.committed[index] = term
        self.committed_max = index
        media = {name: other.medium for name, other in self.nodes.items()}
        holders = {name: medium.start.index >= index or medium.term(index) == term for name, medium in media.items()}
        if raft.role == LEADER:
            configuration = raft.configuration
            assert majority(configuration.voters, holders), f"entry {index} is committed without a quorum"
            assert not configuration.joint or majority(configuration.outgoing, holders), f"{index}: no old quorum"

    def refused(self, what: str, error: GoStoreError) -> None:
        assert error.definite, f"{error} leaves open whether it happened"
        self.count[what] += 1

    # what happens

    def send(self, source: str, messages: Iterable[tuple[str, Message]]) -> None:
        for to, message in messages:
            assert to != source
            self.flying.append((source, to, msgpack.packb(message.to_wire())))
            kind = type(message).__name__
            self.count[kind] += 1
            if isinstance(message, Heartbeat):
                self.count["quiet heartbeats"] += message.quiet
            elif isinstance(message, Append):
                assert message.entries

    def deliver(self, place: int, *, keep: bool = False) -> None:
        source, to, packed = self.flying[place]
        if not keep:
            self.flying[place] = self.flying[-1]
            self.flying.pop()
        node = self.nodes[to]
        if node.up and not self.cut.get((source, to)):
            node.raft.receive(source, message_from_wire(msgpack.unpackb(packed)), self.now_s)
            node.work()

    def advance(self, seconds: float) -> None:
        """Let time pass, and the timers that are due run."""
        self.now_s += seconds
        for node in self.nodes.values():
            if node.up and node.raft.deadline_s <= self.now_s:
                node.raft.timeout(self.now_s)
                node.work()

    def next_deadline_s(self) -> float:
        return min(node.raft.deadline_s for node in self.nodes.values() if node.up)

    def leader(self) -> Node | None:
        """The one of the newest term."""
        leaders = [node for node in self.nodes.values() if node.up and node.raft.role == LEADER]
        return max(leaders, key=lambda node: node.raft.term, default=None)

    def heal(self) -> None:
        self.cut.clear()
        for node in self.nodes.values():
            if not node.up:
                node.start()

    def settle(self, seconds: float) -> None:
        """No faults: every message arrives in order, every sync happens, for so long."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            busy = True
            while busy:
                busy = False
                for node in self.nodes.values():
                    if node.up and node.waiting:
                        node.sync(len(node.waiting))
                        busy = True
                flying, self.flying = self.flying, []
                for source, to, packed in flying:
                    busy = True
                    if self.nodes[to].up and not self.cut.get((source, to)):
                        self.nodes[to].raft.receive(source, message_from_wire(msgpack.unpackb(packed)), self.now_s)
                        self.nodes[to].work()
            self.advance(max(0.01, min(self.next_deadline_s(), end_s) - self.now_s))

    def check_progress(self) -> None:
        """After the heal the group elects, commits, levels its members, and goes quiet."""
        self.heal()
        for node in self.nodes.values():
            node.raft.wake(self.now_s)
            node.work()
        for attempt in itertools.count(1):
            self.settle(3.0)
            leader = self.leader()
            if leader is not None and not leader.raft.configuration.joint:
                before = leader.raft.log.last.index
                leader.propose([b"after the heal"])
                leader.work()
                self.settle(0.5)
                if leader.raft.log.committed > before:
                    break
            assert attempt < 8, "no progress after the heal"
        self.settle(8.0)
        leader = self.leader()
        assert leader is not None
        members = [self.nodes[name] for name in leader.raft.configuration.members]
        for node in members:
            assert node.applied == leader.applied == leader.raft.log.last.index, f"{node.name} stays behind"
            assert node.digest == leader.digest
            assert not node.reads, "a read was never answered"
            assert node.raft.deadline_s == math.inf, f"{node.name} is not quiet"
        self.count["quiet at the end"] += 1


def random_step(world: World, weights: Sequence[float]) -> None:
    """One thing that may happen, drawn from the world's own randomness."""
    rng = world.rng
    node = world.nodes[rng.choice(NAMES)]
    # Also one that was deposed and does not know it yet.
    leaders = [other for other in world.nodes.values() if other.up and other.raft.role == LEADER]
    target = rng.choice(leaders) if leaders and rng.random() < 0.8 else node
    match rng.choices(STEPS, weights)[0]:
        case "deliver" if world.flying:
            for _ in range(rng.randrange(1, 5)):
                if world.flying:
                    # Mostly the older ones, so that there is progress.
                    place = min(rng.randrange(len(world.flying)), rng.randrange(len(world.flying)))
                    world.deliver(place, keep=rng.random() < 0.05)
        case "lose" if world.flying:
            world.flying.pop(rng.randrange(len(world.flying)))
        case "time":
            world.advance(rng.choice((0.01, 0.05, 0.05, 0.2)))
        case "sync":
            for other in world.nodes.values():
                if other.up and rng.random() < 0.6:
                    other.sync(rng.randrange(1, 4))
        case "propose" if target.up:
            world.count["proposals to the deposed"] += len(leaders) > 1 and target is not world.leader()
            target.propose([rng.randbytes(rng.randrange(0, 40)) for _ in range(rng.randrange(1, 4))])
            target.work()
        case "read" if node.up:
            node.read()
            node.work()
        case "compact" if node.up:
            node.compact()
        case "crash" if node.up:
            node.crash(rng.randrange(len(node.unsynced) + 1))
        case "start" if not node.up:
            node.start()
            node.work()
        case "change" if target.up:
            random_change(world, target)
            target.work()
        case "transfer" if target.up:
            target.transfer(rng.choice((None, *NAMES)))
            target.work()
        case "campaign" if node.up:
            node.raft.campaign(world.now_s)
            node.work()
        case "wake" if node.up:
            node.raft.wake(world.now_s, leader_suspected=rng.random() < 0.5)
            node.work()
        case "coup":
            followers = [other for other in world.nodes.values() if other.up and other.raft.role == FOLLOWER]
            node = rng.choice([other for other in followers if other.raft.configuration.is_voter(other.name)] or [node])
            if not node.up:
                return
            world.count["coups"] += 1
            for other in followers:
                other.raft.wake(world.now_s, leader_suspected=True)
            node.raft.campaign(world.now_s)
            node.work()
            # What is said to it and by it, and synced for it, is quick for a while; nothing else moves.
            for _ in range(rng.randrange(2, 16)):
                for other in world.nodes.values():
                    other.sync(len(other.waiting))
                for place in reversed(range(len(world.flying))):
                    if node.name in world.flying[place][:2] and rng.random() < 0.8:
                        world.deliver(place)
        case "cut":
            if rng.random() < 0.3:
                world.cut = {(rng.choice(NAMES), rng.choice(NAMES)): True}
            else:
                side = dict.fromkeys(rng.sample(NAMES, rng.randrange(1, 3)))
                pairs = itertools.permutations(NAMES, 2)
                world.cut = {(a, b): True for a, b in pairs if (a in side) != (b in side)}
        case "mend":
            world.cut = {}
        case "calm":
            world.settle(rng.choice((0.5, 1.0, 3.0)))


STEPS = (
    "deliver", "lose", "time", "sync", "propose", "read", "compact", "crash", "start", "change", "transfer",
    "campaign", "wake", "coup", "cut", "mend", "calm",
)  # fmt: skip
BUSY = (50, 3, 14, 20, 10, 8, 1.5, 1, 6, 3, 0.7, 0.5, 1, 0, 0.5, 2, 0.15)
STORMY = (45, 6, 8, 15, 15, 3, 0.5, 2, 8, 0.4, 1, 1, 1, 8, 1.5, 4, 0.05)
"""One leader deposes the other, and logs fork."""


def random_change(world: World, target: Node) -> None:
    """A change that often is possible: a learner more, a learner promoted, a member less, a replica exchanged."""
    rng, configuration = world.rng, target.raft.configuration
    voters, learners = list(configuration.voters), list(configuration.learners)
    outside = [name for name in NAMES if name not in configuration.members]
    ready = [name for name in learners if target.raft.caught_up(name)]
    match rng.randrange(4):
        case 0 if outside:
            learners.append(rng.choice(outside))
        case 1 if ready:
            voters.append(ready[0])
            learners.remove(ready[0])
        case 2 if len(voters) > 2:
            voters.remove(rng.choice(voters))
        case 3 if ready and voters:
            gone = rng.choice(voters)
            voters[voters.index(gone)] = ready[0]
            learners[learners.index(ready[0])] = gone
        case _:
            voters = rng.sample(NAMES, rng.randrange(1, 4))
            learners = [name for name in learners if name not in voters]
    target.change(tuple(voters), tuple(learners))


def run(seed: int, steps: int) -> Counter[str]:
    world = World(seed)
    first = world.nodes["n1"]
    first.raft.campaign(world.now_s)
    first.work()
    weights = STORMY if seed % 2 else BUSY
    for _ in range(steps):
        random_step(world, weights)
    world.check_progress()
    return world.count

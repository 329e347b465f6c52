"""Golden transcripts of the Raft core: a few replicas, the messages between them, and what they write and apply.

Commands of the scenarios (names are replicas; a place in a log is written ``index@term``):

``start n1 n2 n3``          replicas that are voters of a new group; ``joining=n4,n5`` know of no group yet. Options set
                            tunables: ``quiet_after_s=1``
``campaign n1``             stand at once
``propose n1 a b c``        commands for the log
``read n1 7``               a read with context 7
``transfer n1 to=n2``, ``change n1 voters=n1,n2 learners=n3``, ``wake n1 [suspect]``
``pass 0.5``                time passes, timers run, nothing arrives
``run 2``                   time passes, and whatever is sent arrives at once; heartbeats and answers are not shown
``deliver [n2 ..]``         the messages on the way (to these) arrive; what they cause stays on the way
``stabilize``               deliver until nothing is on the way
``lose [n2 ..]``            the messages on the way (to these) are lost
``cut n1 n2``, ``mend``     nothing passes between these and the others; all is well again
``disk n1 slow``            it syncs only when told: ``sync n1``
``crash n1``, ``restart n1``  what was not synced is lost
``compact n1``              take a snapshot of what is applied
``show [n1 ..]``, ``logs``  roles and positions; what the logs hold
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gostore.consensus import (
    COMMAND,
    LEADER,
    NOOP,
    ORIGIN,
    Chunk,
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
)
from gostore.consensus.messages import (
    Append,
    AppendReject,
    AppendReply,
    ChunkReply,
    Heartbeat,
    HeartbeatReply,
    ReadReply,
    ReadRequest,
    Stale,
    TimeoutNow,
    Vote,
    VoteReply,
)
from gostore.core.errors import GoStoreError

TUNABLES = Tunables(election_timeout_s=1.0, heartbeat_s=0.25, retry_s=0.4, quiet_after_s=math.inf)


def place(point: Point) -> str:
    return f"{point.index}@{point.term}"


def body(entry: Entry) -> str:
    where = f"{entry.index}@{entry.term}"
    if entry.kind == NOOP:
        return f"{where} noop"
    if entry.kind == COMMAND:
        return f"{where} {entry.payload.decode()}"
    return f"{where} ({Configuration.unpack(entry.payload)})"


def words(message: Message) -> str:
    term = f"term {message.term}"
    match message:
        case Vote(last=last, pre=pre, transfer=transfer):
            return f"{'pre-vote' if pre else 'vote'}? {term}, log to {place(last)}{', handed over' if transfer else ''}"
        case VoteReply(granted=granted, pre=pre):
            return f"{'pre-vote' if pre else 'vote'} {'yes' if granted else 'no'}, {term}"
        case Append(previous=previous, entries=entries, commit=commit):
            return f"append {term} after {place(previous)}: {', '.join(map(body, entries))}; commit {commit}"
        case AppendReply(match=match):
            return f"holds {match}, {term}"
        case AppendReject(rejected=rejected, hint=hint):
            return f"nothing fits behind {rejected}, try {place(hint)}, {term}"
        case Heartbeat(commit=commit, round=number, quiet=quiet):
            return f"{'quiet ' if quiet else ''}heartbeat {number}, {term}, commit {commit}"
        case HeartbeatReply(round=number, quiet=quiet):
            return f"{'quiet ' if quiet else ''}answer {number}, {term}"
        case Chunk(snapshot=number, point=point, number=piece, data=data, done=done):
            content = "end" if done else data.decode()
            return f"snapshot {number} of {place(point)}, chunk {piece}: {content}, {term}"
        case ChunkReply(snapshot=number, wanted=wanted):
            return f"snapshot {number}: wants chunk {wanted}, {term}"
        case TimeoutNow():
            return f"stand now, {term}"
        case ReadRequest(number=number):
            return f"read index? {number}, {term}"
        case ReadReply(number=number, index=index):
            return f"read index {number}: {index}, {term}"
        case Stale():
            return f"you are behind, {term}"
    raise AssertionError(message)


class Steady(random.Random):
    """Each replica has a patience of its own, so that it is known who stands first."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value

    def getrandbits(self, k: int, /) -> int:
        return 0


class Disk:
    def __init__(self, configuration: Configuration) -> None:
        self.hard = HardState()
        self.start, self.configuration, self.state = ORIGIN, configuration, ""
        self.entries: list[Entry] = []
        self.pieces: list[str] = []

    def take(self, record: Any) -> None:
        match record:
            case HardState():
                self.hard = record
            case Chunk():
                self.pieces = [] if record.number == 0 else self.pieces
                self.pieces.append(record.data.decode())
                if record.done:
                    self.start, self.configuration = record.point, record.configuration
                    self.state, self.entries = "".join(self.pieces), []
            case Entry():
                self.entries.append(record)
            case int():
                del self.entries[record - self.start.index - 1 :]


class Replica:
    """A core with a disk and a state machine that writes down all commands it applied."""

    def __init__(self, world: World, name: str, configuration: Configuration) -> None:
        self.world, self.name = world, name
        self.slow = False
        self.disk = Disk(configuration)
        self.begin()

    def begin(self) -> None:
        disk = self.disk
        self.up = True
        self.unsynced: deque[tuple[Ready, list[Any]]] = deque()
        self.written = list(disk.entries)
        self.state = disk.state
        self.applied = disk.start.index
        restored = Restored.of(disk.hard, disk.start, disk.configuration, list(disk.entries))
        patience = 0.1 * int(self.name[1:])
        self.raft = Raft(self.name, restored, self, self.world.tunables, Steady(patience), self.world.now_s)

    def entries(self, first: int, last: int) -> Iterable[Entry]:
        return [entry for entry in self.written if first <= entry.index <= last]

    def snapshot(self) -> Snapshot | None:
        term = self.raft.log.term(self.applied)
        assert term is not None
        size = self.world.chunk_size
        state = self.state
        chunks = [state[at : at + size].encode() for at in range(0, len(state), size)]
        return Snapshot(Point(self.applied, term), self.raft.configuration_at(self.applied), iter(chunks))

    def say(self, text: str) -> None:
        self.world.out.append(f"{self.name}: {text}")

    def work(self) -> None:
        while (ready := self.raft.ready(self.world.now_s)) is not None:
            if ready.status is not None:
                leader = ready.status.leader
                follows = f" of {leader}" if ready.status.role == "follower" and leader else ""
                self.say(f"{ready.status.role}{follows}, term {ready.status.term}")
            self.world.send(self.name, ready.messages)
            self.write(ready)
            for entry in ready.committed:
                self.applied = entry.index
                self.state += entry.payload.decode() if entry.kind == COMMAND else ""
                self.say(f"applies {body(entry)}")
            for read in ready.reads:
                self.say(f"read {read.context} {'failed' if read.index is None else f'at {read.index}'}")
            if not self.slow or not ready.must_sync:
                self.sync()

    def write(self, ready: Ready) -> None:
        records: list[Any] = []
        if ready.hard_state is not None:
            hard = ready.hard_state
            records.append(hard)
            self.say(f"writes term {hard.term}, vote {hard.vote or '-'}")
        for chunk in ready.chunks:
            records.append(chunk)
            if chunk.done:
                self.written = []
                self.applied = chunk.point.index
        if ready.truncate_from is not None:
            records.append(ready.truncate_from)
            self.say(f"drops its entries from {ready.truncate_from} on")
            self.written = [entry for entry in self.written if entry.index < ready.truncate_from]
        if ready.entries:
            records += ready.entries
            self.written += ready.entries
            self.say(f"writes {', '.join(map(body, ready.entries))}")
        self.unsynced.append((ready, records))
        if any(chunk.done for chunk in ready.chunks):
            whole = Disk(self.disk.configuration)
            for _, made in self.unsynced:
                for record in made:
                    if isinstance(record, Chunk):
                        whole.take(record)
            self.state = "".join([*self.disk.pieces, *whole.pieces]) if not whole.state else whole.state
            self.say(f"installs a snapshot of {place(ready.chunks[-1].point)}: {self.state}")

    def sync(self) -> None:
        while self.unsynced:
            ready, records = self.unsynced.popleft()
            for record in records:
                self.disk.take(record)
            if self.slow and records:
                self.say("synced")
            self.world.send(self.name, ready.messages_synced)
            if ready.must_sync:
                self.raft.persisted(ready.number, self.world.now_s)

    def compact(self) -> None:
        term = self.raft.log.term(self.applied)
        assert term is not None
        disk = self.disk
        disk.configuration = self.raft.configuration_at(self.applied)
        disk.start, disk.state = Point(self.applied, term), self.state
        disk.entries = [entry for entry in disk.entries if entry.index > self.applied]
        self.raft.compact(self.applied)
        self.say(f"has a snapshot of {place(disk.start)}")


class World:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.out: list[str] = []
        self.flying: list[tuple[str, str, Message]] = []
        self.side: list[str] = []
        self.replicas: dict[str, Replica] = {}
        self.tunables = TUNABLES
        self.chunk_size = 4
        self.brief = False

    def send(self, source: str, messages: Iterable[tuple[str, Message]]) -> None:
        for to, message in messages:
            lost = (source in self.side) != (to in self.side)
            if not (self.brief and isinstance(message, Heartbeat | HeartbeatReply)):
                self.out.append(f"  {source} -> {to}: {words(message)}{' (lost)' if lost else ''}")
            if not lost:
                self.flying.append((source, to, message))

    def deliver(self, to: list[str]) -> None:
        now = [flying for flying in self.flying if not to or flying[1] in to]
        self.flying = [flying for flying in self.flying if flying not in now]
        for source, name, message in now:
            replica = self.replicas[name]
            if replica.up:
                replica.raft.receive(source, message, self.now_s)
                replica.work()

    def elapse(self, seconds: float, *, deliver: bool = False) -> None:
        """Timers run at their times; nothing arrives meanwhile, or everything at once."""
        end_s = self.now_s + seconds
        while True:
            while deliver and self.flying:
                self.deliver([])
            live = [replica for replica in self.replicas.values() if replica.up]
            due = min(live, key=lambda replica: replica.raft.deadline_s)
            if due.raft.deadline_s > end_s + 1e-9:
                break
            self.now_s = max(self.now_s, due.raft.deadline_s)
            due.raft.timeout(self.now_s)
            due.work()
        self.now_s = end_s

    # the commands

    def do_start(self, args: list[str], options: dict[str, str]) -> None:
        joining = options.pop("joining", "").split(",")
        self.chunk_size = int(options.pop("chunk_size", 4))
        known: dict[str, Any] = {
            name: float(value) if "_s" in name[-2:] else int(value) for name, value in options.items()
        }
        self.tunables = replace(TUNABLES, **known)
        for name in args:
            self.replicas[name] = Replica(self, name, Configuration(tuple(args)))
        for name in filter(None, joining):
            self.replicas[name] = Replica(self, name, Configuration())
        self.do_show([], {})

    def do_campaign(self, args: list[str], options: dict[str, str]) -> None:
        if not self.replicas[args[0]].raft.campaign(self.now_s):
            self.out.append(f"{args[0]}: does not stand")

    def do_propose(self, args: list[str], options: dict[str, str]) -> None:
        payloads = [word.encode() for word in args[1:]]
        self.replicas[args[0]].raft.propose(payloads, self.now_s)

    def do_read(self, args: list[str], options: dict[str, str]) -> None:
        for context in args[1:]:
            self.replicas[args[0]].raft.read(int(context), self.now_s)

    def do_transfer(self, args: list[str], options: dict[str, str]) -> None:
        self.replicas[args[0]].raft.transfer(options.get("to"), self.now_s)

    def do_change(self, args: list[str], options: dict[str, str]) -> None:
        voters, learners = options["voters"].split(","), list(filter(None, options.get("learners", "").split(",")))
        self.replicas[args[0]].raft.change(voters, learners, self.now_s)

    def do_wake(self, args: list[str], options: dict[str, str]) -> None:
        self.replicas[args[0]].raft.wake(self.now_s, leader_suspected="suspect" in args)

    def do_pass(self, args: list[str], options: dict[str, str]) -> None:
        self.elapse(float(args[0]))

    def do_run(self, args: list[str], options: dict[str, str]) -> None:
        self.brief = True
        self.elapse(float(args[0]), deliver=True)
        self.brief = False

    def do_deliver(self, args: list[str], options: dict[str, str]) -> None:
        self.deliver(args)

    def do_stabilize(self, args: list[str], options: dict[str, str]) -> None:
        while self.flying:
            self.deliver([])

    def do_lose(self, args: list[str], options: dict[str, str]) -> None:
        self.flying = [flying for flying in self.flying if args and flying[1] not in args]

    def do_cut(self, args: list[str], options: dict[str, str]) -> None:
        self.side = args

    def do_mend(self, args: list[str], options: dict[str, str]) -> None:
        self.side = []

    def do_disk(self, args: list[str], options: dict[str, str]) -> None:
        self.replicas[args[0]].slow = args[1] == "slow"

    def do_sync(self, args: list[str], options: dict[str, str]) -> None:
        self.replicas[args[0]].sync()

    def do_crash(self, args: list[str], options: dict[str, str]) -> None:
        self.replicas[args[0]].up = False

    def do_restart(self, args: list[str], options: dict[str, str]) -> None:
        self.replicas[args[0]].begin()
        self.do_show(args, {})

    def do_compact(self, args: list[str], options: dict[str, str]) -> None:
        self.replicas[args[0]].compact()

    def do_show(self, args: list[str], options: dict[str, str]) -> None:
        for name in args or list(self.replicas):
            replica, raft = self.replicas[name], self.replicas[name].raft
            if not replica.up:
                self.out.append(f"{name}: down")
                continue
            of = f" of {raft.leader}" if raft.leader and raft.role != LEADER else ""
            quiet = "quiet " if raft.statistics()["quiet"] else ""
            positions = f"log {place(raft.log.start)} to {place(raft.log.last)}, committed {raft.log.committed}"
            replica.say(f"{quiet}{raft.role}{of}, term {raft.term}, {positions}, {raft.configuration}")

    def do_logs(self, args: list[str], options: dict[str, str]) -> None:
        for replica in self.replicas.values():
            entries = replica.raft.log.slice(replica.raft.log.start.index + 1, replica.raft.log.last.index, 1 << 20)
            replica.say(", ".join(map(body, entries)))


def test_transcript(scenario: Path, transcript: Callable[..., None]) -> None:
    world = World()

    def handle(step: Any) -> str:
        world.out = []
        try:
            getattr(world, f"do_{step.name}")(step.args, dict(step.options))
        except GoStoreError as error:
            world.out.append(f"refused, {error.code}: {error}")
        if step.name not in ("start", "show", "logs", "crash", "restart"):
            for replica in world.replicas.values():
                if replica.up:
                    replica.work()
        return "\n".join(world.out) or "ok"

    transcript(scenario, handle)

"""The replication policy ``quorum``, a lesson: no leader, N copies, W for a write, R for a read.

Theory of operation
===================

After Dynamo (DeCandia et al., "Dynamo: Amazon's Highly Available Key-value Store", SOSP 2007, sections 4.3 to 4.7), as
far as that fits a log. The N replicas of a shard are its owners on the ring (``ring.replicas``), and *any* of them
serves, for whoever asks it:

*Writes.* The replica stamps the command with its hybrid logical clock (Kulkarni et al., "Logical Physical Clocks",
OPODIS 2014), later than everything it has heard of. It logs and applies it, sends it to all others, and acknowledges it
when W replicas, itself among them, have *synced* it (``db.write_quorum``). A write with fewer acknowledgements is
reported as failed or unknown, and stays where it is: nothing is ever taken back.

*Reads.* The replica asks the others what they have, waits for R - 1 answers (``db.read_quorum``), takes over what it
lacks, and reads its own state. Where an answer shows that the other lacks something, it is sent there: *read repair*.

*One order.* A replica executes commands in the order of their stamps. One that comes late is put in its place: the
state goes back to an earlier checkpoint, and everything is executed again (the undo and redo of Terry et al., "Managing
Update Conflicts in Bayou", SOSP 1995). So for each key the last writer wins, and replicas that have the same commands
are equal; their version vectors (see ``stamped``) tell which they lack of one another.

*Anti-entropy.* Every second or so each replica compares vectors with one other, and each sends what the other lacks. A
replica that is new on the ring, or was restarted, does so with all others that are online before it serves. One that is
off the ring hands all it has to those that are on it, and forgets it then: what is left of *hinted hand-off*. The ring
leaves out who is offline, which makes quorums *sloppy*, as Dynamo's are: two quorums of different views need not meet.

What it promises: what is acknowledged is on W disks; it is not forgotten, by restarts and power cuts neither; replicas
that hear of one another become equal. With R + W > N and one view of the ring, a read sees every write that was
acknowledged before it, unless a write with a later stamp took its place.

What it does *not*:

* It is not linearizable. With R + W <= N reads are stale. With R + W > N too, a read may see a write that fewer than W
  have, and the next one may not see it.
* Acknowledged updates get lost: the later *stamp* wins, not the later write. A node whose clock is behind, and has not
  heard of the write before, writes into the past; the outcome that its client was told is not what all will see.
* Transactions are not isolated. Conflicts are found among the commands that the serving replica has heard of: of two
  that contradict each other both may be acknowledged, and one has no effect when the stamps are merged. Across shards
  one half of a transaction may so be left.
* It does not go on for ever: the log is never compacted, and a shard is full after :data:`LOG_ENTRIES_MAX` commands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from gostore.cluster.view import View
from gostore.comm import Reply
from gostore.core.errors import BadRequest, GoStoreError, NotOwner, Timeout, TooLarge, Unavailable
from gostore.core.stamps import HybridClock
from gostore.services.db.replication import Group, ShardStatus, together
from gostore.services.db.stamped import Stamped, StampedLog, Vector, from_wire, pack_entry, to_wire, unpack_entry

QUORUM_FROM: Final = 1 << 18
"""Numbers of the shards' logs in the node's log; below are those of others."""

LOG_ENTRIES_MAX: Final = 20_000
LOG_SIZE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of one shard, in memory and on the disk; more is refused. All that a lesson needs, and a restart replays it soon."""

CHECKPOINT_ENTRIES: Final = 64
"""So many commands lie between two checkpoints. More: fewer copies of the state; fewer: less is executed again."""
CHECKPOINTS_MAX: Final = 4
"""Kept in memory; a command that is later than all of them lets the whole log be executed again."""

SEND_TIMEOUT_S: Final = 2.0
"""For one message. Whoever does not answer is told by anti-entropy, when it is back."""

IN_FLIGHT_MAX: Final = 4096
"""Messages of one shard that this node may have under way; more requests are refused as unavailable."""

ANTI_ENTROPY_S: Final = (0.5, 1.0)
"""Between two exchanges of a replica, and after one that failed: drawn between. Shorter: stale for less time."""


TAG_BITS: Final = 8
"""The end of a stamp says who made it, so that two nodes hardly ever make the same one, and versions differ."""


def tagged(stamp: int, name: str) -> int:
    """The first stamp from this one on that ends as those of this node do."""
    size = 1 << TAG_BITS
    return stamp + (xxh3_64_intdigest(name.encode()) - stamp) % size


@dataclass(slots=True)
class _Checkpoint:
    """The state after the first ``entries`` of the log; ``index``: of the last of them."""

    entries: int
    index: int
    pieces: list[bytes]


class _Tally:
    """Who waits for ``needed`` of ``asked`` answers; ``future`` tells whether they came."""

    def __init__(self, needed: int, asked: int) -> None:
        self.future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.got = 0
        self._needed = needed
        self._left = asked
        self._decide()

    def note(self, answered: bool) -> None:
        self.got += answered
        self._left -= 1
        self._decide()

    def _decide(self) -> None:
        if self.future.done():
            return
        if self.got >= self._needed:
            self.future.set_result(True)
        elif self.got + self._left < self._needed:
            self.future.set_result(False)


class Quorum:
    """See the page above."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._number = QUORUM_FROM + group.shard  # of its log in the node's log
        self._log = StampedLog()
        self._clock = HybridClock()
        self._lives = 0
        self._origin = ""
        self._applied = 0  # how many of the log's entries
        self._index = 0  # of the last applied one
        self._checkpoints: list[_Checkpoint] = []
        self._outcomes: dict[tuple[str, int], Any] = {}
        self._owners: tuple[str, ...] = ()
        self._ready = False
        self._obstacle = "no view of the cluster yet"
        self._look = asyncio.Event()
        self._in_flight = 0
        self._turn = 0
        self._quiet = False
        self._late = 0
        self._open()

    def _open(self) -> None:
        """Replay what is on the disk."""
        for record in self._group.wal.records(self._number):
            entry = unpack_entry(record.payload)
            self._log.add(entry)
            self._clock.last = max(self._clock.last, entry.stamp)
        self._begin_life()

    def _begin_life(self) -> None:
        """From here on this node is another origin: what it had numbered before may not be on its own disk."""
        self._lives += 1
        self._origin = f"{self._group.name}.{self._group.incarnation}.{self._lives}"

    async def start(self) -> None:
        self._apply_from(0)
        self._group.env.tasks.start(self._tend_forever(), name=f"db-tend-{self._group.shard}")

    # the cluster

    def on_view(self, view: View) -> None:
        owners = self._group.owners(view)
        if owners != self._owners:
            before, self._owners = self._owners, owners
            me = self._group.name
            self._ready = self._ready and me in before and me in owners
            if self._ready:
                # Somebody may be gone who drove transactions across shards.
                self._group.machine.serving()
        self._look.set()

    @property
    def _others(self) -> list[str]:
        return [name for name in self._owners if name != self._group.name]

    @property
    def _online(self) -> list[str]:
        online = self._group.view().online
        return [name for name in self._others if name in online]

    def _check(self, needed: int, what: str) -> None:
        """Raises unless this replica may serve a request that needs so many replicas."""
        shard, name = self._group.shard, self._group.name
        if name not in self._owners:
            owner = self._owners[0] if self._owners else None
            raise NotOwner(f"shard {shard}: {name} is no replica of it, {owner} is", owner=owner)
        if not self._ready:
            raise Unavailable(f"shard {shard}: {name} is catching up: {self._obstacle}")
        if len(self._owners) < needed:
            raise Unavailable(
                f"shard {shard}: a {what} needs {needed} replicas, and {len(self._owners)} are there: start nodes "
                "again, or try again when the ring has others"
            )
        if self._in_flight >= IN_FLIGHT_MAX:
            raise Unavailable(f"shard {shard}: {IN_FLIGHT_MAX} messages are under way already: try again later")

    # writes

    async def propose(self, payload: bytes, deadline_s: float) -> Any:
        needed = self._group.write_quorum
        self._check(needed, "write")
        entry = self._stamp(payload)
        self._outcomes[entry.name] = None
        try:
            self._take([entry], quiet=False)
            await self._replicate(entry, needed, deadline_s)
            # Of the order as it is known here by now: that another command came in between may have changed it.
            return self._outcomes[entry.name]
        finally:
            del self._outcomes[entry.name]

    def _stamp(self, payload: bytes) -> Stamped:
        log, shard = self._log, self._group.shard
        if len(log.entries) >= LOG_ENTRIES_MAX or log.size_bytes + len(payload) > LOG_SIZE_BYTES_MAX:
            raise TooLarge(
                f"shard {shard} is full: {len(log.entries)} commands, {log.size_bytes} bytes. The policy quorum is a "
                "lesson and never compacts its log: start a new cluster, or use raft"
            )
        stamp = self._clock.last = tagged(self._clock.tick(self._group.env.wall_ms()), self._group.name)
        return Stamped(stamp, self._origin, log.count(self._origin) + 1, payload)

    async def _replicate(self, entry: Stamped, needed: int, deadline_s: float) -> None:
        tasks, shard, others = self._group.env.tasks, self._group.shard, self._others
        tally = _Tally(needed, 1 + len(others))
        tasks.start(self._sync(tally), name=f"db-sync-{shard}")
        for name in others:
            tasks.start(self._push(name, entry, tally), name=f"db-push-{shard}")
        why = f"shard {shard}: a write was not acknowledged by {needed} of {', '.join(self._owners)}"
        try:
            async with asyncio.timeout_at(deadline_s):
                written = await tally.future
        except TimeoutError:
            raise Timeout(f"{why} in time: it stays where it is, and may still spread") from None
        if not written:
            raise Unavailable(f"{why}, but {tally.got}: it stays where it is, and may still spread", definite=False)

    async def _sync(self, tally: _Tally) -> None:
        synced = False
        try:
            await self._group.wal.sync()
            synced = True
        except GoStoreError as error:
            self._group.env.log.warning("shard %d: %s", self._group.shard, error)
        finally:
            tally.note(synced)

    async def _push(self, name: str, entry: Stamped, tally: _Tally) -> None:
        synced = False
        self._in_flight += 1
        try:
            theirs = await self._send([entry], name)
            if theirs.get(entry.origin, 0) < entry.number:
                theirs = await self._give(name, theirs)  # it lacks those before it, too
            synced = theirs.get(entry.origin, 0) >= entry.number
        except GoStoreError as error:
            self._group.env.log.debug("shard %d: %s: %s", self._group.shard, name, error.message)
        finally:
            self._in_flight -= 1
            tally.note(synced)

    # reads

    async def read_barrier(self, deadline_s: float) -> None:
        needed, shard, others = self._group.read_quorum, self._group.shard, self._others
        self._check(needed, "read")
        if needed == 1:
            return
        tally = _Tally(needed - 1, len(others))
        for name in others:
            self._group.env.tasks.start(self._ask(name, tally), name=f"db-read-{shard}")
        why = f"shard {shard}: fewer than {needed} of {', '.join(self._owners)} answered a read"
        try:
            async with asyncio.timeout_at(deadline_s):
                answered = await tally.future
        except TimeoutError:
            raise Unavailable(f"{why} in time") from None
        if not answered:
            raise Unavailable(why)

    async def _ask(self, name: str, tally: _Tally) -> None:
        answered = False
        self._in_flight += 1
        try:
            try:
                theirs = await self._pull(name, "read")
                answered = True
            finally:
                tally.note(answered)
            await self._give(name, theirs)  # read repair; nobody waits for it
        except GoStoreError as error:
            self._group.env.log.debug("shard %d: %s: %s", self._group.shard, name, error.message)
        finally:
            self._in_flight -= 1

    # what replicas say to one another

    async def _send(self, entries: list[Stamped], name: str) -> Vector:
        """Its vector, when it has synced them; or without them, if it lacks what is before them."""
        heads, data = to_wire(entries)
        reply: Reply = await self._group.send(name, ["push", heads], data, SEND_TIMEOUT_S)
        vector: Vector = reply.value
        return vector

    async def _give(self, name: str, theirs: Vector) -> Vector:
        """Send what somebody with this vector lacks; its vector then."""
        while entries := self._log.lacking(theirs):
            before, theirs = theirs, await self._send(entries, name)
            if theirs == before:
                break  # it was cleared meanwhile, or does not take them
        return theirs

    async def _pull(self, name: str, word: str) -> Vector:
        """Take over what another replica has; its vector. ``read``: only if it serves."""
        while True:
            reply: Reply = await self._group.send(name, [word, self._log.vector], b"", SEND_TIMEOUT_S)
            heads, theirs = reply.value
            self._take(from_wire(heads, bytes(reply.data)))
            if not heads or self._log.covers(theirs):
                vector: Vector = theirs
                return vector

    async def _exchange(self, name: str) -> bool:
        """Give and take until both have what either had; whether that was possible. All is on both disks then."""
        try:
            theirs = await self._pull(name, "pull")
            await self._group.wal.sync()
            held = self._log.vector
            theirs = await self._give(name, theirs)
            return all(theirs.get(origin, 0) >= number for origin, number in held.items())
        except GoStoreError as error:
            self._obstacle = f"{name}: {error.message}"
            return False

    async def handle(self, source: str, message: list[Any], data: bytes) -> Reply:
        match message:
            case ["push", [*heads]]:
                self._take(from_wire(heads, data))
                vector = self._log.vector
                await self._group.wal.sync()
                self._look_if_former()
                return Reply(vector)
            case ["pull" | "read" as word, dict(vector)]:
                if word == "read":
                    self._check(1, "read")
                heads, payloads = to_wire(self._log.lacking(vector))
                return Reply([heads, self._log.vector], payloads)
        raise BadRequest(f"shard {self._group.shard}: no message of quorum: {message!r:.100}")

    # the log and the state

    def _take(self, entries: Iterable[Stamped], *, quiet: bool = True) -> None:
        """Log what is new, and apply it. It is on the disk after the next ``wal.sync()``.

        ``quiet``: this node does not serve them, it only hears of them. Raises what the node's log raises.
        """
        wal, first = self._group.wal, None
        try:
            for entry in entries:
                if self._log.is_next(entry):
                    wal.append(self._number, 0, wal.last_index(self._number) + 1, pack_entry(entry))
                    place = self._log.add(entry)
                    first = place if first is None else min(first, place)
                    self._clock.last = max(self._clock.last, entry.stamp)
        finally:
            if first is not None:
                self._apply_from(first, quiet=quiet)

    def _apply_from(self, place: int, *, quiet: bool = True) -> None:
        """Execute the entries from this place on, in the order of their stamps."""
        if place < self._applied:
            self._go_back(place)
        machine, entries = self._group.machine, self._log.entries
        self._quiet = quiet
        try:
            while self._applied < len(entries):
                entry = entries[self._applied]
                index = max(entry.stamp, self._index + 1)  # a function of the order alone, and grows
                try:
                    outcome = machine.apply(index, entry.payload)
                except Exception as error:
                    # Whatever it is, every replica would stumble over it, and whoever skipped it would differ from the
                    # others: the node stops, and the error goes on.
                    self._group.env.fatal(f"shard {self._group.shard}: entry {entry.name} cannot be applied: {error}")
                    raise
                self._applied, self._index = self._applied + 1, index
                if entry.name in self._outcomes:
                    self._outcomes[entry.name] = outcome
                if self._applied % CHECKPOINT_ENTRIES == 0:
                    self._checkpoints.append(_Checkpoint(self._applied, index, list(machine.snapshot())))
                    del self._checkpoints[:-CHECKPOINTS_MAX]
        finally:
            self._quiet = False

    def _go_back(self, place: int) -> None:
        """Become the state before the entry at this place, or an earlier one."""
        self._late += 1
        self._checkpoints = [checkpoint for checkpoint in self._checkpoints if checkpoint.entries <= place]
        start = self._checkpoints[-1] if self._checkpoints else _Checkpoint(0, 0, [])
        self._group.machine.restore(start.pieces)
        self._applied, self._index = start.entries, start.index

    # catching up, anti-entropy, leaving

    async def _tend_forever(self) -> None:
        while True:
            if self._group.name not in self._owners:
                if not self._log.entries:
                    await self._look.wait()
                    self._look.clear()
                    continue
                done = await self._leave()
            elif not self._ready:
                done = await self._catch_up()
            else:
                await self._compare()
                done = False
            if not done:
                await self._pause()

    async def _pause(self) -> None:
        """Until the view changes, or for a while."""
        try:
            async with asyncio.timeout(self._group.env.rng.uniform(*ANTI_ENTROPY_S)):
                await self._look.wait()
        except TimeoutError:
            pass
        self._look.clear()

    async def _exchange_all(self, names: list[str]) -> bool:
        exchanges = (self._exchange(name) for name in names)
        return all(await together(self._group.env, f"db-exchange-{self._group.shard}", exchanges))

    async def _catch_up(self) -> bool:
        """Learn all that the others have, before anybody is served."""
        owners, self._obstacle = self._owners, "the other replicas are being asked"
        if not await self._exchange_all(self._online) or self._owners != owners:
            return False
        self._ready = True
        self._group.machine.serving()
        return True

    async def _compare(self) -> None:
        """Anti-entropy with one of the others, each in its turn."""
        online = self._online
        if online:
            self._turn += 1
            await self._exchange(online[self._turn % len(online)])

    def _look_if_former(self) -> None:
        if self._group.name not in self._owners:
            self._look.set()

    async def _leave(self) -> bool:
        """Hand everything to those who are on the ring, and forget it when they have it."""
        held, owners, online = self._log.vector, self._owners, self._online
        if not online or not await self._exchange_all(online):
            return False
        if self._owners != owners or self._log.vector != held:
            return False
        self._log = StampedLog()
        self._begin_life()
        self._checkpoints.clear()
        self._applied = self._index = 0
        self._group.machine.restore([])
        wal = self._group.wal
        wal.truncate_prefix(self._number, wal.last_index(self._number) + 1)
        await wal.sync()
        return True

    # what others see

    @property
    def role(self) -> str:
        """``primary``: it serves, as others do. While it hears of what others serve it is a ``backup``."""
        if self._group.name in self._owners:
            return "backup" if self._quiet else "primary" if self._ready else "recovering"
        return "backup" if self._log.entries else "idle"

    @property
    def primary(self) -> str | None:
        """This node, where it serves: one is as good as another."""
        return self._group.name if self._ready else None

    def unapplied(self) -> list[tuple[int, bytes | None]]:
        """Nothing: everything that is here is applied."""
        return []

    def status(self) -> ShardStatus:
        role, held = self.role, len(self._log.entries)
        details: dict[str, Any] = {"late": self._late}
        if role == "recovering":
            details["obstacle"] = self._obstacle
        return ShardStatus(
            self._group.shard,
            role,
            self.primary,
            0,
            self._owners if role != "idle" else (),
            self._owners,
            held,
            held,
            role == "primary",
            details,
        )

"""The driver of all consensus groups of a node.

Theory of operation
===================

What comes in (messages, proposals, time) changes cores and marks their groups. Once per turn of the loop the marked
groups are worked on: what their cores say at once is gathered and sent, *one message per peer*, whatever groups it is
for; then what they hand out is written into the node's log, and applied. What may only be said when it is on the medium
follows the sync in the same way.

*One sync for all.* A single task waits for the medium. While one sync is under way, everything that is written by any
group gathers for the next one, and what may only be said when it is durable waits with it (the rules are those of
:class:`.ready.Ready`). So the number of syncs depends on the speed of the disk, and not on the number of groups.

*One timer.* All deadlines stand in one heap. A deadline that has moved away is noticed when the old one comes, which is
far cheaper than moving it with every message; quiet groups have none.

*Back-pressure.* When too much waits for the medium, no more work is taken from the cores until it is synced. They
bound what they take in.

A write or sync that fails, a machine that cannot apply what is committed, and a core that meets what no correct group
can produce (a log was lost) stop the node: ``env.fatal``.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

from gostore.comm.endpoint import Endpoint
from gostore.comm.service import Call, current_call, remote, service
from gostore.consensus.deadlines import Deadlines
from gostore.consensus.group import Compaction, Group, StateMachine
from gostore.consensus.messages import Append, Chunk, Message, message_from_wire, size_of
from gostore.consensus.raft import Raft
from gostore.consensus.ready import Ready
from gostore.consensus.tunables import Tunables
from gostore.core.errors import GoStoreError
from gostore.core.events import EventId, current_cause
from gostore.env import Env
from gostore.storage.wal import Wal

BATCH_SIZE_BYTES_MAX: Final = 1024 * 1024
"""Of what is gathered for one peer; more goes in several messages. Well below the largest message of comm."""

UNSYNCED_SIZE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Written and not synced; above this the cores wait. Well below what the node's log buffers."""

DESCRIBED_MAX: Final = 256
"""Groups told of at a time; a view shows no more."""

MESSAGE_OVERHEAD_BYTES: Final = 64
ENTRY_OVERHEAD_BYTES: Final = 16

__all__ = ["Compaction", "Groups"]


class _Work(NamedTuple):
    """What a core has handed out."""

    group: Group
    raft: Raft
    ready: Ready
    size: int


class _Unsynced(NamedTuple):
    """What is to be done when work is on the medium."""

    work: _Work
    drop_to: int
    cause: EventId | None


@dataclass(slots=True)
class _Batch:
    cause: EventId | None
    items: list[Any]
    size: int


@service("raft")
class Groups:
    """See the module. Register it at the endpoint; :meth:`open` the groups; :meth:`start` when the endpoint runs."""

    def __init__(self, env: Env, endpoint: Endpoint, wal: Wal, tunables: Tunables) -> None:
        self.env = env
        self.wal = wal
        self.tunables = tunables
        self._endpoint = endpoint
        self._groups: dict[int, Group] = {}
        self._running = False
        self._marked: dict[Group, None] = {}
        self._scheduled = False
        self._batches: dict[str, _Batch] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._unsynced: list[_Unsynced] = []
        self._unsynced_size = 0
        self._written = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.time_s = self._loop.time
        self.deadlines = Deadlines()
        self._statistics = dict.fromkeys(("turns", "casts", "messages", "syncs"), 0)

    def open(self, number: int, name: str, machine: StateMachine, compaction: Compaction | None = None) -> Group:
        """The group whose records are those of group ``number`` in the node's log; what is there is replayed.

        ``number`` is the same on all nodes. The machine is in its initial state. Raises ``Corrupt``, ``NotSupported``.
        """
        assert number not in self._groups, f"group {number} is open"
        group = self._groups[number] = Group(self, number, name, machine, compaction or Compaction())
        self.mark(group)
        return group

    async def start(self) -> None:
        """Take part: messages are dropped before."""
        self._running = True
        self.env.tasks.start(self._sync_forever(), name="raft-sync")
        self._schedule()

    async def stop(self) -> None:
        """Take part no longer; whoever waits gets an error. A second call does nothing."""
        self._end("this node is stopping")

    def _end(self, why: str) -> None:
        if not self._running:
            return
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        for group in self._groups.values():
            group.fail(why)

    def wake(self, suspected: str) -> None:
        """A member is suspected: the groups that it leads look for another leader."""
        for group in self._groups.values():
            group.wake(suspected)

    def statistics(self) -> dict[str, int]:
        """Since the start: turns, casts (one per peer and turn), messages in them, syncs; and groups, quiet ones."""
        quiet = sum(group.raft is not None and group.raft.deadline_s == math.inf for group in self._groups.values())
        return {**self._statistics, "groups": len(self._groups), "quiet": quiet}

    def described(self) -> list[dict[str, Any]]:
        """For views: the groups that this node holds a log of, or is a member of, by their numbers: ``name``, and the
        figures of :meth:`Group.statistics`. At most ``DESCRIBED_MAX``.
        """
        ordered = (group for _, group in sorted(self._groups.items()))
        held = (
            group
            for group in ordered
            if group.begun and (group.last.index or self.env.name in group.configuration.members)
        )
        return [{"name": group.name, **group.statistics()} for group in islice(held, DESCRIBED_MAX)]

    @remote
    def messages(self, call: Call, items: list[Any]) -> None:
        """What a peer's groups say to those here: [[number of the group, message], ...]."""
        if not self._running:
            return
        # Worked on at once, and not with the turn: what is sent shares packets anyway, and an answer is sooner there.
        scheduled, self._scheduled = self._scheduled, True
        token = current_call.set(None)
        try:
            self._receive(call.source, items)
            self._turn()
        finally:
            current_call.reset(token)
            self._scheduled = scheduled

    def _receive(self, source: str, items: list[Any]) -> None:
        for item in items:
            try:
                number, wire = item
                group, message = self._groups.get(number), message_from_wire(wire)
            except (ValueError, TypeError) as error:
                self.env.log.warning("%s sends what is no message of a group: %s", source, error)
                continue
            if group is not None:
                self._guarded(group, Group.receive, source, message)

    # a turn

    def mark(self, group: Group) -> None:
        """There may be work in this group."""
        self._marked[group] = None
        self._schedule()

    def _schedule(self) -> None:
        if self._scheduled or not self._running:
            return
        self._scheduled = True
        context = copy_context()
        context.run(current_call.set, None)  # what is done for all is not done in the time of one caller
        self._loop.call_soon(self._scheduled_turn, context=context)

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        self._turn()

    def _turn(self) -> None:
        """Work on all that is marked, and send what there is to say.

        What need not wait for the medium is on its way before anything is written here: others have work with it.
        Nothing else runs between what a core hands out and its writing, as the core takes it for written.
        """
        self._statistics["turns"] += 1
        while self._running and self._marked and self._unsynced_size <= UNSYNCED_SIZE_BYTES_MAX:
            work: list[_Work] = []
            while self._marked and self._unsynced_size <= UNSYNCED_SIZE_BYTES_MAX:
                group = next(iter(self._marked))
                del self._marked[group]
                self._guarded(group, self._take, work)
            self._send()
            for one in work:
                self._guarded(one.group, self._write, one)
            for one in work:
                self._guarded(one.group, self._apply, one)
        self._send()
        self._set_timer()

    def _guarded(self, group: Group, step: Callable[..., None], *arguments: Any) -> None:
        if not self._running:
            return
        try:
            step(group, *arguments)
        except Exception as error:
            # Whatever it is, the core is half changed, or takes for done what was not: not another word from this node.
            self._fatal(f"{group.name} cannot go on: {type(error).__name__}: {error}")
            if not isinstance(error, GoStoreError):
                raise

    def _take(self, group: Group, work: list[_Work]) -> None:
        raft, ready = group.raft, group.ready()
        if raft is None or ready is None:
            self._arm(group)
            return
        self._gather(group, ready.messages)
        size = _weight(ready)
        self._unsynced_size += size
        work.append(_Work(group, raft, ready, size))

    def _write(self, group: Group, work: _Work) -> None:
        ready = work.ready
        group.write(ready)
        if ready.must_sync:
            self._unsynced.append(_Unsynced(work, group.journal.take_drop(), current_cause.get()))
            self._written.set()
        else:
            self._unsynced_size -= work.size
            self._gather(group, ready.messages_synced)

    def _apply(self, group: Group, work: _Work) -> None:
        group.apply(work.ready)
        if work.ready.committed:  # only of these there may be more than one Ready takes
            self._marked[group] = None
        self._arm(group)

    def _fatal(self, why: str) -> None:
        self._end(why)
        self.env.fatal(why)

    # the medium

    async def _sync_forever(self) -> None:
        while True:
            await self._written.wait()
            self._written.clear()
            while self._unsynced:
                batch, self._unsynced = self._unsynced, []
                try:
                    await self.wal.sync()
                    self._statistics["syncs"] += 1
                    self._synced(batch)
                except GoStoreError as error:
                    self._fatal(f"the log cannot be synced: {error.message}")
                    return
                except Exception as error:
                    # Whatever it is: without this task nothing is acknowledged again. The node stops, and says why.
                    self._fatal(f"the groups cannot go on: {type(error).__name__}: {error}")
                    raise

    def _synced(self, batch: list[_Unsynced]) -> None:
        now_s = self._loop.time()
        for (group, raft, ready, size), drop_to, cause in batch:
            self._unsynced_size -= size
            if drop_to:
                group.journal.drop(drop_to)
            if raft is not group.raft:
                continue
            token = current_cause.set(cause)
            self._gather(group, ready.messages_synced)
            current_cause.reset(token)
            raft.persisted(ready.number, now_s)
            self._marked[group] = None
        self._turn()

    # messages

    def _gather(self, group: Group, messages: Iterable[tuple[str, Message]]) -> None:
        before: Message | None = None
        size, wire = 0, []
        for to, message in messages:
            if message is not before:  # a leader says the same to all who are equally far
                size, wire, before = _size(message), message.to_wire(), message
            batch = self._batches.get(to)
            if batch is not None and batch.size + size > BATCH_SIZE_BYTES_MAX:
                self._cast(to)
                batch = None
            if batch is None:
                batch = self._batches[to] = _Batch(current_cause.get(), [], 0)
            batch.items.append([group.number, wire])
            batch.size += size

    def _send(self) -> None:
        if not self._batches:
            return
        for to in list(self._batches):
            self._cast(to)
        try:
            self._endpoint.flush()
        except Exception as error:  # seen by the loop's handler; the turn must still write what the cores handed out
            self._lost(error)

    def _cast(self, to: str) -> None:
        batch = self._batches.pop(to)
        if not self._running:
            return
        self._statistics["casts"] += 1
        self._statistics["messages"] += len(batch.items)
        token = current_cause.set(batch.cause)
        try:
            self._endpoint.cast(to, "raft", "messages", batch.items)
        except GoStoreError as error:
            self.env.log.warning("%d messages to %s are not sent: %s", len(batch.items), to, error.message)
        except Exception as error:  # seen by the loop's handler; what goes to the other nodes must still go
            self._lost(error)
        finally:
            current_cause.reset(token)

    def _lost(self, error: Exception) -> None:
        """Packets may be lost, whatever the reason, but what the cores have handed out must be written, and the other
        nodes be told: seen as what a callback of its own would raise, and the turn goes on."""
        self._loop.call_exception_handler({"message": "messages of the groups are lost", "exception": error})

    # time

    def _arm(self, group: Group) -> None:
        """See that the group is looked at in time. A deadline that has moved away is not followed until then."""
        if group.raft is not None and group.raft.deadline_s < group.armed_s:
            group.armed_s = group.raft.deadline_s
            heapq.heappush(self._deadlines, (group.armed_s, group.number))

    def _set_timer(self) -> None:
        if not self._running or not self._deadlines:
            return
        first_s = self._deadlines[0][0]
        if self._timer is not None:
            if self._timer_s <= first_s:
                return
            self._timer.cancel()
        self._timer_s = first_s
        self._timer = self._loop.call_at(first_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now_s = self._loop.time()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            when_s, number = heapq.heappop(self._deadlines)
            group = self._groups[number]
            if group.armed_s != when_s:
                continue  # an earlier one has taken its place
            group.armed_s = math.inf
            if group.raft is not None and group.raft.deadline_s <= now_s:
                self._guarded(group, _time_out, group.raft, now_s)
                self._marked[group] = None
            else:
                self._arm(group)
        self._turn()


def _time_out(_group: Group, raft: Raft, now_s: float) -> None:
    raft.timeout(now_s)


def _size(message: Message) -> int:
    if isinstance(message, Append):
        return size_of(message.entries) + ENTRY_OVERHEAD_BYTES * len(message.entries) + MESSAGE_OVERHEAD_BYTES
    if isinstance(message, Chunk):
        return len(message.data) + MESSAGE_OVERHEAD_BYTES
    return MESSAGE_OVERHEAD_BYTES


def _weight(ready: Ready) -> int:
    """About what it takes in the log."""
    return size_of(ready.entries) + sum(len(chunk.data) for chunk in ready.chunks)

"""Watches, at the nodes: long polls of the primaries. What they promise is written in :mod:`gostore.client.watch`.

Theory of operation
===================

A poll asks one node for the changes of a range of keys after a position in each of some shards. The node answers at
once when there are any; otherwise the poll is *parked*, and answered with the next change, or with "nothing new up to
index ..." when its time is over. The position is the client's, and a node remembers nothing between two polls. So a
watch costs a node what it asks and no more, it moves to another primary by asking there, and a client that does not
come back leaves nothing behind. Without watchers, an entry that is applied finds an empty dictionary.

*What is delivered is committed*, because only what was applied is looked at. It is read from the history of the store
(:meth:`Store.written`), which is bounded, and which every replica that applied the same entries holds alike: the next
primary goes on from the last version delivered. One that began with a snapshot in between has no history before it,
and says so (``Compacted``).

*What is committed is delivered soon.* A read barrier opens every poll, so that a deposed primary that does not know it
can keep a watcher waiting for one poll, and no longer. (With ``primary_backup`` it can for as long as it does not know
it: its barrier asks nobody, as for its reads.)

*Positions* are (index, skip): everything up to the index, and the first ``skip`` changes after it. The second number
is 0, except where an answer had to be cut inside one large transaction. A parked poll moves on over entries that do not
concern it, so that the history may forget them. It is answered before its replica becomes another state (a snapshot,
or nothing): its client then knows how far it was, and is nowhere behind a copy that was made from here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from gostore.core.errors import BadRequest, Compacted, GoStoreError, NotFound, NotOwner, Unavailable
from gostore.env import Env
from gostore.services.db.mvcc import Written
from gostore.services.db.replication import together

if TYPE_CHECKING:
    from gostore.services.db.shard import Shard

POLLS_MAX: Final = 512
"""Polls at a node at a time; more are refused as unavailable. One watch has at most one for each shard."""

WAIT_S_MAX: Final = 30.0
"""The longest that a poll may ask to wait."""

BARRIER_S: Final = 1.0
"""For the read barrier of a poll. A shard without a quorum keeps the others of the same poll waiting so long."""

ANSWER_CHANGES_MAX: Final = 1024
ANSWER_SIZE_BYTES_MAX: Final = 1024 * 1024
"""Of one answer, over all of its shards; one change always fits."""

_CHANGE_OVERHEAD_BYTES: Final = 16

Answer = list[Any]
"""[shard, null, index, skip, [[key, version, packed or null], ...]], or [shard, error]."""


class Poll:
    """``since``: shard -> (index, skip). ``answers``: of shards that found something; the first one ends ``woken``.

    ``count``, ``size_bytes``: of the changes in its answers up to now.
    """

    __slots__ = ("answers", "container", "count", "end", "since", "size_bytes", "start", "woken")

    def __init__(self, container: str, start: str, end: str | None, since: dict[int, tuple[int, int]]) -> None:
        self.container = container
        self.start = start
        self.end = end
        self.since = since
        self.answers: dict[int, Answer] = {}
        self.count = self.size_bytes = 0
        self.woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Watches:
    """The polls of one shard at one node."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.parked: dict[Poll, None] = {}

    async def position(self, container: str, deadline_s: float) -> list[Any]:
        """[the index up to which everything is known, the oldest one from which changes are kept, this node]."""
        await self._shard.replication.read_barrier(deadline_s)
        self._check_dropped(container)
        machine = self._shard.machine
        return [machine.applied, machine.store.history_floor, self._shard.name]

    async def admit(self, deadline_s: float) -> GoStoreError | None:
        """Why this node may not answer for the shard; None: it may."""
        try:
            await self._shard.replication.read_barrier(deadline_s)
        except GoStoreError as error:
            return error
        return None

    def answer(self, poll: Poll) -> Answer:
        """What there is at this moment. This node is the primary, or the poll was parked here."""
        number = self._shard.number
        try:
            self._check_dropped(poll.container)
            index, skip, found = self._collect(poll)
        except GoStoreError as error:
            return [number, error.to_wire()]
        return [number, None, index, skip, [[one.key, one.index, one.packed] for one in found]]

    def _check_dropped(self, container: str) -> None:
        if self._shard.machine.is_dropped(container):
            name = container.rpartition("@")[0] or container
            raise NotFound(f"the container {name!r} was dropped", dropped=container)

    def _collect(self, poll: Poll) -> tuple[int, int, list[Written]]:
        machine, number = self._shard.machine, self._shard.number
        index, skip = poll.since[number]
        if index > machine.applied:
            # Of a primary that was not deposed: what had been delivered is lost.
            raise Compacted(
                f"shard {number} at {self._shard.name} ends at index {machine.applied} and knows nothing of {index}",
                ahead=True,
            )
        written = machine.store.written(poll.container, poll.start, poll.end, index)
        for last in range(skip, len(written)):
            index, key, packed = written[last]
            size = poll.size_bytes + len(key) + len(packed or b"") + _CHANGE_OVERHEAD_BYTES
            if poll.count and (poll.count >= ANSWER_CHANGES_MAX or size > ANSWER_SIZE_BYTES_MAX):
                return index - 1, sum(one.index == index for one in written[:last]), written[skip:last]
            poll.count, poll.size_bytes = poll.count + 1, size
        return machine.applied, 0, written[skip:]

    # parking

    def park(self, poll: Poll) -> None:
        """There is nothing for it up to now."""
        self.parked[poll] = None
        poll.since[self._shard.number] = (self._shard.machine.applied, 0)

    def notice(self, index: int) -> None:
        """The entry ``index`` was applied."""
        machine, number = self._shard.machine, self._shard.number
        for poll in tuple(self.parked):
            try:
                dropped = machine.is_dropped(poll.container)
                concerned = dropped or machine.store.written(poll.container, poll.start, poll.end, index - 1)
            except Compacted:
                concerned = True  # its answer says so; an entry is never stopped by who watches
            if concerned:
                self._wake(poll)
            else:
                poll.since[number] = (index, 0)

    def flush(self) -> None:
        """Answer all who wait, with what there is."""
        for poll in tuple(self.parked):
            self._wake(poll)

    def _wake(self, poll: Poll) -> None:
        del self.parked[poll]
        poll.answers[self._shard.number] = self.answer(poll)
        if not poll.woken.done():
            poll.woken.set_result(None)


class Polls:
    """All polls at one node."""

    def __init__(self, env: Env, shards: Sequence[Shard]) -> None:
        self._env = env
        self._shards = shards
        self._running = 0

    async def changes(
        self, container: str, start: str, end: str | None, since: Sequence[Any], until_s: float, deadline_s: float
    ) -> list[Answer]:
        """One answer for each shard of ``since``, a list of [shard, index, skip].

        When there is something new in any of them, or at ``until_s``; loop times. Raises ``BadRequest``, and
        ``Unavailable`` when there are too many polls. ``NotOwner`` and the like are answers of the shard concerned.
        """
        poll = Poll(container, start, end, self._positions(since))
        if self._running >= POLLS_MAX:
            raise Unavailable(f"{self._env.name} has {POLLS_MAX} watchers already: try again later")
        self._running += 1
        try:
            return await self._run(poll, until_s, deadline_s)
        finally:
            self._running -= 1

    def _positions(self, since: Sequence[Any]) -> dict[int, tuple[int, int]]:
        found: dict[int, tuple[int, int]] = {}
        for one in since:
            match one:
                case [int(shard), int(index), int(skip)] if 0 <= shard < len(self._shards) and min(index, skip) >= 0:
                    found[shard] = (index, skip)
                case _:
                    raise BadRequest(f"since: {one!r:.100} is no [shard, index, skip] of {len(self._shards)} shards")
        if not found:
            raise BadRequest("since = []: name a shard, as [shard, index, skip]")
        return found

    async def _run(self, poll: Poll, until_s: float, deadline_s: float) -> list[Answer]:
        shards = [self._shards[number] for number in poll.since]
        barrier_s = min(deadline_s, asyncio.get_running_loop().time() + BARRIER_S)
        errors = await together(self._env, "db-watch", (shard.watches.admit(barrier_s) for shard in shards))
        answers = [self._first(shard, poll, error) for shard, error in zip(shards, errors, strict=True)]
        if any(answer[1] is not None or answer[4] for answer in answers):
            return answers
        for shard in shards:
            shard.watches.park(poll)
        try:
            async with asyncio.timeout_at(until_s):
                await poll.woken
        except TimeoutError:
            pass
        finally:
            for shard in shards:
                shard.watches.parked.pop(poll, None)
        return [poll.answers.get(shard.number) or shard.watches.answer(poll) for shard in shards]

    def _first(self, shard: Shard, poll: Poll, error: GoStoreError | None) -> Answer:
        if error is None and shard.replication.role != "primary":
            # It lost the lead while others of the poll were asked.
            owner = shard.replication.primary
            error = NotOwner(f"shard {shard.number}: its primary is {owner}", owner=owner)
        return shard.watches.answer(poll) if error is None else [shard.number, error.to_wire()]

    def end(self) -> None:
        """Answer all: this node stops."""
        for shard in self._shards:
            shard.watches.flush()

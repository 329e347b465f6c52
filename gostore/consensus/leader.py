"""What a replica does while it leads: replication, commit, reads, hand-over, membership, going quiet. Pure.

One object lives for one leadership; nothing of it outlives the term. All that it sends may go before its own log is
synced, for it promises nothing that rests on it: it counts itself for a commit only up to ``log.durable``.

*Commit.* An index is committed when a quorum holds it durably and its entry is of this term (Raft, 5.4.2).

*Reads* (Raft, 8; Ongaro 2014, 6.4). A read takes the commit index, once an entry of this term is committed, and may be
answered when a quorum has answered a heartbeat that was sent later: then nobody newer had committed anything before.
One round of heartbeats serves all reads that came since the last one was sent; while one is on its way, or until the
next heartbeat is due, they gather for the next. No clock is trusted.

*Followers learn of a commit* with the next append or heartbeat, whichever comes first: a message for that alone would
be a third of what a write costs. Whoever is waiting for it is told at once: one who is dismissed, one who reads.

*Quorum check.* A leader whose quorum was silent for an election time-out steps down, so that its clients look
elsewhere (Ongaro 2014, 6.2).

*Going quiet.* When there is nothing to do for a while, everybody is up to date and lately heard of, the heartbeats say
``quiet``; a follower that holds and knows everything stops its timer and says so; when all have, the leader stops too.
A member that is down keeps the group awake. Whatever is to be written wakes the leader, its next message the followers.
Reads wake nobody, unless their round is not answered.
Nobody notices the death of a quiet leader here: who watches the nodes calls :meth:`Raft.wake`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from gostore.consensus.configuration import Configuration
from gostore.consensus.log import RaftLog
from gostore.consensus.messages import (
    COMMAND,
    CONFIGURATION,
    NOOP,
    Append,
    AppendReject,
    AppendReply,
    Chunk,
    ChunkReply,
    Entry,
    Heartbeat,
    HeartbeatReply,
    Message,
    Point,
    ReadReply,
    TimeoutNow,
    size_of,
)
from gostore.consensus.progress import REPLICATE, Progress, Transfer
from gostore.consensus.ready import Storage
from gostore.consensus.tunables import CHUNK_SIZE_BYTES_MAX, Tunables
from gostore.core.errors import BadRequest, TooLarge, Unavailable

Reader = tuple[str | None, int]
"""(Follower, its number), or (None, the context of a read at this node)."""


class Leadership:
    """``over``: the replica must step down. ``quiet``: no timer runs."""

    def __init__(
        self,
        name: str,
        term: int,
        log: RaftLog,
        storage: Storage,
        tunables: Tunables,
        send: Callable[[str, Message], None],
        now_s: float,
    ) -> None:
        self._name = name
        self._term = term
        self._log = log
        self._storage = storage
        self._tunables = tunables
        self._send = send
        self.over = False
        self.quiet = False
        self._confirmed: list[tuple[int, int]] = []  # (context, index)
        self.progress: dict[str, Progress] = {}
        self._round = 0
        self._quiet_round: int | None = None
        self._active_s = now_s
        self._heartbeat_s = now_s
        self._snapshots = 0
        self._new_reads: list[Reader] = []
        self._reads: deque[tuple[int, int, list[Reader]]] = deque()  # (round, index, who)
        self._transfer_to: str | None = None
        self._transfer_until_s = math.inf
        self._uncommitted_size = log.size_between(log.committed + 1, log.last.index)
        self._append([(NOOP, b"")], now_s)
        self._meet_members(now_s)
        self._plan_heartbeat(now_s)

    @property
    def settled(self) -> bool:
        """An entry of this term is committed: only now it is known what is."""
        return self._log.term(self._log.committed) == self._term

    @property
    def transfer_to(self) -> str | None:
        return self._transfer_to

    @property
    def deadline_s(self) -> float:
        if self.quiet and not self._reading:
            return math.inf
        return min(self._heartbeat_s, self._transfer_until_s)

    # what is asked of it

    def propose(self, payloads: Sequence[bytes], now_s: float) -> Point:
        """The point of the first entry. Raises ``TooLarge`` and ``Unavailable``, both definite."""
        self._check_not_leaving()
        size = sum(map(len, payloads))
        for payload in payloads:
            if len(payload) > self._tunables.entry_size_bytes_max:
                most = self._tunables.entry_size_bytes_max
                raise TooLarge(f"an entry of {len(payload)} bytes; at most {most} are allowed: divide it")
        if self._uncommitted_size and self._uncommitted_size + size > self._tunables.uncommitted_size_bytes_max:
            raise Unavailable(
                f"{self._uncommitted_size} bytes wait for their commit, at most "
                f"{self._tunables.uncommitted_size_bytes_max} may: try again later"
            )
        return self._append([(COMMAND, bytes(payload)) for payload in payloads], now_s)

    def change(self, voters: tuple[str, ...], learners: tuple[str, ...], now_s: float) -> Point:
        """Begin a change of the members; returns the point of its first entry. See :meth:`Raft.change`."""
        self._check_not_leaving()
        configuration = self._log.configuration
        if not self.settled:
            raise Unavailable(f"{self._name} has not committed an entry of term {self._term} yet: try again later")
        if configuration.joint or self._log.configuration_index > self._log.committed:
            raise Unavailable(f"the change to {configuration} is not complete: try again later")
        try:
            target = configuration.begin(voters, learners)
        except ValueError as error:
            raise BadRequest(f"not a configuration: {error}") from None
        if not voters:
            raise BadRequest("a group needs a voter; to end a group, its replicas are removed")
        for name in voters:
            if name not in configuration.voters and not self.caught_up(name):
                raise Unavailable(
                    f"{name} has not caught up and cannot vote yet: add it as a learner, and try again when it "
                    f"lacks no more than {self._tunables.learner_lag_entries_max} of the leader's entries"
                )
        return self._configure(target, now_s)

    def caught_up(self, name: str) -> bool:
        """A member that follows, and lacks so little that it may vote."""
        progress = self.progress.get(name)
        lag = self._tunables.learner_lag_entries_max
        return (
            progress is not None
            and not progress.leaving
            and progress.state == REPLICATE
            and progress.match + lag >= self._log.last.index
        )

    def transfer(self, to: str | None, now_s: float) -> str:
        """Hand over. See :meth:`Raft.transfer`."""
        self._check_not_leaving()
        candidates = [name for name in self._log.configuration.voters if name != self._name]
        if to is None and candidates:
            to = self._furthest(candidates)
        if to not in candidates:
            raise BadRequest(f"{to} cannot lead: the other voters are {', '.join(candidates) or 'nobody'}")
        self.touch(now_s)
        self._transfer_to = to
        self._transfer_until_s = now_s + self._tunables.election_timeout_s
        self._hand_over()
        return to

    def read(self, reader: Reader, now_s: float) -> bool:
        """Find an index for a read. False: too many wait."""
        if len(self._new_reads) + sum(len(readers) for _, _, readers in self._reads) >= self._tunables.reads_max:
            return False
        if self.quiet and not self._reading:
            # One round with the group as quiet as it is; what is not answered by then wakes it.
            self._plan_heartbeat(now_s + self._tunables.heartbeat_s)
        self._new_reads.append(reader)
        return True

    @property
    def _reading(self) -> bool:
        return bool(self._new_reads or self._reads)

    def _check_not_leaving(self) -> None:
        if self._transfer_to is not None:
            raise Unavailable(f"the lead is being handed over to {self._transfer_to}: try again there, or later")

    # the log

    def _append(self, bodies: Sequence[tuple[int, bytes]], now_s: float) -> Point:
        self.touch(now_s)
        log = self._log
        first = log.last.index + 1
        log.append(Entry(self._term, index, kind, payload) for index, (kind, payload) in enumerate(bodies, first))
        self._uncommitted_size += sum(len(payload) for _, payload in bodies)
        return Point(first, self._term)

    def _configure(self, configuration: Configuration, now_s: float) -> Point:
        point = self._append([(CONFIGURATION, configuration.pack())], now_s)
        self._meet_members(now_s)
        return point

    def _meet_members(self, now_s: float) -> None:
        """A progress for every member; who is none any more is dismissed."""
        members = self._log.configuration.members
        for name in members:
            if name == self._name:
                continue
            known = self.progress.get(name)
            if known is None or known.leaving:
                # Nothing is known of one that comes back, as it may have forgotten its log meanwhile. Begin with the
                # latest entry: there always is one to send.
                self.progress[name] = Progress(self._log.last.index, now_s)
        for name, progress in self.progress.items():
            if name not in members:
                progress.leaving = True
                progress.leave_s = math.inf

    def advance(self, now_s: float) -> None:
        """Commit what a quorum holds."""
        log = self._log
        matches = {name: progress.match for name, progress in self.progress.items()}
        matches[self._name] = log.durable
        index = log.configuration.reached(matches)
        before = log.committed
        if index <= before or log.term(index) != self._term:
            return
        self._uncommitted_size = max(0, self._uncommitted_size - log.size_between(before + 1, index))
        log.commit(index)
        if log.configuration_index <= index:
            self._configuration_committed(now_s)

    def _configuration_committed(self, now_s: float) -> None:
        log = self._log
        if log.configuration.joint:
            self._configure(log.configuration.end(), now_s)
            return
        for progress in self.progress.values():
            if progress.leaving and progress.leave_s == math.inf:
                progress.leave_s = now_s + self._tunables.election_timeout_s
        if not log.configuration.is_voter(self._name):
            self._resign()

    def _resign(self) -> None:
        """This change removed the leader itself: the one who is furthest goes on at once."""
        successor = self._furthest(self._log.configuration.voters)
        for name, progress in self.progress.items():
            self._send(name, Heartbeat(self._term, min(progress.match, self._log.committed)))
        self._send(successor, TimeoutNow(self._term))
        self.over = True

    def _furthest(self, names: Sequence[str]) -> str:
        """The first of those who hold most."""
        return max(names, key=lambda name: self.progress[name].match)

    # what others say

    def heard(self, source: str, now_s: float) -> Progress | None:
        """Who says something lives; None: it is nobody whom this leader sends to."""
        progress = self.progress.get(source)
        if progress is not None:
            progress.heard_s = now_s
        return progress

    def on_append_reply(self, progress: Progress, message: AppendReply, now_s: float) -> None:
        assert message.match <= self._log.last.index, f"{message.match} of {self._log.last.index} acknowledged"
        if progress.accepted(message.match, now_s):
            self.advance(now_s)
            self._hand_over()

    def on_append_reject(self, progress: Progress, message: AppendReject) -> None:
        hint = message.hint
        # Below the start there is nothing to compare with: a snapshot is due.
        meeting = hint if hint.index < self._log.start.index else self._log.last_not_above(hint)
        progress.rejected(message.rejected, meeting.index + 1)

    def on_heartbeat_reply(self, progress: Progress, message: HeartbeatReply) -> None:
        progress.round = max(progress.round, message.round)
        if progress.probe_lost(message.round):
            progress.probe_again()
        self._confirm_reads()
        if self._quiet_round is not None and message.quiet and message.round >= self._quiet_round:
            progress.quiet = True
            if all(other.quiet for other in self.progress.values()):
                self.quiet = True

    def on_chunk_reply(self, progress: Progress, message: ChunkReply) -> None:
        transfer = progress.transfer
        if transfer is None or transfer.identity != message.snapshot:
            return
        if message.wanted == transfer.number + 1 and transfer.data is not None:
            transfer.advance()
        elif message.wanted < transfer.number:
            # It lost what it had, and what was sent before is not kept here: another snapshot, from its start.
            progress.probe_again()

    # sending

    def flush(self, now_s: float) -> None:
        """Send what there is to send; everything that came since the last call shares messages."""
        if self.over:
            return
        if not self.quiet:
            append: Append | None = None
            for name, progress in self.progress.items():
                append = self._replicate(name, progress, append, now_s)
        if self._new_reads and self.settled and not self._reads:
            self._round += 1
            self._attach_reads()
            for name, progress in self.progress.items():
                if self._log.configuration.is_voter(name):
                    self._send_heartbeat(name, progress, self._round, quiet=self._quiet_round is not None)
            self._confirm_reads()

    def _attach_reads(self) -> None:
        """They are answered when the round that is being sent is."""
        self._reads.append((self._round, self._log.committed, self._new_reads))
        self._new_reads = []

    def _replicate(self, name: str, progress: Progress, latest: Append | None, now_s: float) -> Append | None:
        """``latest``: the last append to the one before, which may serve here too; returns the last one to this one."""
        log, tunables = self._log, self._tunables
        while progress.next <= log.last.index and progress.may_send(tunables):
            if progress.next <= log.start.index:
                self._begin_snapshot(progress, now_s)
                break
            if latest is None or latest.previous.index != progress.next - 1:
                latest = self._append_from(progress.next)
            self._send(name, latest)
            last = latest.entries[-1].index
            progress.sent(last, size_of(latest.entries), self._round, now_s)
            progress.told = min(log.committed, last)
        if progress.transfer is not None and progress.transfer.sent_s == -math.inf:
            self._send_chunk(name, progress.transfer, now_s)
        elif progress.leaving and progress.told < min(progress.match, log.committed):
            self._send_heartbeat(name, progress, 0)
        return latest

    def _append_from(self, index: int) -> Append:
        log, tunables = self._log, self._tunables
        term = log.term(index - 1)
        assert term is not None
        entries = log.slice(index, log.last.index, tunables.append_size_bytes_max, tunables.append_entries_max)
        return Append(self._term, Point(index - 1, term), tuple(entries), log.committed)

    def _begin_snapshot(self, progress: Progress, now_s: float) -> None:
        if now_s < progress.snapshot_s + self._tunables.retry_s:
            return
        progress.snapshot_s = now_s
        snapshot = self._storage.snapshot()
        if snapshot is not None:
            assert snapshot.point.index >= self._log.start.index, f"{snapshot.point} is before {self._log.start}"
            self._snapshots += 1
            progress.send_snapshot(Transfer(self._snapshots, snapshot))

    def _send_chunk(self, name: str, transfer: Transfer, now_s: float) -> None:
        data, snapshot = transfer.data, transfer.snapshot
        assert data is None or len(data) <= CHUNK_SIZE_BYTES_MAX, f"a chunk of {len(data)} bytes"
        point, configuration = snapshot.point, snapshot.configuration
        done = data is None
        chunk = Chunk(
            self._term, transfer.identity, point, configuration, transfer.number, b"" if data is None else data, done
        )
        self._send(name, chunk)
        transfer.sent_s = now_s

    def _send_heartbeat(self, name: str, progress: Progress, number: int, *, quiet: bool = False) -> None:
        progress.told = min(progress.match, self._log.committed)
        self._send(name, Heartbeat(self._term, progress.told, number, quiet))

    def _hand_over(self) -> None:
        """Tell the successor to stand, once it has everything."""
        progress = self.progress.get(self._transfer_to or "")
        if progress is not None and progress.match == self._log.last.index:
            assert self._transfer_to is not None
            self._send(self._transfer_to, TimeoutNow(self._term))

    def _confirm_reads(self) -> None:
        rounds = {name: progress.round for name, progress in self.progress.items()}
        rounds[self._name] = self._round
        confirmed = self._log.configuration.reached(rounds)
        while self._reads and self._reads[0][0] <= confirmed:
            _, index, readers = self._reads.popleft()
            self._answer(readers, index)

    def _answer(self, readers: Sequence[Reader], index: int) -> None:
        for source, number in readers:
            if source is None:
                self._confirmed.append((number, index))
                continue
            progress = self.progress.get(source)
            if progress is not None and progress.told < min(progress.match, index):
                self._send_heartbeat(source, progress, 0)
            self._send(source, ReadReply(self._term, number, index))

    def take_confirmed(self) -> list[tuple[int, int]]:
        """The local reads that have an index: (context, index)."""
        confirmed, self._confirmed = self._confirmed, []
        return confirmed

    def give_up(self) -> list[int]:
        """The leadership ends: the contexts of the local reads that fail; the other readers are told."""
        waiting = [*self._new_reads, *(reader for _, _, readers in self._reads for reader in readers)]
        for source, number in waiting:
            if source is not None:
                self._send(source, ReadReply(self._term, number, None))
        return [number for source, number in waiting if source is None]

    # time

    def touch(self, now_s: float) -> None:
        """There is something to do: not quiet, for a while."""
        self._active_s = now_s
        if self._quiet_round is None and not self.quiet:
            return
        self._quiet_round = None
        for progress in self.progress.values():
            progress.quiet = False
            if self.quiet:
                progress.heard_s = now_s
        if self.quiet:
            self.quiet = False
            self._heartbeat_s = now_s

    def timeout(self, now_s: float) -> None:
        """Call it at ``deadline_s``."""
        if self.quiet:
            if not self._reading or now_s < self._heartbeat_s:
                return
            self.touch(now_s)
        if now_s >= self._transfer_until_s:
            self._transfer_to, self._transfer_until_s = None, math.inf
        if now_s >= self._heartbeat_s:
            self._heartbeat(now_s)

    def _plan_heartbeat(self, now_s: float) -> None:
        step_s = self._tunables.heartbeat_s
        self._heartbeat_s = (math.floor(now_s / step_s + 1e-6) + 1) * step_s

    def _heartbeat(self, now_s: float) -> None:
        self._plan_heartbeat(now_s)
        self._drop_leaving(now_s)
        if not self._has_quorum(now_s):
            self.over = True
            return
        self._round += 1
        if self._new_reads and self.settled:
            self._attach_reads()
        idle = self._idle(now_s)
        if not idle:
            self._quiet_round = None
        elif self._quiet_round is None:
            self._quiet_round = self._round
        for name, progress in self.progress.items():
            progress.quiet = progress.quiet and idle
            transfer = progress.transfer
            if transfer is not None and now_s >= transfer.sent_s + self._tunables.retry_s:
                transfer.sent_s = -math.inf
            elif progress.overdue(now_s, self._tunables):
                progress.probe_again()
            self._send_heartbeat(name, progress, self._round, quiet=idle)
        self._confirm_reads()  # nobody answers a leader that is alone
        self._hand_over()
        self.quiet = idle and not self.progress

    def _drop_leaving(self, now_s: float) -> None:
        dismissed = self._log.configuration_index
        for name, progress in list(self.progress.items()):
            told = min(progress.match, progress.told) >= dismissed
            if progress.leaving and (told or now_s >= progress.leave_s):
                del self.progress[name]

    def forget(self, name: str) -> None:
        """One that is no member knows that it is none."""
        self.progress.pop(name, None)

    def _has_quorum(self, now_s: float) -> bool:
        since_s = now_s - self._tunables.election_timeout_s
        heard = {name: progress.heard_s > since_s for name, progress in self.progress.items()}
        heard[self._name] = True
        return self._log.configuration.won(heard)

    def _idle(self, now_s: float) -> bool:
        log, since_s = self._log, now_s - self._tunables.election_timeout_s
        return (
            now_s >= self._active_s + self._tunables.quiet_after_s
            and log.committed == log.last.index == log.durable
            and not log.configuration.joint
            and not (self._reading or self._transfer_to)
            and all(
                progress.match == log.last.index and progress.heard_s > since_s and not progress.leaving
                for progress in self.progress.values()
            )
        )

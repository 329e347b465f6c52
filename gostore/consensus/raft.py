"""Raft: the replicas of one group agree on one log, as long as a majority lives. Pure.

Theory of operation
===================
Ongaro, Ousterhout: "In Search of an Understandable Consensus Algorithm" (USENIX ATC 2014), and Ongaro's thesis
"Consensus: Bridging Theory and Practice" (2014). The shape of the core is that of etcd's raft: inputs change the state
and note what is to be done; :meth:`Raft.ready` hands the work out; nothing is awaited.

*Terms and votes* are here, with the follower's side of everything; what a leader does is in :mod:`.leader`. A replica
that hears nothing for its time-out first asks whether it would win (*pre-vote*, thesis 9.6), and only then raises its
term, so that one that was cut off does not depose anybody when it comes back. Whoever heard of a leader within an
election time-out grants nothing (*stickiness*, thesis 4.2.3), unless the leader itself has handed over, or asks.

*The log of a follower* (5.3). What does not fit is rejected with a hint by which the leader steps back by whole terms.
What contradicts a committed entry can only come from a bug or a lost disk: it raises ``Corrupt``.

*A snapshot* (7) comes in chunks, one at a time. It voids the log when the last chunk is there and stands for all of it.

*Persist before send*: see :class:`.ready.Ready`. A candidate counts its own vote, and a leader its own log, when the
driver has said that they are on the medium.

*Membership*: see :mod:`.configuration`. *Going quiet*: see :mod:`.leader`. A quiet follower keeps its leader and has no
timer; any message of the leader starts it again. Another member that asks for a vote is refused once, and starts it
too; and so does :meth:`Raft.wake`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from gostore.consensus.configuration import Configuration
from gostore.consensus.leader import Leadership
from gostore.consensus.log import RaftLog
from gostore.consensus.messages import (
    Append,
    AppendReject,
    AppendReply,
    Chunk,
    ChunkReply,
    Heartbeat,
    HeartbeatReply,
    Message,
    Point,
    ReadReply,
    ReadRequest,
    Stale,
    TimeoutNow,
    Vote,
    VoteReply,
)
from gostore.consensus.outbox import Outbox
from gostore.consensus.questions import Questions
from gostore.consensus.ready import (
    CANDIDATE,
    FOLLOWER,
    LEADER,
    PRECANDIDATE,
    HardState,
    Ready,
    Restored,
    Status,
    Storage,
)
from gostore.consensus.tunables import Tunables
from gostore.core.errors import Corrupt, NotOwner, Unavailable
from gostore.core.ports import Rng


class Raft:
    """One replica of one group. ``now_s``: any monotonic time in seconds, the same for all calls of a node.

    After any call there may be work: call :meth:`ready` until it returns None. Call :meth:`timeout` at
    :attr:`deadline_s`, which may have changed too.
    """

    def __init__(
        self, name: str, restored: Restored, storage: Storage, tunables: Tunables, rng: Rng, now_s: float
    ) -> None:
        self.name = name
        self.log = RaftLog(restored, storage, tunables)
        self._storage = storage
        self._tunables = tunables
        self._rng = rng
        self.term = restored.hard_state.term
        self.role = FOLLOWER
        self.leader: str | None = None
        self.quiet = False
        self._vote = restored.hard_state.vote
        self._votes: dict[str, bool] = {}
        self._leading: Leadership | None = None
        self._contact_s = -math.inf
        self._told = (0, 0)  # (term, index): of its log, as far as the leader of that term has told
        self._contradicted_s = math.inf  # since then the leader says that this log is longer than it is
        self._incoming: tuple[tuple[str, int, int], int] | None = None  # identity of a snapshot, next chunk
        self.log.commit(min(max(restored.hard_state.commit, self.log.start.index), self.log.last.index))
        hard = HardState(self.term, self._vote, self.log.committed)
        self._out = Outbox(hard, self.status)
        self._send, self._send_synced = self._out.send, self._out.send_synced
        self._questions = Questions(tunables.reads_max, tunables.election_timeout_s, rng)
        self._patience_s = self._election_s = math.inf
        self._draw_patience()
        self._arm(now_s)

    # what there is

    @property
    def status(self) -> Status:
        return Status(self.role, self.term, self.leader)

    @property
    def configuration(self) -> Configuration:
        """In force at this replica: the latest in its log, committed or not."""
        return self.log.configuration

    def configuration_at(self, index: int) -> Configuration:
        """In force after the entry ``index``: what belongs into a snapshot there."""
        return self.log.configuration_at(index)

    @property
    def deadline_s(self) -> float:
        """When :meth:`timeout` is to be called; infinity: not needed."""
        own_s = self._election_s if self._leading is None else self._leading.deadline_s
        return min(own_s, self._questions.deadline_s)

    @property
    def lags(self) -> bool:
        """The leader is known to have more than this replica, in which the next configuration may be."""
        return self._told[1] > self.log.last.index

    @property
    def asleep(self) -> bool:
        """The group is quiet, as far as this replica knows."""
        return self.quiet if self._leading is None else self._leading.quiet

    def statistics(self) -> dict[str, Any]:
        """For views: role, term, leader, positions, members; of a leader also what it knows of each follower."""
        configuration, leading = self.configuration, self._leading
        return {
            "role": self.role,
            "term": self.term,
            "leader": self.leader,
            "quiet": self.asleep,
            "start": self.log.start.index,
            "applied": self.log.applied,
            "committed": self.log.committed,
            "last": self.log.last.index,
            "voters": list(configuration.voters),
            "learners": list(configuration.learners),
            "outgoing": list(configuration.outgoing),
            "followers": {}
            if leading is None
            else {name: progress.statistics() for name, progress in leading.progress.items()},
        }

    # what is asked of the group

    def propose(self, payloads: Sequence[bytes], now_s: float) -> Point:
        """Append commands, all or none; returns the point of the first one, the others follow it.

        They are committed when the entry with that index *and term* is handed out as such; if another term stands at
        that index, they are lost. Raises ``NotOwner`` (``details["owner"]``: the leader, if known), ``Unavailable``
        (the lead is being handed over, or too much is not committed) and ``TooLarge``, all definite.
        """
        assert payloads
        return self._lead().propose(payloads, now_s)

    def change(self, voters: Sequence[str], learners: Sequence[str], now_s: float) -> Point:
        """Begin to change the members to these; returns the point of the first entry.

        A new voter must be a learner that has caught up. The change is complete when a configuration without
        ``outgoing`` is committed. A leader that removes itself leads until then, and hands over to the one who is
        furthest. Raises ``NotOwner``; ``Unavailable``: another change is not complete, the leader is too new, or a
        learner has not caught up; ``BadRequest``: not a configuration. All are definite.
        """
        return self._lead().change(tuple(voters), tuple(learners), now_s)

    def caught_up(self, name: str) -> bool:
        """Whether a learner may become a voter; false when this replica does not lead."""
        return self._leading is not None and self._leading.caught_up(name)

    def transfer(self, to: str | None, now_s: float) -> str:
        """Hand the lead over to a voter (None: to the one who is furthest); returns its name.

        Until it has stood, or for an election time-out at most, proposals are refused. Raises ``NotOwner``,
        ``Unavailable`` (it is being handed over already), ``BadRequest`` (it cannot lead); all definite.
        """
        return self._lead().transfer(to, now_s)

    def read(self, context: int, now_s: float) -> None:
        """Ask for a moment at which a linearizable read may be answered from this replica's state machine.

        A :class:`ReadState` with this context follows, at a follower too, when that moment is there, or when it fails.
        A context must not be used again before its answer. Raises ``NotOwner`` when no leader is known and
        ``Unavailable`` when too many reads wait; both definite.
        """
        if self._questions.full:
            taken = False
        elif self._leading is not None:
            taken = self._leading.read((None, context), now_s)
        elif self.leader is not None:
            taken = self._questions.add(context)
        else:
            raise NotOwner(f"{self.name} knows of no leader: try again later, or elsewhere", owner=None)
        if not taken:
            raise Unavailable(f"{self._tunables.reads_max} reads wait for their index: try again later")

    def campaign(self, now_s: float) -> bool:
        """Stand without waiting for a time-out: for the first on the preference list of a fresh or orphaned group.

        Whoever still hears of a leader refuses. Returns false when this replica leads, or has no vote.
        """
        if self._leading is not None or not self.log.may_stand(self.name):
            return False
        if self.role != CANDIDATE:
            self._stand(now_s)
        return True

    def wake(self, now_s: float, *, leader_suspected: bool = False) -> None:
        """Start the timers of a quiet replica. ``leader_suspected``: do not protect the leader any more."""
        if self._leading is not None:
            self._leading.touch(now_s)
            return
        if leader_suspected:
            self._contact_s = -math.inf
        elif self.quiet:
            self._contact_s = now_s
        if self.quiet:
            self.quiet = False
            self._arm(now_s)

    def compact(self, index: int) -> None:
        """A snapshot of the state after entry ``index`` (applied) is on the medium: older entries are not asked for."""
        self.log.compact(index)

    def _lead(self) -> Leadership:
        if self._leading is None:
            known = f"{self.leader} is" if self.leader else "nobody is known to be"
            raise NotOwner(f"{self.name} does not lead the group: {known} the leader", owner=self.leader)
        return self._leading

    # work for the driver

    def ready(self, now_s: float) -> Ready | None:
        """The work that there is now; None: nothing. See :class:`Ready` for what to do with it."""
        if self._leading is not None:
            self._leading.flush(now_s)
            self._questions.confirm(self._leading.take_confirmed())
        elif (number := self._questions.ask(now_s)) is not None:
            assert self.leader is not None
            self._send(self.leader, ReadRequest(self.term, number))
        ready = self._out.ready(self.log, self.role, self.term, self.leader, self._vote, self._questions)
        self.log.trim()
        return ready

    def persisted(self, number: int, now_s: float) -> None:
        """All that was handed out up to Ready ``number`` is on the medium."""
        if not self._out.persisted(number):
            return
        self.log.persisted(number)
        if self._leading is not None:
            self._leading.advance(now_s)
            self._settle(now_s)
        elif self.role == CANDIDATE and self._out.holds(self.term, self.name):
            self._count(self.name, True, now_s)

    # time

    def timeout(self, now_s: float) -> None:
        """Whatever is due; an early call does nothing."""
        self._questions.expire(now_s)
        if self._leading is not None:
            self._leading.timeout(now_s)
            self._settle(now_s)
        elif now_s >= self._election_s:
            if self.log.may_stand(self.name):
                self._stand(now_s)
            else:
                self._election_s = math.inf

    def _draw_patience(self) -> None:
        self._patience_s = self._tunables.election_timeout_s * (1.0 + self._rng.random())

    def _arm(self, now_s: float) -> None:
        stands = self.log.may_stand(self.name) and not self.quiet
        self._election_s = now_s + self._patience_s if stands else math.inf

    # terms and elections

    def _follow(self, term: int, leader: str | None, now_s: float) -> None:
        """Be a follower in ``term``."""
        assert term >= self.term
        if self._leading is not None:
            self._questions.confirm(self._leading.take_confirmed())
            self._questions.fail(self._leading.give_up())
            self._leading = None
        if term > self.term:
            self.term, self._vote = term, None
            self._incoming = None
        self._questions.forget()
        changed = self.role != FOLLOWER
        self.role, self.leader, self.quiet = FOLLOWER, leader, False
        if changed:
            self._draw_patience()
            self._arm(now_s)
        elif self._election_s == math.inf:
            self._arm(now_s)

    def _settle(self, now_s: float) -> None:
        if self._leading is not None and self._leading.over:
            self._follow(self.term, None, now_s)

    def _stand(self, now_s: float, *, transfer: bool = False) -> None:
        """Ask who would vote for this replica; with the leader's blessing, ask for the vote at once."""
        self._questions.forget()
        self.leader, self.quiet, self._votes = None, False, {}
        if transfer:
            self._run(now_s, transfer=True)
            return
        self._draw_patience()
        self._arm(now_s)
        self.role = PRECANDIDATE
        self._solicit(Vote(self.term + 1, self.log.last, pre=True), self._out.messages)
        self._count(self.name, True, now_s)

    def _run(self, now_s: float, *, transfer: bool = False) -> None:
        """A real candidate; its own vote counts when it is on the medium."""
        self.term, self._vote = self.term + 1, self.name
        self.role, self._votes, self._incoming = CANDIDATE, {}, None
        self._draw_patience()
        self._arm(now_s)
        self._solicit(Vote(self.term, self.log.last, transfer=transfer), self._out.messages_synced)

    def _solicit(self, vote: Vote, messages: list[tuple[str, Message]]) -> None:
        voters = filter(self.configuration.is_voter, self.configuration.members)
        messages.extend((name, vote) for name in voters if name != self.name)

    def _count(self, name: str, granted: bool, now_s: float) -> None:
        self._votes[name] = granted
        if self.configuration.won(self._votes):
            if self.role == PRECANDIDATE:
                self._run(now_s)
            else:
                self._win(now_s)
        elif self.configuration.lost(self._votes):
            self._follow(self.term, None, now_s)

    def _win(self, now_s: float) -> None:
        assert self.role == CANDIDATE
        self.role, self.leader = LEADER, self.name
        self._election_s = math.inf
        self._leading = Leadership(self.name, self.term, self.log, self._storage, self._tunables, self._send, now_s)

    # messages

    def receive(self, source: str, message: Message, now_s: float) -> None:
        """A message of another replica of this group, member or not.

        Old, doubled and reordered ones do no harm. Raises ``Corrupt``, with the log unchanged, for one that a correct
        group cannot produce: two leaders in one term, another entry where one is committed, or, for an election
        time-out, the commit of what this replica does not have. A log was lost or damaged then: stop this replica.
        """
        if isinstance(message, Vote):
            self._on_vote(source, message, now_s)
            return
        if isinstance(message, Stale) and source not in self.configuration.members:
            # One that was removed and has forgotten its log counts terms of its own: it deposes nobody.
            if self._leading is not None:
                self._leading.forget(source)
            return
        if message.term > self.term:
            # A granted pre-vote speaks of the term that would be.
            if not (isinstance(message, VoteReply) and message.pre and message.granted):
                # It asks for a term that had begun elsewhere, or leads one that is over. Who asks at once for the next
                # one spares the group a time-out; if somebody leads already, he is refused.
                again = isinstance(message, VoteReply) and message.pre and self.role == PRECANDIDATE
                again = again or (isinstance(message, Stale) and self.role == LEADER)
                self._follow(message.term, None, now_s)
                if again and self.log.may_stand(self.name):
                    self._stand(now_s)
                    return
        elif message.term < self.term:
            # A leader of an old term must learn that it is one; this is also what frees a candidate that ran alone.
            if isinstance(message, Append | Heartbeat | Chunk):
                self._send_synced(source, Stale(self.term))
            return
        if self._leading is not None:
            self._to_leader(source, message, now_s)
        else:
            handler = self._HANDLERS.get(type(message))
            if handler is not None:
                handler(self, source, message, now_s)

    def _to_leader(self, source: str, message: Message, now_s: float) -> None:
        leading = self._leading
        assert leading is not None
        if isinstance(message, Append | Heartbeat | Chunk | TimeoutNow):
            raise Corrupt(f"{source} leads term {self.term} too, which {self.name} leads: a vote was forgotten")
        progress = leading.heard(source, now_s)
        if isinstance(message, ReadRequest):
            if not leading.read((source, message.number), now_s):
                self._send(source, ReadReply(self.term, message.number, None))
        elif progress is None:
            return
        elif isinstance(message, AppendReply):
            leading.on_append_reply(progress, message, now_s)
        elif isinstance(message, AppendReject):
            leading.on_append_reject(progress, message)
        elif isinstance(message, HeartbeatReply):
            leading.on_heartbeat_reply(progress, message)
        elif isinstance(message, ChunkReply):
            leading.on_chunk_reply(progress, message)
        self._settle(now_s)

    def _on_vote(self, source: str, vote: Vote, now_s: float) -> None:
        if source == self.leader and vote.term > self.term:
            self._follow(self.term, None, now_s)  # it has lost the lead, and says so
        if not vote.transfer and self._protects_leader(now_s):
            self._send(source, VoteReply(self.term, False, vote.pre))
            if source in self.configuration.members:
                # It may be right that the leader is gone. One who was removed is not listened to.
                self.wake(now_s)
            return
        up_to_date = (vote.last.term, vote.last.index) >= (self.log.last.term, self.log.last.index)
        if vote.pre:
            granted = vote.term > self.term and up_to_date
            self._send(source, VoteReply(vote.term if granted else self.term, granted, pre=True))
            return
        if vote.term > self.term:
            self._follow(vote.term, None, now_s)
        granted = vote.term == self.term and self._vote in (None, source) and up_to_date
        if granted:
            self._vote = source
            self._arm(now_s)
        self._send_synced(source, VoteReply(self.term, granted))

    def _protects_leader(self, now_s: float) -> bool:
        if self._leading is not None:
            return True
        lease_s = self._contact_s + self._tunables.election_timeout_s
        return self.leader is not None and (self.quiet or now_s < lease_s)

    def _on_vote_reply(self, source: str, reply: VoteReply, now_s: float) -> None:
        if reply.pre:
            expected = self.role == PRECANDIDATE and reply.term == self.term + int(reply.granted)
        else:
            expected = self.role == CANDIDATE
        if expected and self.configuration.is_voter(source):
            self._count(source, reply.granted, now_s)

    def _heard_leader(self, source: str, now_s: float) -> None:
        """A message that only the leader of this term sends. Raises ``Corrupt`` when another one does."""
        if self.leader is not None and self.leader != source:
            raise Corrupt(f"{self.leader} and {source} both lead term {self.term}: a vote was forgotten")
        if self.role != FOLLOWER or self.leader is None:
            self._follow(self.term, source, now_s)
        self.quiet = False
        self._contact_s = now_s
        self._arm(now_s)

    def _on_append(self, source: str, message: Append, now_s: float) -> None:
        self._heard_leader(source, now_s)
        log, previous = self.log, message.previous
        self._told = max(self._told, (self.term, max(previous.index + len(message.entries), message.commit)))
        if previous.index <= log.committed:
            self._check_committed(source, message)
        if previous.index < log.committed:
            self._send_synced(source, AppendReply(self.term, log.committed))
            return
        if not log.holds(previous):
            hint = log.last_not_above(previous)
            self._send_synced(source, AppendReject(self.term, previous.index, hint))
            return
        for place, entry in enumerate(message.entries):
            if log.term(entry.index) != entry.term:
                if entry.index <= log.last.index:
                    log.truncate(entry.index)
                log.append(message.entries[place:])
                break
        match = previous.index + len(message.entries)
        log.commit(min(message.commit, match))
        self._send_synced(source, AppendReply(self.term, match))
        self._arm(now_s)

    def _check_committed(self, source: str, message: Append) -> None:
        """Raises ``Corrupt`` when it says something else of what is committed here."""
        committed, previous = self.log.committed, message.previous
        old = message.entries[: committed - previous.index]
        for index, term in (previous, *((entry.index, entry.term) for entry in old)):
            known = self.log.term(index)
            if known not in (None, term):
                raise Corrupt(
                    f"{source} has term {term} at index {index}, where {self.name} has committed an entry of term "
                    f"{known}: a log was lost"
                )

    def _on_heartbeat(self, source: str, message: Heartbeat, now_s: float) -> None:
        self._check_acknowledged(source, message, now_s)
        self._heard_leader(source, now_s)
        if message.commit <= self.log.last.index:
            self.log.commit(message.commit)
        if message.quiet and message.commit == self.log.last.index:
            self.quiet = True
            self._arm(now_s)
        if message.round:
            self._send_synced(source, HeartbeatReply(self.term, message.round, self.quiet))

    def _check_acknowledged(self, source: str, message: Heartbeat, now_s: float) -> None:
        """Raises ``Corrupt`` when the leader insists that this replica has acknowledged what it does not have.

        Once is not enough: it may be an old message to a replica that was removed and added again.
        """
        last = self.log.last.index
        if message.commit <= last:
            self._contradicted_s = math.inf
        elif now_s >= self._contradicted_s + self._tunables.election_timeout_s:
            raise Corrupt(
                f"{source} says that {self.name} has acknowledged entry {message.commit}, but its log ends at {last}: "
                "it was lost"
            )
        else:
            self._contradicted_s = min(self._contradicted_s, now_s)

    def _on_chunk(self, source: str, chunk: Chunk, now_s: float) -> None:
        self._heard_leader(source, now_s)
        log = self.log
        if chunk.point.index <= log.committed or log.holds(chunk.point):
            log.commit(chunk.point.index)
            self._incoming = None
            self._send_synced(source, AppendReply(self.term, log.committed))
            return
        identity = (source, self.term, chunk.snapshot)
        if self._incoming is None or self._incoming[0] != identity:
            self._incoming = (identity, 0)
        wanted = self._incoming[1]
        if chunk.number == wanted:
            wanted += 1
            self._out.chunks.append(chunk)
            self._incoming = (identity, wanted)
            if chunk.done:
                log.install(chunk.point, chunk.configuration)
                self._incoming = None
                self._send_synced(source, AppendReply(self.term, chunk.point.index))
                self._arm(now_s)
                return
        self._send_synced(source, ChunkReply(self.term, chunk.snapshot, wanted))

    def _on_timeout_now(self, source: str, message: TimeoutNow, now_s: float) -> None:
        if self.role == FOLLOWER and self.log.may_stand(self.name):
            self._stand(now_s, transfer=True)

    # reads of a follower

    def _on_read_request(self, source: str, message: ReadRequest, now_s: float) -> None:
        self._send(source, ReadReply(self.term, message.number, None))

    def _on_read_reply(self, source: str, message: ReadReply, now_s: float) -> None:
        self._questions.answered(message.number, message.index)

    _HANDLERS: Final[dict[type, Callable[[Raft, str, Any, float], None]]] = {
        VoteReply: _on_vote_reply,
        Append: _on_append,
        Heartbeat: _on_heartbeat,
        Chunk: _on_chunk,
        TimeoutNow: _on_timeout_now,
        ReadRequest: _on_read_request,
        ReadReply: _on_read_reply,
    }

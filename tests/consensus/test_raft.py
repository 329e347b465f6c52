"""One core by itself: what it answers to single messages, and what it refuses."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from gostore.consensus import (
    CANDIDATE,
    COMMAND,
    CONFIGURATION,
    FOLLOWER,
    LEADER,
    NOOP,
    ORIGIN,
    PRECANDIDATE,
    PROFILES,
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
    Append,
    AppendReject,
    AppendReply,
    Chunk,
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
from gostore.consensus.outbox import COMMIT_HINT_ENTRIES
from gostore.core.errors import BadRequest, Corrupt, NotOwner, TooLarge, Unavailable

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


# votes


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize(
    ("last", "granted"),
    [
        (Point(3, 2), True),
        (Point(4, 2), True),
        (Point(1, 3), True),  # a newer last term beats a longer log
        (Point(2, 2), False),
        (Point(9, 1), False),  # and an older one does not
    ],
)
def test_a_vote_goes_only_to_a_log_that_is_as_new(pre: bool, last: Point, granted: bool) -> None:
    bench = Bench([1, 1, 2], term=4)
    reply = bench.answer("n2", Vote(5, last, pre))
    assert reply == VoteReply(4 if pre and not granted else 5, granted, pre)
    assert bench.raft.term == (4 if pre else 5)
    assert bool(bench.hard and bench.hard[-1].vote == "n2") == (granted and not pre)


def test_one_vote_in_a_term_which_is_not_forgotten() -> None:
    bench = Bench(term=3)
    assert bench.answer("n2", Vote(5, ORIGIN)) == VoteReply(5, True)
    assert bench.answer("n3", Vote(5, ORIGIN)) == VoteReply(5, False)
    assert bench.answer("n2", Vote(5, ORIGIN)) == VoteReply(5, True)
    assert bench.hard == [HardState(5, "n2", 0)]
    again = Bench(term=5, vote="n2")
    assert again.answer("n3", Vote(5, ORIGIN)) == VoteReply(5, False)
    assert again.answer("n3", Vote(6, ORIGIN)) == VoteReply(6, True)
    assert again.answer("n3", Vote(4, ORIGIN)) == VoteReply(6, False)


def test_a_vote_is_sent_when_it_is_on_the_medium() -> None:
    bench = Bench()
    assert bench.receive("n2", Vote(1, ORIGIN), sync=False) == []
    assert bench.sync() == [("n2", VoteReply(1, True))]


def test_a_candidate_asks_and_counts_itself_when_its_vote_is_on_the_medium() -> None:
    bench = Bench()
    bench.raft.campaign(NOW)
    bench.take()
    assert bench.receive("n2", VoteReply(1, True, pre=True), sync=False) == []
    assert bench.raft.role == CANDIDATE
    assert kinds(bench.sync(), Vote) == [("n2", Vote(1, ORIGIN)), ("n3", Vote(1, ORIGIN))]
    bench.receive("n2", VoteReply(1, True))
    assert bench.raft.role == LEADER


def test_one_alone_leads_when_its_vote_is_on_the_medium() -> None:
    bench = Bench(configuration=Configuration(("n1",)))
    bench.raft.campaign(NOW)
    bench.take(sync=False)
    assert bench.raft.role == CANDIDATE
    bench.sync()
    assert bench.raft.role == LEADER
    bench.take(sync=False)
    assert bench.applied == []
    bench.sync()
    bench.take()
    assert [entry.kind for entry in bench.applied] == [NOOP]


def test_only_voters_are_counted() -> None:
    bench = Bench(configuration=Configuration(("n1", "n2", "n3"), ("n4",)))
    bench.raft.campaign(NOW)
    assert [to for to, _ in bench.take()] == ["n2", "n3"]
    bench.receive("n4", VoteReply(1, True, pre=True))
    assert bench.raft.role == PRECANDIDATE


def test_a_learner_does_not_stand() -> None:
    bench = Bench(configuration=Configuration(("n2",), ("n1",)))
    assert not bench.raft.campaign(NOW)
    assert bench.raft.deadline_s == float("inf")
    bench.receive("n2", Append(1, ORIGIN, (), 0))
    bench.receive("n2", TimeoutNow(1))
    assert bench.raft.role == FOLLOWER


def test_who_hears_a_leader_grants_nothing_for_an_election_timeout() -> None:
    bench = Bench()
    bench.receive("n2", Append(1, ORIGIN, (), 0))
    bench.now_s = NOW + 0.99
    assert bench.answer("n3", Vote(2, Point(9, 1), pre=True)) == VoteReply(1, False, pre=True)
    assert bench.answer("n3", Vote(2, Point(9, 1))) == VoteReply(1, False)
    assert bench.raft.term == 1
    assert bench.answer("n3", Vote(2, Point(9, 1), transfer=True)) == VoteReply(2, True)
    other = Bench()
    other.receive("n2", Append(1, ORIGIN, (), 0))
    other.now_s = NOW + 1.0
    assert other.answer("n3", Vote(2, Point(9, 1), pre=True)) == VoteReply(2, True, pre=True)


def test_a_majority_of_refusals_ends_a_candidacy() -> None:
    bench = Bench(term=1)
    bench.raft.campaign(NOW)
    bench.take()
    bench.receive("n2", VoteReply(1, False, pre=True))
    assert bench.raft.role == PRECANDIDATE
    bench.receive("n3", VoteReply(1, False, pre=True))
    assert bench.raft.role == FOLLOWER


def test_who_asks_for_a_term_that_has_begun_asks_for_the_next_one_at_once() -> None:
    bench = Bench()
    bench.raft.campaign(NOW)
    bench.take()
    sent = bench.receive("n2", VoteReply(4, False, pre=True))
    assert kinds(sent, Vote) == [(to, Vote(5, ORIGIN, pre=True)) for to in ("n2", "n3")]
    assert (bench.raft.role, bench.raft.term) == (PRECANDIDATE, 4)
    # Once for each term that is news, and not for an answer to what was asked before.
    assert kinds(bench.receive("n3", VoteReply(4, False, pre=True)), Vote) == []
    assert kinds(bench.receive("n2", VoteReply(3, False, pre=True)), Vote) == []
    bench.receive("n2", VoteReply(4, False, pre=True))
    assert bench.raft.role == FOLLOWER
    # A candidate that learns of a later term has lost.
    candidate = Bench()
    candidate.raft.campaign(NOW)
    candidate.take()
    candidate.receive("n2", VoteReply(1, True, pre=True))
    assert candidate.raft.role == CANDIDATE
    candidate.receive("n3", VoteReply(7, False))
    assert (candidate.raft.role, candidate.raft.term) == (FOLLOWER, 7)


def test_an_election_timeout_is_drawn_between_one_and_two() -> None:
    deadlines = []
    for seed in range(50):
        raft = Raft("n1", Restored(configuration=THREE), Bench(), TUNABLES, random.Random(seed), NOW)
        deadlines.append(raft.deadline_s - NOW)
    assert 1.0 <= min(deadlines) < 1.2
    assert 1.8 < max(deadlines) < 2.0


# the log of a follower


def entry(term: int, index: int) -> Entry:
    return Entry(term, index, COMMAND, b"")


def test_what_fits_is_appended_and_acknowledged_when_it_is_synced() -> None:
    bench = Bench([1, 1], term=1)
    new = (entry(1, 3), entry(1, 4))
    assert bench.receive("n2", Append(1, Point(2, 1), new, 9), sync=False) == []
    assert bench.raft.log.committed == 4
    assert bench.sync() == [("n2", AppendReply(1, 4))]
    assert bench.log[2:] == list(new)


def test_a_commit_is_limited_to_what_is_known_to_fit() -> None:
    bench = Bench([1, 1, 1, 1], term=1)
    bench.receive("n2", Append(2, Point(2, 1), (), 4))
    assert bench.raft.log.committed == 2


def test_what_is_known_is_not_written_again_and_an_old_append_truncates_nothing() -> None:
    bench = Bench([1, 1, 1, 1], term=1)
    assert bench.answer("n2", Append(1, Point(1, 1), (entry(1, 2),), 0)) == AppendReply(1, 2)
    assert bench.raft.log.last == Point(4, 1)
    assert bench.numbers == [1]


def test_a_conflict_replaces_the_tail() -> None:
    bench = Bench([1, 1, 1, 1], term=1)
    assert bench.answer("n2", Append(3, Point(1, 1), (entry(1, 2), entry(3, 3)), 0)) == AppendReply(3, 3)
    assert [own.term for own in bench.log] == [1, 1, 3]
    assert bench.raft.log.last == Point(3, 3)


@pytest.mark.parametrize(
    ("previous", "hint"),
    [
        (Point(9, 5), Point(6, 4)),  # beyond the end
        (Point(9, 3), Point(4, 2)),  # beyond the end, in an older term: what is newer here cannot be there
        (Point(5, 5), Point(5, 4)),
        (Point(6, 3), Point(4, 2)),
    ],
)
def test_what_does_not_fit_is_refused_with_a_place_that_may(previous: Point, hint: Point) -> None:
    bench = Bench([1, 1, 2, 2, 4, 4], term=5)
    reply = bench.answer("n2", Append(5, previous, (entry(5, previous.index + 1),), 0))
    assert reply == AppendReject(5, previous.index, hint)
    assert len(bench.log) == 6


def test_a_leader_of_an_old_term_learns_it() -> None:
    bench = Bench([1], term=4)
    old: tuple[Message, ...] = (
        Append(3, Point(1, 1), (entry(3, 2),), 0),
        Heartbeat(3, 1, 1),
        Chunk(3, 1, Point(5, 2), THREE, 0, b"", True),
    )
    for message in old:
        assert bench.answer("n2", message) == Stale(4)
    assert bench.receive("n2", TimeoutNow(3)) == []
    assert bench.raft.log.last == Point(1, 1)
    assert bench.raft.role == FOLLOWER


def test_what_only_a_lost_log_explains_is_not_accepted() -> None:
    bench = Bench([1, 1, 1], term=1, commit=2)
    with pytest.raises(Corrupt, match="a log was lost"):
        bench.receive("n2", Append(2, ORIGIN, (entry(1, 1), entry(2, 2)), 0))
    with pytest.raises(Corrupt, match="a log was lost"):
        bench.receive("n2", Append(2, Point(2, 2), (), 0))
    with pytest.raises(Corrupt, match="both lead term 2"):
        bench.receive("n3", Append(2, ORIGIN, (), 0))
    assert bench.raft.log.last == Point(3, 1)
    leader = Bench()
    leader.lead()
    with pytest.raises(Corrupt, match="leads term 1 too"):
        leader.receive("n2", Heartbeat(1, 0, 1))


def test_a_leader_that_insists_on_more_than_there_is_reveals_a_lost_log() -> None:
    bench = Bench([1, 1, 1], term=1)
    assert bench.answer("n2", Heartbeat(1, 4, 1, quiet=True)) == HeartbeatReply(1, 1)
    assert bench.raft.log.committed == 0
    bench.now_s = NOW + 0.9
    bench.receive("n2", Heartbeat(1, 4, 2))
    bench.receive("n2", Heartbeat(1, 3, 3))  # so the other one was an old one
    bench.now_s = NOW + 1.0
    bench.receive("n2", Heartbeat(1, 4, 2))
    bench.now_s = NOW + 2.0
    with pytest.raises(Corrupt, match="log ends at 3: it was lost"):
        bench.receive("n2", Heartbeat(1, 4, 4))


def test_committed_entries_are_applied_once_and_again_after_a_restart() -> None:
    bench = Bench([1] * 6, term=1, commit=4, payload=b"12345", committed_size_bytes_max=10)
    bench.take()
    assert [own.index for own in bench.applied] == [1, 2, 3, 4]
    assert len(bench.numbers) == 2  # two at a time
    bench.receive("n2", Append(1, Point(6, 1), (), 6))
    assert [own.index for own in bench.applied] == [1, 2, 3, 4, 5, 6]
    assert bench.hard == []


def test_a_commit_hint_beyond_the_log_is_only_a_hint() -> None:
    assert Bench([1, 1], term=1, commit=7).raft.log.committed == 2


def test_the_commit_index_is_written_now_and_then() -> None:
    bench = Bench([1] * (COMMIT_HINT_ENTRIES + 1), term=1)
    bench.receive("n2", Append(1, Point(COMMIT_HINT_ENTRIES - 1, 1), (), COMMIT_HINT_ENTRIES - 1))
    assert bench.hard == []
    bench.receive("n2", Append(1, Point(COMMIT_HINT_ENTRIES, 1), (), COMMIT_HINT_ENTRIES))
    assert bench.hard == [HardState(1, None, COMMIT_HINT_ENTRIES)]


def test_old_entries_are_read_from_the_storage() -> None:
    bench = Bench([1] * 50, term=1, commit=50, cache_entries_max=4, append_entries_max=8)
    bench.take()
    assert bench.asked
    bench.asked = 0
    bench.lead()
    sent = bench.receive("n2", AppendReject(2, 50, Point(3, 1)))
    [(to, message)] = kinds(sent, Append)
    assert (to, message.previous) == ("n2", Point(3, 1))
    assert [own.index for own in message.entries] == list(range(4, 12))
    assert bench.asked == 1


# a leader


def test_an_entry_of_an_old_term_is_committed_by_one_of_this_term_only() -> None:
    """Figure 8 of the paper: a quorum holds it, and a later leader may replace it nevertheless."""
    bench = Bench([1, 2], term=3, append_entries_max=1)
    bench.lead()
    bench.receive("n2", AppendReply(4, 2))
    assert bench.raft.log.committed == 0
    bench.receive("n2", AppendReply(4, 3))
    assert bench.raft.log.committed == 3


def test_a_leader_sends_before_its_own_sync_and_counts_itself_after_it() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.propose([b"a"], NOW)
    assert [to for to, _ in kinds(bench.take(sync=False), Append)] == ["n2", "n3"]
    bench.receive("n2", AppendReply(1, 2), sync=False)
    assert bench.raft.log.committed == 1
    bench.sync()
    assert bench.raft.log.committed == 2


def test_a_sync_vouches_for_what_was_written_and_not_for_what_replaced_it() -> None:
    bench = Bench(configuration=Configuration(("n1", "n2", "n3")))
    bench.receive("n2", Append(1, ORIGIN, (entry(1, 1), entry(1, 2)), 0), sync=False)
    first = bench.numbers[-1]
    bench.receive("n3", Append(2, ORIGIN, (entry(2, 1), entry(2, 2)), 0), sync=False)
    bench.raft.persisted(first, NOW)
    assert bench.raft.log.durable == 0
    bench.raft.persisted(bench.numbers[-1], NOW)
    assert bench.raft.log.durable == 2


def test_proposals_are_bounded_and_refused_definitely() -> None:
    bench = Bench(uncommitted_size_bytes_max=10, entry_size_bytes_max=8)
    with pytest.raises(NotOwner) as not_leader:
        bench.raft.propose([b"x"], NOW)
    assert not_leader.value.details == {"owner": None}
    bench.lead()
    assert bench.raft.propose([b"12345", b"678"], NOW) == Point(2, 1)
    with pytest.raises(Unavailable, match="8 bytes wait") as full:
        bench.raft.propose([b"123"], NOW)
    assert full.value.definite
    with pytest.raises(TooLarge):
        bench.raft.propose([b"", b"123456789"], NOW)
    assert bench.raft.log.last.index == 3
    bench.take()
    bench.settle()
    assert bench.raft.propose([b"123"], NOW) == Point(4, 1)


def test_what_a_predecessor_left_counts_as_uncommitted() -> None:
    bench = Bench([1, 1], term=1, payload=b"123456", uncommitted_size_bytes_max=10)
    bench.lead()
    with pytest.raises(Unavailable, match="12 bytes wait"):
        bench.raft.propose([b"1"], NOW)
    bench.settle()
    bench.raft.propose([b"1"], NOW)


def test_the_window_of_a_follower_is_bounded_in_messages_and_bytes() -> None:
    bench = Bench(append_entries_max=1, inflight_messages_max=3, inflight_size_bytes_max=100)
    bench.lead()
    bench.settle()
    bench.raft.propose([b"1"] * 10, NOW)
    assert len(kinds(bench.take(), Append)) == 6
    assert len(kinds(bench.receive("n2", AppendReply(1, 3)), Append)) == 2
    wide = Bench(append_entries_max=1, inflight_messages_max=100, inflight_size_bytes_max=100)
    wide.lead()
    wide.settle()
    wide.raft.propose([b"1" * 40] * 10, NOW)
    assert len(kinds(wide.take(), Append)) == 6


def test_a_batch_is_bounded_and_a_large_entry_goes_alone() -> None:
    bench = Bench(append_size_bytes_max=10)
    bench.lead()
    bench.settle()
    bench.raft.propose([b"1" * 4, b"1" * 4, b"1" * 4, b"1" * 40, b"1"], NOW)
    sizes = [len(message.entries) for to, message in kinds(bench.take(), Append) if to == "n2"]
    assert sizes == [2, 1, 1, 1]


def test_old_answers_change_nothing() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.propose([b"a"], NOW)
    bench.take()
    progress = bench.raft.statistics()["followers"]
    old = (AppendReject(1, 0, ORIGIN), AppendReply(1, 1), AppendReply(1, 0), ChunkReply(1, 1, 0))
    for message in old:
        assert bench.receive("n2", message) == []
        assert bench.raft.statistics()["followers"] == progress
    assert bench.receive("n9", AppendReply(1, 2)) == []
    assert bench.raft.log.committed == 1


def test_a_hint_takes_the_leader_back_by_terms() -> None:
    bench = Bench([1, 1, 1, 4, 4, 4], term=4)
    bench.lead()
    sent = bench.receive("n2", AppendReject(5, 6, Point(6, 3)))
    assert [message.previous for _, message in kinds(sent, Append)] == [Point(3, 1)]


def test_lost_appends_are_sent_again() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.propose([b"a"], NOW)
    bench.take()
    assert kinds(bench.at(NOW + 0.25), Append) == []
    bench.receive("n2", AppendReply(1, 2))
    again = kinds(bench.at(NOW + 0.5), Append)
    assert [(to, message.previous) for to, message in again] == [("n3", Point(1, 1))]


def test_an_answer_to_a_later_heartbeat_shows_that_a_probe_was_lost() -> None:
    bench = Bench()
    assert len(kinds(bench.lead(), Append)) == 2
    [(_, beat), _] = kinds(bench.at(NOW + 0.25), Heartbeat)
    assert kinds(bench.receive("n2", HeartbeatReply(1, beat.round)), Append)
    assert not kinds(bench.receive("n2", HeartbeatReply(1, beat.round)), Append)


def test_heartbeats_of_all_groups_fall_together() -> None:
    deadlines = set()
    for shift in (0.0, 0.01, 0.1, 0.2):
        bench = Bench(now_s=NOW + shift)
        bench.lead()
        deadlines.add(bench.raft.deadline_s)
    assert deadlines == {NOW + 0.25}


def test_a_heartbeat_tells_only_what_the_follower_holds() -> None:
    bench = Bench()
    bench.lead()
    bench.receive("n2", AppendReply(1, 1))
    beats = dict(kinds(bench.at(NOW + 0.25), Heartbeat))
    assert (beats["n2"].commit, beats["n3"].commit) == (1, 0)


# reads


def test_too_many_reads_are_refused() -> None:
    bench = Bench(reads_max=2)
    bench.lead()
    bench.raft.read(1, NOW)
    bench.raft.read(2, NOW)
    with pytest.raises(Unavailable, match="2 reads wait"):
        bench.raft.read(3, NOW)
    assert bench.receive("n2", ReadRequest(1, 8)) == [("n2", ReadReply(1, 8, None))]
    follower = Bench(reads_max=2)
    with pytest.raises(NotOwner):
        follower.raft.read(1, NOW)
    follower.receive("n2", Append(1, ORIGIN, (), 0))
    follower.raft.read(1, NOW)
    follower.take()
    follower.raft.read(2, NOW)
    with pytest.raises(Unavailable, match="2 reads wait"):
        follower.raft.read(3, NOW)


def test_a_read_waits_for_a_round_that_began_after_it() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    [(_, old), _] = kinds(bench.at(NOW + 0.25), Heartbeat)
    bench.raft.read(1, bench.now_s)
    [(_, new), _] = kinds(bench.take(), Heartbeat)
    bench.receive("n2", HeartbeatReply(1, old.round))
    assert bench.reads == []
    bench.receive("n2", HeartbeatReply(1, new.round))
    assert bench.reads == [ReadState(1, 1)]


def test_reads_that_come_while_a_round_is_on_its_way_share_the_next() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.read(1, NOW)
    [(_, first), _] = kinds(bench.take(), Heartbeat)
    bench.raft.read(2, NOW)
    assert kinds(bench.take(), Heartbeat) == []
    bench.raft.read(3, NOW)
    beats = kinds(bench.receive("n2", HeartbeatReply(1, first.round)), Heartbeat)
    assert [to for to, _ in beats] == ["n2", "n3"]
    assert bench.reads == [ReadState(1, 1)]
    bench.receive("n3", HeartbeatReply(1, first.round))
    assert bench.reads == [ReadState(1, 1)]
    bench.receive("n3", HeartbeatReply(1, beats[0][1].round))
    assert bench.reads[1:] == [ReadState(2, 1), ReadState(3, 1)]


def test_a_round_that_is_lost_is_made_up_for_by_the_next_heartbeat() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.read(1, NOW)
    bench.take()
    bench.raft.read(2, NOW)
    bench.take()
    [(_, beat), _] = kinds(bench.at(NOW + 0.25), Heartbeat)
    bench.receive("n2", HeartbeatReply(1, beat.round))
    assert bench.reads == [ReadState(1, 1), ReadState(2, 1)]


def test_a_commit_is_told_with_the_next_append_or_heartbeat() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.propose([b"a"], NOW)
    bench.take()
    assert bench.receive("n2", AppendReply(1, 2)) == []
    bench.raft.propose([b"b"], NOW)
    assert [message.commit for _, message in kinds(bench.take(), Append)] == [2, 2]
    bench.receive("n2", AppendReply(1, 3))
    assert dict(kinds(bench.at(NOW + 0.25), Heartbeat))["n2"].commit == 3


def test_a_follower_that_reads_is_told_of_the_commit_at_once() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    [(_, beat), _] = kinds(bench.receive("n2", ReadRequest(1, 7)), Heartbeat)
    bench.raft.propose([b"a"], NOW)
    bench.take()
    bench.receive("n2", AppendReply(1, 2))
    bench.receive("n3", HeartbeatReply(1, beat.round))
    [(_, beat), _] = kinds(bench.receive("n2", ReadRequest(1, 8)), Heartbeat)
    assert beat.commit == 2
    bench.raft.propose([b"b"], NOW)
    bench.take()
    bench.receive("n3", AppendReply(1, 3))
    bench.receive("n2", ReadRequest(1, 9))
    [(_, beat), _] = kinds(bench.receive("n3", HeartbeatReply(1, beat.round)), Heartbeat)
    bench.receive("n2", AppendReply(1, 3))
    assert bench.receive("n3", HeartbeatReply(1, beat.round)) == [
        ("n2", Heartbeat(1, 3)),
        ("n2", ReadReply(1, 9, 3)),
    ]


def test_a_forwarded_read_waits_until_it_is_applied_or_fails() -> None:
    bench = Bench()
    bench.receive("n2", Append(1, ORIGIN, (entry(1, 1),), 0))
    bench.raft.read(1, NOW)
    bench.raft.read(2, NOW)
    [(to, request)] = bench.take()
    assert to == "n2"
    bench.receive("n2", ReadReply(1, request.number, 1))
    assert bench.reads == []
    bench.receive("n2", Heartbeat(1, 1))
    assert bench.reads == [ReadState(1, 1), ReadState(2, 1)]
    bench.receive("n2", ReadReply(1, request.number, 1))
    bench.raft.read(3, NOW)
    bench.take()
    assert bench.raft.deadline_s == NOW + 1.0
    bench.at(NOW + 1.0)
    assert bench.reads[2:] == [ReadState(3, None)]
    bench.raft.read(4, bench.now_s)
    bench.receive("n3", Append(2, ORIGIN, (), 0))
    assert bench.reads[3:] == [ReadState(4, None)]


def test_no_two_lives_ask_with_the_same_number() -> None:
    """The answer to a question of the life before would be too old."""
    numbers = []
    for seed in range(20):
        raft = Raft("n1", Restored(configuration=THREE), Bench(), TUNABLES, random.Random(seed), NOW)
        raft.receive("n2", Append(1, ORIGIN, (), 0), NOW)
        raft.read(1, NOW)
        ready = raft.ready(NOW)
        assert ready is not None
        numbers += [message.number for _, message in kinds(ready.messages, ReadRequest)]
    assert len(dict.fromkeys(numbers)) == 20


def test_a_leader_that_is_deposed_fails_the_reads_of_all() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.read(1, NOW)
    bench.receive("n2", ReadRequest(1, 7))
    sent = bench.receive("n3", Stale(2))
    assert sent[0] == ("n2", ReadReply(1, 7, None))
    assert bench.reads == [ReadState(1, None)]


def test_a_leader_of_a_term_that_is_over_stands_again_at_once() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    sent = bench.receive("n3", Stale(4))
    assert kinds(sent, Vote) == [(to, Vote(5, Point(1, 1), pre=True)) for to in ("n2", "n3")]
    assert (bench.raft.role, bench.raft.term) == (PRECANDIDATE, 4)
    # Its followers have just heard of it, and grant it all the same; nobody else.
    follower = Bench()
    follower.receive("n2", Append(1, ORIGIN, (entry(1, 1),), 0))
    assert follower.answer("n3", Vote(2, Point(9, 9), pre=True)) == VoteReply(1, False, True)
    assert follower.answer("n2", Vote(2, Point(1, 1), pre=True)) == VoteReply(2, True, True)
    # A quiet one wakes up: its leader leads no longer. A question of before it led says nothing.
    quiet = Bench()
    quiet.receive("n2", Append(1, ORIGIN, (entry(1, 1),), 0))
    quiet.receive("n2", Heartbeat(1, 1, 3, quiet=True))
    assert quiet.raft.deadline_s == math.inf
    quiet.receive("n2", Vote(1, ORIGIN, pre=True))
    assert quiet.raft.leader == "n2"
    quiet.receive("n2", Vote(2, Point(1, 1), pre=True))
    assert quiet.raft.leader is None
    assert quiet.raft.deadline_s < math.inf


def test_one_that_does_not_lead_says_so() -> None:
    bench = Bench()
    assert bench.answer("n2", ReadRequest(1, 7)) == ReadReply(1, 7, None)


# membership, hand-over, snapshots


def test_a_change_is_refused_with_a_reason() -> None:
    bench = Bench(learner_lag_entries_max=0)
    with pytest.raises(NotOwner):
        bench.raft.change(["n1"], [], NOW)
    bench.lead()
    with pytest.raises(Unavailable, match="not committed an entry of term 1"):
        bench.raft.change(["n1"], [], NOW)
    bench.settle()
    with pytest.raises(BadRequest, match="stands twice"):
        bench.raft.change(["n1", "n1"], [], NOW)
    with pytest.raises(BadRequest):
        bench.raft.change([], [], NOW)
    with pytest.raises(Unavailable, match="n4 has not caught up"):
        bench.raft.change(["n1", "n4"], [], NOW)
    assert bench.raft.change(["n1", "n2", "n3"], ["n4"], NOW) == Point(2, 1)
    bench.take()
    with pytest.raises(Unavailable, match="is not complete"):
        bench.raft.change(["n1"], [], NOW)
    bench.settle()
    assert bench.raft.caught_up("n4")
    bench.raft.propose([b"a"], NOW)
    assert not bench.raft.caught_up("n4")
    with pytest.raises(Unavailable, match="n4 has not caught up"):
        bench.raft.change(["n1", "n4"], [], NOW)
    bench.take()
    bench.settle()
    bench.raft.change(["n1", "n4"], [], NOW)
    assert bench.raft.configuration == Configuration(("n1", "n4"), (), ("n1", "n2", "n3"))


def test_a_joint_change_needs_both_majorities() -> None:
    bench = Bench(configuration=Configuration(("n1", "n2", "n3"), ("n4", "n5")))
    bench.lead()
    bench.settle()
    bench.raft.change(["n1", "n4", "n5"], [], NOW)
    bench.take()
    bench.receive("n4", AppendReply(1, 2))
    bench.receive("n5", AppendReply(1, 2))
    assert bench.raft.log.committed == 1
    bench.receive("n2", AppendReply(1, 2))
    assert bench.raft.log.committed == 2
    assert bench.raft.configuration == Configuration(("n1", "n4", "n5"))
    bench.receive("n2", AppendReply(1, 3))
    bench.receive("n3", AppendReply(1, 3))
    assert bench.raft.log.committed == 2
    bench.receive("n4", AppendReply(1, 3))
    assert bench.raft.log.committed == 3
    assert bench.log[-1].kind == CONFIGURATION


def test_a_configuration_goes_with_its_entry() -> None:
    bench = Bench()
    changed = Configuration(("n1", "n2"))
    bench.receive("n2", Append(1, ORIGIN, (Entry(1, 1, CONFIGURATION, changed.pack()),), 0))
    assert bench.raft.configuration == changed
    bench.receive("n3", Append(2, ORIGIN, (entry(2, 1),), 0))
    assert bench.raft.configuration == THREE


def test_a_dismissed_member_is_told_and_then_left_alone() -> None:
    bench = Bench(configuration=Configuration(("n1", "n2"), ("n3",)))
    bench.lead()
    bench.settle()
    bench.raft.change(["n1", "n2"], [], NOW)
    assert [to for to, _ in kinds(bench.take(), Append)] == ["n2", "n3"]
    bench.settle()
    assert "n3" in bench.raft.statistics()["followers"]
    assert ("n3", Heartbeat(1, 2)) in bench.receive("n3", AppendReply(1, 2))
    bench.at(NOW + 0.25)
    assert "n3" not in bench.raft.statistics()["followers"]


def test_one_that_was_dismissed_and_has_forgotten_its_log_deposes_nobody() -> None:
    """It counts terms of its own; before it is left alone, it may answer once more."""
    bench = Bench(configuration=Configuration(("n1", "n2"), ("n3",)))
    bench.lead()
    bench.settle()
    bench.raft.change(["n1", "n2"], [], NOW)
    bench.take()
    bench.receive("n2", AppendReply(1, 2))
    assert bench.receive("n3", Stale(2)) == []
    assert (bench.raft.role, bench.raft.term) == (LEADER, 1)
    assert "n3" not in bench.raft.statistics()["followers"]
    bench.receive("n3", Stale(2))
    assert bench.raft.role == LEADER
    bench.receive("n2", Stale(2))
    assert bench.raft.term == 2
    assert bench.raft.role != LEADER


def test_a_dismissed_member_that_is_dead_is_forgotten_after_a_while() -> None:
    bench = Bench(configuration=Configuration(("n1", "n2"), ("n3",)))
    bench.lead()
    bench.settle()
    bench.raft.change(["n1", "n2"], [], NOW)
    bench.take()
    bench.receive("n2", AppendReply(1, 2))
    for step in range(1, 5):
        bench.receive("n2", HeartbeatReply(1, step))
        bench.at(NOW + 0.25 * step)
        assert ("n3" in bench.raft.statistics()["followers"]) == (step < 4)


def test_nothing_is_known_of_a_member_that_comes_back() -> None:
    bench = Bench(configuration=Configuration(("n1", "n2"), ("n3",)))
    bench.lead()
    bench.settle()
    bench.raft.change(["n1", "n2"], [], NOW)
    bench.take()
    bench.receive("n2", AppendReply(1, 2))
    bench.raft.change(["n1", "n2"], ["n3"], NOW)
    assert bench.raft.statistics()["followers"]["n3"] == {"state": "probe", "match": 0, "next": 3}
    bench.take()
    sent = bench.receive("n3", AppendReject(1, 2, ORIGIN))
    assert [message.previous for _, message in kinds(sent, Append)] == [ORIGIN]


def test_a_transfer_waits_for_the_log_of_the_successor_and_ends_in_time() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.propose([b"a"], NOW)
    bench.take()
    assert bench.raft.transfer("n2", NOW) == "n2"
    assert kinds(bench.take(), TimeoutNow) == []
    assert kinds(bench.receive("n2", AppendReply(1, 2)), TimeoutNow) == [("n2", TimeoutNow(1))]
    with pytest.raises(Unavailable, match="handed over to n2"):
        bench.raft.propose([b"b"], NOW)
    with pytest.raises(Unavailable, match="handed over to n2"):
        bench.raft.transfer("n3", NOW)
    for step in range(1, 5):
        bench.receive("n3", HeartbeatReply(1, step))
        bench.at(NOW + 0.25 * step)
    bench.raft.propose([b"b"], NOW)
    assert Bench(configuration=Configuration(("n1",))).lead() == []


def test_the_successor_is_the_one_who_is_furthest() -> None:
    bench = Bench()
    bench.lead()
    bench.settle()
    bench.raft.propose([b"a"], NOW)
    bench.take()
    bench.receive("n3", AppendReply(1, 2))
    assert bench.raft.transfer(None, NOW) == "n3"


def chunk(number: int, data: bytes = b"x", *, done: bool = False, snapshot: int = 1) -> Chunk:
    return Chunk(2, snapshot, Point(9, 2), Configuration(("n2", "n3")), number, b"" if done else data, done)


def test_the_chunks_of_a_snapshot_are_taken_in_order() -> None:
    bench = Bench([1, 1], term=1)
    assert bench.answer("n2", chunk(1)) == ChunkReply(2, 1, 0)
    assert bench.answer("n2", chunk(0)) == ChunkReply(2, 1, 1)
    assert bench.answer("n2", chunk(2)) == ChunkReply(2, 1, 1)
    assert bench.answer("n2", chunk(0)) == ChunkReply(2, 1, 1)
    assert bench.answer("n2", chunk(0, snapshot=2)) == ChunkReply(2, 2, 1)
    assert bench.answer("n2", chunk(1, snapshot=1)) == ChunkReply(2, 1, 0)
    assert bench.answer("n2", chunk(0)) == ChunkReply(2, 1, 1)
    bench.chunks.clear()
    assert bench.answer("n2", chunk(1)) == ChunkReply(2, 1, 2)
    assert bench.receive("n2", chunk(2, done=True), sync=False) == []
    assert bench.sync() == [("n2", AppendReply(2, 9))]
    assert [part.number for part in bench.chunks] == [1, 2]
    log = bench.raft.log
    assert (log.start, log.last, log.committed, log.applied) == (Point(9, 2), Point(9, 2), 9, 9)
    assert bench.raft.configuration == Configuration(("n2", "n3"))
    assert bench.answer("n2", chunk(2, done=True)) == AppendReply(2, 9)


def test_a_snapshot_of_what_is_here_is_not_taken() -> None:
    bench = Bench([1] * 8 + [2, 2], term=2)
    assert bench.answer("n2", chunk(0)) == AppendReply(2, 9)
    assert (bench.raft.log.committed, bench.raft.log.last) == (9, Point(10, 2))
    assert bench.chunks == []


def test_a_snapshot_of_what_was_compacted_here_is_not_taken() -> None:
    bench = Bench([2, 2], term=2, start=Point(12, 2))
    assert bench.answer("n2", chunk(0)) == AppendReply(2, 12)
    assert (bench.chunks, bench.raft.log.last) == ([], Point(14, 2))


def compacted() -> Bench:
    bench = Bench([1] * 5, term=1, commit=5)
    bench.take()
    bench.raft.compact(4)
    bench.lead()
    return bench


def test_a_snapshot_that_the_storage_cannot_give_is_asked_for_later() -> None:
    bench = compacted()
    bench.full = True
    assert bench.receive("n2", AppendReject(2, 5, Point(1, 1))) == []
    bench.full = False
    assert bench.receive("n2", HeartbeatReply(2, 1)) == []
    assert kinds(bench.at(NOW + 0.25), Chunk) == []
    assert len(kinds(bench.at(NOW + 0.5), Chunk)) == 1


def test_a_follower_behind_the_log_gets_a_snapshot_in_chunks() -> None:
    bench = compacted()
    bench.state = [b"a", b"b"]
    sent = bench.receive("n2", AppendReject(2, 5, Point(1, 1)))
    [(_, first)] = kinds(sent, Chunk)
    assert (first.point, first.configuration, first.number, first.data) == (Point(5, 1), THREE, 0, b"a")
    assert kinds(bench.receive("n2", ChunkReply(2, first.snapshot, 0)), Chunk) == []
    [(_, second)] = kinds(bench.receive("n2", ChunkReply(2, first.snapshot, 1)), Chunk)
    [(_, last)] = kinds(bench.receive("n2", ChunkReply(2, first.snapshot, 2)), Chunk)
    assert (second.data, last.data, last.done) == (b"b", b"", True)
    sent = bench.receive("n2", AppendReply(2, 5))
    assert [message.previous for _, message in kinds(sent, Append)] == [Point(5, 1)]


def test_compaction_keeps_the_configuration_and_the_terms_behind_it() -> None:
    bench = Bench([1, 1, 2], term=2)
    changed = Configuration(("n1", "n2"))
    parts = (Entry(2, 4, CONFIGURATION, changed.pack()), entry(2, 5))
    bench.receive("n2", Append(2, Point(3, 2), parts, 5))
    bench.raft.compact(3)
    assert (bench.raft.configuration_at(3), bench.raft.configuration) == (THREE, changed)
    assert [bench.raft.log.term(index) for index in range(2, 7)] == [None, 2, 2, 2, None]
    bench.raft.compact(5)
    assert bench.raft.configuration_at(5) == changed
    assert bench.raft.log.start == Point(5, 2)


# quiet and awake


def quiet_leader() -> Bench:
    bench = Bench(quiet_after_s=0.5)
    bench.lead()
    bench.settle()
    for step in (1, 2):
        for to, message in kinds(bench.at(NOW + 0.25 * step), Heartbeat):
            bench.receive(to, HeartbeatReply(1, message.round, message.quiet))
    return bench


def test_a_leader_is_quiet_when_all_followers_are() -> None:
    bench = quiet_leader()
    assert bench.raft.statistics()["quiet"]
    assert bench.raft.deadline_s == float("inf")
    one = Bench(quiet_after_s=0.5)
    one.lead()
    one.settle()
    one.at(NOW + 0.25)
    one.receive("n3", HeartbeatReply(1, 1))
    beats = kinds(one.at(NOW + 0.5), Heartbeat)
    assert all(message.quiet for _, message in beats)
    one.receive("n2", HeartbeatReply(1, 2, quiet=True))
    one.receive("n3", HeartbeatReply(1, 2, quiet=False))
    assert not one.raft.statistics()["quiet"]


@pytest.mark.parametrize("missing", ["an entry", "a word"])
def test_a_group_with_a_member_that_lags_or_is_silent_stays_awake(missing: str) -> None:
    bench = Bench(quiet_after_s=0.5)
    bench.lead()
    bench.receive("n2", AppendReply(1, 1))
    if missing == "a word":
        bench.receive("n3", AppendReply(1, 1))
    for step in range(1, 9):
        beats = kinds(bench.at(NOW + 0.25 * step), Heartbeat)
        assert missing == "a word" or not any(message.quiet for _, message in beats)
        bench.receive("n2", HeartbeatReply(1, step, quiet=beats[0][1].quiet))
        if missing == "an entry":
            bench.receive("n3", HeartbeatReply(1, step))
        assert not bench.raft.statistics()["quiet"]
    assert not dict(kinds(bench.at(NOW + 2.25), Heartbeat))["n2"].quiet


def test_everything_that_is_to_be_done_wakes_a_leader() -> None:
    wakers: list[Any] = [
        lambda raft: raft.propose([b"a"], NOW + 9),
        lambda raft: raft.change(["n1", "n2", "n3"], ["n4"], NOW + 9),
        lambda raft: raft.transfer("n2", NOW + 9),
        lambda raft: raft.wake(NOW + 9),
        lambda raft: raft.receive("n2", Vote(2, Point(1, 1), pre=True), NOW + 9),
    ]
    for wake in wakers:
        bench = quiet_leader()
        wake(bench.raft)
        assert bench.raft.deadline_s <= NOW + 9
        bench.at(NOW + 9)
        assert bench.raft.role == LEADER
        assert not bench.raft.statistics()["quiet"]
    bench = quiet_leader()
    bench.receive("n9", Vote(2, Point(1, 1), pre=True))
    bench.receive("n2", HeartbeatReply(1, 2, quiet=True))
    assert bench.raft.statistics()["quiet"]


def test_a_read_wakes_nobody_unless_it_is_not_answered() -> None:
    for ask in (
        lambda raft: raft.read(1, NOW + 9),
        lambda raft: raft.receive("n2", ReadRequest(1, 5), NOW + 9),
    ):
        bench = quiet_leader()
        ask(bench.raft)
        rounds = kinds(bench.at(NOW + 9), Heartbeat)
        assert [(to, message.quiet) for to, message in rounds] == [("n2", True), ("n3", True)]
        assert NOW + 9 < bench.raft.deadline_s < NOW + 10
        bench.receive("n3", HeartbeatReply(1, rounds[1][1].round, quiet=True))
        assert bench.raft.statistics()["quiet"]
        assert bench.raft.deadline_s == float("inf")
        bench = quiet_leader()
        ask(bench.raft)
        bench.at(NOW + 9)
        again = kinds(bench.at(bench.raft.deadline_s), Heartbeat)
        assert [(to, message.quiet) for to, message in again] == [("n2", False), ("n3", False)]
        assert not bench.raft.statistics()["quiet"]


def quiet_follower() -> Bench:
    bench = Bench([1], term=1)
    assert bench.answer("n2", Heartbeat(1, 0, 1, quiet=True)) == HeartbeatReply(1, 1, quiet=False)
    assert bench.raft.deadline_s < float("inf")
    assert bench.answer("n2", Heartbeat(1, 1, 2, quiet=True)) == HeartbeatReply(1, 2, quiet=True)
    assert bench.raft.deadline_s == float("inf")
    bench.now_s = NOW + 1000
    return bench


def test_a_quiet_follower_wakes_by_its_leader_by_a_candidate_and_from_outside() -> None:
    bench = quiet_follower()
    assert bench.answer("n3", Vote(2, Point(1, 1), pre=True)) == VoteReply(1, False, pre=True)
    assert bench.raft.deadline_s < NOW + 1002
    assert bench.answer("n3", Vote(2, Point(1, 1), pre=True)) == VoteReply(1, False, pre=True)
    bench.now_s += 1.0
    assert bench.answer("n3", Vote(2, Point(1, 1), pre=True)) == VoteReply(2, True, pre=True)
    bench = quiet_follower()
    assert bench.answer("n9", Vote(2, Point(1, 1), pre=True)) == VoteReply(1, False, pre=True)
    assert bench.raft.deadline_s == float("inf")
    for message in (Append(1, Point(1, 1), (), 1), Heartbeat(1, 1)):
        bench = quiet_follower()
        bench.receive("n2", message)
        assert bench.raft.deadline_s < NOW + 1002
    bench = quiet_follower()
    bench.raft.wake(bench.now_s)
    assert NOW + 1001 <= bench.raft.deadline_s < NOW + 1002
    assert bench.answer("n3", Vote(2, Point(1, 1), pre=True)) == VoteReply(1, False, pre=True)
    bench = quiet_follower()
    bench.raft.wake(bench.now_s, leader_suspected=True)
    assert bench.answer("n3", Vote(2, Point(1, 1), pre=True)) == VoteReply(2, True, pre=True)


# the constants


def test_times_that_cannot_work_together_are_refused() -> None:
    for profile in PROFILES.values():
        assert profile.heartbeat_s * 4 <= profile.election_timeout_s
    with pytest.raises(ValueError, match="heartbeat_s is 2"):
        replace(TUNABLES, heartbeat_s=2)
    with pytest.raises(ValueError, match="append_entries_max is 0"):
        replace(TUNABLES, append_entries_max=0)

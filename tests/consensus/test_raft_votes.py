"""Who gets a vote, who stands, and when."""

from __future__ import annotations

import random

import pytest

from gostore.consensus import (
    CANDIDATE,
    FOLLOWER,
    LEADER,
    NOOP,
    ORIGIN,
    PRECANDIDATE,
    Configuration,
    HardState,
    Point,
    Raft,
    Restored,
)
from gostore.consensus.messages import (
    Append,
    TimeoutNow,
    Vote,
    VoteReply,
)

from .bench import NOW, THREE, TUNABLES, Bench, kinds


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


def test_only_answers_to_the_question_that_was_asked_are_counted() -> None:
    bench = Bench(term=3)
    bench.raft.campaign(NOW)
    bench.take()
    bench.receive("n2", VoteReply(3, True, True))  # of a round before
    bench.receive("n2", VoteReply(3, True, False))  # a vote in a term that is over
    assert (bench.raft.role, bench.raft.term) == (PRECANDIDATE, 3)
    bench.receive("n2", VoteReply(4, True, True))
    assert (bench.raft.role, bench.raft.term) == (CANDIDATE, 4)
    assert bench.raft.campaign(NOW)  # it stands already
    for term in (4, 5):
        bench.receive("n3", VoteReply(term, True, True))
        assert (bench.raft.role, bench.raft.term) == (CANDIDATE, 4)
    bench.receive("n3", VoteReply(4, True, False))
    assert (bench.raft.role, bench.raft.term) == (LEADER, 4)


def test_a_candidate_that_cannot_win_does_not_put_off_a_follower() -> None:
    """Else it would keep those who can from standing."""
    bench = Bench([1, 1], term=1)
    due_s = bench.raft.deadline_s
    bench.now_s += 0.5
    bench.receive("n2", Vote(2, ORIGIN))
    assert (bench.raft.term, bench.raft.deadline_s) == (2, due_s)
    # Who stood himself, and in vain, waits again.
    bench.raft.campaign(bench.now_s)
    bench.take()
    bench.receive("n2", Vote(9, ORIGIN))
    assert bench.now_s + 1.0 <= bench.raft.deadline_s <= bench.now_s + 2.0

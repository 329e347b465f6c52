"""Reads by read index: when they are answered, and when they fail."""

from __future__ import annotations

import math
import random

import pytest

from gostore.consensus import (
    ORIGIN,
    PRECANDIDATE,
    Configuration,
    Point,
    Raft,
    ReadState,
    Restored,
)
from gostore.consensus.messages import (
    Append,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    ReadReply,
    ReadRequest,
    Stale,
    Vote,
    VoteReply,
)
from gostore.core.errors import NotOwner, Unavailable

from .bench import NOW, THREE, TUNABLES, Bench, entry, kinds


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


def test_one_alone_answers_reads_that_a_heartbeat_has_overtaken() -> None:
    bench = Bench(configuration=Configuration(("n1",)))
    bench.lead()
    for context in (1, 2):
        bench.raft.read(context, bench.now_s)
        bench.at(bench.raft.deadline_s)
        assert [read.context for read in bench.reads] == list(range(1, context + 1))

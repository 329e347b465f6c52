"""A group that goes quiet, and what wakes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gostore.consensus import (
    LEADER,
    PROFILES,
    Point,
)
from gostore.consensus.messages import (
    Append,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    ReadRequest,
    Vote,
    VoteReply,
)

from .bench import NOW, TUNABLES, Bench, kinds


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

"""Membership, hand-over and snapshots."""

from __future__ import annotations

import pytest

from gostore.consensus import (
    CONFIGURATION,
    LEADER,
    ORIGIN,
    Configuration,
    Entry,
    Point,
)
from gostore.consensus.messages import (
    Append,
    AppendReject,
    AppendReply,
    Chunk,
    ChunkReply,
    Heartbeat,
    HeartbeatReply,
    Stale,
    TimeoutNow,
)
from gostore.core.errors import BadRequest, NotOwner, Unavailable

from .bench import NOW, THREE, Bench, entry, kinds


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


def test_a_learner_knows_from_a_rejected_append_that_there_is_more_than_its_snapshot() -> None:
    """Its own admission is in it: a snapshot of before is no dismissal."""
    bench = Bench(configuration=Configuration())
    bench.receive("n2", Append(2, Point(301, 2), (entry(2, 302),), 9))
    bench.receive("n2", chunk(0))
    bench.receive("n2", chunk(1, done=True))
    assert bench.raft.log.last == Point(9, 2)
    assert bench.raft.lags
    # A later leader with a shorter log knows better.
    bench.receive("n3", Append(3, Point(9, 2), (entry(3, 10),), 0))
    assert not bench.raft.lags

"""What a leader commits, sends, bounds and sends again."""

from __future__ import annotations

import pytest

from gostore.consensus import (
    ORIGIN,
    Configuration,
    Point,
)
from gostore.consensus.messages import (
    Append,
    AppendReject,
    AppendReply,
    ChunkReply,
    Heartbeat,
    HeartbeatReply,
)
from gostore.core.errors import NotOwner, TooLarge, Unavailable

from .bench import NOW, Bench, entry, kinds


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
    assert bench.raft.propose([b"12"], NOW) == Point(4, 1)  # it just fits
    bench.take()
    bench.settle()
    assert bench.raft.propose([b"123"], NOW) == Point(5, 1)


def test_what_a_predecessor_left_counts_as_uncommitted() -> None:
    bench = Bench([1, 1], term=1, payload=b"123456", uncommitted_size_bytes_max=10)
    bench.lead()
    with pytest.raises(Unavailable, match="12 bytes wait"):
        bench.raft.propose([b"1"], NOW)
    bench.settle()
    bench.raft.propose([b"1"], NOW)
    bench = Bench([1, 1, 1], term=1, payload=b"123456", commit=2, uncommitted_size_bytes_max=10)
    bench.lead()
    with pytest.raises(Unavailable, match="6 bytes wait"):
        bench.raft.propose([b"12345"], NOW)


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

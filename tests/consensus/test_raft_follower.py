"""The log of a follower: what it takes, refuses, and never takes back."""

from __future__ import annotations

import pytest

from gostore.consensus import (
    FOLLOWER,
    ORIGIN,
    HardState,
    Message,
    Point,
)
from gostore.consensus.messages import (
    Append,
    AppendReject,
    AppendReply,
    Chunk,
    Heartbeat,
    HeartbeatReply,
    Stale,
    TimeoutNow,
    Vote,
)
from gostore.consensus.outbox import COMMIT_HINT_ENTRIES
from gostore.core.errors import Corrupt

from .bench import NOW, THREE, Bench, entry, kinds


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


def test_a_replica_lags_until_it_holds_all_that_it_knows_to_be_committed() -> None:
    bench = Bench()
    assert not bench.raft.lags
    for index in (1, 2):
        previous = Point(index - 1, min(index - 1, 1))
        bench.receive("n2", Append(1, previous, (entry(1, index),), 3))
        assert bench.raft.lags
    bench.receive("n2", Append(1, Point(2, 1), (entry(1, 3),), 3))
    assert not bench.raft.lags
    bench.receive("n2", Append(1, Point(3, 1), (entry(1, 4),), 2))
    assert not bench.raft.lags


def test_what_is_not_committed_may_be_contradicted_together_with_what_is() -> None:
    bench = Bench([1, 1, 1], term=1, commit=2)
    assert bench.answer("n2", Append(2, Point(1, 1), (entry(1, 2), entry(2, 3)), 2)) == AppendReply(2, 2)


def test_the_commit_hint_speaks_of_what_is_written_already() -> None:
    """It comes first, and a crash may leave nothing else: then the old entry 5 would count as committed."""
    bench = Bench([1] * 5, term=1, commit=4)
    new = tuple(entry(2, index) for index in (5, 6, 7))
    bench.receive("n2", Append(2, Point(4, 1), new, 7))
    assert bench.raft.log.committed == 7
    assert bench.hard == [HardState(2, None, 4)]
    bench.now_s += 2.0
    bench.receive("n3", Vote(3, Point(9, 9)))
    assert bench.hard[-1] == HardState(3, "n3", 7)


def test_the_commit_hint_does_not_come_before_the_snapshot_that_it_relies_on() -> None:
    bench = Bench([1, 1], term=1, commit=1)
    bench.raft.receive("n2", Chunk(2, 1, Point(9, 2), THREE, 0, b"x", False), NOW)
    bench.receive("n2", Chunk(2, 1, Point(9, 2), THREE, 1, b"", True))
    assert bench.raft.log.committed == 9
    assert bench.hard == [HardState(2, None, 1)]

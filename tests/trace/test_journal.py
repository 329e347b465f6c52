"""The journal: completeness, order, and waiting."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.client.thread import client_thread
from gostore.core.errors import BadRequest, Timeout
from gostore.core.events import Event
from gostore.trace import Gap, Journal


def journal(kept_max: int = 1000) -> Journal:
    return Journal(client_thread(), kept_max=kept_max)


def event(seq: int, node: str = "n1", kind: str = "suspect", stamp: int | None = None) -> Event:
    data = {"member": "n2", "incarnation": 1} if kind == "suspect" else {"incarnation": 1}
    return Event(node, seq, kind, seq if stamp is None else stamp, 0.0, None, data)


def deliver(
    to: Journal, after: int, upto: int, *seqs: int, node: str = "n1", incarnation: int = 1, sampled: int = 0
) -> None:
    to.deliver("s", node, incarnation, after, upto, sampled, [event(seq, node).to_wire() for seq in seqs])


def seqs(of: Journal) -> list[int]:
    return [event.seq for event in of]


def test_batches_that_follow_each_other_are_complete() -> None:
    j = journal()
    j.begin("s", "n1", 1, 0)
    deliver(j, 0, 3, 1, 3)  # 2 was of a category that nobody wanted
    deliver(j, 3, 5, 4, 5)
    assert (seqs(j), j.complete, j.gaps) == ([1, 3, 4, 5], True, ())


def test_a_batch_that_comes_twice_counts_once() -> None:
    j = journal()
    deliver(j, 0, 2, 1, 2)
    deliver(j, 0, 2, 1, 2)
    deliver(j, 0, 3, 1, 2, 3)
    assert (seqs(j), j.complete) == ([1, 2, 3], True)


def test_a_hole_is_a_gap() -> None:
    j = journal()
    j.begin("s", "n1", 1, 0)
    deliver(j, 4, 6, 5, 6)
    assert j.gaps == (Gap("n1", 1, 0, 4, "the node's buffer was full"),)
    assert not j.complete
    assert repr(j) == "Journal(incomplete)"


def test_a_restarted_node_begins_anew_and_its_past_is_ignored() -> None:
    j = journal()
    deliver(j, 0, 2, 1, 2)
    deliver(j, 0, 1, 1, incarnation=2)
    deliver(j, 2, 3, 3, incarnation=1)  # late
    assert (seqs(j), j.complete) == ([1, 2, 1], True)


def test_a_node_that_dies_leaves_a_gap_of_unknown_size() -> None:
    j = journal()
    deliver(j, 0, 2, 1, 2)
    deliver(j, 0, 2, 1, 2, node="n2")
    j.ended("n1", "was killed")
    assert j.gaps == (Gap("n1", 1, 2, None, "was killed"),)


def test_what_was_sampled_or_forgotten_is_not_complete() -> None:
    j = journal()
    deliver(j, 0, 9, 1, sampled=8)
    assert (j.complete, j.gaps) == (False, ())
    j = journal(kept_max=2)
    deliver(j, 0, 3, 1, 2, 3)
    assert (seqs(j), j.forgotten, j.complete, j.position) == ([2, 3], 1, False, 3)


def test_nonsense_is_refused() -> None:
    with pytest.raises(BadRequest, match="not an event"):
        journal().deliver("s", "n1", 1, 0, 1, 0, [["what"]])


@given(st.lists(st.integers(1, 6), max_size=12), st.randoms(use_true_random=False))
def test_whatever_is_lost_shows(sizes: list[int], rng: random.Random) -> None:
    """Any batches may be lost or doubled: either all events are there, or a gap says so."""
    j, seq, lost = journal(), 0, False
    j.begin("s", "n1", 1, 0)
    for size in sizes:
        fate = rng.choice(("arrives", "lost", "twice"))
        numbers = range(seq + 1, seq + size + 1)
        if fate != "lost":
            deliver(j, seq, seq + size, *numbers)
        if fate == "twice":
            deliver(j, seq, seq + size, *numbers)
        lost = lost or fate == "lost"
        seq += size
    deliver(j, seq, seq + 1, seq + 1)
    assert j.complete == (not lost)
    assert len(set(seqs(j))) == len(seqs(j))
    if not lost:
        assert seqs(j) == list(range(1, seq + 2))


def test_queries_follow_the_stamps() -> None:
    j = journal()
    j.append(event(1, "n2", stamp=20))
    j.append(event(1, "n1", stamp=10))
    j.append(event(2, "n1", "node_started", stamp=15))
    assert [e.stamp for e in j.of_kind("suspect")] == [10, 20]
    assert [e.stamp for e in j.recent(2)] == [10, 15]
    assert [e.stamp for e in j.recent(kinds=["suspect"], node="n2")] == [20]
    assert j.of_kind("suspect", where=lambda e: e.stamp > 10)[0].node == "n2"
    assert j.counts() == {"suspect": 2, "node_started": 1}
    with pytest.raises(BadRequest, match="no kind of event 'suspicion'; there are .*suspect"):
        j.of_kind("suspicion")


def test_subscribers_hear_until_they_leave() -> None:
    j, heard = journal(), []
    leave = j.subscribe(lambda e: heard.append(e.seq))
    j.append(event(1))
    leave()
    j.append(event(2))
    assert heard == [1]


def test_waiting_sees_what_comes_and_what_came_since() -> None:
    j = journal()
    before = j.position
    j.append(event(1))
    assert j.wait_for_sync("suspect", since=before).seq == 1
    client_thread().loop.call_soon_threadsafe(lambda: None)

    async def both() -> Event:
        import asyncio

        asyncio.get_running_loop().call_soon(j.append, event(2))
        return await j.wait_for("suspect", node="n1", timeout_s=10)

    assert client_thread().run_sync(both()).seq == 2


def test_waiting_in_vain_says_what_came() -> None:
    j = journal()
    j.append(event(1))
    with pytest.raises(Timeout, match=r"no node_ready or master of n1 within 0.01 s; came: suspect 1"):
        j.wait_for_sync("node_ready", "master", node="n1", since=0, timeout_s=0.01)
    with pytest.raises(Timeout, match="came: nothing"):
        j.wait_for_sync("suspect", timeout_s=0.01)

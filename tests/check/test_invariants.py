"""Invariants over events, and promises about states."""

from __future__ import annotations

from typing import Any

import pytest

from gostore.check import History, Watch, judge_journal, lost_writes, standard_invariants, unequal_replicas
from gostore.core.events import KINDS, Event


class Feed:
    """Makes events with the right numbers."""

    def __init__(self) -> None:
        self.seq: dict[str, int] = {}

    def __call__(self, node: str, kind: str, **data: Any) -> Event:
        assert sorted(data) == sorted(KINDS[kind][1])
        self.seq[node] = self.seq.get(node, 0) + 1
        return Event(node, self.seq[node], kind, 0, 0.25, None, data)


def judge(*events: Event) -> tuple[str, list[str]]:
    watch = Watch(standard_invariants())
    for event in events:
        watch.feed(event)
    judgement = watch.judge()
    return judgement.verdict.value, [violation.invariant for violation in judgement.violations]


def test_one_master_per_epoch() -> None:
    e = Feed()
    fine = [e("n1", "master", member="n1", epoch=1), e("n2", "master", member="n1", epoch=1)]
    assert judge(*fine, e("n2", "master", member="n2", epoch=2)) == ("fine", [])
    assert judge(*fine, Feed()("n3", "master", member="n3", epoch=1)) == ("violated", ["one master per epoch"])


def test_one_leader_per_term() -> None:
    e = Feed()
    fine = [
        e("n1", "raft_leader", group="g", term=2, leader="n1"),
        e("n2", "raft_leader", group="h", term=2, leader="n2"),
    ]
    assert judge(*fine, e("n2", "raft_leader", group="g", term=3, leader="n2")) == ("fine", [])
    second = e("n3", "raft_leader", group="g", term=2, leader="n3")
    assert judge(*fine, second) == ("violated", ["one leader per term"])


def test_equal_views() -> None:
    e = Feed()
    fine = [e("n1", "view", epoch=4, online=["n1", "n2"]), e("n2", "view", epoch=4, online=["n2", "n1"])]
    assert judge(*fine) == ("fine", [])
    watch = Watch(standard_invariants())
    assert [watch.feed(event) for event in fine] == [None, None]
    broken = e("n3", "view", epoch=4, online=["n3"])
    violation = watch.feed(broken)
    assert violation is not None
    assert violation.event is broken
    assert "in epoch 4 these are online: ['n1', 'n2'] (event 1 of n1) and ['n3']" in str(violation)


def test_equal_members() -> None:
    e = Feed()
    first = e("n1", "member", member="n3", state="offline", epoch=4, path=["n1"])
    assert judge(first, e("n2", "member", member="n3", state="offline", epoch=4, path=["n1", "n2"])) == ("fine", [])
    second = Feed()("n2", "member", member="n3", state="online", epoch=4, path=["n2"])
    assert judge(first, second) == ("violated", ["equal members"])


def test_one_primary_per_generation() -> None:
    e = Feed()
    first = e("n1", "shard_primary", shard=3, generation=2, replicas=["n1", "n2"])
    again = e("n1", "shard_primary", shard=3, generation=2, replicas=["n1", "n2", "n3"])
    assert judge(first, again, e("n2", "shard_primary", shard=3, generation=3, replicas=["n2"])) == ("fine", [])
    other = Feed()("n2", "shard_primary", shard=3, generation=2, replicas=["n2", "n1"])
    assert judge(first, other) == ("violated", ["one primary per generation"])


def test_one_commit_per_index() -> None:
    e = Feed()
    first = e("n1", "commit", shard=3, container="c", keys=["a"], index=7)
    again = e("n2", "commit", shard=3, container="c", keys=["a"], index=7)
    assert judge(first, again, e("n1", "commit", shard=4, container="c", keys=["b"], index=7)) == ("fine", [])
    other = e("n2", "commit", shard=3, container="c", keys=["b"], index=7)
    assert judge(first, again, other) == ("violated", ["one commit per index"])


def test_epochs_grow_as_long_as_a_node_lives() -> None:
    e = Feed()
    start, five = e("n1", "node_started", incarnation=1), e("n1", "view", epoch=5, online=["n1"])
    assert judge(start, five, e("n1", "view", epoch=7, online=["n1"]), Feed()("n2", "view", epoch=4, online=[])) == (
        "fine", [],
    )  # fmt: skip
    back = Feed()
    again = [back("n1", "node_started", incarnation=2), back("n1", "view", epoch=4, online=["n2"])]
    assert judge(start, five, *again) == ("fine", []), "another life"
    assert judge(start, five, again[1]) == ("violated", ["epochs grow"])


def test_a_missing_event_is_unknown_never_fine() -> None:
    e = Feed()
    first, _, third = (e("n1", "node_started", incarnation=n) for n in range(3))
    assert judge(first, third)[0] == "unknown"
    assert judge(third)[0] == "unknown", "the beginning is missing"
    restarted = Feed()("n1", "node_started", incarnation=9)
    assert judge(first, restarted)[0] == "fine"
    conflict = [Feed()(n, "master", member=n, epoch=1) for n in ("n1", "n2")]
    assert judge(third, *conflict)[0] == "violated", "what is broken stays broken"


def test_a_journal() -> None:
    class Gap:
        node, reason = "n2", "the node's buffer was full"

    class Journal:
        def __init__(self, *events: Event, gaps: tuple[Gap, ...] = (), complete: bool = True) -> None:
            self.events, self.gaps, self.complete = events, gaps, complete

        def __iter__(self) -> Any:
            return iter(self.events)

    e = Feed()
    _, event = e("n1", "node_started", incarnation=1), e("n1", "view", epoch=1, online=["n1"])
    assert judge_journal(Journal(event)).verdict.value == "fine", "a subscription to some categories skips numbers"
    judged = judge_journal(Journal(event, gaps=(Gap(),)))
    assert (judged.verdict.value, judged.gaps) == ("unknown", ("n2: events are missing: the node's buffer was full",))
    assert judge_journal(Journal(event, complete=False)).verdict.value == "unknown"
    assert "unknown after 1 events" in judged.text()


def test_an_invariant_of_ones_own() -> None:
    class NoSuspicion:
        name = "nobody is suspected"
        kinds = ("suspect",)

        def look(self, event: Event) -> str | None:
            return f"{event.node} suspects {event.data['member']}"

    e = Feed()
    watch = Watch([NoSuspicion()])
    for _ in range(150):
        watch.feed(e("n1", "suspect", member="n2", incarnation=1))
    judgement = watch.judge()
    assert (judgement.events, len(judgement.violations)) == (150, 100), "violations are bounded"
    assert "nobody is suspected: n1 suspects n2 (event 1 of n1, 0.250000 s)" in judgement.text()


def writes(*lines: str) -> History:
    """``"a write 3 ok"``; overlapping ones are written ``"a write 3 open"`` and end at the end as ok."""
    history = History("register")
    late = []
    for line in lines:
        process, kind, value, outcome = line.split()
        operation = history.invoke(process, kind, "x", int(value) if kind != "delete" else None)
        if outcome == "open":
            late.append(operation)
        else:
            getattr(history, outcome)(operation)
    for operation in late:
        history.ok(operation)
    return history


@pytest.mark.parametrize(
    ("history", "final", "lost"),
    [
        (writes("a write 1 ok", "a write 2 ok"), 2, False),
        (writes("a write 1 ok", "a write 2 ok"), 1, True),
        (writes("a write 1 ok"), None, True),
        (writes("a write 1 fail", "b write 2 info"), None, False),
        (writes("a write 1 ok", "b write 2 fail"), 2, True),
        (writes("b write 2 info", "a write 1 ok"), 2, False),
        (writes("b write 2 open", "a write 1 ok"), 2, False),
        (writes("b write 2 open", "a write 1 ok"), 1, False),
        (writes("a write 1 ok", "a delete 0 ok"), None, False),
        (writes("a write 1 ok", "a delete 0 ok"), 1, True),
    ],
)
def test_lost_writes(history: History, final: object, lost: bool) -> None:
    found = lost_writes(history, {"x": final})
    assert bool(found) == lost
    if lost:
        assert "was acknowledged" in str(found[0])
    assert lost_writes(history, {"y": 5}) == [], "nobody wrote y"


def test_lost_compare_and_set() -> None:
    history = History("register")
    history.ok(history.invoke("a", "write", ("c", 1), 1))
    history.ok(history.invoke("a", "cas", ("c", 1), [1, 2]), True)
    history.ok(history.invoke("a", "cas", ("c", 1), [1, 9]), False)
    assert lost_writes(history, {("c", 1): 2}) == []
    assert len(lost_writes(history, {("c", 1): 1})) == 1
    assert len(lost_writes(history, {("c", 1): 9})) == 1


def test_unequal_replicas() -> None:
    assert unequal_replicas({1: {"n1": "aa", "n2": "aa"}, 2: {}}) == []
    (violation,) = unequal_replicas({1: {"n1": "aa", "n2": "bb", "n3": "aa"}, 2: {"n1": "cc"}})
    assert str(violation) == "replicas are equal: group 1: n1, n3 have aa; n2 have bb"

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.events import Event
from gostore.viz.sampling import LINKS_MAX, PULSES_MAX, Gauges, Sampler, apply_states, figure, kind_of

NAMES = st.sampled_from(["n1", "n2", "n3", "client-7"])
MESSAGES = st.lists(st.tuples(NAMES, NAMES, st.sampled_from([("cls", "probe"), ("db", "get"), ("chunks", "put")])))


def recv(source: str, node: str, service: str, function: str) -> Event:
    more = {"frame": "request", "request": 1, "bytes": 1, "transport": "udp"}
    return Event(node, 1, "recv", 0, 0.0, None, {"from": source, "service": service, "function": function, **more})


@given(MESSAGES)
def test_every_message_is_counted_once(messages: list[tuple[str, str, tuple[str, str]]]) -> None:
    sampler = Sampler()
    for source, node, (service, function) in messages:
        sampler.add(recv(source, node, service, function))
    pulses, lines, states = sampler.take()
    assert sum(count for *_, count in pulses) == len(messages)
    assert {kind for _, _, kind, _ in pulses} <= {"gossip", "call", "copy"}
    assert (lines, states) == ([], [])
    assert sampler.take() == ([], [], [])


def test_a_storm_is_bounded_and_the_rare_drop_is_not_lost_in_it() -> None:
    sampler = Sampler()
    for i in range(3 * LINKS_MAX):
        sampler.add(recv(f"a{i}", "n1", "db", "get"))
        if i == 10:
            sampler.add(Event("n1", 1, "drop", 0, 0.0, None, {"peer": "n2", "reason": "link", "bytes": 9}))
    pulses, _, _ = sampler.take()
    assert len(pulses) == PULSES_MAX
    assert ["n1", "n2", "drop", 1] in pulses
    assert sampler.skipped == 2 * LINKS_MAX + 1


def test_the_views_own_questions_and_foreign_packets_are_not_shown() -> None:
    sampler = Sampler()
    sampler.add(recv("client-1", "n1", "admin", "status"))
    sampler.add(recv("client-1", "n1", "journal", "deliver"))
    sampler.add(Event("n1", 1, "drop", 0, 0.0, None, {"peer": "", "reason": "foreign", "bytes": 9}))
    assert sampler.take()[0] == []


def test_changes_of_state_are_kept_in_order_however_many(feed: ModuleType) -> None:
    source, sampler = feed.Feed(), Sampler()
    events = [source.event("n1", "suspect", member=f"m{i}", incarnation=1) for i in range(5000)]
    for event in events:
        sampler.add(event)
    assert sampler.take()[2] == events


@pytest.mark.parametrize(
    ("service", "function", "kind"),
    [("cls", "ping", "gossip"), ("db", "get", "call"), ("chunks", "put", "copy"), ("chunks", "has", "call")],
)
def test_kinds_of_pulses(service: str, function: str, kind: str) -> None:
    assert kind_of(service, function) == kind


def counted(time_s: float, calls: dict[str, tuple[int, int]], missing: int = 0) -> dict[str, object]:
    nodes = [
        {"name": name, "state": "online", "incarnation": life, "counters": {"calls": count}}
        for name, (life, count) in calls.items()
    ]
    return {"name": "c", "time_s": time_s, "nodes": nodes, "repair": {"missing": missing}}


def test_gauges_turn_counters_into_rates() -> None:
    gauges = Gauges()
    gauges.add(counted(10, {"n1": (1, 1000), "n2": (1, 500)}))
    gauges.add(counted(12, {"n1": (1, 1100), "n2": (1, 700)}, missing=4))
    # n1 was restarted: its counters start again; n2 is gone.
    gauges.add(counted(14, {"n1": (2, 60)}))
    # A snapshot that comes late says nothing new.
    gauges.add(counted(13, {"n1": (2, 10)}))
    assert list(gauges.points["calls"]) == [0, 150, 30]
    assert list(gauges.points["missing"]) == [0, 4, 0]
    assert gauges.shown()[0] == {"id": "calls", "label": "calls/s", "text": "30", "points": [0, 150, 30]}


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 10**6)), max_size=100))
def test_rates_are_never_negative_and_the_minute_is_bounded(steps: list[tuple[float, int]]) -> None:
    gauges, now = Gauges(points_max=60), 0.0
    for elapsed_s, count in steps:
        now += elapsed_s
        gauges.add(counted(now, {"n1": (1, count)}))
    assert all(point >= 0 for points in gauges.points.values() for point in points)
    assert len(gauges.points["calls"]) == min(len(steps), 60)


@pytest.mark.parametrize(("value", "words"), [(0, "0"), (3.14, "3.1"), (12.6, "13"), (8412, "8,412")])
def test_figures_for_people(value: float, words: str) -> None:
    assert figure(value) == words


def test_news_change_the_snapshot_before_the_next_one(feed: ModuleType) -> None:
    source, before = feed.Feed(), feed.snapshot(3)
    untouched = copy.deepcopy(before)
    after = apply_states(
        before,
        [
            source.event("n1", "suspect", member="n3", incarnation=1),
            source.event("n2", "suspect", member="n3", incarnation=1),
        ],
    )
    assert before == untouched
    assert after["nodes"][2]["suspect"] == ["n1", "n2"]
    refuted = apply_states(after, [source.event("n3", "refute", member="n3", incarnation=2)])
    assert refuted["nodes"][2]["suspect"] == []
    offline = apply_states(
        after,
        [
            source.event("n1", "member", member="n3", state="offline", epoch=8, path=[]),
            source.event("n1", "master", member="n2", epoch=8),
            # Late news of a node that lags behind.
            source.event("n2", "member", member="n3", state="online", epoch=7, path=[]),
        ],
    )
    assert (offline["nodes"][2]["state"], offline["master"], offline["epoch"]) == ("offline", "n2", 8)


def test_no_news_no_change(feed: ModuleType) -> None:
    source, before = feed.Feed(), feed.snapshot(3)
    same = [
        source.event("n1", "view", epoch=7, online=["n1"]),
        source.event("n1", "suspect", member="stranger", incarnation=1),
    ]
    assert apply_states(before, []) is before
    assert apply_states(before, same) is before


def test_the_winner_of_an_election_shows_at_once(feed: ModuleType) -> None:
    source, sampler = feed.Feed(), Sampler()
    snapshot = feed.snapshot(5, groups=feed.troubled())
    before = copy.deepcopy(snapshot)
    sampler.add(source.event("n2", "raft_leader", group="shard 0", term=6, leader="n2"))
    sampler.add(source.event("n3", "raft_leader", group="shard 0", term=5, leader="n3"))
    _, _, states = sampler.take()
    group = apply_states(snapshot, states)["groups"][1]
    assert (group["name"], group["leader"], group["term"], group["state"]) == ("shard 0", "n2", 6, "led")
    assert snapshot == before, "the snapshot itself is left alone"


@pytest.mark.parametrize("kind", ["raft_snapshot", "raft_configuration", "fault"])
def test_what_happens_to_a_group_asks_for_its_figures_anew(feed: ModuleType, kind: str) -> None:
    sampler = Sampler()
    data: dict[str, dict[str, Any]] = {
        "raft_snapshot": {"group": "shard 0", "index": 7, "term": 2, "bytes": 9},
        "raft_configuration": {"group": "shard 0", "index": 7, "voters": ["n1"], "learners": [], "outgoing": []},
        "fault": {"fault": "kill", "arguments": {"node": "n1"}},
    }
    sampler.add(feed.Feed().event("n2", kind, **data[kind]))
    assert [event.kind for event in sampler.take()[2]] == [kind]

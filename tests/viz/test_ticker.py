from __future__ import annotations

from types import ModuleType

import pytest

from gostore.core.events import CATEGORIES, KINDS
from gostore.viz.ticker import SILENT, Ticker, describe


def value_of(field: str) -> object:
    """Something a node might publish in a field of this name."""
    if field in ("path", "member", "error", "reason", "slot", "name", "task", "what", "source", "chunk", "key"):
        return f"some {field}"
    if field == "arguments":
        return {"nodes": ["n1", "n2"], "rate": 0.5}
    return 3


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_event_has_words(feed: ModuleType, kind: str) -> None:
    event = feed.Feed().event("n1", kind, **{field: value_of(field) for field in KINDS[kind][1]})
    tag, text = describe(event)
    assert tag in CATEGORIES
    assert text
    assert "{" not in text.replace("{n1, n2}", ""), "a format was not filled in"


def test_news_that_reaches_all_is_one_line(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker()
    for name in ("n1", "n2", "n3"):
        ticker.add(source.event(name, "member", member="n4", state="offline", epoch=8, path=["n1"]))
        source.at_s += 0.2
    ticker.add(source.event("n1", "member", member="n4", state="online", epoch=9, path=["n1"]))
    lines = ticker.lines()
    assert [line["text"] for line in lines] == [
        "n4 is offline, epoch 8; seen by n1, n2, n3",
        "n4 is online, epoch 9; seen by n1",
    ]
    assert lines[0]["nodes"] == ["n4", "n1", "n2", "n3"], "whom it is about comes first"
    assert lines[0]["time"] == "00:00.00"


def test_all_who_come_online_together_are_one_line(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker()
    for name in ("n1", "n2"):
        for member in ("n1", "n2"):
            ticker.add(source.event(name, "member", member=member, state="online", epoch=5, path=["n1"]))
        ticker.add(source.event(name, "node_ready", epoch=5))
    assert [line["text"] for line in ticker.lines()] == [
        "n1, n2 are online, epoch 5; seen by n1, n2",
        "n1, n2 are ready, epoch 5",
    ]


def test_lines_are_in_the_order_of_their_stamps(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker()
    for late_s in (0.0, -1.0, 0.5):
        source.at_s = 134 + late_s
        ticker.add(source.event("n1", "fault", fault=f"at {late_s}", arguments={}))
    assert [line["text"] for line in ticker.lines()] == ["at -1.0", "at 0.0", "at 0.5"]


def test_a_line_grows_in_its_place(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker()
    ticker.add(source.event("n1", "suspect", member="n4", incarnation=1))
    (first,) = ticker.take()
    ticker.add(source.event("n2", "suspect", member="n4", incarnation=1))
    (second,) = ticker.take()
    assert first["id"] == second["id"]
    assert (first["text"], second["text"]) == ("n4 suspected by n1", "n4 suspected by n1, n2")
    assert ticker.take() == []


def test_frequent_events_share_a_line_for_a_while(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker()
    for i in range(100):
        source.at_s = 134 + i * 0.1
        ticker.add(source.event("n1", "fs_write", path=f"/f{i}", size=10, version=1, chunks=0, duration_s=0.001))
    lines = ticker.lines()
    assert 4 <= len(lines) <= 6
    assert lines[0]["text"] == "write /f20 v1, 10 B in 1.0 ms and 20 more"


def test_lines_are_bounded_and_the_newest_stay(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker(lines_max=10)
    for i in range(50):
        ticker.add(source.event("n1", "fault", fault="kill", arguments={"node": f"n{i}"}))
    assert [line["text"] for line in ticker.lines()] == [f"kill node n{i}" for i in range(40, 50)]
    assert len(ticker.take()) == 10


def test_messages_are_no_lines(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker()
    for kind in SILENT:
        ticker.add(source.event("n1", kind, **{field: value_of(field) for field in KINDS[kind][1]}))
    ticker.add(source.event("n1", "fault", fault="link", arguments={"peer": "n2", "drop": 1.0}))
    assert ticker.lines() == []


def test_times_count_from_the_clusters_start(feed: ModuleType) -> None:
    source, ticker = feed.Feed(), Ticker()
    ticker.started_ms = feed.STARTED_MS
    ticker.add(source.event("n1", "node_ready", epoch=1))
    assert ticker.lines()[0]["time"] == "02:14.00"

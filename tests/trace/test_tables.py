"""Journals as pandas tables."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
from hypothesis import given
from trace_journals import Run, runs

from gostore.client.thread import client_thread
from gostore.core.errors import BadRequest, NotSupported
from gostore.core.events import KINDS, Event
from gostore.trace import Journal
from gostore.trace.tables import COLUMNS


def journal(*events: Event) -> Journal:
    j = Journal(client_thread())
    for event in events:
        j.append(event)
    return j


SUSPECT = Event("n1", 1, "suspect", 1 << 63, 1.0, None, {"member": "n3", "incarnation": 2})
VIEW = Event("n2", 1, "view", 5, 2.0, ("n1", 1), {"epoch": 7, "online": ["n1"]})
SYNC = Event("n1", 2, "wal_sync", 1 << 63, 3.0, None, {"records": 3, "bytes": 99, "duration_s": 0.25})


def test_a_row_for_each_event_with_its_fields_in_causal_order() -> None:
    table = journal(SYNC, VIEW, SUSPECT).table()
    fields = ["epoch", "online", "member", "incarnation", "records", "bytes", "duration_s"]
    assert list(table.columns) == [*COLUMNS, *fields]
    assert table.index.name == "order"
    # By its stamp the view is first, but the suspicion caused it.
    assert list(table["kind"]) == ["suspect", "view", "wal_sync"]
    assert list(table["stamp"]) == [1 << 63, 5, 1 << 63]
    assert table["stamp"].dtype == "uint64"
    row = table.iloc[1]
    assert (row["id"], row["cause"], row["online"], row["member"]) == (("n2", 1), ("n1", 1), ["n1"], None)


def test_numbers_stay_numbers() -> None:
    table = journal(SYNC).table("wal_sync")
    assert (table["bytes"].dtype, table["duration_s"].dtype) == ("int64", "float64")
    assert table["bytes"].sum() == 99


def test_rows_are_chosen_and_keep_their_place() -> None:
    j = journal(SUSPECT, VIEW, SYNC)
    assert list(j.table("view", "wal_sync").index) == [1, 2]
    assert list(j.table(nodes=["n1"]).index) == [0, 2]
    assert list(j.table(categories=["storage"])["kind"]) == ["wal_sync"]
    assert list(j.table(since_s=2.0, until_s=2.0)["kind"]) == ["view"]
    assert j.select(nodes=["n1"], since_s=1.5) == [SYNC]
    empty = j.table("commit")
    assert (len(empty), list(empty.columns)) == (0, list(COLUMNS))


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(BadRequest, match="no kind of event 'comit'"):
        journal().table("comit")
    with pytest.raises(BadRequest, match="no category 'dp'; there are message, cls"):
        journal().table(categories=["dp"])


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(NotSupported, match=r"needs pandas; run: pip install 'gostore\[notebook\]'"):
        journal(VIEW).table()


def test_no_field_hides_a_column() -> None:
    for kind, (_, fields) in KINDS.items():
        assert not set(fields) & set(COLUMNS), kind


@given(runs())
def test_receives_join_their_sends(run: Run) -> None:
    table = journal(*run.events).table()
    assert len(table) == len(run.events)
    if not len(table):
        return
    sends, received = table[table["kind"] == "send"], table[table["kind"] == "recv"]
    joined = pd.merge(received, sends, left_on="cause", right_on="id", suffixes=("", "_sent"))
    assert len(joined) >= len(received)

"""Journals as files: what is written is read again, and what is broken is refused by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from trace_journals import Run, runs

from gostore.client.thread import client_thread
from gostore.core.errors import BadRequest, NotSupported
from gostore.core.events import Event
from gostore.trace import Gap, Journal

VIEW = Event("n2", 1, "view", 5, 2.0, ("n1", 1), {"epoch": 7, "online": ["n1"]})


def journal(*events: Event, kept_max: int = 1000) -> Journal:
    j = Journal(client_thread(), kept_max=kept_max)
    for event in events:
        j.append(event)
    return j


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=runs())
def test_what_was_saved_is_loaded(run: Run, tmp_path: Path) -> None:
    j = journal(*run.events)
    j.save(tmp_path / "journal")
    loaded = Journal.load(tmp_path / "journal")
    assert list(loaded) == list(j)
    assert loaded.causality().events == j.causality().events
    assert loaded.complete


def test_what_is_missing_stays_known(tmp_path: Path) -> None:
    j = journal(VIEW, VIEW, VIEW, kept_max=2)
    j.begin("s", "n1", 1, 0)
    j.deliver("s", "n1", 1, 4, 5, 8, [])
    j.ended("n1", "was killed")
    j.save(tmp_path / "journal")
    loaded = Journal.load(str(tmp_path / "journal"))
    assert loaded.statistics() == j.statistics()
    assert loaded.gaps == (Gap("n1", 1, 0, 4, "the node's buffer was full"), Gap("n1", 1, 5, None, "was killed"))
    assert not loaded.complete


def test_bytes_are_written_as_digits(tmp_path: Path) -> None:
    data = {"shard": 1, "container": "c", "key": b"\xff\x01"}
    journal(Event("n1", 1, "conflict", 1, 0.0, None, data)).save(tmp_path / "journal")
    assert next(iter(Journal.load(tmp_path / "journal"))).data["key"] == "ff01"


def test_nobody_waits_for_a_file(tmp_path: Path) -> None:
    journal(VIEW).save(tmp_path / "journal")
    with pytest.raises(NotSupported, match="nothing more comes"):
        Journal.load(tmp_path / "journal").wait_for_sync("view")


HEADER: dict[str, Any] = {
    "format": "gostore journal", "version": 1, "events": 1, "position": 1, "sampled": 0, "gaps": [],
}  # fmt: skip
LINE: dict[str, Any] = {
    "node": "n2", "seq": 1, "kind": "view", "stamp": 5, "time_s": 2.0, "cause": None,
    "data": {"epoch": 7, "online": []},
}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("", "", "line 1: expected the header of a journal.*found an empty line"),
        ("[1]", "", "line 1: expected the header"),
        (HEADER | {"format": "jepsen"}, "", "line 1: expected the header of a journal"),
        (HEADER | {"version": 2}, "", "line 1: expected version 1, the only one there is; found version 2"),
        (HEADER | {"events": "1"}, LINE, "line 1: expected the header .* with events, position, sampled and gaps"),
        (HEADER | {"gaps": [["n1", 1]]}, LINE, r"line 1: expected gaps: .*found \['n1', 1\]"),
        (HEADER, "{", "line 2: expected an event: a JSON object with node, .*found '{'"),
        (HEADER, b"\xff\xfe", "line 2: expected an event"),
        (HEADER, "7", "line 2: expected an event"),
        (HEADER, LINE | {"seq": "one"}, "line 2: expected an event"),
        (HEADER, LINE | {"cause": ["n1"]}, "line 2: expected an event"),
        (HEADER, LINE | {"kind": "veiw"}, "line 2: expected one of the kinds .*view.*; found the kind 'veiw'"),
        (HEADER | {"events": 2}, LINE, "line 3: expected event 2 of 2; found the end of the file"),
    ],
)
def test_a_broken_file_is_refused_by_its_line(header: Any, line: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "journal"

    def encoded(what: Any) -> bytes:
        return what if isinstance(what, bytes) else (what if isinstance(what, str) else json.dumps(what)).encode()

    path.write_bytes(encoded(header) + b"\n" + (encoded(line) + b"\n" if line else b""))
    with pytest.raises(BadRequest, match=rf"{path}, {message}"):
        Journal.load(path)

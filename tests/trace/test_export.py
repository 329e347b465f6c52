"""Exports: a ShiViz log by ShiViz's own rules, a Perfetto trace by those of the Trace Event Format."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from trace_journals import Run, runs

from gostore.core.events import Event
from gostore.trace import export_perfetto, export_shiviz

with_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def shiviz(run: Run, path: Path) -> list[tuple[str, dict[str, int], str]]:
    """(host, clock, event text) as ShiViz reads them: the expression of the first line, over all the rest."""
    assert export_shiviz(run.events, path) == len(run.events)
    expression, delimiter, log = path.read_text().split("\n", 2)
    assert delimiter == ""
    python = expression.replace("(?<", "(?P<")
    found = list(re.finditer(python, log))
    assert "".join(match[0] + "\n" for match in found) == log, "every character belongs to an event"
    return [(match["host"], json.loads(match["clock"]), match["event"]) for match in found]


@with_files
@given(run=runs())
def test_a_shiviz_log_keeps_the_rules_of_its_vector_clocks(run: Run, tmp_path: Path) -> None:
    entries = shiviz(run, tmp_path / "log")
    latest: dict[str, dict[str, int]] = {}
    for host, clock, _ in entries:
        before = latest.get(host, {})
        assert clock[host] == before.get(host, 0) + 1, "the own component counts the host's events"
        assert all(clock.get(other, 0) >= count for other, count in before.items()), "no component goes back"
        for other, count in clock.items():
            assert count >= 1
            assert other == host or latest[other][other] >= count, "nobody knows of an event that is still to come"
        latest[host] = clock
    assert {host: clock[host] for host, clock in latest.items()} == {
        quote(node): sum(event.node == node for event in run.events) for node in {e.node: None for e in run.events}
    }


@with_files
@given(run=runs())
def test_shiviz_draws_exactly_the_messages(run: Run, tmp_path: Path) -> None:
    """The order by the clocks is that of the run."""
    entries = shiviz(run, tmp_path / "log")
    for host, clock, _ in entries:
        past = [e for e in entries if e[1][e[0]] <= clock.get(e[0], 0) and e[1] is not clock]
        index = next(
            i for i, e in enumerate(run.events)
            if quote(e.node) == host and sum(f.node == e.node for f in run.events[: i + 1]) == clock[host]
        )  # fmt: skip
        assert len(past) == run.before[index].bit_count()


def test_a_shiviz_log_of_texts_with_ends_of_lines(tmp_path: Path) -> None:
    run = Run()
    run.events = [Event("n\n1", 1, "node_stopping", 1, 0.5, None, {"reason": 'one\ntwo {"a": 1} ü'})]
    [(host, clock, text)] = shiviz(run, tmp_path / "log")
    assert (host, clock) == ("n%0A1", {"n%0A1": 1})
    assert text == 'node_stopping {"reason": "one\\ntwo {\\"a\\": 1} ü"}'


def perfetto(run: Run, path: Path) -> list[dict[str, Any]]:
    assert export_perfetto(run.events, path) == len(run.events)
    trace = json.loads(path.read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    return trace["traceEvents"]


REQUIRED = {
    "M": {"name", "pid", "tid", "args"},
    "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
    "i": {"name", "cat", "ts", "pid", "tid", "s", "args"},
    "b": {"name", "cat", "ts", "pid", "tid", "id2", "args"},
    "e": {"name", "cat", "ts", "pid", "tid", "id2"},
    "s": {"name", "cat", "ts", "pid", "tid", "id"},
    "f": {"name", "cat", "ts", "pid", "tid", "id", "bp"},
}
"""Phase -> what an entry of it must have, by the Trace Event Format."""


@with_files
@given(run=runs())
def test_a_perfetto_trace_is_well_formed(run: Run, tmp_path: Path) -> None:
    entries = perfetto(run, tmp_path / "trace")
    named = {(e["pid"], e["tid"]) for e in entries if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in entries if e["name"] == "process_name"}
    assert sorted(processes.values()) == sorted({event.node for event in run.events})
    for entry in entries:
        assert set(entry) - {"ph"} == REQUIRED[entry["ph"]]
        if entry["ph"] == "M":
            continue
        assert entry["ts"] >= 0
        assert (entry["pid"], entry["tid"]) in named
        assert entry["ph"] != "i" or entry["s"] in ("g", "p", "t")
        assert entry["ph"] != "f" or entry["bp"] == "e"
    shown = [entry for entry in entries if entry["ph"] in ("X", "i", "b")]
    assert len(shown) == len(run.events)
    begun = sorted((e["pid"], e["tid"], e["id2"]["local"]) for e in entries if e["ph"] == "b")
    assert begun == sorted((e["pid"], e["tid"], e["id2"]["local"]) for e in entries if e["ph"] == "e")


@with_files
@given(run=runs())
def test_slices_of_a_thread_nest_and_every_flow_has_two_ends_in_slices(run: Run, tmp_path: Path) -> None:
    entries = perfetto(run, tmp_path / "trace")
    slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for before, entry in zip([{}, *entries], entries, strict=False):
        if entry["ph"] == "X":
            slices.setdefault((entry["pid"], entry["tid"]), []).append((entry["ts"], entry["ts"] + entry["dur"]))
        if entry["ph"] in ("s", "f"):
            assert before["ph"] in ("X", "s"), "a flow stands right behind its slice"
            assert (before["pid"], before["tid"], before["ts"]) == (entry["pid"], entry["tid"], entry["ts"])
    for own in slices.values():
        own.sort()
        for (begin, end), (following, _) in itertools.pairwise(own):
            assert following == begin or following >= end - 1e-6
    starts = {e["id"]: e for e in entries if e["ph"] == "s"}
    ends = {e["id"]: e for e in entries if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(ends) == sum(event.kind == "recv" for event in run.events)
    assert all(starts[number]["ts"] <= ends[number]["ts"] for number in starts)


def test_faults_strike_everybody_or_one_node(tmp_path: Path) -> None:
    run = Run()
    kill = {"fault": "kill", "arguments": {"node": "n1"}}
    run.events = [
        Event("testbed", 1, "fault", 1, 1.0, None, kill),
        Event("n1", 1, "fault", 2, 2.0, None, {"fault": "link", "arguments": {}}),
        Event(
            "n1", 2, "fs_write", 3, 3.0, None, {"path": "/f", "size": 1, "version": 1, "chunks": 0, "duration_s": 2.5}
        ),
    ]
    entries = [e for e in perfetto(run, tmp_path / "trace") if e["ph"] != "M"]
    assert [(e["ph"], e["name"], e.get("s"), e["ts"]) for e in entries] == [
        ("i", "kill", "g", 500_000.0), ("i", "link", "p", 1_500_000.0),
        ("b", "fs_write", None, 0.0), ("e", "fs_write", None, 2_500_000.0),
    ]  # fmt: skip

"""A journal for other people's viewers: ShiViz and Perfetto.

ShiViz (Beschastnikh, Liu, Xing, Wang, Brun, Ernst: "Visualizing Distributed System Executions", TOSEM 29(2), 2020)
draws the space-time diagram of a log with vector clocks. Its file: the regular expression that reads the log, the one
that parts several executions (an empty line: there is one), then the log. Its rule: an event's own component is one
more than that of the event before it on the same host, from 1.

Perfetto and chrome://tracing read the Trace Event Format: a JSON object whose ``traceEvents`` have a phase ``ph``, a
time ``ts`` in microseconds, and a process and thread to stand on. Here a node is a process and a category one of its
threads; a message is a flow between two short slices.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from gostore.core.events import CATEGORIES, Event
from gostore.trace.causality import Causality
from gostore.trace.files import plain

SHIVIZ_REGEX: Final = r"(?<time>\S+) (?<kind>\S+) (?<event>.*)\n(?<host>\S+) (?<clock>\{.*\})"

MESSAGE_US: Final = 1.0
"""How long the slice of a send or receive is drawn, at most: a flow needs one to end at. Microseconds."""

TESTBED: Final = "testbed"
"""The node of faults that strike from outside."""


def export_shiviz(events: Iterable[Event] | Causality, path: str | Path) -> int:
    """Write a log for ShiViz; how many events. Hosts are the nodes, percent-encoded where a name has a space.

    Raises ``OSError``.
    """
    causality = _causality(events)
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in shiviz_lines(causality))
    return len(causality)


def shiviz_lines(causality: Causality) -> Iterator[str]:
    """The lines of the log: the two expressions, then two lines for each event."""
    yield SHIVIZ_REGEX
    yield ""
    for event, clock in causality.clocks():
        # The own component first, as people look for it.
        own = {event.node: clock[event.node]} | {node: clock[node] for node in sorted(clock)}
        yield f"{event.time_s:.6f} {event.kind} {sentence(event)}"
        yield f"{_host(event.node)} {json.dumps({_host(node): count for node, count in own.items()})}"


def sentence(event: Event) -> str:
    """The event in one line: its kind and its fields."""
    fields = json.dumps(dict(event.data), default=plain, ensure_ascii=False)
    return f"{event.kind} {fields}" if event.data else event.kind


def export_perfetto(events: Iterable[Event] | Causality, path: str | Path) -> int:
    """Write a trace for Perfetto (ui.perfetto.dev) or chrome://tracing; how many events it shows.

    Time zero is the earliest event; where an event has a duration, the event is at its end. Raises ``OSError``.
    """
    causality = _causality(events)
    Path(path).write_text(perfetto_json(causality) + "\n", encoding="utf-8")
    return len(causality)


def perfetto_json(causality: Causality) -> str:
    """The trace as one line of JSON."""
    trace = {
        "traceEvents": list(trace_events(causality)),
        "displayTimeUnit": "ms",
        "otherData": {"source": "GoStore journal", "events": len(causality)},
    }
    return json.dumps(trace, default=plain)


def trace_events(causality: Causality) -> Iterator[dict[str, Any]]:
    """The entries of the Trace Event Format."""
    processes = {node: number for number, node in enumerate(dict.fromkeys(e.node for e in _by_name(causality)), 1)}
    threads = {category: number for number, category in enumerate(CATEGORIES, 1)}
    yield from _names(causality, processes, threads)
    start_s = min((event.time_s - _duration_s(event) for event in causality.events), default=0.0)
    lengths = _slice_lengths(causality, start_s)
    flows = {id(event): number for number, event in enumerate(causality.events, 1) if event.kind == "recv"}
    arrivals: dict[int, list[int]] = {}
    for event in causality.events:
        send = causality.cause(event) if event.kind == "recv" else None
        if send is not None:
            arrivals.setdefault(id(send), []).append(flows[id(event)])
        else:
            flows.pop(id(event), None)
    for event in causality.events:
        place = {"pid": processes[event.node], "tid": threads[event.category]}
        at_us = _us(event.time_s - start_s)
        common = {"name": _title(event), "cat": event.category, "args": _arguments(event), **place}
        if event.category == "message":
            yield common | {"ph": "X", "ts": at_us, "dur": lengths[event.node, at_us]}
            # Right behind their slice: where several begin at one time, a flow belongs to the latest.
            flow = {"name": "message", "cat": "message", "ts": at_us, **place}
            for number in arrivals.get(id(event), ()):
                yield flow | {"ph": "s", "id": number}
            if id(event) in flows:
                yield flow | {"ph": "f", "bp": "e", "id": flows[id(event)]}
        elif "duration_s" in event.data:
            # Asynchronous slices: several files are written at a time, and slices of one thread must nest.
            own = {"id2": {"local": hex(event.seq)}}
            begin_us = _us(event.time_s - _duration_s(event) - start_s)
            yield common | own | {"ph": "b", "ts": begin_us}
            yield {"name": common["name"], "cat": event.category, "ph": "e", "ts": at_us, **own, **place}
        else:
            scope = "t" if event.category != "fault" else "g" if event.node == TESTBED else "p"
            yield common | {"ph": "i", "ts": at_us, "s": scope}


def _names(causality: Causality, processes: dict[str, int], threads: dict[str, int]) -> Iterator[dict[str, Any]]:
    for node, number in processes.items():
        yield {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": node}}
        yield {"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0, "args": {"sort_index": number}}
    for node, category in dict.fromkeys((event.node, event.category) for event in causality.events):
        place = {"ph": "M", "pid": processes[node], "tid": threads[category]}
        yield {"name": "thread_name", "args": {"name": category}, **place}
        yield {"name": "thread_sort_index", "args": {"sort_index": threads[category]}, **place}


def _slice_lengths(causality: Causality, start_s: float) -> dict[tuple[str, float], float]:
    """(node, microsecond) -> how long the slices of messages are there: they end before the next begin."""
    times: dict[str, dict[float, None]] = {}
    for event in causality.events:
        if event.category == "message":
            times.setdefault(event.node, {})[_us(event.time_s - start_s)] = None
    lengths = {}
    for node, found in times.items():
        order = sorted(found)
        for here, following in zip(order, [*order[1:], float("inf")], strict=True):
            lengths[node, here] = round(min(MESSAGE_US, following - here), 3)
    return lengths


def _title(event: Event) -> str:
    data = event.data
    if event.kind in ("send", "recv"):
        called = f" {data['service']}.{data['function']}" if data.get("function") else ""
        return f"{event.kind} {data.get('frame', '')}{called}"
    if event.kind == "fault":
        return str(data.get("fault", "fault"))
    return event.kind


def _arguments(event: Event) -> dict[str, Any]:
    # As text: a 64-bit stamp is more than a JavaScript number holds.
    return {**event.data, "seq": event.seq, "stamp": str(event.stamp)}


def _duration_s(event: Event) -> float:
    found = event.data.get("duration_s", 0.0)
    return float(found) if isinstance(found, float | int) else 0.0


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _host(node: str) -> str:
    return quote(node, safe="@:+=,~") or "-"


def _by_name(causality: Causality) -> list[Event]:
    return sorted(causality.events, key=lambda event: (event.node == TESTBED, len(event.node), event.node))


def _causality(events: Iterable[Event] | Causality) -> Causality:
    return events if isinstance(events, Causality) else Causality(events)

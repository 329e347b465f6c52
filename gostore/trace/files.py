"""A journal as a file of JSON lines: a header, then one event a line, in the order of their arrival.

    {"format": "gostore journal", "version": 1, "events": 2, "position": 2, "sampled": 0, "gaps": []}
    {"node": "n1", "seq": 1, "kind": "node_started", "stamp": 115, "time_s": 0.1, "cause": null, "data": {...}}

Bytes in the fields of an event are written as hexadecimal digits. A file with an error is refused by the number of the
line; what is read is never guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from gostore.core.errors import BadRequest
from gostore.core.events import KINDS, Event

FORMAT: Final = "gostore journal"
VERSION: Final = 1

_EVENT: Final = "an event: a JSON object with node, seq, kind, stamp, time_s, cause and data"


def write(path: Path, header: Mapping[str, Any], events: Iterable[Event]) -> None:
    """Raises ``OSError``."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, "version": VERSION, **header}) + "\n")
        for event in events:
            fields = {
                name: getattr(event, name) for name in ("node", "seq", "kind", "stamp", "time_s", "cause", "data")
            }
            file.write(json.dumps(fields, default=plain) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Event]]:
    """Header and events. Raises :class:`BadRequest` that names file, line and what was expected, and ``OSError``."""
    events = []
    with path.open("rb") as file:
        header = _header(path, file.readline())
        for number, line in enumerate(file, 2):
            events.append(_event(path, number, line))
    if len(events) != header["events"]:
        raise _wrong(path, len(events) + 2, f"event {len(events) + 1} of {header['events']}", "the end of the file")
    return header, events


def plain(value: Any) -> Any:
    """What JSON has no word for."""
    return bytes(value).hex() if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _header(path: Path, line: bytes) -> dict[str, Any]:
    expected = f'the header of a journal, {{"format": "{FORMAT}", "version": {VERSION}, ...}}'
    header = _json(path, 1, line, expected)
    if header.get("format") != FORMAT:
        raise _wrong(path, 1, expected, _shown(line))
    if header.get("version") != VERSION:
        raise _wrong(path, 1, f"version {VERSION}, the only one there is", f"version {header.get('version')!r}")
    match header:
        case {"events": int(), "position": int(), "sampled": int(), "gaps": list(gaps)}:
            for gap in gaps:
                match gap:
                    case [str(), int(), int(), int() | None, str()]:
                        continue
                raise _wrong(path, 1, "gaps: lists of node, incarnation, after, upto and reason", repr(gap))
            return header
    raise _wrong(path, 1, f"{expected} with events, position, sampled and gaps", _shown(line))


def _event(path: Path, number: int, line: bytes) -> Event:
    match _json(path, number, line, _EVENT):
        case {
            "node": str(node), "seq": int(seq), "kind": str(kind), "stamp": int(stamp),
            "time_s": float() | int() as time_s, "cause": [str(), int()] | None as cause, "data": dict(data),
        }:  # fmt: skip
            if kind not in KINDS:
                raise _wrong(path, number, f"one of the kinds {', '.join(sorted(KINDS))}", f"the kind {kind!r}")
            return Event(node, seq, kind, stamp, float(time_s), tuple(cause) if cause else None, data)
    raise _wrong(path, number, _EVENT, _shown(line))


def _json(path: Path, number: int, line: bytes, expected: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        raise _wrong(path, number, expected, _shown(line)) from None
    if not isinstance(found, dict):
        raise _wrong(path, number, expected, _shown(line))
    return found


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 80 else text[:79] + "…") if text else "an empty line"


def _wrong(path: Path, line: int, expected: str, found: str) -> BadRequest:
    return BadRequest(f"{path}, line {line}: expected {expected}; found {found}")

"""From events to the text of a file in one of the formats that ``gostore trace`` knows."""

from __future__ import annotations

from collections.abc import Sequence

from gostore.core.events import Event
from gostore.trace.causality import Causality
from gostore.trace.export import perfetto_json, shiviz_lines
from gostore.trace.tables import table


def convert(events: Sequence[Event], form: str) -> str:
    """``form``: ``shiviz``, ``perfetto`` or ``table`` (CSV). Raises :class:`NotSupported` when pandas is missing."""
    causality = Causality(events)
    if form == "shiviz":
        return "\n".join(shiviz_lines(causality))
    if form == "perfetto":
        return perfetto_json(causality)
    return str(table(causality, range(len(causality))).to_csv()).rstrip("\n")

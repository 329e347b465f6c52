"""One page of what several shards answered to a scan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gostore.core.keyvalue import Entry, Page, RangeRead
from gostore.core.values import unpack
from gostore.services.db.shard import SCAN_SIZE_BYTES_MAX


def merge_pages(container: str, start: str, end: str | None, limit: int, answers: Mapping[int, Any]) -> Page:
    """One page of the answers of several shards, each [rows of key, version, packed; whether there are more; index].

    What was read of every shard ends where the page ends, and the ranges say so.
    """
    rows = sorted(
        (key, version, packed, shard) for shard, answer in answers.items() for key, version, packed in answer[0]
    )
    # No shard that was cut short may be asked for more than it has told.
    known = [answer[0][-1][0] for answer in answers.values() if answer[1]]
    cut = min(known) if known else None
    taken: list[tuple[str, int, bytes, int]] = []
    size = 0
    for row in rows:
        size += len(row[2])
        if (cut is not None and row[0] > cut) or len(taken) >= limit or (taken and size > SCAN_SIZE_BYTES_MAX):
            cut = taken[-1][0]
            break
        taken.append(row)
    next_start = None if cut is None else cut + "\0"
    ranges = []
    for shard in answers:
        versions = [version for _, version, _, where in taken if where == shard]
        upto = end if next_start is None else next_start
        ranges.append(RangeRead(container, start, upto, shard, len(versions), max(versions, default=0)))
    return Page(
        tuple(Entry(key, unpack(packed), version) for key, version, packed, _ in taken),
        next_start,
        tuple(ranges),
        {shard: answer[2] for shard, answer in answers.items()},
    )

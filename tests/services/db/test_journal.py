"""The journal of a replica: whatever it wrote, reopening it gives the same log, promises and snapshot."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.core.errors import Corrupt
from gostore.services.db import journal as journal_module
from gostore.services.db.entries import (
    COMMAND,
    CONFIGURATION,
    PROMISES_MAX,
    Configuration,
    LogEntry,
    Point,
    Promise,
    Run,
    common_point,
    entries_from_wire,
    entries_to_wire,
    pack_members,
    remember,
)
from gostore.services.db.journal import Journal
from gostore.storage.wal import Record, Wal


class Records:
    """The part of the node's log that a journal uses, in memory; ``synced`` survives a loss of power."""

    def __init__(self, records: list[Record] | None = None) -> None:
        self.all = list(records or [])
        self.synced = len(self.all)

    def last_index(self, group: int) -> int:
        return self.all[-1].index if self.all else 0

    def append(self, group: int, term: int, index: int, payload: bytes, kind: int = 0) -> None:
        assert index == self.last_index(group) + 1
        self.all.append(Record(group, term, index, kind, payload))

    async def sync(self) -> None:
        self.synced = len(self.all)

    def truncate_prefix(self, group: int, index: int) -> None:
        kept = [record for record in self.all if record.index >= index]
        self.synced -= len(self.all) - len(kept)
        self.all = kept

    def records(self, group: int) -> Iterator[Record]:
        return iter(self.all)


def finish(coroutine: Coroutine[Any, Any, None]) -> None:
    """Nothing here ever waits."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


@dataclass
class Opened:
    journal: Journal
    records: Records
    restored: list[bytes] | None = None


def reopen(records: list[Record]) -> Opened:
    kept = Records(records)
    restored: list[list[bytes]] = []
    journal = Journal(cast(Wal, kept), 1, restored.append)
    return Opened(journal, kept, restored[-1] if restored else None)


def entries(journal: Journal, start: int) -> list[LogEntry]:
    return [journal.entry(index) for index in range(start, journal.last.index + 1)]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 2)),
        st.tuples(st.just("configure"), st.integers(1, 3)),
        st.tuples(st.just("truncate"), st.integers(0, 3)),
        st.tuples(st.just("promise"), st.integers(1, 3)),
        st.tuples(st.just("apply"), st.integers(0, 5)),
        st.tuples(st.just("compact"), st.integers(0, 2)),
        st.tuples(st.just("install"), st.integers(1, 5)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=25,
)


class Driver:
    """Does what a replica does, and knows what should be there."""

    def __init__(self) -> None:
        self.opened = reopen([])
        self.applied = 0
        self.term = 1
        self.snapshot: tuple[Point, list[bytes]] | None = None

    def run(self, operation: str, argument: int) -> None:
        getattr(self, operation)(argument)

    @property
    def journal(self) -> Journal:
        return self.opened.journal

    def append(self, argument: int) -> None:
        self.term += argument // 2
        index = self.journal.last.index + 1
        self.journal.append(LogEntry(self.term, index, COMMAND, b"%d" % index * argument))

    def configure(self, argument: int) -> None:
        index = self.journal.last.index + 1
        payload = pack_members(("a", "b", "c")[:argument], argument)
        self.journal.append(LogEntry(self.term, index, CONFIGURATION, payload))

    def truncate(self, argument: int) -> None:
        self.journal.truncate(max(self.applied, self.journal.last.index - argument) + 1)

    def promise(self, argument: int) -> None:
        self.term += 1
        self.journal.make_promise(Promise(self.term, "a", ("a", "b", "c")[:argument], argument))

    def apply(self, argument: int) -> None:
        self.applied = min(self.applied + argument, self.journal.last.index)
        self.journal.trim(self.applied)

    def compact(self, argument: int) -> None:
        if not self.applied:
            return
        term = self.journal.term(self.applied)
        assert term is not None
        at, pieces = Point(self.applied, term), [b"piece %d" % number for number in range(argument)]
        self.journal.begin_compaction(at)
        for piece in pieces:
            self.journal.add_piece(piece)
            self.append(1)  # others write meanwhile
        finish(self.journal.end_snapshot(reset=False))
        self.snapshot = (at, pieces)

    def install(self, argument: int) -> None:
        self.term += 1
        at = Point(self.journal.last.index + argument, self.term)
        self.journal.begin_installation(at, Configuration(("a",), 1, 1, 1))
        self.journal.add_piece(b"from elsewhere")
        finish(self.journal.end_snapshot(reset=True))
        self.snapshot, self.applied = (at, [b"from elsewhere"]), at.index

    def clear(self, argument: int) -> None:
        finish(self.journal.clear())
        self.snapshot, self.applied = None, 0


@settings(max_examples=300, deadline=None)
@given(operations)
def test_reopening_gives_the_same(steps: list[tuple[str, int]]) -> None:
    driver = Driver()
    for operation, argument in steps:
        driver.run(operation, argument)
        check_reopened(driver)


def check_reopened(driver: Driver) -> None:
    journal, again = driver.journal, reopen(driver.opened.records.all)
    assert again.journal.last == journal.last
    assert again.journal.promises == journal.promises
    assert again.journal.configuration == journal.configuration
    start = driver.applied + 1
    assert entries(again.journal, start) == entries(journal, start)
    if driver.snapshot is None:
        assert again.restored is None
        assert again.journal.start.index == 0
    else:
        assert again.restored == driver.snapshot[1]
        assert again.journal.start == driver.snapshot[0], "the entries that follow are to be applied again"


@settings(max_examples=200, deadline=None)
@given(operations, st.data(), operations)
def test_any_prefix_of_the_records_can_be_opened(
    steps: list[tuple[str, int]], data: Any, more: list[tuple[str, int]]
) -> None:
    """A loss of power leaves what was synced and any part of the rest; the replica goes on from there."""
    driver = Driver()
    promised = 0
    for operation, argument in steps:
        driver.run(operation, argument)
        finish(driver.opened.records.sync())
        promised = driver.journal.promise.generation if driver.journal.promise else 0
    synced, last = driver.opened.records.synced, driver.journal.last
    last_operation = data.draw(st.sampled_from(["append", "promise", "compact", "install", "clear", "truncate"]))
    held = list(driver.opened.records.all)
    driver.run(last_operation, 1)
    # What the operation dropped may be there still, as the dropping itself was not synced.
    written = [record for record in driver.opened.records.all if not held or record.index > held[-1].index]
    cut = data.draw(st.integers(0, len(written)))
    again = reopen(held[:synced] + written[:cut])
    assert (again.journal.promise.generation if again.journal.promise else 0) >= promised
    if last_operation in ("append", "promise", "compact"):
        assert again.journal.last.index >= last.index
    driver.opened, driver.applied = again, again.journal.start.index
    if again.restored is None:
        driver.snapshot = None
    else:
        driver.snapshot = (again.journal.start, again.restored)
    for operation, argument in more:
        driver.run(operation, argument)
        check_reopened(driver)


def test_trimming_keeps_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "WINDOW_ENTRIES_MAX", 3)
    driver = Driver()
    driver.configure(2)
    for _ in range(9):
        driver.append(1)
    driver.apply(5)
    assert driver.journal.start.index == 5
    assert driver.journal.term(5) == 1
    assert driver.journal.term(4) is None
    assert driver.journal.configuration == Configuration(("a", "b"), 2, 1, 1)
    assert [entry.index for entry in entries(driver.journal, 6)] == [6, 7, 8, 9, 10]


def test_records_that_do_not_follow_are_refused() -> None:
    driver = Driver()
    driver.append(1)
    driver.append(1)
    records = driver.opened.records.all
    with pytest.raises(Corrupt, match="entry 2 follows 0"):
        reopen([records[1]._replace(index=1)])
    with pytest.raises(Corrupt, match="two terms"):
        reopen([*records, records[1]._replace(index=3, term=9)])
    with pytest.raises(Corrupt, match="kind 5"):
        reopen([records[0]._replace(kind=5)])
    driver.apply(2)
    driver.compact(1)
    first = driver.opened.records.all[0]
    with pytest.raises(Corrupt, match="no end"):
        reopen([first])


runs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=4)


@given(runs, runs, st.integers(0, 3))
def test_two_logs_meet_at_their_last_common_entry(mine: Any, theirs: Any, shared: int) -> None:
    """Logs in which an entry with the same index and term has the same history, as generations guarantee."""

    def build(parts: list[tuple[int, int]], offset: int) -> list[int]:
        terms: list[int] = [1] * shared
        for step, (_, length) in enumerate(parts):
            terms += [2 + offset + 2 * step] * length
        return terms

    def to_runs(terms: list[int]) -> list[Run]:
        found = [Run(0, 0, 0)]
        for index, term in enumerate(terms, 1):
            if found[-1].term == term:
                found[-1] = found[-1]._replace(last=index)
            else:
                found.append(Run(term, index, index))
        return found

    first, second = build(mine, 0), build(theirs, 1)
    point = common_point(to_runs(first), to_runs(second))
    assert point == Point(shared, 1 if shared else 0)
    assert common_point(to_runs(first), to_runs(first)) == Point(len(first), first[-1] if first else 0)
    assert common_point(to_runs(first)[1:], [Run(77, 5, 9)]) is None


def test_entries_travel() -> None:
    sent = [LogEntry(1, 5, COMMAND, b"abc"), LogEntry(2, 6, CONFIGURATION, b""), LogEntry(2, 7, COMMAND, b"z")]
    heads, data = entries_to_wire(sent)
    assert list(entries_from_wire(heads, data)) == sent
    with pytest.raises(Corrupt):
        list(entries_from_wire(heads, data + b"x"))


def test_promises_are_remembered_by_their_plan() -> None:
    promises: tuple[Promise, ...] = ()
    for generation in range(1, 6):
        promises = remember(promises, Promise(generation, "a", ("a", "b") if generation % 2 else ("b", "c"), 2))
    assert [promise.generation for promise in promises] == [4, 5]
    for generation in range(6, 6 + 3 * PROMISES_MAX):
        promises = remember(promises, Promise(generation, "a", ("a", f"n{generation}"), 2))
    assert len(promises) == PROMISES_MAX
    assert promises[-1].generation == 5 + 3 * PROMISES_MAX
    assert len(promises[0].planned) > 50, "what was taken together names all who may know"

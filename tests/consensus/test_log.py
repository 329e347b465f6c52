"""The log against a plain list: whatever is appended, truncated, installed, compacted, handed out and synced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gostore.consensus import COMMAND, CONFIGURATION, NOOP, ORIGIN, PROFILES, Configuration, Entry, Point, Restored
from gostore.consensus.log import RaftLog
from gostore.consensus.ready import HardState, Snapshot

TUNABLES = replace(PROFILES["fast"], cache_entries_max=3, cache_size_bytes_max=20, committed_size_bytes_max=15)
FIRST = Configuration(("a", "b", "c"))
CONFIGURATIONS = (Configuration(("a",)), Configuration(("b", "c"), ("a",)), Configuration(("d",), (), ("a", "b")))


class Machine(RuleBasedStateMachine):
    """``all``: every entry since ``start``. ``disk``: the driver's records; ``syncs``: what a report vouches for."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.base = ORIGIN, FIRST
        self.all: list[Entry] = []
        self.disk: list[Entry] = []
        self.number = 0
        self.syncs: deque[tuple[int, int]] = deque()
        self.durable = 0
        self.log = RaftLog(Restored(configuration=FIRST), self, TUNABLES)

    # the storage

    def entries(self, first: int, last: int) -> Iterable[Entry]:
        found = [entry for entry in self.disk if first <= entry.index <= last]
        assert found
        assert found[-1].index <= self.durable, "read before it is on the medium"
        return found[:2]

    def snapshot(self) -> Snapshot | None:
        raise AssertionError("not asked for here")

    @property
    def last(self) -> Point:
        return Point(self.all[-1].index, self.all[-1].term) if self.all else self.start

    @rule(
        terms=st.lists(st.integers(0, 2), min_size=1, max_size=5),
        kind=st.sampled_from((COMMAND, COMMAND, NOOP, CONFIGURATION)),
        size=st.integers(0, 9),
        which=st.sampled_from(CONFIGURATIONS),
    )
    def append(self, terms: list[int], kind: int, size: int, which: Configuration) -> None:
        term, new = max(1, self.last.term), []
        for index, step in enumerate(terms, self.last.index + 1):
            term += step
            new.append(Entry(term, index, kind, which.pack() if kind == CONFIGURATION else bytes(size)))
        self.log.append(new)
        self.all += new

    @precondition(lambda self: self.last.index > self.log.committed)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(self.log.committed + 1, self.last.index))
        self.log.truncate(index)
        self.all = [entry for entry in self.all if entry.index < index]
        self.durable = min(self.durable, index - 1)
        self.syncs = deque((number, min(last, index - 1)) for number, last in self.syncs)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        before = self.log.committed
        index = data.draw(st.integers(self.start.index, self.last.index))
        assert self.log.commit(index) == (index > before)
        assert self.log.committed == max(before, index)

    @rule()
    def ready(self) -> None:
        """Apply and hand out, as the core does for its driver."""
        before = self.log.applied
        applied = self.log.next_committed()
        assert applied == [entry for entry in self.all if before < entry.index <= self.log.applied]
        assert bool(applied) == (before < self.log.committed)
        assert len(applied) <= 1 or sum(len(entry.payload) for entry in applied) <= TUNABLES.committed_size_bytes_max
        unwritten, self.number = self.log.unwritten, self.number + 1
        truncate_from, entries = self.log.hand_out(self.number)
        assert unwritten == (truncate_from is not None or bool(entries))
        if truncate_from is not None:
            self.disk = [entry for entry in self.disk if entry.index < truncate_from]
        self.disk += entries
        assert [entry for entry in self.disk if entry.index > self.start.index] == self.all
        self.syncs.append((self.number, self.last.index))
        assert not self.log.unwritten
        self.log.trim()

    @precondition(lambda self: self.syncs)
    @rule(count=st.integers(1, 3))
    def sync(self, count: int) -> None:
        number = 0
        for _ in range(min(count, len(self.syncs))):
            number, last = self.syncs.popleft()
            self.durable = max(self.durable, last)
        self.log.persisted(number)
        self.log.trim()

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(self.start.index, self.log.applied))
        term = self.log.term(index)
        assert term is not None
        self.base = self.log.configuration_at(index)
        self.log.compact(index)
        self.start = Point(index, term)
        self.all = [entry for entry in self.all if entry.index > index]

    @rule(ahead=st.integers(1, 5), newer=st.integers(0, 2), which=st.sampled_from(CONFIGURATIONS))
    def install(self, ahead: int, newer: int, which: Configuration) -> None:
        self.start = Point(self.log.committed + ahead, max(1, self.last.term) + newer)
        self.base = which
        self.log.install(self.start, which)
        self.all, self.disk = [], []
        self.durable = 0
        self.syncs = deque((number, 0) for number, _ in self.syncs)

    @rule()
    def restart(self) -> None:
        """All was synced, and the log is made again of it."""
        self.ready()
        restored = Restored.of(HardState(), self.start, self.base, self.all)
        committed = self.log.committed
        self.durable, self.number = self.last.index, 0
        self.log = RaftLog(restored, self, TUNABLES)
        self.log.commit(committed)
        self.syncs.clear()

    @invariant()
    def it_is_the_list(self) -> None:
        log = self.log
        assert (log.start, log.last) == (self.start, self.last)
        assert log.durable == self.durable
        terms = {self.start.index: self.start.term, **{entry.index: entry.term for entry in self.all}}
        for index in range(self.start.index + 3 + len(self.all)):
            assert log.term(index) == terms.get(index)
        configurations = [(self.start.index, self.base)]
        configurations += [
            (entry.index, Configuration.unpack(entry.payload)) for entry in self.all if entry.kind == CONFIGURATION
        ]
        assert (log.configuration_index, log.configuration) == configurations[-1]
        for index in terms:
            assert log.configuration_at(index) == [made for at, made in configurations if at <= index][-1]
        assert log.may_stand("a") == any(
            made.is_voter("a")
            for (_, made), (following, _) in zip(configurations, [*configurations[1:], (1 << 60, FIRST)], strict=True)
            if following > log.committed
        )

    @invariant()
    def the_hint_is_the_last_place_that_may_be_shared(self) -> None:
        terms = {self.start.index: self.start.term, **{entry.index: entry.term for entry in self.all}}
        for point in (Point(self.last.index, 2), Point(self.last.index + 3, 3), Point(self.start.index + 1, 1)):
            fitting = [index for index, term in terms.items() if index <= point.index and term <= point.term]
            index = max(fitting, default=self.start.index)
            assert self.log.last_not_above(point) == Point(index, terms[index])

    @precondition(lambda self: self.all and not self.log.unwritten)
    @rule(data=st.data(), size=st.integers(1, 30), count=st.integers(1, 9))
    def slice(self, data: st.DataObject, size: int, count: int) -> None:
        first = data.draw(st.integers(self.start.index + 1, self.last.index))
        last = data.draw(st.integers(first, self.last.index))
        found = self.log.slice(first, last, size, count)
        assert found == self.all[first - self.start.index - 1 :][: len(found)]
        assert 0 < len(found) <= min(count, last - first + 1)
        assert len(found) == 1 or sum(len(entry.payload) for entry in found) <= size


def test_the_log_is_the_list() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


class Shelf:
    """A storage that counts how often it is asked."""

    def __init__(self, kept: list[Entry]) -> None:
        self.kept = kept
        self.asked = 0

    def entries(self, first: int, last: int) -> Iterable[Entry]:
        self.asked += 1
        return self.kept[first - 1 : last]

    def snapshot(self) -> Snapshot | None:
        return None


def test_only_so_much_is_kept_in_memory() -> None:
    kept = [Entry(1, index, COMMAND, bytes(5)) for index in range(1, 101)]
    shelf = Shelf(kept)
    log = RaftLog(Restored(configuration=FIRST), shelf, TUNABLES)
    for entry in kept:
        log.append([entry])
        log.hand_out(entry.index)
        log.persisted(entry.index)
        log.commit(entry.index)
        assert log.next_committed() == [entry]
        log.trim()
    assert log.size_between(1, 100) <= 2 * TUNABLES.cache_size_bytes_max
    assert log.slice(99, 100, 100) == kept[98:]
    assert shelf.asked == 0
    assert log.slice(1, 100, 10_000)[0] == kept[0]
    assert [log.term(1), log.term(100), log.term(101)] == [1, 1, None]
    assert shelf.asked == 1


def test_what_is_not_applied_or_not_synced_stays_in_memory() -> None:
    new = [Entry(1, index, COMMAND, bytes(5)) for index in range(1, 51)]
    shelf = Shelf([])
    log = RaftLog(Restored(configuration=FIRST), shelf, TUNABLES)
    log.append(new)
    log.hand_out(1)
    log.commit(50)
    while log.next_committed():
        log.trim()
    assert log.slice(1, 50, 10_000) == new
    log.persisted(1)
    log.trim()
    assert log.size_between(1, 50) <= TUNABLES.cache_size_bytes_max
    assert shelf.asked == 0

"""The records of one replica: whatever a crash leaves of them, it is the state before or after what was being done."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.consensus import COMMAND, ORIGIN, Configuration, Entry, HardState, Point
from gostore.consensus import journal as module
from gostore.consensus.journal import Journal
from gostore.consensus.pieces import FRAGMENT_SIZE_BYTES_MAX, fragments, pieces_of
from gostore.consensus.ready import Restored
from gostore.core.errors import Corrupt, NotSupported, Unavailable
from gostore.storage.wal import Record

GROUP = 3


class Log:
    """The part of the node's log that a journal uses, in memory. ``room``: records that it still takes."""

    def __init__(self, records: list[Record] | None = None) -> None:
        self.all = list(records or [])
        self.next = self.all[-1].index + 1 if self.all else 1
        self.room: float = math.inf

    def last_index(self, group: int) -> int:
        return self.next - 1

    def append_all(self, group: int, index: int, entries: list[tuple[int, int, bytes]]) -> None:
        assert (group, index) == (GROUP, self.next)
        if len(entries) > self.room:
            raise Unavailable("the log is full")
        self.all += [Record(group, term, place, kind, data) for place, (term, kind, data) in enumerate(entries, index)]
        self.next += len(entries)
        self.room -= len(entries)

    def append(self, group: int, term: int, index: int, payload: bytes, kind: int = 0) -> None:
        self.append_all(group, index, [(term, kind, payload)])

    def truncate_prefix(self, group: int, index: int) -> None:
        self.all = [record for record in self.all if record.index >= index]

    def term(self, group: int, index: int) -> int:
        return self.all[index - self.all[0].index].term

    def records(self, group: int, start: int | None = None) -> Iterator[Record]:
        return iter([record for record in self.all if start is None or record.index >= start])


def open_journal(log: Log) -> Journal:
    return Journal(log, GROUP)  # type: ignore[arg-type]


class Model:
    """What the records amount to."""

    def __init__(self) -> None:
        self.hard = HardState()
        self.start = ORIGIN
        self.configuration = Configuration(("a", "b", "c"))
        self.entries: list[Entry] = []
        self.state: list[bytes] = []
        self.tomb = ORIGIN

    @property
    def last(self) -> int:
        return self.start.index + len(self.entries)

    def term(self, index: int) -> int:
        return self.entries[index - self.start.index - 1].term if index > self.start.index else self.start.term

    def fields(self) -> Any:
        return (self.hard, self.start, self.configuration, self.entries, self.state, self.tomb)


def fields(journal: Journal) -> Any:
    restored = journal.restored()
    entries = list(journal.standing())
    assert restored == Restored.of(restored.hard_state, restored.start, restored.configuration, entries)
    return (
        restored.hard_state, restored.start, restored.configuration, entries, journal.take_state(), journal.tomb
    )  # fmt: skip


class Run:
    """Random operations on a journal and its model. ``before``: the model at the last step."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.log = Log()
        self.model = Model()
        self.journal = open_journal(self.log)
        self.journal.found(self.model.configuration)
        self.compaction: Any = None
        self.compacted: tuple[Point, Configuration, list[bytes]] | None = None
        self.installing: tuple[Point, Configuration, list[bytes], list[bytes]] | None = None
        self.number = 0

    def payload(self) -> bytes:
        self.number += 1
        return b"%d" % self.number

    def append(self) -> None:
        term = max(self.model.term(self.model.last), self.rng.randint(1, 9))
        entry = Entry(term, self.model.last + 1, COMMAND, self.payload())
        self.journal.append([entry])
        self.model.entries.append(entry)

    def truncate(self) -> None:
        # What a snapshot stands for is committed; so is what one under way stands for.
        floor = self.model.start.index
        if self.compacted and self.journal.is_open(self.compaction):
            floor = self.compacted[0].index
        if self.model.last > floor:
            index = self.rng.randint(floor + 1, self.model.last)
            self.journal.truncate(index)
            del self.model.entries[index - self.model.start.index - 1 :]

    def write_hard(self) -> None:
        self.model.hard = HardState(self.rng.randint(1, 9), self.rng.choice(["a", None]), self.rng.randint(0, 9))
        self.journal.write_hard(self.model.hard)

    def begin_compaction(self) -> None:
        if self.model.entries:
            index = self.rng.randint(self.model.start.index + 1, self.model.last)
            point = Point(index, self.model.term(index))
            configuration = Configuration((f"v{index}",))
            self.log.room = self.rng.choice([math.inf, math.inf, self.rng.randint(0, 12)])
            try:
                self.compaction = self.journal.begin_compaction(point, configuration, self.rng.randint(0, 5))
            except Unavailable:
                self.compacted = None
                return
            finally:
                self.log.room = math.inf
            self.compacted = (point, configuration, [self.payload() for _ in range(self.rng.randint(0, 3))])
            self.left = list(fragments(self.compacted[2]))

    def go_on_compacting(self) -> None:
        if self.compacted is None or not self.journal.is_open(self.compaction):
            self.compacted = None
        elif self.left:
            self.journal.add_piece(self.left.pop(0))
        else:
            point, configuration, state = self.compacted
            position = self.journal.end_compaction()
            entries = [entry for entry in self.model.entries if entry.index > point.index]
            model = self.model
            model.start, model.configuration, model.entries, model.state = point, configuration, entries, state
            self.compacted = None
            self.drop(position)

    def begin_installation(self) -> None:
        point = Point(self.model.start.index + self.rng.randint(1, 12), max(1, self.model.term(self.model.last)))
        state = [self.payload() for _ in range(self.rng.randint(0, 3))]
        self.installing = (point, Configuration((f"i{point.index}",)), state, list(fragments(state)))
        self.journal.begin_installation(*self.installing[:2])

    def go_on_installing(self) -> None:
        if self.installing is None:
            return
        point, configuration, state, left = self.installing
        if self.rng.random() < 0.1:
            self.journal.give_up_installation()
            self.installing = None
        elif left:
            self.journal.add_part(left.pop(0))
        elif point.index > self.model.start.index:
            assert self.journal.end_installation() == state
            model = self.model
            model.start, model.configuration, model.entries, model.state = point, configuration, [], state
            self.installing = None
            self.drop(self.journal.take_drop())

    def clear(self) -> None:
        if self.rng.random() < 0.2:
            self.clearing = True
            self.model = Model()
            self.model.configuration = Configuration()
            self.model.hard, self.model.tomb = HardState(11, None, 0), Point(self.rng.randint(1, 9), 5)
            self.journal.clear(self.model.hard, self.model.tomb)
            self.installing = None
            self.drop(self.journal.take_drop())

    def drop(self, position: int) -> None:
        """Sometimes a crash comes before what was replaced is dropped."""
        self.dropping = position

    def reopen(self) -> None:
        if self.rng.random() < 0.3:
            self.journal = open_journal(self.log)
            assert fields(self.journal) == self.model.fields()
            self.installing = self.compacted = None

    def step(self) -> None:
        before, written = deepcopy(self.model), self.log.next
        self.dropping, self.clearing = 0, False
        operations = (
            *[self.append] * 5, self.truncate, self.write_hard, self.begin_compaction, self.go_on_compacting,
            self.go_on_compacting, self.begin_installation, self.go_on_installing, self.go_on_installing, self.clear,
            self.reopen,
        )  # fmt: skip
        self.rng.choice(operations)()
        for index in range(written, self.log.next + 1):
            torn = Log([record for record in self.log.all if record.index < index])
            if torn.all:
                found = fields(open_journal(torn))
                if self.clearing:
                    # The new term and the tomb may be there before the log is gone; that promises nothing more.
                    found = found if found == self.model.fields() else (before.hard, *found[1:5], before.tomb)
                assert found in (before.fields(), self.model.fields())
                assert found == self.model.fields() or index < self.log.next
        if self.dropping and self.rng.random() < 0.7:
            self.journal.drop(self.dropping)
            assert fields(open_journal(Log(self.log.all))) == self.model.fields()
        self.look()

    def look(self) -> None:
        journal, model = self.journal, self.model
        assert (journal.start, journal.last) == (model.start, model.last)
        assert journal.entries_since_snapshot == len(model.entries)
        if journal.first <= journal.last:
            entries = list(journal.entries(journal.first, journal.last))
            assert [entry.index for entry in entries] == list(range(journal.first, journal.last + 1))
            assert entries[len(entries) - len(model.entries) :] == model.entries


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 40))
def test_a_crash_leaves_what_was_before_or_after(seed: int) -> None:
    run = Run(seed)
    for _ in range(60):
        run.step()


def test_a_tail_is_kept_in_front_of_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    def compacted(tail_max: int) -> int:
        log = Log()
        journal = open_journal(log)
        journal.found(Configuration(("a",)))
        for index in range(1, 21):
            journal.append([Entry(1, index, COMMAND, b"x" * 10)])
        compaction = journal.begin_compaction(Point(15, 1), Configuration(("a",)), tail_max)
        journal.add_piece(b"\0\0\0\0")
        assert compaction.tail == max(15 - tail_max + 1, 15 - module.TAIL_SIZE_BYTES_MAX // 10 + 1)
        journal.drop(journal.end_compaction())
        assert journal.first == compaction.tail
        assert [entry.index for entry in journal.entries(compaction.tail, 20)] == list(range(compaction.tail, 21))
        again = open_journal(Log(log.all))
        assert (again.start, again.last, again.take_state()) == (Point(15, 1), 20, [b""])
        return len(log.all)

    assert compacted(4) == 3 + 4 + 5
    monkeypatch.setattr(module, "TAIL_SIZE_BYTES_MAX", 30)
    assert compacted(10) == 3 + 3 + 5


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("room", range(8))
def test_a_compaction_for_which_there_is_no_room_leaves_an_installation_as_it_was(room: int, repeated: bool) -> None:
    state = [b"one", b"two", b"three", b"four"]
    stream = b"".join(fragments(state))
    parts = [stream[place : place + 7] for place in range(0, len(stream), 7)]
    log = Log()
    journal = open_journal(log)
    journal.found(Configuration(("a",)))
    journal.append([Entry(1, index, COMMAND, b"%d" % index) for index in range(1, 6)])
    before = fields(open_journal(log))
    point, configuration = Point(9, 2), Configuration(("i",))
    journal.begin_installation(point, configuration)
    for part in parts[:3]:
        journal.add_part(part)
    written, log.room = log.next, room
    with pytest.raises(Unavailable):
        journal.begin_compaction(Point(3, 1), configuration, 1)
    if repeated:
        log.room = 8  # a head, the entries 3, 4 and 5, another head, the parts
        compaction = journal.begin_compaction(Point(3, 1), configuration, 1)
        assert (log.room, journal.is_open(compaction)) == (0, True)
    log.room = math.inf
    assert [entry.index for entry in journal.entries(1, 5)] == [1, 2, 3, 4, 5]
    for end in range(written, log.next + 1):
        torn = Log([record for record in log.all if record.index < end])
        again = open_journal(torn)
        assert fields(again) == before
        again.begin_installation(point, configuration)  # its sender has begun anew
        for part in parts:
            again.add_part(part)
        assert again.end_installation() == state
        assert fields(open_journal(torn))[1:5] == (point, configuration, [], state)
    if repeated:
        journal.add_piece(stream)
        journal.drop(journal.end_compaction())  # the parts that were written first are gone
    for part in parts[3:]:
        journal.add_part(part)
    assert journal.end_installation() == state
    assert fields(open_journal(Log(log.all)))[1:5] == (point, configuration, [], state)
    journal.drop(journal.take_drop())
    assert fields(open_journal(Log(log.all)))[1:5] == (point, configuration, [], state)


@pytest.mark.parametrize(
    "records",
    [
        [(module.ENTRY, 1, module._ENTRY.pack(1, 0))],
        [(module.BEGIN, 0, "head"), (module.ENTRY, 1, module._ENTRY.pack(2, 0))],
        [(module.BEGIN, 0, "head"), (module.PIECE, 0, b"")],
        [(module.BEGIN, 0, "head"), (module.END, 0, b"")],
        [(module.BEGIN, 0, "head"), (module.PART, 0, b"")],
        [(module.BEGIN, 0, "head"), (module.INSTALLED, 0, b"")],
        [(module.BEGIN, 0, "head"), (99, 0, b"")],
        [(module.BEGIN, 0, "head"), *[(module.ENTRY, term, module._ENTRY.pack(1, 0)) for term in (1, 2)]],
        [(module.BEGIN, 0, "snapshot"), (module.ENTRY, 1, module._ENTRY.pack(6, 0))],
        [(module.BEGIN, 0, "snapshot"), (module.PIECE, 0, b"\1\0\0\0"), (module.END, 0, b"")],
        [(module.BEGIN, 0, "snapshot"), (module.ENTRY, 1, module._ENTRY.pack(2, 0)), (module.END, 0, b"")],
    ],
)
def test_records_that_cannot_follow_from_one_another_are_refused(records: list[Any]) -> None:
    heads = {
        "head": msgpack.packb([1, [0, 0], [["a"], [], []], [0, None, 0], [0, 0]]),
        "snapshot": msgpack.packb([1, [5, 1], [["a"], [], []], [0, None, 0], [0, 0]]),
    }
    made = [
        Record(GROUP, term, index, kind, heads.get(payload, payload))
        for index, (kind, term, payload) in enumerate(records, 7)
    ]
    with pytest.raises(Corrupt, match="group 3"):
        open_journal(Log(made))


def test_another_format_is_refused_by_name() -> None:
    head = msgpack.packb([2, "whatever"])
    with pytest.raises(NotSupported, match="format version 2"):
        open_journal(Log([Record(GROUP, 0, 1, module.BEGIN, head)]))


def test_what_the_first_version_wrote_is_read() -> None:
    """The bytes of format 1; they never change."""
    log = Log()
    journal = open_journal(log)
    journal.found(Configuration(("a", "b")))
    journal.write_hard(HardState(2, "b", 0))
    journal.append([Entry(2, 1, COMMAND, b"one")])
    written = [(record.kind, record.term, record.payload.hex()) for record in log.all]
    assert written == [
        (3, 0, "9501920000" + "9392a161a1629090" + "9300c000" + "920000"),
        (2, 0, "9302a16200"),
        (0, 2, "010000000000000000" + "6f6e65"),
    ]


@settings(max_examples=50)
@given(st.lists(st.sampled_from([0, 1, 5, FRAGMENT_SIZE_BYTES_MAX - 4, FRAGMENT_SIZE_BYTES_MAX, 700_000]), max_size=6))
def test_pieces_in_fragments(sizes: list[int]) -> None:
    pieces = [bytes([place]) * size for place, size in enumerate(sizes)]
    found = list(fragments(pieces))
    assert all(0 < len(fragment) <= FRAGMENT_SIZE_BYTES_MAX for fragment in found)
    assert all(len(fragment) == FRAGMENT_SIZE_BYTES_MAX for fragment in found[:-1])
    assert pieces_of(found) == pieces
    if found:
        with pytest.raises(Corrupt, match="ends within"):
            pieces_of([*found[:-1], found[-1][:-1]])

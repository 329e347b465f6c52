from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.core.errors import Corrupt, NotSupported
from gostore.core.values import pack, unpack
from gostore.services.db import machine as machine_module
from gostore.services.db.machine import Restorer, ShardMachine, pack_command, unpack_command
from gostore.services.db.shard import apart

SIZE = 1 << 20


def write(key: str, value: Any, operation: str = "set", path: tuple[Any, ...] = (), container: str = "c") -> list[Any]:
    return [operation, container, key, list(path), pack(value, SIZE)]


def point(key: str, version: int) -> list[Any]:
    return ["p", "c", key, version]


class Log:
    """A machine and its log."""

    def __init__(self) -> None:
        self.machine = ShardMachine(0, SIZE)
        self.commands: list[list[Any]] = []

    def apply(self, *command: Any) -> list[Any]:
        self.commands.append(unpack_command(pack_command(command)))
        return self.machine.apply(self.commands[-1], self.machine.applied + 1)

    def value(self, key: str) -> Any:
        stored = self.machine.store.current("c", key)
        return None if stored is None else unpack(stored.packed)


def restored(machine: ShardMachine) -> ShardMachine:
    restorer = Restorer(0, SIZE)
    for piece in machine.snapshot():
        restorer.add(piece)
    return restorer.finish()


keys = st.sampled_from(["a", "b", "c/1", "c/2"])
requests = st.none() | st.tuples(st.sampled_from(["x", "y", "z"]), st.integers(0, 4), st.booleans()).map(list)
reads = st.lists(
    st.builds(point, keys, st.integers(0, 8))
    | st.tuples(keys, st.integers(0, 3), st.integers(0, 8)).map(lambda t: ["r", "c", t[0], None, 0, t[1], t[2]]),
    max_size=2,
)
some_writes = st.lists(
    st.builds(write, keys, st.integers(0, 9), st.sampled_from(["set", "delete", "add"]), st.sampled_from([(), ("n",)])),
    max_size=3,
)
ids = st.builds(lambda shard, index: f"{shard}.1.{index}", st.sampled_from([0, 7]), st.integers(1, 12))
together = st.lists(st.tuples(requests, reads, some_writes).map(list), min_size=1, max_size=4)
commands = st.one_of(
    st.tuples(st.just("commit"), requests, reads, some_writes),
    st.tuples(st.just("commits"), together.map(lambda items: apart(items)[0])),
    st.tuples(st.just("begin"), requests, reads, some_writes, st.just([1, 2]), st.just(1)),
    st.tuples(st.just("prepare"), ids, st.just(7), reads, some_writes),
    st.tuples(st.just("decide"), ids, st.booleans()),
    st.tuples(st.just("forget"), ids),
    st.tuples(st.just("drop"), st.sampled_from(["c", "d"])),
)


@settings(max_examples=200)
@given(st.lists(commands, max_size=25), st.integers(0, 25))
def test_replicas_that_apply_the_same_log_are_equal_also_from_a_snapshot(log: list[tuple[Any, ...]], cut: int) -> None:
    first, second = ShardMachine(0, SIZE), ShardMachine(0, SIZE)
    for index, command in enumerate(log, 1):
        if index - 1 == cut:
            second = restored(first)
        payload = pack_command(command)
        outcome = first.apply(unpack_command(payload), index)
        pack_command(outcome)  # it travels and rests
        if index <= cut:
            second.apply(unpack_command(payload), index)
        else:
            assert second.apply(unpack_command(payload), index) == outcome
        assert len(first.locks) == len(first.prepared)
    assert second.digest() == first.digest()


@given(st.lists(commands, max_size=25))
def test_a_refused_command_changes_no_value(log: list[tuple[Any, ...]]) -> None:
    machine = ShardMachine(0, SIZE)
    for index, command in enumerate(log, 1):
        before = machine.store.rows("c")
        outcome = machine.apply(unpack_command(pack_command(command)), index)
        if outcome[0] in ("conflict", "error", "forgotten", "dropped", "begun", "pending") or command[0] in (
            "prepare",
            "forget",
        ):
            assert machine.store.rows("c") == before


@given(together)
def test_commits_are_put_together_in_their_order_and_write_no_object_twice(items: list[list[Any]]) -> None:
    batches = apart(items)
    assert [item for batch in batches for item in batch] == items
    for batch in batches:
        objects = [place for item in batch for place in {(write[1], write[2]) for write in item[2]}]
        assert len(objects) == len(set(objects))


@pytest.mark.parametrize("writes", [None, 7, [5], [["set"]], [["set", [], {}, [], b""]], [{"a": 1}]])
def test_what_cannot_be_read_is_put_together_and_refused(writes: Any) -> None:
    items = [[None, [], writes], [None, [], [write("a", 1)]]]
    assert apart(items) == [items]
    kind, (refused, done) = Log().apply("commits", items)
    assert (kind, refused[:2], done) == ("each", ["error", "bad_request"], ["ok", 1])


@given(st.lists(commands, max_size=8), together, st.data())
def test_commits_of_one_entry_do_what_they_do_in_an_entry_each(
    before: list[tuple[Any, ...]], items: list[list[Any]], data: st.DataObject
) -> None:
    together, alone = Log(), Log()
    for log in (together, alone):
        for command in before:
            log.apply(*command)
    batch = apart(items)[0]
    for item in batch:
        known = [point(key, together.machine.store.version("c", key)) for key in data.draw(st.sets(keys, max_size=2))]
        item[1] = [*item[1], *known]  # what it read is current, unless another one of the batch has replaced it
    kind, outcomes = together.apply("commits", batch)
    assert kind == "each"
    assert [one[0] for one in outcomes] == [alone.apply("commit", *item)[0] for item in batch]
    for key in ("a", "b", "c/1", "c/2"):
        assert together.value(key) == alone.value(key)
    assert all(one[1] <= together.machine.applied for one in outcomes if one[0] == "ok")


def test_a_commit_validates_what_was_read() -> None:
    log = Log()
    assert log.apply("commit", None, [point("a", 0)], [write("a", 1)]) == ["ok", 1]
    assert log.apply("commit", None, [point("a", 0)], [write("a", 2)])[:3] == ["conflict", "c", "a"]
    assert log.apply("commit", None, [point("a", 1)], [write("a", 3)]) == ["ok", 3]
    assert log.apply("commit", None, [point("a", 1)], [write("b", 3)])[0] == "conflict"
    assert (log.value("a"), log.value("b")) == (3, None)


def test_a_commit_validates_ranges() -> None:
    log = Log()
    log.apply("commit", None, [], [write("a", 1)])
    scanned = ["r", "c", "", None, 0, 1, 1]
    assert log.apply("commit", None, [scanned], [write("x", 1, container="d")]) == ["ok", 2]
    log.apply("commit", None, [], [write("b", 1)])
    assert log.apply("commit", None, [scanned], [write("x", 2, container="d")])[0] == "conflict"


def test_places_are_evaluated_when_applied() -> None:
    log = Log()
    for amount in (1, 2, 3):
        log.apply("commit", None, [], [write("a", amount, "add", ("n",)), write("a", amount, "add", ("n",))])
    assert log.value("a") == {"n": 12}
    assert log.apply("commit", None, [], [write("b", 1), write("a", 1, "set", (0,))])[:2] == ["error", "wrong_type"]
    assert log.value("b") is None, "all or nothing"


def test_a_repeated_request_is_applied_once() -> None:
    log = Log()
    first = log.apply("commit", ["me", 1, False], [], [write("a", 1, "add")])
    assert log.apply("commit", ["me", 1, True], [], [write("a", 1, "add")]) == first
    assert log.apply("commit", ["you", 1, False], [], [write("a", 1, "add")]) == ["ok", 3]
    assert log.value("a") == 2
    assert log.machine.outcome_of("me", 1) == first
    assert log.machine.outcome_of("me", 2) is None


def test_a_refusal_is_repeated_too() -> None:
    """The client was told that nothing happened: that must stay true."""
    log = Log()
    log.apply("commit", None, [], [write("a", 1)])
    refused = log.apply("commit", ["me", 1, False], [point("a", 0)], [write("a", 2)])
    log.apply("commit", None, [], [write("a", 0, "delete")])
    assert log.apply("commit", ["me", 1, True], [point("a", 0)], [write("a", 2)]) == refused
    assert log.value("a") is None


def test_what_was_forgotten_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "SESSION_OUTCOMES_MAX", 2)
    monkeypatch.setattr(machine_module, "SESSIONS_MAX", 2)
    log = Log()
    for sequence in (1, 2, 3):
        log.apply("commit", ["me", sequence, False], [], [write("a", 1, "add")])
    assert log.apply("commit", ["me", 1, True], [], [write("a", 1, "add")]) == ["forgotten"]
    assert log.apply("commit", ["me", 4, True], [], [write("a", 1, "add")])[0] == "ok", "this one never came"
    for client in ("you", "they"):
        log.apply("commit", [client, 1, False], [], [])
    assert log.apply("commit", ["me", 4, True], [], [write("a", 1, "add")]) == ["forgotten"]
    assert log.value("a") == 4


def test_locks_of_a_prepared_transaction_stand_against_others() -> None:
    log = Log()
    log.apply("commit", None, [], [write("r", 0), write("w", 0)])
    scanned = ["r", "c", "s", "u", 0, 0, 0]
    assert log.apply("prepare", "7.1.1", 7, [point("r", 1), scanned], [write("w", 1)]) == ["ok", 2]
    assert log.apply("commit", None, [point("r", 1)], [write("other", 1)])[0] == "ok", "reads do not exclude reads"
    for refused in (
        ("commit", None, [], [write("r", 1)]),
        ("commit", None, [], [write("w", 1)]),
        ("commit", None, [], [write("t", 1)]),
        ("commit", None, [point("w", 1)], []),
        ("commit", None, [["r", "c", "v", None, 0, 1, 1]], []),
        ("prepare", "7.1.2", 7, [], [write("w", 1)]),
        ("begin", None, [point("w", 1)], [], [1], 1),
    ):
        outcome = log.apply(*refused)
        assert (outcome[0], outcome[-1]) == ("conflict", True), refused
    assert log.value("w") == 0
    assert log.apply("decide", "7.1.1", True)[:2] == ["decided", True]
    assert log.value("w") == 1
    assert len(log.machine.locks) == 0
    assert log.apply("commit", None, [], [write("r", 1), write("t", 1)])[0] == "ok"


def test_prepare_and_decide_may_come_twice() -> None:
    log = Log()
    assert log.apply("prepare", "7.1.1", 7, [], [write("a", 1, "add")]) == ["ok", 1]
    assert log.apply("prepare", "7.1.1", 7, [], [write("a", 1, "add")]) == ["ok", 1]
    log.apply("decide", "7.1.1", True)
    log.apply("decide", "7.1.1", True)
    assert log.value("a") == 1


@pytest.mark.parametrize("through_a_snapshot", [False, True])
@pytest.mark.parametrize("commit", [False, True])
def test_a_prepare_that_comes_after_the_decision_is_refused(commit: bool, through_a_snapshot: bool) -> None:
    """The coordinator may not have forgotten it, and would say "committed" a second time."""
    log = Log()
    prepare = ("prepare", "7.1.20", 7, [], [write("a", "old")])
    log.apply(*prepare)
    log.apply("decide", "7.1.20", commit)
    log.apply("commit", None, [], [write("a", "new")])
    if through_a_snapshot:
        log.machine = restored(log.machine)
    refused = log.apply(*prepare)
    assert (refused[0], refused[3]) == ("conflict", "was decided already")
    assert len(log.machine.locks) == 0
    log.apply("decide", "7.1.20", True)
    assert log.value("a") == "new"
    assert log.apply("prepare", "8.1.20", 8, [], [write("a", 1)])[0] == "ok", "of another coordinator"
    assert log.apply("prepare", "7.1.19", 7, [], [write("b", 1)])[0] == "ok", "it began earlier, and comes first now"


def test_what_may_have_been_executed_and_forgotten_is_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "SESSION_OUTCOMES_MAX", 2)
    log = Log()
    for number in (1, 2, 3):
        log.apply("prepare", f"7.1.{number}", 7, [], [write("a", number)])
        log.apply("decide", f"7.1.{number}", True)
    for number in (1, 2, 3):
        assert log.apply("prepare", f"7.1.{number}", 7, [], [write("a", number)])[0] == "conflict", number
    assert log.apply("prepare", "7.2.4", 7, [], [write("a", 4)])[0] == "ok"
    assert log.value("a") == 3


def test_only_what_was_prepared_here_and_decided_is_remembered() -> None:
    """A coordinator sends itself no prepare, and what was never prepared was not executed."""
    log = Log()
    digest = log.machine.digest()
    log.apply("begin", None, [], [write("a", 1)], [1], 3)
    for command in (("decide", "0.3.1", False), ("forget", "0.3.1"), ("decide", "7.1.1", False)):
        log.apply(*command)
    log.machine.applied = 0
    assert log.machine.digest() == digest


def test_an_aborted_transaction_leaves_nothing() -> None:
    log = Log()
    log.apply("prepare", "7.1.1", 7, [point("b", 0)], [write("a", 1)])
    log.apply("decide", "7.1.1", False)
    assert log.value("a") is None
    assert log.apply("commit", None, [], [write("a", 2), write("b", 2)])[0] == "ok"


def test_the_first_decision_stands() -> None:
    """Whoever aborts a coordinator's pending transaction must win over the driver that comes late."""
    log = Log()
    assert log.apply("begin", ["me", 1, False], [], [write("a", 1)], [1], 3) == ["begun", "0.3.1"]
    assert log.apply("begin", ["me", 1, True], [], [write("a", 1)], [1], 3) == ["pending", "0.3.1"]
    assert log.apply("decide", "0.3.1", False)[:2] == ["decided", False]
    assert log.apply("decide", "0.3.1", True)[:2] == ["decided", False]
    assert log.machine.outcome_of("me", 1)[0] == "conflict"  # type: ignore[index]
    log.apply("forget", "0.3.1")
    assert log.apply("decide", "0.3.1", True)[:2] == ["decided", False], "unknown: it was decided abort"
    assert log.value("a") is None


def test_the_outcome_of_a_pending_request_becomes_that_of_the_decision() -> None:
    log = Log()
    log.apply("begin", ["me", 1, False], [], [write("a", 1)], [1], 3)
    log.apply("decide", "0.3.1", True)
    assert log.apply("begin", ["me", 1, True], [], [write("a", 1)], [1], 3) == ["ok", 2]
    assert log.value("a") == 1


def test_prepared_transactions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "PREPARED_MAX", 1)
    log = Log()
    log.apply("prepare", "7.1.1", 7, [], [write("a", 1)])
    assert log.apply("prepare", "7.1.2", 7, [], [write("b", 1)])[0] == "conflict"


def test_a_dropped_container_takes_no_writes() -> None:
    log = Log()
    log.apply("commit", None, [], [write("a", 1)])
    log.apply("drop", "c")
    assert log.value("a") is None
    assert log.apply("commit", None, [], [write("a", 1)]) == ["dropped", "c"]
    assert log.apply("commit", None, [point("a", 0)], []) == ["dropped", "c"]
    assert log.apply("commit", None, [], [write("a", 1, container="d")])[0] == "ok"


def test_what_is_prepared_for_a_dropped_container_is_not_written() -> None:
    log = Log()
    log.apply("prepare", "7.1.1", 7, [], [write("a", "x" * 100), write("a", 1, container="d")])
    log.apply("drop", "c")
    assert log.apply("decide", "7.1.1", True) == ["decided", True, 3]
    assert log.machine.store.containers() == ["d"]
    assert len(log.machine.locks) == 0


def test_an_object_is_written_to_many_times_in_one_transaction() -> None:
    """In the order of the writes, from what the one before left; and nothing of a transaction that is refused stays."""
    log = Log()
    log.apply("commit", None, [], [write("a", {"n": 1})])
    several = [
        write("a", 2, "add", ("n",)), write("b", [1]), write("a", {"m": 5}), write("a", 1, "add", ("m",)),
        write("b", 7, "set", (2,)), write("a", 1, "set", ("l", 1)),
    ]  # fmt: skip
    assert log.apply("commit", None, [], several) == ["ok", 2]
    assert (log.value("a"), log.value("b")) == ({"m": 6, "l": [None, 1]}, [1, None, 7])
    undone = [write("a", 1, "add", ("m",)), write("a", None, "delete"), write("b", 1, "set", ("x",))]
    assert log.apply("commit", None, [], undone)[:2] == ["error", "wrong_type"]
    assert log.apply("commit", None, [], undone[:2]) == ["ok", 4]
    assert (log.value("a"), log.value("b")) == (None, [1, None, 7])


def test_the_ranges_of_one_transaction_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "RANGE_KEYS_MAX", 5)
    log = Log()
    log.apply("commit", None, [], [write(key, 1) for key in "abc"])
    ranges = [["r", "c", "", None, 0, 3, 1], ["r", "c", "b", None, 0, 2, 1], ["r", "c", "a", "b", 0, 1, 1]]
    assert log.apply("commit", None, ranges[:2], []) == ["ok", 2]
    assert log.apply("commit", None, ranges, [])[:2] == ["error", "too_large"]


GOOD = write("a", 1)
MALFORMED: list[tuple[Any, Any]] = [
    ([], [[1]]), ([], 5), (5, []), ([[1]], []), ([], [[*GOOD, 1]]), ([], ["abcde"]), ([], [None]),
    ([], [["set", ["c"], "a", [], b"1"]]), ([], [["set", "c", ["a"], [], b"1"]]), ([], [["set", "c", 1, [], b"1"]]),
    ([], [["set", 1, "a", [], b"1"]]), ([], [["set", "c", "a", [], "1"]]), ([], [["set", "c", "a", [], None]]),
    ([], [["set", "c", "a", [-1], b"1"]]), ([], [["set", "c", "a", [1 << 40], b"1"]]),
    ([], [["set", "c", "a", [None], b"1"]]), ([], [["set", "c", "a", 7, b"1"]]),
    ([], [["set", "c", "a", ["x"], b"\xc1"]]), ([], [["set", "c", "a", ["x"], b""]]),
    ([], [["add", "c", "a", [], b"\x92\x01"]]), ([], [["dance", "c", "a", [], b"1"]]),
    ([], [["dance", "c", "a", ["x"], b"1"]]), ([], [[["set"], "c", "a", [], b"1"]]),
    ([], [{"set": 0, "c": 0, "a": 0, "": 0, b"1": 0}]),
    ([["p", "c", "a", "1"]], []), ([["r", "c", 1, None, 0, 0, 0]], []),
]  # fmt: skip


@pytest.mark.parametrize("locked", [False, True])
def test_a_malformed_transaction_is_refused_and_changes_nothing(locked: bool) -> None:
    log = Log()
    log.apply("drop", "d")
    if locked:
        log.apply("prepare", "7.1.1", 7, [["r", "c", "k", None, 0, 0, 0]], [write("l", 1)])
    before = log.machine.digest()
    for reads, writes in MALFORMED:
        for command in (
            ("commit", None, reads, writes),
            ("begin", None, reads, writes, [1], 1),
            ("prepare", "7.1.2", 7, reads, writes),
            ("commit", None, reads, [GOOD, *writes] if isinstance(writes, list) else writes),
        ):
            outcome = log.apply(*command)
            assert outcome[:2] == ["error", "bad_request"], command
            log.machine.applied = 1 + locked
            assert log.machine.digest() == before, command


@pytest.mark.parametrize(
    "command",
    [
        *(("prepare", name, 7, [], []) for name in ("", "7", "7.1", "a.b.c", "7.1.-1", "7.1.1\n", 1, [])),
        ("prepare", "7.1." + "9" * 30, 7, [], []),
        ("prepare", "7.1.1", "7", [], []),
        *(("decide", name, True) for name in ("a.b.c", "7.1.1.1", 7, [], None)),
        ("decide", "7.1.1", "yes"),
        ("forget", ["7.1.1"]),
        ("drop", ["c"]),
        ("drop", 7),
        *(("commits", items) for items in (7, None, {}, [5], [[None, []]], [[None, [], [], 1]])),
        ("begin", None, [], [], 7, 1),
        ("begin", None, [], [], ["x"], 1),
        ("begin", None, [], [], [1], "1"),
    ],
)  # fmt: skip
def test_a_malformed_command_is_refused_and_changes_nothing(command: tuple[Any, ...]) -> None:
    log = Log()
    before = log.machine.digest()
    assert log.apply(*command)[:2] == ["error", "bad_request"]
    log.machine.applied = 0
    assert log.machine.digest() == before


def test_an_unreadable_command_stops_the_shard() -> None:
    with pytest.raises(Corrupt, match="entry 1 is no command"):
        ShardMachine(0, SIZE).apply(["commit"], 1)
    with pytest.raises(NotSupported, match="entry 1 is a command 'dance', which this release does not know"):
        ShardMachine(0, SIZE).apply(["dance"], 1)


def test_a_snapshot_is_cut_into_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "SNAPSHOT_PIECE_SIZE_BYTES", 1000)
    log = Log()
    for number in range(100):
        log.apply("commit", ["me", number, False], [], [write(f"{number:03}", "x" * 50)])
    taken = log.machine.snapshot()
    digest = log.machine.digest()
    log.apply("commit", None, [], [write("000", "later")])
    pieces = list(taken)
    # One record, the outcomes of a client, is packed as a whole.
    assert len(pieces) >= 5
    assert all(len(piece) < 4000 for piece in pieces)
    restorer = Restorer(0, SIZE)
    for piece in pieces:
        restorer.add(piece)
    assert restorer.finish().digest() == digest, "it is the state of the moment it was taken"


def test_damaged_snapshots_are_refused() -> None:
    log = Log()
    log.apply("commit", None, [], [write("a", 1)])
    (piece,) = log.machine.snapshot()
    restorer = Restorer(0, SIZE)
    with pytest.raises(Corrupt, match="ends early"):
        restorer.finish()
    with pytest.raises(Corrupt):
        Restorer(1, SIZE).add(piece)
    with pytest.raises(Corrupt):
        Restorer(0, SIZE).add(b"\xc1")
    with pytest.raises(NotSupported, match="format version 99"):
        Restorer(0, SIZE).add(pack_command(["header", 99, 0, 0, False]))
    twice = Restorer(0, SIZE)
    twice.add(piece)
    with pytest.raises(Corrupt, match="of"):
        twice.add(piece)

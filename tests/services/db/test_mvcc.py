from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import Compacted, Conflict
from gostore.services.db import mvcc
from gostore.services.db.mvcc import Store

containers = st.sampled_from(["one", "two"])
keys = st.sampled_from(["", "a", "a/b", "a/c", "b", "ä", "z"])
packed = st.none() | st.binary(max_size=3)
writes = st.lists(st.tuples(containers, keys, packed), max_size=30)
Model = dict[tuple[str, str], tuple[int, bytes]]


def build(steps: list[tuple[str, str, bytes | None]]) -> tuple[Store, list[Model]]:
    """A store after these writes, one per index, and the model's state at every index."""
    store, states = Store(), [{}]
    for index, (container, key, value) in enumerate(steps, 1):
        state = dict(states[-1])
        state.pop((container, key), None)
        if value is not None:
            state[container, key] = (index, value)
        store.write(container, key, value, index)
        states.append(state)
    return store, states


@given(writes)
def test_every_snapshot_reads_as_the_model_did(steps: list[tuple[str, str, bytes | None]]) -> None:
    store, states = build(steps)
    for index, state in enumerate(states):
        for container in ("one", "two"):
            for key in ("", "a", "a/b", "b", "z", "no"):
                assert store.read(container, key, index) == state.get((container, key))
    assert [store.read(c, k) for c, k in states[-1]] == list(states[-1].values())


@given(writes, keys, st.none() | keys)
def test_every_snapshot_scans_as_the_model_did(
    steps: list[tuple[str, str, bytes | None]], start: str, end: str | None
) -> None:
    store, states = build(steps)
    for index, state in enumerate(states):
        expected = [
            (key, *stored)
            for (container, key), stored in sorted(state.items())
            if container == "one" and start <= key and (end is None or key < end)
        ]
        assert list(store.scan("one", start, end, index)) == expected
    assert list(store.scan("one", start, end)) == expected
    assert store.fingerprint("one", start, end) == (len(expected), max((row[1] for row in expected), default=0))


@given(writes)
def test_fingerprints_differ_whenever_the_range_does(steps: list[tuple[str, str, bytes | None]]) -> None:
    """Count and greatest version are enough, as versions only grow: equal fingerprints, equal contents."""
    store = Store()
    seen: dict[tuple[int, int], list[mvcc.Row]] = {}
    for index, (_, key, value) in enumerate(steps, 1):
        store.write("one", key, value, index)
        rows = list(store.scan("one", "", None))
        assert seen.setdefault(store.fingerprint("one", "", None), rows) == rows


@given(writes)
def test_sizes_are_what_is_there(steps: list[tuple[str, str, bytes | None]]) -> None:
    store, states = build(steps)
    assert store.objects == len(states[-1])
    assert store.size_bytes == sum(len(key) + len(value) for (_, key), (_, value) in states[-1].items())
    assert store.containers() == sorted({container for container, _ in states[-1]})
    store.drop("one", len(steps) + 1)
    store.drop("two", len(steps) + 2)
    assert (store.objects, store.size_bytes, store.containers()) == (0, 0, [])


def test_history_is_bounded_and_an_old_snapshot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvcc, "HISTORY_CHANGES_MAX", 3)
    store = Store()
    for index in range(1, 8):
        store.write("c", "k", b"%d" % index, index)
    assert store.floor == 4
    assert store.read("c", "k", 4) == (4, b"4")
    with pytest.raises(Conflict, match="no longer kept"):
        store.read("c", "k", 3)
    with pytest.raises(Conflict):
        list(store.scan("c", "", None, 3))


def test_history_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvcc, "HISTORY_SIZE_BYTES_MAX", 100)
    store = Store()
    for index in range(1, 10):
        store.write("c", "k", b"x" * 40, index)
    assert store.read("c", "k", 8) is not None
    with pytest.raises(Conflict):
        store.read("c", "k", 5)


def test_a_change_prepared_before_the_snapshot_and_decided_after_is_refused() -> None:
    """Others may have seen its effect in another shard before this snapshot was taken."""
    store = Store()
    store.write("c", "k", b"old", 1)
    store.write("c", "k", b"new", 5, prepared=3)
    assert store.read("c", "k", 2) == (1, b"old")
    for at in (3, 4):
        with pytest.raises(Conflict):
            store.read("c", "k", at)
        with pytest.raises(Conflict):
            list(store.scan("c", "", None, at))
    assert store.read("c", "k", 5) == (5, b"new")


def test_rows_do_not_change_with_the_store() -> None:
    store = Store()
    store.write("c", "k", b"1", 1)
    rows = store.rows("c")
    store.write("c", "k", b"2", 2)
    store.write("c", "l", b"3", 3)
    assert rows == [("k", 1, b"1")]


@pytest.mark.parametrize("lived", [False, True])
def test_history_is_bounded_by_what_the_constants_say(lived: bool) -> None:
    """Exactly as many changes and bytes as are promised, no more and no fewer; also after the history was dropped."""

    def fresh() -> Store:
        store = Store()
        if lived:
            for index in range(1, 100):
                store.write("c", "k", b"value", index)
            store.drop("c", 100)
        assert store.floor == (100 if lived else 0)
        return store

    store, began = fresh(), 101
    for index in range(began, began + 4096):
        store.write("c", "k", b"", index)
    assert store.floor == (100 if lived else 0)
    store.write("c", "k", b"", began + 4096)
    assert store.floor == began

    store = fresh()
    mebibyte = bytes((1 << 20) - len("k"))
    for index in range(began, began + 8):  # the first change replaced nothing and takes the one byte of its key
        store.write("c", "k", mebibyte, index)
    assert store.floor == (100 if lived else 0)
    store.write("c", "k", mebibyte, began + 8)
    assert store.floor == began, "8 MiB and one byte are too much, 8 MiB are not"
    store.write("c", "k", mebibyte, began + 9)
    assert store.floor == began + 1


@given(writes, st.integers(1, 8), st.integers(1, 20))
def test_history_keeps_as_much_as_fits(steps: list[tuple[str, str, bytes | None]], count: int, size: int) -> None:
    """Against a plain list: the oldest changes but the last go while there are too many, or too many bytes of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvcc, "HISTORY_CHANGES_MAX", count)
        patch.setattr(mvcc, "HISTORY_SIZE_BYTES_MAX", size)
        store, states = build(steps)
    kept: list[tuple[int, int]] = []
    floor = 0
    for index, (container, key, value) in enumerate(steps, 1):
        previous = states[index - 1].get((container, key))
        if value is None and previous is None:
            continue
        kept.append((index, len(key) + (0 if previous is None else len(previous[1]))))
        while (len(kept) > count or sum(size for _, size in kept) > size) and len(kept) > 1:
            floor = kept.pop(0)[0]
    assert store.floor == floor
    for index, state in enumerate(states):
        if index < floor:
            with pytest.raises(Conflict):
                store.read("one", "a", index)
        else:
            assert {
                (container, row.key): (row.version, row.packed)
                for container in ("one", "two")
                for row in store.scan(container, "", None, index)
            } == state


def copied(name: str) -> str:
    """An equal string that is another object, as one from the network is."""
    return name.encode().decode()


def test_a_range_is_what_lies_between_its_bounds() -> None:
    """All bounds that there are, now and at a snapshot behind which everything changed, next to other containers."""
    names = ["ka", "kb", "kc", "kd"]
    store = Store()
    for number, key in enumerate(names, 1):
        for container in ("c1", "c2", "c3"):
            store.write(copied(container), copied(key), container.encode(), number)
    for index, change in ((4, "none yet"), (5, "all replaced"), (6, "all removed")):
        if change != "none yet":
            for container in ("c1", "c2", "c3"):
                for key in names:
                    store.write(copied(container), copied(key), b"new" if change == "all replaced" else None, index)
        for start in ("", *names, "kz"):
            for end in (None, "", *names, "kz"):
                inside = [key for key in names if start <= key and (end is None or key < end)]
                expected = [(key, names.index(key) + 1, b"c2") for key in inside]
                assert list(store.scan(copied("c2"), copied(start), end and copied(end), 4)) == expected
                now = list(store.scan(copied("c2"), start, end))
                assert [row.key for row in now] == ([] if change == "all removed" else inside)
                assert store.fingerprint("c2", start, end) == (len(now), max((row.version for row in now), default=0))


@given(writes, keys, st.none() | keys, st.integers(1, 31), st.integers(0, 30))
def test_what_was_written_is_told_in_the_order_of_the_log(
    steps: list[tuple[str, str, bytes | None]], start: str, end: str | None, kept: int, dropped: int
) -> None:
    """From every index that is kept; a container that is dropped meanwhile changes nothing for another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvcc, "HISTORY_CHANGES_MAX", kept)
        store = Store()
        expected: list[tuple[int, str, bytes | None]] = []
        changes: list[int] = []
        present: set[tuple[str, str]] = set()
        for index, (container, key, value) in enumerate(steps, 1):
            if index == dropped:
                store.drop("two", index)
                present = {place for place in present if place[0] == "one"}
                continue
            store.write(container, key, value, index)
            if value is None and (container, key) not in present:
                continue  # nothing was there
            (present.discard if value is None else present.add)((container, key))
            changes.append(index)
            if container == "one" and start <= key and (end is None or key < end):
                expected.append((index, key, value))
    floor = changes[-kept - 1] if len(changes) > kept else 0
    assert store.history_floor == floor
    for after in range(len(steps) + 2):
        if after < floor:
            with pytest.raises(Compacted, match=f"only those after {floor}"):
                store.written("one", start, end, after)
        else:
            assert store.written("one", start, end, after) == [one for one in expected if one[0] > after]


def test_a_store_that_was_restored_knows_nothing_of_before() -> None:
    store = Store()
    store.load("c", [mvcc.Row("k", 7, b"old")])
    store.forget_history(9)
    store.write("c", "k", b"new", 10)
    store.write("c", "l", b"1", 10)
    assert store.written("c", "", None, 9) == [(10, "k", b"new"), (10, "l", b"1")]
    with pytest.raises(Compacted) as caught:
        store.written("c", "", None, 8)
    assert caught.value.details == {"kept_after": 9}


@given(st.lists(st.lists(st.tuples(keys, st.none() | st.just(b"1234")), max_size=6), max_size=6))
def test_an_entry_never_pushes_out_what_it_changed_itself(entries: list[list[tuple[str, bytes | None]]]) -> None:
    """However much it is: whoever is told of it while it is applied must find all of it, and the state before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvcc, "HISTORY_CHANGES_MAX", 2)
        patch.setattr(mvcc, "HISTORY_SIZE_BYTES_MAX", 6)
        store = Store()
        for index, entry in enumerate(entries, 1):
            before = list(store.scan("c", "", None))
            for key, value in dict(entry).items():
                store.write("c", key, value, index)
            present = {row.key for row in before}
            expected = {key: value for key, value in dict(entry).items() if value is not None or key in present}
            told = store.written("c", "", None, index - 1)
            assert {one.key: one.packed for one in told} == expected
            assert list(store.scan("c", "", None, index - 1)) == before


def test_objects_are_counted_without_a_look_at_each() -> None:
    store = Store()
    assert store.count("c", "", None) == 0
    for key in "bdf":
        store.write("c", key, b"", 1)
    for start in "abcdefg":
        for end in (*"abcdefg", None):
            assert store.count("c", start, end) == len(list(store.scan("c", start, end)))

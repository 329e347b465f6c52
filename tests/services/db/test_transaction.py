"""Transactions on the pure machines: whatever the interleaving, some serial order explains what happened."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.core.errors import BadRequest, Conflict
from gostore.core.keyvalue import PointRead, RangeRead, Read, RequestId, Write
from gostore.core.transaction import Transaction, transact
from gostore.services.db.mvcc import Store
from gostore.services.db.transaction import LockTable, find_clash

KEYS = ["a", "b", "c/1", "c/2"]
operations = st.one_of(
    st.tuples(st.just("get"), st.sampled_from(KEYS)),
    st.tuples(st.just("scan"), st.sampled_from(["", "c/"])),
    st.tuples(st.just("put"), st.sampled_from(KEYS)),
    st.tuples(st.just("delete"), st.sampled_from(KEYS)),
    st.tuples(st.just("add"), st.sampled_from(["n", "m"])),
)
seeds = st.integers(0, 1 << 32).map(random.Random)
programs = st.lists(operations, min_size=1, max_size=4)


async def execute(program: list[tuple[str, str]], name: str, transaction: Any) -> list[Any]:
    """Run a program; what it writes depends on what it read, so that a wrong read shows."""
    seen: list[Any] = []
    for operation, argument in program:
        if operation == "get":
            seen.append(await transaction.get("t", argument))
        elif operation == "scan":
            seen.append([(entry.key, entry.value) for entry in await transaction.scan("t", argument)])
        elif operation == "put":
            transaction.set("t", argument, f"{name}:{seen!r}")
        elif operation == "delete":
            transaction.delete("t", argument)
        else:
            transaction.add("t", argument, 1)
    return seen


class Serial:
    """The model: one transaction after the other on a dictionary."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    async def get(self, container: str, key: str) -> Any:
        return self.state.get(key)

    async def scan(self, container: str, prefix: str) -> list[Any]:
        return [
            type("Entry", (), {"key": key, "value": self.state[key]})
            for key in sorted(self.state)
            if key.startswith(prefix)
        ]

    def set(self, container: str, key: str, value: Any) -> None:
        self.state[key] = value

    def delete(self, container: str, key: str) -> None:
        self.state.pop(key, None)

    def add(self, container: str, key: str, amount: int) -> None:
        self.state[key] = self.state.get(key, 0) + amount


def run_serially(coroutine: Any) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the model never waits")


def explained(committed: list[tuple[int, int, str, Any, Any]], final: dict[str, Any]) -> bool:
    """Is there a serial order, in keeping with real time, in which all read what they read and this remains?"""
    for order in itertools.permutations(committed):
        if any(later[1] < earlier[0] for earlier, later in itertools.combinations(order, 2)):
            continue  # the later one had ended before the earlier one began
        model = Serial({})
        if all(run_serially(execute(program, name, model)) == seen for _, _, name, program, seen in order) and (
            model.state == final
        ):
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(st.lists(programs, min_size=2, max_size=5), st.integers(1, 3), seeds)
def test_concurrent_transactions_are_strictly_serializable(
    machine_store: Any, interleave: Any, all_programs: list[Any], shards: int, rng: random.Random
) -> None:
    store = machine_store(shards)
    committed: list[tuple[int, int, str, Any, Any]] = []

    async def client(name: str, program: list[tuple[str, str]]) -> None:
        begun = store.steps
        transaction = Transaction(store)
        try:
            seen = await execute(program, name, transaction)
            await transaction.commit()
        except Conflict:
            return
        committed.append((begun, store.steps, name, program, seen))

    interleave([client(f"t{n}", program) for n, program in enumerate(all_programs)], rng.randrange)
    assert explained(committed, contents(store)), committed
    assert all(not machine.prepared and not machine.coordinated for machine in store.machines)


def contents(store: Any) -> dict[str, Any]:
    async def scan() -> Any:
        return await store.scan("t")

    coroutine = scan()
    while True:
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return {entry.key: entry.value for entry in stop.value.entries}


@pytest.mark.parametrize("shards", [1, 3])
@settings(max_examples=40, deadline=None)
@given(rng=seeds)
def test_the_bank_keeps_its_money(machine_store: Any, interleave: Any, shards: int, rng: Any) -> None:
    store = machine_store(shards)
    accounts = ["ann", "bob", "cid", "dan"]

    async def open_accounts() -> None:
        await store.commit([], [Write("set", "t", name, {"balance": 100}) for name in accounts])

    async def pause(attempt: int) -> None:
        pass

    async def transfer(number: int) -> None:
        source, target = rng.sample(accounts, 2)

        async def body(t: Transaction) -> None:
            balance = await t.get("t", source, ("balance",))
            if balance >= 30:
                t.set("t", source, balance - 30, ("balance",))
                t.add("t", target, 30, ("balance",))

        try:
            await transact(store, body, pause=pause)
        except Conflict:
            pass

    async def audit() -> None:
        async def body(t: Transaction) -> int:
            return sum(entry.value["balance"] for entry in await t.scan("t"))

        try:
            assert await transact(store, body, pause=pause) == 400
        except Conflict:
            pass

    interleave([open_accounts()], lambda n: 0)
    interleave([*(transfer(n) for n in range(6)), audit(), audit()], rng.randrange)
    balances = [value["balance"] for value in contents(store).values()]
    assert sum(balances) == 400
    assert min(balances) >= 0


def test_write_skew_is_refused(machine_store: Any, interleave: Any) -> None:
    """Two doctors on call, each leaves because the other one stays: snapshot isolation would allow it."""
    store = machine_store(2)
    interleave([store.commit([], [Write("set", "t", key, True) for key in "ab"])], lambda n: 0)
    left: list[str] = []

    async def leave(mine: str, other: str) -> None:
        t = Transaction(store)
        if await t.get("t", other):
            t.set("t", mine, False)
            try:
                await t.commit()
                left.append(mine)
            except Conflict:
                pass

    turn = itertools.count()
    interleave([leave("a", "b"), leave("b", "a")], lambda n: next(turn) % n)
    assert len(left) <= 1


def test_a_phantom_is_refused(machine_store: Any, interleave: Any) -> None:
    store = machine_store(1)

    async def claim(name: str) -> bool:
        """Only into an empty room."""
        t = Transaction(store)
        if await t.scan("t", "room/"):
            return False
        t.set("t", f"room/{name}", 1)
        try:
            await t.commit()
        except Conflict:
            return False
        return True

    turn = itertools.count()
    assert sum(interleave([claim("x"), claim("y")], lambda n: next(turn) % n)) == 1


def test_reads_come_from_the_snapshot_and_from_own_writes(machine_store: Any, interleave: Any) -> None:
    store = machine_store(1)

    async def main() -> None:
        await store.commit([], [Write("set", "t", "x/1", {"n": 1}), Write("set", "t", "x/2", 2)])
        t = Transaction(store)
        assert await t.get("t", "x/1", ("n",)) == 1
        await store.commit([], [Write("set", "t", "x/2", 22), Write("set", "t", "x/3", 3)])
        assert await t.get("t", "x/2") == 2, "another transaction's commit is not seen"
        t.add("t", "x/1", 5, ("n",))
        t.set("t", "x/4", [1])
        t.set("t", "x/4", 2, (2,))
        t.delete("t", "x/2")
        assert await t.get("t", "x/1") == {"n": 6}
        assert await t.get("t", "x/4") == [1, None, 2]
        assert await t.get("t", "x/2", default="gone") == "gone"
        assert not await t.exists("t", "x/2")
        assert [(e.key, e.value) for e in await t.scan("t", "x/")] == [("x/1", {"n": 6}), ("x/4", [1, None, 2])]
        with pytest.raises(Conflict):
            await t.commit()
        with pytest.raises(BadRequest, match="finished"):
            t.set("t", "x/1", 1)

    interleave([main()], lambda n: 0)


def test_what_is_read_may_be_changed_by_the_reader_alone(machine_store: Any, interleave: Any) -> None:
    store = machine_store(1)

    async def main() -> None:
        value = {"list": [1]}
        async with Transaction(store) as t:
            t.set("t", "k", value)
            value["list"].append(2)
            (await t.get("t", "k"))["list"].append(3)
            assert await t.get("t", "k") == {"list": [1]}
        assert (await store.get("t", "k")).value == {"list": [1]}

        async def fail() -> None:
            async with Transaction(store) as t:
                t.set("t", "k", 0)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            await fail()
        assert (await store.get("t", "k")).value == {"list": [1]}

    interleave([main()], lambda n: 0)


def test_transact_gives_up_after_its_attempts(machine_store: Any, interleave: Any) -> None:
    store = machine_store(1)
    pauses: list[int] = []

    async def pause(attempt: int) -> None:
        pauses.append(attempt)

    async def body(t: Transaction) -> None:
        await t.get("t", "k")
        await store.commit([], [Write("add", "t", "k", 1)])
        t.set("t", "other", 1)

    async def main() -> None:
        with pytest.raises(Conflict):
            await transact(store, body, pause=pause, attempts_max=3)

    interleave([main()], lambda n: 0)
    assert pauses == [1, 2]


@settings(max_examples=50, deadline=None)
@given(rng=seeds, shards=st.integers(1, 3))
def test_a_commit_that_is_sent_twice_happens_once(machine_store: Any, interleave: Any, rng: Any, shards: int) -> None:
    store = machine_store(shards)
    writes = [Write("add", "t", key, 1) for key in ("a", "b", "c/1")]

    async def send(sequence: int) -> None:
        try:
            await store.commit([], writes, request_id=RequestId("me", sequence))
        except Exception:
            pass  # pending in another turn, or refused

    interleave([send(1), send(1), send(1)], rng.randrange)
    values = list(contents(store).values())
    assert values in ([1, 1, 1], [])


def test_a_lock_is_released_as_a_whole() -> None:
    store, locks = Store(), LockTable()
    reads = [PointRead("c", "r", 0), PointRead("c", "both", 0), RangeRead("c", "x", "z", 0, 0, 0)]
    locks.acquire("1", reads, [("c", "w"), ("c", "both")])
    locks.acquire("2", [PointRead("c", "r", 0)], [])
    checks: list[Callable[[], Any]] = [
        lambda: find_clash(store, locks, [], [("c", "y")]),
        lambda: find_clash(store, locks, [], [("c", "w")]),
        lambda: find_clash(store, locks, [RangeRead("c", "v", None, 0, 0, 0)], []),
    ]
    assert all(check() is not None for check in checks)
    locks.release("1")
    assert [check() for check in checks] == [None, None, None]
    assert find_clash(store, locks, [], [("c", "r")]) is not None
    locks.release("2")
    locks.release("2")
    assert find_clash(store, locks, [], [("c", "r")]) is None


def names(*of: str) -> st.SearchStrategy[str]:
    """Equal names that are different objects, as they are when they come from the network."""
    return st.sampled_from(of).map(lambda name: name.encode().decode())


places = st.tuples(names("c1", "c2", "c3"), names("ka", "kb", "kc", "kd", "ke"))
points = places.map(lambda place: PointRead(*place))
bounds = st.none() | names("ka", "kc", "kd", "kf")
ranges = st.tuples(names("c1", "c2", "c3"), names("aa", "ka", "kb", "kd"), bounds).map(lambda r: RangeRead(*r, 0, 0, 0))
read_sets = st.lists(points | ranges, max_size=3)
write_sets = st.lists(places, max_size=3)
EVERYWHERE = [
    (container, key) for container in ("c1", "c2", "c3") for key in ("aa", "ka", "kb", "kc", "kd", "ke", "zz")
]


def within(place: tuple[str, str], read: Read) -> bool:
    """The definition: does this read see this place?"""
    if isinstance(read, PointRead):
        return place == (read.container, read.key)
    container, key = place
    return container == read.container and read.start <= key and (read.end is None or key < read.end)


@given(
    st.lists(st.tuples(read_sets, write_sets) | st.integers(0, 5), max_size=8),
    st.lists(ranges, min_size=1, max_size=3),
)
def test_locks_stand_against_what_the_definition_says(steps: list[Any], asked: list[RangeRead]) -> None:
    """What is locked for reading may be read, and not written; what is locked for writing, neither."""
    store, locks = Store(), LockTable()
    held: dict[str, tuple[list[Read], list[tuple[str, str]]]] = {}
    for number, step in enumerate(steps):
        if isinstance(step, int):
            held.pop(f"t{step}", None)
            locks.release(f"t{step}")
        elif find_clash(store, locks, *step) is None:
            held[f"t{number}"] = step
            locks.acquire(f"t{number}", *step)
        written = [place for _, writes in held.values() for place in writes]
        read = [one for reads, _ in held.values() for one in reads]
        assert len(locks) == len(held)
        for place in EVERYWHERE:
            assert locks.against_read(*place) == (place in written)
            assert locks.against_write(*place) == (place in written or any(within(place, one) for one in read))
            clash = find_clash(store, locks, [], [place])
            assert (clash is not None) == locks.against_write(*place)
            assert clash is None or (clash[:2], clash.lock) == (place, True)
            clash = find_clash(store, locks, [PointRead(*place)], [])
            assert (clash is not None) == (place in written)
            assert clash is None or (clash[:2], clash.lock) == (place, True)
        for one in asked:
            inside = [place for place in written if within(place, one)]
            key = locks.against_range(one.container, one.start, one.end)
            assert (key is None) if not inside else ((one.container, key) in inside)
            clash = find_clash(store, locks, [one], [])
            assert (clash is None) if not inside else (clash is not None and clash[:2] in inside and clash.lock)


@given(st.integers(0, 5), st.integers(0, 5))
def test_a_point_read_holds_for_the_version_that_it_saw_and_no_other(now: int, seen: int) -> None:
    """An older version was overwritten; a newer one is of another life of the shard. Numbers are no objects."""
    store, offset = Store(), 10**9
    if now:
        store.write("c", "k", b"", now + offset)
    clash = find_clash(store, LockTable(), [PointRead("c", "k", seen + offset if seen else 0)], [])
    if seen == now:
        assert clash is None
    else:
        was, is_now = (f"version {version + offset}" if version else "absent" for version in (seen, now))
        assert clash == ("c", "k", f"was {was} when it was read and is {is_now}", False)


@given(st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_a_range_read_holds_for_its_fingerprint_and_no_other(seen: tuple[int, int]) -> None:
    store = Store()
    store.write("c", "k1", b"", 1)
    store.write("c", "k2", b"", 2)
    clash = find_clash(store, LockTable(), [RangeRead("c", "k", None, 0, *seen)], [])
    assert (clash is None) == (seen == (2, 2))
    assert clash is None or (clash[:2], clash.lock) == (("c", "k"), False)


def test_what_changed_is_told_rather_than_what_is_locked() -> None:
    """Waiting for the lock would be in vain."""
    store, locks = Store(), LockTable()
    store.write("c", "k", b"", 7)
    locks.acquire("1", [], [("c", "k")])
    for stale in (PointRead("c", "k", 6), RangeRead("c", "k", None, 0, 1, 6)):
        clash = find_clash(store, locks, [stale], [("c", "k")])
        assert clash is not None
        assert not clash.lock

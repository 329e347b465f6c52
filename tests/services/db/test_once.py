"""At most once: a request is executed once, however late its attempts come, and memory of that is bounded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.core.errors import BadRequest
from gostore.core.keyvalue import RequestId, RequestIds
from gostore.core.values import pack, unpack
from gostore.services.db import machine as machine_module
from gostore.services.db.machine import Restorer, ShardMachine
from gostore.sim import simulate

SIZE = 1 << 20


def add(key: str) -> list[Any]:
    return ["add", "c", key, [], pack(1, SIZE)]


class Log:
    """A machine that is given requests; through a snapshot and back now and then."""

    def __init__(self) -> None:
        self.machine = ShardMachine(0, SIZE)

    def apply(self, request: list[Any], key: str = "k") -> list[Any]:
        return self.machine.apply(["commit", request, [], [add(key)]], self.machine.applied + 1)

    def value(self, key: str = "k") -> int:
        stored = self.machine.store.current("c", key)
        return 0 if stored is None else int(unpack(stored.packed))

    def restore(self) -> None:
        restorer = Restorer(0, SIZE)
        for piece in self.machine.snapshot():
            restorer.add(piece)
        self.machine = restorer.finish()


def test_a_client_says_what_it_waits_for() -> None:
    ids = RequestIds("me")
    first, second, third = ids.new(), ids.new(), ids.new()
    assert [one.settled_below for one in (first, second, third)] == [1, 1, 1]
    ids.settle(second)
    assert ids.new().settled_below == 1
    ids.settle(first)
    ids.settle(first)
    fifth = ids.new()
    assert (fifth.sequence, fifth.settled_below) == (5, 3)
    for one in (third, fifth, RequestId("me", 4)):
        ids.settle(one)
    assert ids.new() == RequestId("me", 6, 6)


@pytest.mark.parametrize("wire", [["me", 3, 4], ["me", 3, -1], ["", 3], ["me", 3, 1, 1], ["me", "3"]])
def test_what_is_no_request_id(wire: list[Any]) -> None:
    with pytest.raises(BadRequest, match="request_id"):
        RequestId.from_wire(wire)
    assert RequestId.from_wire(["me", 3]) == RequestId("me", 3)
    assert RequestId.from_wire(RequestId("me", 3, 2).to_wire()) == RequestId("me", 3, 2)


def test_the_first_attempt_that_comes_last_is_not_executed() -> None:
    log = Log()
    assert log.apply(["me", 1, True, 1])[0] == "ok"  # the second attempt, by another node
    for sequence in range(2, 10):
        assert log.apply(["me", sequence, False, sequence])[0] == "ok"
    assert log.apply(["me", 1, False, 1]) == ["forgotten"]
    assert log.value() == 9


def test_what_was_given_up_is_not_executed_when_it_comes() -> None:
    log = Log()
    assert log.apply(["me", 2, False, 2])[0] == "ok"
    assert log.apply(["me", 1, False, 1]) == ["forgotten"]
    assert log.value() == 1


def test_what_is_waited_for_may_be_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "SESSION_OUTCOMES_MAX", 4)
    log = Log()
    for sequence in range(2, 50):
        assert log.apply(["me", sequence, False, 1])[0] == "ok"
    log.restore()
    assert log.apply(["me", 1, False, 1])[0] == "ok"
    assert log.apply(["me", 2, True, 1]) == ["ok", 1], "all outcomes since then are kept"
    assert log.value() == 49


def test_only_what_is_waited_for_is_remembered() -> None:
    log = Log()
    for sequence in range(1, 1000):
        log.apply(["me", sequence, False, max(sequence - 5, 1)])
    (session,) = log.machine._sessions.values()
    assert list(session.outcomes) == list(range(994, 1000))


@pytest.mark.parametrize("settled", [0, 1])
def test_memory_is_bounded_whatever_a_client_says(settled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "SESSION_OPEN_MAX", 16)
    monkeypatch.setattr(machine_module, "SESSION_OUTCOMES_MAX", 8)
    log = Log()
    for sequence in range(2, 100):
        log.apply(["me", sequence, False, settled])
    (session,) = log.machine._sessions.values()
    assert len(session.outcomes) == (16 if settled else 8)
    # What was dropped is refused, whether it says that it is repeated or not.
    for repeated in (False, True):
        assert log.apply(["me", 1, repeated, settled]) == ["forgotten"]
        assert log.apply(["me", 5, repeated, settled]) == ["forgotten"]
    assert log.value() == 98


@given(st.data())
def test_every_request_is_executed_once_at_most_and_while_it_is_waited_for_exactly_once(data: st.DataObject) -> None:
    """A client with several requests at a time, each of which has several attempts on their way; any may arrive at any
    time, however late, in any order."""
    log, ids = Log(), RequestIds("me")
    waiting: dict[int, RequestId] = {}
    under_way: list[tuple[RequestId, bool]] = []
    executed: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 60))):
        step = data.draw(st.sampled_from(["new", "again", "arrive", "arrive", "give up", "restore"]))
        if step == "new":
            request = ids.new()
            waiting[request.sequence] = request
            under_way.append((request, False))
        elif step == "again" and waiting:
            under_way.append((data.draw(st.sampled_from(list(waiting.values()))), True))
        elif step == "arrive" and under_way:
            request, repeated = data.draw(st.sampled_from(under_way))  # it stays there: it may come twice
            sequence = request.sequence
            outcome = log.apply([request.client, sequence, repeated, request.settled_below], str(sequence))
            executed[sequence] = log.value(str(sequence))
            assert executed[sequence] <= 1
            if sequence in waiting:
                assert outcome[0] == "ok"
                assert executed[sequence] == 1
                ids.settle(waiting.pop(sequence))
        elif step == "give up" and waiting:
            ids.settle(waiting.pop(data.draw(st.sampled_from(list(waiting)))))
        elif step == "restore":
            log.restore()
    for sequence in executed:
        assert log.value(str(sequence)) <= 1


def test_the_log_of_the_first_version_is_replayed_as_it_was() -> None:
    """Without *settled below*: a first attempt was executed whenever it came."""
    log = Log()
    for sequence in range(machine_module.SESSION_OUTCOMES_MAX + 2):
        log.apply(["me", sequence, False])
    before = log.value()
    assert log.apply(["me", 0, True]) == ["forgotten"]
    assert log.apply(["me", 0, False])[0] == "ok"
    assert log.value() == before + 1


@pytest.mark.parametrize("seed", range(2))
def test_a_node_that_stood_still_executes_nothing_a_second_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads requests from its socket which others have served meanwhile; and much has been done since."""
    monkeypatch.setattr(machine_module, "SESSION_OUTCOMES_MAX", 16)

    async def main(cluster: Any) -> None:
        await cluster.db.create_container("c")
        await cluster.wait_settled()
        primary = (await cluster.db.shards())[0]["primary"]
        still = next(name for name in cluster.nodes if name != primary)
        for name in cluster.nodes:  # each knows the container
            await cluster.db.set("c", "other", 0, via=name)
        acknowledged, stop = 0, asyncio.Event()

        async def client() -> None:
            nonlocal acknowledged
            while not stop.is_set():
                await cluster.db.add("c", "k", 1)
                acknowledged += 1
                await asyncio.sleep(0.03)  # virtual time

        clients = [asyncio.ensure_future(client()) for _ in range(8)]
        await asyncio.sleep(0.5)
        await cluster.faults.pause(still)
        await asyncio.sleep(6)
        await cluster.faults.resume(still)
        await asyncio.sleep(3)
        stop.set()
        await asyncio.gather(*clients)
        assert acknowledged > 500
        assert await cluster.db.get("c", "k") == acknowledged

    with simulate(3, seed=seed, db={"shards": 1}) as cluster:
        cluster._connection.is_usable = lambda name: True  # an ordinary client does not know who stands still
        cluster.run(main(cluster))


@pytest.mark.parametrize(
    "request_", [[], ["me"], ["me", 1], [[], 1, False], ["me", "1", False], ["me", 1, False, "1"], 7]
)
def test_what_is_no_request_id_in_the_log_is_refused_by_all_replicas(request_: Any) -> None:
    log = Log()
    assert log.apply(request_)[:2] == ["error", "bad_request"]
    assert log.value() == 0
    assert log.apply(["me", 1, False, 1])[0] == "ok"

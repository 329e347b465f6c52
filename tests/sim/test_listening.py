"""Who listens changes nothing: the same packets, byte for byte, and the same callbacks, whatever a journal collects."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from gostore.core.events import Event
from gostore.sim import simulate
from gostore.trace import Journal


def run(categories: Sequence[str], messages_a_s: float, seed: int = 5) -> tuple[list[str], Journal]:
    """A little of everything; what happened in the world, line by line, and the journal of it."""
    lines: list[str] = []
    cluster = simulate(3, seed=seed, trace_sink=lines.append)

    async def work() -> None:
        await cluster.db.create_container("c")
        for number in range(3):
            await cluster.db.set("c", f"key {number}", number)
        await cluster.fs.write("/file", b"x" * 100_000)
        await cluster.faults.loss(0.2, source="n1", target="n2")
        await cluster.db.set("c", "key 0", "again")
        await cluster.faults.kill("n3")
        await cluster.wait_state("n3", "offline")
        await cluster.faults.heal()
        await cluster.faults.restart("n3")
        await cluster.wait_settled()
        assert await cluster.fs.read("/file") == b"x" * 100_000

    try:
        cluster.run(cluster.watch(*categories, messages_a_s=messages_a_s))
        cluster.start_sync()
        cluster.run(work())
        cluster.stop_sync()
    finally:
        cluster.sim.close()
    return lines, cluster.events


@pytest.fixture(scope="module")
def all_of_it() -> tuple[list[str], Journal]:
    return run(["message", "db", "fs", "storage"], -1)


@pytest.mark.parametrize(
    ("categories", "messages_a_s"), [((), 0), (("message",), 5), (("db", "storage"), 0)], ids=["least", "some", "state"]
)
def test_listening_changes_no_packet_and_no_callback(
    categories: tuple[str, ...], messages_a_s: float, all_of_it: tuple[list[str], Journal]
) -> None:
    lines, journal = run(categories, messages_a_s)
    loud, everything = all_of_it
    assert len(everything) > 3 * len(journal) > 0, "they listened alike"
    for number, (quiet_line, loud_line) in enumerate(zip(lines, loud, strict=False)):
        assert quiet_line == loud_line, f"the runs part at line {number}"
    assert len(lines) == len(loud)
    assert any("restart" in line for line in lines)


def messages(journal: Journal) -> tuple[dict[Any, list[Event]], list[Event]]:
    """Sends by their ids (of several lives of a node), and receives."""
    sends: dict[Any, list[Event]] = {}
    for event in journal.of_kind("send"):
        sends.setdefault(event.id, []).append(event)
    return sends, journal.of_kind("recv")


def test_a_receive_names_its_send_and_is_later(all_of_it: tuple[list[str], Journal]) -> None:
    """Of every message between nodes; what clients send is in no journal."""
    sends, received = messages(all_of_it[1])
    found = 0
    for event in received:
        if event.data["from"] not in ("n1", "n2", "n3"):
            continue
        assert event.cause in sends, event
        fitting = [
            send
            for send in sends[event.cause]
            if send.stamp < event.stamp and send.data["to"] in (event.node, "")  # "": whoever is there
            and all(send.data[name] == event.data[name] for name in ("message", "function", "frame", "request"))
        ]  # fmt: skip
        assert fitting, event
        found += 1
    assert found > 500


def test_the_stamps_of_one_life_never_go_back(all_of_it: tuple[list[str], Journal]) -> None:
    for node in ("n1", "n2", "n3"):
        own = [event for event in all_of_it[1] if event.node == node]
        for before, after in itertools.pairwise(own):
            assert after.stamp >= before.stamp
            assert after.seq == before.seq + 1 or after.seq == 1

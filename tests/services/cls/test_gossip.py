from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.services.cls.gossip import (
    HELD_MAX,
    PATH_MAX,
    PROFILES,
    QUEUE_MAX,
    SEEN_MAX,
    Deliver,
    Gossip,
    Item,
    Pull,
    Tell,
)

FAST = PROFILES["fast"]
MESSAGES_MAX = 20_000
"""A simulation that floods its network ends."""


@dataclass(frozen=True)
class Step:
    """An event without content; ``digest`` tells views apart."""

    epoch: int
    previous: int
    digest: int


def history(length: int) -> list[Step]:
    return [Step(epoch, (epoch - 1) * 10, epoch * 10) for epoch in range(1, length + 1)]


def gossip(name: str = "a", seed: int = 1) -> Gossip[Step]:
    return Gossip(name, FAST, random.Random(seed))


def items(*events: Step, path: tuple[str, ...] = ("m",)) -> list[Item[Step]]:
    return [Item(event, path) for event in events]


def epochs(effects: list[object]) -> list[int]:
    return [effect.event.epoch for effect in effects if isinstance(effect, Deliver)]


@given(st.permutations(range(8)), st.lists(st.integers(0, 7), max_size=10))
def test_events_are_delivered_once_and_in_order_however_they_come(order: list[int], again: list[int]) -> None:
    one, events, version, delivered = gossip(), history(8), (0, 0), []
    for number in [*order, *again]:
        for effect in one.receive("m", items(events[number]), version, 5, 0.0):
            assert isinstance(effect, Deliver)
            version = (effect.event.epoch, effect.event.digest)
            delivered.append(effect.event.epoch)
    assert delivered == list(range(1, 9))


def test_a_new_event_is_passed_on_with_the_path_it_took() -> None:
    one = gossip()
    (deliver,) = one.receive("b", items(history(1)[0], path=("m", "b")), (0, 0), 5, 3.0)
    assert isinstance(deliver, Deliver)
    assert deliver.path == ("m", "b", "a")
    assert one.due_s == 3.0, "at once, not at the next period"
    told = one.tick(["b", "c", "d", "e", "m"], 3.0)
    assert [effect.to for effect in told if isinstance(effect, Tell)]
    for effect in told:
        assert isinstance(effect, Tell)
        assert effect.items == (Item(history(1)[0], ("m", "b", "a")),)
        assert effect.to != "b", "who told us knows it"
    assert one.due_s == 3.0 + FAST.period_s


def test_duplicates_go_no_further() -> None:
    one, (event,) = gossip(), history(1)
    one.receive("b", items(event), (0, 0), 5, 0.0)
    while one.due_s < 100.0:
        one.tick(["b", "c", "d", "e"], one.due_s)
    assert one.receive("c", items(event), (1, 10), 5, 100.0) == []
    assert one.due_s == float("inf")
    assert one.is_duplicate(event.epoch)
    assert not one.is_duplicate(event.epoch + 1)
    assert one.counts["duplicates"] == 2


def test_interest_is_lost_after_a_logarithmic_number_of_tellings() -> None:
    one = gossip()
    one.publish(history(1)[0], 100, 0.0)
    peers = [f"n{i}" for i in range(99)]
    told = []
    while one.due_s < 100.0:
        told += [effect.to for effect in one.tick(peers, one.due_s) if isinstance(effect, Tell)]
    assert len(told) == FAST.tellings(100) == len(set(told))


def test_a_small_cluster_is_told_completely_before_anybody_twice() -> None:
    one = gossip()
    one.publish(history(1)[0], 6, 0.0)
    told: list[str] = []
    while one.due_s < 100.0:
        told += [effect.to for effect in one.tick(list("bcdef"), one.due_s) if isinstance(effect, Tell)]
    assert len(told) == FAST.tellings(6)
    assert len(set(told)) == min(len(told), 5)


def test_with_nobody_to_tell_it_rests() -> None:
    one = gossip()
    one.publish(history(1)[0], 1, 0.0)
    assert one.tick([], 0.0) == []
    assert one.due_s == float("inf")


def test_a_gap_that_rumours_do_not_fill_is_pulled() -> None:
    one, events = gossip(), history(5)
    assert one.receive("b", items(events[4]), (2, 20), 5, 1.0) == []
    assert one.due_s == 1.0 + FAST.patience_s
    assert one.tick(["b"], one.due_s) == [Pull("b")]
    # The state of epoch 4 comes; what was held follows.
    assert epochs(one.adopted((4, 40), 5, 2.0)) == [5]


def test_a_gap_that_rumours_fill_is_not_pulled() -> None:
    one, events = gossip(), history(5)
    one.receive("b", items(events[4]), (2, 20), 5, 1.0)
    assert epochs(one.receive("c", items(events[2], events[3]), (2, 20), 5, 1.05)) == [3, 4, 5]
    effects: list[object] = []
    while one.due_s < 100.0:
        effects += one.tick(["b", "c"], one.due_s)
    assert not [effect for effect in effects if isinstance(effect, Pull)]


def test_a_probe_that_shows_a_newer_view_leads_to_a_pull() -> None:
    one = gossip()
    one.heard("b", 7, 9, 0.0)
    one.heard("b", 9, 9, 0.0)
    assert one.due_s == float("inf")
    one.heard("b", 10, 9, 1.0)
    one.heard("c", 12, 9, 1.1)
    assert one.due_s == 1.0 + FAST.patience_s, "a later one does not put it off"
    assert one.tick([], one.due_s) == [Pull("c")]
    assert one.due_s == float("inf")


def test_what_was_only_read_from_the_disk_is_not_built_upon() -> None:
    """The digest of such a view is 0: the event has the right number, and fits no more than the others."""
    one, events = gossip(), history(6)
    assert one.receive("c", items(events[4]), (4, 0), 5, 1.0) == [Pull("c")]
    assert one.receive("c", items(events[5]), (4, 0), 5, 1.0) == []
    assert one.counts["unfit"] == 1
    # The state of epoch 5 comes, and what was held follows.
    assert epochs(one.adopted((5, 50), 5, 1.1)) == [6]


def test_an_event_that_did_not_fit_is_taken_when_it_comes_again() -> None:
    one, events = gossip(), history(5)
    assert one.receive("c", items(events[4]), (4, 0), 5, 1.0) == [Pull("c")]
    assert one.adopted((4, 40), 5, 1.1) == []
    assert epochs(one.receive("b", items(events[4]), (4, 40), 5, 1.2)) == [5]


def test_what_was_held_and_does_not_fit_is_not_applied() -> None:
    one = gossip()
    one.receive("c", items(Step(6, 53, 60)), (4, 40), 5, 0.0)
    effects = one.receive("b", items(history(5)[4]), (4, 40), 5, 0.1)
    assert epochs(effects) == [5]
    assert effects[-1] == Pull("c")


def test_what_is_known_is_stale() -> None:
    one = gossip()
    assert one.receive("b", items(history(3)[2]), (5, 50), 5, 0.0) == []
    assert one.counts["stale"] == 1


def test_what_is_remembered_is_bounded() -> None:
    one = gossip()
    events = history(SEEN_MAX + 200)
    for event in events:
        one.publish(event, 5, 0.0)
    assert len(one._seen) == SEEN_MAX
    assert len(one._queue) == QUEUE_MAX
    other = gossip()
    for event in reversed(events):
        other.receive("b", items(event), (0, 1), 5, 0.0)
    assert len(other._held) == HELD_MAX
    long = tuple(f"n{i}" for i in range(PATH_MAX + 10))
    (deliver,) = gossip().receive("b", items(events[0], path=long), (0, 0), 5, 0.0)
    assert isinstance(deliver, Deliver)
    assert len(deliver.path) == PATH_MAX
    assert deliver.path[-1] == "a"


def test_an_event_dropped_for_want_of_room_is_taken_when_it_comes_again() -> None:
    one, events = gossip(), history(HELD_MAX + 3)
    for event in events[1:]:
        one.receive("b", items(event), (0, 0), 5, 0.0)
    delivered = epochs(one.receive("b", items(events[0]), (0, 0), 5, 0.0))
    last = events[delivered[-1] - 1]
    assert delivered == list(range(1, HELD_MAX + 2))
    rest = one.receive("b", items(*events[HELD_MAX + 1 :]), (last.epoch, last.digest), 5, 0.0)
    assert epochs(rest) == [HELD_MAX + 2, HELD_MAX + 3]


def test_a_message_carries_a_bounded_number_of_items() -> None:
    one = gossip()
    for event in history(40):
        one.publish(event, 5, 0.0)
    for effect in one.tick(["b", "c"], 0.0):
        assert isinstance(effect, Tell)
        assert len(effect.items) == FAST.items_per_message_max


# Many together


class Network:
    """Gossip cores, messages with loss and delay, and probes that carry epochs."""

    def __init__(self, count: int, seed: int, loss: float, core: type[Gossip[Step]] = Gossip) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.now_s = 0.0
        self.names = [f"n{i}" for i in range(count)]
        self.cores = {name: core(name, FAST, random.Random(f"{seed} {name}")) for name in self.names}
        self.versions = dict.fromkeys(self.names, (0, 0))
        self.applied: dict[str, list[int]] = {name: [] for name in self.names}
        self.messages = 0
        self.pulls = 0
        self._heap: list[tuple[float, int, str, object]] = []
        self._number = 0

    def later(self, delay_s: float, to: str, what: object) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._number, to, what))

    def publish(self, master: str, event: Step) -> None:
        self.applied[master].append(event.epoch)
        self.versions[master] = (event.epoch, event.digest)
        self.cores[master].publish(event, len(self.names), self.now_s)

    def run(self, seconds: float, probe_period_s: float = 0.2) -> None:
        end_s = self.now_s + seconds
        for name in self.names:
            self.later(self.rng.uniform(0, probe_period_s), name, "probe")
        while True:
            due_s, name = min((core.due_s, name) for name, core in self.cores.items())
            if min(due_s, self._heap[0][0]) > end_s or self.messages > MESSAGES_MAX:
                self.now_s = end_s
                self._heap = [entry for entry in self._heap if entry[3] != "probe"]
                heapq.heapify(self._heap)
                return
            if due_s <= self._heap[0][0]:
                self.now_s = max(self.now_s, due_s)
                others = [other for other in self.names if other != name]
                self._perform(name, self.cores[name].tick(others, self.now_s))
            else:
                self.now_s, _, to, what = heapq.heappop(self._heap)
                self._arrive(to, what, probe_period_s)

    def _arrive(self, to: str, what: object, probe_period_s: float) -> None:
        core = self.cores[to]
        match what:
            case "probe":
                peer = self.rng.choice([name for name in self.names if name != to])
                if self.rng.random() >= self.loss:
                    core.heard(peer, self.versions[peer][0], self.versions[to][0], self.now_s)
                self.later(probe_period_s, to, "probe")
            case (str(source), tuple(items)):
                received = core.receive(source, items, self.versions[to], len(self.names), self.now_s)
                self._perform(to, received)

    def _perform(self, name: str, effects: list[object]) -> None:
        for effect in effects:
            match effect:
                case Tell(to, items):
                    self.messages += 1
                    if self.rng.random() >= self.loss:
                        self.later(self.rng.uniform(0.0002, 0.02), to, (name, items))
                case Deliver(event, path):
                    assert (event.epoch, event.previous) == (self.versions[name][0] + 1, self.versions[name][1])
                    assert path[-1] == name
                    self.versions[name] = (event.epoch, event.digest)
                    self.applied[name].append(event.epoch)
                case Pull(source):
                    self.pulls += 1
                    if self.versions[source] > self.versions[name] and self.rng.random() >= self.loss:
                        self.versions[name] = self.versions[source]
                        self._perform(name, self.cores[name].adopted(self.versions[name], len(self.names), self.now_s))


@settings(max_examples=25)
@given(st.integers(0, 1 << 30), st.integers(2, 30), st.floats(0.0, 0.4))
def test_every_event_reaches_everybody_in_order(seed: int, count: int, loss: float) -> None:
    network = Network(count, seed, loss)
    for event in history(10):
        network.publish("n0", event)
        network.run(network.rng.choice([0.0, 0.01, 0.3]))
    network.run(20.0)
    assert set(network.versions.values()) == {(10, 100)}
    for applied in network.applied.values():
        assert applied == sorted(set(applied))


def spread(core: type[Gossip[Step]], seed: int, count: int = 40) -> Network:
    """One event, no probes: rumours alone."""
    network = Network(count, seed, 0.0, core)
    network.publish("n0", history(1)[0])
    network.run(3.0, probe_period_s=100.0)
    return network


@pytest.mark.parametrize("seed", range(5))
def test_rumours_alone_reach_almost_everybody_with_few_messages(seed: int) -> None:
    network = spread(Gossip, seed)
    reached = sum(version == (1, 10) for version in network.versions.values())
    assert reached >= 38
    assert network.messages <= 40 * FAST.tellings(40)


class TellsForEver(Gossip[Step]):
    """The classical mistake: duplicates are told on."""

    def _is_new(self, epoch: int) -> bool:
        super()._is_new(epoch)
        return True

    def receive(self, source, items, version, members, now_s):  # type: ignore[no-untyped-def]
        for item in items:
            self._enqueue(Item(item.event, (self.name,)), members, now_s)
        return super().receive(source, items, version, members, now_s)


class TellsOnce(Gossip[Step]):
    def _enqueue(self, item, members, now_s):  # type: ignore[no-untyped-def]
        super()._enqueue(item, 0, now_s)
        for queued in self._queue.values():
            queued.left = 1


def test_the_simulation_finds_the_classical_mistakes() -> None:
    assert spread(TellsForEver, 1).messages > 2 * 40 * FAST.tellings(40)
    assert any(sum(v == (1, 10) for v in spread(TellsOnce, seed).versions.values()) < 38 for seed in range(5))

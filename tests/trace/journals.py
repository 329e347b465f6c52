"""Random runs: nodes that act, send and restart, with hybrid clocks over wall clocks that jump."""

from __future__ import annotations

from hypothesis import strategies as st

from gostore.core.events import Event
from gostore.core.stamps import HybridClock

NODES = ("n1", "n2", "n 3")


class Run:
    """Makes the events of a run by the rules of ``core.events``, and knows by itself what was before what."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.before: list[int] = []
        """For each event, a bit mask of the events in its past."""
        self._last = dict.fromkeys(NODES, -1)
        self._clock = {node: HybridClock() for node in NODES}
        self._wall = dict.fromkeys(NODES, 1_000_000)
        self._seq = dict.fromkeys(NODES, 0)
        self._sent = dict.fromkeys(NODES, 0)
        self._flying: list[tuple[str, str, int, int, int]] = []
        self._now_s = 0.0

    def step(self, node: str, what: str, number: int) -> None:
        self._now_s += (0.0, 4e-7, 0.001)[number % 3]  # several events may happen at one time, or nearly
        wall = self._wall[node] = max(1, self._wall[node] + number - 40)
        clock = self._clock[node]
        if what == "restart":
            self._clock[node] = HybridClock()
            self._seq[node] = self._sent[node] = 0
            self._now_s += 0.001
        elif what == "send":
            to = NODES[number % len(NODES)]
            self._sent[node] += 1
            stamp = clock.tick(wall)
            self._flying.append((node, to, self._sent[node], stamp, len(self.events)))
            self._add(node, "send", stamp, None, -1, message=self._sent[node], request=len(self.events), to=to)
        elif what == "recv":
            flying = [message for message in self._flying if message[1] == node != message[0]]
            if flying:  # a message may come twice, and out of order
                source, _, message, stamp, index = flying[number % len(flying)]
                data = {"message": message, "request": index, "from": source}
                self._add(node, "recv", clock.merge(stamp, wall), (source, -message), index, **data)
        else:
            self._add(node, "wal_sync", clock.peek(wall), None, -1, records=1, bytes=2, duration_s=number / 10_000)

    def _add(self, node, kind, stamp, cause, cause_index, **data) -> None:
        self._seq[node] += 1
        past = 0
        for index in (self._last[node], cause_index):
            if index >= 0:
                past |= self.before[index] | 1 << index
        self._last[node] = len(self.events)
        self.before.append(past)
        if kind != "wal_sync":
            data |= {"service": "s", "function": "f", "frame": "cast", "bytes": 9, "transport": "udp"}
        self.events.append(Event(node, self._seq[node], kind, stamp, self._now_s, cause, data))


@st.composite
def runs(draw: st.DrawFn, *, restarts: bool = True) -> Run:
    run = Run()
    words = ["send", "send", "recv", "recv", "recv", "sync"] + ["restart"] * restarts
    steps = st.tuples(st.sampled_from(NODES), st.sampled_from(words), st.integers(0, 100))
    for step in draw(st.lists(steps, max_size=60)):
        run.step(*step)
    return run

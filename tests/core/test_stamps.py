from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gostore.core.stamps import DRIFT_MS_MAX, HybridClock, stamp_wall_ms

# Wall clocks that jump forwards and backwards, and messages between three nodes.
steps = st.lists(
    st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 2)), st.integers(-500, 500)), max_size=200
)


@given(steps)
def test_stamps_respect_causality_whatever_the_wall_clocks_do(steps: list[tuple[int, int | None, int]]) -> None:
    clocks = [HybridClock() for _ in range(3)]
    wall = [1_000_000, 1_000_000, 1_000_000]
    last = [0, 0, 0]
    for node, peer, jump in steps:
        wall[node] = max(0, wall[node] + jump)
        if peer is None or peer == node:
            stamp = clocks[node].tick(wall[node])
        else:
            sent = clocks[peer].tick(wall[peer])
            assert sent > last[peer]
            last[peer] = sent
            stamp = clocks[node].merge(sent, wall[node])
            assert stamp > sent, "a receive is later than its send"
        assert stamp > last[node], "stamps of one node grow"
        last[node] = stamp


def test_a_counter_that_overflows_keeps_the_order() -> None:
    clock = HybridClock()
    stamps = [clock.tick(5) for _ in range(70_000)]
    assert all(b > a for a, b in itertools.pairwise(stamps))


def test_a_clock_far_ahead_is_not_adopted() -> None:
    ahead = HybridClock().tick(10_000 + DRIFT_MS_MAX + 1)
    assert stamp_wall_ms(HybridClock().merge(ahead, 10_000)) == 10_000


@given(steps)
def test_looking_at_a_clock_changes_no_stamp_and_is_in_order(steps: list[tuple[int, int | None, int]]) -> None:
    """Of a wall clock that is never set back; the same steps with and without somebody who looks."""
    looked, alone, wall = HybridClock(), HybridClock(), 1_000_000
    for _, _, step in steps:
        wall += abs(step)
        seen = looked.peek(wall)
        assert looked.last <= seen <= looked.tick(wall) == alone.tick(wall)
        assert stamp_wall_ms(looked.peek(wall)) >= wall

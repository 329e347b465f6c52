"""Wall clocks that are wrong; monotonic time is not touched by them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.sim.clock import SimClock
from gostore.sim.scheduler import EPOCH_S, Scheduler


def test_jump_drift_offset_heal():
    scheduler = Scheduler(1)
    clock = SimClock(scheduler)
    assert clock.wall_s() == EPOCH_S
    scheduler.now = 10.0
    assert clock.wall_s() == EPOCH_S + 10
    clock.jump(-3600)
    assert clock.offset_s() == -3600
    clock.drift(1.5)
    scheduler.now = 20.0
    assert clock.offset_s() == -3595
    clock.set_offset(7)
    scheduler.now = 22.0
    assert clock.offset_s() == 8
    clock.heal()
    scheduler.now = 30.0
    assert clock.offset_s() == 0
    with pytest.raises(ValueError, match="runs forward"):
        clock.drift(0)


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0.5, 2)), max_size=20))
def test_without_jumps_it_never_runs_backwards(steps):
    scheduler = Scheduler(1)
    clock = SimClock(scheduler)
    last = clock.wall_s()
    for seconds, rate in steps:
        clock.drift(rate)
        scheduler.now += seconds
        assert clock.wall_s() >= last
        last = clock.wall_s()

"""The faults' arithmetic; that they act is tested with the endpoint."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gostore.comm import Fault, Links
from gostore.comm.links import OVERTAKE_S_MAX
from gostore.core.errors import BadRequest

share = st.floats(0, 1)


@given(st.integers(), share, share, share, st.floats(0, 10), st.floats(0, 10))
def test_a_plan_is_what_was_asked_for(
    seed: int, drop: float, duplicate: float, reorder: float, delay_s: float, jitter_s: float
) -> None:
    fault = Fault(drop, delay_s, jitter_s, duplicate, reorder)
    delays = fault.plan(random.Random(seed))
    assert len(delays) <= 2
    assert all(delay_s <= delay <= delay_s + jitter_s + 2 * OVERTAKE_S_MAX for delay in delays)
    if drop == 0.0:
        assert delays


@pytest.mark.parametrize(
    ("fault", "copies"), [(Fault(drop=1.0), 0), (Fault(duplicate=1.0), 2), (Fault(delay_s=1.0), 1), (Fault(), 1)]
)
def test_certain_faults(fault: Fault, copies: int) -> None:
    rng = random.Random(1)
    assert {len(fault.plan(rng)) for _ in range(200)} == {copies}


def test_directions() -> None:
    links = Links()
    links.set("b", "out", drop=1.0)
    links.set("b", "in", delay_s=0.5)
    links.set("c", drop=0.5)
    assert links.outgoing == {"b": Fault(drop=1.0), "c": Fault(drop=0.5)}
    assert links.incoming == {"b": Fault(delay_s=0.5), "c": Fault(drop=0.5)}
    links.set("c", "out")
    assert "c" not in links.outgoing
    links.clear("b")
    assert not links.outgoing
    links.clear()
    assert not links.incoming


def test_values_out_of_range_are_refused() -> None:
    links = Links()
    for setting in ({"drop": 1.5}, {"duplicate": -0.1}, {"reorder": 2.0}, {"delay_s": -1.0}, {"jitter_s": 1e9}):
        with pytest.raises(BadRequest, match=next(iter(setting))):
            links.set("b", **setting)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="direction"):
        links.set("b", "sideways")

from __future__ import annotations

import threading

import pytest

from gostore.viz.pump import Pump

WAIT_S = 30.0


def test_it_works_again_and_again_until_it_is_stopped() -> None:
    third, calls = threading.Event(), []

    def work() -> None:
        calls.append(1)
        if len(calls) == 3:
            third.set()

    pump = Pump(work, interval_s=0.001, name="test")
    pump.start()
    assert third.wait(WAIT_S)
    pump.stop()
    assert not pump.running
    pump.stop()


def test_a_nudge_does_not_wait_for_the_interval() -> None:
    worked = threading.Event()
    pump = Pump(worked.set, interval_s=3600, name="test")
    pump.start()
    pump.nudge()
    assert worked.wait(WAIT_S)
    pump.stop()


def test_it_goes_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    second, calls = threading.Event(), []

    def work() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the disk is full of bees")
        second.set()

    pump = Pump(work, interval_s=0.001, name="test")
    pump.start()
    assert second.wait(WAIT_S)
    pump.stop()
    assert "full of bees" in caplog.text


def test_it_can_stop_itself() -> None:
    ended = threading.Event()

    def work() -> None:
        pump.stop()
        ended.set()

    pump = Pump(work, interval_s=0.001, name="test")
    pump.start()
    assert ended.wait(WAIT_S)
    pump._thread.join(WAIT_S)
    assert not pump.running

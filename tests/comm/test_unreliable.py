"""Endpoints whose network loses and whose peers restart: nothing runs twice, nothing is taken for another life."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gostore.comm.calls import HELLO_IDLE_S
from gostore.core.errors import (
    Forgotten,
    Timeout,
    Unavailable,
)

from .conftest import Net, Run, until


@pytest.mark.parametrize("direction", ["out", "in"])
def test_loss_is_survived_and_nothing_runs_twice(run_net: Run, direction: str) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=64), await net.node("b", attempts_max=64)
        a.endpoint.links.set("b", direction, drop=0.4, duplicate=0.3, reorder=0.3)
        b.endpoint.links.set("a", direction, drop=0.2, duplicate=0.3, delay_s=0.001, jitter_s=0.01)
        replies = await asyncio.gather(*[a.endpoint.call("b", "echo", "echo", i) for i in range(100)])
        assert [reply.value for reply in replies] == list(range(100))
        assert sorted(b.echo.ran.values()) == [1] * 100
        assert a.statistic("retries") > 0
        assert a.statistic("dropped_fault") + b.statistic("dropped_fault") > 0
        assert b.statistic("duplicates") > 0

    run_net(scenario)


def test_loss_on_streams_is_survived_and_nothing_runs_twice(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=64), await net.node("b", attempts_max=64)
        a.endpoint.links.set("b", "out", drop=0.2)
        b.endpoint.links.set("a", "both", drop=0.2)
        blocks = [a.endpoint.call("b", "echo", "block", 50_000, data=b"x" * 50_000) for _ in range(10)]
        assert [len(reply.data) for reply in await asyncio.gather(*blocks)] == [50_000] * 10
        assert b.echo.ran["block"] == 10

    run_net(scenario)


def test_a_partition_that_heals_in_time_is_survived_once(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=64), await net.node("b")
        for warm in (False, True):  # before the first hello, and in a standing session
            if warm:
                await a.endpoint.call("b", "echo", "echo", "warm")
            dropped = a.statistic("dropped_fault")
            a.endpoint.links.set("b", drop=1.0)
            task = asyncio.ensure_future(a.endpoint.call("b", "echo", "echo", f"cut {warm}"))
            await until(lambda dropped=dropped: a.statistic("dropped_fault") >= dropped + 3)
            assert not task.done()
            a.endpoint.links.clear()
            assert (await task).value == f"cut {warm}"
            assert b.echo.ran[f"cut {warm}"] == 1

    run_net(scenario)


def test_answers_cut_off_are_sent_again(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=64), await net.node("b")
        await a.endpoint.call("b", "echo", "echo", "warm")
        for function, arguments, key in (("echo", ["x"], "x"), ("block", [100_000], "block")):
            b.endpoint.links.set("a", "out", drop=1.0)
            task = asyncio.ensure_future(a.endpoint.call("b", "echo", function, *arguments))
            await until(lambda key=key: key in b.echo.ran)
            await until(lambda: a.statistic("retries") > 2)
            b.endpoint.links.clear("a")
            await task
            assert b.echo.ran[key] == 1

    run_net(scenario)


def test_no_answer_ends_in_a_timeout(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        a.endpoint.links.set("b", drop=1.0)
        with pytest.raises(Timeout, match="echo on b: no answer in time") as never_sent:
            await a.endpoint.call("b", "echo", "echo", 1, timeout_s=0.1, attempts=1)
        assert never_sent.value.definite  # it did not even say hello
        a.endpoint.links.clear()
        await a.endpoint.call("b", "echo", "echo", 2)
        a.endpoint.links.set("b", drop=1.0)
        with pytest.raises(Timeout, match=r"1 sends\); it may have happened") as maybe:
            await a.endpoint.call("b", "echo", "echo", 3, timeout_s=0.1, attempts=1)
        assert not maybe.value.definite
        assert list(b.echo.ran) == ["2"]
        assert a.statistic("calls_in_flight") == 0

    run_net(scenario)


def test_a_handler_that_takes_longer_is_not_run_again(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=2, attempt_timeout_s=0.005), await net.node("b")
        b.echo.gate.clear()
        task = asyncio.ensure_future(a.endpoint.call("b", "echo", "held", "k"))
        await until(lambda: b.statistic("duplicates") >= 5)  # more than the attempts: "working" does not count
        b.echo.gate.set()
        assert (await task).value == "k"
        assert b.echo.ran == {"k": 1}

    run_net(scenario)


def test_nobody_listens_and_then_somebody_does(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=64), await net.node("b")
        address = b.endpoint.address
        await b.stop()
        small = asyncio.ensure_future(a.endpoint.call("b", "echo", "echo", "later"))
        large = asyncio.ensure_future(a.endpoint.call("b", "echo", "block", 1, data=b"x" * 100_000))
        await until(lambda: a.statistic("hellos") >= 2)
        assert not small.done()
        assert not large.done()
        again = await net.node("b", incarnation=2, address=address)
        assert (await small).value == "later"
        assert (await large).value == 100_000
        assert again.echo.ran == {"later": 1, "block": 1}

    run_net(scenario)


def test_a_restarted_callee_does_not_run_it_again(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=64), await net.node("b")
        b.echo.gate.clear()
        task = asyncio.ensure_future(a.endpoint.call("b", "echo", "held", "k"))
        await until(lambda: "k" in b.echo.ran)
        address = b.endpoint.address
        await b.stop()
        again = await net.node("b", incarnation=2, address=address)
        with pytest.raises(Forgotten, match="held on b: b restarted") as caught:
            await task
        assert not caught.value.definite
        assert again.echo.ran == {}
        assert (await a.endpoint.call("b", "echo", "held", "new")).value == "new"

    run_net(scenario)


def test_a_restarted_caller_does_not_get_its_former_answers(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        b.echo.gate.clear()
        task = asyncio.ensure_future(a.endpoint.call("b", "echo", "held", "old"))
        await until(lambda: "old" in b.echo.ran)
        address = a.endpoint.address
        await a.stop()
        with pytest.raises(Unavailable, match="stopped") as caught:
            await task
        assert not caught.value.definite
        again = await net.node("a", incarnation=2, address=address)
        new = asyncio.ensure_future(again.endpoint.call("b", "echo", "held", "new"))
        await until(lambda: "new" in b.echo.ran)
        b.echo.gate.set()
        assert (await new).value == "new"  # both have the same request id

    run_net(scenario)


def test_an_answer_to_an_earlier_life_is_not_taken_for_ours(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c = [await net.node(name) for name in "abc"]
        for node in (b, c):
            node.echo.gate.clear()
        task = asyncio.ensure_future(a.endpoint.call("b", "echo", "held", "old"))
        await until(lambda: "old" in b.echo.ran)
        address = a.endpoint.address
        await a.stop()
        with pytest.raises(Unavailable):
            await task
        again = await net.node("a", incarnation=2, address=address)
        new = asyncio.ensure_future(again.endpoint.call("c", "echo", "held", "new"))  # the same id as "old"
        await until(lambda: "new" in c.echo.ran)
        b.echo.gate.set()  # b does not know yet that a has restarted
        await until(lambda: again.statistic("dropped_stale") == 1)
        c.echo.gate.set()
        assert (await new).value == "new"

    run_net(scenario)


def test_a_frame_held_back_does_not_enter_another_life(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.endpoint.call("b", "echo", "echo", "warm")
        a.endpoint.links.set("b", "out", delay_s=0.5)
        a.endpoint.cast("b", "echo", "echo", "late")
        a.endpoint.links.clear()
        address = b.endpoint.address
        await b.stop()
        again = await net.node("b", incarnation=2, address=address)
        await again.endpoint.call("a", "echo", "echo", "hello")
        await a.endpoint.call("b", "echo", "echo", "now")
        await until(lambda: a.statistic("dropped_stale") + again.statistic("refused") == 1)
        assert again.echo.ran == {"now": 1}

    run_net(scenario)


def test_an_idle_link_asks_before_it_sends(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.endpoint.call("b", "echo", "echo", 1)
        address = b.endpoint.address
        await b.stop()
        await net.node("b", incarnation=2, address=address)
        peer = a.endpoint._directory.find("b")
        peer.conversation.heard_s -= HELLO_IDLE_S
        assert (await a.endpoint.call("b", "echo", "echo", 2)).value == 2

    run_net(scenario)


def test_a_member_that_moved_is_found(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.endpoint.call("b", "echo", "echo", 1)
        await b.stop()
        again = await net.node("b", incarnation=2, known=False)  # another port; a's list is old
        assert (await again.endpoint.call("a", "echo", "echo", 2)).value == 2
        assert (await a.endpoint.call("b", "echo", "echo", 3)).value == 3
        await again.stop()
        await net.node("b", incarnation=3)  # yet another; this time the list says so, and b is silent
        with contextlib.suppress(Forgotten):
            await a.endpoint.call("b", "echo", "echo", 4)
        assert (await a.endpoint.call("b", "echo", "echo", 5)).value == 5

    run_net(scenario)

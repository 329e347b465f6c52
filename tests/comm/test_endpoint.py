"""Endpoints over loopback: calls under faults and restarts, redirects, large messages, hostile packets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gostore.comm import Endpoint
from gostore.comm.answers import REDIRECTS_MAX
from gostore.comm.calls import HELLO_IDLE_S
from gostore.comm.wire import CAST, REQUEST, Codec, Frame, Identity, length_prefix
from gostore.config import CommConfig
from gostore.core.address import Address
from gostore.core.errors import (
    BadRequest,
    ConfigError,
    Forgotten,
    InternalError,
    NotFound,
    Timeout,
    TooLarge,
    Unavailable,
    UnknownFunction,
    UnknownService,
    Unreachable,
)
from gostore.core.events import Event
from gostore.env import Env, RealClock

Net = Any  # conftest.Net, which pytest does not let us import
Node = Any
Run = Callable[[Callable[[Net], Coroutine[Any, Any, None]]], None]
MIB = 1024 * 1024
WAIT_S = 30.0


async def until(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds; it is looked at again and again."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - anything may be a condition
            await asyncio.sleep(0.001)


def test_calls_and_errors(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        for to in ("b", "a"):  # over the network, and to oneself: the same
            call = a.endpoint.call
            assert (await call(to, "echo", "add", 2, 3)).value == 5
            assert (await call(to, "echo", "add", 2)).value == 3
            nested = {"k": [1, None, 2.5, b"raw", "text"]}
            assert (await call(to, "echo", "echo", nested)).value == nested
            assert (await call(to, "echo", "typed", 1, 2, None, [])).value == "fits"
            with pytest.raises(BadRequest, match=r"a = 'x' is str; expected int"):
                await call(to, "echo", "typed", "x", 2, None, [])
            with pytest.raises(BadRequest, match="2 arguments were given"):
                await call(to, "echo", "typed", 1, 2)
            with pytest.raises(UnknownFunction, match=r"'ecko'; it has: add, block"):
                await call(to, "echo", "ecko")
            with pytest.raises(UnknownService, match=r"'eco'; its services: echo"):
                await call(to, "eco", "echo")
            with pytest.raises(NotFound, match="no thing") as caught:
                await call(to, "echo", "fail", "thing")
            assert caught.value.details == {"hint": "thing"}
            with pytest.raises(InternalError, match="RuntimeError: a bug") as bug:
                await call(to, "echo", "fail", "bug")
            assert not bug.value.definite
            with pytest.raises(BadRequest, match="cannot be sent"):
                await call(to, "echo", "echo", object())
        with pytest.raises(Unreachable, match="'nobody'"):
            await a.endpoint.call("nobody", "echo", "add", 1)
        assert a.statistic("calls_in_flight") == 0
        assert b.statistic("dropped_tag") == 0
        sent = a.statistic("sent_packets_udp")
        await a.endpoint.call("a", "echo", "block", 1, data=b"x" * MIB)
        assert a.statistic("sent_packets_udp") == sent  # to oneself: no packet
        assert a.statistic("sent_packets_tcp") == 0

    run_net(scenario)


def test_a_value_to_oneself_is_a_copy(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a")
        value = [1]
        answer = (await a.endpoint.call("a", "echo", "echo", value)).value
        answer.append(2)
        assert value == [1]

    run_net(scenario)


def test_registration_fails_loudly(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a")
        with pytest.raises(ValueError, match="'echo' is registered twice"):
            a.endpoint.register(type(a.echo)())
        with pytest.raises(TypeError):
            a.endpoint.register(object())

    run_net(scenario)


def test_large_messages_go_over_tcp(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempt_timeout_s=5.0), await net.node("b", attempt_timeout_s=5.0)
        reply = await a.endpoint.call("b", "echo", "block", 3 * MIB, data=memoryview(b"y" * 5 * MIB))
        assert reply.value == 5 * MIB
        assert bytes(reply.data) == b"x" * 3 * MIB
        assert a.statistic("received_packets_tcp") >= 1
        assert b.statistic("received_packets_tcp") >= 1
        replies = await asyncio.gather(
            *[a.endpoint.call("b", "echo", "block", 500_000, data=b"z" * 700_000) for _ in range(40)]
        )
        assert [reply.value for reply in replies] == [700_000] * 40
        assert b.echo.ran["block"] == 41
        assert await a.endpoint.call("b", "echo", "echo", "x" * 100_000)

    run_net(scenario)


def test_large_messages_with_impatient_retries_run_once(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a", attempt_timeout_s=0.005, attempts_max=64)
        b = await net.node("b")
        replies = await asyncio.gather(
            *[a.endpoint.call("b", "echo", "block", MIB, data=b"z" * MIB) for _ in range(10)]
        )
        assert [len(reply.data) for reply in replies] == [MIB] * 10
        assert b.echo.ran["block"] == 10
        # Retries on a stream that still stands ask, and do not send it all again.
        assert a.statistic("sent_bytes_tcp") < 12 * MIB

    run_net(scenario)


def test_oversize_is_refused_on_both_sides(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a", message_size_bytes_max=MIB)
        await net.node("b", message_size_bytes_max=MIB)
        with pytest.raises(TooLarge, match="message_size_bytes_max"):
            await a.endpoint.call("b", "echo", "block", 1, data=b"x" * MIB)
        with pytest.raises(TooLarge, match="an answer of") as caught:
            await a.endpoint.call("b", "echo", "block", MIB + 1)
        assert not caught.value.definite
        with pytest.raises(TooLarge):
            a.endpoint.cast("b", "echo", "echo", "x" * MIB)

    run_net(scenario)


def test_a_thousand_calls_at_once(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempt_timeout_s=0.5), await net.node("b")
        replies = await asyncio.gather(*[a.endpoint.call("b", "echo", "echo", i) for i in range(1000)])
        assert [reply.value for reply in replies] == list(range(1000))
        assert all(count == 1 for count in b.echo.ran.values())
        assert len(b.echo.ran) == 1000
        # One turn of the loop shares packets.
        assert a.statistic("sent_packets_udp") < 200 + a.statistic("retries")

    run_net(scenario)


def test_flushed_means_sent_and_sent_once(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.endpoint.call("b", "echo", "echo", 0)
        before = a.statistic("sent_packets_udp")
        a.endpoint.cast("b", "echo", "echo", 1)
        assert a.statistic("sent_packets_udp") == before
        a.endpoint.flush()
        a.endpoint.flush()
        assert a.statistic("sent_packets_udp") == before + 1
        a.endpoint.cast("b", "echo", "echo", 2)  # in the same turn still: it leaves with its end
        await until(lambda: b.echo.ran == {"0": 1, "1": 1, "2": 1})
        assert a.statistic("sent_packets_udp") == before + 2

    run_net(scenario)


def test_calls_in_flight_are_bounded(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", calls_in_flight_max=16), await net.node("b")
        b.echo.gate.clear()
        tasks = [asyncio.ensure_future(a.endpoint.call("b", "echo", "held", str(i))) for i in range(16)]
        await until(lambda: len(b.echo.ran) == 16)
        with pytest.raises(Unavailable, match="calls_in_flight_max = 16"):
            await a.endpoint.call("b", "echo", "echo", 1)
        b.echo.gate.set()
        await asyncio.gather(*tasks)
        assert (await a.endpoint.call("b", "echo", "echo", 1)).value == 1

    run_net(scenario)


def test_an_overloaded_service_says_so(run_net: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gostore.comm.dispatch.RUNNING_MAX", 2)
    monkeypatch.setattr("gostore.comm.dispatch.WAITING_MAX", 3)

    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        b.echo.gate.clear()
        tasks = [asyncio.ensure_future(a.endpoint.call("b", "echo", "held", str(i))) for i in range(8)]
        await until(lambda: sum(task.done() for task in tasks) == 3)
        for task in tasks:
            if task.done():
                with pytest.raises(Unavailable, match="overloaded"):
                    task.result()
        assert len(b.echo.ran) == 2
        b.echo.gate.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(found, Unavailable) for found in ended) == 3
        assert len(b.echo.ran) == 5
        monkeypatch.setattr("gostore.comm.dispatch.REQUESTS_SIZE_BYTES_MAX", 10_000)
        with pytest.raises(Unavailable, match="overloaded"):
            await a.endpoint.call("b", "echo", "block", 1, data=b"x" * 10_000)
        for _ in range(5):  # what has ended is not counted any more
            await a.endpoint.call("b", "echo", "block", 1, data=b"x" * 5_000)

    run_net(scenario)


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


def test_redirect_triangle(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c, d = [await net.node(name) for name in "abcd"]
        assert (await a.endpoint.call("b", "echo", "pass_on", ["c"], "k")).value == ["c", "a"]
        assert (b.echo.ran["k"], c.echo.ran["k"]) == (1, 1)
        assert (await a.endpoint.call("b", "echo", "pass_on", ["c", "d"], "k2")).value == ["d", "a"]
        assert d.echo.ran["k2"] == 1
        # From oneself, and back to oneself.
        assert (await a.endpoint.call("a", "echo", "pass_on", ["c"], "k3")).value == ["c", "a"]
        assert (await a.endpoint.call("b", "echo", "pass_on", ["a"], "k4")).value == ["a", "a"]
        await until(lambda: b.statistic("redirects") == 3)
        # The answer did not pass through the middle.
        assert b.statistic("answers_late") == 0
        for _ in range(5):  # acknowledgements release what the middle remembers
            await a.endpoint.call("b", "echo", "echo", 1)
        assert b.statistic("calls_in_flight") == 0

    run_net(scenario)


def test_a_redirect_carries_data_and_source(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c = [await net.node(name) for name in "abc"]
        value = "x" * 50_000
        assert (await a.endpoint.call("b", "echo", "pass_on", ["c"], value)).value == ["c", "a"]
        assert value in c.echo.ran
        assert b.statistic("sent_packets_tcp") > 0

    run_net(scenario)


def test_redirects_under_loss_run_once(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c = [await net.node(name, attempts_max=64) for name in "abc"]
        for node in (a, b, c):
            for peer in "abc":
                node.endpoint.links.set(peer, "out", drop=0.3, duplicate=0.3)
        keys = [f"k{i}" for i in range(30)]
        replies = await asyncio.gather(*[a.endpoint.call("b", "echo", "pass_on", ["c"], key) for key in keys])
        assert [reply.value for reply in replies] == [["c", "a"]] * 30
        assert [c.echo.ran[key] for key in keys] == [1] * 30
        assert [b.echo.ran[key] for key in keys] == [1] * 30

    run_net(scenario)


def test_redirects_end(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c = [await net.node(name) for name in "abc"]
        with pytest.raises(Unavailable, match=f"more than {REDIRECTS_MAX} times") as caught:
            await a.endpoint.call("b", "echo", "toss", {"b": "c", "c": "b"})
        assert caught.value.definite
        assert b.echo.ran["toss"] + c.echo.ran["toss"] == REDIRECTS_MAX + 1
        with pytest.raises(Unavailable, match="itself"):
            await a.endpoint.call("b", "echo", "toss", {"b": "b"})
        with pytest.raises(Unreachable, match="nobody"):
            await a.endpoint.call("b", "echo", "toss", {"b": "nobody"})

    run_net(scenario)


def test_an_owner_that_restarted_is_reported_to_the_source(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c = [await net.node(name, attempts_max=64) for name in "abc"]
        c.endpoint.links.set("a", "out", drop=1.0)  # c runs it, and its answer is lost
        task = asyncio.ensure_future(a.endpoint.call("b", "echo", "pass_on", ["c"], "k"))
        await until(lambda: "k" in c.echo.ran)
        address = c.endpoint.address
        await c.stop()
        again = await net.node("c", incarnation=2, address=address)
        with pytest.raises(Forgotten, match="c restarted"):
            await task
        assert again.echo.ran == {}
        assert b.echo.ran["k"] == 1

    run_net(scenario)


def test_ad_hoc_peers_are_answered_where_they_say(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a")
        joiner = await net.node("client-1", known=False)
        net.members.known.clear()
        whole = a.endpoint.address
        for address in (Address(whole.host, whole.tcp_port, 0), whole):  # a join list gives the TCP port only
            assert (await joiner.endpoint.call(address, "echo", "add", 1)).value == 2
        assert (await joiner.endpoint.call("a", "echo", "add", 5)).value == 6  # its name is known now
        assert len((await joiner.endpoint.call(whole, "echo", "block", 100_000)).data) == 100_000
        assert (await a.endpoint.call("client-1", "echo", "add", 7)).value == 8
        assert (await a.endpoint.call(a.endpoint.address, "echo", "add", 1)).value == 2

    run_net(scenario)


def test_an_address_where_another_node_listens_now(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        client = await net.node("client-1", known=False)
        old = await net.node("old", known=False)
        address = old.endpoint.address
        assert (await client.endpoint.call(address, "echo", "add", 1)).value == 2
        await old.stop()
        await net.node("new", known=False, address=address)
        with pytest.raises(Timeout):
            await client.endpoint.call(address, "echo", "add", 1, timeout_s=0.1)
        assert (await client.endpoint.call(address, "echo", "add", 1)).value == 2

    run_net(scenario)


def test_casts(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        for key in ("first", "second"):
            a.endpoint.cast("b", "echo", "echo", key)
        await until(lambda: "second" in b.echo.ran)
        a.endpoint.cast("a", "echo", "echo", "mine")
        await until(lambda: "mine" in a.echo.ran)
        a.endpoint.cast("nobody", "echo", "echo", 1)
        assert a.statistic("dropped_unreachable") == 1
        a.endpoint.cast("b", "echo", "echo")  # wrong, and not silent
        await until(lambda: b.statistic("casts_failed") == 1)
        # Injected duplicates get through to casts: that is what can be taught with them.
        a.endpoint.links.set("b", "out", duplicate=1.0)
        a.endpoint.cast("b", "echo", "echo", "twice")
        await until(lambda: b.echo.ran.get("twice") == 2)

    run_net(scenario)


def test_a_plain_function_runs_without_a_task(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        assert (await a.endpoint.call("b", "echo", "note", "asked")).value is None
        tasks = len(b.endpoint.env.tasks)
        a.endpoint.cast("b", "echo", "note", "told")
        await until(lambda: b.echo.ran.get("told") == 1)
        assert len(b.endpoint.env.tasks) == tasks
        a.endpoint.cast("b", "echo", "note")  # wrong, and not silent
        a.endpoint.cast("b", "echo", "note", "bug")
        await until(lambda: b.statistic("casts_failed") == 2)
        assert all(call.finished for call in b.echo.calls)
        with pytest.raises(InternalError, match="RuntimeError: a bug"):
            await a.endpoint.call("b", "echo", "note", "bug")
        assert b.echo.ran == {"asked": 1, "told": 1}

    run_net(scenario)


def test_casts_find_a_restarted_peer(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        a.endpoint.cast("b", "echo", "echo", 1)
        await until(lambda: "1" in b.echo.ran)
        address = b.endpoint.address
        await b.stop()
        again = await net.node("b", incarnation=2, address=address)

        def arrived() -> bool:
            a.endpoint.cast("b", "echo", "echo", 2)
            return "2" in again.echo.ran

        await until(arrived)

    run_net(scenario)


def test_call_first(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c = [await net.node(name) for name in "abc"]
        first = a.endpoint.call_first
        assert (await first(["nobody", "b", "c"], "echo", "echo", 1)).value == 1
        assert (b.echo.ran, c.echo.ran) == ({"1": 1}, {})
        with pytest.raises(NotFound):  # an answer is an answer
            await first(["b", "c"], "echo", "fail", "x")
        assert "fail" not in c.echo.ran
        a.endpoint.links.set("c", drop=1.0)
        assert (await first(["c", "b"], "echo", "echo", 2, timeout_s=0.4)).value == 2
        for nobody in ([], ["x", "y"]):
            with pytest.raises(Unreachable):
                await first(nobody, "echo", "echo", 3)
        a.endpoint.links.clear()
        await a.endpoint.call("c", "echo", "echo", 4)
        a.endpoint.links.set("c", drop=1.0)
        with pytest.raises(Timeout) as caught:  # c may have done it: b must not
            await first(["c", "b"], "echo", "echo", 5, timeout_s=0.2)
        assert not caught.value.definite
        assert "5" not in b.echo.ran

    run_net(scenario)


def test_pause_and_resume(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a", attempts_max=64), await net.node("b")
        await a.endpoint.call("b", "echo", "block", 1, data=b"x" * 20_000)
        b.endpoint.pause()
        b.endpoint.pause()
        small = asyncio.ensure_future(a.endpoint.call("b", "echo", "echo", "paused"))
        large = asyncio.ensure_future(a.endpoint.call("b", "echo", "block", 1, data=b"x" * 20_000))
        await until(lambda: b.statistic("dropped_paused") >= 2)
        assert b.echo.ran == {"block": 1}
        assert not small.done()
        b.endpoint.resume()
        assert (await small).value == "paused"
        assert (await large).value == 20_000
        assert b.echo.ran == {"block": 2, "paused": 1}

    run_net(scenario)


def test_a_paused_endpoint_sends_nothing(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        a.endpoint.pause()
        with pytest.raises(Timeout):
            await a.endpoint.call("b", "echo", "echo", 1, timeout_s=0.1)
        assert b.endpoint.statistics().get("received_packets_udp", 0) == 0
        assert (await a.endpoint.call("a", "echo", "echo", 1)).value == 1  # it still thinks

    run_net(scenario)


def test_deadlines_are_inherited(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b, c = [await net.node(name, timeout_s=1000.0) for name in "abc"]
        left_s = (await a.endpoint.call("b", "echo", "deadline", "c", timeout_s=20.0)).value
        assert 0 < left_s <= 20.0
        left_s = (await a.endpoint.call("a", "echo", "deadline", "c", timeout_s=20.0)).value
        assert 0 < left_s <= 20.0
        assert 20.0 < (await a.endpoint.call("b", "echo", "deadline", "c")).value <= 1000.0
        with pytest.raises(Timeout, match="no time is left") as caught:
            await a.endpoint.call("b", "echo", "echo", 1, timeout_s=0.0)
        assert caught.value.definite
        assert b.statistic("calls_in_flight") == c.statistic("calls_in_flight") == 0

    run_net(scenario)


def test_a_cancelled_call_leaves_nothing(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        b.echo.gate.clear()
        task = asyncio.ensure_future(a.endpoint.call("b", "echo", "held", "k"))
        await until(lambda: "k" in b.echo.ran)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert a.statistic("calls_in_flight") == 0
        b.echo.gate.set()
        await until(lambda: b.statistic("handlers_running") == 0)
        assert (await a.endpoint.call("b", "echo", "echo", 1)).value == 1

    run_net(scenario)


def test_forget_ends_what_is_under_way(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        b.echo.gate.clear()
        sent = asyncio.ensure_future(a.endpoint.call("b", "echo", "held", "k"))
        await until(lambda: "k" in b.echo.ran)
        a.endpoint.forget("b")
        with pytest.raises(Forgotten, match="has left"):
            await sent
        a.endpoint.links.set("b", drop=1.0)
        unsent = asyncio.ensure_future(a.endpoint.call("b", "echo", "held", "k2"))
        await until(lambda: a.statistic("dropped_fault") > 0)
        a.endpoint.forget("b")
        with pytest.raises(Unreachable, match="has left"):
            await unsent
        a.endpoint.links.clear()
        b.echo.gate.set()
        # Counters go on where they were: the peer's replay window knows the old ones.
        assert (await a.endpoint.call("b", "echo", "echo", 1)).value == 1
        assert b.statistic("dropped_replayed") == 0

    run_net(scenario)


def test_peers_are_bounded(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a", peers_max=16)
        clients = [await net.node(f"client-{i}", known=False) for i in range(20)]
        for client in clients:
            assert (await client.endpoint.call("a", "echo", "echo", client.env.name)).value == client.env.name
        assert a.statistic("peers") == 16
        # The first was forgotten: its session is gone, which it learns, and then goes on.
        with contextlib.suppress(Forgotten):
            await clients[0].endpoint.call("a", "echo", "echo", "again")
        assert (await clients[0].endpoint.call("a", "echo", "echo", "more")).value == "more"
        assert a.echo.ran.get("again", 0) <= 1

    run_net(scenario)


def test_stop_is_complete_and_may_be_repeated(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        await a.endpoint.call("b", "echo", "block", 20_000, data=b"x" * 20_000)
        await a.endpoint.stop()
        await a.endpoint.stop()
        with pytest.raises(Unavailable, match="stopped"):
            await a.endpoint.call("b", "echo", "echo", 1)
        a.endpoint.cast("b", "echo", "echo", 1)
        assert b.echo.ran == {"block": 1}

    run_net(scenario)


def test_hosts_may_have_names(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a", attempts_max=64)
        await net.node("b", address=Address("localhost", 0, 0))
        assert net.members.known["b"].host == "localhost"
        assert (await a.endpoint.call("b", "echo", "add", 1)).value == 2
        assert (await a.endpoint.call("b", "echo", "block", 20_000)).value == 0
        with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
            await net.node("c", address=Address("no.such.host.invalid", 0, 0))

    run_net(scenario)


def test_a_port_in_use_is_named(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a")
        used = a.endpoint.address
        with pytest.raises(ConfigError, match=rf"127.0.0.1.*tcp_port = {used.tcp_port}"):
            await net.node("b", address=Address("127.0.0.1", used.tcp_port, 0))
        with pytest.raises(ConfigError, match=rf"127.0.0.1.*udp_port = {used.udp_port}"):
            await net.node("b", address=Address("127.0.0.1", 0, used.udp_port))

    run_net(scenario)


def test_handed_in_sockets_are_used(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        b = await net.node("b")
        tcp = socket.socket()
        udp = socket.socket(type=socket.SOCK_DGRAM)
        for handle in (tcp, udp):
            handle.bind(("127.0.0.1", 0))
        ports = (tcp.getsockname()[1], udp.getsockname()[1])
        env = Env("a", RealClock(), random.Random(1), None, logging.getLogger("a"), {"tcp": tcp, "udp": udp})  # type: ignore[arg-type]
        endpoint = Endpoint(
            env,
            cluster="test",
            secret="0123456789abcdef",
            host="127.0.0.1",
            incarnation=1,
            resolver=net.members,
            config=CommConfig(),
        )
        await endpoint.start()
        assert (endpoint.address.tcp_port, endpoint.address.udp_port) == ports
        assert (await endpoint.call("b", "echo", "block", 20_000)).value == 0
        await endpoint.stop()
        await env.tasks.stop()
        assert b.echo.ran == {"block": 1}

    run_net(scenario)


# Hostile and foreign packets


class Stranger:
    """Somebody with a UDP socket and a TCP connection."""

    def __init__(self, node: Node) -> None:
        self.at = node.endpoint.address
        self.udp = socket.socket(type=socket.SOCK_DGRAM)
        self.udp.setblocking(False)

    def send(self, packet: bytes) -> None:
        self.udp.sendto(packet, (self.at.host, self.at.udp_port))

    async def stream(self, data: bytes) -> bytes:
        """Sends on a new connection; returns when the other side has cut it."""
        reader, writer = await asyncio.open_connection(self.at.host, self.at.tcp_port)
        writer.write(data)
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def sealed(cluster: str, secret: str, frame: Frame, *, receiver: bytes = b"b", incarnation: int = 1) -> bytes:
    sender = Identity("x", 1, Address("127.0.0.1", 1, 1))
    return b"".join(Codec(cluster, secret).seal(sender, receiver, incarnation, 1, 1, [frame.encode()]))


def test_hostile_packets_are_counted_and_nothing_dies(run_net: Run) -> None:
    secret, cast = "0123456789abcdef", Frame(CAST, 0, b"echo.echo", b"\x91\x01")
    good = sealed("test", secret, cast)
    cases = [
        ("truncated", b""),
        ("truncated", good[:20]),
        ("tag", good[:-1]),
        ("tag", good[:40] + b"\xff" + good[41:]),
        ("tag", sealed("test", "another secret!!", cast)),
        ("foreign", sealed("other", secret, cast)),
        ("version", b"\xff" + good[1:]),
        ("version", bytes(random.Random(1).randbytes(1000))),
        ("misdirected", sealed("test", secret, cast, receiver=b"c")),
        ("misdirected", sealed("test", secret, cast, receiver=b"")),
    ]

    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        stranger = Stranger(b)
        for reason, packet in cases:
            before = b.statistic(f"dropped_{reason}")
            stranger.send(packet)
            await until(lambda reason=reason, before=before: b.statistic(f"dropped_{reason}") == before + 1)
            before = b.statistic(f"dropped_{reason}")
            await stranger.stream(length_prefix(len(packet)) + packet)
            assert b.statistic(f"dropped_{reason}") == before + 1
        await stranger.stream(length_prefix(100_000_000))
        await stranger.stream(length_prefix(5000) + b"x" * 10)  # too much for one who has shown no tag
        assert b.statistic("dropped_oversized") == 2
        stranger.udp.close()
        assert b.echo.ran == {}
        assert (await a.endpoint.call("b", "echo", "echo", 1)).value == 1

    run_net(scenario)


def test_a_replayed_packet_is_dropped(run_net: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        packets: list[bytes] = []
        seal = Codec.seal

        def record(self: Codec, *args: Any) -> list[bytes | memoryview]:
            parts = seal(self, *args)
            packets.append(b"".join(parts))
            return parts

        monkeypatch.setattr(Codec, "seal", record)
        await a.endpoint.call("b", "echo", "echo", "warm")
        a.endpoint.cast("b", "echo", "echo", "once")
        await until(lambda: "once" in b.echo.ran)
        stranger = Stranger(b)
        mine = [packet for packet in packets if b"\x01a127.0.0.1" in packet]
        for packet in mine:
            stranger.send(packet)
        await until(lambda: b.statistic("dropped_replayed") == len(mine))
        stranger.udp.close()
        assert b.echo.ran == {"warm": 1, "once": 1}

    run_net(scenario)


def test_requests_without_a_session_are_refused(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        b = await net.node("b")
        stranger = Stranger(b)
        request = Frame(REQUEST, 1, b"echo.echo", b"\x91\x01", remaining_ms=1000)
        stranger.send(sealed("test", "0123456789abcdef", request))
        await until(lambda: b.statistic("refused") == 1)
        stranger.udp.close()
        assert b.echo.ran == {}

    run_net(scenario)


def test_a_namesake_is_refused(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a = await net.node("a")
        other = await net.node("a", incarnation=2, known=False)
        with pytest.raises(Timeout):
            await other.endpoint.call(a.endpoint.address, "echo", "echo", 1, timeout_s=0.1)
        assert a.statistic("dropped_namesake") > 0

    run_net(scenario)


# Events


def test_events_tell_who_caused_what(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        nodes = {name: await net.node(name) for name in "abc"}
        events: dict[tuple[str, int], Event] = {}
        for node in nodes.values():
            node.env.events.subscribe(lambda event: events.__setitem__(event.id, event))
        await nodes["a"].endpoint.call("b", "echo", "deadline", "c")
        await until(lambda: any(e.node == "a" and e.data.get("frame") == "response" for e in events.values()))
        answer = next(e for e in events.values() if e.node == "a" and e.data.get("frame") == "response")
        chain = [answer]
        while chain[-1].cause is not None:
            chain.append(events[chain[-1].cause])
        told = [(e.node, e.kind, e.data["frame"], e.data["function"]) for e in reversed(chain)]
        # The nested call is caused by the request: a's send -> b's recv -> b's send to c -> c's recv ...
        assert told[-1] == ("a", "recv", "response", "")
        requests = [e for e in events.values() if e.kind == "recv" and e.data["frame"] == "request"]
        inner = next(e for e in requests if e.node == "c")
        inner_send = events[inner.cause or ("", 0)]
        outer = events[inner_send.cause or ("", 0)]
        assert (inner_send.node, inner_send.kind, outer.node, outer.kind) == ("b", "send", "b", "recv")
        assert events[outer.cause or ("", 0)].node == "a"
        for event in events.values():
            if event.cause is not None:
                assert event.stamp > events[event.cause].stamp
        nodes["a"].endpoint.links.set("b", drop=1.0)
        nodes["a"].endpoint.cast("b", "echo", "echo", 1)
        assert any(e.kind == "drop" and e.data["reason"] == "fault" for e in events.values())

    run_net(scenario)


def test_without_listeners_stamps_still_travel(run_net: Run) -> None:
    async def scenario(net: Net) -> None:
        a, b = await net.node("a"), await net.node("b")
        ahead = a.env.hlc.tick(a.env.wall_ms() + 5000)
        await a.endpoint.call("b", "echo", "echo", 1)
        assert b.env.hlc.last > ahead

    run_net(scenario)

"""Endpoints on real sockets: calls, casts, sizes, deadlines, life and death."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket

import pytest

from gostore.comm import Endpoint
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
from gostore.env import Env, RealClock

from .conftest import MIB, Net, Run, until


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

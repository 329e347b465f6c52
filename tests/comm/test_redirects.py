"""Requests that another node answers, and peers known by address only."""

from __future__ import annotations

import asyncio

import pytest

from gostore.comm.answers import REDIRECTS_MAX
from gostore.core.address import Address
from gostore.core.errors import (
    Forgotten,
    Timeout,
    Unavailable,
    Unreachable,
)

from .conftest import Net, Run, until


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

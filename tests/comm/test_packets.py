"""Hostile and foreign packets, and the events of good ones."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from typing import Any

import pytest

from gostore.comm.wire import CAST, REQUEST, Codec, Frame, Identity, length_prefix
from gostore.core.address import Address
from gostore.core.errors import (
    Timeout,
)
from gostore.core.events import Event

from .conftest import Net, Node, Run, until


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

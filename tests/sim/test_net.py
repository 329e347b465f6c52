"""Datagrams, names and addresses, and the faults of links."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.sim.links import Link, Links
from gostore.sim.net import NetConfig
from gostore.sim.world import World


class Inbox(asyncio.DatagramProtocol):
    def __init__(self):
        self.received: list[tuple[bytes, tuple[str, int]]] = []
        self.times: list[float] = []
        self.errors: list[Exception] = []
        self.lost = False

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.received.append((data, addr))
        self.times.append(asyncio.get_running_loop().time())

    def error_received(self, exc):
        self.errors.append(exc)

    def connection_lost(self, exc):
        self.lost = True


async def bind(node):
    loop = asyncio.get_running_loop()
    node.transport, node.inbox = await loop.create_datagram_endpoint(Inbox, (node.address, 5000))


def pair(world):
    a, b = world.add_node("a", bind), world.add_node("b", bind)
    world.run_for(0.001)
    return a, b


def send(world, source, target, count, size=10):
    async def burst():
        for i in range(count):
            source.transport.sendto(i.to_bytes(size, "big"), (target.address, 5000))
            await asyncio.sleep(0.000_1)

    source.spawn(burst(), name="burst")


def numbers(node):
    return [int.from_bytes(data, "big") for data, _ in node.inbox.received]


def test_a_datagram_arrives_with_its_senders_address_after_the_latency():
    with World(1) as world:
        a, b = pair(world)
        send(world, a, b, 1)
        begin = world.now
        world.run_for(1)
        assert b.inbox.received == [(bytes(10), ("10.0.0.1", 5000))]
        assert 0.0001 < b.inbox.times[0] - begin < 0.005
        assert a.transport.get_extra_info("sockname") == ("10.0.0.1", 5000)
        assert a.transport.get_extra_info("socket").getsockname() == ("10.0.0.1", 5000)


def test_loss_takes_about_its_share_and_counts_it():
    with World(1) as world:
        a, b = pair(world)
        world.net.links.set("a", "b", loss=0.3)
        send(world, a, b, 2000)
        send(world, b, a, 200)
        world.run_for(1)
        assert 1300 < len(b.inbox.received) < 1500
        assert len(a.inbox.received) == 200
        assert world.statistics()["dropped, loss"] == 2000 - len(b.inbox.received)


def test_duplicates_reordering_and_delay():
    with World(1) as world:
        a, b = pair(world)
        world.net.links.set("a", "b", duplicate=0.2, sigma=0.0)
        send(world, a, b, 1000)
        world.run_for(1)
        counts = Counter(numbers(b))
        assert set(counts) == set(range(1000))
        assert 120 < sum(1 for c in counts.values() if c == 2) < 280
        b.inbox.received.clear()
        world.net.links.set("a", "b", duplicate=0.0, sigma=0.0)
        send(world, a, b, 500)
        world.run_for(1)
        assert numbers(b) == list(range(500))  # without spread nothing overtakes
        b.inbox.received.clear()
        world.net.links.set("a", "b", reorder=0.5)
        send(world, a, b, 500)
        world.run_for(1)
        assert numbers(b) != list(range(500))
        assert sorted(numbers(b)) == list(range(500))
        b.inbox.received.clear()
        world.net.links.clear()
        world.net.links.set("a", "b", delay_s=2.0, jitter_s=0.5)
        send(world, a, b, 1)
        begin = world.now
        world.run_for(5)
        assert 2.0 < b.inbox.times[-1] - begin < 2.6


def test_a_one_way_cut_takes_what_is_under_way_and_leaves_the_other_direction():
    with World(1) as world:
        a, b = pair(world)
        world.net.links.set("a", "b", delay_s=1.0)
        send(world, a, b, 1)
        world.run_for(0.5)
        world.net.cut(["a"], ["b"])
        send(world, a, b, 3)
        send(world, b, a, 3)
        world.run_for(2)
        assert b.inbox.received == []
        assert sorted(numbers(a)) == [0, 1, 2]
        world.net.heal()
        send(world, a, b, 1)
        world.run_for(1)
        assert numbers(b) == [0]


def test_a_partition_separates_groups_and_nobody_else():
    with World(1) as world:
        nodes = [world.add_node(name, bind) for name in "abcd"]
        world.run_for(0.001)
        world.net.partition(["a", "b"], ["c"])
        for source in nodes:
            for target in nodes:
                if source is not target:
                    send(world, source, target, 1)
        world.run_for(1)
        heard = {n.name: sorted(world.net.name_of(addr[0]) for _, addr in n.inbox.received) for n in nodes}
        assert heard == {"a": ["b", "d"], "b": ["a", "d"], "c": ["d"], "d": ["a", "b", "c"]}


def test_a_paused_node_keeps_what_fits_into_its_receive_buffer():
    with World(1, net=NetConfig(receive_buffer_bytes=20_000)) as world:
        a, b = pair(world)
        world.pause("b")
        send(world, a, b, 100, size=1000)
        world.run_for(1)
        world.resume("b")
        world.run_for(1)
        kept = len(b.inbox.received)
        assert 10 <= kept < 20
        assert world.net.drops == {"buffer full": 100 - kept}
        send(world, a, b, 5)
        world.run_for(1)
        assert len(b.inbox.received) == kept + 5


def test_bandwidth_delays_a_burst_of_large_datagrams():
    with World(1, net=NetConfig(bandwidth_bytes_per_s=1e6, link=Link(sigma=0))) as world:
        a, b = pair(world)
        for _ in range(3):
            a.transport.sendto(bytes(50_000), (b.address, 5000))
        begin = world.now
        world.run_for(1)
        assert [t - begin for t in b.inbox.times] == pytest.approx([0.0505, 0.1005, 0.1505], abs=0.001)


def test_nobody_there_dead_processes_and_machines():
    with World(1) as world:
        a, b = pair(world)
        a.transport.sendto(b"x", (b.address, 9))
        a.transport.sendto(b"x", ("10.9.9.9", 5000))
        world.run_for(1)
        assert world.net.drops == {"no such host": 1, "no such port": 1}
        world.crash("b")
        a.transport.sendto(b"x", (b.address, 5000))
        world.run_for(1)
        world.power_cut("b")
        a.transport.sendto(b"x", (b.address, 5000))
        world.run_for(1)
        assert world.net.drops == {"no such host": 1, "no such port": 2, "down": 1}
        world.restart("b")
        world.run_for(0.1)
        a.transport.sendto(b"again", (b.address, 5000))
        world.run_for(1)
        assert b.inbox.received == [(b"again", ("10.0.0.1", 5000))]


def test_too_large_and_misuse():
    with World(1) as world:
        a, _ = pair(world)
        a.transport.sendto(bytes(65_508), ("10.0.0.2", 5000))
        world.run_for(1)
        assert a.inbox.errors[0].errno == 90
        with pytest.raises(ValueError, match="needs an address"):
            a.transport.sendto(b"x")
        a.transport.close()
        a.transport.close()
        world.run_for(1)
        assert a.inbox.lost
        assert a.transport.is_closing()


def test_binding():
    async def main(node):
        loop = asyncio.get_running_loop()
        first, _ = await loop.create_datagram_endpoint(Inbox, ("0.0.0.0", 0))
        second, _ = await loop.create_datagram_endpoint(Inbox, (node.address, 0))
        ports = [t.get_extra_info("sockname")[1] for t in (first, second)]
        assert ports[0] != ports[1]
        with pytest.raises(OSError, match="already in use"):
            await loop.create_datagram_endpoint(Inbox, ("127.0.0.1", ports[0]))
        with pytest.raises(OSError, match="not an address of a"):
            await loop.create_datagram_endpoint(Inbox, ("10.0.0.77", 0))
        first.close()
        await loop.create_datagram_endpoint(Inbox, ("127.0.0.1", ports[0]))
        return True

    with World(1) as world:
        node = world.add_node("a", main)
        world.run_for(1)
        assert node.task.result()


def test_loopback_is_each_hosts_own_and_a_connected_socket_hears_its_peer_only():
    async def main(node):
        loop = asyncio.get_running_loop()
        _, inbox = await loop.create_datagram_endpoint(Inbox, ("127.0.0.1", 7000))
        sender, _ = await loop.create_datagram_endpoint(Inbox, remote_addr=("localhost", 7000))
        sender.sendto(node.name.encode())
        await asyncio.sleep(0.1)
        inbox.transport.sendto(b"back", inbox.received[0][1])
        stranger, _ = await loop.create_datagram_endpoint(Inbox, ("127.0.0.1", 0))
        stranger.sendto(b"no", inbox.received[0][1])
        await asyncio.sleep(0.1)
        return [data for data, _ in inbox.received], [data for data, _ in sender.get_protocol().received]

    with World(1) as world:
        nodes = [world.add_node(name, main) for name in "ab"]
        world.net.partition(["a"], ["b"])
        world.run_for(1)
        assert [n.task.result() for n in nodes] == [([b"a"], [b"back"]), ([b"b"], [b"back"])]


def test_names():
    async def main(node):
        loop = asyncio.get_running_loop()
        assert (await loop.getaddrinfo("b", 80, type=socket.SOCK_STREAM))[0][4] == ("10.0.0.2", 80)
        assert {i[4] for i in await loop.getaddrinfo("localhost", "80")} == {("127.0.0.1", 80)}
        assert (await loop.getnameinfo(("10.0.0.2", 80)))[0] == "b"
        with pytest.raises(socket.gaierror, match="not known in this world"):
            await loop.getaddrinfo("example.org", 80)
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo("b", "http")
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo("b", 80, family=socket.AF_INET6)
        return True

    with World(1) as world:
        node = world.add_node("a", main)
        world.add_node("b")
        world.run_for(1)
        assert node.task.result()
        with pytest.raises(ValueError, match="'b' already"):
            world.add_node("b")
        with pytest.raises(RuntimeError, match="no node 'c'; there are: a, b"):
            world.crash("c")


# -- links


@given(st.floats(-1, 2))
def test_a_link_takes_probabilities_and_times_only(value):
    if 0 <= value <= 1:
        Link(loss=value, duplicate=value, reorder=value)
    else:
        with pytest.raises(ValueError, match="from 0 to 1"):
            Link(loss=value)
    if value < 0:
        with pytest.raises(ValueError, match="delay_s"):
            Link(delay_s=value)


@given(st.floats(0, 1), st.floats(0, 0.1), st.floats(0, 0.1), st.integers(0, 1000))
@settings(max_examples=30)
def test_latency_is_at_least_the_delay_and_its_median_is_the_latency(sigma, delay_s, jitter_s, seed):
    rng = World(seed).rng("test")
    link = Link(latency_s=0.001, sigma=sigma, delay_s=delay_s, jitter_s=jitter_s)
    draws = sorted(link.draw_s(rng) - delay_s for _ in range(400))
    assert draws[0] >= 0
    assert 0.0007 <= draws[200] <= 0.0014 + jitter_s


def test_links_change_one_direction_and_clear():
    links = Links(Link())
    links.set("a", "b", loss=0.5)
    links.set("a", "b", delay_s=1.0)
    links.set("b", "a", cut=True)
    assert links.get("a", "b") == Link(loss=0.5, delay_s=1.0)
    assert links.get("a", "c") is links.default
    assert [(a, b) for a, b, _ in links] == [("a", "b"), ("b", "a")]
    links.clear("a")
    assert [(a, b) for a, b, _ in links] == [("b", "a")]
    links.clear()
    assert list(links) == []
    with pytest.raises(TypeError):
        links.set("a", "b", speed=3)

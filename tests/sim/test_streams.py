"""Byte streams: order, back-pressure, half close, resets, loss, cuts, dead processes and dead machines."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.sim.net import NetConfig
from gostore.sim.world import World


async def echo_server(node):
    node.ends = []

    async def serve(reader, writer):
        node.reader, node.writer = reader, writer
        try:
            while data := await reader.read(100_000):
                writer.write(data)
                await writer.drain()
            writer.close()
            node.ends.append("eof")
        except OSError as error:
            node.ends.append(type(error).__name__)

    node.server = await asyncio.start_server(serve, node.address, 80)
    async with node.server:
        await node.server.serve_forever()


def talk(world, coroutine, **options):
    return world.run(coroutine, **options)


SIZES = st.lists(st.integers(1, 200_000), min_size=1, max_size=8)


@given(st.integers(0, 10_000), SIZES, st.sampled_from([0, 0.1, 0.3]))
@settings(max_examples=40, deadline=None)
def test_bytes_arrive_once_and_in_order_whatever_is_lost(seed, sizes, loss):
    payload = random.Random(seed).randbytes(sum(sizes))

    async def client(world):
        reader, writer = await asyncio.open_connection("server", 80)
        world.net.links.set("client", "server", loss=loss)
        world.net.links.set("server", "client", loss=loss)

        async def send():
            position = 0
            for size in sizes:
                writer.write(payload[position : position + size])
                position += size
                await writer.drain()
            writer.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            received = group.create_task(reader.read())
        writer.close()
        return received.result()

    with World(seed) as world:
        world.add_node("server", echo_server)
        assert talk(world, client(world)) == payload


def test_addresses_and_the_socket():
    async def client(world):
        _, writer = await asyncio.open_connection("10.0.0.1", 80)
        await asyncio.sleep(0.1)
        server = world.node("server").writer
        assert writer.get_extra_info("peername") == ("10.0.0.1", 80) == server.get_extra_info("sockname")
        assert writer.get_extra_info("sockname") == server.get_extra_info("peername")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(6, 1, True)
        assert sock.getsockopt(6, 1)
        assert sock.getpeername() == ("10.0.0.1", 80)
        writer.close()
        await writer.wait_closed()

    with World(1) as world:
        server = world.add_node("server", echo_server)
        talk(world, client(world))
        world.run_for(1)
        assert server.ends == ["eof"]
        assert not server.host.streams
        assert not world.client().host.streams


class Sink(asyncio.Protocol):
    """Never reads until it is told to."""

    def connection_made(self, transport):
        self.transport = transport
        transport.pause_reading()
        self.received = bytearray()
        self.lost = asyncio.get_running_loop().create_future()

    def data_received(self, data):
        self.received += data

    def connection_lost(self, exc):
        self.lost.set_result(exc)


class Source(asyncio.Protocol):
    def __init__(self):
        self.calls = []
        self.eof = False

    def connection_made(self, transport):
        self.transport = transport

    def pause_writing(self):
        self.calls.append("pause")

    def resume_writing(self):
        self.calls.append("resume")

    def eof_received(self):
        self.eof = True

    def connection_lost(self, exc):
        self.calls.append(type(exc).__name__ if exc else "closed")


async def sink_server(node):
    def factory():
        node.sink = Sink()
        return node.sink

    node.server = await asyncio.get_running_loop().create_server(factory, node.address, 80)


def test_back_pressure_stops_the_writer_until_the_reader_reads():
    async def client(world):
        loop = asyncio.get_running_loop()
        transport, source = await loop.create_connection(Source, "server", 80)
        sent = 0
        while "pause" not in source.calls:
            transport.write(bytes(10_000))
            sent += 10_000
        # The window, and then the buffer up to the high-water mark; not more.
        assert 262_144 + 65_536 < sent <= 262_144 + 65_536 + 10_000
        await asyncio.sleep(100)
        assert source.calls == ["pause"]
        assert transport.get_write_buffer_size() > transport.get_write_buffer_limits()[0]
        world.node("server").sink.transport.resume_reading()
        await asyncio.sleep(1)
        assert source.calls == ["pause", "resume"]
        assert len(world.node("server").sink.received) == sent
        transport.close()
        await asyncio.sleep(1)
        assert source.calls == ["pause", "resume", "closed"]
        assert world.node("server").sink.lost.result() is None

    with World(1) as world:
        world.add_node("server", sink_server)
        talk(world, client(world))


def test_half_close_and_closing_by_default():
    async def client():
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection("server", 80)
        writer.write(b"question")
        writer.write_eof()
        assert writer.can_write_eof()
        assert await reader.read() == b"question"
        with pytest.raises(RuntimeError):
            writer.write(b"more")
        writer.close()
        await writer.wait_closed()
        # A protocol whose eof_received() returns nothing closes its side by itself.
        _, source = await loop.create_connection(Source, "server", 80)
        source.transport.write(b"x")
        await asyncio.sleep(0.1)
        return source

    with World(1) as world:
        server = world.add_node("server", echo_server)
        source = talk(world, client())
        server.writer.close()
        world.run_for(1)
        assert source.eof
        assert source.calls == ["closed"]


def test_abort_and_unread_bytes_reset_the_peer():
    async def client(world):
        _, writer = await asyncio.open_connection("server", 80)
        writer.write(b"x")
        await asyncio.sleep(0.1)
        writer.transport.abort()
        await asyncio.sleep(0.1)
        assert world.node("server").ends == ["ConnectionResetError"]
        # The server echoes into a connection that its client closes without having read.
        transport, _ = await asyncio.get_running_loop().create_connection(Source, "server", 80)
        transport.pause_reading()
        transport.write(bytes(1000))
        await asyncio.sleep(0.1)
        transport.close()
        await asyncio.sleep(0.1)
        assert world.node("server").ends == ["ConnectionResetError"] * 2

    with World(1) as world:
        world.add_node("server", echo_server)
        talk(world, client(world))


def test_writing_to_a_closed_connection_is_answered_by_a_reset():
    async def client(world):
        transport, source = await asyncio.get_running_loop().create_connection(Source, "server", 80)
        await asyncio.sleep(0.1)
        world.node("server").sink.transport.close()
        await asyncio.sleep(0.1)
        assert source.calls == ["closed"]

        class Stubborn(Source):
            def eof_received(self):
                return True  # keeps its side open

        transport, source = await asyncio.get_running_loop().create_connection(Stubborn, "server", 80)
        await asyncio.sleep(0.1)
        world.node("server").sink.transport.close()
        await asyncio.sleep(0.1)
        assert source.calls == []
        transport.write(b"anybody?")
        await asyncio.sleep(0.1)
        assert source.calls == ["ConnectionResetError"]

    with World(1) as world:
        world.add_node("server", sink_server)
        talk(world, client(world))


def test_refused_unknown_timed_out_and_cancelled():
    async def client(world):
        loop = asyncio.get_running_loop()
        begin = loop.time()
        with pytest.raises(ConnectionRefusedError, match="nobody listens"):
            await asyncio.open_connection("server", 81)
        assert loop.time() - begin < 0.01
        with pytest.raises(OSError, match="timed out"):
            await asyncio.open_connection("10.1.2.3", 80)
        assert 15 < loop.time() - begin < 60
        world.net.cut(["server"], ["client"])  # only the answers are lost
        with pytest.raises(TimeoutError):
            await asyncio.open_connection("server", 80)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection("server", 80), 0.5)
        world.net.heal()
        await asyncio.sleep(100)
        _, writer = await asyncio.open_connection("server", 80)
        writer.close()

    with World(1) as world:
        server = world.add_node("server", echo_server)
        talk(world, client(world))
        world.run_for(1)
        assert server.ends == ["eof"]
        assert not server.host.streams


def test_a_short_cut_delays_and_a_long_one_resets_the_side_that_sends():
    async def client(world):
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection("server", 80)
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        world.net.partition(["client"], ["server"])
        begin = loop.time()
        writer.write(b"2")
        loop.call_later(5, world.net.heal)
        assert await reader.readexactly(1) == b"2"
        assert 5 < loop.time() - begin < 8
        world.net.cut(["client"], ["server"])
        writer.write(b"3")
        with pytest.raises(TimeoutError):
            await reader.readexactly(1)
        assert 20 < loop.time() - begin < 40
        await asyncio.sleep(200)
        assert world.node("server").ends == []  # it has heard nothing

    with World(1) as world:
        world.add_node("server", echo_server)
        talk(world, client(world))


def test_one_way_cut_of_the_acknowledgements_delivers_and_then_resets_the_sender():
    async def client(world):
        transport, source = await asyncio.get_running_loop().create_connection(Source, "server", 80)
        await asyncio.sleep(0.1)
        sink = world.node("server").sink
        sink.transport.resume_reading()
        world.net.cut(["server"], ["client"])
        transport.write(b"hello")
        await asyncio.sleep(1)
        assert sink.received == b"hello"
        assert source.calls == []
        await asyncio.sleep(40)
        assert source.calls == ["TimeoutError"]

    with World(1) as world:
        world.add_node("server", sink_server)
        talk(world, client(world))


def test_an_unread_byte_is_acknowledged_by_the_kernel_unless_the_way_back_is_cut():
    async def client(world, cut):
        transport, source = await asyncio.get_running_loop().create_connection(Source, "server", 80)
        await asyncio.sleep(0.1)
        if cut:
            world.net.cut(["server"], ["client"])
        transport.write(b"hello")  # the server does not read
        await asyncio.sleep(60)
        return source.calls

    for cut in (False, True):
        with World(1) as world:
            world.add_node("server", sink_server)
            assert talk(world, client(world, cut)) == (["TimeoutError"] if cut else [])


def test_a_killed_process_ends_its_connections_at_once():
    async def client(world):
        reader, writer = await asyncio.open_connection("server", 80)
        writer.write(b"x")
        await reader.readexactly(1)
        begin = asyncio.get_running_loop().time()
        world.crash("server")
        assert await reader.read() == b""
        assert asyncio.get_running_loop().time() - begin < 0.01
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("server", 80)
        world.restart("server")
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection("server", 80)
        writer.write(b"y")
        assert await reader.readexactly(1) == b"y"
        writer.close()

    with World(1) as world:
        world.add_node("server", echo_server)
        talk(world, client(world))


def test_a_power_cut_is_silent_and_the_restarted_machine_resets():
    async def client(world):
        reader, writer = await asyncio.open_connection("server", 80)
        writer.write(b"x")
        await reader.readexactly(1)
        world.power_cut("server")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 10)
        writer.write(b"y")
        await asyncio.sleep(5)
        world.restart("server")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)

    with World(1) as world:
        world.add_node("server", echo_server)
        talk(world, client(world))


def test_a_paused_server_is_connected_to_by_its_kernel_and_answers_later():
    async def client(world):
        world.pause("server")
        reader, writer = await asyncio.open_connection("server", 80)
        writer.write(b"x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 10)
        world.resume("server")
        assert await reader.readexactly(1) == b"x"
        writer.close()

    with World(1) as world:
        world.add_node("server", echo_server)
        world.run_for(0.1)
        talk(world, client(world))


def test_reset_as_a_fault():
    async def client(world):
        reader, writer = await asyncio.open_connection("server", 80)
        writer.write(b"x")
        await reader.readexactly(1)
        assert world.net.reset("client", "server") == 1
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        assert world.net.reset("client", "server") == 0

    with World(1) as world:
        server = world.add_node("server", echo_server)
        talk(world, client(world))
        world.run_for(1)
        assert server.ends == ["ConnectionResetError"]


def test_loopback_needs_no_network():
    async def main(node):
        server = await asyncio.start_server(lambda r, w: w.close(), "localhost", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        return True

    with World(1) as world:
        node = world.add_node("a", main)
        world.add_node("b")
        world.net.partition(["a"], ["b"])
        world.run_for(1)
        assert node.task.result()


def test_a_full_backlog_makes_clients_wait():
    async def main(node):
        node.accepted = 0

        class Count(asyncio.Protocol):
            def connection_made(self, transport):
                node.accepted += 1

        await asyncio.get_running_loop().create_server(Count, node.address, 80, backlog=2)

    async def client(world):
        world.pause("server")
        results = [asyncio.create_task(asyncio.open_connection("server", 80)) for _ in range(4)]
        await asyncio.sleep(0.5)
        assert sum(r.done() for r in results) == 2
        world.resume("server")
        await asyncio.gather(*results)
        return asyncio.get_running_loop().time()

    with World(1) as world:
        server = world.add_node("server", main)
        world.run_for(0.1)
        assert talk(world, client(world)) > 1
        world.run_for(1)
        assert server.accepted == 4


def test_buffered_protocols_and_split_segments():
    class Buffered(asyncio.BufferedProtocol):
        def connection_made(self, transport):
            self.buffer = bytearray(100)
            self.received = bytearray()
            self.pieces = 0
            self.transport = transport

        def get_buffer(self, sizehint):
            return self.buffer

        def buffer_updated(self, count):
            self.received += self.buffer[:count]
            self.pieces += 1

    async def client(world):
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.create_connection(Buffered, "server", 80)
        transport.write(bytes(range(250)))
        await asyncio.sleep(1)
        assert protocol.received == bytes(range(250))
        assert protocol.pieces >= 4  # 100, 100, 50 and a split
        transport.close()

    with World(1, net=NetConfig(split=1.0)) as world:
        world.add_node("server", echo_server)
        talk(world, client(world))


def test_a_factory_that_raises_and_tls():
    async def main(node):
        await asyncio.get_running_loop().create_server(lambda: 1 / 0, node.address, 80)

    async def client():
        reader, writer = await asyncio.open_connection("server", 80)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        with pytest.raises(NotImplementedError, match="TLS"):
            await asyncio.open_connection("server", 80, ssl=True)

    with World(1) as world:
        server = world.add_node("server", main)
        talk(world, client())
        assert "ZeroDivisionError" in server.loop.errors[0]

"""A library that knows nothing of us: an aiohttp server and client, unmodified, with virtual time in its headers."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web

from gostore.sim.world import World


async def serve(node):
    async def hello(request):
        await asyncio.sleep(0.5)
        return web.json_response({"node": node.name, "peer": request.remote, "body": await request.text()})

    async def stream(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for i in range(200):
            await response.write(bytes([i]) * 10_000)
        await response.write_eof()
        return response

    application = web.Application(client_max_size=1 << 26)
    application.router.add_route("*", "/hello", hello)
    application.router.add_get("/stream", stream)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, node.address, 8080).start()


def ask(seed=1):
    async def client(world):
        async with aiohttp.ClientSession() as session:
            async with session.get("http://10.0.0.1:8080/hello") as response:
                first = (response.status, response.headers["Date"], await response.json())
            async with session.post("http://10.0.0.1:8080/hello", data=bytes(900_000)) as response:
                assert len((await response.json())["body"]) == 900_000
            async with session.get("http://10.0.0.1:8080/stream") as response:
                body = await response.read()
            async with session.get("http://n1:8080/missing") as response:
                assert response.status == 404
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get("http://10.0.0.1:81/")
            async with asyncio.TaskGroup() as group:
                answers = [group.create_task(_get(session)) for _ in range(20)]
            assert [a.result() for a in answers] == [200] * 20
        return first, body

    with World(seed) as world:
        world.add_node("n1", serve)
        world.run_for(3600 * 5)
        first, body = world.run(client(world))
        assert world.node("n1").loop.errors == []
        return first, body, world.trace.sha256


async def _get(session):
    async with session.get("http://n1:8080/hello") as response:
        return response.status


def test_requests_answers_streams_and_the_date():
    (status, date, answer), body, _ = ask()
    assert status == 200
    assert date == "Thu, 01 Jan 2026 05:00:00 GMT"
    assert answer == {"node": "n1", "peer": "10.0.0.2", "body": ""}
    assert body == b"".join(bytes([i]) * 10_000 for i in range(200))


def test_it_is_deterministic():
    assert ask(5)[2] == ask(5)[2]
    assert ask(5)[2] != ask(6)[2]


def test_a_crashed_server_and_a_client_with_a_timeout():
    async def client(world):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            request = asyncio.create_task(session.get("http://n1:8080/hello"))
            await asyncio.sleep(0.2)
            world.crash("n1")
            with pytest.raises(aiohttp.ClientConnectionError):  # it tries again, and is refused
                await request
            world.restart("n1")
            await asyncio.sleep(0.1)
            world.pause("n1")
            with pytest.raises(TimeoutError):
                await session.get("http://n1:8080/hello")

    with World(1) as world:
        world.add_node("n1", serve)
        world.run_for(1)
        world.run(client(world))

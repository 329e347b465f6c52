from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from gostore.config import NodeConfig, RestConfig
from gostore.core.auth import rest_token
from gostore.core.errors import ConfigError, Timeout
from gostore.services.fs import RestServer

DATA = random.Random(1).randbytes(30_000)


class World:
    """Three nodes, one of which serves HTTP; and a client."""

    def __init__(self, cluster: Any, server: RestServer, session: aiohttp.ClientSession) -> None:
        self.cluster = cluster
        self.server = server
        self.session = session

    async def __call__(
        self, method: str, path: str, status: int, *, headers: dict[str, str] | None = None, data: Any = None
    ) -> tuple[Any, Any]:
        """(header fields, body) of an answer; JSON is decoded, problems are checked."""
        async with self.session.request(method, path, headers=headers, data=data) as response:
            body: Any = await response.read()
            assert response.status == status, body
            if response.content_type == "application/json":
                body = await response.json()
            if status >= 400 and method != "HEAD":
                assert response.content_type == "application/problem+json"
                body = await response.json(content_type=None)
                assert body["status"] == status
                assert body["type"] == f"urn:gostore:error:{body['code']}"
                assert body["title"]
                assert body["detail"]
            return response.headers, body


def rest(kit: SimpleNamespace, main: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    """Run ``main`` in real time, over real sockets."""

    @asynccontextmanager
    async def world() -> AsyncIterator[World]:
        async with kit.Cluster(nodes=3) as cluster:
            node = cluster.nodes["n1"]
            server = RestServer(node.env, node.fs, node.config)
            await server.start()
            headers = {"Authorization": f"Bearer {rest_token(kit.secret)}"}
            async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", headers=headers) as session:
                try:
                    yield World(cluster, server, session)
                finally:
                    await server.stop()

    async def bounded() -> None:
        async with asyncio.timeout(60), world() as found:
            await main(found)

    asyncio.run(bounded())


def test_a_file_goes_in_and_comes_out(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        fields, told = await http("POST", "/d/e/f%20g?type=text/plain", 201, data=DATA)
        assert (told["path"], told["size"], told["version"], told["type"]) == ("/d/e/f g", 30_000, 1, "text/plain")
        assert fields["Location"] == "/d/e/f%20g"
        fields, body = await http("GET", "/d/e/f%20g", 200)
        assert body == DATA
        assert fields["Content-Type"] == "text/plain"
        assert fields["ETag"] == f'"{told["etag"]}"'
        assert fields["GoStore-Version"] == "1"
        assert fields["Repr-Digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(DATA).digest()).decode()}:"
        assert (await http.cluster.ask("n2", "read", "/d/e/f g"))[1] == DATA
        head, body = await http("HEAD", "/d/e/f%20g", 200)
        assert body == b""
        for name in ("Content-Length", "Content-Type", "ETag", "Last-Modified", "Repr-Digest"):
            assert head[name] == fields[name]
        _, described = await http("GET", "/d/e/f%20g?part=head", 200)
        assert described == told
        _, told = await http("POST", "/d/e/f%20g?type=text/html", 200, data=b"short")
        assert (told["version"], told["size"]) == (2, 5)
        assert (await http("GET", "/d/e/f%20g", 200))[1] == b"short"
        await http("DELETE", "/d/e/f%20g", 204)
        await http("GET", "/d/e/f%20g", 404)

    rest(kit, main)


def test_an_empty_file_and_types(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        assert (await http("POST", "/empty", 201, data=b""))[1]["size"] == 0
        fields, body = await http("GET", "/empty", 200)
        assert (body, fields["Content-Length"]) == (b"", "0")
        for given, expected in [("image/png", "image/png"), ("application/x-www-form-urlencoded", None)]:
            _, told = await http(
                "POST", "/typed", (200, 201)[given == "image/png"], headers={"Content-Type": given}, data=b"x"
            )
            assert told["type"] == (expected or "application/octet-stream")
        await http("POST", "/typed?type=nonsense", 400, data=b"x")

    rest(kit, main)


def test_directories_are_listed_page_by_page_and_removed_with_what_is_in_them(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        for number in range(5):
            await http("POST", f"/d/{number}", 201, data=b"x" * number)
        await http("POST", "/d/sub/f", 201, data=b"x")
        _, told = await http("GET", "/d/", 200)
        assert told["directory"]
        assert [(child["name"], child["size"]) for child in told["children"]] == [
            *((str(number), number) for number in range(5)),
            ("sub", 0),
        ]
        names, start = [], ""
        while start is not None:
            _, told = await http("GET", f"/d?limit=2&start={start}", 200)
            names += [child["name"] for child in told["children"]]
            start = told["next_start"]
        assert names == ["0", "1", "2", "3", "4", "sub"]
        assert (await http("GET", "/", 200))[1]["children"][0]["name"] == "d"
        await http("GET", "/d?limit=0", 400)
        await http("GET", "/d?limit=x", 400)
        _, problem = await http("DELETE", "/d", 409)
        assert (problem["code"], problem["definite"]) == ("not_empty", True)
        await http("DELETE", "/d?recursive=maybe", 400)
        await http("DELETE", "/d?recursive=1", 204)
        assert (await http("GET", "/", 200))[1]["children"] == []

    rest(kit, main)


def test_what_is_refused(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        await http("POST", "/f", 201, data=b"x")
        for method, path, status in [
            ("GET", "/none", 404),
            ("HEAD", "/none", 404),
            ("GET", "/f/below", 404),
            ("DELETE", "/none", 404),
            ("DELETE", "/", 400),
            ("GET", "/f?part=tail", 400),
            ("GET", "/%ff", 400),
            ("GET", "/a%00b", 400),
            ("GET", "/" + "x" * 300, 400),
            ("PUT", "/f", 405),
            ("POST", "/", 400),
            ("POST", "/f/below", 409),
        ]:
            fields, _ = await http(method, path, status, data=b"" if method in ("PUT", "POST") else None)
            if status == 405:
                assert fields["Allow"] == "GET, HEAD, POST, DELETE"
        await http("POST", "/d/f", 201, data=b"x")
        await http("POST", "/d", 409, data=b"x")

    rest(kit, main)


def test_paths_above_the_root_are_refused(kit: SimpleNamespace) -> None:
    """Clients tidy such paths up themselves; so these requests are written by hand."""

    async def main(http: World) -> None:
        token = rest_token(kit.secret)
        for path in ("/../etc/passwd", "/%2e%2e/etc/passwd", "/a/../../b"):
            lines = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
            answer = await by_hand(http, lines.encode())
            assert answer.startswith(b"HTTP/1.1 400"), answer
            assert b"above the root" in answer

    rest(kit, main)


async def by_hand(http: World, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", http.server.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Basic abc", "bearer é"])
def test_without_the_token_nothing_is_told(kit: SimpleNamespace, given: str | None) -> None:
    async def main(http: World) -> None:
        headers = {} if given is None else {"Authorization": given}
        url = f"http://127.0.0.1:{http.server.port}/none"
        async with aiohttp.ClientSession(headers=headers) as session:
            for method in ("GET", "POST", "DELETE", "PUT"):
                async with session.request(method, url) as response:
                    assert response.status == 401
                    assert response.headers["WWW-Authenticate"].startswith("Bearer")

    rest(kit, main)


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=4090-4100", 4090, 4100),
        ("bytes=29999-", 29_999, 29_999),
        ("bytes=-5", 29_995, 29_999),
        ("bytes=-99999", 0, 29_999),
        ("bytes=100-99999", 100, 29_999),
    ],
)
def test_a_range(kit: SimpleNamespace, asked: str, first: int, last: int) -> None:
    async def main(http: World) -> None:
        await http("POST", "/f", 201, data=DATA)
        fields, body = await http("GET", "/f", 206, headers={"Range": asked})
        assert body == DATA[first : last + 1]
        assert fields["Content-Range"] == f"bytes {first}-{last}/30000"

    rest(kit, main)


def test_ranges_that_are_none(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        etag = (await http("POST", "/f", 201, data=DATA))[0]["ETag"]
        for asked in ("bytes=-", "bytes=5-2", "bytes=0-1,5-6", "lines=1-2", "bytes=a-b"):
            assert (await http("GET", "/f", 200, headers={"Range": asked}))[1] == DATA
        for asked in ("bytes=30000-", "bytes=-0"):
            fields, _ = await http("GET", "/f", 416, headers={"Range": asked})
            assert fields["Content-Range"] == "bytes */30000"
        assert (await http("GET", "/f", 206, headers={"Range": "bytes=0-1", "If-Range": etag}))[1] == DATA[:2]
        assert (await http("GET", "/f", 200, headers={"Range": "bytes=0-1", "If-Range": '"old"'}))[1] == DATA

    rest(kit, main)


def test_bodies_are_bounded_before_and_while_they_come(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        await http("POST", "/f", 413, data=b"x" * 100_001)
        assert (await http("POST", "/f", 201, data=b"x" * 100_000))[1]["size"] == 100_000

        async def pieces(count: int) -> AsyncIterator[bytes]:
            for _ in range(count):
                yield b"y" * 10_000

        assert (await http("POST", "/g", 201, data=pieces(10)))[1]["size"] == 100_000
        await http("POST", "/h", 413, data=pieces(11))
        await http("GET", "/h", 404)
        token = rest_token(kit.secret)
        answer = await by_hand(
            http, f"POST /f HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n".encode()
        )
        assert answer.startswith(b"HTTP/1.1 411"), answer

    rest(kit, main)


def test_a_sender_that_asks_first_is_told_to_go_on_or_not(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        token = rest_token(kit.secret)
        for size, expected in [(5, b"HTTP/1.1 100 Continue"), (200_000, b"HTTP/1.1 413")]:
            reader, writer = await asyncio.open_connection("127.0.0.1", http.server.port)
            fields = f"Host: x\r\nAuthorization: Bearer {token}\r\nExpect: 100-continue\r\nContent-Length: {size}"
            writer.write(f"POST /f HTTP/1.1\r\n{fields}\r\n\r\n".encode())
            assert (await reader.readline()).startswith(expected)
            if size == 5:
                await reader.readline()
                writer.write(b"hello")
                assert (await reader.readline()).startswith(b"HTTP/1.1 201")
            writer.close()
            await writer.wait_closed()

    rest(kit, main)


def test_an_upload_that_breaks_off_writes_nothing(kit: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    async def main(http: World) -> None:
        token = rest_token(kit.secret)
        _, writer = await asyncio.open_connection("127.0.0.1", http.server.port)
        fields = f"Host: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 90000"
        writer.write(f"POST /f HTTP/1.1\r\n{fields}\r\n\r\n".encode() + DATA * 2)
        fs = http.cluster.nodes["n1"].fs
        while not len(fs.intents):  # noqa: ASYNC110 - seen from outside
            await asyncio.sleep(0.01)
        writer.transport.abort()
        while len(fs.intents):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await http("GET", "/f", 404)
        await http.cluster.settle()
        assert not any(disk.data for disk in http.cluster.disks.values())
        assert caplog.records == []  # it is nothing that an operator need know

    rest(kit, main)


def test_a_download_whose_rest_cannot_be_had_breaks_off(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        _, told = await http("POST", "/f", 201, data=DATA)
        for disk in http.cluster.disks.values():
            disk.data.pop(told["chunks"][2][0], None)
        with pytest.raises(aiohttp.ClientError):
            await http("GET", "/f", 200)
        for disk in http.cluster.disks.values():
            disk.data.pop(told["chunks"][0][0], None)
        fields, problem = await http("GET", "/f", 503)
        assert "chunk" in problem["detail"]
        assert fields["Retry-After"] == "1"

    rest(kit, main)


def test_a_bug_is_500_and_an_unknown_outcome_504(kit: SimpleNamespace) -> None:
    async def main(http: World) -> None:
        await http("POST", "/f", 201, data=b"x")

        def fail(error: BaseException) -> Any:
            def before(*_: Any) -> None:
                raise error

            return before

        http.cluster.kv.before = fail(Timeout("db does not answer"))
        assert not (await http("GET", "/f", 504))[1]["definite"]
        http.cluster.kv.before = fail(RuntimeError("a bug"))
        assert (await http("GET", "/f", 500))[1]["code"] == "internal"

    rest(kit, main)


def test_sockets_ports_and_none(kit: SimpleNamespace) -> None:
    async def main() -> None:
        async with kit.Cluster(nodes=1) as cluster:
            node = cluster.nodes["n1"]

            def config(port: int) -> NodeConfig:
                return NodeConfig(name="n1", secret=kit.secret, data_dir="unused", rest=RestConfig(port=port))

            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                taken.listen()
                port = taken.getsockname()[1]
                server = RestServer(node.env, node.fs, config(port))
                with pytest.raises(ConfigError, match=f"rest.port = {port}"):
                    await server.start()
                await server.stop()
            none = RestServer(node.env, node.fs, config(-1))
            await none.start()
            assert none.port == 0
            await none.stop()
            bound = socket.socket()
            bound.bind(("127.0.0.1", 0))
            bound.setblocking(False)
            node.env.sockets["rest"] = bound
            given = RestServer(node.env, node.fs, config(0))
            await given.start()
            assert given.port == bound.getsockname()[1]
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{given.port}/") as response:
                assert response.status == 401
            await given.stop()

    asyncio.run(main())

"""The file system over HTTP, on every node: any of them serves any path.

=======================================  =============================================================================
``GET /path``                            the data (200; 206 for one ``Range``); of a directory a page of its entries
                                         as JSON (``?start=`` and ``?limit=`` as in the answer's ``next_start``)
``GET /path?part=head``                  the header as JSON
``HEAD /path``                           what GET would tell, in header fields
``POST /path?type=MIME``                 write the whole file: 201 when it is new, else 200; its header as JSON
``DELETE /path?recursive=1``             204
=======================================  =============================================================================

Every request carries ``Authorization: Bearer <token>``; the token is ``gostore.core.auth.rest_token`` of the cluster's
secret. Errors are problem details (RFC 9457) with the error's ``code`` and whether the operation surely did not happen
(``definite``). Bodies are streamed both ways: an upload is read as fast as its chunks are stored, a download as fast as
it is taken.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote, unquote_to_bytes

from aiohttp import ClientError, web

from gostore.config import NodeConfig
from gostore.core.auth import rest_token
from gostore.core.errors import (
    AlreadyExists,
    BadRequest,
    ConfigError,
    Conflict,
    Fenced,
    Forgotten,
    GoStoreError,
    InternalError,
    IsADirectory,
    NotADirectory,
    NotEmpty,
    NotFound,
    Timeout,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from gostore.core.stamps import stamp_wall_ms
from gostore.env import Env
from gostore.services.fs import path as paths
from gostore.services.fs.directory import LIST_LIMIT_MAX
from gostore.services.fs.header import Header
from gostore.services.fs.service import READ_ATTEMPTS_MAX, FsService

REQUESTS_MAX: Final = 256
"""Requests served at a time; more are answered 503. Each upload buffers a few chunks."""
LINGER_S: Final = 1.0
"""How long a refused upload's remainder is still read, so that its sender sees the answer."""
STOP_TIMEOUT_S: Final = 1.0
"""Time for running requests to end when the node stops."""
LISTED: Final = 100
"""Entries of a directory listing that names no limit."""

_STATUS: Final[dict[type[GoStoreError], HTTPStatus]] = {
    BadRequest: HTTPStatus.BAD_REQUEST,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    NotFound: HTTPStatus.NOT_FOUND,
    AlreadyExists: HTTPStatus.CONFLICT,
    NotEmpty: HTTPStatus.CONFLICT,
    NotADirectory: HTTPStatus.CONFLICT,
    IsADirectory: HTTPStatus.CONFLICT,
    Conflict: HTTPStatus.CONFLICT,
    Fenced: HTTPStatus.CONFLICT,
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    Unreachable: HTTPStatus.SERVICE_UNAVAILABLE,
    Timeout: HTTPStatus.GATEWAY_TIMEOUT,
    Forgotten: HTTPStatus.GATEWAY_TIMEOUT,
}
_METHODS: Final = "GET, HEAD, POST, DELETE"
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class _Refused(Exception):
    """What only HTTP knows; ``fields`` are added to the answer."""

    def __init__(self, status: HTTPStatus, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.error = BadRequest(message)
        self.status = status
        self.fields = fields or {}


class RestServer:
    """The HTTP server of one node. ``port``: the actual one after :meth:`start`, 0 when there is none."""

    def __init__(self, env: Env, fs: FsService, config: NodeConfig) -> None:
        self._env = env
        self._fs = fs
        self._config = config.rest
        self._host = config.host
        self._authorization = f"Bearer {rest_token(config.secret)}".encode()
        self._runner: web.ServerRunner | None = None
        self._running = 0
        self.port = 0

    async def start(self) -> None:
        """Listen, on the socket handed in when there is one. Raises ``ConfigError`` when that is impossible."""
        if self._config.port < 0:
            return
        server = web.Server(self._handle, access_log=None, lingering_time=LINGER_S)
        runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=STOP_TIMEOUT_S)
        await runner.setup()
        self._runner = runner
        given = self._env.sockets.get("rest")
        try:
            if given is not None:
                await web.SockSite(runner, given).start()
            else:
                await web.TCPSite(runner, self._host, self._config.port).start()
        except OSError as error:
            await self.stop()
            raise ConfigError(
                f"rest.port = {self._config.port}: cannot listen there: {error.strerror or error}; "
                "choose another, or 0 for any free one"
            ) from None
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Close; running requests have :data:`STOP_TIMEOUT_S`."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    # --- one request

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._running >= REQUESTS_MAX:
            return _problem(Unavailable(f"{self._env.name} serves {REQUESTS_MAX} requests already; try again"), request)
        self._running += 1
        try:
            return await self._answer(request)
        except GoStoreError as error:
            return _problem(error, request)
        except _Refused as refused:
            return _problem(refused.error, request, refused.status, refused.fields)
        except (ClientError, ConnectionError):
            # The client has gone: there is nobody to answer.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=HTTPStatus.BAD_REQUEST)
        except Exception as error:
            self._env.log.exception("%s %s failed", request.method, request.rel_url)
            return _problem(InternalError(f"{type(error).__name__}: {error}"), request)
        finally:
            self._running -= 1

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self._authorization):
            raise Unauthorized("send `Authorization: Bearer TOKEN`; `gostore token` prints it")
        path = paths.from_bytes(unquote_to_bytes(request.rel_url.raw_path))
        match request.method:
            case "GET" | "HEAD":
                return await self._get(request, path)
            case "POST":
                return await self._post(request, path)
            case "DELETE":
                await self._fs.remove(path, recursive=_flag(request, "recursive"))
                return web.Response(status=HTTPStatus.NO_CONTENT)
        raise _Refused(
            HTTPStatus.METHOD_NOT_ALLOWED, f"{request.method} is not served; {_METHODS} are", {"Allow": _METHODS}
        )

    # --- reading

    async def _get(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        part = request.rel_url.query.get("part", "data")
        if part not in {"data", "head"}:
            raise BadRequest(f"part = {part!r:.50}: allowed are data and head")
        for attempt in range(1, READ_ATTEMPTS_MAX + 1):
            header = await self._fs.find(path)
            if header.is_directory:
                return web.json_response(header.to_wire() | (await self._listing(request, path)))
            if part == "head":
                return web.json_response(header.to_wire())
            try:
                return await self._data(request, header)
            except Unavailable:
                # Were its chunks collected because it is no longer the newest version?
                if attempt == READ_ATTEMPTS_MAX or (await self._fs.find(path)).etag == header.etag:
                    raise
        raise AssertionError("unreachable")

    async def _listing(self, request: web.BaseRequest, path: str) -> dict[str, Any]:
        limit = request.rel_url.query.get("limit", str(LISTED))
        if not limit.isdecimal() or not 1 <= int(limit[:9]) <= LIST_LIMIT_MAX:
            raise BadRequest(f"limit = {limit!r:.50}: allowed are values from 1 to {LIST_LIMIT_MAX}")
        page = await self._fs.tree.children(path, request.rel_url.query.get("start", ""), int(limit))
        return {"children": [child.to_child() for child in page.children], "next_start": page.next_start}

    async def _data(self, request: web.BaseRequest, header: Header) -> web.StreamResponse:
        offset, size, status = _range(request, header)
        response = web.StreamResponse(status=status, headers=_describe(header))
        response.content_length = size
        response.last_modified = stamp_wall_ms(header.mtime) / 1000
        if status == HTTPStatus.PARTIAL_CONTENT:
            response.headers["Content-Range"] = f"bytes {offset}-{offset + size - 1}/{header.size}"
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        async with contextlib.aclosing(self._fs.stream(header, offset, size)) as pieces:
            # The first piece comes before the status line: what goes wrong until then is an ordinary error.
            first = await anext(pieces, b"")
            await response.prepare(request)
            try:
                await response.write(first)
                async for piece in pieces:
                    await response.write(piece)
            except GoStoreError as error:
                # The status is sent; only a connection that breaks too early can still tell that this is not all.
                self._env.log.warning("GET %s broke off: %s", header.path, error)
                if request.transport is not None:
                    request.transport.abort()
                return response
        await response.write_eof()
        return response

    # --- writing

    async def _post(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        length, size_max = request.content_length, self._config.body_size_bytes_max
        if length is None and "chunked" not in request.headers.get("Transfer-Encoding", "").lower():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "send Content-Length, or the body in chunks")
        if length is not None and length > size_max:
            raise TooLarge(f"the body has {length} bytes; rest.body_size_bytes_max allows {size_max}")
        writer = self._fs.writer(path, request.rel_url.query.get("type") or _content_type(request))
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            # Only now, when nothing speaks against the body, does its sender need to send it (RFC 9110, 10.1.1).
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async for piece in request.content.iter_any():
                if writer.size + len(piece) > size_max:
                    raise TooLarge(f"the body has more than the {size_max} bytes of rest.body_size_bytes_max")
                await writer.append(piece)
        except BaseException:
            writer.abort()
            raise
        header = await self._fs.committed(writer)
        new = header.version == 1
        return web.json_response(
            header.to_wire(),
            status=HTTPStatus.CREATED if new else HTTPStatus.OK,
            headers={"ETag": f'"{header.etag}"', "Location": quote(header.path)},
        )


def _describe(header: Header) -> dict[str, str]:
    assert header.content is not None, "directories are listed"
    digest = base64.b64encode(bytes.fromhex(header.content.checksum)).decode()
    return {
        "Content-Type": header.type,
        "ETag": f'"{header.etag}"',
        "Accept-Ranges": "bytes",
        "Repr-Digest": f"sha-256=:{digest}:",  # RFC 9530
        "X-Content-Type-Options": "nosniff",
        "GoStore-Version": str(header.version),
    }


def _range(request: web.BaseRequest, header: Header) -> tuple[int, int, HTTPStatus]:
    """(offset, size, status) of what is asked for: RFC 9110, 14.2. What is no single range is ignored."""
    whole = (0, header.size, HTTPStatus.OK)
    match = _RANGE.fullmatch(request.headers.get("Range", "").replace(" ", ""))
    if match is None or match.group(0) == "bytes=-" or request.method == "HEAD":
        return whole
    if request.headers.get("If-Range", f'"{header.etag}"') != f'"{header.etag}"':
        return whole
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return whole
    low = int(first) if first else max(header.size - int(last), 0)
    high = min(int(last) + 1, header.size) if first and last else header.size
    if low >= high:
        raise _Refused(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            f"{header.path} has {header.size} bytes; {match.group(0)} names none of them",
            {"Content-Range": f"bytes */{header.size}"},
        )
    return low, high - low, HTTPStatus.PARTIAL_CONTENT


def _flag(request: web.BaseRequest, name: str) -> bool:
    text = request.rel_url.query.get(name, "0")
    if text not in {"0", "1", "false", "true"}:
        raise BadRequest(f"{name} = {text!r:.50}: allowed are 0, 1, false and true")
    return text in {"1", "true"}


def _content_type(request: web.BaseRequest) -> str:
    """The body's own type, unless it is what curl says of whatever it is given."""
    text = request.headers.get("Content-Type", "")
    return "" if text.startswith("application/x-www-form-urlencoded") else text


def _problem(
    error: GoStoreError,
    request: web.BaseRequest,
    status: HTTPStatus | None = None,
    fields: Mapping[str, str] | None = None,
) -> web.Response:
    status = status or _STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)
    fields = dict(fields or {})
    if isinstance(error, NotADirectory) and request.method in {"GET", "HEAD"}:
        status = HTTPStatus.NOT_FOUND
    if status == HTTPStatus.UNAUTHORIZED:
        fields["WWW-Authenticate"] = 'Bearer realm="gostore"'
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        fields["Retry-After"] = "1"
    return web.json_response(
        {
            "type": f"urn:gostore:error:{error.code}",
            "title": status.phrase,
            "status": status.value,
            "detail": error.message,
            "code": error.code,
            "definite": error.definite,
        },
        status=status,
        headers=fields,
        content_type="application/problem+json",
    )

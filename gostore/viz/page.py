"""The live view as a web page of its own, for clusters without a notebook (``gostore up``).

The same front end as the widget's, fed by server-sent events (HTML Living Standard, section 9.2): the two traits
whenever they change, and the widget's messages. It is served on loopback, below a path that nobody can guess.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any, Final, Self

from aiohttp import web

from gostore.testbed import SEEN, Testbed
from gostore.viz.source import Source
from gostore.viz.widget import STATIC, ClusterView

READERS_MAX: Final = 16
BACKLOG_MAX: Final = 64
"""Messages that wait for a slow reader; then it is let go, and its browser connects anew and gets the whole state."""

BODY_SIZE_BYTES_MAX: Final = 8 * 1024

_HTML: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>GoStore</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="stylesheet" href="view.css">
<style>body { margin: 0; padding: 12px; font-family: system-ui, sans-serif }</style></head>
<body><div id="view"></div><script type="module">
import view from "./view.js";
const state = {}, handlers = {};
const model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; },
  save_changes: () => {},
  on: (name, handler) => { (handlers[name] ??= []).push(handler); },
  off: (name, handler) => { handlers[name] = (handlers[name] ?? []).filter((h) => h !== handler); },
  send: (content) => { fetch("message", { method: "POST", body: JSON.stringify(content) }); },
};
const tell = (name, value) => (handlers[name] ?? []).forEach((handler) => handler(value));
let shown = false;
new EventSource("events").onmessage = ({ data }) => {
  const { traits, message } = JSON.parse(data);
  for (const [name, value] of Object.entries(traits ?? {})) {
    state[name] = value;
    if (shown) tell(`change:${name}`, value);
  }
  if (!shown && state.picture && state.ring) {
    shown = true;
    view.render({ model, el: document.getElementById("view") });
  }
  if (shown && message) tell("msg:custom", message);
};
</script></body></html>
"""


class _Broadcast(ClusterView):
    """A cluster's view whose messages go to a callback instead of a notebook."""

    def __init__(self, source: Source, publish: Any) -> None:
        self._publish = publish
        super().__init__(source)

    def send(self, content: Any, buffers: Any = None) -> None:
        self._publish({"message": content})

    def receive(self, content: Any) -> None:
        """What the page's reader asked for."""
        self._on_message(self, content, None)


class Page:
    """``async with Page(cluster) as page: page.url``. Runs on the loop that enters it."""

    def __init__(self, source: Testbed, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._source = source
        self._host = host
        self._port = port
        self._secret = secrets.token_urlsafe(12)
        self._readers: dict[asyncio.Queue[str | None], None] = {}
        self.url = ""

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._source.watch(*SEEN)
        self._view = await asyncio.to_thread(_Broadcast, self._source, self._publish)
        self._view.observe(lambda change: self._publish({"traits": {change.name: change.new}}), ["picture", "ring"])
        app = web.Application(client_max_size=BODY_SIZE_BYTES_MAX)
        base = f"/{self._secret}"
        app.add_routes(
            [
                web.get(f"{base}/", self._index),
                web.get(f"{base}/view.{{ending:js|css}}", self._static),
                web.get(f"{base}/events", self._events),
                web.post(f"{base}/message", self._message),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self.url = f"http://{self._host}:{self._runner.addresses[0][1]}{base}/"
        return self

    async def __aexit__(self, *_: object) -> None:
        for queue in self._readers:
            _put(queue, None)
        await self._runner.cleanup()
        await asyncio.to_thread(self._view.close)

    def _publish(self, what: dict[str, Any]) -> None:
        """Called in the view's threads."""
        if self._readers and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, json.dumps(what))

    def _spread(self, line: str) -> None:
        for queue in list(self._readers):
            _put(queue, line)

    async def _index(self, _: web.Request) -> web.Response:
        return web.Response(text=_HTML, content_type="text/html")

    async def _static(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(STATIC / f"view.{request.match_info['ending']}")

    async def _message(self, request: web.Request) -> web.Response:
        try:
            content = await request.json()
        except ValueError:
            raise web.HTTPBadRequest(text="expected JSON") from None
        await asyncio.to_thread(self._view.receive, content)
        return web.Response(status=204)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if len(self._readers) >= READERS_MAX:
            raise web.HTTPServiceUnavailable(text=f"{READERS_MAX} pages are open already")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        queue: asyncio.Queue[str | None] = asyncio.Queue(BACKLOG_MAX)
        self._readers[queue] = None
        try:
            first = {"traits": {"ring": self._view.ring, "picture": self._view.picture}}
            line: str | None = json.dumps(first)
            while line is not None:
                await response.write(f"data: {line}\n\n".encode())
                line = await queue.get()
        except ConnectionError:
            pass  # the page was closed
        finally:
            self._readers.pop(queue, None)
        return response


def _put(queue: asyncio.Queue[str | None], line: str | None) -> None:
    if queue.full():
        while not queue.empty():
            queue.get_nowait()
        line = None
    queue.put_nowait(line)

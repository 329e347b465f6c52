"""The client's end of the zygote: requests, answers and events over its two pipes."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gostore.core.errors import GoStoreError, Unavailable, error_from_wire

REQUEST_TIMEOUT_S = 30.0
"""A loaded machine may need seconds to import everything; an answer afterwards takes milliseconds."""

END_TIMEOUT_S = 15.0
"""The zygote waits this long for children that are stuck in the kernel, and removes their data; then it is killed."""

LINE_SIZE_BYTES_MAX = 1024 * 1024
"""No answer of the zygote is longer."""

LOG_TAIL_LINES = 15

OnEvent = Callable[[dict[str, Any]], None]


class Control:
    """Speaks to one zygote, on the client thread's loop. ``on_event`` gets its events, in order."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, on_event: OnEvent) -> None:
        self._process = process
        self._log = log
        self._on_event = on_event
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self._hello: asyncio.Future[None] | None = None
        self._input: asyncio.WriteTransport | None = None
        self._reading: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self) -> None:
        """Connect the pipes. Raises :class:`Unavailable` with the zygote's own words when it did not come up."""
        loop = asyncio.get_running_loop()
        self._hello = loop.create_future()
        reader = asyncio.StreamReader(limit=LINE_SIZE_BYTES_MAX)
        output, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout)
        self._input, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self._process.stdin)
        self._reading = loop.create_task(self._read(reader, output), name="zygote")
        if self._closed:  # the owner was collected meanwhile
            self.close()

    async def hello(self) -> None:
        """Wait until it has imported the node and takes requests."""
        assert self._hello is not None
        await self._within(self._hello)

    async def request(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises what the zygote answers, and :class:`Unavailable` when it is gone."""
        if self._input is None or self._closed or self._reading is None or self._reading.done():
            raise self._gone()
        self._last_id += 1
        number = self._last_id
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._input.write(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = await self._within(future)
        finally:
            self._waiting.pop(number, None)
        if "error" in answer:
            raise error_from_wire(answer["error"])
        return answer

    async def _within(self, future: asyncio.Future[Any]) -> Any:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                return await asyncio.shield(future)
        except TimeoutError:
            waited = f"{REQUEST_TIMEOUT_S:.0f} s"
            raise Unavailable(f"the launcher does not answer after {waited}{self.log_tail()}") from None

    def close(self) -> None:
        """End the zygote and its children, without waiting: the end of its input tells it to."""
        self._closed = True
        if self._input is not None:
            self._input.close()

    async def ended(self) -> None:
        """Wait until the zygote has ended and was waited for; it ends its children before. Kills it in the end."""
        self.close()
        if self._reading is not None:
            try:
                async with asyncio.timeout(END_TIMEOUT_S):
                    await asyncio.shield(self._reading)
            except TimeoutError:
                self._process.kill()
                await self._reading
        elif self._process.stdin is not None:
            self._process.stdin.close()
        await self._reap()

    async def _reap(self) -> None:
        # Its output has ended, so it is about to exit: this takes no more than a few turns.
        deadline = asyncio.get_running_loop().time() + END_TIMEOUT_S
        while self._process.poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                self._process.kill()
            await asyncio.sleep(0.002)

    async def _read(self, reader: asyncio.StreamReader, output: asyncio.BaseTransport) -> None:
        try:
            while line := await reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError):
            pass  # cut off in the middle of a line: it was killed
        finally:
            output.close()
            if self._input is not None:
                self._input.close()
        await self._reap()
        for future in (*self._waiting.values(), self._hello):
            if future is not None and not future.done():
                future.set_exception(self._gone())
                future.exception()  # nobody may be waiting for this one
        self._on_event({"event": "gone", "expected": self._closed})

    def _take(self, message: dict[str, Any]) -> None:
        number = message.get("id")
        if number is not None:
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(message)
        elif message["event"] == "hello":
            if self._hello is not None and not self._hello.done():
                self._hello.set_result(None)
        else:
            self._on_event(message)

    def _gone(self) -> GoStoreError:
        return Unavailable(f"the launcher process has ended, and every node with it{self.log_tail()}")

    def log_tail(self) -> str:
        lines = tail(self._log, LOG_TAIL_LINES)
        return "; the end of its log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""


def tail(file: Path, lines: int) -> list[str]:
    """The last lines of a text file; none when it cannot be read."""
    try:
        with open(file, encoding="utf-8", errors="replace") as text:
            return [line.rstrip("\n") for line in deque(text, maxlen=lines)]
    except OSError:
        return []

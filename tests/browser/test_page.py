"""The page of a cluster without a notebook (``gostore up``): the same view, fed by server-sent events."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import gostore as gs
from gostore.viz.page import Page

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]


@pytest.fixture
def served() -> Iterator[tuple[Any, str]]:
    """(a cluster of three, the address of its page); both live in a thread, as the browser's driver blocks."""
    said: queue.Queue[Any] = queue.Queue()
    over: list[Any] = []

    async def main() -> None:
        stop = asyncio.Event()
        over.extend([asyncio.get_running_loop(), stop])
        async with gs.launch(3) as cluster:
            await cluster.watch("message", "db", "fs")
            async with Page(cluster) as page:
                said.put((cluster, page.url))
                await stop.wait()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            said.put(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    found = said.get(timeout=120)
    assert not isinstance(found, BaseException), found
    yield found
    loop, stop = over
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    assert not thread.is_alive()


def test_the_page_shows_a_living_cluster(tools: ModuleType, chromium: Any, served: tuple[Any, str]) -> None:
    cluster, url = served
    chromium.get(url)

    def nodes() -> dict[str, str]:
        found = chromium.find_elements("css selector", ".gs-node")
        return {node.get_attribute("data-node"): node.get_attribute("data-look") for node in found}

    def text(query: str) -> str:
        return str(chromium.find_element("css selector", query).get_property("textContent"))

    tools.wait_for("three nodes", lambda: nodes() == {"n1": "ok", "n2": "ok", "n3": "ok"})
    up = text(".gs-facts")
    tools.wait_for("the clock to go on", lambda: text(".gs-facts") != up)

    chromium.find_element("css selector", ".gs-ask input").send_keys("user:7", tools.Keys.ENTER)
    tools.wait_for("the answer", lambda: text(".gs-answer").endswith("user:7"))
    assert len(chromium.find_elements("css selector", ".gs-asked")) == 3

    cluster.nodes["n3"].kill_sync()
    tools.wait_for("a node that is gone", lambda: nodes()["n3"] == "gone")
    assert tools.errors_of(chromium) == []
    assert tools.foreign(tools.requests_of(chromium)) == []

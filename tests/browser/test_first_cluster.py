"""A real cluster in a real JupyterLab: the first notebook, top to bottom, and who lives and dies with the kernel."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import psutil
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

NOTEBOOK = "01_first_cluster.ipynb"

LAUNCH = "import gostore as gs\ncluster = await gs.launch(5)\nview = cluster.view()\nview"
BLOCK = "import time\nfor _ in range(3000):\n    time.sleep(0.1)"
USE = "await cluster.fs.write('/x', b'y')\nprint('pids', *sorted(cluster.pids()))"

# Counts what the canvas draws.
COUNT_PULSES = """
window.pulses = 0;
for (const canvas of document.querySelectorAll(".gs-canvas")) {
  const pen = canvas.getContext("2d");
  const fill = pen.fill.bind(pen);
  pen.fill = (...arguments_) => { window.pulses++; return fill(...arguments_); };
}
"""


def owners(page: Any) -> list[str]:
    """Who owns a piece of the ring on the screen."""
    return sorted(path.get_attribute("data-owner") for path in page.find(".gs-ring path"))


def look(page: Any, node: str) -> str:
    return str(page.find(f".gs-node[data-node={node}]")[0].get_attribute("data-look"))


def text(page: Any, query: str) -> str:
    return str(page.find(query)[0].get_property("textContent"))


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.fixture
def page(tools: ModuleType, lab: Any, chromium: Any) -> Iterator[Any]:
    """A small notebook with a cluster that is ready and a view that shows it."""
    lab.write("small.ipynb", [LAUNCH, BLOCK, USE])
    page = tools.Page(chromium, lab, "small.ipynb")
    page.run_to_end(0)
    tools.wait_for("five nodes", lambda: owners(page) == ["n1", "n2", "n3", "n4", "n5"])
    kernel = lab.kernel_of("small.ipynb")
    yield page
    lab.end_kernel(kernel)


def test_the_first_notebook_from_top_to_bottom(tools: ModuleType, lab: Any, chromium: Any, tmp_path: Path) -> None:
    notebook = nbformat.read(lab.root / NOTEBOOK, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    page = tools.Page(chromium, lab, NOTEBOOK)
    tools.errors_of(chromium)
    processes: list[psutil.Process] = []
    for index, source in enumerate(sources):
        if ".kill()" in source:
            tools.wait_for("a ring of five", lambda: owners(page) == ["n1", "n2", "n3", "n4", "n5"])
            processes = lab.processes_of(lab.kernel_of(NOTEBOOK))[1:]
            assert len(processes) >= 6, "a zygote and five nodes"
            page.run(index)
            # The ring changes while the cell still waits for the repair, or right after.
            tools.wait_for("a ring of four", lambda: owners(page) == ["n1", "n3", "n4", "n5"])
            tools.wait_for("a node that is gone", lambda: look(page, "n2") == "gone")
            assert "n2" in text(page, ".gs-events-list")
            page.wait_idle(120)
        elif ".restart()" in source:
            page.run_to_end(index, 120)
            tools.wait_for("a ring of five again", lambda: owners(page) == ["n1", "n2", "n3", "n4", "n5"])
        else:
            page.run_to_end(index, 120)
        assert page.errors() == [], f"cell {index}: {source}"
    assert page.script(tools.OVERLAPS) == []
    assert page.script(tools.SMALLEST) >= 11
    assert page.script(tools.OUTSIDE) == []
    tools.wait_for("the view to know of the end", lambda: text(page, ".gs-status") == "stopped")
    tools.wait_for("every process to end", lambda: all_gone(processes))
    assert tools.errors_of(chromium) == []
    assert tools.foreign(tools.requests_of(chromium)) == []
    lab.end_kernel(lab.kernel_of(NOTEBOOK))


def test_the_view_moves_while_a_cell_blocks_and_an_interrupt_leaves_the_cluster(
    tools: ModuleType, lab: Any, page: Any
) -> None:
    kernel = lab.kernel_of("small.ipynb")
    before = [process.pid for process in lab.processes_of(kernel)]
    page.run(1)
    tools.wait_for("a cell that runs", lambda: page.prompt(1) == "[*]:")
    page.script(COUNT_PULSES)
    facts = text(page, ".gs-facts")
    tools.wait_for("the clock to go on", lambda: text(page, ".gs-facts") != facts)
    facts = text(page, ".gs-facts")
    tools.wait_for("the clock to go on again", lambda: text(page, ".gs-facts") != facts)
    tools.wait_for("pulses", lambda: page.script("return window.pulses") > 3)
    assert page.prompt(1) == "[*]:", "the cell was meant to block all the while"

    lab.api(f"kernels/{kernel}/interrupt", "POST")
    tools.wait_for("the interrupt", lambda: "KeyboardInterrupt" in page.output(1))
    page.run_to_end(2)
    assert page.output(2).startswith("pids ")
    assert [process.pid for process in lab.processes_of(kernel)] == before
    assert text(page, ".gs-status") == "live"


def test_restarting_the_kernel_leaves_no_process(tools: ModuleType, lab: Any, page: Any) -> None:
    kernel = lab.kernel_of("small.ipynb")
    processes = lab.processes_of(kernel)[1:]
    assert len(processes) >= 6
    lab.api(f"kernels/{kernel}/restart", "POST")
    tools.wait_for("every process to end", lambda: all_gone(processes))
    tools.wait_for("the view to miss its kernel", lambda: text(page, ".gs-status").startswith("no news"))


def test_killing_the_kernel_leaves_no_process(tools: ModuleType, lab: Any, page: Any) -> None:
    kernel, *processes = lab.processes_of(lab.kernel_of("small.ipynb"))
    assert len(processes) >= 6
    kernel.send_signal(signal.SIGKILL)
    tools.wait_for("every process to end", lambda: all_gone(processes))

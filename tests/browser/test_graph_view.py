"""A graph of one's own, in a real JupyterLab: drawn, changed by a cell, quiet on the network."""

from __future__ import annotations

from types import ModuleType
from typing import Any

CELLS = [
    "import networkx as nx\n"
    "from gostore.viz import GraphView\n"
    "graph = nx.cycle_graph(['ann', 'bob', 'cid'])\n"
    "view = GraphView(graph, title='Three')\n"
    "view",
    "graph.add_edge('ann', 'dan')\ngraph.nodes['bob']['look'] = 'gone'\nview.graph = graph",
    "view.pulse('ann', 'bob', 'gossip')",
]


def test_a_changed_graph_changes_the_picture(tools: ModuleType, lab: Any, chromium: Any) -> None:
    lab.write("graph.ipynb", CELLS)
    page = tools.Page(chromium, lab, "graph.ipynb")
    tools.errors_of(chromium)  # what JupyterLab itself complains of while it starts is not ours

    page.run_to_end(0)

    def nodes() -> dict[str, str]:
        found = page.find(".gs-view .gs-node")
        return {node.get_attribute("data-node"): node.get_attribute("data-look") for node in found}

    tools.wait_for("three nodes", lambda: nodes() == {"ann": "ok", "bob": "ok", "cid": "ok"})
    assert len(page.find(".gs-view .gs-edge")) == 3
    before = page.find(".gs-view")[0].rect

    page.run_to_end(1)
    tools.wait_for("four nodes", lambda: nodes() == {"ann": "ok", "bob": "gone", "cid": "ok", "dan": "ok"})
    assert len(page.find(".gs-view .gs-edge")) == 4
    after = page.find(".gs-view")[0].rect
    assert (before["width"], before["height"]) == (after["width"], after["height"]), "the panel jumped"

    page.script(
        "window.pulsed = false; const c = document.querySelector('.gs-canvas').getContext('2d');"
        "const fill = c.fill.bind(c); c.fill = (...a) => { window.pulsed = true; fill(...a); };"
    )
    page.run_to_end(2)
    tools.wait_for("a pulse on the canvas", lambda: page.script("return window.pulsed"))

    tools.wait_for("the panel of a node", lambda: page.click(page.find("[data-node='bob']")[0]))
    tools.wait_for("its name in the panel", lambda: page.find(".gs-detail h3")[0].text == "bob")

    assert tools.errors_of(chromium) == []
    assert tools.foreign(tools.requests_of(chromium)) == []

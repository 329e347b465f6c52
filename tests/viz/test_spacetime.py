"""Space-time diagrams: golden texts (``--rewrite`` writes them), and what must hold of every picture."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gostore.cli import main
from gostore.client.thread import client_thread
from gostore.core.errors import BadRequest
from gostore.core.events import Event
from gostore.trace import Journal
from gostore.viz.spacetime import Band, SpaceTime, space_time
from gostore.viz.spacetime_svg import CHARACTER_PX

GOLDEN = Path(__file__).parent / "spacetime"

_spec = importlib.util.spec_from_file_location("viz_journals", Path(__file__).parents[1] / "trace" / "journals.py")
assert _spec is not None
assert _spec.loader is not None
journals = sys.modules["viz_journals"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(journals)


class Story:
    """Writes a journal, ten milliseconds from event to event."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._seq: dict[str, int] = {}

    def add(self, node: str, kind: str, cause: Event | None = None, **data: Any) -> Event:
        seq = self._seq[node] = self._seq.get(node, 0) + 1
        at = len(self.events) + 1
        event = Event(node, seq, kind, at << 16, at / 100, cause.id if cause else None, data)
        self.events.append(event)
        return event

    def send(self, node: str, to: str, function: str) -> Event:
        message = self._seq.get(node, 0) + 1
        return self.add(
            node, "send", message=message, to=to, service="db", function=function, frame="request", request=message,
            bytes=100, transport="udp",
        )  # fmt: skip

    def recv(self, send: Event) -> Event:
        data = {**send.data, "from": send.node}
        return self.add(str(data.pop("to")), "recv", send, **data)

    def fault(self, fault: str, **arguments: Any) -> Event:
        return self.add("testbed", "fault", fault=fault, arguments=arguments)

    def commit(self, node: str, key: str) -> Event:
        return self.add(node, "commit", shard=3, container="accounts", keys=[key], index=7)


def lost_write() -> tuple[Story, Event]:
    """An acknowledged write is lost at a master that was cut off; n3 knows nothing of it."""
    story = Story()
    story.recv(story.send("n1", "n2", "replicate"))
    story.commit("n1", "alice")
    story.fault("partition", groups=[["n1"], ["n2", "n3"]])
    lost = story.send("n1", "n3", "replicate")
    story.add("n1", "drop", lost, peer="n3", reason="fault", bytes=100)
    story.fault("kill", node="n1")
    story.add("n2", "suspect", member="n1", incarnation=1)
    story.add("n2", "master", member="n2", epoch=4)
    story.recv(story.send("n2", "n3", "replicate"))
    story.fault("heal")
    story.fault("restart", node="n1")
    story.add("n1", "node_started", incarnation=2)
    story.send("n1", "n2", "hello")
    return story, story.commit("n3", "alice")


def agrees(name: str, text: str, request: pytest.FixtureRequest) -> None:
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--rewrite"):
        file.write_text(text + "\n")
    assert file.read_text() == text + "\n", "--rewrite if that is right"


def test_a_window_in_text(request: pytest.FixtureRequest) -> None:
    story, _ = lost_write()
    agrees("window", space_time(story.events, title="All that happened").text(), request)


def test_a_causal_past_in_text(request: pytest.FixtureRequest) -> None:
    """What n1 did is in the past of the commit only as far as n2 heard of it."""
    story, violation = lost_write()
    agrees("past", space_time(story.events, violation).text(), request)


def test_the_latest_are_shown_and_the_others_counted(request: pytest.FixtureRequest) -> None:
    story, violation = lost_write()
    agrees("latest", space_time(story.events, violation, events_max=3).text(), request)


def test_bands_last_from_the_fault_to_its_end() -> None:
    story, _ = lost_write()
    diagram = space_time(story.events)
    network = [Band(node, "network", 3, 11, "partition n1 | n2 n3") for node in ("n1", "n2", "n3")]
    assert diagram.bands == (*network, Band("n1", "down", 6, 12, "kill n1"))
    # What began before the window and ended after it covers it all.
    middle = space_time(story.events, since_s=0.08, until_s=0.09)
    assert {(band.look, band.first, band.last) for band in middle.bands} == {("network", 0, 1)}
    assert space_time(story.events, categories=["db"]).bands == ()


def test_faults_of_disks_and_pauses_end_too() -> None:
    story = Story()
    story.commit("n1", "a")
    for fault, arguments in (
        ("slow_disk", {"sync_s": 1.0}), ("pause", {}), ("resume", {}), ("slow_disk", {"sync_s": 0}),
        ("full_disk", {"free_bytes": 0}), ("full_disk", {"free_bytes": -1}), ("power_cut", {}), ("restart", {}),
        ("skew", {"offset_s": 2.0, "drift": 0.0}),
    ):  # fmt: skip
        story.fault(fault, node="n1", **arguments)
    story.commit("n1", "b")
    bands = [(band.look, band.first, band.last) for band in space_time(story.events).bands]
    assert bands == [("disk", 1, 4), ("paused", 2, 3), ("disk", 5, 6), ("down", 7, 8)]


def test_what_a_node_says_of_its_part_in_a_fault_is_not_told_twice() -> None:
    story = Story()
    story.fault("isolate", node="n1")
    story.add("n1", "fault", fault="link", arguments={"node": "n1", "peer": "n2", "drop": 1.0})
    story.commit("n1", "a")
    assert [row.words for row in space_time(story.events).rows] == ["isolate n1", "commit accounts a, shard 3, index 7"]


def test_nonsense_is_refused() -> None:
    story, violation = lost_write()
    with pytest.raises(BadRequest, match="events_max = 0: allowed are 1 to 2000"):
        space_time(story.events, events_max=0)
    with pytest.raises(BadRequest, match="width_px = 20: allowed are 480"):
        space_time(story.events, width_px=20)
    with pytest.raises(BadRequest, match="no categories dp; there are message, cls"):
        space_time(story.events, categories=["dp"])
    with pytest.raises(BadRequest, match="is not in this journal"):
        space_time(story.events[:-1], violation)


def test_nothing_is_a_diagram_too() -> None:
    diagram = space_time([])
    assert diagram.note == "no events"
    assert diagram.text().startswith("Space-time diagram\nno events\n")
    ElementTree.fromstring(diagram.svg())


SVG = "{http://www.w3.org/2000/svg}"


def check_picture(diagram: SpaceTime) -> None:
    """Well-formed, every event told, and no text over another or beyond the edge (by a width on the safe side)."""
    root = ElementTree.fromstring(diagram.svg())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes: list[tuple[float, float, float, str]] = []
    turned = {
        text for group in root.iter(f"{SVG}g") if "transform" in group.attrib for text in group.iter(f"{SVG}text")
    }
    for element in root.iter(f"{SVG}text"):
        text = "".join(element.itertext())
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        per = {"title": 9.0, "time": 6.2, "name": 7.4}.get(element.attrib.get("class", ""), CHARACTER_PX)
        size = len(text) * per
        left = {"end": x - size, "middle": x - size / 2}.get(element.attrib.get("text-anchor", ""), x)
        assert 0 < y < height
        if element not in turned:
            assert left >= 0, text
            assert left + size <= width + 1, text
            boxes.append((y, left, left + size, text))
    for index, (y, left, right, text) in enumerate(boxes):
        for other_y, other_left, other_right, other in boxes[index + 1 :]:
            assert abs(y - other_y) >= 13 or right <= other_left + 1 or other_right <= left + 1, (text, other)
    for element in root.iter(f"{SVG}path"):
        for number in re.findall(r"[ML](-?[\d.]+)", element.attrib["d"]):
            assert 0 <= float(number) <= width
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    for row in diagram.rows:
        assert any(row.words in title and f"(event {row.event.seq})" in title for title in titles)


@settings(deadline=None)
@given(journals.runs(), st.integers(1, 80), st.sampled_from([480, 720, 1120]), st.booleans())
def test_every_picture_is_in_order(run: Any, events_max: int, width_px: int, focus: bool) -> None:
    event = run.events[-1] if run.events and focus else None
    diagram = space_time(run.events, event, events_max=events_max, width_px=width_px)
    assert len(diagram.rows) <= events_max
    assert (diagram.focus is None) == (event is None)
    for index, row in enumerate(diagram.rows):
        assert row.source is None or row.source < index, "arrows point down"
    check_picture(diagram)
    assert len(diagram.text().splitlines()) == len(diagram.rows) + 7


@pytest.mark.parametrize("names", [[f"n{i}" for i in range(1, 8)], [f"storage-node-{i}" for i in range(1, 30)]])
def test_many_nodes_and_long_names_stay_legible(names: list[str]) -> None:
    story = Story()
    for i in range(200):
        send = story.send(names[i % len(names)], names[(i * 5 + 1) % len(names)], "replicate")
        if i % 3:
            story.recv(send)
    story.add(names[0], "node_stopping", reason='<&> "quoted" ' + "and far too long to be shown in full " * 9)
    diagram = space_time(story.events, story.events[-1], events_max=300)
    assert len(diagram.nodes) <= 16
    shown = "".join(ElementTree.fromstring(diagram.svg()).itertext())
    assert all(node[-6:] in shown for node in diagram.nodes), "the ends of names tell them apart"
    check_picture(diagram)


def test_a_picture_follows_the_readers_choice_of_dark() -> None:
    story, violation = lost_write()
    svg = space_time(story.events, violation)._repr_svg_()
    assert "@media(prefers-color-scheme:dark)" in svg
    # Every colour is a variable, which is given twice.
    names = dict.fromkeys(re.findall(r"var\((--gst-\w+)\)", svg))
    assert names
    assert all(svg.count(f"{name}:#") == 2 for name in names)
    assert not re.search(r'(fill|stroke)="#', svg)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("form", ["text", "svg", "shiviz", "perfetto", "table"])
def test_the_command_converts_a_saved_journal(form: str, tmp_path: Path) -> None:
    journal = Journal(client_thread())
    for event in lost_write()[0].events:
        journal.append(event)
    journal.save(tmp_path / "run.journal")
    arguments = [
        "trace",
        str(tmp_path / "run.journal"),
        "--format",
        form,
        "--since",
        "0.02",
        "--until",
        "0.1",
        "--json",
    ]
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.output.splitlines()[-1])
    assert figures == {"events": 9, "format": form, "complete": True, "output": str(tmp_path / "out")}
    text = (tmp_path / "out").read_text()
    sign = {
        "text": "partition n1 | n2 n3",
        "svg": "<svg",
        "shiviz": "(?<host>",
        "perfetto": '"traceEvents"',
        "table": "order,",
    }
    assert sign[form] in text
    assert CliRunner().invoke(main, arguments).output.startswith(text.rstrip("\n"))


def test_the_command_names_the_broken_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("nonsense\n")
    done = CliRunner().invoke(main, ["trace", str(tmp_path / "file")])
    assert done.exit_code == 1
    assert "line 1: expected the header of a journal" in done.output

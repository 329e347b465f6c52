"""The page about events agrees with the code; ``--rewrite`` writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gostore.core.events import SCHEMA
from gostore.trace.schema import events_document

PAGE = Path(__file__).parents[2] / "docs" / "events.md"


def test_the_page_is_that_of_the_code(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--rewrite"):
        PAGE.write_text(events_document())
    assert PAGE.read_text() == events_document(), "run: pytest tests/trace/test_schema.py --rewrite"


def test_the_page_names_every_kind_and_field() -> None:
    page = events_document()
    for kind, (category, meaning, fields) in SCHEMA.items():
        part = page.split(f"### `{kind}`\n")[1].split("###")[0]
        assert meaning in part
        assert page.index(f"## Category `{category}`") < page.index(f"### `{kind}`\n")
        for name, (unit, words) in fields.items():
            assert f"| `{name}` | {unit} | {words} |" in part

"""The project's own files agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_environment_yml_agrees_with_pyproject() -> None:
    text = (ROOT / "environment.yml").read_text()
    python = re.search(r"- python(\S+)", text)
    assert python is not None
    assert python[1] == PYPROJECT["project"]["requires-python"]
    installs = re.findall(r"- -e (\S+)", text)
    assert installs, "environment.yml installs the project"
    for install in installs:
        extras = re.fullmatch(r"\.(?:\[([a-z,]+)\])?", install)
        assert extras is not None, install
        for extra in (extras[1] or "").split(","):
            assert extra in PYPROJECT["project"]["optional-dependencies"]
    # Nothing is pinned twice: what pip installs is named in pyproject alone.
    assert re.findall(r"^  - (?!python|pip)(\S+)", text.split("dependencies:")[1], re.M) == []


def test_import_stays_light() -> None:
    """`import gostore` loads neither a node nor a notebook."""
    code = (
        "import sys, gostore; "
        "print([m for m in ('uvloop', 'aiohttp', 'networkx', 'matplotlib', 'IPython', 'ipywidgets', 'pandas', "
        "'gostore.node', 'gostore.viz') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_a_node_loads_no_notebook() -> None:
    code = (
        "import sys, gostore.node; "
        "print([m for m in ('networkx', 'matplotlib', 'IPython', 'ipywidgets', 'pandas', 'gostore.client', "
        "'gostore.testbed', 'gostore.launch', 'gostore.sim', 'gostore.viz') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_links_in_documents_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []


def test_commands_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"^make ([a-z]+)", text, re.M)
    assert named, "the README names make targets"
    assert [target for target in named if target not in targets] == []

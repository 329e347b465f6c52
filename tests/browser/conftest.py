"""One JupyterLab for all browser tests, and one Chromium for each."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent


def load(path: Path) -> ModuleType:
    name = f"gostore_tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def tools() -> ModuleType:
    """:mod:`tests/browser/driver.py`; skips where there is no browser, unless ``REQUIRE_BROWSER=1``."""
    pytest.importorskip("selenium")
    module = load(Path(__file__).parent / "driver.py")
    if reason := module.missing():
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(f"REQUIRE_BROWSER=1, and {reason}")
        pytest.skip(reason)
    return module


@pytest.fixture(scope="session")
def feed() -> ModuleType:
    return load(TESTS / "viz" / "feed.py")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that fails leaves a picture of its page, and says where."""
    report = yield
    driver = getattr(item, "funcargs", {}).get("chromium")
    if report.when == "call" and report.failed and driver is not None:
        picture = item.funcargs["tmp_path"] / "failure.png"
        with contextlib.suppress(Exception):
            driver.save_screenshot(str(picture))
            report.sections.append(("the page when it failed", str(picture)))
    return report


@pytest.fixture
def chromium(tools: ModuleType, tmp_path: Path) -> Iterator[Any]:
    with tools.chromium(tmp_path / "profile") as driver:
        yield driver


@pytest.fixture(scope="session")
def lab(tools: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """JupyterLab over a copy of the project's notebooks."""
    lab = tools.Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.copy(TESTS.parent / "notebooks")
        yield lab
    finally:
        lab.stop()

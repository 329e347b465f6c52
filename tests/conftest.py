"""What every test relies on."""

from __future__ import annotations

import signal

import pytest

# A job in the background of a shell is started with interrupts ignored, and so would be all of its children; the tests
# of interrupts would then wait for something that cannot come.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write what golden scenarios print into their files")

"""One real cluster of three nodes for the tests of the handles, which only add to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import gostore as gs
from gostore.testbed import Testbed


@pytest.fixture(scope="session")
def cluster() -> Iterator[Testbed]:
    with gs.launch(3, db={"shards": 4}, fs={"chunk_size_bytes": 64 * 1024}) as cluster:
        yield cluster

"""The main job on a small tree, with real processes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import gostore as gs
from gostore.core.errors import ConfigError
from gostore.experiments.demo import real_files, run

pytestmark = pytest.mark.processes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Empty files, small ones, chunked ones, the same content twice, and names in other scripts."""
    rng = random.Random(3)
    root = tmp_path / "tree"
    for number in range(40):
        file = root / f"d{number % 5}" / f"{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.randbytes(rng.choice([0, 10, 4096, 4097, 30_000])))
    (root / "größe 日本.txt").write_text("ü" * 5000, encoding="utf-8")
    (root / "big").write_bytes(rng.randbytes(3_000_000))
    (root / "twin").write_bytes((root / "big").read_bytes())
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "x.pyc").write_bytes(b"left out")
    (root / "link").symlink_to(root / "big")
    return root


@pytest.mark.parametrize("kill", ["n1", "n3"], ids=["the master", "another node"])
def test_nothing_is_lost_when_a_node_is_killed(tree: Path, kill: str) -> None:
    async def job() -> None:
        async with gs.launch(4) as cluster:
            result = await run(cluster, real_files(tree), kill=kill, progress=lambda text: None)
            assert (result.lost, result.corrupt, result.orphans, result.under_replicated) == (0, 0, 0, 0)
            assert result.fine
            assert (result.files, result.killed) == (43, kill)
            assert result.bytes == sum(file.stat().st_size for _, file in real_files(tree))

    asyncio.run(job())


def test_damage_and_loss_are_seen(tree: Path) -> None:
    """The demo's own checks can fail: a file that is gone, and one that is not what was stored."""
    from gostore.experiments.demo import _verify

    async def job() -> None:
        async with gs.launch(1, ring={"replicas": 1}) as cluster:
            await cluster.fs.write("/demo/a", b"other bytes")
            assert await _verify(cluster, {"/demo/a": "0" * 64, "/demo/b": "0" * 64}) == (1, 1)

    asyncio.run(job())


def test_what_cannot_be_stored_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        real_files(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no files"):
        real_files(tmp_path)

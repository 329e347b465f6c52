"""Clients of a cluster that somebody else runs."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

import gostore as gs
from gostore.client import connect_at, read_connection
from gostore.core.address import Address
from gostore.core.errors import ConfigError, Timeout, Unavailable, Unreachable
from gostore.testbed import Testbed

SECRET = "0123456789abcdef"


def address(cluster: Any, node: str = "n1") -> str:
    return f"127.0.0.1:{cluster._processes[node].ports['tcp']}"


@pytest.mark.processes
def test_connect_by_address_and_by_directory(cluster: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    place: Any = cluster
    with gs.connect(address(cluster), place._secret) as client:
        assert list(client.admin.members_sync()) == ["n1", "n2", "n3"]
        client.fs.write_sync("/remote", b"hello")
        assert client.admin.status_sync("n2")["name"] == "n2"
        assert repr(client) == "<client of 'gostore'>"
    assert cluster.fs.read_sync("/remote") == b"hello"
    with pytest.raises(Unavailable, match="not connected"):
        client.fs.read_sync("/remote")

    async def main() -> None:
        async with connect_at(place._place.root) as client:
            assert await client.fs.read("/remote") == b"hello"
        monkeypatch.setenv("GOSTORE_SECRET", place._secret)
        async with connect_at(address(cluster, "n3")) as client:
            assert await client.fs.read("/remote", via="n2") == b"hello"

    asyncio.run(main())


@pytest.mark.processes
def test_a_wrong_secret_is_an_error_and_not_a_hang(cluster: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gostore.client.remote.CONNECT_TIMEOUT_S", 0.5)
    with pytest.raises((Timeout, Unreachable)):
        gs.connect(address(cluster), SECRET).open_sync()


def test_what_is_needed_to_connect_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSTORE_SECRET", raising=False)
    with pytest.raises(ConfigError, match=r"at = '.*': there is no cluster.json in it; name the directory"):
        read_connection(tmp_path)
    with pytest.raises(ConfigError, match="the secret is missing; put it into the variable GOSTORE_SECRET"):
        read_connection("127.0.0.1:4000")
    monkeypatch.setenv("GOSTORE_SECRET", SECRET)
    with pytest.raises(ConfigError, match="at = 'host:port': expected HOST:PORT"):
        read_connection("host:port")
    target = read_connection("127.0.0.1:4000")
    assert (target.cluster, target.secret, target.seeds) == ("gostore", SECRET, (Address("127.0.0.1", 4000, 0),))
    assert SECRET not in repr(target)
    with pytest.raises(ConfigError, match="secret: 5 characters"):
        gs.connect("127.0.0.1:4000", "short")


def test_the_record_is_read(tmp_path: Path) -> None:
    nodes = {"n1": {"host": "127.0.0.1", "ports": {"tcp": 1, "udp": 2}, "settings": {}}}
    record = {"version": 1, "cluster": "c", "secret": SECRET, "settings": {}, "nodes": nodes}
    (tmp_path / "cluster.json").write_text(json.dumps(record))
    target = read_connection(str(tmp_path))
    assert (target.cluster, dict(target.members)) == ("c", {"n1": Address("127.0.0.1", 1, 2)})


def test_nobody_there_is_an_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gostore.client.remote.CONNECT_TIMEOUT_S", 0.5)
    begun = time.monotonic()
    with pytest.raises((Unreachable, Timeout)):
        gs.connect("127.0.0.1:1", SECRET).open_sync()
    assert time.monotonic() - begun < 30

"""The command line as a user meets it: real processes, the last line JSON, one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import gostore as gs
from gostore import fence
from gostore.cli import accessors, main

pytestmark = pytest.mark.processes
COMMAND = [sys.executable, "-m", "gostore.cli"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def figures(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.rstrip().rpartition("\n")[2])
    return found


@contextmanager
def up(path: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    """``gostore up`` in a process of its own; ended with Ctrl-C, as a user would."""
    process = subprocess.Popen(
        [*COMMAND, "up", *arguments, "--path", str(path), "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = ""
    while not line.startswith("{"):
        line = process.stdout.readline()
        assert line, f"gostore up ended with {process.wait()}"
    yield {**json.loads(line), "path": str(path)}
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with up(tmp_path_factory.mktemp("up") / "cluster", "--nodes", "3") as found:
        yield found


def test_a_cluster_that_is_there_comes_up_in_its_own_size(tmp_path: Path) -> None:
    with up(tmp_path / "cluster", "--nodes", "2") as found:
        assert found["nodes"] == 2
    with up(tmp_path / "cluster") as found:
        assert found["nodes"] == 2
    refused = invoke("up", "--nodes", "3", "--path", str(tmp_path / "cluster"))
    assert refused.exit_code == 1
    assert "holds a cluster of 2" in refused.output


def test_demo_prints_its_figures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.bin").write_bytes(os.urandom(50_000))
    found = figures("demo", "--nodes", "4", "--path", str(tmp_path))
    names = ("nodes", "ready_s", "files", "bytes", "lost", "corrupt", "recovered_s", "orphans")
    assert [name for name in names if name not in found] == []
    assert (found["nodes"], found["files"], found["bytes"]) == (4, 2, 50_005)
    assert (found["lost"], found["corrupt"], found["orphans"]) == (0, 0, 0)


def test_files_of_a_running_cluster(running: dict[str, Any], tmp_path: Path) -> None:
    at = ("--at", running["path"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "page.html").write_text("<p>hello")
    (tmp_path / "in" / "large").write_bytes(os.urandom(2_500_000))
    assert figures("fs", "put", str(tmp_path / "in"), "/cli", *at)["files"] == 2
    entries = {entry["name"]: entry for entry in figures("fs", "ls", "/cli", *at)["entries"]}
    assert entries["page.html"]["type"] == "text/html"
    assert entries["large"]["size"] == 2_500_000
    assert figures("fs", "get", "/cli/large", str(tmp_path / "out"), *at)["bytes"] == 2_500_000
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in" / "large").read_bytes()
    assert figures("fs", "stat", "/cli/page.html", *at)["size"] == 8
    refused = invoke("fs", "rm", "/cli", *at)
    assert refused.exit_code == 1
    assert "not empty" in refused.output
    assert figures("fs", "rm", "-r", "/cli", *at)["entries"] == 3
    gone = invoke("fs", "stat", "/cli", *at, "--json")
    assert gone.exit_code == 1
    assert json.loads(gone.stdout.splitlines()[-1])["error"] == "not_found"


def test_objects_of_a_running_cluster(running: dict[str, Any]) -> None:
    at = ("--at", running["path"])
    assert "create" in invoke("db", "set", "things", "k", "1", *at).output
    figures("db", "set", "things", "k", '{"tags": ["a", "b"]}', "--create", *at)
    assert figures("db", "get", "things", "k", "tags.1", *at) == {"value": "b"}
    figures("db", "set", "things", "k", "7", "tags.1", *at)
    assert figures("db", "get", "things", "k", *at) == {"value": {"tags": ["a", 7]}}
    figures("db", "rm", "things", "k", *at)
    missing = invoke("db", "get", "things", "k", *at)
    assert missing.exit_code == 1
    assert "things has nothing under 'k'; `gostore db set`" in missing.output
    figures("db", "set", "things", "k", "null", *at)
    assert figures("db", "get", "things", "k", *at) == {"value": None}
    assert "not JSON" in invoke("db", "set", "things", "k", "text", *at).output


def test_backup_and_restore_of_a_running_cluster(running: dict[str, Any], tmp_path: Path) -> None:
    at, file = ("--at", running["path"]), str(tmp_path / "all.backup")
    figures("db", "set", "kept", "k", '{"n": 1}', "--create", *at)
    figures("db", "set", "other", "k", "2", "--create", *at)
    found = figures("db", "backup", file, "--container", "kept", "--container", "other", *at)
    assert (found["containers"], found["objects"]) == (2, 2)
    assert found["bytes"] == os.path.getsize(file)
    figures("db", "set", "kept", "k", "3", *at)
    refused = invoke("db", "restore", file, *at)
    assert refused.exit_code == 1
    assert "the container 'kept' exists: drop it, or say that it is to be replaced" in refused.output
    assert figures("db", "restore", file, "--replace", *at)["objects"] == 2
    assert figures("db", "get", "kept", "k", *at) == {"value": {"n": 1}}
    whole = (tmp_path / "all.backup").read_bytes()
    (tmp_path / "half.backup").write_bytes(whole[: len(whole) // 2])
    cut = invoke("db", "restore", str(tmp_path / "half.backup"), "--replace", *at, "--json")
    assert cut.exit_code == 1
    assert json.loads(cut.stdout.splitlines()[-1])["error"] == "corrupt"
    missing = invoke("db", "backup", file, "--container", "nothing", *at)
    assert "there is no container 'nothing'; there are kept, other" in missing.output


def test_a_cluster_goes_on_after_its_majority_is_lost(tmp_path: Path) -> None:
    path = str(tmp_path / "cluster")
    at = ("--at", path)
    with up(tmp_path / "cluster", "--nodes", "3") as found:
        figures("db", "set", "things", "k", "1", "--create", *at)
        running = invoke("recover", *at, "--lost", "n2", "--lost", "n3")
        assert running.exit_code == 1
        assert "in use by another node" in running.output
    for name in ("n2", "n3"):
        shutil.rmtree(tmp_path / "cluster" / name)
    not_said = invoke("recover", *at, "--lost", "n2")
    assert "n3 is lost for good, say --lost n3" in not_said.output
    told = invoke("recover", *at, "--lost", "n2", "--lost", "n3")
    assert told.exit_code == 1
    assert "UNSAFE RECOVERY" in told.output
    assert "shard 0: of " in told.output
    assert "IS LOST" in told.output
    assert "nothing was changed" in told.output
    done = figures("recover", *at, "--lost", "n2", "--lost", "n3", "--unsafe-accept-lost-writes")
    assert (done["survivors"], done["lost"], done["empty"]) == (["n1"], ["n2", "n3"], [])
    assert "masters" in done["repaired"]
    with up(tmp_path / "cluster") as found:
        assert found["nodes"] == 1
        assert figures("db", "get", "things", "k", *at) == {"value": 1}
        figures("db", "set", "things", "k", "2", *at)
    again = invoke("recover", *at, "--lost", "n2", "--unsafe-accept-lost-writes")
    assert again.exit_code == 1
    assert "there is nothing to recover" in again.output
    elsewhere = invoke("recover", "--node", f"n1={tmp_path / 'cluster' / 'n1'}", "--lost", "n2")
    assert "put the secret with which the cluster ran into the variable GOSTORE_SECRET" in elsewhere.output


def test_who_lives_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "0123456789abcdef"
    monkeypatch.setenv("GOSTORE_SECRET", secret)
    with gs.launch(3, path=tmp_path / "cluster", secret=secret) as cluster:
        cluster.nodes["n1"].kill_sync()
        survivor = ("--node", f"n1={tmp_path / 'cluster' / 'n1'}")
        refused = invoke("recover", *survivor, "--lost", "n2", "--lost", "n3", "--unsafe-accept-lost-writes")
        assert refused.exit_code == 1
        assert "n2 is not lost: it answers at 127.0.0.1:" in refused.output
        cluster.nodes["n1"].restart_sync()
        cluster.wait_settled_sync()
        cluster.db.create_container_sync("a")
        for name in ("n1", "n2", "n3"):
            cluster.nodes[name].kill_sync()
    done = figures("recover", *survivor, "--lost", "n2", "--lost", "n3", "--unsafe-accept-lost-writes")
    assert fence.id_of(done["secret"]) == done["recovery"]


def test_rest_needs_the_token(running: dict[str, Any]) -> None:
    url = f"{running['rest']}/rest.txt"
    token = figures("token", "--at", running["path"])["token"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=30)
    assert refused.value.code == 401
    refused.value.close()
    for data in (b"hello", None):
        request = urllib.request.Request(url, data, {"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            body = answer.read()
    assert body == b"hello"


def test_the_page_is_served(running: dict[str, Any]) -> None:
    with urllib.request.urlopen(running["page"], timeout=30) as answer:
        assert b"view.js" in answer.read()
    with urllib.request.urlopen(running["page"] + "events", timeout=30) as stream:
        first = json.loads(stream.readline().removeprefix(b"data: "))
    assert len(first["traits"]["picture"]["nodes"]) == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo", "--path", "/no/such/folder", "--nodes", "2"], ["/no/such/folder", "not a directory"]),
        (["fs", "ls", "--at", "/no/such/cluster"], ["/no/such/cluster", "gostore up"]),
        (["node", "--name", "n1"], ["secret"]),
        (["node", "--config", "/no/such.toml"], ["/no/such.toml", "cannot be read"]),
        (["lab", "grade", "01_ring"], ["FILE", "--reference"]),
        (["bench", "launch", "--vs", "nobody"], ["nobody", "dask"]),
    ],
)
def test_mistakes_get_one_clear_error(arguments: list[str], parts: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    for part in parts:
        assert part in result.output
    assert "Traceback" not in result.output


def test_one_node_runs_by_itself_and_another_joins_it(tmp_path: Path) -> None:
    secret = {"GOSTORE_SECRET": "0123456789abcdef", "PATH": os.environ["PATH"]}

    def node(name: str, *more: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        process = subprocess.Popen(
            [*COMMAND, "node", "--name", name, "--data-dir", str(tmp_path / name), "--json", *more],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=secret,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{name} ended with {process.wait()}"
        return process, json.loads(line)

    first, address = node("a")
    second, _ = node("b", "--join", f"127.0.0.1:{address['tcp_port']}")
    try:
        at = ("--at", f"127.0.0.1:{address['tcp_port']}")
        runner = CliRunner(env={"GOSTORE_SECRET": secret["GOSTORE_SECRET"]})
        result = runner.invoke(main, ["db", "set", "c", "k", "1", "--create", *at])
        assert result.exit_code == 0, result.output
        assert json.loads(runner.invoke(main, ["db", "get", "c", "k", *at, "--json"]).stdout) == {"value": 1}
    finally:
        for process in (second, first):
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert process.stdout is not None
            process.stdout.close()


def test_accessors() -> None:
    assert accessors("tags.0.x") == ["tags", 0, "x"]
    assert accessors("") == []

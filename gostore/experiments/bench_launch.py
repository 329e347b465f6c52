"""``gostore bench launch``: start-up time, memory and idle cost, beside named peers in the same run.

Every start is measured from outside: a cold interpreter is started, and the clock runs until it says that it is ready.
Ours is ready when all members see all and one write was acknowledged by three replicas; dask's ``LocalCluster`` when
all its workers are there. The rounds alternate between us and the peer, so that both meet the same noise.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from gostore.core.errors import BadRequest, NotSupported, Unavailable

START_TIMEOUT_S = 120.0
IDLE_S = 10.0
"""How long the idle cost is watched. Longer: a steadier figure."""

Case = dict[str, Any]

# Each program prints one JSON line when it is ready, then waits for a line on its standard input, then prints another.
OURS = """
import json, sys
import gostore as gs
with gs.launch({nodes}) as cluster:
    cluster.db.create_container_sync("bench")
    cluster.db.set_sync("bench", "ready", 1)
    print(json.dumps({{"pids": cluster.pids()}}), flush=True)
    sys.stdin.readline()
"""
DASK = """
import json, sys
from dask.distributed import Client, LocalCluster
if __name__ == "__main__":
    options = dict(threads_per_worker=1, dashboard_address=None)
    with LocalCluster(n_workers={nodes}, **options) as cluster, Client(cluster) as client:
        client.wait_for_workers({nodes})
        print(json.dumps({{}}), flush=True)
        sys.stdin.readline()
"""
PEERS = {"dask": ("distributed", DASK)}


def bench_launch(peers: Sequence[str], *, rounds: int, progress: Callable[[str], None]) -> list[Case]:
    """The cases of the benchmark. Raises ``BadRequest`` for an unknown peer and ``NotSupported`` for an absent one."""
    _psutil()
    for peer in peers:
        if peer not in PEERS:
            raise BadRequest(f"--vs {peer}: unknown peer; known are {', '.join(PEERS)}")
        if importlib.util.find_spec(PEERS[peer][0]) is None:
            raise NotSupported(f"--vs {peer}: not installed; run: pip install 'gostore[bench]'")
    ours: list[float] = []
    theirs: dict[str, list[float]] = {peer: [] for peer in peers}
    for number in range(rounds):
        ours.append(_time_start(OURS.format(nodes=5)))
        for peer in peers:
            theirs[peer].append(_time_start(PEERS[peer][1].format(nodes=5)))
        progress(
            f"round {number + 1} of {rounds}: {ours[-1]:.2f} s " + str({p: round(t[-1], 2) for p, t in theirs.items()})
        )
    median = statistics.median(ours)
    cases = [_case("5 nodes ready", "s", median, statistics.median(times), peer) for peer, times in theirs.items()] or [
        _case("5 nodes ready", "s", median)
    ]
    cases.append(_case("20 nodes ready", "s", _time_start(OURS.format(nodes=20))))
    progress("20 nodes: done; now memory and idle cost")
    memory_mb, idle_percent = _memory_and_idle()
    cases.append(_case("memory a node (PSS), 5 nodes", "MB", memory_mb))
    cases.append(_case("idle 5 nodes, of one core", "%", idle_percent))
    cases.append(_case("import gostore", "s", statistics.median(_time_import() for _ in range(rounds))))
    return cases


def _case(name: str, unit: str, ours: float, peer: float | None = None, peer_name: str | None = None) -> Case:
    ratio = round(peer / ours, 2) if peer else None
    return {
        "name": name, "unit": unit, "ours": round(ours, 3), "peer": round(peer, 3) if peer else None,
        "peer_name": peer_name, "ratio": ratio,
    }  # fmt: skip


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        raise NotSupported("this benchmark needs psutil; run: pip install 'gostore[bench]'") from None
    return psutil


class _Program:
    """A cold interpreter that runs a program until it says that it is ready."""

    def __init__(self, code: str) -> None:
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.ready_s = time.perf_counter() - self.begun
        if not line.startswith("{"):
            _, errors = self.process.communicate(timeout=START_TIMEOUT_S)
            raise Unavailable(f"a benchmarked program did not start: {errors.strip()[-500:]}")
        self.answer: dict[str, Any] = json.loads(line)

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.communicate("\n", timeout=START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def _time_start(code: str) -> float:
    with _Program(code) as program:
        return program.ready_s


def _memory_and_idle() -> tuple[float, float]:
    """(proportional memory of a node in MB, processor time of five idle nodes in percent of one core)."""
    psutil = _psutil()
    with _Program(OURS.format(nodes=5)) as program:
        nodes = [psutil.Process(pid) for pid in program.answer["pids"]]
        before, begun = _cpu_s(nodes), time.perf_counter()
        time.sleep(IDLE_S)
        idle = (_cpu_s(nodes) - before) / (time.perf_counter() - begun)
        memory = statistics.mean(node.memory_full_info().pss for node in nodes)
    return memory / 1e6, idle * 100


def _cpu_s(processes: Sequence[Any]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _time_import() -> float:
    """The time of ``import gostore`` alone, measured inside a cold interpreter."""
    code = "import time; t = time.perf_counter(); import gostore; print(time.perf_counter() - t)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=START_TIMEOUT_S
    )
    return float(answer.stdout)

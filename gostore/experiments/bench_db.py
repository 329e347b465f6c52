"""``gostore bench db``: writes that a majority has synced, and linearizable reads, beside other stores.

Three members each, one consensus group, 64-byte values, and clients in processes of their own that talk to the leader
(:mod:`gostore.experiments.load`): with 64 clients in two processes, and with one. The rounds alternate between the
stores, so that all meet the same noise. How often a store syncs is read from its own counters before and after, and
stands beside the figures: to check it, ``strace -f -c -e trace=fsync,fdatasync -p PID``.

*Recovery* of a million entries: :mod:`gostore.experiments.bench_recovery`.

*etcd* promises what we do. *Redis* (one server, ``appendfsync always``) and *PySyncObj* (a tick of 1 ms, syncs nothing)
promise less and stand there for orientation. A peer that is not there is skipped with what to install.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from gostore.core.errors import BadRequest, NotSupported, Timeout, Unavailable
from gostore.experiments.bench_recovery import recovery_s
from gostore.experiments.load import fields

Case = dict[str, Any]

MEMBERS: Final = 3
CLIENTS: Final = (64, 1)
PROCESSES: Final = 2
"""Of clients, when there are many."""
OPERATIONS: Final = ("put", "get")
SECONDS: Final = 4.0
KEYS: Final = 1_000
VALUE_SIZE_BYTES: Final = 64
ENTRIES: Final = 1_000_000
RECOVERY_S_MAX: Final = 20.0
START_TIMEOUT_S: Final = 60.0

TARGETS: Final[dict[tuple[int, str], float]] = {(64, "put"): 1.5, (64, "get"): 1.5, (1, "put"): 1.0, (1, "get"): 1.0}
"""Ratios to etcd that the project has set itself."""


class Store(Protocol):
    """A store that runs. ``specs(processes)``: how each of the client processes reaches it."""

    name: str
    operations: tuple[str, ...]

    def specs(self, processes: int) -> list[Any]: ...
    def syncs(self) -> int | None:
        """Of all members since their start; None: it does not say."""
        ...


class GoStore:
    """One shard, so that there is one group, as in etcd."""

    name = "gostore"
    operations: tuple[str, ...] = OPERATIONS

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        import gostore

        self._secret = secrets.token_hex(16)
        self._cluster = stack.enter_context(
            gostore.launch(MEMBERS, path=directory / "gostore", secret=self._secret, db={"shards": 1})
        )
        self._cluster.db.create_container_sync("bench")
        self._cluster.wait_settled_sync()

    def specs(self, processes: int) -> list[Any]:
        statuses = {name: self._cluster.call_sync(name, "admin", "status") for name in self._cluster.nodes}
        (leader,) = (name for name, status in statuses.items() if status["shards"])
        members = {name: member["address"] for name, member in statuses[leader]["members"].items()}
        at = {"cluster": self._cluster.name, "secret": self._secret, "members": members, "via": leader}
        return [at] * processes

    def syncs(self) -> int | None:
        return sum(int(of["wal"]["syncs"]) for of in self._cluster.statistics_sync().values())


class Etcd:
    name = "etcd"
    operations: tuple[str, ...] = OPERATIONS

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        _need_program("etcd", "apt-get install etcd-server")
        _need_module("grpc", "grpcio")
        ports = _free_ports(2 * MEMBERS)
        self._clients, peers = ports[:MEMBERS], ports[MEMBERS:]
        everybody = ",".join(f"m{number}=http://127.0.0.1:{port}" for number, port in enumerate(peers))
        for number, (client, peer) in enumerate(zip(self._clients, peers, strict=True)):
            urls = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
            _program(
                stack, directory / f"etcd{number}",
                ["etcd", "--name", f"m{number}", "--data-dir", str(directory / f"etcd{number}" / "data"),
                 "--listen-client-urls", urls[0], "--advertise-client-urls", urls[0], "--listen-peer-urls", urls[1],
                 "--initial-advertise-peer-urls", urls[1], "--initial-cluster", everybody,
                 "--initial-cluster-state", "new", "--logger", "zap", "--log-level", "error"],
            )  # fmt: skip
        self._leader = _until(self._find_leader, "etcd has no leader")

    def _find_leader(self) -> int | None:
        import grpc

        for port in self._clients:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                ask = channel.unary_unary("/etcdserverpb.Maintenance/Status")
                try:
                    status = dict(fields(ask(b"", timeout=1.0)))
                except grpc.RpcError:
                    continue
                if status.get(4) and status[4] == dict(fields(status[1])).get(2):
                    return port
        return None

    def specs(self, processes: int) -> list[Any]:
        return [f"127.0.0.1:{self._leader}"] * processes

    def syncs(self) -> int | None:
        counted = 0
        for port in self._clients:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5.0) as answer:
                lines = answer.read().decode().splitlines()
            (found,) = (line for line in lines if line.startswith("etcd_disk_wal_fsync_duration_seconds_count "))
            counted += int(float(found.split()[1]))
        return counted


class Redis:
    name = "redis"
    operations: tuple[str, ...] = OPERATIONS

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        _need_program("redis-server", "apt-get install redis-server")
        _need_module("redis", "redis")
        (self._port,) = _free_ports(1)
        place = directory / "redis"
        _program(
            stack, place,
            ["redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(place), "--save", "",
             "--appendonly", "yes", "--appendfsync", "always"],
        )  # fmt: skip
        _until(self._answers, "redis-server does not answer")

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def specs(self, processes: int) -> list[Any]:
        return [self._port] * processes

    def syncs(self) -> int | None:
        return None


class PySyncObj:
    """Its members are the client processes themselves, and begin anew with every run; its reads are no messages."""

    name = "pysyncobj"
    operations: tuple[str, ...] = ("put",)

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        _need_module("pysyncobj", "pysyncobj")

    def specs(self, processes: int) -> list[Any]:
        members = [f"127.0.0.1:{port}" for port in _free_ports(MEMBERS)]
        return [[one, [other for other in members if other != one]] for one in members]

    def syncs(self) -> int | None:
        return 0


PEERS: Final[dict[str, Callable[[Path, ExitStack], Store]]] = {"etcd": Etcd, "redis": Redis, "pysyncobj": PySyncObj}


def bench_db(peers: Sequence[str], *, rounds: int, progress: Callable[[str], None]) -> list[Case]:
    """The cases of the benchmark: medians of ``rounds``. Raises ``BadRequest`` for an unknown peer."""
    for peer in peers:
        if peer not in PEERS:
            raise BadRequest(f"--vs {peer}: unknown peer; known are {', '.join(PEERS)}")
    rates: dict[tuple[str, int, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="gostore-bench-") as directory, ExitStack() as stack:
        stores: list[Store] = [GoStore(Path(directory), stack)]
        for peer in peers:
            try:
                stores.append(PEERS[peer](Path(directory), stack))
            except NotSupported as error:
                progress(f"{peer} is skipped: {error.message}")
        for store in stores:
            if "get" in store.operations:
                _fill(store)
        for number in range(rounds):
            for clients in CLIENTS:
                for operation in OPERATIONS:
                    for store in (store for store in stores if operation in store.operations):
                        result = measure(store, operation, clients)
                        rates.setdefault((store.name, clients, operation), []).append(result["rate"])
                        synced = f", {result['syncs']:.2f} syncs a put" if "syncs" in result else ""
                        progress(
                            f"round {number + 1} of {rounds}: {store.name}, {clients} clients, {operation}: "
                            f"{result['rate']:,.0f}/s, p50 {result['p50_ms']:.2f} ms, p99 {result['p99_ms']:.2f} ms"
                            f"{synced}"
                        )
    cases = [
        _case(rates, store.name, clients, operation)
        for clients in CLIENTS
        for operation in OPERATIONS
        for store in stores[1:] or stores
        if operation in store.operations
    ]
    progress(f"now the recovery of {ENTRIES:,} entries")
    seconds = recovery_s(ENTRIES)
    cases.append(
        {
            "name": f"recovery, {ENTRIES:,} entries", "unit": "s", "ours": round(seconds, 1), "peer": RECOVERY_S_MAX,
            "peer_name": "target", "ratio": round(RECOVERY_S_MAX / seconds, 2),
        }
    )  # fmt: skip
    return cases


def _case(rates: dict[tuple[str, int, str], list[float]], peer: str, clients: int, operation: str) -> Case:
    ours = statistics.median(rates["gostore", clients, operation])
    case: Case = {
        "name": f"{operation}, {clients} client{'s' if clients > 1 else ''}",
        "unit": "1/s",
        "ours": round(ours),
    }
    if peer == "gostore":
        return {**case, "peer": None, "peer_name": None, "ratio": None}
    theirs = statistics.median(rates[peer, clients, operation])
    ratio = round(ours / theirs, 2)
    target = TARGETS[clients, operation] if peer == "etcd" else None
    return {**case, "peer": round(theirs), "peer_name": peer, "ratio": ratio, "target": target}


def _fill(store: Store) -> None:
    with _loads(store, "fill", 1, 1) as processes:
        _go(processes)


def measure(store: Store, operation: str, clients: int) -> dict[str, float]:
    """One run: ``rate`` (1/s), ``p50_ms``, ``p99_ms`` (the greatest of the processes); ``syncs`` a put, if known."""
    before = store.syncs()
    with _loads(store, operation, clients, min(PROCESSES, clients)) as processes:
        results = _go(processes)
    after, operations = store.syncs(), sum(result["operations"] for result in results)
    found = {
        "rate": sum(result["operations"] / result["seconds"] for result in results),
        "p50_ms": max(result["latency_ms"][0] for result in results),
        "p99_ms": max(result["latency_ms"][1] for result in results),
    }
    if operation == "put" and before is not None and after is not None:
        found["syncs"] = (after - before) / max(operations, 1)
    return found


@contextmanager
def _loads(store: Store, operation: str, clients: int, processes: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Client processes that are connected."""
    started = []
    try:
        for at in store.specs(processes):
            spec = {
                "kind": store.name, "at": at, "operation": operation, "clients": max(1, clients // processes),
                "seconds": SECONDS, "keys": KEYS, "value_size": VALUE_SIZE_BYTES,
            }  # fmt: skip
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "gostore.experiments.load", json.dumps(spec)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            _line(process)
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _go(processes: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [_line(process) for process in processes]


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("{"):
        raise Unavailable("a client process ended; what it says stands above")
    answer: dict[str, Any] = json.loads(line)
    return answer


# programs


def _need_program(name: str, how: str) -> None:
    if shutil.which(name) is None:
        raise NotSupported(f"{name} is not installed; run: {how}")


def _need_module(name: str, package: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise NotSupported(f"{package} is not installed; run: pip install 'gostore[peers]'")


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _program(stack: ExitStack, directory: Path, command: Sequence[str]) -> None:
    """A server that ends with the stack; what it says is in ``directory``."""
    directory.mkdir()
    log = stack.enter_context((directory / "log").open("wb"))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def end() -> None:
        process.kill()
        process.wait()

    stack.callback(end)


def _until(find: Callable[[], Any], otherwise: str) -> Any:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not (found := find()):
        if time.monotonic() > deadline_s:
            raise Timeout(f"{otherwise} after {START_TIMEOUT_S:g} s")
        time.sleep(0.05)
    return found

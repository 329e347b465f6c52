"""A cluster of real processes: the testbed of the process world.

The processes belong to a zygote (``gostore.launch.zygote``), which belongs to this process. What must end when the
cluster object does, however that happens, is kept apart from it in a ``Belongings``: the object may be collected as
garbage, the interpreter may exit, or be killed.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gostore.client.connection import Connection, client_env
from gostore.client.nodes import Life, NodeHandle
from gostore.client.policies import checked_policy
from gostore.client.receiver import JournalReceiver
from gostore.client.record import read_record, write_record
from gostore.client.thread import client_thread
from gostore.config import NodeConfig
from gostore.core.address import Address
from gostore.core.errors import BadRequest, ConfigError, GoStoreError, Timeout, Unavailable, error_from_wire
from gostore.core.events import Events
from gostore.launch.belongings import Belongings
from gostore.launch.control import Control, tail
from gostore.launch.faults import ProcessFaults
from gostore.launch.place import Place
from gostore.testbed import Testbed

NODES_DEFAULT: Final = 5
NODES_MAX: Final = 64

EXIT_TIMEOUT_S: Final = 10.0
"""A killed process that is not gone after this long is stuck in the kernel."""

STOP_TIMEOUT_S: Final = 4.0
"""Nodes whose data are kept may take this long to close them; then they are killed (what was acknowledged is safe)."""


@dataclass(slots=True)
class Process:
    """What the launcher knows of one node; ``settings`` are its own, beyond those of the cluster."""

    name: str
    host: str
    settings: dict[str, Any]
    ports: dict[str, int]
    life: Life = Life.STOPPED
    pid: int | None = None
    status: int | None = None
    """Exit status of the latest process; negative: the signal that ended it."""
    started: asyncio.Future[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> Address:
        return Address(self.host, self.ports["tcp"], self.ports["udp"])


class ProcessCluster(Testbed):
    """See :func:`gostore.launch.launch`."""

    world = "processes"
    faults: ProcessFaults

    def __init__(
        self,
        place: Place,
        nodes: int | None = None,
        *,
        name: str = "gostore",
        secret: str | None = None,
        policies: Mapping[str, type] | None = None,
        timeout_s: float = 60.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        thread = client_thread()
        super().__init__(name, thread)
        self._belongings = Belongings(place, thread)
        weakref.finalize(self, self._belongings.drop).atexit = False
        self._place = place
        self.start_timeout_s = timeout_s
        self._processes: dict[str, Process] = {}
        self._begun_ms = 0
        self._faults_seen: Events | None = None
        self.faults = ProcessFaults(self)
        try:
            self._plan(nodes, secret, policies or {}, settings or {})
        except BaseException:
            thread.run_sync(self._belongings.end())
            raise

    # the plan: which nodes there are, with which settings

    def _plan(
        self, nodes: int | None, secret: str | None, policies: Mapping[str, type], settings: Mapping[str, Any]
    ) -> None:
        """Fill ``_processes`` from the arguments and from what is in the directory. Raises :class:`ConfigError`."""
        if nodes is not None and (type(nodes) is not int or not 1 <= nodes <= NODES_MAX):
            raise ConfigError(f"nodes = {nodes!r}: allowed are 1 to {NODES_MAX}")
        for reserved in ("name", "data_dir", "cluster", "join", "tcp_port", "udp_port", "policies"):
            if reserved in settings:
                raise ConfigError(f"{reserved} = {settings[reserved]!r}: the launcher sets it for each node")
        record = read_record(self._place.root)
        if record is None:
            names = [f"n{number + 1}" for number in range(nodes or NODES_DEFAULT)]
            known: dict[str, Any] = {name: {} for name in names}
            self._settings: dict[str, Any] = {}
            self._secret = secret or secrets.token_hex(16)
        else:
            known = record["nodes"]
            if nodes is not None and nodes != len(known):
                raise ConfigError(
                    f"nodes = {nodes}: {self._place.root} holds a cluster of {len(known)}; "
                    f"start it with nodes = {len(known)} and use add_node()"
                )
            self._settings, self._secret = record["settings"], secret or record["secret"]
            self.name = record["cluster"]
        self._settings = _merged(self._settings, settings)
        sources = {slot: checked_policy(slot, policy).to_wire() for slot, policy in policies.items()}
        self._settings = _merged({"cls": {"expect": len(known)}, "policies": {}}, self._settings)
        self._settings["policies"] |= sources
        # Until all were ready once, the first node may have to found the cluster still (if it did, it knows).
        self._born = record is not None and bool(record["born"])
        # A cluster that is there has policies of its own, so new ones are installed when it is up.
        self._to_install = dict(policies) if record is not None else {}
        for name, facts in known.items():
            self._add_process(name, facts.get("settings", {}), facts.get("ports", {}))
            config = self._config(name, ())  # every mistake in the settings shows before anything runs
        self._keep_shards(record, config.db.shards)

    def _keep_shards(self, record: Mapping[str, Any] | None, shards: int) -> None:
        """The number of shards stays what it was at birth, also when another default comes."""
        born_with = shards if record is None else record["shards"]
        if shards != born_with:
            raise ConfigError(f"db.shards = {shards}: this cluster was born with {born_with}, which is fixed")
        self._settings = _merged(self._settings, {"db": {"shards": shards}})

    def _add_process(self, name: str, settings: dict[str, Any], ports: dict[str, int]) -> Process:
        host = _merged(self._settings, settings).get("host", "127.0.0.1")
        process = self._processes[name] = Process(name, host, settings, ports)
        self.nodes.add(NodeHandle(self, self._runner, name))
        return process

    def _config(self, name: str, join: tuple[str, ...]) -> NodeConfig:
        """The configuration of a node, with the ports that are bound for it."""
        process = self._processes[name]
        values = _merged(self._settings, process.settings)
        ports = process.ports
        if ports:
            values |= {"tcp_port": ports["tcp"], "udp_port": ports["udp"]}
            values["rest"] = {**values.get("rest", {}), "port": ports.get("rest", -1)}
        data_dir = str(self._place.root / name)
        return NodeConfig.from_dict(
            {**values, "name": name, "cluster": self.name, "secret": self._secret, "data_dir": data_dir, "join": join}
        )

    def _write_record(self) -> None:
        nodes = {p.name: {"host": p.host, "ports": p.ports, "settings": p.settings} for p in self._processes.values()}
        record = {
            "cluster": self.name, "secret": self._secret, "shards": self._settings["db"]["shards"],
            "born": self._born, "settings": self._settings, "nodes": nodes,
        }  # fmt: skip
        write_record(self._place.root, record, durable=not self._place.temporary)

    # start and stop

    async def _boot(self) -> None:
        if self._belongings.ended:
            raise Unavailable(
                "this cluster was stopped; launch another one (with the same path, if its data were kept)"
            )
        # The zygote reports to whoever is there, and does not keep the cluster alive.
        on_event = _weak(self, ProcessCluster._on_zygote)
        control = self._belongings.control = Control(self._place.process, self._place.zygote_log, on_event)
        await control.open()
        self._connection = self._belongings.connection = await self._connect()
        await control.hello()
        await self._bind_all()
        self._write_record()
        first = next(iter(self._processes))
        seeds = (_joinable(self._processes[first]),)
        for name in self._processes:
            await self._fork(name, self._others(name) if self._born else () if name == first else seeds)
        await self._wait_started(list(self._processes.values()))

    async def _came_up(self) -> None:
        if not self._born:
            self._born = True
            self._write_record()
        for slot, policy in self._to_install.items():
            await self.install(slot, policy, self.start_timeout_s)

    async def _connect(self) -> Connection:
        env = client_env()
        self._begun_ms = env.wall_ms() - int(self._time()[0] * 1000)
        self._faults_seen = Events(
            "testbed", stamp=lambda: env.hlc.tick(env.wall_ms()), time_s=lambda: asyncio.get_running_loop().time()
        )
        self._faults_seen.subscribe(self.events.append)
        connection = Connection(env, cluster=self.name, secret=self._secret, host=self._client_host())
        connection.endpoint.register(JournalReceiver(self.events.deliver))
        answers = _weak(self, ProcessCluster._answers)
        connection.is_usable = lambda name: bool(answers(name))
        await connection.open()
        return connection

    def _client_host(self) -> str:
        host = str(self._settings.get("host", "127.0.0.1"))
        return host if host in ("127.0.0.1", "::1", "localhost") else "0.0.0.0"  # noqa: S104 - nodes elsewhere answer us

    async def _bind_all(self) -> None:
        """Bind the ports of all nodes, the same as last time. When a stranger has one of them, all get new ones."""
        try:
            for process in self._processes.values():
                await self._bind(process, process.ports)
        except ConfigError:
            if not any(process.ports for process in self._processes.values()):
                raise
            for process in self._processes.values():
                await self._control.request("release", node=process.name)
                process.ports = {}
            for process in self._processes.values():
                await self._bind(process, {})

    async def _bind(self, process: Process, ports: Mapping[str, int]) -> None:
        config = self._config(process.name, ())
        answer = await self._control.request(
            "bind", node=process.name, host=process.host, tcp=ports.get("tcp", 0), udp=ports.get("udp", 0),
            rest=ports.get("rest", config.rest.port),
        )  # fmt: skip
        process.ports = answer["ports"]

    async def _wait_started(self, processes: list[Process]) -> None:
        """Until each of them answers. Raises the first error, and no other."""
        waiting = ""
        try:
            async with asyncio.timeout(self.start_timeout_s):
                for process in processes:
                    waiting = process.name
                    assert process.started is not None
                    await process.started
        except TimeoutError:
            end = self._log_end(waiting)
            raise Timeout(f"{waiting} does not answer {self.start_timeout_s:g} s after its start{end}") from None

    def _others(self, name: str) -> tuple[str, ...]:
        return tuple(_joinable(other) for other in self._processes.values() if other.name != name)

    async def _fork(self, name: str, join: tuple[str, ...]) -> None:
        process, connection = self._processes[name], self._connection
        assert connection is not None
        config = self._config(name, join)
        process.started = asyncio.get_running_loop().create_future()
        process.ended.clear()
        process.life = Life.STARTING
        answer = await self._control.request("start", node=name, config=config.to_dict())
        process.pid = answer["pid"]
        connection.started(name, process.address)
        connection.env.tasks.start(self._follow(name), name=f"follow {name}")

    @property
    def _control(self) -> Control:
        if self._belongings.control is None or self._belongings.ended:
            raise Unavailable("the cluster does not run")
        return self._belongings.control

    async def _shut_down(self) -> None:
        alive = [process for process in self._processes.values() if process.life.alive]
        if not self._place.temporary and self._belongings.control is not None and not self._belongings.ended:
            await self._ask_to_stop(alive)
        for process in alive:
            process.life = Life.STOPPED
            process.pid = None
        await self._belongings.end()
        self._connection = None

    async def _ask_to_stop(self, alive: list[Process]) -> None:
        try:
            for process in alive:
                resumed = process.life is Life.PAUSED
                process.life = Life.STOPPED
                if resumed:
                    await self._signal(process, signal.SIGCONT)
                await self._signal(process, signal.SIGTERM)
            async with asyncio.timeout(STOP_TIMEOUT_S):
                for process in alive:
                    await process.ended.wait()
        except (TimeoutError, GoStoreError):
            pass  # the zygote kills whoever is left

    # single nodes

    async def _signal(self, process: Process, number: signal.Signals) -> None:
        await self._control.request("signal", node=process.name, signal=int(number))

    async def _kill_node(self, name: str) -> None:
        process = self._processes[name]
        process.life = Life.KILLED
        await self._signal(process, signal.SIGKILL)
        await self._wait_ended(process)

    async def _wait_ended(self, process: Process) -> None:
        try:
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                await process.ended.wait()
        except TimeoutError:
            raise Timeout(
                f"{process.name} (process {process.pid}) is not gone {EXIT_TIMEOUT_S:g} s after the kill"
            ) from None

    async def _restart_node(self, name: str) -> None:
        process = self._processes[name]
        if process.life.alive:
            await self._kill_node(name)
        await self._bind(process, process.ports)
        await self._fork(name, self._others(name))
        await self._wait_started([process])
        await self.faults._reapply(name)

    async def _pause_node(self, name: str) -> None:
        process = self._processes[name]
        process.life = Life.PAUSED
        await self._signal(process, signal.SIGSTOP)

    async def _resume_node(self, name: str) -> None:
        process = self._processes[name]
        await self._signal(process, signal.SIGCONT)
        process.life = Life.RUNNING
        await self.faults._reapply(name)

    async def _add_node(self, name: str | None, settings: Mapping[str, Any]) -> str:
        if len(self._processes) >= NODES_MAX:
            raise BadRequest(f"there are {NODES_MAX} nodes already; more do not fit on one machine")
        number = len(self._processes) + 1
        while name is None or name in self._processes:
            name, number = f"n{number}", number + 1
        process = self._add_process(name, dict(settings), {})
        try:
            await self._bind(process, {})
            self._write_record()
            await self._fork(name, self._others(name))
            await self._wait_started([process])
        except GoStoreError:
            if not process.life.alive:
                del self._processes[name]
                self.nodes.remove(name)
            raise
        return name

    # what the zygote tells

    def _on_zygote(self, event: dict[str, Any]) -> None:
        if event["event"] == "gone":
            if not event["expected"]:
                for process in self._processes.values():
                    if process.life.alive:
                        self._on_exit(process, -signal.SIGKILL)
            return
        process = self._processes[event["node"]]
        if event["event"] == "exit":
            self._on_exit(process, event["status"])
        elif event["event"] == "ready":
            if process.life is Life.STARTING:
                process.life = Life.RUNNING
            _settle(process.started, None)
        else:
            error = error_from_wire(event["error"])
            _settle(process.started, type(error)(f"{process.name}: {error.message}{self._log_end(process.name)}"))

    def _on_exit(self, process: Process, status: int) -> None:
        process.pid, process.status = None, status
        if process.life.alive:
            process.life = Life.CRASHED
        process.ended.set()
        if self._connection is not None:
            self._connection.ended(process.name)
        why = self.why_ended(process.name)
        self.events.ended(process.name, why)
        end = self._log_end(process.name)
        _settle(process.started, ConfigError(f"{process.name} did not start: it {why}{end}"))

    def why_ended(self, name: str) -> str:
        process = self._processes[name]
        if process.life is not Life.CRASHED or process.status is None:
            return f"is {process.life}"
        if process.status < 0:
            return f"was ended by the signal {signal.Signals(-process.status).name}"
        return f"ended with status {process.status}"

    # what a testbed asks

    def _answers(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.life in (Life.STARTING, Life.RUNNING)

    def life_of(self, name: str) -> Life:
        return self._processes[name].life

    def pid_of(self, name: str) -> int | None:
        return self._processes[name].pid

    def log_of(self, name: str, lines: int) -> list[str]:
        return tail(self._place.root / name / "node.log", lines)

    def rest_url_of(self, name: str) -> str | None:
        process = self._processes[name]
        port = process.ports.get("rest")
        if port is None or not process.life.alive:
            return None
        host = f"[{process.host}]" if ":" in process.host else process.host
        return f"http://{host}:{port}"

    def _time(self) -> tuple[float, int]:
        return time.monotonic() - self._place.begun_s, self._begun_ms

    def _publish_fault(self, kind: str, arguments: Mapping[str, Any]) -> None:
        if self._faults_seen is not None:
            self._faults_seen.publish("fault", fault=kind, arguments=dict(arguments))


def _joinable(process: Process) -> str:
    host = f"[{process.host}]" if ":" in process.host else process.host
    return f"{host}:{process.ports['tcp']}"


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, the second over the first."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _settle(future: asyncio.Future[None] | None, error: GoStoreError | None) -> None:
    if future is None or future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # another node's error may be the one that is raised


def _weak(owner: ProcessCluster, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that does not keep its owner alive; it does nothing once the owner is gone."""
    reference = weakref.ref(owner)

    def call(*arguments: Any) -> Any:
        found = reference()
        return method(found, *arguments) if found is not None else None

    return call

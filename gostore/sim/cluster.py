"""A simulated cluster: the testbed of the world of virtual time.

The nodes are the same as everywhere; what surrounds them is a :class:`~gostore.sim.world.World`. Because all of it is
in this interpreter, the testbed looks into the nodes instead of asking them: a status, a snapshot or an event costs
the cluster no message and no time, so that watching changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import msgpack

from gostore.client.connection import Connection
from gostore.client.nodes import Life, NodeHandle
from gostore.client.policies import checked_policy
from gostore.config import NodeConfig
from gostore.core.address import Address
from gostore.core.errors import BadRequest, ConfigError, GoStoreError, NotSupported, Timeout, Unavailable
from gostore.core.events import Event, Events
from gostore.node import Node
from gostore.sim.errors import where
from gostore.sim.faults import SimFaults
from gostore.sim.loop import Processor
from gostore.sim.net import NetConfig
from gostore.sim.runner import SimRunner
from gostore.sim.scheduler import EPOCH_S
from gostore.sim.world import CALLBACKS_MAX, VIRTUAL_S_MAX, SimNode, World
from gostore.testbed import Testbed, check_arguments, check_number

NODES_DEFAULT: Final = 5
NODES_MAX: Final = 2_000
PORT: Final = 7_000
REST_PORT: Final = 8_080

LOOK_GAP_S: Final = 0.001
LOOK_GAP_S_MAX: Final = 2.0
"""How often a waiting testbed looks at the nodes, in virtual seconds: in a cluster of five, and at least."""

_RESERVED: Final = ("name", "data_dir", "cluster", "join", "host", "tcp_port", "udp_port", "policies", "secret")


class Machine:
    """What the testbed knows of one node; it belongs to the world and does not keep the testbed alive."""

    def __init__(self, name: str, settings: Mapping[str, Any], configure: Callable[[Machine], NodeConfig]) -> None:
        self.name = name
        self.settings = dict(settings)
        self.life = Life.STOPPED
        self.why = ""
        self.join: tuple[str, ...] = ()
        self.app: Node | None = None
        self.started = asyncio.Event()
        self.on_start: Callable[[SimNode], None] = lambda node: None
        self.on_exit: Callable[[str, str], None] = lambda name, why: None
        self._configure = configure

    async def main(self, node: SimNode) -> None:
        """The process of this machine."""
        try:
            await self._serve(node)
        except GoStoreError as error:
            self._exit(node, f"did not start: {error.message}")
        except Exception as error:
            node.env.log.exception("%s ended", self.name)
            self._exit(node, f"was ended by {type(error).__name__}: {error}")

    async def _serve(self, node: SimNode) -> None:
        self.on_start(node)
        app = self.app = Node(self._configure(self), node.env)
        node.loop.hold(app)  # after a crash the next process takes its place here
        await app.start()
        self.life = Life.RUNNING
        self.started.set()
        await app.wait_ended()
        await app.stop()
        self._exit(node, f"ended with status {app.status}")

    def _exit(self, node: SimNode, why: str) -> None:
        self.life, self.why = Life.CRASHED, why
        self.started.set()
        self.on_exit(self.name, why)
        node.stop_process()


class SimCluster(Testbed):
    """See :func:`simulate`. ``sim`` is the world: its clock, its trace, its network."""

    world = "simulation"
    faults: SimFaults

    def __init__(
        self,
        nodes: int = NODES_DEFAULT,
        *,
        seed: int | str = 0,
        name: str = "gostore",
        policies: Mapping[str, type] | None = None,
        timeout_s: float = 60.0,
        net: NetConfig | None = None,
        processor: Processor | None = None,
        trace_sink: Callable[[str], None] | None = None,
        virtual_s_max: float = VIRTUAL_S_MAX,
        callbacks_max: int = CALLBACKS_MAX,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if type(nodes) is not int or not 1 <= nodes <= NODES_MAX:
            raise ConfigError(f"nodes = {nodes!r}: allowed are 1 to {NODES_MAX}")
        check_arguments(timeout_s=timeout_s, policies=policies)
        _check_world(seed, net, processor, trace_sink, virtual_s_max, callbacks_max)
        for reserved in _RESERVED:
            if reserved in (settings or {}):
                raise ConfigError(f"{reserved}: the simulation sets it for each node")
        self.sim = World(seed, net=net, processor=processor, trace_sink=trace_sink)
        self._sim_runner = SimRunner(self.sim, virtual_s_max=virtual_s_max, callbacks_max=callbacks_max)
        super().__init__(name, self._sim_runner)
        scheduler = self.sim.scheduler
        self.nodes.where = lambda: where(scheduler.seed, scheduler.now)
        self.start_timeout_s = timeout_s
        # A look costs the square of the number of nodes, in real time; so large clusters are looked at less often.
        self._look_gap_s = min(LOOK_GAP_S * (nodes / NODES_DEFAULT) ** 2, LOOK_GAP_S_MAX)
        self._secret = hashlib.sha256(f"secret of {seed}".encode()).hexdigest()[:32]
        self._settings = _merged({"cls": {"expect": nodes}, "rest": {"port": REST_PORT}}, settings or {})
        if policies:
            self._settings["policies"] = {
                slot: checked_policy(slot, policy).to_wire() for slot, policy in policies.items()
            }
        self._machines: dict[str, Machine] = {}
        self._faults_seen: Events | None = None
        self.faults = SimFaults(self)
        for number in range(1, nodes + 1):
            self._add_machine(f"n{number}", {})

    @property
    def seed(self) -> int | str:
        return self.sim.seed

    # the plan

    def _add_machine(self, name: str, settings: Mapping[str, Any]) -> Machine:
        cluster, secret, common = self.name, self._secret, self._settings
        addresses = self.sim.net.hosts

        def configure(machine: Machine) -> NodeConfig:
            return NodeConfig.from_dict(
                {
                    **_merged(common, machine.settings),
                    "name": machine.name,
                    "cluster": cluster,
                    "secret": secret,
                    "data_dir": "disk",
                    "host": addresses[machine.name].address if machine.name in addresses else "127.0.0.1",
                    "tcp_port": PORT,
                    "udp_port": PORT,
                    "join": machine.join,
                }
            )

        machine = Machine(name, settings, configure)
        configure(machine)  # every mistake in the settings shows before anything runs
        self._machines[name] = machine
        self.nodes.add(NodeHandle(self, self._runner, name))
        return machine

    # start and stop

    async def _boot(self) -> None:
        env = self.sim.client().env
        self._faults_seen = Events(
            "testbed", stamp=lambda: env.hlc.tick(env.wall_ms()), time_s=lambda: asyncio.get_running_loop().time()
        )
        self._faults_seen.subscribe(self.events.append)
        self._connection = Connection(env, cluster=self.name, secret=self._secret, host=self.sim.client().address)
        usable = weakref.WeakMethod(self._answers)
        self._connection.is_usable = lambda name: bool((found := usable()) and found(name))
        await self._connection.open()
        first, *others = self._machines.values()
        self._power_on(first, ())
        for machine in others:
            self._power_on(machine, (self._joinable(first.name),))
        for machine in self._machines.values():
            await self._wait_started(machine)

    def _power_on(self, machine: Machine, join: tuple[str, ...]) -> None:
        machine.join = join
        machine.life = Life.STARTING
        machine.started.clear()
        machine.on_start = _weakly(self._on_start)
        machine.on_exit = _weakly(self._on_exit)
        if machine.name in self.sim.nodes:
            node = self.sim.restart(machine.name)
        else:
            node = self.sim.add_node(machine.name, machine.main)
        assert self._connection is not None
        self._connection.started(machine.name, Address(node.address, PORT, PORT))

    def _joinable(self, name: str) -> str:
        return f"{self.sim.node(name).address}:{PORT}"

    async def _wait_started(self, machine: Machine) -> None:
        try:
            async with asyncio.timeout(self.start_timeout_s):
                await machine.started.wait()
        except TimeoutError:
            end = self._log_end(machine.name)
            raise Timeout(f"{machine.name} does not answer {self.start_timeout_s:g} s after its start{end}") from None
        if machine.life is Life.CRASHED:
            raise ConfigError(f"{machine.name} {machine.why}{self._log_end(machine.name)}")

    async def _shut_down(self) -> None:
        for machine in self._machines.values():
            if machine.life.alive:
                machine.life = Life.STOPPED
        self._connection = None
        # Nobody inside runs any more; the world is closed as soon as it has stopped stepping.
        self._sim_runner.over = True

    # observing, from outside of the world

    def _on_start(self, node: SimNode) -> None:
        for _, categories, rate in self._subscriptions:
            self._listen(node, categories, rate)

    async def _follow(self, name: str) -> None:
        """A node that starts is listened to from its first event on; see :meth:`_on_start`."""

    async def _subscribe(self, name: str, subscription: str, categories: Sequence[str], messages_a_s: float) -> None:
        self._listen(self.sim.node(name), categories, messages_a_s)

    def watch_client(self) -> None:
        """Collect the messages of the testbed's own client, too: what it was told is then in the journal."""
        self._listen(self.sim.client(), ("message",), -1.0)

    def _listen(self, node: SimNode, categories: Sequence[str], messages_a_s: float) -> None:
        journal, sim = weakref.ref(self.events), self.sim.scheduler
        next_message_s = 0.0

        def hear(event: Event) -> None:
            nonlocal next_message_s
            if event.category == "message" and messages_a_s >= 0:
                if sim.now < next_message_s or not messages_a_s:
                    return
                next_message_s = sim.now + 1 / messages_a_s
            # Through the wire format, so that an event looks the same in both worlds, and is nobody's live object.
            if (found := journal()) is not None:
                found.append(Event.from_wire(msgpack.unpackb(msgpack.packb(event.to_wire()))))

        node.env.events.subscribe(hear, categories)

    async def _ask_all(self, function: str, timeout_s: float) -> dict[str, dict[str, Any] | GoStoreError]:
        answers: dict[str, dict[str, Any] | GoStoreError] = {}
        for name, machine in self._machines.items():
            if not machine.life.answers:
                continue
            if machine.app is None or machine.life is Life.STARTING:
                answers[name] = Unavailable(f"{name} is starting")
                continue
            answer: dict[str, Any] = _look(machine.app, function)
            answers[name] = answer
            if function == "status":
                self._learn(name, answer)
        return answers

    async def _refresh_arcs(self, statuses: Mapping[str, dict[str, Any]]) -> None:
        if not statuses:
            return
        name = max(statuses, key=lambda node: int(statuses[node]["epoch"]))
        version = (statuses[name]["epoch"], statuses[name]["placement"])
        app = self._machines[name].app
        if version != self._arcs[0] and app is not None:
            try:
                self._arcs = (version, _look(app, "arcs"))
            except GoStoreError:
                pass  # a placement that raises; the next snapshot asks again

    # single nodes

    def _kill_node(self, name: str, *, power: bool = False) -> None:
        machine = self._machines[name]
        if not machine.life.alive:
            raise BadRequest(f"{name} does not run; it {self.why_ended(name)}")
        machine.life = Life.KILLED
        if power:
            self.sim.power_cut(name)
        else:
            self.sim.crash(name)
        self._on_exit(name, self.why_ended(name))

    async def _restart_node(self, name: str) -> None:
        machine = self._machines[name]
        if machine.life.alive:
            self._kill_node(name)
        self._power_on(machine, tuple(self._joinable(other) for other in self._machines if other != name))
        await self._wait_started(machine)

    def _pause_node(self, name: str) -> None:
        machine = self._machines[name]
        if machine.life is not Life.RUNNING:
            raise BadRequest(f"{name} cannot be paused: it {self.why_ended(name)}")
        machine.life = Life.PAUSED
        self.sim.pause(name)

    def _resume_node(self, name: str) -> None:
        machine = self._machines[name]
        if machine.life is not Life.PAUSED:
            raise BadRequest(f"{name} is not paused: it {self.why_ended(name)}")
        machine.life = Life.RUNNING
        self.sim.resume(name)

    async def _add_node(self, name: str | None, settings: Mapping[str, Any]) -> str:
        if len(self._machines) >= NODES_MAX:
            raise BadRequest(f"there are {NODES_MAX} nodes already")
        number = len(self._machines) + 1
        while name is None or name in self._machines:
            name, number = f"n{number}", number + 1
        machine = self._add_machine(name, settings)
        self._power_on(machine, tuple(self._joinable(other) for other in self._machines if other != name))
        await self._wait_started(machine)
        return name

    def _on_exit(self, name: str, why: str) -> None:
        if self._connection is not None:
            self._connection.ended(name)

    # what a testbed asks

    def _answers(self, name: str) -> bool:
        machine = self._machines.get(name)
        return machine is not None and machine.life.answers

    def why_ended(self, name: str) -> str:
        machine = self._machines[name]
        return machine.why if machine.life is Life.CRASHED else f"is {machine.life}"

    def life_of(self, name: str) -> Life:
        return self._machines[name].life

    def pid_of(self, name: str) -> int | None:
        return None

    def log_of(self, name: str, lines: int) -> list[str]:
        node = self.sim.nodes.get(name)
        return [] if node is None else list(node.log_lines)[-lines:]

    def rest_url_of(self, name: str) -> str | None:
        machine = self._machines[name]
        if machine.app is None or not machine.life.alive or machine.app.rest.port <= 0:
            return None
        return f"http://{self.sim.node(name).address}:{machine.app.rest.port}"

    def _time(self) -> tuple[float, int]:
        return self.sim.now, int(EPOCH_S * 1000)

    def _publish_fault(self, kind: str, arguments: Mapping[str, Any]) -> None:
        self.sim.trace.add(self.sim.now, f"fault {kind} {dict(arguments)}")
        if self._faults_seen is not None:
            self._faults_seen.publish("fault", fault=kind, arguments=dict(arguments))

    # standing still

    def states(self) -> dict[str, dict[str, Any]]:
        """Every machine as it stands, without a message and without time passing; also in a world that was stopped.

        Per node ``life``, ``incarnation`` (starts of its process), ``tasks`` (unfinished), ``ready`` (callbacks that
        wait for its processor), ``clock_offset_s`` (ahead of true time), ``unsynced`` (file -> bytes that a power cut
        may take) and ``status``: what the node says of itself (as its ``admin`` service does), None while it is down.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, machine in self._machines.items():
            node = self.sim.nodes.get(name)
            if node is None:
                continue
            serving = machine.app is not None and machine.life.alive and machine.life is not Life.STARTING
            found[name] = {
                "life": str(machine.life),
                "incarnation": node.incarnation,
                "tasks": len(node.loop.tasks()),
                "ready": node.loop.ready,
                "clock_offset_s": round(node.clock.offset_s(), 6),
                "unsynced": node.disk.unsynced(),
                "status": _look(machine.app, "status") if serving and machine.app is not None else None,
            }
        return found

    # virtual time

    async def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        await asyncio.sleep(seconds)

    def sleep_sync(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._runner.run_sync(self.sleep(seconds))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of yours inside the world, on the client's machine: its sleeps and time-outs are virtual."""
        return self._runner.run_sync(coroutine)


def simulate(
    nodes: int = NODES_DEFAULT,
    *,
    seed: int | str = 0,
    name: str = "gostore",
    placement: type | None = None,
    policies: Mapping[str, type] | None = None,
    timeout_s: float = 60.0,
    net: NetConfig | None = None,
    processor: Processor | None = None,
    trace_sink: Callable[[str], None] | None = None,
    virtual_s_max: float = VIRTUAL_S_MAX,
    callbacks_max: int = CALLBACKS_MAX,
    **settings: Any,
) -> SimCluster:
    """A simulated cluster; start it with ``async with``, ``with``, ``await`` or start_sync().

    Everything that happens in it is a function of ``seed`` and of what is asked of it, in virtual time. ``placement``,
    ``policies``, ``settings``, ``timeout_s`` as for :func:`gostore.launch.launch`; ``net`` and ``processor`` set the
    constants of the network and of the nodes' processors; ``trace_sink`` gets a line for everything that happens.
    ``virtual_s_max``, ``callbacks_max``: no call to the cluster may take more seconds of virtual time or callbacks; a
    scenario that never ends is a :class:`~gostore.sim.errors.LimitError`, and its journal can be asked as before.

    Raises :class:`~gostore.core.errors.ConfigError` and :class:`~gostore.core.errors.PolicyError`.
    """
    check_arguments(timeout_s=timeout_s, policies=policies)
    slots = {**(policies or {}), **({"placement": placement} if placement is not None else {})}
    return SimCluster(
        nodes,
        seed=seed,
        name=name,
        policies=slots,
        timeout_s=timeout_s,
        net=net,
        processor=processor,
        trace_sink=trace_sink,
        virtual_s_max=virtual_s_max,
        callbacks_max=callbacks_max,
        settings=settings,
    )


def _check_world(seed: Any, net: Any, processor: Any, trace_sink: Any, virtual_s_max: Any, callbacks_max: Any) -> None:
    """What a world is made of. Raises :class:`ConfigError`."""
    if type(seed) not in (int, str):
        raise ConfigError(f"seed = {seed!r}: expected a whole number or a text")
    for name, value, kind in (("net", net, NetConfig), ("processor", processor, Processor)):
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} = {value!r}: expected a {kind.__module__}.{kind.__name__}")
    if trace_sink is not None and not callable(trace_sink):
        raise ConfigError(f"trace_sink = {trace_sink!r}: expected a function that takes a line, such as print")
    check_number("virtual_s_max", virtual_s_max)
    check_number("callbacks_max", callbacks_max)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _look(app: Node, function: str) -> Any:
    """What the node's own ``admin`` answers, without asking it by message; none of these functions waits."""
    coroutine = getattr(app.admin, function)(None)
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise NotSupported(f"admin.{function} waits for something; call it as any remote function")


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Call the method while its object lives."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        if (found := reference()) is not None:
            found(*arguments)

    return call

"""The one interface to a cluster: notebooks, views, labs, checks and experiments know only this.

Two worlds implement it, processes (``gostore.launch``) and the simulation (``gostore.sim``). A world supplies the life
and death of nodes (the abstract methods) and a :class:`~gostore.core.twins.Runner`, which decides where coroutines run;
everything else is asked of the nodes through their ``admin`` service and is the same in both.

Every coroutine has a ``_sync`` twin; ``async with`` and ``with`` both start and stop the cluster. Waiting is called
``wait_<condition>``, has a time limit, and ends in a :class:`Timeout` that names the node that is not there and shows
the end of its log.
"""

from __future__ import annotations

import asyncio
import importlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, Final, Self

from gostore.client import conditions
from gostore.client.conditions import Condition, Statuses, describe, good_ones
from gostore.client.connection import Connection
from gostore.client.consensus import merged_groups
from gostore.client.files import FsHandle
from gostore.client.nodes import Life, NodeHandle, Nodes
from gostore.client.objects import DbHandle
from gostore.client.policies import policy_source
from gostore.client.snapshot import NodeFacts, snapshot
from gostore.core.errors import BadRequest, ConfigError, GoStoreError, NotSupported, Timeout, Unavailable
from gostore.core.events import CATEGORIES, Event
from gostore.core.twins import Runner, SyncTwins, sync_twin
from gostore.faults import Faults
from gostore.trace import Journal

READY_TIMEOUT_S: Final = 60.0
SETTLED_TIMEOUT_S: Final = 120.0
STATUS_TIMEOUT_S: Final = 0.5
"""How long a node may take over its status before the last known one is shown. A snapshot takes no longer than this."""

WAIT_STATUS_TIMEOUT_S: Final = 1.0
"""The same where somebody waits; so much longer than asked for a wait may take."""

POLL_S: Final = (0.05, 0.4)
"""How long a waiting condition sleeps when no event wakes it: from, half as long again each time, to. What takes long
is asked for less often: every question is work for all nodes."""

LOG_LINES: Final = 12
"""How much of a node's log an error shows."""

FOLLOWED: Final = ("cls", "repair", "fault", "policy")
"""Categories of events that the journal always collects, completely; they are rare."""

SEEN: Final = ("message", "db", "fs", "storage")
"""What a view wants to see as well."""

SEEN_MESSAGES_A_S: Final = 20.0

STATES: Final = ("joining", "connecting", "online", "disconnecting", "offline", "leaving", "left")
"""What members think of a node (``gostore.cluster.members.NodeState``, which a client does not load)."""

# Where the pictures come from; by name, because they lie above this module and need libraries that a cluster does not.
PICTURES: Final = {
    "view": ("gostore.viz.widget", "ClusterView"),
    "graph": ("gostore.viz.graph", "graph_of"),
    "plot": ("gostore.viz.figures", "plot"),
    "space_time": ("gostore.viz.spacetime", "space_time"),
}


def check_number(name: str, value: Any) -> None:
    """Raises :class:`ConfigError` for what is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name} = {value!r}: expected a number above 0")


def check_arguments(*, timeout_s: Any, policies: Any) -> None:
    """What every launch takes, in either world. Raises :class:`ConfigError`."""
    check_number("timeout_s", timeout_s)
    if policies is not None and not isinstance(policies, Mapping):
        raise ConfigError(f"policies = {policies!r:.100}: expected slot -> class, e.g. {{'placement': MyRing}}")


class Testbed(SyncTwins, ABC):
    """A cluster, in either world. ``fs``, ``db``, ``nodes``, ``faults`` and ``events`` are its handles."""

    __test__ = False  # its name looks like a test class to pytest
    world: ClassVar[str]
    faults: Faults

    def __init__(self, name: str, runner: Runner) -> None:
        self.name = name
        self._runner = runner
        self.nodes = Nodes()
        self.events = Journal(runner)
        self.fs = FsHandle(runner, self._connected)
        self.db = DbHandle(runner, self._connected)
        self.ready_s = 0.0
        """Seconds from the launch until all nodes were ready."""
        self.start_timeout_s = READY_TIMEOUT_S
        # Between two looks at all nodes while waiting; for a world in which every event arrives at once.
        self._look_gap_s = 0.0
        self._connection: Connection | None = None
        self._running = False
        self._statuses: dict[str, dict[str, Any]] = {}
        self._opinions: dict[str, tuple[int, str]] = {}
        self._policy_failures: dict[str, tuple[str, str]] = {}
        """Node -> (policy, error), until another policy is installed there."""
        self._subscriptions: list[tuple[str, tuple[str, ...], float]] = [("always", FOLLOWED, 0.0)]
        self._groups: dict[str, dict[str, Any]] = {}
        self._groups_fresh: list[str] = []
        """What nodes said last of their groups, and who answered the last time."""
        self._arcs: tuple[Any, list[Any]] = (None, [])
        self._on_stop: dict[int, Callable[[], None]] = {}
        self._last_snapshot: dict[str, Any] = {}
        # Weakly: the endpoint holds the journal, and must not hold the cluster.
        hear = weakref.WeakMethod(self._on_event)
        self.events.subscribe(lambda event: method(event) if (method := hear()) else None)

    @property
    def journal(self) -> Journal:
        """The same as :attr:`events`."""
        return self.events

    # what a world supplies

    @abstractmethod
    async def _boot(self) -> None:
        """Start all nodes and set ``_connection``; they need not be ready."""

    @abstractmethod
    async def _shut_down(self) -> None:
        """End everything. Called once, also after a ``_boot`` that failed."""

    @abstractmethod
    async def _add_node(self, name: str | None, settings: Mapping[str, Any]) -> str:
        """Start one more node and return its name."""

    @abstractmethod
    def life_of(self, name: str) -> Life: ...

    @abstractmethod
    def pid_of(self, name: str) -> int | None: ...

    @abstractmethod
    def log_of(self, name: str, lines: int) -> list[str]: ...

    @abstractmethod
    def rest_url_of(self, name: str) -> str | None: ...

    @abstractmethod
    def _time(self) -> tuple[float, int]:
        """(seconds since the launch, wall clock at the launch in milliseconds since 1970), of this world."""

    def why_ended(self, name: str) -> str:
        """How a node's process ended, for people."""
        return f"is {self.life_of(name)}"

    async def _came_up(self) -> None:
        """All nodes are ready for the first time; the last step of the start."""

    # start and stop

    async def start(self) -> Self:
        """Start the cluster and wait until it is ready. Raises one :class:`ConfigError` or :class:`Timeout`."""
        if self._running:
            return self
        try:
            await self._boot()
            self._running = True
            await self.wait_ready(self.start_timeout_s)
            await self._came_up()
        except BaseException:
            self._running = False
            await asyncio.shield(self._shut_down())
            raise
        self.ready_s = self._time()[0]
        return self

    start_sync = sync_twin(start)

    async def stop(self) -> None:
        """End the cluster. A second call does nothing."""
        if self._running:
            try:
                self._last_snapshot = {**await self._look(), "running": False}
            except GoStoreError:
                pass  # the one before it stays; a cluster that is in trouble can be stopped all the same
            self._running = False
            for callback in list(self._on_stop.values()):
                callback()
        await self._shut_down()

    stop_sync = sync_twin(stop)

    def on_stop(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back when the cluster is stopped, on the client's loop; returns the function that ends it."""
        key = max(self._on_stop, default=0) + 1
        self._on_stop[key] = callback
        return lambda: self._on_stop.pop(key, None) and None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def __enter__(self) -> Self:
        return self.start_sync()

    def __exit__(self, *_: object) -> None:
        self.stop_sync()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.start().__await__()

    def _connected(self) -> Connection:
        if self._connection is None or not self._running:
            raise Unavailable("the cluster does not run; start it with `async with`, `with`, or start_sync()")
        return self._connection

    # asking nodes

    async def call(
        self, node: str, service: str, function: str, *args: Any, data: bytes = b"", timeout_s: float | None = None
    ) -> Any:
        """Call a remote function of one node and return its value. Raises what it raises."""
        connection = self._connected()
        return (await connection.call_node(node, service, function, *args, data=data, timeout_s=timeout_s)).value

    call_sync = sync_twin(call)

    async def statistics(self) -> dict[str, dict[str, Any]]:
        """Node -> its figures; nodes that do not answer are left out."""
        return good_ones(await self._ask_all("statistics", READY_TIMEOUT_S))

    statistics_sync = sync_twin(statistics)

    async def _ask_all(self, function: str, timeout_s: float) -> dict[str, dict[str, Any] | GoStoreError]:
        """The answers of all nodes that run, asked at once, in launch order."""
        connection = self._connected()
        names = [name for name in self.nodes if self.life_of(name).answers]

        async def ask(name: str) -> dict[str, Any] | GoStoreError:
            try:
                found: dict[str, Any] = (await connection.call_node(name, "admin", function, timeout_s=timeout_s)).value
            except GoStoreError as error:
                return error
            return found

        answers = dict(zip(names, await asyncio.gather(*map(ask, names)), strict=True))
        if function == "status":
            for name, answer in answers.items():
                if not isinstance(answer, GoStoreError):
                    self._learn(name, answer)
        return answers

    def _learn(self, name: str, status: dict[str, Any]) -> None:
        self._statuses[name] = status
        for member, facts in status["members"].items():
            self._hear(member, status["epoch"], facts["state"])

    def _hear(self, member: str, epoch: int, state: str) -> None:
        if epoch >= self._opinions.get(member, (0, ""))[0]:
            self._opinions[member] = (epoch, state)

    def _on_event(self, event: Event) -> None:
        if event.kind == "member":
            self._hear(event.data["member"], event.data["epoch"], str(event.data["state"]).lower())
        elif event.kind == "policy_failed":
            self._policy_failures[event.node] = (event.data["name"], event.data["error"])
        elif event.kind == "policy_installed" and self._policy_failures.get(event.node, ("",))[0] != event.data["name"]:
            self._policy_failures.pop(event.node, None)

    def state_of(self, name: str) -> str:
        life = self.life_of(name)
        if life.answers:
            return self._opinions.get(name, (0, "joining"))[1]
        return str(life)

    # waiting

    async def wait_until(self, condition: Condition, what: str, timeout_s: float) -> None:
        """Wait until ``condition`` finds nothing missing; ``what`` completes "the cluster is not ...".

        Raises :class:`Timeout` that names the nodes and reasons, and shows the end of the first one's log.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        news, poll_s = asyncio.Event(), POLL_S[0]
        # Not on every event: what a journal collects beyond the usual must not change when this looks.
        unsubscribe = self.events.subscribe(lambda event: news.set() if event.category in FOLLOWED else None)
        try:
            while True:
                news.clear()
                # Also in the last round with all the time it takes: a reason should be true, even if it comes late.
                missing = condition(await self._ask_all("status", WAIT_STATUS_TIMEOUT_S))
                if not missing:
                    return
                if loop.time() >= deadline_s:
                    end = self._log_end(missing[0][0])
                    why = self._policy_failure() or describe(missing)
                    raise Timeout(f"the cluster is not {what} after {timeout_s:g} s: {why}{end}")
                try:
                    async with asyncio.timeout_at(min(deadline_s, loop.time() + poll_s)):
                        await news.wait()
                except TimeoutError:
                    pass
                poll_s = min(1.5 * poll_s, POLL_S[1])
                if self._look_gap_s:
                    await asyncio.sleep(self._look_gap_s)
        finally:
            unsubscribe()

    wait_until_sync = sync_twin(wait_until)

    def _policy_failure(self) -> str:
        """Why nothing goes on when it is a policy that raises; empty when none does."""
        failing = [name for name in self.nodes if name in self._policy_failures and self.life_of(name).answers]
        return f"a policy fails at {', '.join(failing)}: {self._policy_failures[failing[0]][1]}" if failing else ""

    def _log_end(self, name: str) -> str:
        lines = self.log_of(name, LOG_LINES) if name in self.nodes else []
        return f"\nthe end of the log of {name}:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every node that runs is online, and all agree on the same epoch."""

        def missing(statuses: Statuses) -> list[tuple[str, str]]:
            crashed = [(name, self.why_ended(name)) for name in self.nodes if self.life_of(name) is Life.CRASHED]
            nobody = [] if statuses else [(name, self.why_ended(name)) for name in self.nodes]
            return crashed + conditions.not_ready(statuses) or nobody

        await self.wait_until(missing, "ready", timeout_s)

    wait_ready_sync = sync_twin(wait_ready)

    async def wait_settled(self, timeout_s: float = SETTLED_TIMEOUT_S) -> None:
        """Until the cluster has dealt with all that happened.

        The members' view is what the testbed knows (who was killed or paused is not online), every shard has its
        replicas in sync, and nothing is left to repair.
        """

        def missing(statuses: Statuses) -> list[tuple[str, str]]:
            nobody = [] if statuses else [(name, self.why_ended(name)) for name in self.nodes]
            return conditions.not_settled(statuses, (name for name in self.nodes if name not in statuses)) or nobody

        await self.wait_until(missing, "settled", timeout_s)

    wait_settled_sync = sync_twin(wait_settled)

    async def wait_state(self, node: str, state: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until all other nodes that run think that ``node`` is in ``state`` (``"online"``, ``"offline"``, ...)."""
        if node not in self.nodes:
            raise BadRequest(f"there is no node {node!r}; there are {', '.join(self.nodes)}")
        if state not in STATES:
            raise BadRequest(f"state = {state!r}: a node is never that; allowed are {', '.join(STATES)}")
        await self.wait_until(conditions.not_seen_as(node, state), f"of the opinion that {node} is {state}", timeout_s)

    wait_state_sync = sync_twin(wait_state)

    async def wait_epoch(self, epoch: int, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every node that runs has installed this epoch, or a later one."""
        await self.wait_until(conditions.not_at_epoch(epoch), f"at epoch {epoch}", timeout_s)

    wait_epoch_sync = sync_twin(wait_epoch)

    # what else one does with a cluster

    async def add_node(self, /, name: str | None = None, **settings: Any) -> NodeHandle:
        """Start one more node; returns when it is online everywhere. ``settings`` as in a node's configuration."""
        self._connected()
        if name is not None and not isinstance(name, str):
            raise BadRequest(f"name = {name!r}: expected a text; one node is added at a time")
        if name is not None and name in self.nodes:
            raise BadRequest(f"there is a node {name!r} already")
        added = await self._add_node(name, settings)
        await self.wait_state(added, "online")
        return self.nodes[added]

    add_node_sync = sync_twin(add_node)

    async def install(self, slot: str, policy: type | None, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Put a class into a slot of the running cluster, on every node; None brings the default back.

        Raises :class:`PolicyError` that shows the line at fault, and nothing has changed.
        """
        wire = None if policy is None else policy_source(policy).to_wire()
        answer = await self._connected().call("admin", "install", slot, wire, timeout_s=timeout_s)
        await self.wait_epoch(answer.value["epoch"], timeout_s)

    install_sync = sync_twin(install)

    async def locate(self, key: str | bytes) -> dict[str, Any]:
        """Where a key lies on the ring: ``{"key", "token": 16 hexadecimal digits, "owners": [node...]}``."""
        text = key if isinstance(key, str) else key.decode()
        found: dict[str, Any] = (await self._connected().call("admin", "locate", text, repeatable=True)).value
        return found

    locate_sync = sync_twin(locate)

    async def locate_file(self, path: str) -> dict[str, Any]:
        """Where a file's entry and its chunks lie, and who holds the chunks now."""
        found: dict[str, Any] = (await self._connected().call("admin", "locate_file", path, repeatable=True)).value
        return found

    locate_file_sync = sync_twin(locate_file)

    async def rest_url(self) -> str:
        """Address of the REST interface of a node that runs. Raises :class:`Unavailable` when none has one."""
        for name in self.nodes:
            url = self.rest_url_of(name)
            if url is not None and self.life_of(name) is Life.RUNNING:
                return url
        raise Unavailable("no running node has a REST interface")

    rest_url_sync = sync_twin(rest_url)

    def pids(self) -> list[int]:
        """Process ids of the nodes that run."""
        return [pid for name in self.nodes if (pid := self.pid_of(name)) is not None]

    async def watch(self, *categories: str, messages_a_s: float = SEEN_MESSAGES_A_S) -> None:
        """Collect more categories of events from now on; ``messages_a_s``: of each node, negative for all of them."""
        for category in categories:
            if category not in CATEGORIES:
                every = ", all nodes are watched" if category in self.nodes else ""
                raise BadRequest(
                    f"there is no category of events {category!r}{every}; there are {', '.join(CATEGORIES)}"
                )
        known = [category for _, earlier, _ in self._subscriptions for category in earlier]
        wanted = tuple(category for category in categories if category not in known)
        if wanted:
            subscription = (f"more-{len(self._subscriptions)}", wanted, messages_a_s)
            self._subscriptions.append(subscription)
            running = [name for name in self.nodes if self.life_of(name) is Life.RUNNING]
            await asyncio.gather(*(self._subscribe(name, *subscription) for name in running))

    watch_sync = sync_twin(watch)

    async def _follow(self, name: str) -> None:
        """Collect the events of a node that has just been started."""
        for subscription in list(self._subscriptions):
            await self._subscribe(name, *subscription)

    async def _subscribe(self, name: str, subscription: str, categories: Sequence[str], messages_a_s: float) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            answer = await connection.call_node(
                name, "admin", "subscribe", subscription, list(categories), messages_a_s
            )
        except GoStoreError as error:
            if self.life_of(name) is Life.RUNNING:
                connection.env.log.warning("no events of %s: %s", name, error)
            return
        self.events.begin(subscription, name, answer.value["incarnation"], answer.value["seq"])

    # pictures

    async def snapshot(self) -> dict[str, Any]:
        """The cluster now, as plain JSON values (schema: ``gostore.viz.graph``); takes at most about a second."""
        if not self._running:
            return self._last_snapshot or self._take({}, {})
        # Only somebody who looks pays for this: the end of the cluster takes what was last known.
        answers = good_ones(await self._ask_all("groups", STATUS_TIMEOUT_S))
        self._groups.update(answers)
        self._groups_fresh = list(answers)
        return await self._look()

    snapshot_sync = sync_twin(snapshot)

    async def _look(self) -> dict[str, Any]:
        statuses = await self._ask_all("status", STATUS_TIMEOUT_S)
        good = good_ones(statuses)
        await self._refresh_arcs(good)
        return self._take(statuses, good)

    def _take(self, statuses: Mapping[str, Any], good: Mapping[str, Any]) -> dict[str, Any]:
        facts = []
        for name in self.nodes:
            life, address = self.life_of(name), self._connection.address(name) if self._connection else None
            shown = f"{address.host}:{address.tcp_port}" if address else None
            status, stale = self._statuses.get(name, {}), name not in good
            facts.append(
                NodeFacts(
                    name,
                    life.alive,
                    life is Life.PAUSED,
                    self.pid_of(name),
                    shown,
                    self.rest_url_of(name),
                    status,
                    stale,
                )
            )
        time_s, started_ms = self._time()
        links = [
            {"from": a, "to": b, "blocked": effect.drop >= 1.0, "drop": effect.drop, "delay_s": effect.delay_s}
            for (a, b), effect in self.faults.links().items()
        ]
        alive = [name for name in self.nodes if self.life_of(name).answers]
        groups = merged_groups(self._groups, fresh=[n for n in self._groups_fresh if n in alive], alive=alive)
        replication = next((answer["replication"] for answer in self._groups.values()), None)
        return snapshot(
            facts, name=self.name, world=self.world, time_s=time_s, started_ms=started_ms, running=self._running,
            arcs=self._arcs[1], links=links, groups=groups, replication=replication,
        )  # fmt: skip

    async def _refresh_arcs(self, statuses: Mapping[str, dict[str, Any]]) -> None:
        """The ring changes with the epoch only; the node with the newest view is asked for it."""
        if not statuses:
            return
        name = max(statuses, key=lambda node: int(statuses[node]["epoch"]))
        version = (statuses[name]["epoch"], statuses[name]["placement"])
        if version == self._arcs[0]:
            return
        try:
            answer = await self._connected().call_node(name, "admin", "arcs", timeout_s=STATUS_TIMEOUT_S)
            self._arcs = (version, answer.value)
        except GoStoreError:
            pass  # the next snapshot asks again

    def view(self, **options: Any) -> Any:
        """The live view, a widget. Raises :class:`NotSupported` when its libraries are not installed."""
        self.watch_sync(*SEEN)
        return self._picture("view")(self, **options)

    def graph(self) -> Any:
        """The cluster as a networkx graph."""
        return self._picture("graph")(self.snapshot_sync())

    def plot(self, **options: Any) -> Any:
        """The cluster drawn with matplotlib."""
        return self._picture("plot")(self.snapshot_sync(), **options)

    def space_time(self, event: Event | None = None, **options: Any) -> Any:
        """The causal past of an event of the journal as a Lamport diagram, or a window (``since_s``, ``until_s``)."""
        return self._picture("space_time")(self.events, event, **options)

    def _picture(self, what: str) -> Callable[..., Any]:
        module, name = PICTURES[what]
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise NotSupported(f"{what}() needs {error.name}; run: pip install 'gostore[notebook]'") from None
        return found

    def __repr__(self) -> str:
        """The same for every run that did the same, so that validated notebooks can compare it."""
        running = sum(self.life_of(name).alive for name in self.nodes)
        state = f"{running} of {len(self.nodes)} nodes run" if self._running else "not running"
        return f"<{self.world} cluster {self.name!r}: {state}>"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{name}</td><td>{node.state}</td></tr>" for name, node in self.nodes.items())
        return f"<b>{self.name}</b> ({self.world})<table><tr><th>node</th><th>state</th></tr>{rows}</table>"

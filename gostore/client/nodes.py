"""Handles of single nodes, and what a testbed knows of their processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, Protocol

from gostore.core.errors import BadRequest
from gostore.core.twins import Runner, SyncTwins, sync_twin


class Life(StrEnum):
    """What the testbed itself knows of a node's process."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    KILLED = "killed"
    STOPPED = "stopped"
    CRASHED = "crashed"

    @property
    def alive(self) -> bool:
        return self in (Life.STARTING, Life.RUNNING, Life.PAUSED)

    @property
    def answers(self) -> bool:
        return self in (Life.STARTING, Life.RUNNING)


class Lives(Protocol):
    """The life and death of nodes, as the ``faults`` of a testbed offer it."""

    async def kill(self, node: str) -> None: ...
    async def pause(self, node: str) -> None: ...
    async def resume(self, node: str) -> None: ...
    async def restart(self, node: str) -> None: ...


class Owner(Protocol):
    """What a handle needs of its testbed."""

    @property
    def faults(self) -> Lives: ...
    async def call(self, node: str, service: str, function: str, *args: Any) -> Any: ...
    def life_of(self, name: str) -> Life: ...
    def state_of(self, name: str) -> str: ...
    def pid_of(self, name: str) -> int | None: ...
    def rest_url_of(self, name: str) -> str | None: ...
    def log_of(self, name: str, lines: int) -> list[str]: ...


class NodeHandle(SyncTwins):
    """One node of a testbed."""

    def __init__(self, owner: Owner, runner: Runner, name: str) -> None:
        self._owner = owner
        self._runner = runner
        self.name = name

    @property
    def life(self) -> Life:
        return self._owner.life_of(self.name)

    @property
    def state(self) -> str:
        """``killed``, ``paused``, ... when the testbed knows; else what the cluster thinks: ``online``, ..."""
        return self._owner.state_of(self.name)

    @property
    def pid(self) -> int | None:
        """Process id; None when it does not run, or has none of its own."""
        return self._owner.pid_of(self.name)

    @property
    def rest_url(self) -> str | None:
        """Address of its REST interface; None when it has none or does not run."""
        return self._owner.rest_url_of(self.name)

    async def kill(self) -> None:
        """End it at once, as a crash would; what it had synced stays."""
        await self._owner.faults.kill(self.name)

    kill_sync = sync_twin(kill)

    async def pause(self) -> None:
        """Stop it where it stands."""
        await self._owner.faults.pause(self.name)

    pause_sync = sync_twin(pause)

    async def resume(self) -> None:
        """Let it go on after :meth:`pause`."""
        await self._owner.faults.resume(self.name)

    resume_sync = sync_twin(resume)

    async def restart(self) -> None:
        """Start it again on its data, killing it first when it runs; returns when it answers."""
        await self._owner.faults.restart(self.name)

    restart_sync = sync_twin(restart)

    async def status(self) -> dict[str, Any]:
        """What the node says of itself: state, epoch, shards, counters, its view of the others."""
        found: dict[str, Any] = await self._owner.call(self.name, "admin", "status")
        return found

    status_sync = sync_twin(status)

    async def statistics(self) -> dict[str, Any]:
        """Cumulative figures since its start, by part."""
        found: dict[str, Any] = await self._owner.call(self.name, "admin", "statistics")
        return found

    statistics_sync = sync_twin(statistics)

    def logs(self, lines: int = 20) -> str:
        """The last lines of what it logged."""
        return "\n".join(self._owner.log_of(self.name, lines))

    def __repr__(self) -> str:
        return f"<node {self.name}: {self.state}>"


class UnknownNode(BadRequest, KeyError):
    """A name that no node of the testbed has; a ``KeyError``, as :class:`Nodes` is a mapping."""

    code = "unknown_node"

    def __str__(self) -> str:
        return self.message


class Nodes(Mapping[str, NodeHandle]):
    """Name -> node, in the order of their launch."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeHandle] = {}
        self.where: Callable[[], str] = lambda: ""
        """The end of a message: in which run, for a world that can be replayed."""

    def __getitem__(self, name: str) -> NodeHandle:
        try:
            return self._nodes[name]
        except KeyError:
            raise UnknownNode(f"there is no node {name!r}; there are {', '.join(self._nodes)}{self.where()}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, node: NodeHandle) -> None:
        """For the testbed."""
        self._nodes[node.name] = node

    def remove(self, name: str) -> None:
        """For the testbed."""
        del self._nodes[name]

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name}: {node.state}' for name, node in self.items())}}}"

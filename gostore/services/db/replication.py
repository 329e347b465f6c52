"""The slot ``replication``: how the replicas of one shard come to hold the same log.

A policy is built once per shard and node and is given a :class:`Group`: everything it may touch. It orders payloads,
makes them durable and replicates them; what is *committed* it hands to the state machine, in order, once. It decides
who may write and who may read. Above it, nobody knows how it does that: transactions, sessions and two-phase commit
are commands in the log, so that the lessons ``primary_backup`` and ``quorum`` take the place of ``raft`` without
touching them.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from gostore.cluster.view import View
from gostore.comm import Reply
from gostore.consensus import group
from gostore.consensus.groups import Compaction, Groups
from gostore.core.errors import PolicyError
from gostore.core.slots import Slot, declare_slot
from gostore.env import Env
from gostore.storage.wal import Wal


class StateMachine(group.StateMachine, Protocol):
    """What the log is for, of a shard: the state machine of a group, and one thing more."""

    def serving(self) -> None:
        """This node has just become the one that serves the shard, with everything applied."""
        ...


@dataclass(slots=True)
class Group:
    """One shard at one node, as its replication policy sees it.

    ``send(to, message, data, timeout_s)`` reaches :meth:`Replication.handle` of the same shard at another node.
    ``view()`` is this node's view of the cluster, ``owners(view)`` the shard's preference list in it.
    ``groups``: the consensus groups of the node. ``moves``: held while the members of a shard change; it bounds how
    many do at a time. ``copies_min``: configured number of copies without which ``primary_backup`` refuses a write.
    ``read_quorum``, ``write_quorum``: replicas that answer a read and sync a write, in ``quorum``. ``incarnation``: of
    this node, in which it was never before.
    ``compaction``: when the log is replaced by a snapshot, in ``raft``.
    """

    env: Env
    name: str
    shard: int
    wal: Wal
    groups: Groups
    moves: asyncio.Semaphore
    machine: StateMachine
    send: Callable[..., Any]
    view: Callable[[], View]
    owners: Callable[[View], tuple[str, ...]]
    copies_min: int
    read_quorum: int
    write_quorum: int
    incarnation: int
    compaction: Compaction


@dataclass(slots=True)
class ShardStatus:
    """For the live view, statistics and tests.

    ``settled``: every planned replica is a member, and nobody else. ``generation``: grows with every new primary; the
    term of ``raft``.
    """

    shard: int
    role: str
    primary: str | None
    generation: int
    members: tuple[str, ...]
    planned: tuple[str, ...]
    last_index: int
    committed: int
    settled: bool
    details: dict[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "role": self.role,
            "primary": self.primary,
            "generation": self.generation,
            "replicas": list(self.members),
            "planned": list(self.planned),
            "last_index": self.last_index,
            "committed": self.committed,
            "settled": self.settled,
            **self.details,
        }


class Replication(Protocol):
    """Slot ``replication``."""

    def __init__(self, group: Group) -> None: ...

    async def start(self) -> None:
        """The journal has been replayed; the view may still be empty."""
        ...

    def on_view(self, view: View) -> None:
        """The cluster changed."""
        ...

    async def propose(self, payload: bytes, deadline_s: float) -> Any:
        """Order, replicate, commit and apply one command; returns its outcome.

        Raises ``NotOwner`` (``details["owner"]``: who may be asked) and ``Unavailable``, both definite unless they
        say otherwise; ``Timeout`` (indefinite: it may still be applied) after ``deadline_s`` (loop time).
        """
        ...

    async def read_barrier(self, deadline_s: float) -> None:
        """Return when this node's state may be read. Raises as :meth:`propose`."""
        ...

    async def handle(self, source: str, message: list[Any], data: bytes) -> Reply:
        """A message of the policy itself, from another replica."""
        ...

    @property
    def role(self) -> str:
        """idle (holds nothing), backup, recovering (about to serve) or primary (serves)."""
        ...

    @property
    def primary(self) -> str | None:
        """Who serves the shard, as far as is known here."""
        ...

    def unapplied(self) -> list[tuple[int, bytes | None]]:
        """What this replica would apply first if it took over: indices and commands (None: the policy's own)."""
        ...

    def status(self) -> ShardStatus: ...


METHODS = ("start", "on_view", "propose", "read_barrier", "handle", "status")


T = TypeVar("T")


async def together(env: Env, name: str, coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines, which must not raise, as tasks of the node; their results in order. Cancelled as one."""
    tasks = [env.tasks.start(coroutine, name=name) for coroutine in coroutines]
    try:
        results: list[T] = await asyncio.gather(*tasks)
        return results
    finally:
        for task in tasks:
            task.cancel()


def check_replication(cls: type) -> None:
    """The conformance test that needs no cluster: the right methods are coroutines, the others are not."""
    for name in METHODS:
        asynchronous = inspect.iscoroutinefunction(getattr(cls, name))
        if asynchronous != inspect.iscoroutinefunction(getattr(Replication, name)):
            raise PolicyError(f"{cls.__name__}.{name} must be `{'def' if asynchronous else 'async def'}`")


def declare(default: type) -> Slot:
    return declare_slot(
        Slot("replication", default, METHODS, check_replication, "how the replicas of a shard hold the same log")
    )

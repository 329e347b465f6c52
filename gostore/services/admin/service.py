"""The control channel of a node: status, statistics, events, link faults, policies. Answered by the node alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, Final, Protocol

from gostore.cluster import Arc, Member, NodeState, View, arcs_of, token_of
from gostore.comm import Call, Endpoint, Fault, remote, service
from gostore.config import NodeConfig
from gostore.core.errors import BadRequest, NotFound
from gostore.core.slots import PolicySource
from gostore.env import Env
from gostore.services.admin.feed import Feed

FEEDS_MAX: Final = 16
"""Subscriptions of one node; the oldest ends when one more comes."""

ARCS_MAX: Final = 4_096
GROUPS_MAX: Final = 256
"""Groups that one answer describes."""

STOP_DELAY_S: Final = 0.05
"""Between the answer to ``stop`` and the stop, so that the answer leaves."""

Status = dict[str, Any]


class Membership(Protocol):
    """What is needed of cls."""

    @property
    def view(self) -> View: ...
    def suspected(self) -> list[str]: ...
    def unsettled(self) -> list[str]: ...
    def statistics(self) -> dict[str, Any]: ...
    async def set_placement(self, policy: PolicySource | None) -> int: ...


class Part(Protocol):
    """What is needed of db and fs. ``status`` has a list ``unsettled`` of reasons, and figures of its own."""

    def status(self) -> Status: ...
    def statistics(self) -> dict[str, Any]: ...


class Database(Part, Protocol):
    """``counters``: of its statistics those that cost nothing, ``commits`` and ``conflicts`` among them."""

    def counters(self) -> dict[str, int]: ...
    def own_shards(self) -> list[dict[str, Any]]: ...


class Locator(Protocol):
    """What is needed of fs to show a file's replicas."""

    async def locate(self, path: str) -> dict[str, Any]: ...


class Consensus(Protocol):
    """What is needed of the driver of the consensus groups."""

    def described(self) -> list[dict[str, Any]]: ...


class Storage(Protocol):
    def statistics(self) -> dict[str, Any]: ...


@service("admin")
class AdminService:
    """See ``client/admin.py`` for the other end. ``stop`` is called to end the node."""

    def __init__(
        self,
        env: Env,
        endpoint: Endpoint,
        config: NodeConfig,
        *,
        membership: Membership,
        db: Database,
        fs: Part,
        locator: Locator,
        consensus: Consensus,
        storage: dict[str, Storage],
        stop: Callable[[], None],
    ) -> None:
        self._env = env
        self._endpoint = endpoint
        self._config = config
        self._membership = membership
        self._db = db
        self._fs = fs
        self._locator = locator
        self._consensus = consensus
        self._storage = storage
        self._stop = stop
        self._feeds: dict[str, tuple[Feed, asyncio.Task[None]]] = {}

    @property
    def _view(self) -> View:
        return self._membership.view

    @remote
    async def ping(self, call: Call) -> dict[str, Any]:
        return {"name": self._env.name, "incarnation": self._endpoint.incarnation, "epoch": self._view.epoch}

    @remote
    async def status(self, call: Call) -> Status:
        """Cheap (no call to others); the names are those of the cluster snapshot that the views read."""
        view, db, fs = self._view, self._db.status(), self._fs.status()
        me = view.members.get(self._env.name)
        return {
            "name": self._env.name,
            "state": str(me.state) if me else str(NodeState.JOINING),
            "epoch": view.epoch,
            "incarnation": self._endpoint.incarnation,
            "cluster": view.cluster,
            "master": view.master,
            "roles": self._roles(view),
            "suspect": self._membership.suspected(),
            "replicas": self._config.ring.replicas,
            "placement": view.policy.name if view.policy else "HashRing",
            "members": {name: _describe(member) for name, member in view.members.items()},
            "shard_count": self._config.db.shards,
            "shards": db["leads"],
            "shards_held": db["holds"],
            "chunks": fs["chunks"],
            "bytes": fs["bytes"],
            "repair": fs["repair"],
            "unsettled": [*self._unsettled(me), *db["unsettled"], *fs["unsettled"]],
            "counters": self._counters(),
        }

    def _roles(self, view: View) -> list[str]:
        if view.master == self._env.name:
            return ["master"]
        return ["candidate"] if self._env.name in view.masters else []

    def _unsettled(self, me: Member | None) -> list[str]:
        if me is None or not me.online or me.incarnation < self._endpoint.incarnation:
            return ["has not joined yet"]
        return self._membership.unsettled()

    def _counters(self) -> dict[str, Any]:
        cls, db, comm = self._membership.statistics(), self._db.counters(), self._endpoint.statistics()

        def total(prefix: str) -> int:
            return sum(count for what, count in comm.items() if what.startswith(prefix))

        figures = {
            # Without this service: a view that asks once a second is no load of the cluster.
            "calls": total("requests_") - comm.get("requests_admin", 0),
            "sent": comm.get("sent_frames", 0),
            "received": comm.get("received_frames", 0),
            "dropped": total("dropped_"),
            "bytes_sent": total("sent_bytes_"),
            "bytes_received": total("received_bytes_"),
            "gossip": cls.get("messages", 0),
            "commits": db["commits"],
            "conflicts": db["conflicts"],
        }
        for part, storage in self._storage.items():
            if part == "wal":
                figures["wal_syncs"] = storage.statistics().get("syncs", 0)
        return figures

    @remote
    async def statistics(self, call: Call) -> dict[str, Any]:
        """Cumulative figures by part."""
        return {
            "comm": self._endpoint.statistics(),
            "cls": self._membership.statistics(),
            "db": self._db.statistics(),
            "fs": self._fs.statistics(),
            **{part: storage.statistics() for part, storage in self._storage.items()},
            "tasks": {"running": len(self._env.tasks), "failed": self._env.tasks.failed},
        }

    @remote
    async def groups(self, call: Call) -> dict[str, Any]:
        """What this node knows of the groups it is in: ``replication`` (the shards' policy) and ``groups``.

        Each has ``name``, ``kind`` (``raft``, or the policy), ``role``, ``term``, ``leader``, ``quiet``, ``last``,
        ``committed``, ``applied``, ``snapshot`` (index of the latest), ``installed`` (how many came from a leader),
        ``size_bytes`` (of one, about), ``voters``, ``learners``, ``outgoing``, and at the leader ``followers``: name ->
        ``state`` (probe, replicate, snapshot), ``match``, and ``sent_bytes`` of a snapshot on its way. A policy that is
        no consensus group gives what the status of its shards has.
        """
        policy = self._config.policies.get("replication")
        replication = PolicySource.from_wire(policy).name if policy else self._config.db.replication
        groups = [{"kind": "raft", **group} for group in self._consensus.described()]
        known = {group["name"] for group in groups}
        for shard in self._db.own_shards():
            name = f"shard {shard['shard']}"
            if name not in known and shard["role"] != "idle" and len(groups) < GROUPS_MAX:
                groups.append({"kind": replication, "name": name, **_as_group(shard)})
        return {"replication": replication, "groups": groups}

    @remote
    async def arcs(self, call: Call, limit: int = ARCS_MAX) -> list[Any]:
        """The ring: [start, end, owners] with tokens as 16 hexadecimal digits; equal neighbours merged."""
        return merged_arcs(arcs_of(self._view.ring()), min(limit, ARCS_MAX))

    @remote
    async def locate(self, call: Call, key: str) -> dict[str, Any]:
        """Where a key lies on the ring, and its preference list."""
        raw = key.encode()
        return {"key": key, "token": f"{token_of(raw):016x}", "owners": list(self._view.resolve(raw).owners)}

    @remote
    async def locate_file(self, call: Call, path: str) -> dict[str, Any]:
        """Where a file's entry and its chunks lie, and who holds them now."""
        return await self._locator.locate(path)

    @remote
    async def subscribe(
        self, call: Call, subscription: str, categories: list[Any], message_rate: float
    ) -> dict[str, Any]:
        """Send events to the caller's service ``journal`` from now on; a known ``subscription`` is replaced.

        ``message_rate``: message events a second; 0 none, below 0 all. Raises ``BadRequest`` for unknown categories.
        """
        self._end_feed(subscription)
        while len(self._feeds) >= FEEDS_MAX:
            self._end_feed(next(iter(self._feeds)))
        try:
            feed = Feed(self._env, self._endpoint, subscription, call.source_address, categories, message_rate)
        except ValueError as error:
            raise BadRequest(f"categories: {error}") from None
        self._feeds[subscription] = (feed, self._env.tasks.start(feed.run(), name=f"feed {subscription}"))
        return {"incarnation": self._endpoint.incarnation, "seq": self._env.events.seq}

    @remote
    async def unsubscribe(self, call: Call, subscription: str) -> None:
        self._end_feed(subscription)

    def _end_feed(self, subscription: str) -> None:
        if subscription in self._feeds:
            feed, task = self._feeds.pop(subscription)
            feed.close()
            task.cancel()

    @remote
    async def set_link(
        self, call: Call, peer: str, direction: str, drop: float, delay_s: float, jitter_s: float, duplicate: float,
        reorder: float,
    ) -> None:  # fmt: skip
        """Faults between this node and a peer, in the transport. Raises ``BadRequest``."""
        self._endpoint.links.set(
            peer, direction, drop=drop, delay_s=delay_s, jitter_s=jitter_s, duplicate=duplicate, reorder=reorder
        )
        arguments = {"node": self._env.name, "peer": peer, "direction": direction, "drop": drop, "delay_s": delay_s}
        self._env.events.publish("fault", fault="link", arguments=arguments)

    @remote
    async def clear_links(self, call: Call, peer: str | None = None) -> None:
        self._endpoint.links.clear(peer)
        self._env.events.publish("fault", fault="heal", arguments={"node": self._env.name, "peer": peer})

    @remote
    async def links(self, call: Call) -> list[Any]:
        """The link faults in force, one entry a direction."""
        links = self._endpoint.links
        return [*_link_faults("out", links.outgoing), *_link_faults("in", links.incoming)]

    @remote
    async def install(self, call: Call, slot: str, policy: dict[str, Any] | None) -> dict[str, int]:
        """Put a policy into a slot on every node; None brings the default back. Raises ``PolicyError``."""
        if slot != "placement":
            raise NotFound(f"slot {slot!r} cannot be changed while the cluster runs; `placement` can")
        try:
            source = PolicySource.from_wire(policy) if policy is not None else None
        except ValueError as error:
            raise BadRequest(str(error)) from None
        return {"epoch": await self._membership.set_placement(source)}

    @remote
    async def stop(self, call: Call) -> None:
        """End this node, in order."""
        asyncio.get_running_loop().call_later(STOP_DELAY_S, self._stop)


_ROLES: Final = {"primary": "leader", "recovering": "candidate"}


def _as_group(shard: dict[str, Any]) -> dict[str, Any]:
    """The status of a shard in the words of a consensus group."""
    return {
        "role": _ROLES.get(shard["role"], "follower"),
        "term": shard["generation"],
        "leader": shard["primary"],
        "quiet": False,
        "last": shard["last_index"],
        "committed": shard["committed"],
        "applied": shard.get("applied", shard["committed"]),
        "snapshot": 0,
        "installed": 0,
        "size_bytes": shard.get("size_bytes", 0),
        "voters": shard["replicas"],
        "learners": [],
        "outgoing": [],
        "followers": {},
    }


def _describe(member: Member) -> dict[str, Any]:
    return {
        "state": str(member.state), "address": member.address.to_wire(), "rest_port": member.rest_port,
        "incarnation": member.incarnation,
    }  # fmt: skip


def _link_faults(direction: str, faults: dict[str, Fault]) -> Iterable[dict[str, Any]]:
    for peer, fault in sorted(faults.items()):
        yield {
            "peer": peer, "direction": direction, "drop": fault.drop, "delay_s": fault.delay_s,
            "jitter_s": fault.jitter_s, "duplicate": fault.duplicate, "reorder": fault.reorder,
        }  # fmt: skip


def merged_arcs(arcs: list[Arc], limit: int) -> list[Any]:
    """Arcs with equal owners joined; when there are still more than ``limit``, those with an equal first owner."""
    merged = _merge(arcs, lambda arc: arc.owners)
    if len(merged) > limit:
        merged = _merge(arcs, lambda arc: arc.owners[:1])[:limit]
    return [[f"{start:016x}", f"{end % (1 << 64):016x}", list(owners)] for start, end, owners in merged]


def _merge(arcs: list[Arc], key: Callable[[Arc], tuple[str, ...]]) -> list[tuple[int, int, tuple[str, ...]]]:
    runs = [list(run) for _, run in groupby(arcs, key)]
    return [(run[0].start, run[-1].end, run[0].owners) for run in runs]

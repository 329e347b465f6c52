"""The service as it is, in the simulated world."""

from __future__ import annotations

from gostore.cluster import RingCache, View
from gostore.comm import Endpoint
from gostore.config import NodeConfig
from gostore.consensus import PROFILES
from gostore.consensus.groups import Groups
from gostore.core.address import Address
from gostore.services.cls import ClsService, next_incarnation
from gostore.sim.world import SimNode, World
from gostore.storage import Wal

NAMES = ("n1", "n2", "n3", "n4", "n5")


class Resolver:
    cls: ClsService | None = None

    def address(self, name: str) -> Address | None:
        return self.cls.address(name) if self.cls is not None else None


class Cluster:
    """Nodes of cls in a world, and what must hold whatever happens. ``profile``: of failure detection."""

    def __init__(self, world: World, names: tuple[str, ...] = NAMES, *, profile: str = "fast") -> None:
        self.world = world
        self.names = names
        self.profile = profile
        self.cache = RingCache()
        self.services: dict[str, ClsService] = {}
        self.histories: dict[tuple[int, int], View] = {}
        self.problems: list[str] = []
        for name in names:
            world.add_node(name, main=self.main)

    async def main(self, node: SimNode) -> None:
        contacts = () if node.name == self.names[0] else (f"{self.world.node(self.names[0]).address}:4000",)
        config = NodeConfig.from_dict(
            {
                "name": node.name,
                "secret": "a secret of the tests",
                "data_dir": "unused",
                "join": contacts,
                "cls": {"expect": len(self.names), "expect_timeout_s": 3.0, "profile": self.profile},
            }
        )
        env = node.env
        wal = await Wal.open(env, config.storage)
        resolver = Resolver()
        endpoint = Endpoint(
            env,
            cluster="test",
            secret=config.secret,
            host=node.address,
            tcp_port=4000,
            udp_port=4001,
            incarnation=await next_incarnation(env),
            resolver=resolver,
            config=config.comm,
        )
        groups = Groups(env, endpoint, wal, PROFILES[config.cls.profile])
        cls = resolver.cls = ClsService(env, endpoint, wal, groups, config, cache=self.cache)
        endpoint.register(groups)
        endpoint.register(cls)
        await endpoint.start()
        await groups.start()
        cls.watchers.watch(lambda old, new, changes: self.judge(node.name, old, new))
        self.services[node.name] = cls
        await cls.start()

    def judge(self, name: str, old: View, new: View) -> None:
        """After every change of any view."""
        if new.version <= old.version and new.digest:
            self.problems.append(f"{name} went back from {old.version} to {new.version}")
        if new.digest and self.histories.setdefault(new.version, new) != new:
            self.problems.append(f"{name}: two views of version {new.version}")

    @property
    def forks(self) -> int:
        """Epochs that were numbered twice."""
        return len(self.histories) - len({epoch for epoch, _ in self.histories})

    def settled(self) -> bool:
        """All running, all online, all with the same view, nobody suspected."""
        views = [cls.view for cls in self.services.values()]
        return (
            len(views) == len(self.names)
            and all(view.version == views[0].version and view.online == self.names for view in views)
            and all(cls.is_member and not cls.suspected() for cls in self.services.values())
        )


def settled_cluster(world: World) -> Cluster:
    cluster = Cluster(world)
    world.run_until(cluster.settled, timeout_s=20.0, what="the first view")
    world.run_for(5.0)  # the masters' group has gone quiet: nobody expects a word of the leader
    return cluster

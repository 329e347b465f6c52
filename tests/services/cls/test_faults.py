"""The service as it is, in the simulated world, under faults drawn from a seed. A failure names its seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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
FAULTS_S = 40.0
QUIET_S_MAX = 60.0


class Resolver:
    cls: ClsService | None = None

    def address(self, name: str) -> Address | None:
        return self.cls.address(name) if self.cls is not None else None


class Cluster:
    """Five nodes of cls in a world, and what must hold whatever happens."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cache = RingCache()
        self.services: dict[str, ClsService] = {}
        self.histories: dict[tuple[int, int], View] = {}
        self.problems: list[str] = []
        for name in NAMES:
            world.add_node(name, main=self.main)

    async def main(self, node: SimNode) -> None:
        contacts = () if node.name == NAMES[0] else (f"{self.world.node(NAMES[0]).address}:4000",)
        config = NodeConfig.from_dict(
            {
                "name": node.name,
                "secret": "a secret of the tests",
                "data_dir": "unused",
                "join": contacts,
                "cls": {"expect": len(NAMES), "expect_timeout_s": 3.0},
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
            len(views) == len(NAMES)
            and all(view.version == views[0].version and view.online == NAMES for view in views)
            and all(cls.is_member and not cls.suspected() for cls in self.services.values())
        )


def nemesis(world: World, names: tuple[str, ...]) -> None:
    """Draw faults for ``FAULTS_S`` seconds from now; at the end everything is healed."""
    rng = world.rng("nemesis")
    kinds = rng.sample(("crash", "power", "pause", "partition", "oneway", "loss"), rng.randrange(1, 5))

    def at(delay_s: float, function: Callable[..., Any], *arguments: Any) -> None:
        world.at(world.now + delay_s, lambda: function(*arguments))

    time_s = 0.0
    while (time_s := time_s + rng.uniform(0.3, 6.0)) < FAULTS_S - 8.0:
        kind, name, length_s = rng.choice(kinds), rng.choice(names), rng.uniform(0.1, 7.0)
        some = rng.sample(names, rng.randrange(1, len(names)))
        others = [other for other in names if other not in some]
        match kind:
            case "crash" | "power":
                at(time_s, world.crash if kind == "crash" else world.power_cut, name)
                at(time_s + length_s, world.restart, name)
            case "pause":
                at(time_s, world.pause, name)
                at(time_s + length_s, world.resume, name)
            case "partition":
                at(time_s, world.net.partition, some, others)
                at(time_s + length_s, world.net.heal)
            case "oneway":
                at(time_s, world.net.cut, some, others)
                at(time_s + length_s, world.net.heal)
            case "loss":
                for one in some:
                    for other in others:
                        at(time_s, lambda a=one, b=other: world.net.links.set(a, b, loss=0.3, duplicate=0.1))
                at(time_s + length_s, world.net.heal)
    at(FAULTS_S, world.net.heal)


def storm(seed: int) -> Cluster:
    """Faults, and no judgement."""
    with World(seed) as world:
        cluster = Cluster(world)
        world.run_until(cluster.settled, timeout_s=20.0, what="the first view")
        nemesis(world, NAMES)
        world.run_for(FAULTS_S + 1.0)
        return cluster


def run(seed: int) -> Cluster:
    with World(seed) as world:
        cluster = Cluster(world)
        world.run_until(cluster.settled, timeout_s=20.0, what="the first view")
        nemesis(world, NAMES)
        world.run_for(FAULTS_S + 1.0)
        assert not cluster.problems, f"seed {seed}: {cluster.problems[:3]}"
        world.run_until(cluster.settled, timeout_s=QUIET_S_MAX, what="all to meet again")
        assert not cluster.problems, f"seed {seed}: {cluster.problems[:3]}"
        return cluster


def settled_cluster(world: World) -> Cluster:
    cluster = Cluster(world)
    world.run_until(cluster.settled, timeout_s=20.0, what="the first view")
    world.run_for(5.0)  # the masters' group has gone quiet: nobody expects a word of the leader
    return cluster


@pytest.mark.parametrize("way", ["both", "deaf", "mute"])
@pytest.mark.parametrize("seed", range(3))
def test_a_master_that_is_cut_off_is_replaced_and_expels_nobody(seed: int, way: str) -> None:
    with World(seed) as world:
        cluster = settled_cluster(world)
        old, others = cluster.services["n1"], [name for name in NAMES if name != "n1"]
        before = old.view
        assert old.is_master
        if way != "deaf":
            world.net.cut(["n1"], others)
        if way != "mute":
            world.net.cut(others, ["n1"])

        def replaced() -> bool:
            views = [cluster.services[name].view for name in others]
            return all(view.online == tuple(others) and view.master != "n1" for view in views)

        world.run_until(replaced, timeout_s=10.0, what="another master")
        world.run_until(lambda: not old.is_master, timeout_s=5.0, what="the old one to notice")
        assert not any(view.epoch > before.epoch and view.master == "n1" for view in cluster.histories.values()), (
            "it decided something alone"
        )
        world.net.heal()
        world.run_until(cluster.settled, timeout_s=10.0, what="all to meet again")
        assert cluster.forks == 0
        assert not cluster.problems


@pytest.mark.parametrize("seed", range(3))
def test_a_master_that_sleeps_while_another_is_elected_wakes_as_none(seed: int) -> None:
    with World(seed) as world:
        cluster = settled_cluster(world)
        old = cluster.services["n1"]
        world.pause("n1")
        others = [cluster.services[name] for name in NAMES if name != "n1"]
        world.run_until(
            lambda: all("n1" not in cls.view.online for cls in others), timeout_s=10.0, what="n1 to be expelled"
        )
        world.resume("n1")
        world.run_until(cluster.settled, timeout_s=10.0, what="all to meet again")
        assert not old.is_master
        assert cluster.forks == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_of_all_and_the_group_comes_back_by_itself(seed: int) -> None:
    with World(seed) as world:
        cluster = settled_cluster(world)
        before = max(cls.view.epoch for cls in cluster.services.values())
        for name in NAMES:
            world.power_cut(name)
        cluster.services.clear()
        for name in NAMES:
            world.restart(name)
        world.run_until(cluster.settled, timeout_s=10.0, what="all to be back")
        assert all(cls.view.epoch > before for cls in cluster.services.values())
        assert cluster.forks == 0


@pytest.mark.parametrize("seed", range(3))
def test_an_idle_cluster_says_nothing_about_its_masters(seed: int) -> None:
    with World(seed) as world:
        cluster = settled_cluster(world)
        before = [cls.group.statistics() for cls in cluster.services.values()]
        sent = [cls._groups.statistics()["casts"] for cls in cluster.services.values()]
        world.run_for(60.0)
        assert [cls.group.statistics() for cls in cluster.services.values()] == before
        assert [cls._groups.statistics()["casts"] for cls in cluster.services.values()] == sent


SEEDS = (1, 2, 3, 8, 22, 26, 37, 84)
"""Under the rule of before (the first of the ring that sees a majority of those online decides, without a vote on what)
the seeds 8, 22, 26 and 37 had epochs that were numbered twice, by two masters."""


@pytest.mark.parametrize("seed", SEEDS)
def test_after_any_faults_all_meet_again_in_one_view(seed: int) -> None:
    assert run(seed).forks == 0


def test_without_majorities_every_partition_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classical mistake: whoever says that he leads does."""
    monkeypatch.setattr(
        "gostore.consensus.configuration._majority", lambda voters, numbers: max(numbers.values(), default=0)
    )
    forks = [storm(seed).forks for seed in range(32)]
    assert sum(forks) > len(forks)
    assert sum(map(bool, forks)) > len(forks) // 2

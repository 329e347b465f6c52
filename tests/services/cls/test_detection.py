"""How soon who is gone is expelled, and that nobody else is: nodes of cls over links that lose messages.

All times are virtual. The figures are the project's own targets for failure detection.
"""

from __future__ import annotations

from gostore.sim.world import World

from .worlds import Cluster

LOSS = 0.05
CRASHES = 300
AGREED_S_MAX = 2.5
QUIET_MINUTES = 20


def lossy_cluster(world: World, names: tuple[str, ...], profile: str) -> Cluster:
    cluster = Cluster(world, names, profile=profile)
    for source in names:
        for target in names:
            if source != target:
                world.net.links.set(source, target, loss=LOSS)
    return cluster


def names(count: int) -> tuple[str, ...]:
    return tuple(f"n{number}" for number in range(1, count + 1))


def test_all_survivors_agree_soon_that_one_is_gone() -> None:
    """Every node crashes again and again, the master among them, and while others are back for a moment only."""
    with World(1) as world:
        cluster = lossy_cluster(world, names(5), "fast")
        rng, masters, took_s = world.rng("victims"), 0, []
        for _ in range(CRASHES):
            world.run_until(cluster.settled, timeout_s=60.0, what="all to be online")
            world.run_for(rng.uniform(0.0, 1.0))
            victim = rng.choice(cluster.names)
            survivors = tuple(name for name in cluster.names if name != victim)
            masters += cluster.services[victim].is_master
            world.crash(victim)
            crashed_s = world.now

            def agreed(survivors: tuple[str, ...] = survivors) -> bool:
                return all(cluster.services[name].view.online == survivors for name in survivors)

            world.run_until(agreed, timeout_s=60.0, what=f"all to see that {victim} is gone")
            took_s.append(world.now - crashed_s)
            world.restart(victim)
        assert masters > CRASHES // 20
        assert cluster.problems == []
        assert sorted(took_s)[int(0.99 * (CRASHES - 1))] <= AGREED_S_MAX


def test_nobody_is_expelled_wrongly() -> None:
    with World(1) as world:
        cluster = lossy_cluster(world, names(8), "lan")
        world.run_until(cluster.settled, timeout_s=60.0, what="all to be online")
        before = max(cluster.histories)
        world.run_for(60.0 * QUIET_MINUTES)
        assert cluster.settled()
        since = [view for version, view in cluster.histories.items() if version > before]
        assert all(view.online == cluster.names for view in since), "a new leader is no matter, an expulsion is"
        assert {member.incarnation for view in since for member in view.members.values()} <= {1}, "nobody came back"

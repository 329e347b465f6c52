"""``gostore bench sim``: how fast the simulated world is, in processor seconds of one core.

There is no peer that runs the same node, so what stands beside the figures are the targets that the project has set
itself; a ratio above 1 means that the target is met.

* *virtual seconds a core second*: one fixed workload, the seeds of :data:`SEEDS`, five nodes under mixed load, swarm
  faults, all checks on; building and closing the worlds included.
* *network events a core second*: a bare model of SWIM, forty members that probe each other: the engine without a node.
* *members*: that many nodes of membership alone (comm, log, SWIM, gossip; views shared), which idle for a virtual
  minute once all of them are online.
* *fresh world*: a simulated cluster of five, made and closed, nothing started.
* *memory*: what a process has grown by, after so many seeds, once the first few have filled its caches.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from gostore.cluster import RingCache
from gostore.comm import Endpoint
from gostore.config import NodeConfig
from gostore.consensus import PROFILES
from gostore.consensus.groups import Groups
from gostore.core.address import Address
from gostore.core.errors import Timeout
from gostore.experiments.simulation import run_seed
from gostore.services.cls import ClsService, next_incarnation
from gostore.sim import simulate
from gostore.sim.world import SimNode, World
from gostore.storage import Wal

Case = dict[str, Any]

SEEDS: Final = (1, 2, 3, 4, 5, 6)
SECONDS: Final = 30.0
MEMBERS: Final = 1_000
IDLE_S: Final = 60.0
START_S_MAX: Final = 120.0
"""Virtual seconds within which all members must be online."""

WARM_UP_SEEDS: Final = 20
MEMORY_SECONDS: Final = 1.0
"""Length of one of the many runs whose memory is watched."""

PROBERS: Final = 40
PROBE_PERIOD_S: Final = 0.1
PROBE_RUN_S: Final = 60.0

VIRTUAL_A_CORE_S_MIN: Final = 10.0
EVENTS_A_CORE_S_MIN: Final = 48_000.0
MEMBERS_S_MAX: Final = 180.0
WORLD_MS_MAX: Final = 20.0
GROWTH_MB_MAX: Final = 16.0
"""A megabyte for every sixty seeds would be no growth that anybody meets; a leak of one world is five megabytes."""

PORT: Final = 7_000


def bench_sim(
    *, rounds: int, members: int = MEMBERS, memory_seeds: int = 1_000, progress: Callable[[str], None]
) -> list[Case]:
    """The cases of the benchmark; the first ones are medians of ``rounds``."""
    rates, events, worlds = [], [], []
    for number in range(rounds):
        rate, rate_events = run_rate()
        rates.append(rate)
        events.append(swim_rate())
        worlds.append(world_ms())
        progress(
            f"round {number + 1} of {rounds}: {rate:.1f} virtual s and {rate_events:,.0f} callbacks a core second; "
            f"bare SWIM {events[-1]:,.0f} network events a core second; a world {worlds[-1]:.1f} ms"
        )
    cases = [
        _case("virtual seconds, 5 nodes, swarm faults, all checks", "s/core s", statistics.median(rates),
              VIRTUAL_A_CORE_S_MIN),
        _case("network events, bare SWIM", "1/core s", statistics.median(events), EVENTS_A_CORE_S_MIN),
        _case("fresh world, 5 nodes", "ms", statistics.median(worlds), WORLD_MS_MAX, less_is_better=True),
    ]  # fmt: skip
    # Before the members: what a thousand of them leave to the allocator would hide a growth.
    growth_mb = memory_growth_mb(memory_seeds, progress)
    cases.append(_case(f"growth over {memory_seeds:,} seeds", "MB", growth_mb, GROWTH_MB_MAX, less_is_better=True))
    ready_s, idle_s = members_idle(members, "lan")
    progress(f"{members:,} members: ready after {ready_s:.1f} core s, {IDLE_S:g} virtual s in {idle_s:.1f} core s")
    name = f"{members:,} idle members, {IDLE_S:g} virtual s"
    cases.append(_case(name, "core s", idle_s, MEMBERS_S_MAX, less_is_better=True))
    cases.append(_case(f"{members:,} members ready", "core s", ready_s))
    return cases


def _case(name: str, unit: str, ours: float, target: float | None = None, *, less_is_better: bool = False) -> Case:
    ratio = None
    if target is not None:
        ratio = round(target / max(ours, 1e-9) if less_is_better else ours / target, 2)
    peer = None if target is None else "target"
    return {"name": name, "unit": unit, "ours": round(ours, 2), "peer": target, "peer_name": peer, "ratio": ratio}


@contextmanager
def _core_seconds() -> Iterator[Callable[[], float]]:
    """Processor time of this process: what else the machine does is no part of it."""
    gc.collect()
    begun = time.process_time()
    yield lambda: time.process_time() - begun


def run_rate() -> tuple[float, float]:
    """(virtual seconds, callbacks) a core second of the fixed workload. A run that stopped early would look fast."""
    virtual_s, events = 0.0, 0
    with _core_seconds() as spent:
        for seed in SEEDS:
            run = run_seed(seed, seconds=SECONDS, profile="swarm")
            if run.virtual_s < SECONDS:
                raise Timeout(f"seed {seed} ended after {run.virtual_s:g} virtual s: {run.violations[:1]}")
            virtual_s += run.virtual_s
            events += run.events
        return virtual_s / spent(), events / spent()


def world_ms() -> float:
    """Milliseconds to make a cluster of five and to close it again; the median of many."""
    times = []
    for seed in range(50):
        with _core_seconds() as spent:
            simulate(5, seed=seed).sim.close()
            times.append(spent() * 1000)
    return statistics.median(times)


class _Prober(asyncio.DatagramProtocol):
    """Probes a random member every period, and answers probes."""

    def __init__(self, node: SimNode, members: list[tuple[str, int]]) -> None:
        self._node = node
        self._members = members
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._transport: asyncio.DatagramTransport

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if data[:1] == b"P":
            self._transport.sendto(b"A" + data[1:], addr)
        elif (future := self._waiting.pop(data[1:5], None)) is not None and not future.done():
            future.set_result(None)

    async def probe(self) -> None:
        loop, number = asyncio.get_running_loop(), 0
        while True:
            number += 1
            key = number.to_bytes(4, "big")
            self._waiting[key] = future = loop.create_future()
            self._transport.sendto(b"P" + key + b"gossip" * 10, self._node.env.rng.choice(self._members))
            try:
                async with asyncio.timeout(PROBE_PERIOD_S / 2):
                    await future
            except TimeoutError:
                self._waiting.pop(key, None)
            await asyncio.sleep(PROBE_PERIOD_S)


def swim_rate() -> float:
    """Datagrams delivered a core second in a world without any of our node."""
    members: list[tuple[str, int]] = []

    async def main(node: SimNode) -> None:
        loop = asyncio.get_running_loop()
        _, prober = await loop.create_datagram_endpoint(lambda: _Prober(node, members), (node.address, PORT))
        await prober.probe()

    with World(1) as world:
        members.extend((world.add_node(f"n{number}", main).address, PORT) for number in range(PROBERS))
        with _core_seconds() as spent:
            world.run_for(PROBE_RUN_S)
            return world.trace.messages / spent()


class _Membership:
    """A node of comm, log and cls, and of nothing else; comm's resolver, too."""

    def __init__(self, count: int, profile: str, cache: RingCache) -> None:
        self._count = count
        self._profile = profile
        self._cache = cache
        self.cls: ClsService | None = None

    def address(self, name: str) -> Address | None:
        return self.cls.address(name) if self.cls is not None else None

    def knows_all(self) -> bool:
        return self.cls is not None and len(self.cls.view.online) == self._count

    async def main(self, node: SimNode, join: tuple[str, ...]) -> None:
        config = NodeConfig.from_dict(
            {
                "name": node.name, "secret": "secret of a benchmark", "data_dir": "disk", "host": node.address,
                "tcp_port": PORT, "udp_port": PORT, "join": join,
                "cls": {"expect": self._count, "profile": self._profile},
            }
        )  # fmt: skip
        wal = await Wal.open(node.env, config.storage)
        endpoint = Endpoint(
            node.env, cluster=config.cluster, secret=config.secret, host=node.address, tcp_port=PORT, udp_port=PORT,
            incarnation=await next_incarnation(node.env), resolver=self, config=config.comm,
        )  # fmt: skip
        groups = Groups(node.env, endpoint, wal, PROFILES[self._profile])
        self.cls = ClsService(node.env, endpoint, wal, groups, config, None, cache=self._cache)
        endpoint.register(groups)
        endpoint.register(self.cls)
        await endpoint.start()
        await groups.start()
        await self.cls.start()
        await asyncio.Event().wait()


def members_idle(count: int, profile: str) -> tuple[float, float]:
    """(core seconds until ``count`` members are online everywhere, core seconds of a virtual minute after that).

    ``profile``: of failure detection; ``lan`` probes once a second. Raises :class:`Timeout` when they do not get
    online, or one of them does not stay so.
    """
    cache = RingCache()  # views and rings are values, and shared by all nodes of a process
    members: dict[str, _Membership] = {}
    with World(1) as world:

        def add(number: int) -> None:
            member = members[f"n{number}"] = _Membership(count, profile, cache)
            join = (f"{world.node('n1').address}:{PORT}",) if number > 1 else ()
            world.add_node(f"n{number}", lambda node: member.main(node, join))

        with _core_seconds() as spent:
            for number in range(1, count + 1):
                add(number)
            while not all(member.knows_all() for member in members.values()):
                if world.now >= START_S_MAX:
                    late = sum(not member.knows_all() for member in members.values())
                    raise Timeout(f"{late} of {count} members do not see all others after {world.now:g} virtual s")
                world.run_for(1.0)
            ready_s = spent()
        with _core_seconds() as spent:
            world.run_for(IDLE_S)
            idle_s = spent()
        if lost := [name for name, member in members.items() if not member.knows_all()]:
            raise Timeout(f"{len(lost)} idle members lost sight of others: {', '.join(lost[:5])}")
    return ready_s, idle_s


def memory_growth_mb(seeds: int, progress: Callable[[str], None]) -> float:
    """How much more memory this process has after ``seeds`` short runs than after the first few."""
    before = 0.0
    for seed in range(WARM_UP_SEEDS + seeds):
        if seed == WARM_UP_SEEDS:
            before = _rss_mb()
        run_seed(seed, seconds=MEMORY_SECONDS, profile="swarm")
        if seed > WARM_UP_SEEDS and seed % 100 == 0:
            progress(f"{seed:,} seeds in one process: {_rss_mb() - before:+.1f} MB")
    return _rss_mb() - before


def _rss_mb() -> float:
    """Resident memory now; where the system does not tell, the most there ever was."""
    gc.collect()
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

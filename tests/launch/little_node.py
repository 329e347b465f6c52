"""A node with membership and nothing else, for tests that are about the launcher: everybody asks the first one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from typing import Any

from gostore.comm import Call, Endpoint, remote, service
from gostore.config import NodeConfig
from gostore.core.address import Address
from gostore.core.errors import ConfigError, GoStoreError, NotFound
from gostore.core.slots import PolicySource
from gostore.env import Env, RealClock, real_rng


class Everybody:
    def address(self, name: str) -> Address | None:
        return None


@service("admin")
class LittleAdmin:
    def __init__(self, env: Env, endpoint: Endpoint, config: NodeConfig) -> None:
        self.env, self.endpoint, self.config = env, endpoint, config
        self.members: dict[str, Any] = {}
        self.epoch = 1
        self.seeds = [Address(host, int(port), 0) for host, _, port in (at.rpartition(":") for at in config.join)]

    @remote
    async def hello(self, call: Call, name: str, address: list) -> None:
        self.epoch += name not in self.members
        self.members[name] = {"state": "online", "address": address, "rest_port": 0, "incarnation": 1}
        self.env.events.publish("member", member=name, state="online", epoch=self.epoch, path=[])

    @remote
    async def table(self, call: Call) -> list:
        return [self.epoch, self.members]

    async def say_hello(self) -> None:
        for seed in [self.endpoint.address, *self.seeds]:
            await self.endpoint.call(seed, "admin", "hello", self.config.name, self.endpoint.address.to_wire())

    @remote
    async def status(self, call: Call) -> dict[str, Any]:
        first = self.seeds[0] if self.seeds else self.endpoint.address
        epoch, members = (await self.endpoint.call(first, "admin", "table", timeout_s=0.2)).value
        return {
            "name": self.config.name, "state": "online" if self.config.name in members else "joining", "epoch": epoch,
            "incarnation": 1, "suspect": [], "roles": [], "shards": [], "shards_held": [], "chunks": 0, "bytes": 0,
            "counters": {}, "master": "n1", "replicas": 3, "shard_count": 1, "placement": "HashRing",
            "members": members, "repair": {"active": False, "missing": 0, "copied": 0}, "unsettled": [],
        }  # fmt: skip

    @remote
    async def statistics(self, call: Call) -> dict[str, Any]:
        return {"comm": self.endpoint.statistics(), "process": {"pid": os.getpid()}}

    @remote
    async def arcs(self, call: Call, limit: int = 10) -> list:
        return [["0" * 16, "8" + "0" * 15, ["n1"]], ["8" + "0" * 15, "0" * 16, ["n2"]]]

    @remote
    async def set_link(
        self, call: Call, peer: str, direction: str, drop: float, delay_s: float, jitter_s: float, duplicate: float,
        reorder: float,
    ) -> None:  # fmt: skip
        self.endpoint.links.set(
            peer, direction, drop=drop, delay_s=delay_s, jitter_s=jitter_s, duplicate=duplicate, reorder=reorder
        )

    @remote
    async def links(self, call: Call) -> list:
        links = self.endpoint.links
        return [["out", peer, fault.drop] for peer, fault in sorted(links.outgoing.items())] + [
            ["in", peer, fault.drop] for peer, fault in sorted(links.incoming.items())
        ]

    @remote
    async def subscribe(self, call: Call, subscription: str, categories: list, message_rate: float) -> dict[str, Any]:
        return {"incarnation": 1, "seq": 0}

    @remote
    async def exit(self, call: Call, status: int) -> None:
        os._exit(status)

    @remote
    async def policy(self, call: Call) -> Any:
        return self.config.policies

    @remote
    async def missing(self, call: Call) -> None:
        raise NotFound("nothing is here")


def main(config: NodeConfig, sockets: dict[str, socket.socket], ready_fd: int) -> int:
    print(f"{config.name} begins", flush=True)
    try:
        if config.db.shards == 13:
            raise ConfigError("db.shards = 13: this one is unlucky")
        if config.db.shards == 14 and config.name == "n2":
            os._exit(9)
        if config.db.shards == 15 and config.name == "n2":
            signal.pause()
        for policy in config.policies.values():
            compile(PolicySource.from_wire(policy).source, "policy", "exec")
        return asyncio.run(serve(config, sockets, ready_fd))
    except GoStoreError as error:
        os.write(ready_fd, json.dumps({"error": error.to_wire()}).encode() + b"\n")
        return 1


async def serve(config: NodeConfig, sockets: dict[str, socket.socket], ready_fd: int) -> int:
    import logging

    env = Env(config.name, RealClock(), real_rng(), None, logging.getLogger("little"), sockets=sockets)  # type: ignore[arg-type]
    incarnation = int(RealClock().wall_s() * 1000)
    endpoint = Endpoint(
        env, cluster=config.cluster, secret=config.secret, host=config.host, tcp_port=config.tcp_port,
        udp_port=config.udp_port, incarnation=incarnation, resolver=Everybody(), config=config.comm,
    )  # fmt: skip
    admin = LittleAdmin(env, endpoint, config)
    endpoint.register(admin)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await endpoint.start()
    os.write(ready_fd, b'{"ready": {"incarnation": 1}}\n')
    hello = asyncio.ensure_future(admin.say_hello())
    await stop.wait()
    hello.cancel()
    await endpoint.stop()
    print(f"{config.name} ends", flush=True)
    return 0

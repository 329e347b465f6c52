"""``gostore recover``: where the nodes are, who is surely not lost, and what the operator is told."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gostore import fence, recover
from gostore.client.connection import Connection, client_env
from gostore.client.record import read_record, write_record
from gostore.client.remote import CLUSTER_VARIABLE, SECRET_VARIABLE, host_for
from gostore.config import StorageConfig
from gostore.core.errors import BadRequest, ConfigError, GoStoreError
from gostore.env import Env, real_env

ALIVE_TIMEOUT_S: Final = 2.0
"""A node that is said to be lost and answers within this time is not."""


def run(
    at: Path,
    nodes: Mapping[str, Path],
    lost: Sequence[str],
    *,
    unsafe: bool,
    accept_empty_shards: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The figures. ``nodes``: name -> data directory of the survivors; without any they are those of the cluster in the
    directory ``at``.

    Raises ``BadRequest`` unless it is ``unsafe``, after it has said what would be done, and as :mod:`.recover`.
    """
    record = None if nodes else read_record(at)
    if record is not None:
        cluster, secret = str(record["cluster"]), str(record["secret"])
        nodes = {name: at / name for name in record["nodes"] if name not in lost}
        storage = StorageConfig.from_dict(record["settings"].get("storage", {}))
    elif nodes:
        cluster, secret = os.environ.get(CLUSTER_VARIABLE, "gostore"), os.environ.get(SECRET_VARIABLE, "")
        storage = StorageConfig()
        if not secret:
            raise ConfigError(f"put the secret with which the cluster ran into the variable {SECRET_VARIABLE}")
    else:
        raise ConfigError(f"{at}: no cluster is kept there; name the survivors: --node NAME=DATA_DIR")
    if not nodes:
        raise BadRequest("nobody is left")
    for name, path in nodes.items():
        if not (path / "wal").is_dir():
            raise ConfigError(f"{path}: holds no data of a node; if {name} is lost for good, say --lost {name}")
    identity, figures = asyncio.run(
        _recover(nodes, tuple(dict.fromkeys(lost)), cluster, secret, storage, unsafe, accept_empty_shards, say)
    )
    new_secret = fence.new_secret(identity, secrets.token_hex(16))
    if record is not None:
        kept = {name: facts for name, facts in record["nodes"].items() if name not in lost}
        del record["version"]
        write_record(at, {**record, "secret": new_secret, "nodes": kept}, durable=True)
        say(f"{at} is changed: `gostore up --path {at}` starts {', '.join(kept)}, with a new secret.")
    else:
        say("The cluster has a NEW SECRET from now on (all nodes, all clients); with the old one nobody is heard:")
        say(f"  {new_secret}")
        figures["secret"] = new_secret
    say("Add nodes under new names; replication is restored by itself.")
    return figures


async def _recover(
    nodes: Mapping[str, Path],
    lost: tuple[str, ...],
    cluster: str,
    secret: str,
    storage: StorageConfig,
    unsafe: bool,
    accept_empty_shards: bool,
    say: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    envs: dict[str, Env] = {}
    try:
        for name, path in nodes.items():
            envs[name] = real_env(name, path)
        async with recover.opened(envs.values(), storage) as wals:
            plan = await recover.examine(envs, wals, lost, cluster=cluster, secret=secret)
            await _refuse_the_living(plan, cluster, secret)
            _tell(plan, say)
            if not unsafe:
                raise BadRequest(
                    "nothing was changed. If the lost nodes will NEVER come back, and what may be lost may be lost: "
                    "say --unsafe-accept-lost-writes"
                )
            identity = await recover.perform(plan, envs, wals, accept_empty_shards=accept_empty_shards)
            return identity, {
                "recovery": identity,
                "survivors": list(plan.survivors),
                "lost": list(plan.lost),
                "repaired": [repair.name for repair in plan.repairs],
                "healthy": list(plan.healthy),
                "empty": [repair.name for repair in plan.empty],
            }
    finally:
        for env in envs.values():
            await env.tasks.stop()
            env.disk.close()


async def _refuse_the_living(plan: recover.Plan, cluster: str, secret: str) -> None:
    """Raises ``BadRequest`` when a node that is said to be lost answers."""
    addresses = {name: plan.view.members[name].address for name in plan.lost}
    host = host_for(list(addresses.values()))
    connection = Connection(client_env(), cluster=cluster, secret=secret, members=addresses, host=host)
    await connection.open()
    try:
        for name, address in addresses.items():
            try:
                await connection.call_node(name, "admin", "status", timeout_s=ALIVE_TIMEOUT_S)
            except GoStoreError:
                continue
            raise BadRequest(f"{name} is not lost: it answers at {address}. Stop it, and give its data directory too")
    finally:
        await connection.close()


def _tell(plan: recover.Plan, say: Callable[[str], None]) -> None:
    say("UNSAFE RECOVERY. What a majority has acknowledged, and those who are left do not have, is lost.")
    say(f"left: {', '.join(plan.survivors)}; given up for good: {', '.join(plan.lost) or 'nobody'}")
    for repair in plan.repairs:
        say(f"  {repair}")
    if plan.healthy:
        say(f"  not touched, as a majority is left: {', '.join(plan.healthy)}")
    if plan.interrupted:
        say(f"  the recovery {plan.interrupted} was interrupted, and is finished")
    say("A transaction across shards may then be in one shard and not in another.")

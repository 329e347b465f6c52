"""A new replica that needs more than one message to catch up, and passes configurations of the past on its way."""

from __future__ import annotations

import asyncio
from typing import Any

import gostore as gs
from gostore.consensus.tunables import PROFILES

ENTRIES = 2 * PROFILES["fast"].append_entries_max + 200
"""More than two appends hold."""


def test_a_configuration_of_the_past_dismisses_nobody() -> None:
    """The log says on its way that others hold the shard, which was so before this replica was added."""
    with gs.simulate(5, seed=4, db={"shards": 1}, ring={"replicas": 3}) as cluster:

        async def scenario() -> None:
            await cluster.db.create_container("a")

            async def replace_one() -> dict[str, Any]:
                """A holder is lost, and another node takes its place."""
                (shard,) = await cluster.db.shards()
                await cluster.nodes[shard["replicas"][1]].kill()
                await cluster.wait_settled(timeout_s=60.0)
                (after,) = await cluster.db.shards()
                (new,) = set(after["replicas"]) - set(shard["replicas"])
                return {**after, "new": new}

            await replace_one()  # entries of the group's own, in the midst of those of its clients
            for first in range(0, ENTRIES, 200):
                # Of one object, so that each has an entry of its own.
                await asyncio.gather(*(cluster.db.add("a", "n", 1) for _ in range(first, first + 200)))
            shard = await replace_one()
            assert shard["last_index"] > ENTRIES
            assert shard["snapshot"] == 0, "it must catch up from the log"
            assert await cluster.db.get("a", "n", consistency="stale", via=shard["new"]) >= ENTRIES

        cluster.run(scenario())

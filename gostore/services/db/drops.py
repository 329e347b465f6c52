"""Dropped containers, and how a shard may forget them.

A node remembers for any time what a container's name stands for, so a shard must refuse what is meant for one that was
dropped: else the node would go on with it, beside the container that others have created anew under that name. The
shard keeps the names of the last ``DROPPED_MAX`` dropped ones. It may have forgotten others when it keeps so many;
from then on it takes for alive only containers that were *admitted*, and refuses all others just as if they were
dropped. A node that is refused looks the container up again, and admits it if it is still the one that it knew.

What is admitted lives in the shard as ordinary objects of the container :data:`ADMITTED`, replicated and kept as all
objects are: one for each admitted container, and the object :data:`DROPS`, which every drop writes. Whoever drops

1. marks the container's record as being dropped,
2. writes :data:`DROPS` and removes the admission of the container, in one commit of each shard,
3. removes the objects and has the name remembered, by the command ``drop`` of each shard;

and whoever admits

1. reads the version of :data:`DROPS` in each shard,
2. looks the container up: it must not be marked,
3. writes the admission, in a commit of each shard that requires this version.

So an admission is either before the second step of a drop, which removes it, or it has looked the container up after
the mark, and was not made, or the version has changed, and it is refused as a conflict. What is not admitted when its
name is forgotten, is never admitted later; and no other container ever has its name.

A shard in which nothing was dropped by this rule (no :data:`DROPS`) does as the releases before it did, so that their
logs and snapshots mean what they meant.
"""

from __future__ import annotations

from gostore.core.keyvalue import PointRead, Versioned
from gostore.core.packing import pack
from gostore.services.db.machine import ADMITTED, DROPS
from gostore.services.db.router import Router
from gostore.services.db.shard import succeed


async def drop_in(router: Router, shard: int, physical: str, deadline_s: float) -> None:
    """The steps 2 and 3 of a drop. They may be done again."""
    writes = [["set", ADMITTED, DROPS, [], pack(None)], ["delete", ADMITTED, physical, [], pack(None)]]
    succeed(await router.call(shard, "commit", [None, [], writes], deadline_s))
    await router.call(shard, "drop", [physical], deadline_s)


async def drops_in(router: Router, shard: int, deadline_s: float) -> int:
    """The version of :data:`DROPS`; 0: there is none."""
    found = await router.read(shard, "get", [ADMITTED, DROPS, [], None], deadline_s)
    return Versioned.from_wire(found).version


async def admit_in(router: Router, shard: int, physical: str, drops: int, deadline_s: float) -> None:
    """Raises ``Conflict`` when something was dropped since :data:`DROPS` had this version."""
    reads, writes = [PointRead(ADMITTED, DROPS, drops).to_wire()], [["set", ADMITTED, physical, [], pack(None)]]
    succeed(await router.call(shard, "commit", [None, reads, writes], deadline_s))

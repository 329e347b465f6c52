"""One cut through all shards, for a backup: the state of a single instant, kept by the primaries while it is read.

Theory of operation
===================
A snapshot of each shard, taken one by one, is no snapshot of the database: a transaction across shards may be in one
and not in the other. The cut is a *double collect* (Afek et al., "Atomic Snapshots of Shared Memory", JACM 1993): look
at every shard, then look at every shard again; if none has changed, there was an instant at which all were as they were
seen. Under load something always changes, so the shards are asked to *hold* first:

1. ``hold``: the primary lets new transactions wait at its gate. Those that have begun go on, so that nobody waits in a
   circle. The gate opens by itself after :data:`HOLD_S`.
2. ``pin``: as soon as no transaction is prepared, the primary notes all objects (references, no copies of values).
3. ``confirm``: when all shards are pinned, each says whether its objects are still those that it pinned, and no
   transaction is prepared. If one says no, or is another primary now, the cut is tried again.
4. ``release``: the gates open.

Why that is enough: every confirmation begins after every pin has ended, and both are preceded by a read barrier. A
transaction that is executed in the pin of one shard was prepared in all others before it was decided; in another shard
it is therefore in the pin too, or still prepared when that one confirms, or executed between, and both forbid the cut.
The holding is for progress only: correctness does not hang on a gate that stays closed, nor on a clock.

A pin weighs a reference and a small tuple for each object, and the values that are replaced while it is kept. It is
dropped when the backup is done, or when nobody has asked for it for :data:`IDLE_S`. A backup asks all nodes of its cut
several times in that while, also those that it is not reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from gostore.core.errors import GoStoreError, NotFound, Unavailable
from gostore.env import Env
from gostore.services.db.mvcc import Row, Store

HOLD_S: Final = 1.0
"""The longest that a gate stays closed. Longer: a cut succeeds on a slower cluster; shorter: writers wait less when the
node that takes the cut dies."""

ATTEMPTS_MAX: Final = 16
"""Of one cut; between two of them everybody gets his turn."""

ROUNDS_MAX: Final = 4
"""Pins and confirmations while the gates are closed once: what had begun before may still end in the first."""

PAUSE_S: Final = (0.02, 0.5)
"""Between two attempts: from, doubling, to."""

IDLE_S: Final = 30.0
"""A cut that nobody has asked for so long is dropped: its backup is dead."""

CUTS_MAX: Final = 2
"""Kept by one node at a time; more backups are refused as unavailable."""

PAGE_ROWS_MAX: Final = 4096
PAGE_SIZE_BYTES_MAX: Final = 512 * 1024
"""Of one answer; at least one object is in it."""

AskAll = Callable[[str, list[Any], float], Awaitable[list[Any]]]
"""(function, arguments, deadline) -> the answers of all shards, in order; raises the first error."""


@dataclass(slots=True)
class Gate:
    """Where new transactions of a shard wait while a cut is taken."""

    cut: str
    until_s: float
    opened: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Pin:
    store: Store
    newest: int
    rows: dict[str, list[Row]]


class Pins:
    """What this node keeps for backups: cut -> shard -> the objects of an instant."""

    def __init__(self) -> None:
        self._cuts: dict[str, dict[int, _Pin]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def keep(self, cut: str, shard: int, store: Store) -> None:
        """Raises ``Unavailable`` when other cuts are kept."""
        if cut not in self._cuts and len(self._cuts) >= CUTS_MAX:
            raise Unavailable(f"{CUTS_MAX} backups run already, or ended less than {IDLE_S:g} s ago: try again later")
        rows = {container: store.rows(container) for container in store.containers()}
        self._cuts.setdefault(cut, {})[shard] = _Pin(store, store.newest, rows)
        self._touch(cut)

    def unchanged(self, cut: str, shard: int, store: Store) -> bool:
        """Whether the objects of the shard are those that were pinned here."""
        pin = self._cuts.get(cut, {}).get(shard)
        return pin is not None and pin.store is store and pin.newest == store.newest

    def containers(self, cut: str, shard: int) -> list[list[Any]]:
        """[[name inside the shards, number of objects], ...]. Raises ``NotFound``."""
        return [[container, len(rows)] for container, rows in self._pin(cut, shard).rows.items()]

    def page(self, cut: str, shard: int, container: str, place: int) -> list[Any]:
        """[[[key, packed], ...], next place or None], by key. Raises ``NotFound``."""
        rows = self._pin(cut, shard).rows.get(container, [])
        page: list[list[Any]] = []
        size = 0
        for row in rows[place : place + PAGE_ROWS_MAX]:
            size += len(row.key) + len(row.packed)
            if page and size > PAGE_SIZE_BYTES_MAX:
                break
            page.append([row.key, row.packed])
        after = place + len(page)
        return [page, after if after < len(rows) else None]

    def drop(self, cut: str) -> None:
        """One that is not kept is fine."""
        self._cuts.pop(cut, None)
        if (timer := self._timers.pop(cut, None)) is not None:
            timer.cancel()

    def stop(self) -> None:
        for cut in list(self._cuts):
            self.drop(cut)

    def _pin(self, cut: str, shard: int) -> _Pin:
        pin = self._cuts.get(cut, {}).get(shard)
        if pin is None:
            raise NotFound(f"shard {shard} is not kept here for the backup {cut!r} any more: begin the backup again")
        self._touch(cut)
        return pin

    def _touch(self, cut: str) -> None:
        if (timer := self._timers.pop(cut, None)) is not None:
            timer.cancel()
        self._timers[cut] = asyncio.get_running_loop().call_later(IDLE_S, self.drop, cut)


async def take_cut(env: Env, ask_all: AskAll, name: str, deadline_s: float) -> tuple[str, list[list[Any]]]:
    """The cut's name, and [node that keeps it, index] of each shard. ``name``: used for no other cut.

    Raises ``Unavailable`` (definite) when it does not succeed in time.
    """
    loop = asyncio.get_running_loop()
    pause_s, why = PAUSE_S[0], "there was no time"
    for attempt in range(ATTEMPTS_MAX):
        if loop.time() >= deadline_s:
            break
        cut, where = f"{name}.{attempt}", None
        until_s = min(deadline_s, loop.time() + HOLD_S)
        try:
            where = await _collect_twice(ask_all, cut, until_s)
            why = "transactions that had begun before were not decided in time"
        except GoStoreError as error:
            why = error.message
        finally:
            await _release(env, ask_all, cut, where is not None, loop.time() + HOLD_S)
        if where is not None:
            return cut, where
        await asyncio.sleep(pause_s * env.rng.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, PAUSE_S[1])
    raise Unavailable(f"no consistent cut through all shards could be taken: {why}: try again")


async def _collect_twice(ask_all: AskAll, cut: str, until_s: float) -> list[list[Any]] | None:
    await ask_all("hold", [cut], until_s)
    for _ in range(ROUNDS_MAX):
        where = await ask_all("pin", [cut], until_s)
        if all(await ask_all("confirm", [cut], until_s)):
            return where
    return None


async def _release(env: Env, ask_all: AskAll, cut: str, keep: bool, until_s: float) -> None:
    try:
        await ask_all("release", [cut, keep], until_s)
    except GoStoreError as error:
        env.log.info("the gates of the cut %s open by themselves: %s", cut, error.message)

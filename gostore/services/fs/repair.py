"""Repair: after the ring has changed, every chunk gets back to all of its owners, and copies nobody needs go.

Theory of operation
-------------------
Each node looks after the chunks that it holds, and nobody plans for others. On a new view all of its chunks become
*pending*; the work goes in passes until none is:

* It *pins* the pending chunks at their owners, in batches: each owner says what it holds, and promises to keep it
  (:mod:`.chunks`).
* Where an owner lacks one, the first of the owners that have it copies it there; where none has it, whoever does. (A
  node that is not the first waits a pass or more before it steps in: the first may have died. If two copy at once, the
  second copy is not stored again.)
* A chunk of its own which all other owners hold is done. A chunk that this node does not own is removed once all owners
  hold it, see below.
* What could not be done stays pending for the next pass, after a pause; a new view begins anew with everything. After
  :data:`PASSES_MAX` passes repair rests until the next view; ``pending`` shows that something is left.

Chunks that come in while this node is no owner, or across a change of view (their writer had an older one, in which
fewer nodes were online, or it changed while the disk was slow), and chunks that a writer could not bring to all owners,
become pending one by one.

Why no copy is removed too many: a node removes a surplus copy only if *all* owners of its view V confirmed theirs while
they had the same view V, this node still has V, and nobody touched its copy since it began to ask. An owner that
confirmed in V removes its copy only in a later view W, when all owners of W confirmed theirs in W. Views only grow on
every node; so in the latest view in which any copy was removed, all owners had theirs, and have them still.

A damaged copy (met by a reader, or here) is *healed*: intact bytes are fetched from another node first, and only then
the copy is replaced; without any, the damaged one stays, as evidence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from gostore.cluster.view import View
from gostore.core.errors import GoStoreError
from gostore.env import Env
from gostore.services.fs.chunks import Holder
from gostore.services.fs.peers import Peers, ViewSource, gather_bounded, owners_of
from gostore.services.fs.replicas import Replicas

BATCH: Final = 512
"""Chunks about which an owner is asked at a time: 33 KiB of names."""
PASSES_MAX: Final = 64
"""Passes after one change of view. With their pauses about two minutes."""
PASS_PAUSE_S: Final = 0.1
"""Pause after the first pass that left something; doubles up to :data:`PASS_PAUSE_S_MAX`."""
PASS_PAUSE_S_MAX: Final = 2.0
PATIENCE_PASSES: Final = 3
"""How many passes the second holder waits for the first, the third for the second, and so on."""
PIN_TIMEOUT_S: Final = 5.0
COPY_TIMEOUT_S: Final = 10.0
HEALS_MAX: Final = 64
"""Damaged chunks being healed at a time; more wait until somebody meets them again."""


@dataclass(frozen=True, slots=True)
class RepairStatus:
    """``idle``: nothing is left to do for this view. ``pending``: chunks that may lack copies or be one too many.

    ``missing``: copies that this node is about to make. ``copied``: those it made since the view changed last.
    """

    idle: bool
    pending: int
    missing: int
    copied: int


@dataclass(slots=True)
class _Copies:
    """What a pass learnt of a chunk. ``lacking``: owners without it. ``silent``: owners that did not say."""

    owners: tuple[str, ...]
    holding: list[str]
    lacking: list[str]
    silent: list[str]
    agreed: bool
    """All owners that answered have the same view as this node."""


class Repair:
    """The repair of one node."""

    def __init__(
        self, env: Env, peers: Peers, cls: ViewSource, holder: Holder, replicas: Replicas, *, in_flight_max: int
    ) -> None:
        self._env = env
        self._peers = peers
        self._cls = cls
        self._holder = holder
        self._replicas = replicas
        self._in_flight_max = in_flight_max
        self._pending: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._busy = False
        self._examined: tuple[int, int] = (-1, 0)
        self._announced = False
        self._healing: dict[str, None] = {}
        self._missing = 0
        self._copied = 0
        self._copied_bytes = 0
        self.copied = 0
        self.removed = 0
        self.healed = 0
        holder.on_stored = self._stored
        holder.on_corrupt = self.heal

    def status(self) -> RepairStatus:
        pending = len(self._pending) + len(self._healing)
        busy = self._busy or self._wake.is_set() or self._examined != self._cls.view.version
        return RepairStatus(not busy and not pending, pending, self._missing, self._copied)

    def view_changed(self) -> None:
        """Look at everything again."""
        self._wake.set()

    def consider(self, key: str) -> None:
        """This chunk, held here, may lack copies, or be one too many."""
        self._pending[key] = None
        self._wake.set()

    def _stored(self, key: str, outdated: bool) -> None:
        """A chunk came in. Whoever sent it may have had another view, and so other owners in mind."""
        try:
            mine = self._peers.name in owners_of(self._cls.view, key)
        except GoStoreError:  # a placement that raises: the passes will tell
            mine = False
        if outdated or not mine:
            self.consider(key)

    # --- copies

    async def run(self) -> None:
        """Repair until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._busy = True
            try:
                await self._settle()
            finally:
                self._busy = False

    async def _settle(self) -> None:
        """Passes until nothing is pending, the passes are used up, or there is something new to look at."""
        number, begun = 0, (-1, 0)
        while number < PASSES_MAX:
            view = self._cls.view
            if view.version not in (begun, self._examined):
                number, begun = 0, view.version
                self._copied = self._copied_bytes = 0
                self._pending = dict.fromkeys(self._holder.keys())
            try:
                await self._pass(view, number)
                self._examined = view.version
            except GoStoreError as error:  # a placement that raises, say
                self._env.log.warning("repair: %s", error)
            if not self._pending or self._wake.is_set():
                break
            await asyncio.sleep(min(PASS_PAUSE_S * 2**number, PASS_PAUSE_S_MAX))
            number += 1
        self._missing = 0
        if self._announced and not self._pending:
            self._announced = False
            self._env.events.publish(
                "repair_done", epoch=self._cls.view.epoch, copied=self._copied, bytes=self._copied_bytes
            )

    async def _pass(self, view: View, number: int) -> None:
        """Look at all pending chunks once, and do what can be done."""
        mark = self._holder.mark()
        keys = list(self._pending)
        jobs: list[tuple[str, str]] = []
        surplus: list[str] = []
        for first in range(0, len(keys), BATCH):
            if self._cls.view.version != view.version:
                return
            batch = [key for key in keys[first : first + BATCH] if self._held(key)]
            for key, copies in (await self._look(view, batch)).items():
                if self._patience(copies) <= number:
                    jobs += [(key, owner) for owner in copies.lacking]
                if copies.lacking or copies.silent:
                    continue
                if self._peers.name in copies.owners:
                    self._pending.pop(key, None)
                elif copies.agreed:
                    surplus.append(key)
        if jobs:
            await self._copy_all(view, jobs)
        for key in surplus:
            if self._cls.view.version != view.version:
                return
            if await self._holder.remove(key, mark, moved=True):
                self.removed += 1
                self._pending.pop(key, None)

    def _held(self, key: str) -> bool:
        if self._holder.has(key):
            return True
        self._pending.pop(key, None)
        return False

    def _patience(self, copies: _Copies) -> int:
        """In which pass this node copies what is lacking: at once when it is the first that can."""
        name = self._peers.name
        rank = copies.holding.index(name) if name in copies.holding else len(copies.holding)
        return rank * PATIENCE_PASSES

    async def _look(self, view: View, keys: Sequence[str]) -> dict[str, _Copies]:
        """Which owners hold the chunks, by pinning them there."""
        found: dict[str, _Copies] = {}
        asked: dict[str, list[str]] = {}
        for key in keys:
            owners = owners_of(view, key)
            found[key] = _Copies(owners, [], [], [], agreed=bool(owners))
            for owner in owners:
                asked.setdefault(owner, []).append(key)

        async def ask(owner: str) -> Any:
            if owner == self._peers.name:
                return [*view.version, [self._holder.has(key) for key in asked[owner]]]
            try:
                return (await self._peers.call(owner, "chunks", "pin", asked[owner], timeout_s=PIN_TIMEOUT_S)).value
            except GoStoreError:
                return None

        answers = await gather_bounded([lambda owner=owner: ask(owner) for owner in asked])  # type: ignore[misc]
        by_owner: dict[str, dict[str, bool] | None] = {}
        agreed: dict[str, bool] = {}
        for owner, answer in zip(asked, answers, strict=True):
            by_owner[owner] = dict(zip(asked[owner], answer[2], strict=True)) if answer is not None else None
            agreed[owner] = answer is not None and tuple(answer[:2]) == view.version
        for key, copies in found.items():
            for owner in copies.owners:
                held = by_owner[owner]
                where = copies.silent if held is None else copies.holding if held[key] else copies.lacking
                where.append(owner)
                copies.agreed = copies.agreed and agreed[owner]
        return found

    async def _copy_all(self, view: View, jobs: list[tuple[str, str]]) -> None:
        self._missing = len(jobs)
        if not self._announced:
            self._announced = True
            self._env.events.publish("repair_started", epoch=view.epoch, missing=len(jobs))
        await gather_bounded(
            [lambda key=key, owner=owner: self._copy(view, key, owner) for key, owner in jobs],  # type: ignore[misc]
            self._in_flight_max,
        )

    async def _copy(self, view: View, key: str, owner: str) -> None:
        """Bring one chunk to one owner. What fails is seen by the next pass."""
        if self._cls.view.version != view.version:
            return
        try:
            data = self._holder.get(key)
            with self._holder.lent(key):
                await self._replicas.put_on(owner, key, data, timeout_s=COPY_TIMEOUT_S, repair=True)
        except GoStoreError as error:
            self._env.log.info("repair: chunk %s to %s: %s", key, owner, error)
            return
        self._missing -= 1
        self.copied += 1
        self._copied += 1
        self._copied_bytes += len(data)

    # --- damage

    def heal(self, key: str) -> None:
        """The copy here is damaged: replace it, in the background."""
        if key in self._healing or len(self._healing) >= HEALS_MAX:
            return
        self._healing[key] = None
        self._env.tasks.start(self._heal(key), name=f"heal chunk {key[:12]}")

    async def _heal(self, key: str) -> None:
        try:
            await self._holder.replace(key, await self._replicas.fetch_whole(key))
            self.healed += 1
        except GoStoreError as error:
            self._env.log.warning("chunk %s is damaged here and could not be healed: %s", key, error)
        finally:
            del self._healing[key]

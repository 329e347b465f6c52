"""The leader's loop: gathers requests, calls the roll of the dead, and commits what ``masters`` decides.

It runs on every node and is idle on all but the one that leads, or is about to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Final

from gostore.cluster import WAITING, View
from gostore.comm import Call
from gostore.core.errors import GoStoreError, NotOwner, Unavailable
from gostore.services.cls import masters
from gostore.services.cls.masters import Dead, Master, Request

if TYPE_CHECKING:
    from gostore.services.cls.service import ClsService

REQUESTS_MAX: Final = 4096
"""Requests that wait for the next event; more are refused as unavailable."""

BATCH_MAX: Final = 256
"""Requests decided together; bounds the size of an event."""

HANDOVERS_MAX: Final = 3
"""How often one request may find that the leadership has just moved."""

ROLL_CALL_PERIODS: Final = 5
"""The roll is called for this many probe periods: time for a third attempt, also on a busy machine."""

LAST_CALL_PERIODS: Final = 2
"""Those that were found dead get this long to answer. They make every declaration of a death wait so long."""

ROLL_CALLS_MAX: Final = 3
"""Requests are refused after so many roll calls in a row found no quorum."""

ROLL_CALL_PAUSE_PERIODS: Final = 2
"""Between two roll calls, when the first found no quorum."""

SPACING_S: Final = 0.000_5
"""Per member, between two rounds of events: an event costs every member some messages, and in a large cluster it is
cheaper to decide on many requests together. 2.5 ms for 5 members, 0.5 s for 1,000. Larger: fewer events, later."""

Waiting = tuple[Request, "asyncio.Future[int]"]


class Leader:
    """The part of one node's membership that leads when it is its turn."""

    def __init__(self, cls: ClsService) -> None:
        config = cls.config.cls
        self._cls = cls
        self._master = Master(
            cls.name, expect=config.expect, expect_timeout_s=config.expect_timeout_s, masters_max=config.masters_max
        )
        self._wake = asyncio.Event()
        self._requests: list[Waiting] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._roll_call_s = 0.0
        """No roll call before this time."""
        self._roll_calls_failed = 0

    def wake(self) -> None:
        """The view has changed, or somebody was found dead: look what is to be done."""
        self._wake.set()

    def stop(self, error: GoStoreError) -> None:
        self._set_alarm(None)
        self._refuse(error)

    def require(self, call: Call) -> None:
        """Only the master goes on; others send the request to it. Raises :class:`Unavailable` when there is none."""
        if not self._cls.is_member:
            raise Unavailable(f"{self._cls.name} is not a member yet; ask again later")
        master = self._cls.acting_master()
        if master is None:
            raise Unavailable("the cluster has no master now; ask again later")
        if master != self._cls.name:
            call.redirect(master)

    async def decide(self, call: Call, request: Request) -> int:
        """Let the master decide; the epoch in which it holds. Raises what refuses it, and redirects."""
        for _ in range(HANDOVERS_MAX):
            self.require(call)
            if len(self._requests) >= REQUESTS_MAX:
                raise Unavailable(f"{REQUESTS_MAX} requests wait for the master; ask again later")
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._requests.append((request, future))
            self.wake()
            try:
                return await future
            except NotOwner:
                continue
        raise Unavailable("the master changes; ask again later")

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            before = self._cls.view
            try:
                await self._lead()
            except GoStoreError as error:
                self._refuse(error)
            if self._cls.view is not before:
                await asyncio.sleep(SPACING_S * len(before.members))

    async def _lead(self) -> None:
        """One round: who is dead, what was asked, who goes online."""
        cls = self._cls
        if not cls.is_member or cls.acting_master() != cls.name:
            self._refuse(NotOwner(f"{cls.name} is not the master"))
            return
        deaths: list[Dead] = []
        dead = cls.found_dead()
        if dead or not masters.has_quorum(cls.view, [cls.name, *cls.answered_lately()]):
            if not (dead or self._requests or cls.view.in_states(*WAITING)):
                return
            alive = await self._call_the_roll(dead)
            if alive is None:
                if self._roll_calls_failed >= ROLL_CALLS_MAX:
                    self._refuse(Unavailable(f"{cls.name} may not decide: too few members answer it; ask again later"))
                return
            deaths = [Dead(name, incarnation) for name, incarnation in dead.items() if name not in alive]
        async with cls.lock:
            if cls.view.master == cls.name or any(death.name == cls.view.master for death in deaths):
                await self._lead_on(deaths)
        if not cls.is_master:
            self._refuse(NotOwner(f"{cls.name} is not the master any more"))
        elif (due_s := self._master.due_s(cls.view)) is not None:
            self._set_alarm(due_s)

    async def _lead_on(self, deaths: list[Dead]) -> None:
        """Under the lock: commit event after event until nothing is left to decide."""
        cls = self._cls
        while deaths or cls.is_master:
            batch, self._requests = self._requests[:BATCH_MAX], self._requests[BATCH_MAX:]
            requests: list[Request] = [*deaths, *(request for request, _ in batch)]
            plan = self._master.plan(cls.view, requests, cls.now_s(), cls.found_dead())
            if plan.event is not None:
                try:
                    await cls.commit(plan.event)
                except GoStoreError as error:
                    _settle(batch, [error] * len(batch), 0)
                    raise
            _settle(batch, plan.refusals[len(deaths) :], cls.view.epoch)
            deaths = []
            if plan.event is None and not self._requests:
                return

    async def _call_the_roll(self, dead: Container[str]) -> list[str] | None:
        """The members that answer, ourselves included; ``None`` when there is no quorum, or one knows a later view.

        Whoever of the ``dead`` answers is dead no more. One that restarted, and is not back yet, has its vote all the
        same, as it remembers what it knew; it is no member until it is let in again.
        """
        cls, view = self._cls, self._cls.view
        if cls.now_s() < self._roll_call_s:
            self._set_alarm(self._roll_call_s)
            return None
        names = [name for name, member in view.members.items() if member.live and name != cls.name]
        answers = await asyncio.gather(
            *(self._roll(name, view, LAST_CALL_PERIODS if name in dead else ROLL_CALL_PERIODS) for name in names)
        )
        present = {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}
        alive = [cls.name, *(name for name, (_, member) in present.items() if member)]
        for name in alive:
            if name in dead:
                cls.vouch(name)
        if cls.view.version != view.version:
            self.wake()
            return None
        later = [name for name, (version, _) in present.items() if version > view.version]
        if later:
            cls.pull(max(later, key=lambda name: present[name][0]))
        elif masters.has_quorum(view, [cls.name, *present]):
            self._roll_calls_failed = 0
            return alive
        else:
            cls.env.log.warning("%s sees %d of %d online members", cls.name, len(present) + 1, len(view.online))
        self._roll_calls_failed += 1
        self._roll_call_s = cls.now_s() + ROLL_CALL_PAUSE_PERIODS * cls.tunables.period_s
        self._set_alarm(self._roll_call_s)
        return None

    async def _roll(self, name: str, view: View, periods: int) -> tuple[tuple[int, int], bool] | None:
        """One member's version and whether it is a member; ``None`` when it does not answer."""
        cls = self._cls
        timeout_s = periods * cls.tunables.period_s
        try:
            reply = await cls.endpoint.call(name, "cls", "roll_call", *view.version, timeout_s=timeout_s)
            epoch, digest, member = reply.value
            return (int(epoch), int(digest)), bool(member)
        except (GoStoreError, ValueError, TypeError):
            return None

    def _set_alarm(self, when_s: float | None) -> None:
        """Look again at this time, if nothing wakes the leader before."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if when_s is not None:
            self._alarm = asyncio.get_running_loop().call_at(when_s, self._wake.set)

    def _refuse(self, error: GoStoreError) -> None:
        refused, self._requests = self._requests, []
        _settle(refused, [error] * len(refused), 0)


def _settle(batch: Sequence[Waiting], refusals: Sequence[GoStoreError | None], epoch: int) -> None:
    for (_, future), refusal in zip(batch, refusals, strict=True):
        if future.done():
            continue
        if refusal is None:
            future.set_result(epoch)
        else:
            future.set_exception(refusal)

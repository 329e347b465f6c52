"""The leader's loop: gathers requests, gives the dead a last call, and lets the group commit what ``masters`` decides.

It runs on every node and is idle on all but the leader of the masters' group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gostore.cluster import found
from gostore.comm import Call
from gostore.core.errors import GoStoreError, NotOwner, Unavailable
from gostore.services.cls import machine
from gostore.services.cls.masters import Dead, Master, Plan, Request

if TYPE_CHECKING:
    from gostore.services.cls.service import ClsService

REQUESTS_MAX: Final = 4096
"""Requests that wait for the next event; more are refused as unavailable."""

BATCH_MAX: Final = 256
"""Requests decided together; bounds the size of an event."""

HANDOVERS_MAX: Final = 3
"""How often one request may find that the leadership has just moved."""

COMMIT_TIMEOUT_S: Final = 3.0
"""An event that is not committed by then may still be: those who asked are told so, before they stop waiting."""

LAST_CALL_PERIODS: Final = 2
"""Those that were found dead get this long to answer. They make every declaration of a death wait so long."""

PAUSE_PERIODS: Final = 2
"""Between two tries of what did not succeed: to declare a death, to change the group."""

CATCH_UP_PAUSE_S: Final = 0.01
"""Between two looks whether a new master has learned what there is."""

SPACING_S: Final = 0.000_5
"""Per member, between two rounds of events: an event costs every member some messages, and in a large cluster it is
cheaper to decide on many requests together. 2.5 ms for 5 members, 0.5 s for 1,000. Larger: fewer events, later."""

Waiting = tuple[Request, "asyncio.Future[int]"]


class Leader:
    """The part of one node's membership that leads while this node is the leader of the masters' group."""

    def __init__(self, cls: ClsService) -> None:
        config = cls.config.cls
        self._cls = cls
        self._master = Master(
            cls.name,
            expect=config.expect,
            expect_timeout_s=config.expect_timeout_s,
            masters_max=config.masters_max,
            seat_timeout_s=config.seat_timeout_s,
            found=lambda view: found(view, cls.config.db.shards),
        )
        self._wake = asyncio.Event()
        self._requests: list[Waiting] = []
        self._deaths: list[Dead] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._pause_until_s = 0.0

    def wake(self) -> None:
        """The view or the group has changed, or somebody was found dead: look what is to be done."""
        self._wake.set()

    def stop(self, error: GoStoreError) -> None:
        self._set_alarm(None)
        self._refuse(error)

    def require(self, call: Call) -> None:
        """Only the master goes on; others send the request to it. Raises :class:`Unavailable` when there is none."""
        cls = self._cls
        if cls.leads:
            return
        master = cls.acting_master()
        if master is None or master == cls.name:
            raise Unavailable("the cluster has no master now; ask again later")
        cls.group.stir()  # who is asked may be quiet behind a leader that is dead
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
                self._cls.env.log.info("%s could not decide: %s", self._cls.name, error)
                self._try_again()
            if self._cls.view is not before:
                await asyncio.sleep(SPACING_S * len(before.members))

    async def _lead(self) -> None:
        """One round: who is dead, what was asked, who goes online, who is a master."""
        cls = self._cls
        if not cls.leads:
            self._deaths = []
            self._refuse(NotOwner(f"{cls.name} is not the master", owner=None))
            return
        look_s = self._look_for_the_dead()
        if not await self._decide_all():
            self.wake()
            return
        if cls.next_group() is not None and self._master.may_seat(cls.committed):
            cls.background("masters", self._change_group())
        due_s = self._master.due_s(cls.committed, cls.now_s())
        self._set_alarm(min((when_s for when_s in (look_s, due_s) if when_s is not None), default=None))

    async def _decide_all(self) -> bool:
        """Commit event after event until nothing is left to decide; false when this node leads no longer.

        Raises what the group raises.
        """
        cls = self._cls
        while cls.leads:
            batch, self._requests = self._requests[:BATCH_MAX], self._requests[BATCH_MAX:]
            deaths = self._take_deaths()
            own = [] if cls.is_member or cls.is_gone else [cls.join_request()]
            plan = self._plan([*own, *deaths, *(request for request, _ in batch)])
            if plan.event is not None:
                try:
                    taken = await cls.group.propose(machine.pack(plan.event), cls.now_s() + COMMIT_TIMEOUT_S)
                except GoStoreError as error:
                    _settle(batch, [error] * len(batch), 0)
                    raise
                if not taken:
                    # It was planned before all that the leaders before have committed was known here.
                    self._requests[:0] = batch
                    continue
            if own and (refusal := plan.refusals[0]) is not None:
                cls.refused_itself(refusal)
                self.wake()
            _settle(batch, plan.refusals[len(own) + len(deaths) :], cls.committed.epoch)
            if plan.event is None and not self._requests:
                return True
        return False

    def _plan(self, requests: Sequence[Request]) -> Plan:
        cls = self._cls
        return self._master.plan(
            cls.committed,
            cls.group.status.term,
            requests,
            cls.now_s(),
            dead=cls.found_dead(),
            seated=cls.next_group() is None,
            policy=cls.policy,
        )

    # the dead

    def _look_for_the_dead(self) -> float | None:
        """When to look again; ``None``: nobody was found dead, or a last call runs, whose end wakes the leader."""
        dead = self._cls.found_dead()
        if not dead:
            return None
        if self._cls.now_s() < self._pause_until_s:
            return self._pause_until_s
        task = self._cls.background("last-call", self._last_call(dead))
        if task is not None:
            # Once another one may start: for those who were found dead during this one, or still are.
            task.add_done_callback(lambda _: self.wake())
        return None

    def _take_deaths(self) -> list[Dead]:
        """Those to be declared. Who answered after the last call, before this is decided, is not among them."""
        dead = self._cls.found_dead()
        deaths, self._deaths = self._deaths, []
        return [death for death in deaths if dead.get(death.name) == death.incarnation]

    async def _last_call(self, dead: dict[str, int]) -> None:
        """Who was found dead and does not answer now either is to be declared so.

        Only by a leader whom a majority of the masters answers: one that is cut off must not accuse the others.
        """
        cls = self._cls
        answers = await asyncio.gather(*(self._call(name) for name in dead))
        for name, alive in zip(dead, answers, strict=True):
            if alive:
                cls.vouch(name)
        deaths = [Dead(name, dead[name]) for name, alive in zip(dead, answers, strict=True) if not alive]
        if not deaths:
            return
        try:
            await cls.group.read_barrier(cls.now_s() + COMMIT_TIMEOUT_S)
        except GoStoreError as error:
            cls.env.log.warning("%s may not declare %s dead: %s", cls.name, ", ".join(dead), error)
            self._try_again()
            return
        self._deaths = deaths
        self.wake()

    async def _call(self, name: str) -> bool:
        cls = self._cls
        try:
            timeout_s = LAST_CALL_PERIODS * cls.tunables.period_s
            return (await cls.endpoint.call(name, "cls", "last_call", timeout_s=timeout_s)).value is True
        except GoStoreError:
            return False

    # the group

    async def _change_group(self) -> None:
        """Let the members of the group follow the seats, one change at a time."""
        cls = self._cls
        try:
            deadline_s = cls.now_s() + COMMIT_TIMEOUT_S
            while cls.leads and (step := cls.next_group()) is not None:
                new = [name for name in step[0] if name not in cls.group.configuration.voters]
                if cls.now_s() < deadline_s and not all(cls.group.caught_up(name) for name in new):
                    await asyncio.sleep(CATCH_UP_PAUSE_S)
                else:
                    await cls.group.change(*step, deadline_s)
        except GoStoreError as error:
            cls.env.log.info("%s could not change the masters: %s", cls.name, error)
            self._try_again()
        else:
            self.wake()

    # time

    def _try_again(self) -> None:
        self._pause_until_s = self._cls.now_s() + PAUSE_PERIODS * self._cls.tunables.period_s
        self._set_alarm(self._pause_until_s)

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

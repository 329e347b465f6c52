"""Becoming a member: the first start, the return after a restart, and the restart of a whole cluster.

A node that starts is in one of four situations, and finds out which:

*Nothing saved, nobody to join through*: it is the first of a new cluster and makes its first event.

*Nothing saved, contacts given*: it asks one after the other to be let in; whoever is asked redirects to the master, and
the master's answer brings the whole view.

*A view saved*: everybody in it is taken for offline. The node asks all members it remembers how they are. Is one of
them in a running cluster, it joins again. Are all of them asking like itself, the cluster was stopped as a whole: then
those that are back compare what they saved, the latest history counts, and the first of its masters ring among them
leads again as soon as they are a quorum of those who were online (see ``masters``). If that first one stays away, the
next takes its place after :attr:`Patience.rebirth_s`.

*A member that finds itself expelled* (it was cut off, or asleep) raises its incarnation and joins again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gostore.cluster import LIVE, NodeState, View
from gostore.config import split_host_port
from gostore.core.address import Address
from gostore.core.errors import AlreadyExists, BadRequest, GoStoreError, Unavailable
from gostore.services.cls import masters
from gostore.services.cls.history import INCARNATIONS_PER_LIFE
from gostore.services.cls.masters import Join

if TYPE_CHECKING:
    from gostore.services.cls.service import ClsService

ASKED_MAX: Final = 64
"""Members asked in one round how they are; in a larger cluster a random choice, the masters always."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds."""

    first_s: float = 0.25
    """Wait for the first answer of a contact; doubles up to ``answer_s`` (it may be starting just now)."""
    answer_s: float = 3.0
    round_s: float = 0.05
    """Between two rounds; doubles up to ``round_s_max``, with 50 % jitter to keep the nodes apart."""
    round_s_max: float = 1.0
    join_s: float = 30.0
    """A node that never was a member gives up after this long."""
    rebirth_s: float = 3.0
    """The rightful leader of a restarted cluster is waited for this long."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """How a peer is: ``member`` of a running cluster or not; ``master``: whom it follows."""

    name: str
    member: bool
    master: str | None
    view: View | None


class Admission:
    """The way of one node into its cluster."""

    def __init__(self, cls: ClsService, patience: Patience) -> None:
        self._cls = cls
        self._patience = patience
        self._asked = False
        """Whether this life has asked to be let in before: it may have been, and not been told."""

    async def enter(self, saved: View | None) -> None:
        """Return when this node is a member (joining or further).

        Raises :class:`AlreadyExists` when its name is taken and :class:`Unavailable` when a new node finds nobody.
        """
        cls = self._cls
        me = saved.members.get(cls.name) if saved is not None else None
        contacts = self._contacts()
        if saved is not None and me is not None and me.state is not NodeState.LEFT:
            await self._return(saved, contacts)
        elif contacts:
            await self._join_through(lambda: contacts, give_up_s=cls.now_s() + self._patience.join_s)
        else:
            await cls.commit_first(masters.birth(cls.view, self._request(), cls.policy), cls.view)

    async def again(self) -> None:
        """Return when this node, which was expelled, is a member again; that it cannot be is fatal to the node."""
        cls = self._cls

        def contacts() -> list[str | Address]:
            others: list[str | Address] = [
                name for name, member in cls.view.members.items() if member.live and name != cls.name
            ]
            cls.env.rng.shuffle(others)
            return [*others[:ASKED_MAX], *self._contacts()]

        self._asked = True
        try:
            await self._join_through(contacts, give_up_s=None)
        except (AlreadyExists, BadRequest) as error:
            cls.env.fatal(f"cannot join again: {error.message}")

    def _contacts(self) -> list[str | Address]:
        """``config.join`` without ourselves. A contact is HOST:TCP_PORT, so its UDP port is not known (0)."""
        own = self._cls.endpoint.address
        found = [Address(*split_host_port("join", entry), 0) for entry in self._cls.config.join]
        return [contact for contact in found if (contact.host, contact.tcp_port) != (own.host, own.tcp_port)]

    def _request(self) -> Join:
        cls = self._cls
        return Join(
            name=cls.name,
            address=cls.endpoint.address,
            rest_port=cls.rest_port,
            incarnation=cls.incarnation,
            weight=cls.weight,
        )

    async def _join_through(self, contacts: Callable[[], Sequence[str | Address]], give_up_s: float | None) -> None:
        cls, patience = self._cls, self._patience
        wait_s, answer_s = patience.round_s, patience.first_s
        while True:
            last: GoStoreError = Unavailable("there is nobody to join through")
            for contact in contacts():
                try:
                    await self._ask_to_join(contact, answer_s)
                except (AlreadyExists, BadRequest):
                    raise
                except GoStoreError as error:
                    last = error
                if cls.is_member:
                    return
            if give_up_s is not None and cls.now_s() >= give_up_s:
                raise Unavailable(
                    f"{cls.name} found no cluster to join at {', '.join(cls.config.join)} in {patience.join_s:.0f} s "
                    f"(if a node of this name runs already, choose another); last: {last.message}"
                )
            await asyncio.sleep(wait_s * cls.env.rng.uniform(0.5, 1.5))
            wait_s = min(2 * wait_s, patience.round_s_max)
            answer_s = min(2 * answer_s, patience.answer_s)
            if cls.is_member:
                return

    async def _ask_to_join(self, contact: str | Address, timeout_s: float) -> None:
        """One request. It may be answered by the master directly; asking twice harms nothing."""
        cls, join = self._cls, self._request()
        try:
            reply = await cls.endpoint.call(
                contact, "cls", "join", join.address.to_wire(), join.rest_port, join.incarnation, join.weight,
                timeout_s=timeout_s,
            )  # fmt: skip
        except AlreadyExists as error:
            raise self._refused(error) from None
        finally:
            self._asked = True
        try:
            master, wire = reply.value
            view = View.from_wire(wire, cls.cache)
        except (ValueError, TypeError) as error:
            raise Unavailable(f"{contact} answered a join with what cannot be read: {error}") from None
        await cls.adopt(view, str(master))

    def _refused(self, error: AlreadyExists) -> GoStoreError:
        """A name that is taken, or only by ourselves: let in by an earlier request, never told, and dead since.

        Then the incarnation is of this life, and an earlier request there was; a node that comes for the first time
        under a name that was here is another one, or has lost its data.
        """
        cls, known = self._cls, error.details.get("incarnation")
        first = cls.endpoint.incarnation
        if (
            self._asked
            and not error.details.get("live")
            and error.details.get("address") == cls.endpoint.address.to_wire()
            and isinstance(known, int)
            and first <= known < first + INCARNATIONS_PER_LIFE
        ):
            cls.rise(known)
            return Unavailable(f"{cls.name} was declared dead in incarnation {known}; it joins in {cls.incarnation}")
        return error

    # After a restart

    async def _return(self, saved: View, contacts: Sequence[str | Address]) -> None:
        cls, patience = self._cls, self._patience
        wait_s, began_s = patience.round_s, cls.now_s()
        while not cls.is_member:
            answers = await self._ask_around(saved, contacts)
            saved = max([saved, *(a.view for a in answers if a.view is not None)], key=lambda view: view.version)
            me = saved.members.get(cls.name)
            this_life_end = cls.endpoint.incarnation + INCARNATIONS_PER_LIFE
            if me is not None and cls.incarnation <= me.incarnation < this_life_end:
                cls.rise(me.incarnation)  # let in in this life, never told, and dead since
            running = [a for a in answers if a.member and a.master not in (None, cls.name)]
            try:
                if running:
                    names: list[str | Address] = [answer.name for answer in running]
                    await self._ask_to_join(cls.env.rng.choice(names), patience.answer_s)
                else:
                    await self._lead_if_due(saved, answers, cls.now_s() - began_s)
            except (AlreadyExists, BadRequest):
                raise
            except GoStoreError as error:
                cls.env.log.info("%s is not back yet: %s", cls.name, error)
            if not cls.is_member:
                await asyncio.sleep(wait_s * cls.env.rng.uniform(0.5, 1.5))
                wait_s = min(2 * wait_s, patience.round_s_max)

    async def _lead_if_due(self, saved: View, answers: Sequence[_Answer], waited_s: float) -> None:
        """No cluster runs without us: lead, when it is our turn."""
        cls = self._cls
        back = [cls.name, *(answer.name for answer in answers)]
        if masters.leader_of_rebirth(saved, back) != cls.name:
            return
        if any(answer.member for answer in answers):
            # They run, and wait for us: we restarted before they missed us.
            await cls.commit_first(masters.comeback(saved, self._request()), saved)
        elif saved.master == cls.name or waited_s >= self._patience.rebirth_s:
            await cls.commit_first(masters.rebirth(saved, self._request()), saved)

    async def _ask_around(self, saved: View, contacts: Sequence[str | Address]) -> list[_Answer]:
        cls = self._cls
        others = [name for name, m in saved.members.items() if m.state is not NodeState.LEFT and name != cls.name]
        if len(others) > ASKED_MAX:
            first = [name for name in saved.masters if name != cls.name]
            others = list(dict.fromkeys([*first, *cls.env.rng.sample(others, ASKED_MAX)]))
        found = await asyncio.gather(*(self._ask(peer, saved) for peer in (*others, *contacts)))
        return list({answer.name: answer for answer in found if answer is not None}.values())

    async def _ask(self, peer: str | Address, saved: View) -> _Answer | None:
        cls = self._cls
        try:
            reply = await cls.endpoint.call(
                peer, "cls", "state", *saved.version, timeout_s=self._patience.first_s, attempts=2
            )
            return _read(reply.value, cls)
        except (GoStoreError, ValueError):
            return None


def _read(value: Any, cls: ClsService) -> _Answer:
    match value:
        case {"name": str(name), "member": bool(member), "master": master, "view": view}:
            return _Answer(name, member, master, None if view is None else View.from_wire(view, cls.cache))
    raise ValueError(f"not a state: {value!r:.100}")


def all_offline(view: View) -> View:
    """What a restarted node knows: who was there, and that nobody is known to be there now.

    It keeps the epoch and has no history (digest 0), so that whatever is real supersedes it.
    """
    members = {
        name: member.to(NodeState.OFFLINE) if member.state in LIVE else member for name, member in view.members.items()
    }
    return View(view.cluster, view.epoch, members, view.rings, view.policy, 0, view.cache)

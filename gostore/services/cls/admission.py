"""Becoming a member: the first start, the return after a restart, and the restart of a whole cluster.

A node that starts is in one of three situations, and finds out which:

*Nothing saved, nobody to join through*: it is the first of a new cluster. It founds the masters' group alone, leads it
at once, and its first event makes it a member.

*Nothing saved, contacts given*: it asks one after the other to be let in; whoever is asked redirects to the master, and
the master's answer brings the whole view.

*A view saved*: everybody in it is taken for offline, and the node asks all members that it remembers, and the contacts,
to be let in again. Was the cluster stopped as a whole, nobody can do that until a quorum of the masters is back and has
a leader; the leader's first event makes itself a member again, and then it lets the others in.

*A member that finds itself expelled* (it was cut off, or asleep) raises its incarnation and joins again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from gostore.cluster import LIVE, NodeState, View
from gostore.config import split_host_port
from gostore.core.address import Address
from gostore.core.errors import AlreadyExists, BadRequest, GoStoreError, Unavailable
from gostore.services.cls.history import INCARNATIONS_PER_LIFE

if TYPE_CHECKING:
    from gostore.services.cls.service import ClsService

ASKED_MAX: Final = 64
"""Members asked in one round to be let in; in a larger cluster a random choice, the masters always."""


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
        contacts, group = self._contacts(), cls.group
        if saved is not None and me is not None and me.state is not NodeState.LEFT:
            group.begin(())
            if saved.master == cls.name:
                group.campaign()  # it led when it stopped: why wait
            await self._join_through(self._known, give_up_s=None)
        elif contacts:
            group.begin(())
            await self._join_through(lambda: contacts, give_up_s=cls.now_s() + self._patience.join_s)
        elif saved is not None:
            raise Unavailable(
                f"{cls.name} has left its cluster: set `join` to come back, or give it an empty data directory"
            )
        else:
            group.begin((cls.name,))
            group.campaign()
            await cls.wait_member()

    async def again(self) -> None:
        """Return when this node, which was expelled, is a member again; that it cannot be is fatal to the node."""
        cls = self._cls
        self._asked = True
        try:
            await self._join_through(self._known, give_up_s=None)
        except (AlreadyExists, BadRequest) as error:
            cls.env.fatal(f"cannot join again: {error.message}")

    def _known(self) -> list[str | Address]:
        """The masters, then other members in any order, then the contacts."""
        cls, view = self._cls, self._cls.view
        others = [name for name, member in view.members.items() if member.state is not NodeState.LEFT]
        cls.env.rng.shuffle(others)
        names = [name for name in dict.fromkeys([*view.masters, *others]) if name != cls.name]
        return [*names[:ASKED_MAX], *self._contacts()]

    def _contacts(self) -> list[str | Address]:
        """``config.join`` without ourselves. A contact is HOST:TCP_PORT, so its UDP port is not known (0)."""
        own = self._cls.endpoint.address
        found = [Address(*split_host_port("join", entry), 0) for entry in self._cls.config.join]
        return [contact for contact in found if (contact.host, contact.tcp_port) != (own.host, own.tcp_port)]

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
        cls, join = self._cls, self._cls.join_request()
        try:
            reply = await cls.endpoint.call(
                contact, "cls", "join", join.address.to_wire(), join.rest_port, join.incarnation, join.weight,
                join.disk, timeout_s=timeout_s,
            )  # fmt: skip
        except AlreadyExists as error:
            raise self.refused(error) from None
        finally:
            self._asked = True
        try:
            master, wire = reply.value
            view = View.from_wire(wire, cls.cache)
        except (ValueError, TypeError) as error:
            raise Unavailable(f"{contact} answered a join with what cannot be read: {error}") from None
        cls.adopt(view, str(master))

    def refused(self, error: AlreadyExists) -> GoStoreError:
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


def all_offline(view: View) -> View:
    """What a restarted node knows: who was there, and that nobody is known to be there now.

    It keeps the epoch and has no history (digest 0), so that whatever is real supersedes it.
    """
    members = {
        name: member.to(NodeState.OFFLINE) if member.state in LIVE else member for name, member in view.members.items()
    }
    return replace(view, members=members, digest=0, master=None)

"""A client's way to a cluster: an endpoint of its own, the members it knows, and which of them to ask.

Any node takes any call, so a client spreads its calls over the members and goes on to the next when one does not
answer. What it may do then depends on the call. A read is asked again anywhere. A write is asked again only when the
error says that it surely did not happen (``definite``): after a time-out nobody knows, and the caller is told so rather
than risking that it happens twice.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from gostore.client.commits import Commits
from gostore.comm import Endpoint, Reply
from gostore.config import CommConfig
from gostore.core.address import Address
from gostore.core.errors import BadRequest, Forgotten, GoStoreError, Timeout, Unavailable, Unreachable
from gostore.core.keyvalue import RequestIds
from gostore.core.ports import Disk
from gostore.env import Env, RealClock, real_rng

TIMEOUT_S: Final = 30.0
"""Deadline of a call that names none: long enough to sit out the loss of a node."""

PATIENCE_S: Final = 1.5
"""How long one node may take over a read before another is asked as well. Shorter: quicker round a dead node; longer:
fewer reads done twice on a busy machine."""

SHUN_S: Final = 2.0
"""How long a node that did not answer is asked last."""

BACKOFF_S: Final = (0.02, 0.5)
"""First and longest pause before the members are asked again, when none could help; it doubles."""

REFRESH_S: Final = 5.0
"""How old the list of members may be before a call that failed asks for it anew."""


class NoDisk:
    """A client has none."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a client has no disk (asked for {name})")


def client_env() -> Env:
    """The environment of a client's endpoint; its name is random, so that no two clients are one to the nodes."""
    name = f"client-{secrets.token_hex(6)}"
    return Env(name, RealClock(), real_rng(), cast(Disk, NoDisk()), logging.getLogger(f"gostore.{name}"))


class Connection:
    """Calls into one cluster, from the loop it was opened on. It is also comm's resolver of names.

    ``members``: name -> address, as far as known; ``seeds``: addresses to learn them from.
    """

    def __init__(
        self,
        env: Env,
        *,
        cluster: str,
        secret: str,
        members: Mapping[str, Address] | None = None,
        seeds: tuple[Address, ...] = (),
        host: str = "127.0.0.1",
        config: CommConfig | None = None,
    ) -> None:
        self.env = env
        self.cluster = cluster
        self.members: dict[str, Address] = dict(members or {})
        self.seeds = seeds
        self.endpoint = Endpoint(
            env, cluster=cluster, secret=secret, host=host, incarnation=1, resolver=self, config=config or CommConfig()
        )
        self._turn = 0
        self.requests = RequestIds(self.endpoint.name)
        self._shunned: dict[str, float] = {}
        self._ended: dict[str, None] = {}
        self._refreshed_s = 0.0
        self.timeout_s = TIMEOUT_S
        self.commits = Commits(self)
        self.is_usable: Callable[[str], bool] = lambda name: True
        """A testbed knows which nodes it killed or paused; others are asked only when nothing is left."""

    def address(self, name: str) -> Address | None:
        return self.members.get(name)

    async def open(self) -> None:
        """Start the endpoint. Raises :class:`ConfigError`."""
        await self.endpoint.start()

    async def close(self) -> None:
        await self.endpoint.stop()
        await self.env.tasks.stop()

    # members

    async def refresh(self, timeout_s: float = TIMEOUT_S) -> None:
        """Learn the members from one that answers. Raises the last error when none does."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        last: GoStoreError = Unreachable("no member of the cluster is known; give its HOST:PORT")
        asked: list[str | Address] = [*self._order(), *self.seeds]
        for index, to in enumerate(asked):
            share_s = (deadline_s - loop.time()) / (len(asked) - index)
            if share_s <= 0:
                break
            try:
                status = (await self.endpoint.call(to, "admin", "status", timeout_s=share_s)).value
            except (Timeout, Unreachable, Unavailable) as error:
                last = error
                continue
            self.learn(status)
            return
        raise last

    def learn(self, status: Mapping[str, Any]) -> None:
        """Take the members from a node's status; those that left are forgotten."""
        self._refreshed_s = asyncio.get_running_loop().time()
        for name, member in status["members"].items():
            if member["state"] == "left":
                self.members.pop(name, None)
            else:
                self.members[name] = Address.from_wire(member["address"])

    def started(self, name: str, address: Address) -> None:
        """A node runs at this address from now on."""
        self._shunned.pop(name, None)
        self._ended.pop(name, None)
        self.members[name] = address

    def ended(self, name: str) -> None:
        """A node's process has ended: calls to it end now, not at their deadline."""
        self._ended[name] = None
        self.endpoint.forget(name)

    # calls

    async def call_node(
        self,
        node: str,
        service: str,
        function: str,
        *args: Any,
        data: bytes | memoryview = b"",
        timeout_s: float | None = None,
    ) -> Reply:
        """Ask this node and no other, once. Raises what it raises, :class:`Timeout`, :class:`Unreachable`."""
        self._check_node(node)
        wait_s = TIMEOUT_S if timeout_s is None else timeout_s
        return await self.endpoint.call(node, service, function, *args, data=data, timeout_s=wait_s)

    async def call(
        self,
        service: str,
        function: str,
        *args: Any,
        data: bytes | memoryview = b"",
        repeatable: bool = False,
        tells_repeats: bool = False,
        via: str | None = None,
        timeout_s: float | None = None,
        after: GoStoreError | None = None,
    ) -> Reply:
        """Ask whichever node can help, one after the other, round and round until the time is over.

        ``repeatable``: running twice does no harm (reads, commits that carry a request id). ``tells_repeats``: the
        function takes a last argument that says whether an earlier attempt may have had its effect. ``via``: this node
        only. ``after``: what came of an attempt that was made already.
        """
        if via is not None:
            self._check_node(via)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (TIMEOUT_S if timeout_s is None else timeout_s)
        # A silent node must not use up all the time; but what takes long everywhere gets longer each round.
        pause_s, patience_s = BACKOFF_S[0], PATIENCE_S
        last, all_definite = after, after is None or after.definite
        while True:
            for node in self._order() if via is None else [via]:
                left_s = deadline_s - loop.time()
                if left_s <= 0:
                    break
                wait_s = min(left_s, patience_s) if repeatable and via is None and len(self.members) > 1 else left_s
                sent = (*args, not all_definite) if tells_repeats else args
                try:
                    return await self.endpoint.call(node, service, function, *sent, data=data, timeout_s=wait_s)
                except (Unreachable, Unavailable, Timeout, Forgotten) as error:
                    last, all_definite = error, all_definite and error.definite
                    if not (error.definite or repeatable):
                        raise
                    if not isinstance(error, Unavailable):
                        self.shun(node)
            if loop.time() + pause_s >= deadline_s:
                raise self._final(last, all_definite)
            await asyncio.sleep(pause_s)
            pause_s, patience_s = min(2 * pause_s, BACKOFF_S[1]), 2 * patience_s
            await self._refresh_if_old(deadline_s)

    def _final(self, last: GoStoreError | None, all_definite: bool) -> GoStoreError:
        """The error of the last attempt, unless that would hide that an earlier one may have had its effect."""
        if last is None:
            return Unreachable("no member of the cluster is known")
        if last.definite and not all_definite:
            return Timeout(f"{last.message} (an earlier attempt may have had its effect)")
        return last

    def _check_node(self, node: str) -> None:
        if node in self._ended:
            raise Unreachable(f"{node} does not run")
        if node not in self.members:
            raise BadRequest(f"there is no node {node!r}; known are {', '.join(self.members) or 'none yet'}")

    async def _refresh_if_old(self, deadline_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._refreshed_s < REFRESH_S and self.members:
            return
        self._refreshed_s = now_s
        try:
            await self.refresh(min(PATIENCE_S, deadline_s - now_s))
        except GoStoreError:
            pass  # the members that are known are asked again

    def pick(self) -> str:
        """The node to ask next, for what must stay with one node. Raises :class:`Unreachable` when none is known."""
        order = self._order()
        if not order:
            raise Unreachable("no member of the cluster is known")
        return order[0]

    def shun(self, node: str) -> None:
        """It did not answer: ask others first for a while."""
        self._shunned[node] = asyncio.get_running_loop().time() + SHUN_S

    def _order(self) -> list[str]:
        """All members: usable ones first, a different one in front each time; then those that did not answer."""
        now_s = asyncio.get_running_loop().time()
        names = list(self.members)
        self._turn += 1
        start = self._turn % len(names) if names else 0
        turned = names[start:] + names[:start]
        return sorted(turned, key=lambda name: (not self.is_usable(name), self._shunned.get(name, 0.0) > now_s))

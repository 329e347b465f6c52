"""The client's end of event feeds: nodes deliver batches of their events here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gostore.comm import Call, remote, service

Deliver = Callable[[str, str, int, int, int, int, list[Any]], None]
"""(subscription, node, incarnation, after, upto, sampled, events): see ``gostore.trace.journal``."""


@service("journal")
class JournalReceiver:
    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver

    @remote
    async def deliver(
        self,
        call: Call,
        subscription: str,
        node: str,
        incarnation: int,
        after: int,
        upto: int,
        sampled: int,
        events: list[Any],
    ) -> None:
        """Take a batch; the answer acknowledges it."""
        self._deliver(subscription, node, incarnation, after, upto, sampled, events)

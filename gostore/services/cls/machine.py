"""The state machine of the masters' group: the history of the cluster, of which the latest view is kept. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgpack

from gostore.cluster.view import View
from gostore.core.errors import Corrupt
from gostore.services.cls.masters import NodeEvent, apply, fits

Committed = Callable[[NodeEvent | None, View], None]
"""Told of every view that came to be, with the event that made it, ``None`` when it came as a whole."""

MEMBER_SIZE_BYTES: Final = 100
"""About what one member takes in a snapshot."""


class Machine:
    """What the masters have committed, as far as this node knows; ``view`` is empty before the first event.

    It may be ahead of the view that the node has installed, and behind it at a node that is no master (any more).
    """

    def __init__(self, view: View, committed: Committed) -> None:
        self.view = self._empty = view
        self._committed = committed

    def apply(self, index: int, payload: bytes) -> bool:
        """Whether the event took effect: it is void when it continues another view than the latest.

        Raises :class:`Corrupt`.
        """
        event = unpack(payload)
        if not fits(self.view, event):
            return False
        self.view = apply(self.view, event)
        self._committed(event, self.view)
        return True

    def skip(self, index: int) -> None:
        """An entry that is no event."""

    def snapshot(self) -> Iterator[bytes]:
        """The view of this moment."""
        content: bytes = msgpack.packb(self.view.to_wire())
        return iter((content,))

    def restore(self, pieces: list[bytes]) -> None:
        """Raises :class:`Corrupt`."""
        if not pieces:
            self.view = self._empty
            return
        try:
            self.view = View.from_wire(msgpack.unpackb(b"".join(pieces)), self._empty.cache)
        except ValueError as error:
            raise Corrupt(f"a snapshot of the masters' group cannot be read: {error}") from error
        self._committed(None, self.view)

    @property
    def size_bytes(self) -> int:
        return MEMBER_SIZE_BYTES * len(self.view.members)


def pack(event: NodeEvent) -> bytes:
    payload: bytes = msgpack.packb(event.to_wire())
    return payload


def unpack(payload: bytes) -> NodeEvent:
    """Raises :class:`Corrupt`."""
    try:
        return NodeEvent.from_wire(msgpack.unpackb(payload))
    except ValueError as error:
        raise Corrupt(f"an entry of the masters' group cannot be read: {error}") from error

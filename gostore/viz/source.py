"""What the live view asks of a cluster: a snapshot, a stream of events, and where a key lives.

Every testbed fits; so does a recorded journal, or an object of five lines in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from gostore.core.events import Event


class Journal(Protocol):
    def recent(self, count: int, *, kinds: Iterable[str]) -> Iterable[Event]:
        """The last ``count`` events of these kinds, oldest first."""
        ...

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call back for every event from now on, in any thread; returns the function that ends it."""
        ...


class Source(Protocol):
    """All three calls may come from any thread and must return, or raise, within a few seconds."""

    @property
    def journal(self) -> Journal: ...

    def snapshot_sync(self) -> dict[str, Any]:
        """The cluster now; the schema is in :mod:`gostore.viz.graph`."""
        ...

    def locate_sync(self, key: str) -> Mapping[str, Any]:
        """``{"token": 16 hex digits, "owners": [name...]}`` of a key."""
        ...

    def locate_file_sync(self, path: str) -> Mapping[str, Any]:
        """The same of a file's entry, and its ``chunks``: ``{"chunk", "token", "owners", "held"}`` each."""
        ...

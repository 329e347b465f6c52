"""The ports through which a node touches its world: wall clock, randomness and disk.

A pure core never sees these (it is given the time and random numbers as arguments); the asyncio services around the
cores use them through ``gostore.env.Env``. The real implementations live in ``gostore.env``, the simulated ones in
``gostore.sim``. Monotonic time is not a port: it is the event loop's ``loop.time()``.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """The wall clock of one machine. It may skew and jump: use it for time stamps, never for timeouts."""

    def wall_s(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...


class Rng(Protocol):
    """The part of ``random.Random`` that a node may use; always an instance that somebody seeded."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float) -> float: ...
    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int: ...
    def getrandbits(self, k: int, /) -> int: ...
    def choice(self, seq: Sequence[T]) -> T: ...
    def sample(self, population: Sequence[T], k: int) -> list[T]: ...
    def shuffle(self, x: MutableSequence[Any]) -> None: ...


class File(Protocol):
    """One open file. Writes reach the page cache at once and the medium only with :meth:`sync`."""

    name: str

    def append(self, data: bytes | bytearray | memoryview) -> int:
        """Write at the end of the file; return the offset at which the data start. Raises ``OSError``."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes at ``offset``; fewer at the end of the file."""
        ...

    def size(self) -> int: ...

    def truncate(self, size: int) -> None: ...

    async def write(self, parts: Sequence[bytes | memoryview], *, sync: bool) -> None:
        """As :meth:`append` of each part, without holding up the loop while the kernel is busy with the file.

        With ``sync`` everything is on the medium at return; a failure is one of :meth:`sync`. Nothing else may be
        written meanwhile.
        """
        ...

    async def sync(self) -> None:
        """Return when everything written before the call is on the medium (fdatasync).

        Raises ``OSError``. A failed sync must never be retried (the kernel may have dropped the dirty pages): the
        caller stops the node.
        """
        ...

    def drop_cache(self) -> None:
        """Let the next reads come from the medium; call it when all is synced.

        After a failed sync the page cache may show bytes that never reached the medium, to the next process too.
        """
        ...

    def close(self) -> None: ...


class Disk(Protocol):
    """The directory that belongs to one node. Names are relative, with ``/``; listings are sorted."""

    def open(self, name: str, *, create: bool = False) -> File:
        """Open for reading and appending. Raises ``FileNotFoundError`` when absent and ``create`` is false."""
        ...

    def read_bytes(self, name: str) -> bytes: ...

    def listdir(self, name: str) -> list[str]:
        """Sorted names in a directory; an absent directory is empty."""
        ...

    def exists(self, name: str) -> bool: ...

    def mkdir(self, name: str) -> None:
        """Create a directory and its parents; it may exist already."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Atomically replace ``new`` by ``old``. Durable only after :meth:`sync_dir` of the directory."""
        ...

    def remove(self, name: str) -> None: ...

    async def sync_dir(self, name: str) -> None:
        """Return when the creations, renames and removals in this directory are on the medium."""
        ...

    def close(self) -> None:
        """The node is gone: its directory is free for another one, and its open files raise from now on."""
        ...

"""What a node keeps of the cluster over a restart: its incarnation, the mark of its disk, and the events it has seen.

The events are records of group :data:`GROUP` in the node's log, with now and then a snapshot of the whole view. The
group's index counts records; the epoch is in the record, because a view that was pulled may skip epochs.

Formats: a record's kind is its format, a later format is another kind. A later file of the incarnation begins with
``v`` and its version.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack

from gostore.cluster.view import RingCache, View
from gostore.core.errors import Corrupt, Fenced, NotSupported, Unavailable
from gostore.env import Env
from gostore.services.cls.masters import NodeEvent, apply
from gostore.storage import Wal

GROUP: Final = 0
EVENT: Final = 1
SNAPSHOT: Final = 2

EVENTS_PER_SNAPSHOT: Final = 64
"""More: fewer snapshots (about 100 bytes a member each); fewer: a quicker start."""

INCARNATIONS_PER_LIFE: Final = 1000
"""A node's life takes a block of incarnations, so that raising one (to refute a suspicion) needs no write."""

INCARNATIONS_LEFT_MIN: Final = 100
"""With fewer left in the block the next one is reserved."""

MARK_BITS: Final = 64
"""Of the mark of a disk: two of a million disks have the same one once in ten million clusters."""

_FILE: Final = "incarnation"


async def next_incarnation(env: Env) -> int:
    """The first incarnation of a new life: above all that this data directory has ever used; on the medium.

    The first life begins at 1, the second at 1001. Raises :class:`Corrupt` when the file is damaged and
    :class:`Unavailable` when the disk fails.
    """
    used, mark = _read(env)
    await _write(env, used + INCARNATIONS_PER_LIFE, mark or f"{env.rng.getrandbits(MARK_BITS):016x}")
    return used + 1


async def reserve_incarnations(env: Env, used: int) -> int:
    """Extend this life's block when ``used`` is near its end; returns the highest that may be used.

    Raises as :func:`next_incarnation`.
    """
    ceiling, mark = _read(env)
    while ceiling - used < INCARNATIONS_LEFT_MIN:
        ceiling += INCARNATIONS_PER_LIFE
        await _write(env, ceiling, mark)
    return ceiling


def mark_of_disk(env: Env) -> str:
    """What tells this data directory from all others: random, made with the first incarnation, and never changed.

    Raises as :func:`next_incarnation`.
    """
    return _read(env)[1]


def _read(env: Env) -> tuple[int, str]:
    """The highest incarnation that was reserved and the mark; 0 and nothing in an empty directory."""
    try:
        content = env.disk.read_bytes(_FILE)
    except FileNotFoundError:
        return 0, ""
    except OSError as error:
        raise Unavailable(f"{_FILE} cannot be read: {error.strerror}") from error
    text = content.decode("ascii", "replace").strip()
    match text.split():
        case [number, mark] if number.isdecimal():
            return int(number), mark
        case [version, *_] if version.startswith("v"):
            raise NotSupported(f"{_FILE} has format {version:.20}, a newer one: run the release that wrote it")
    raise Corrupt(f"{_FILE} holds {text!r:.40}; expected a number and a mark. Restore it, or join under another name")


async def _write(env: Env, ceiling: int, mark: str) -> None:
    temporary = f"{_FILE}.tmp"
    try:
        file = env.disk.open(temporary, create=True)
        try:
            file.truncate(0)
            file.append(f"{ceiling} {mark}\n".encode())
            await file.sync()
        finally:
            file.close()
        env.disk.rename(temporary, _FILE)
        await env.disk.sync_dir("")
    except OSError as error:
        env.events.publish("disk_failed", what="incarnation", error=str(error))
        env.fatal(f"the incarnation could not be written: {error}")
        raise Unavailable(f"the incarnation could not be written: {error.strerror}", definite=False) from error


class History:
    """The events of one node in its log."""

    def __init__(self, wal: Wal) -> None:
        self._wal = wal
        self._since_snapshot = 0

    def load(self, cache: RingCache) -> View | None:
        """The last view that was saved, ``None`` for a new node.

        Raises :class:`Corrupt`, and :class:`NotSupported` for records of another format.
        """
        view: View | None = None
        for record in self._wal.records(GROUP):
            if record.kind not in (EVENT, SNAPSHOT):
                raise NotSupported(
                    f"record {record.index} of the membership log is of kind {record.kind}, which this release does "
                    "not know: run the release that wrote it"
                )
            try:
                wire = msgpack.unpackb(record.payload)
                if record.kind == SNAPSHOT:
                    view = View.from_wire(wire, cache)
                    self._since_snapshot = 0
                elif view is not None:
                    view = apply(view, NodeEvent.from_wire(wire))
                    self._since_snapshot += 1
            except (ValueError, Fenced) as error:
                raise Corrupt(f"record {record.index} of the membership log cannot be read: {error}") from error
        return view

    def append_event(self, event: NodeEvent, view: View) -> None:
        """``view``: the one that ``event`` leads to. Durable after :meth:`sync`; raises :class:`Unavailable`."""
        self._since_snapshot += 1
        if self._since_snapshot >= EVENTS_PER_SNAPSHOT or not self._wal.last_index(GROUP):
            self.append_view(view)
        else:
            self._append(event.to_wire(), EVENT)

    def append_view(self, view: View) -> None:
        """A snapshot: what was before it is not needed any more."""
        index = self._append(view.to_wire(), SNAPSHOT)
        self._wal.truncate_prefix(GROUP, index)
        self._since_snapshot = 0

    async def sync(self) -> None:
        await self._wal.sync()

    def _append(self, wire: Any, kind: int) -> int:
        index = self._wal.last_index(GROUP) + 1
        self._wal.append(GROUP, 0, index, msgpack.packb(wire), kind)
        return index

"""What goes in and out between one group's core and its driver. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gostore.consensus.configuration import NOBODY, Configuration
from gostore.consensus.messages import CONFIGURATION, ORIGIN, Chunk, Entry, Message, Point

FOLLOWER: Final = "follower"
PRECANDIDATE: Final = "pre-candidate"
CANDIDATE: Final = "candidate"
LEADER: Final = "leader"


@dataclass(frozen=True, slots=True)
class HardState:
    """What a replica must not forget. ``commit`` is a hint: an older one only makes the start slower."""

    term: int = 0
    vote: str | None = None
    commit: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """A role in a term, and who leads as far as is known."""

    role: str
    term: int
    leader: str | None


@dataclass(frozen=True, slots=True)
class ReadState:
    """The answer to a read. ``index``: it may be read now; None: it failed, ask again (definite: nothing happened)."""

    context: int
    index: int | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state frozen for a follower: the one after ``point``; ``chunks`` of at most ``CHUNK_SIZE_BYTES_MAX`` bytes."""

    point: Point
    configuration: Configuration
    chunks: Iterator[bytes]


class Storage(Protocol):
    """What the core reads of what its driver has written. Both calls return at once.

    What was handed out for writing is visible here when :meth:`Raft.ready` is called the next time, synced or not.
    """

    def entries(self, first: int, last: int) -> Iterable[Entry]:
        """The entries ``first`` .. ``last`` in order; fewer if that is easier, but at least one.

        The core asks only for what it handed out and what is not below its start. Raises ``Corrupt``.
        """
        ...

    def snapshot(self) -> Snapshot | None:
        """The applied state of this moment; None when there is no room for one more reader: it will ask again."""
        ...


@dataclass(frozen=True, slots=True)
class Restored:
    """What a replica finds at its start, or what a new one begins with.

    The entries up to index ``last`` follow ``start``, the point of the last snapshot, where ``configuration`` is in
    force. Of them only this is told: ``runs``, (first index, term) for each change of the term, and the
    ``configurations`` among them, with their indices. The state machine is at ``start`` too. The first members of a new
    group begin with the same configuration at ``ORIGIN``; who comes later begins with none, and is told.

    A member that has lost its log must not come back under its name: it may have voted, and acknowledged entries. It is
    removed, and comes in under another one. A replica that was removed, by a configuration that is committed, may
    forget its log and be added again, but has to keep the term and the vote.
    """

    hard_state: HardState = HardState()
    start: Point = ORIGIN
    configuration: Configuration = NOBODY
    last: int = 0
    runs: Sequence[tuple[int, int]] = ()
    configurations: Sequence[tuple[int, Configuration]] = ()

    @classmethod
    def of(
        cls, hard_state: HardState, start: Point, configuration: Configuration, entries: Iterable[Entry]
    ) -> Restored:
        """What ``entries`` come to. Raises ``ValueError`` unless they follow ``start`` and their terms never fall."""
        last, runs, configurations = start, [], []
        for entry in entries:
            if entry.index != last.index + 1 or entry.term < last.term:
                raise ValueError(f"entry {entry.index} of term {entry.term} cannot follow {last}")
            if entry.term != last.term:
                runs.append((entry.index, entry.term))
            if entry.kind == CONFIGURATION:
                configurations.append((entry.index, Configuration.unpack(entry.payload)))
            last = Point(entry.index, entry.term)
        return cls(hard_state, start, configuration, last.index, runs, configurations)


@dataclass(frozen=True, slots=True)
class Ready:
    """Work for the driver. *Persist before send*, in this order:

    1. Send ``messages``. They promise nothing: entries and chunks of a leader (which may sync its own log at the same
       time, for it does not count itself before ``persisted``), its heartbeats and handing over, questions about a vote
       that would be (``pre``), and what concerns reads.
    2. Write, in this order: ``hard_state``; ``chunks`` (number 0 begins a snapshot and voids one that is not complete;
       the ``done`` one completes it: then it stands for the whole log, and all entries before are void);
       ``truncate_from`` (the entries from this index on are void); ``entries``.
    3. After a ``done`` chunk, make the state machine what the chunks say. Apply ``committed`` in order (they may be
       applied before they are synced here: a quorum has them). Then answer ``reads``.
    4. When everything up to here *and of every Ready before* is on the medium: send ``messages_synced`` (they promise a
       vote, or to hold entries), and call ``persisted(number)``. If not ``must_sync``, there is nothing to wait for:
       send them at once; the call is not needed.

    A crash in between is as if all that was not synced had not happened. ``status`` is set when the role, the term
    or the leader has changed. ``number`` counts up from 1.
    """

    number: int
    messages: tuple[tuple[str, Message], ...]
    hard_state: HardState | None
    chunks: tuple[Chunk, ...]
    truncate_from: int | None
    entries: tuple[Entry, ...]
    committed: tuple[Entry, ...]
    reads: tuple[ReadState, ...]
    messages_synced: tuple[tuple[str, Message], ...]
    status: Status | None
    must_sync: bool

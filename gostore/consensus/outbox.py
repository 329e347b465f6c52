"""What the core has for its driver, collected until it asks; and what of it is on the medium. Pure."""

from __future__ import annotations

from typing import Final

from gostore.consensus.log import RaftLog
from gostore.consensus.messages import Chunk, Message
from gostore.consensus.questions import Questions
from gostore.consensus.ready import HardState, Ready, Status

COMMIT_HINT_ENTRIES: Final = 1024
"""The commit index is written with a term or a vote, and whenever it is so much ahead of the written one."""


class Outbox:
    """``messages`` may go at once, ``messages_synced`` when all that was handed out with and before them is written."""

    def __init__(self, hard: HardState, status: Status) -> None:
        self.messages: list[tuple[str, Message]] = []
        self.messages_synced: list[tuple[str, Message]] = []
        self.chunks: list[Chunk] = []
        self._number = 0
        self._written = 0  # the last Ready with something to write
        self._synced = 0
        self._hard = hard
        self._hard_number = 0  # the Ready with it
        self._status = status

    def send(self, to: str, message: Message) -> None:
        self.messages.append((to, message))

    def send_synced(self, to: str, message: Message) -> None:
        self.messages_synced.append((to, message))

    def ready(
        self, log: RaftLog, role: str, term: int, leader: str | None, vote: str | None, questions: Questions
    ) -> Ready | None:
        """Everything that there is, and the next committed entries; None: nothing."""
        before, hard = self._status, self._hard
        changed = before.role != role or before.term != term or before.leader != leader
        hardens = hard.term != term or hard.vote != vote or log.committed >= hard.commit + COMMIT_HINT_ENTRIES
        writes = bool(hardens or self.chunks or log.unwritten)
        # Asked after everything that happens, and most often there is nothing: that must cost next to nothing.
        if not (
            writes
            or changed
            or self.messages
            or self.messages_synced
            or log.applied < log.committed
            or questions.answerable(log.applied)
        ):
            return None
        committed = tuple(log.next_committed())
        reads = questions.take(log.applied)
        to_write = None
        if hardens:
            # It is written before what this Ready truncates, appends and installs, and may be all that a crash leaves:
            # so it speaks of what is there already.
            installs = any(chunk.done for chunk in self.chunks)
            to_write = HardState(term, vote, hard.commit if installs else min(log.committed, log.handed))
        status = Status(role, term, leader) if changed else None
        self._number += 1
        truncate_from, entries = log.hand_out(self._number)
        if writes:
            self._written = self._number
        if to_write is not None:
            self._hard, self._hard_number = to_write, self._number
        ready = Ready(
            number=self._number,
            messages=tuple(self.messages),
            hard_state=to_write,
            chunks=tuple(self.chunks),
            truncate_from=truncate_from,
            entries=entries,
            committed=committed,
            reads=reads,
            messages_synced=tuple(self.messages_synced),
            status=status,
            must_sync=self._written > self._synced,
        )
        self.messages, self.messages_synced, self.chunks = [], [], []
        self._status = status or before
        if not ready.must_sync:
            log.persisted(self._number)
        return ready

    def persisted(self, number: int) -> bool:
        """Whether that is news."""
        assert number <= self._number, f"{number} of {self._number}"
        if number <= self._synced:
            return False
        self._synced = number
        return True

    def holds(self, term: int, vote: str) -> bool:
        """Whether this vote is on the medium."""
        return (self._hard.term, self._hard.vote) == (term, vote) and self._synced >= self._hard_number

"""Intents: what a writer says in db before it stores chunks, so that nobody collects them before the header names them.

An intent is an object of the container ``fs.intents`` with the key ``"<directory id>/<id>"``, in the same shard as the
header to come. It lists the chunks that its writer is about to store; a growing file's intent is extended before each
batch. It ends in one of two ways, and db decides which:

* *consumed*: the header's commit reads it and deletes it in the same transaction. From one moment to the next the
  chunks are referenced by the header instead of the intent; there is no moment at which nothing references them.
* *given up*: by its writer, or by anybody after the writer died. The header's commit, should it still come, then finds
  the intent gone and fails; so a header never names chunks that may have been collected.

No clock decides that a writer is dead. The writer's node keeps a table of the intents that it works on; whoever wants
to know asks that node. A node that does not know the intent will never consume it (a restarted node has an empty
table); of a node that is not online it may be untrue, but giving the intent up is safe in any case: it costs a slow
writer its write, never a file its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gostore.core.errors import Conflict, Fenced, GoStoreError, Unavailable
from gostore.core.keyvalue import KeyValue, PointRead, Read, Write
from gostore.services.fs.directory import INTENTS, entry_key
from gostore.services.fs.header import Chunk, chunks_to_value
from gostore.services.fs.transactions import Transactions

INTENTS_OPEN_MAX: Final = 1024
"""Writes with chunks under way on one node; more are refused."""


@dataclass(slots=True, eq=False)
class Intent:
    """A write under way. ``version``: of the object in db. ``doubtful``: a commit that needed it has failed."""

    key: str
    version: int
    chunks: list[Chunk] = field(default_factory=list)
    doubtful: bool = False


class Intents:
    """The intents of one node."""

    def __init__(self, node: str, kv: KeyValue, transactions: Transactions) -> None:
        self._node = node
        self._kv = kv
        self._transactions = transactions
        self._open: dict[str, Intent] = {}

    def __len__(self) -> int:
        return len(self._open)

    def known(self, key: str) -> bool:
        """Whether this node still works on an intent; once False for a key, then for ever."""
        return key in self._open

    async def open(self, directory_id: str, chunks: Sequence[Chunk]) -> Intent:
        """Commit an intent to store ``chunks``. Raises ``Unavailable`` when too many are open."""
        if len(self._open) >= INTENTS_OPEN_MAX:
            raise Unavailable(f"{self._node} has {INTENTS_OPEN_MAX} writes under way; try again")
        intent = Intent(entry_key(directory_id, self._transactions.new_id()), 0, list(chunks))
        # Known before it can be seen in db: nobody may take it for a dead writer's.
        self._open[intent.key] = intent
        try:
            intent.version = await self._commit(intent, 0)
        except BaseException:
            self._open.pop(intent.key, None)
            raise
        return intent

    async def extend(self, intent: Intent, chunks: Sequence[Chunk]) -> None:
        """Add chunks, before they are stored. Raises ``Fenced`` when the intent was given up by somebody else."""
        intent.chunks.extend(chunks)
        try:
            intent.version = await self._commit(intent, intent.version)
        except Conflict:
            raise _given_up(intent) from None

    async def _commit(self, intent: Intent, version: int) -> int:
        value = {"node": self._node, "chunks": chunks_to_value(intent.chunks)}
        read = PointRead(INTENTS, intent.key, version)
        return (await self._transactions.commit([read], [Write("set", INTENTS, intent.key, value)])).version

    async def consume(self, intent: Intent) -> tuple[Read, Write]:
        """The part of the header's transaction that ends the intent. Raises ``Fenced`` when it is gone already."""
        if intent.doubtful:
            found = await self._kv.get(INTENTS, intent.key)
            if found.version != intent.version:
                raise _given_up(intent)
        intent.doubtful = True
        return PointRead(INTENTS, intent.key, intent.version), Write("delete", INTENTS, intent.key)

    def consumed(self, intent: Intent) -> None:
        """The header's commit went through."""
        self._open.pop(intent.key, None)

    async def give_up(self, intent: Intent) -> None:
        """The write failed: its chunks may be collected. What db refuses now, a collection does later."""
        self._open.pop(intent.key, None)
        try:
            await self._transactions.commit([], [Write("delete", INTENTS, intent.key)])
        except GoStoreError:
            # Nobody knows the intent any more: the next collection gives it up.
            return


def _given_up(intent: Intent) -> Fenced:
    return Fenced(f"the intent {intent.key} was given up, because its writer seemed dead; write the file again")

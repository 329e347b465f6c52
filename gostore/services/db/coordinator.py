"""Transactions across shards, at the primary of the shard that coordinates them, and at those that take part.

The driver of a transaction logs ``begin`` in its own shard (which validates and locks there), lets the other shards
log ``prepare`` at the same time, logs the decision, and tells it to the others until each has executed it; then it is
forgotten. The caller is answered as soon as the decision is committed and executed, or its time is over.

What happens when a primary dies in between:

* the coordinator's, before the decision: its successor finds a pending transaction that nobody drives, and logs the
  decision to abort. A driver that was only slow finds this decision in the log and obeys;
* the coordinator's, after the decision: its successor goes on telling it;
* a participant's: the locks are part of its state, so its successor has them. A shard whose transaction stays prepared
  for :data:`IN_DOUBT_S` asks the coordinator. The answer is an entry of the coordinator's log, never the memory of
  a node that may have been deposed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from gostore.core.errors import GoStoreError, Timeout, Unavailable
from gostore.env import Env
from gostore.services.db.machine import Outcome
from gostore.services.db.replication import together

if TYPE_CHECKING:
    from gostore.services.db.shard import Shard, Shards

PREPARE_TIMEOUT_S: Final = 3.0
"""A transaction that is not prepared everywhere in this time is aborted."""

DECIDE_TIMEOUT_S: Final = 5.0
"""For one attempt to log or tell a decision."""

IN_DOUBT_S: Final = 1.0
"""A participant asks so long after it prepared, and then again and again. Must leave the driver time to decide."""

DOUBTS_ASKED_MAX: Final = 32
"""Questions to one coordinator at a time; the others wait for the next round."""

PAUSE_S: Final = (0.05, 1.0)
"""Between attempts to tell a decision: from, doubling, to."""

DRIVEN_MAX: Final = 1024
"""Transactions one shard drives at a time; more are refused as unavailable."""


class Coordinator:
    """The part of a shard that speaks with other shards."""

    def __init__(self, env: Env, shard: Shard, shards: Shards) -> None:
        self._env = env
        self._shard = shard
        self._shards = shards
        self._driven: dict[str, None] = {}
        self._finishing: dict[str, asyncio.Task[dict[int, int]]] = {}
        self._decided: dict[str, asyncio.Event] = {}
        self._asking = False
        self._resolving: dict[str, int] = {}  # transaction in doubt -> whom it asks

    # driving

    async def coordinate(self, request: Any, parts: list[Any], deadline_s: float) -> list[Any]:
        """Commit ``parts``, a list of [shard, reads, writes], the first of them this one's.

        Returns the outcome and [[shard, version], ...]: a shard that has not executed the decision in time is missing.
        """
        if len(self._driven) >= DRIVEN_MAX:
            raise Unavailable(f"shard {self._shard.number} drives {DRIVEN_MAX} transactions already: try again later")
        # A task of the node, so that it goes on when the caller's time is over.
        task = self._env.tasks.start(
            self._drive(request, parts, deadline_s), name=f"db-transaction-{self._shard.number}"
        )
        try:
            async with asyncio.timeout_at(deadline_s):
                result: list[Any] | GoStoreError = await asyncio.shield(task)
        except TimeoutError:
            raise Timeout("the transaction was not decided in time: repeat it with its request id") from None
        if isinstance(result, GoStoreError):
            raise result
        return result

    async def _drive(self, request: Any, parts: list[Any], deadline_s: float) -> list[Any] | GoStoreError:
        try:
            return await self._run(request, parts, deadline_s)
        except GoStoreError as error:
            return error

    async def _run(self, request: Any, parts: list[Any], deadline_s: float) -> list[Any]:
        (_, reads, writes), *others = parts
        shards = [part[0] for part in others]
        generation = self._shard.replication.status().generation
        command = ["begin", request, reads, writes, shards, generation]
        outcome = await self._shard.propose(command, deadline_s)
        if outcome[0] == "pending":
            return [await self._await_outcome(request, outcome[1], deadline_s), []]
        if outcome[0] != "begun":
            return [outcome, [[self._shard.number, outcome[1]]] if outcome[0] == "ok" else []]
        transaction = outcome[1]
        self._driven[transaction] = None
        try:
            refused = await self._prepare_all(transaction, others, deadline_s)
            decide = ["decide", transaction, refused is None]
            decided = await self._shard.propose(decide, self._now() + DECIDE_TIMEOUT_S)
        finally:
            del self._driven[transaction]
        finishing = self._finish(transaction)
        if not decided[1]:
            return [refused or ["conflict", "", "", "was aborted when its coordinator changed", False], []]
        try:
            async with asyncio.timeout_at(deadline_s):
                versions = await asyncio.shield(finishing)
        except TimeoutError:
            versions = {}
        return [["ok", decided[2]], [[self._shard.number, decided[2]], *map(list, versions.items())]]

    async def _prepare_all(self, transaction: str, others: list[Any], deadline_s: float) -> Outcome | None:
        """Ask all shards at the same time; the first refusal, or None."""
        until_s = min(deadline_s, self._now() + PREPARE_TIMEOUT_S)
        votes = await together(
            self._env,
            f"db-prepare-{self._shard.number}",
            (self._prepare(transaction, part, until_s) for part in others),
        )
        return next((vote for vote in votes if vote[0] != "ok"), None)

    async def _prepare(self, transaction: str, part: list[Any], deadline_s: float) -> Outcome:
        shard, reads, writes = part
        try:
            args = [transaction, self._shard.number, reads, writes]
            vote: Outcome = await self._shards.call(shard, "prepare", args, deadline_s)
        except GoStoreError as error:
            # Whether it is prepared there or not: the decision will be to abort.
            return ["error", Unavailable.code, f"shard {shard} did not prepare: {error.message}"]
        return vote

    async def _await_outcome(self, request: Any, transaction: str, deadline_s: float) -> Outcome:
        """The request was in the log already; somebody drives it."""
        decided = self._decided.setdefault(transaction, asyncio.Event())
        client, sequence, *_ = request
        while (outcome := self._shard.machine.outcome_of(client, sequence)) is not None and outcome[0] == "pending":
            try:
                async with asyncio.timeout_at(deadline_s):
                    await decided.wait()
            except TimeoutError:
                raise Timeout("the transaction is not decided yet: repeat it with its request id") from None
        return outcome or ["forgotten"]

    # deciding

    def notice(self, what: str, transaction: Any, outcome: Outcome) -> None:
        """An entry of two-phase commit was applied here."""
        if what == "decide":
            event = self._decided.pop(transaction, None)
            if event is not None:
                event.set()
        elif outcome[0] in ("ok", "begun"):
            self._watch_doubts()

    def serving(self) -> None:
        """This node has become the primary: end what its predecessor left."""
        for transaction, entry in self._shard.machine.coordinated.items():
            if entry.committed is not None:
                self._recovered(transaction, entry.committed)
                self._finish(transaction)
            elif transaction not in self._driven:
                self._env.tasks.start(self._abandon(transaction), name=f"db-abort-{self._shard.number}")
        self._watch_doubts()

    async def _abandon(self, transaction: str) -> None:
        """Abort a transaction whose driver is gone."""
        try:
            await self._decide_undriven(transaction, self._now() + DECIDE_TIMEOUT_S)
        except GoStoreError as error:
            self._env.log.info("%s is still pending: %s", transaction, error.message)
            return  # whoever serves next begins again; a participant in doubt may ask before
        if transaction in self._shard.machine.coordinated and self._shard.replication.role == "primary":
            self._finish(transaction)

    async def _decide_undriven(self, transaction: str, deadline_s: float) -> Outcome:
        """Abort what is not decided yet; what stands."""
        entry = self._shard.machine.coordinated.get(transaction)
        pending = entry is not None and entry.committed is None
        outcome = await self._shard.propose(["decide", transaction, False], deadline_s)
        if pending:
            self._recovered(transaction, outcome[1])
        return outcome

    def _recovered(self, transaction: str, committed: bool) -> None:
        self._env.events.publish(
            "transaction_recovered",
            shard=self._shard.number,
            transaction=transaction,
            outcome="commit" if committed else "abort",
        )

    def _finish(self, transaction: str) -> asyncio.Task[dict[int, int]]:
        """Tell the decision to all shards until each has executed it, then forget it. Once at a time."""
        task = self._finishing.get(transaction)
        if task is None:
            name = f"db-finish-{self._shard.number}"
            task = self._finishing[transaction] = self._env.tasks.start(self._tell_all(transaction), name=name)
        return task

    async def _tell_all(self, transaction: str) -> dict[int, int]:
        told: dict[int, int] = {}
        try:
            while (entry := self._shard.machine.coordinated.get(transaction)) is not None:
                commit = entry.committed
                if commit is None:
                    break
                left = [shard for shard in entry.shards if shard not in told]
                versions = await together(
                    self._env,
                    f"db-decide-{self._shard.number}",
                    (self._tell(shard, transaction, commit) for shard in left),
                )
                told.update(
                    (shard, version) for shard, version in zip(left, versions, strict=True) if version is not None
                )
                if len(told) == len(entry.shards):
                    # Nobody need wait for that.
                    self._env.tasks.start(self._forget(transaction), name=f"db-forget-{self._shard.number}")
                    break
                if self._shard.replication.role != "primary":
                    break  # whoever serves next begins again
                # It lost the lead and has it again: whoever wanted to begin again meanwhile has joined this task.
        finally:
            # Not later, when the task is seen to have ended: nobody may join it after its last look at the role.
            del self._finishing[transaction]
        return {shard: version for shard, version in told.items() if version}

    async def _tell(self, shard: int, transaction: str, commit: bool) -> int | None:
        """The version of what was written there (0: it had done it before); None when this node does not serve."""
        pause_s = PAUSE_S[0]
        while self._shard.replication.role == "primary":
            try:
                outcome = await self._shards.call(
                    shard, "decide", [transaction, commit], self._now() + DECIDE_TIMEOUT_S
                )
                return int(outcome[2])
            except GoStoreError as error:
                self._env.log.debug("shard %d was not told of %s: %s", shard, transaction, error.message)
            await asyncio.sleep(pause_s * self._env.rng.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, PAUSE_S[1])
        return None

    async def _forget(self, transaction: str) -> None:
        try:
            await self._shard.propose(["forget", transaction], self._now() + DECIDE_TIMEOUT_S)
        except GoStoreError as error:
            # Whoever serves next tells and forgets it again.
            self._env.log.debug("%s is not forgotten: %s", transaction, error.message)

    async def decision(self, transaction: str, deadline_s: float) -> list[Any]:
        """For a participant in doubt: ["pending"] while it is driven, else ["decided", commit, index], from the log."""
        if transaction in self._driven:
            return ["pending"]
        outcome = await self._decide_undriven(transaction, deadline_s)
        if transaction in self._shard.machine.coordinated:
            self._finish(transaction)
        return outcome

    # in doubt

    def _watch_doubts(self) -> None:
        if not self._asking and self._shard.machine.prepared:
            self._asking = True
            self._env.tasks.start(self._resolve_doubts(), name=f"db-doubts-{self._shard.number}")

    def _doubts(self) -> dict[str, int]:
        """Transaction -> its coordinator, for those whose driver is not here."""
        prepared = self._shard.machine.prepared
        return {name: entry.coordinator for name, entry in prepared.items() if name not in self._driven}

    async def _resolve_doubts(self) -> None:
        """While this node serves the shard: end what was in doubt already in the round before."""
        before: dict[str, int] = {}
        try:
            while self._shard.machine.prepared and self._shard.replication.role in ("primary", "recovering"):
                doubts = self._doubts()
                for transaction, coordinator in doubts.items():
                    # No round waits for its answers: who asks a coordinator that is down must not delay the others.
                    asked = sum(other == coordinator for other in self._resolving.values())
                    if transaction in before and transaction not in self._resolving and asked < DOUBTS_ASKED_MAX:
                        self._resolving[transaction] = coordinator
                        self._env.tasks.start(
                            self._end_doubt(transaction, coordinator), name=f"db-doubt-{self._shard.number}"
                        )
                before = doubts
                await asyncio.sleep(IN_DOUBT_S * self._env.rng.uniform(0.75, 1.0))
        finally:
            self._asking = False

    async def _end_doubt(self, transaction: str, coordinator: int) -> None:
        try:
            if coordinator == self._shard.number:
                await self._abandon(transaction)
            else:
                await self._resolve(transaction, coordinator)
        finally:
            del self._resolving[transaction]

    async def _resolve(self, transaction: str, coordinator: int) -> None:
        try:
            until_s = self._now() + DECIDE_TIMEOUT_S
            answer = await self._shards.call(coordinator, "decision", [transaction], until_s)
            if answer[0] == "decided":
                await self._shard.propose(["decide", transaction, answer[1]], self._now() + DECIDE_TIMEOUT_S)
        except GoStoreError as error:
            self._env.log.debug("%s stays in doubt: %s", transaction, error.message)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

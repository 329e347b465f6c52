"""Transactions across shards, at the primary of the shard that coordinates them, and at those that take part.

The driver of a transaction logs ``begin`` in its own shard (which validates and locks there), lets the other shards
log ``prepare`` at the same time, logs the decision, and tells it to the others. The caller is answered as soon as the
decision is committed and executed, or its time is over.

Presumed abort (Mohan, Lindsay and Obermarck, "Transaction management in the R* distributed database management
system", TODS 1986). A decision to commit is told until each shard has executed it, and only then forgotten. One to
abort is told once, and forgotten without waiting for anybody: whoever missed it asks, and a transaction that its
coordinator does not know was aborted. Otherwise a shard that lacks its majority, which is why transactions are
aborted, would let them pile up at all who coordinate some with it.

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
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from gostore.core.errors import GoStoreError, Timeout, Unavailable
from gostore.env import Env
from gostore.services.db.machine import Outcome
from gostore.services.db.replication import together

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gostore.services.db.shard import Shard, Shards

PREPARE_TIMEOUT_S: Final = 3.0
"""A transaction that is not prepared everywhere in this time is aborted."""

DECIDE_TIMEOUT_S: Final = 5.0
"""For one attempt to log or tell a decision."""

IN_DOUBT_S: Final = 1.0
"""A participant asks so long after it prepared, and then again and again. Must leave the driver time to decide."""

DOUBTS_ASKED_MAX: Final = 128
"""Questions to one coordinator at a time; the others wait for the next round."""

PAUSE_S: Final = (0.05, 1.0)
"""Between attempts to tell or to forget a decision: from, doubling, to."""

COORDINATED_MAX: Final = 1024
"""Transactions that one shard coordinates and has not forgotten; more are refused as unavailable."""

TELLERS_MAX: Final = 32
"""Tasks that tell one shard what was decided; a shard that does not answer has one."""

FORGOTTEN_MAX: Final = 64
"""Decisions forgotten at a time; the others wait for the next round."""


@dataclass(slots=True)
class Telling:
    """A committed transaction while it is told; ``left``: to whom; ``ended``: no caller need wait for more versions."""

    left: set[int]
    versions: dict[int, int] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Coordinator:
    """The part of a shard that speaks with other shards."""

    def __init__(self, env: Env, shard: Shard, shards: Shards) -> None:
        self._env = env
        self._shard = shard
        self._shards = shards
        self._beginning = 0  # whose ``begin`` may not be applied yet
        self._driven: dict[str, None] = {}
        self._telling: dict[str, Telling] = {}
        self._untold: defaultdict[int, dict[str, bool]] = defaultdict(dict)  # shard -> transaction -> committed
        self._tellers: Counter[int] = Counter()
        self._silent: set[int] = set()  # shards that did not answer when they were told something
        self._ended: dict[str, None] = {}  # to be forgotten
        self._forgetting = False
        self._decided: dict[str, asyncio.Event] = {}
        self._asking = False
        self._resolving: dict[str, int] = {}  # transaction in doubt -> whom it asks

    # driving

    async def coordinate(self, request: Any, parts: list[Any], deadline_s: float) -> list[Any]:
        """Commit ``parts``, a list of [shard, reads, writes], the first of them this one's.

        Returns the outcome and [[shard, version], ...]: a shard that has not executed the decision in time is missing.
        """
        self._check_room(request)
        self._beginning += 1
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

    def _check_room(self, request: Any) -> None:
        """Raises ``Unavailable`` when too many transactions have not ended.

        Decided here, and not where ``begin`` is applied: replicas of another release, or one that replays an old log,
        would apply the same entry differently. The bound holds all the same, as only a driver decides to commit.
        """
        if self._beginning + len(self._shard.machine.coordinated) < COORDINATED_MAX or not self._serves():
            return
        if request is not None and self._shard.machine.outcome_of(request[0], request[1]) is not None:
            return  # it begins nothing, and has a right to its outcome
        raise Unavailable(
            f"shard {self._shard.number} coordinates {COORDINATED_MAX} transactions that have not ended everywhere: "
            "try again later; if that does not help, bring back the nodes of the shards that lack their majority"
        )

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
        try:
            outcome = await self._shard.propose(command, deadline_s)
        finally:
            self._beginning -= 1
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
        telling = self._finish(transaction)
        if not decided[1]:
            return [refused or ["conflict", "", "", "was aborted when its coordinator changed", False], []]
        versions = [[self._shard.number, decided[2]]]
        if telling is not None:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await telling.ended.wait()
            except TimeoutError:
                pass
            versions += map(list, telling.versions.items())
        return [["ok", decided[2]], versions]

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
        """This node has become the primary: end what its predecessor left, or itself when it served before."""
        coordinated = self._shard.machine.coordinated
        for transaction in [name for name in self._telling if name not in coordinated]:
            self._telling.pop(transaction).ended.set()
        for transaction, telling in self._telling.items():
            self._tell_soon(transaction, telling.left, commit=True)
        self._start_forgetting()
        for transaction, entry in coordinated.items():
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
        if self._serves():
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

    # telling and forgetting

    def _serves(self) -> bool:
        return self._shard.replication.role == "primary"

    def _finish(self, transaction: str) -> Telling | None:
        """Tell what was decided, and forget it: an abort at once, a commit when every shard has executed it."""
        entry = self._shard.machine.coordinated.get(transaction)
        if entry is None or entry.committed is None or transaction in self._ended:
            return None
        telling = self._telling.get(transaction)
        if telling is not None:
            return telling
        if entry.committed and entry.shards:
            telling = self._telling[transaction] = Telling(set(entry.shards))
        else:
            self._forget(transaction)
        self._tell_soon(transaction, entry.shards, commit=entry.committed)
        return telling

    def _tell_soon(self, transaction: str, shards: Iterable[int], *, commit: bool) -> None:
        for shard in shards:
            self._untold[shard][transaction] = commit
            self._start_tellers(shard, 1)

    def _start_tellers(self, shard: int, wanted: int) -> None:
        most = 1 if shard in self._silent else TELLERS_MAX
        for _ in range(min(wanted, most - self._tellers[shard])):
            self._tellers[shard] += 1
            self._env.tasks.start(self._tell_shard(shard), name=f"db-decide-{self._shard.number}")

    async def _tell_shard(self, shard: int) -> None:
        """Tell a shard one decision after the other, while this node serves."""
        untold = self._untold[shard]
        pause_s = PAUSE_S[0]
        try:
            while untold and self._serves():
                transaction = next(iter(untold))
                version = await self._tell(shard, transaction, untold.pop(transaction))
                if version is not None:
                    self._told(transaction, shard, version)
                    pause_s = PAUSE_S[0]
                    if shard in self._silent:
                        self._silent.discard(shard)
                        self._start_tellers(shard, len(untold))
                    continue
                self._silent.add(shard)
                telling = self._telling.get(transaction)
                if telling is not None and shard in telling.left:
                    untold[transaction] = True
                # It would not hear of the aborts that wait either, and will ask for them.
                for name in [name for name, commit in untold.items() if not commit]:
                    del untold[name]
                if not untold or self._tellers[shard] > 1:
                    return  # one is enough to find out when it answers again
                await self._pause(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S[1])
            for name in untold:  # some are left when this node does not serve: whoever does next begins again
                if name in self._telling:
                    self._telling[name].ended.set()
        finally:
            # Not later, when the task is seen to have ended: nobody may rely on it after its last look at the role.
            self._tellers[shard] -= 1

    async def _tell(self, shard: int, transaction: str, commit: bool) -> int | None:
        """The version of what was written there (0: it had done it before); None when it did not answer."""
        try:
            outcome = await self._shards.call(shard, "decide", [transaction, commit], self._now() + DECIDE_TIMEOUT_S)
            return int(outcome[2])
        except GoStoreError as error:
            self._env.log.debug("shard %d was not told of %s: %s", shard, transaction, error.message)
        return None

    def _told(self, transaction: str, shard: int, version: int) -> None:
        telling = self._telling.get(transaction)
        if telling is None or shard not in telling.left:
            return
        telling.left.discard(shard)
        if version:
            telling.versions[shard] = version
        if not telling.left:
            del self._telling[transaction]
            telling.ended.set()
            self._forget(transaction)  # nobody need wait for that

    def _forget(self, transaction: str) -> None:
        self._ended[transaction] = None
        self._start_forgetting()

    def _start_forgetting(self) -> None:
        if self._ended and not self._forgetting:
            self._forgetting = True
            self._env.tasks.start(self._forget_all(), name=f"db-forget-{self._shard.number}")

    async def _forget_all(self) -> None:
        """Forget what has ended, while this node serves; one task, whatever the log does not take."""
        pause_s = PAUSE_S[0]
        try:
            while self._ended and self._serves():
                some = list(islice(self._ended, FORGOTTEN_MAX))
                forgotten = await together(
                    self._env, f"db-forget-{self._shard.number}", (self._forget_one(name) for name in some)
                )
                for name, done in zip(some, forgotten, strict=True):
                    if done:
                        del self._ended[name]
                if all(forgotten):
                    pause_s = PAUSE_S[0]
                else:
                    await self._pause(pause_s)
                    pause_s = min(2 * pause_s, PAUSE_S[1])
        finally:
            self._forgetting = False  # at once, as above

    async def _forget_one(self, transaction: str) -> bool:
        if transaction not in self._shard.machine.coordinated:
            return True  # an attempt that was given up, or another primary
        try:
            await self._shard.propose(["forget", transaction], self._now() + DECIDE_TIMEOUT_S)
        except GoStoreError as error:
            self._env.log.debug("%s is not forgotten: %s", transaction, error.message)
            return False
        return True

    async def _pause(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s * self._env.rng.uniform(0.5, 1.0))

    async def decision(self, transaction: str, deadline_s: float) -> list[Any]:
        """For a participant in doubt: ["pending"] while it is driven, else ["decided", commit, index], from the log."""
        if transaction in self._driven:
            return ["pending"]
        outcome = await self._decide_undriven(transaction, deadline_s)
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

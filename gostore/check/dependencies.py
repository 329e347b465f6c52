"""The direct serialization graph of transactions (Adya, Liskov & O'Neil, "Generalized isolation level definitions",
ICDE 2000, section 4.4), and what can be said without following a cycle.

Edges, each from the transaction that must come first:

* ``ww``: it wrote a version, the other wrote the next one of the same key;
* ``wr``: it wrote a version that the other read;
* ``rw``: it read a version that the other's write replaced (anti-dependency);
* ``rt``: it had returned before the other was invoked (only for *strict* serializability).

A range that was read counts as a read of every key in it: of those that were not there, as version 0; so phantoms are
anti-dependencies like others.

Everything that writes while the history is recorded has to be in it. Transactions of unknown outcome count once
somebody saw them: where a version was written by no transaction that is known to have committed, and exactly one of
unknown outcome can have written it, it was that one. Otherwise an unnamed writer stands for whoever it was (what was
there before the history began, say): its versions and their order are facts, too.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from gostore.check.cycles import Edge
from gostore.check.history import Outcome
from gostore.check.transactions import Access, Transaction


@dataclass(slots=True)
class Dependencies:
    """``names`` of the nodes; the graph; anomalies seen on the way as (name, text); ``doubts``: why "unknown"."""

    names: list[str]
    graph: dict[int, dict[int, dict[str, Edge]]] = field(default_factory=dict)
    anomalies: list[tuple[str, str]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def add(self, edge: Edge) -> None:
        if edge.source != edge.target:
            self.graph.setdefault(edge.source, {}).setdefault(edge.target, {}).setdefault(edge.kind, edge)

    @property
    def edges(self) -> int:
        return sum(len(kinds) for targets in self.graph.values() for kinds in targets.values())


class _Builder:
    """Builds the graph of one history; nodes are positions in the list of transactions, unnamed writers follow."""

    def __init__(self, transactions: Sequence[Transaction]) -> None:
        self.transactions = transactions
        self.result = Dependencies([t.name for t in transactions])
        self.committed = [t.outcome is Outcome.OK for t in transactions]
        self.writers: dict[str, dict[int, int]] = {}
        """key -> version -> node, of what was committed and is final."""
        self.passing: dict[tuple[str, int], int] = {}
        """(key, version) -> node: overwritten in the same transaction."""
        self.aborted: dict[tuple[str, int], int] = {}
        self.deleted: dict[str, list[int]] = {}
        self.unresolved: dict[str, list[int]] = {}
        """key -> nodes of unknown outcome that wanted to write it."""
        self.refused: dict[str, list[int]] = {}
        """key -> nodes that failed and would have written it, without a version."""

    def build(self, *, strict: bool) -> Dependencies:
        for node in range(len(self.transactions)):
            self._enter_writes(node)
        known = -1
        while known != sum(self.committed):  # who is found out to have committed has reads of its own
            known = sum(self.committed)
            for key, versions in self._versions_read().items():
                began_absent = 0 in versions and key not in self.deleted
                for version in sorted(versions):
                    if version:
                        self._find_writer(key, version, versions[version], began_absent=began_absent)
        self._add_version_order()
        for node, transaction in enumerate(self.transactions):
            if self.committed[node]:
                for read in self._reads(transaction):
                    self._add_read(node, read)
        if strict:
            for source, target in _real_time(self.transactions):
                self.result.add(Edge(source, target, "rt"))
        return self.result

    # who wrote what

    def _enter_writes(self, node: int) -> None:
        transaction = self.transactions[node]
        last: dict[str, int] = {}
        for write in transaction.writes:
            if write.version is None:
                self._enter_unversioned(node, write.key)
            elif transaction.outcome is Outcome.FAIL:
                self.aborted[write.key, write.version] = node
            else:
                # Whoever tells the version of its write has committed.
                self.committed[node] = True
                if write.key in last:
                    self.passing[write.key, min(last[write.key], write.version)] = node
                last[write.key] = max(last.get(write.key, 0), write.version)
        for key, version in last.items():
            self._install(node, key, version)

    def _enter_unversioned(self, node: int, key: str) -> None:
        match self.transactions[node].outcome:
            case Outcome.INFO:
                self.unresolved.setdefault(key, []).append(node)
            case Outcome.FAIL:
                self.refused.setdefault(key, []).append(node)
            case Outcome.OK:
                self.result.doubts.append(f"{self.result.names[node]} committed, but its version of {key} is unknown")

    def _install(self, node: int, key: str, version: int) -> None:
        versions = self.writers.setdefault(key, {})
        if versions.setdefault(version, node) != node:
            names = f"{self.result.names[versions[version]]} and {self.result.names[node]}"
            self.result.anomalies.append(("duplicate version", f"{names} both wrote version {version} of {key}"))
        if node < len(self.transactions) and key in self.transactions[node].deletes:
            self.deleted.setdefault(key, []).append(version)

    def _versions_read(self) -> dict[str, dict[int, int]]:
        """key -> version -> when the first committed transaction that read it had returned."""
        seen: dict[str, dict[int, int]] = {}
        for node, transaction in enumerate(self.transactions):
            if self.committed[node]:
                returned = sys.maxsize if transaction.returned is None else transaction.returned
                for read in transaction.reads:
                    versions = seen.setdefault(read.key, {})
                    versions[read.version or 0] = min(versions.get(read.version or 0, sys.maxsize), returned)
        return seen

    def _find_writer(self, key: str, version: int, seen: int, *, began_absent: bool) -> None:
        """Make sure that somebody is known to have written what was read, and seen at this position."""
        written = self.writers.get(key, {})
        if version in written or (key, version) in self.passing or (key, version) in self.aborted:
            return
        candidates = [node for node in self.unresolved.get(key, ()) if self.transactions[node].invoked < seen]
        there_before = version < min(written, default=version + 1) and not began_absent
        if len(candidates) == 1 and not there_before:
            self.committed[candidates[0]] = True
            self.unresolved[key].remove(candidates[0])
            self._install(candidates[0], key, version)
            return
        if not candidates and not there_before and key in self.refused:
            self.aborted[key, version] = self.refused[key][0]
            return
        if candidates:
            names = ", ".join(self.result.names[node] for node in candidates[:5])
            self.result.doubts.append(f"version {version} of {key} may be of a transaction of unknown outcome: {names}")
        elif not there_before:
            self.result.doubts.append(f"version {version} of {key} was read, and nobody is known to have written it")
        self.result.names.append(f"(unnamed writer of version {version} of {key})")
        self._install(len(self.result.names) - 1, key, version)

    # what follows from it

    def _add_version_order(self) -> None:
        self._order = {key: sorted(versions) for key, versions in self.writers.items()}
        for key, order in self._order.items():
            for before, after in pairwise(order):
                self.result.add(Edge(self.writers[key][before], self.writers[key][after], "ww", key, before, after))

    def _reads(self, transaction: Transaction) -> Iterator[Access]:
        """What it read, and what it saw not to be there."""
        yield from transaction.reads
        own = {access.key for access in (*transaction.reads, *transaction.writes)}
        for start, end in transaction.ranges:
            for key in self._order:
                if key not in own and start <= key and (end is None or key < end):
                    own.add(key)
                    yield Access(key, 0)

    def _add_read(self, node: int, read: Access) -> None:
        key, version = read.key, read.version or 0
        if version == 0 and key in self.deleted:
            # Nothing was there: before the first write, or after one of the deletions. Nobody can tell.
            self.result.doubts.append(f"{self.result.names[node]} found no {key}, which was also deleted")
            return
        writer = self.writers.get(key, {}).get(version)
        if writer is None and (writer := self.aborted.get((key, version))) is not None:
            text = f"{self.result.names[node]} read version {version} of {key}, written by the aborted "
            self.result.anomalies.append(("G1a", text + self.result.names[writer]))
            return
        order = self._order.get(key, [])
        if writer is None and (writer := self.passing.get((key, version))) not in (None, node):
            text = f"{self.result.names[node]} read version {version} of {key}, which {self.result.names[writer or 0]}"
            self.result.anomalies.append(("G1b", f"{text} itself replaced before it committed"))
        if writer is not None:
            self.result.add(Edge(writer, node, "wr", key, version, version))
        place = bisect_right(order, version)
        if place < len(order):
            self.result.add(Edge(node, self.writers[key][order[place]], "rw", key, version, order[place]))


def dependencies(transactions: Sequence[Transaction], *, strict: bool = False) -> Dependencies:
    """The graph of a history. ``strict``: with real-time edges."""
    return _Builder(transactions).build(strict=strict)


def _real_time(transactions: Sequence[Transaction]) -> Iterator[tuple[int, int]]:
    """Pairs (returned before, invoked after) whose transitive closure is the real-time order.

    ``latest`` holds the transactions that have returned and precede no other that has returned: edges from the others
    follow.
    """
    moments = [(t.invoked, False, node) for node, t in enumerate(transactions)]
    moments += [
        (t.returned, True, node)
        for node, t in enumerate(transactions)
        if t.returned is not None and t.outcome is Outcome.OK
    ]
    latest: list[int] = []
    for _, returns, node in sorted(moments):
        if returns:
            began = transactions[node].invoked
            latest = [other for other in latest if (transactions[other].returned or 0) > began]
            latest.append(node)
        else:
            yield from ((other, node) for other in latest)

"""Serializability of transactions, by cycles of dependencies.

A history is serializable when its direct serialization graph (``gostore.check.dependencies``) has no cycle; what kind
of cycle it has says which isolation level is broken (Adya, Liskov & O'Neil 2000; Kingsbury & Alvaro, "Elle", VLDB
2020):

========  ===========================================================  ==========================================
G0        a cycle of writes only (dirty write)                         not even read uncommitted (PL-1)
G1a       a committed transaction read what was aborted                not read committed (PL-2)
G1b       ... read a version that its writer itself replaced           not read committed (PL-2)
G1c       a cycle of writes and reads of them (circular information)   not read committed (PL-2)
G-single  a cycle with exactly one anti-dependency (lost update,       not snapshot isolation
          read skew)
G2        a cycle with two or more anti-dependencies (write skew)      not serializable (PL-3)
========  ===========================================================  ==========================================

A cycle that needs the order of real time has ``-realtime`` behind its name: the history is then not *strictly*
serializable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from gostore.check.cycles import Edge, components, edges_of, shortest_path
from gostore.check.dependencies import Dependencies, dependencies
from gostore.check.history import History
from gostore.check.transactions import Transaction, transactions_of

TRIES_MAX: Final = 500
"""Edges of one component from which a cycle of one kind is sought. More: shorter cycles in a badly broken history."""

SHOWN_MAX: Final = 10
"""Anomalies and doubts in a text."""

BREAKS: Final[dict[str, str]] = {
    "duplicate version": "versions are unique",
    "G0": "read uncommitted (PL-1)",
    "G1a": "read committed (PL-2)",
    "G1b": "read committed (PL-2)",
    "G1c": "read committed (PL-2)",
    "G-single": "snapshot isolation",
    "G2": "serializability (PL-3)",
}
"""Anomaly -> the weakest promise that it breaks."""

ALL_KINDS: Final = ("ww", "wr", "rw")


class _Sought(NamedTuple):
    """A kind of cycle: one edge ``begins`` it, the way back is made of ``kinds``, with one of ``again`` on it."""

    kinds: tuple[str, ...]
    begins: str
    again: str | None = None

    @property
    def closed(self) -> bool:
        """Whether the first edge is of the kinds of the others."""
        return self.begins in self.kinds


_SOUGHT: Final = (
    _Sought(("ww",), "ww"),  # G0
    _Sought(("ww", "wr"), "wr"),  # G1c
    _Sought(("ww", "wr"), "rw"),  # G-single
    _Sought(ALL_KINDS, "rw", "rw"),  # G2
)


class Serializable(StrEnum):
    SERIALIZABLE = "serializable"
    NOT = "not"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Anomaly:
    """``transactions`` in the order of the cycle; ``text`` says every step in words."""

    name: str
    transactions: tuple[str, ...]
    text: str

    @property
    def breaks(self) -> str:
        """The weakest promise that does not hold."""
        promise = BREAKS[self.name.removesuffix("-realtime")]
        return f"strict {promise}" if self.name.endswith("-realtime") else promise


@dataclass(frozen=True, slots=True)
class Serializability:
    """The judgement. ``doubts``: what could not be known, so that no anomaly means "unknown" and not "fine"."""

    verdict: Serializable
    transactions: int
    edges: int
    anomalies: tuple[Anomaly, ...]
    doubts: tuple[str, ...]

    @property
    def fine(self) -> bool:
        return self.verdict is Serializable.SERIALIZABLE

    def figures(self) -> dict[str, Any]:
        """For reports: how much there was, and which anomalies."""
        anomalies = list(dict.fromkeys(anomaly.name for anomaly in self.anomalies))
        return {"dependencies": self.edges, "anomalies": anomalies}

    def text(self) -> str:
        """The verdict, every anomaly with its cycle in words, and what could not be known."""
        says = {Serializable.NOT: "not serializable"}.get(self.verdict, self.verdict.value)
        lines = [f"{says}: {self.transactions} transactions, {self.edges} dependencies"]
        for anomaly in self.anomalies[:SHOWN_MAX]:
            lines.append(f"{anomaly.name}, so this is not {anomaly.breaks}:")
            lines += [f"  {line}" for line in anomaly.text.splitlines()]
        if len(self.anomalies) > SHOWN_MAX:
            lines.append(f"and {len(self.anomalies) - SHOWN_MAX} more anomalies")
        lines += [f"unknown: {doubt}" for doubt in self.doubts[:SHOWN_MAX]]
        return "\n".join(lines)

    __str__ = text


def check_serializable(history: History | Iterable[Transaction], *, strict: bool = False) -> Serializability:
    """Judge transactions. ``strict``: the order must also respect that of real time.

    Raises :class:`gostore.core.errors.BadRequest` for a history whose operations are no transactions.
    """
    transactions = transactions_of(history) if isinstance(history, History) else list(history)
    found = dependencies(transactions, strict=strict)
    anomalies = [Anomaly(name, (), text) for name, text in found.anomalies]
    anomalies += _cycles(found, ())
    if strict:
        anomalies += (a for a in _cycles(found, ("rt",)) if a.name.endswith("-realtime"))
    verdict = Serializable.NOT if anomalies else Serializable.UNKNOWN if found.doubts else Serializable.SERIALIZABLE
    return Serializability(verdict, len(transactions), found.edges, tuple(anomalies), tuple(found.doubts))


def _cycles(found: Dependencies, more: tuple[str, ...]) -> list[Anomaly]:
    """For each component and each anomaly the shortest cycle, if there is one. ``more``: further kinds, all needed."""
    cycles: list[list[Edge]] = []
    for sought in _SOUGHT:
        for inside in components(found.graph, (*sought.kinds, *more) if sought.closed else (*ALL_KINDS, *more)):
            cycles += filter(None, [_shortest(found, inside, sought, more)])
    explained = frozenset(edge.source for cycle in cycles for edge in cycle)
    for inside in components(found.graph, (*ALL_KINDS, *more)):
        if explained.isdisjoint(inside):
            # It has more edges than were tried, or (with ``more``) only cycles without: any cycle is a proof.
            first = next(edge for kind in ALL_KINDS for edge in edges_of(found.graph, inside, kind))
            back = shortest_path(found.graph, inside, first.target, first.source, (*ALL_KINDS, *more))
            cycles.append([first, *(back or ())])
    return [_anomaly(found, cycle) for cycle in cycles]


def _shortest(found: Dependencies, inside: frozenset[int], sought: _Sought, more: tuple[str, ...]) -> list[Edge] | None:
    """The shortest cycle of a component that begins with one edge of ``sought.begins``."""
    best: list[Edge] | None = None
    needed = sought.again or (more[0] if more else None)
    for tries, edge in enumerate(edges_of(found.graph, inside, sought.begins)):
        if tries == TRIES_MAX or (best is not None and len(best) == 2):
            break
        back = shortest_path(found.graph, inside, edge.target, edge.source, (*sought.kinds, *more), needed)
        if back is None or len(frozenset(e.source for e in back)) < len(back):
            continue  # a way that passes a node twice is two cycles, each of another kind
        cycle = [edge, *back]
        if (not more or any(e.kind in more for e in cycle)) and (best is None or len(cycle) < len(best)):
            best = cycle
    return best


def _anomaly(found: Dependencies, cycle: list[Edge]) -> Anomaly:
    kinds = [edge.kind for edge in cycle]
    name = ("G1c" if "wr" in kinds else "G0", "G-single", "G2")[min(kinds.count("rw"), 2)]
    if "rt" in kinds:
        name += "-realtime"
    lines = [_words(found.names, edge) for edge in cycle]
    return Anomaly(name, tuple(found.names[edge.source] for edge in cycle), "\n".join(lines))


def _words(names: list[str], edge: Edge) -> str:
    source, target = names[edge.source], names[edge.target]
    match edge.kind:
        case "ww":
            why = (
                f"{target} replaced version {edge.before} of {edge.key}, which {source} wrote, by version {edge.after}"
            )
        case "wr":
            why = f"{target} read version {edge.before} of {edge.key}, which {source} wrote"
        case "rw":
            seen = f"version {edge.before} of {edge.key}" if edge.before else f"no {edge.key}"
            why = f"{source} read {seen}, before {target} wrote version {edge.after}"
        case _:
            why = f"{source} had returned before {target} was invoked"
    return f"{source} is before {target} ({edge.kind}): {why}"

"""Transactions as a checker sees them: which versions they read, which they wrote.

In a history (model ``transactions``) each operation is one transaction. Its result, also when it failed or nobody
knows whether it did, may hold::

    {"reads": [["x", 3], ["y", 0]],      what it read: key, version; 0: there was nothing
     "writes": [["x", 7]],               what it wrote: key, version; null: it never learnt the version
     "deletes": ["z"],                   which of the keys it wrote it wrote by deleting them
     "ranges": [["a", "c"], ["d", null]]}  ranges of keys (end excluded) in which it saw what ``reads`` names, no more

Versions of a key are integers above 0 that grow in the order in which they were installed, as the log index does in db.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from gostore.check.history import Operation, Outcome
from gostore.core.errors import BadRequest

MODEL: Final = "transactions"


@dataclass(frozen=True, slots=True)
class Access:
    """A key and its version; None: unknown (of a write)."""

    key: str
    version: int | None


@dataclass(frozen=True, slots=True)
class Transaction:
    """One attempt. ``invoked`` and ``returned`` are positions, used for strict serializability only."""

    name: str
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    deletes: tuple[str, ...] = ()
    ranges: tuple[tuple[str, str | None], ...] = ()
    outcome: Outcome = Outcome.OK
    invoked: int = 0
    returned: int | None = None


def transactions_of(operations: Iterable[Operation]) -> list[Transaction]:
    """Raises :class:`BadRequest` that names the operation and what was expected."""
    return [transaction_of(operation) for operation in operations]


def transaction_of(operation: Operation) -> Transaction:
    """One of them."""
    name = f"T{operation.id}"
    result = operation.result if operation.result is not None else {}
    unknown = sorted(set(result) - {"reads", "writes", "deletes", "ranges"}) if isinstance(result, dict) else [result]
    if unknown:
        raise BadRequest(
            f"transaction {name}: expected a map of reads, writes, deletes and ranges, not {unknown!r:.100}"
        )
    reads = _accesses(name, "reads", result.get("reads", ()))
    if any(read.version is None for read in reads):
        raise BadRequest(f"transaction {name}: a read without a version says nothing; 0 stands for absent")
    return Transaction(
        name,
        reads,
        _accesses(name, "writes", result.get("writes", ())),
        tuple(str(key) for key in _list(name, "deletes", result.get("deletes", ()))),
        _ranges(name, result.get("ranges", ())),
        operation.outcome,
        operation.invoked,
        operation.returned if operation.outcome is Outcome.OK else None,
    )


def _list(name: str, what: str, given: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(given, list | tuple):
        raise BadRequest(f"transaction {name}: expected a list of {what}, not {given!r:.100}")
    return given


def _accesses(name: str, what: str, given: Any) -> tuple[Access, ...]:
    accesses = []
    for pair in _list(name, what, given):
        match pair:
            case [str(key), (int() | None) as version] if version is None or version >= 0:
                accesses.append(Access(key, version))
            case _:
                raise BadRequest(f"transaction {name}: {what} are pairs [KEY, VERSION], not {pair!r:.100}")
    return tuple(accesses)


def _ranges(name: str, given: Any) -> tuple[tuple[str, str | None], ...]:
    ranges = []
    for pair in _list(name, "ranges", given):
        match pair:
            case [str(start), (str() | None) as end]:
                ranges.append((start, end))
            case _:
                raise BadRequest(f"transaction {name}: ranges are pairs [START, END or null], not {pair!r:.100}")
    return tuple(ranges)

"""Judges of recorded histories: linearizability, serializability of transactions, invariants."""

from __future__ import annotations

from gostore.check.formats import FORMATS, read_history
from gostore.check.history import History, Operation, Outcome
from gostore.check.invariants import (
    Invariant,
    Judgement,
    Violation,
    Watch,
    judge_journal,
    lost_writes,
    standard_invariants,
    unequal_replicas,
)
from gostore.check.linearizability import Linearizability, Verdict, check_linearizable
from gostore.check.serializability import Serializability, Serializable, check_serializable
from gostore.check.transactions import MODEL as TRANSACTIONS
from gostore.check.transactions import Access, Transaction

__all__ = [
    "FORMATS",
    "TRANSACTIONS",
    "Access",
    "History",
    "Invariant",
    "Judgement",
    "Linearizability",
    "Operation",
    "Outcome",
    "Serializability",
    "Serializable",
    "Transaction",
    "Verdict",
    "Violation",
    "Watch",
    "check_linearizable",
    "check_serializable",
    "judge_journal",
    "lost_writes",
    "read_history",
    "standard_invariants",
    "unequal_replicas",
]

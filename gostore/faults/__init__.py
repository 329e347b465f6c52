"""Faults: their vocabulary, and the nemesis that draws schedules of them from a seed."""

from gostore.faults.nemesis import PROFILES, Nemesis, Step, draw
from gostore.faults.vocabulary import NO_FAULT, WORDS, Fault, Faults, Link, LinkFault, NodeLike, UnknownFault

__all__ = [
    "NO_FAULT", "PROFILES", "WORDS", "Fault", "Faults", "Link", "LinkFault", "Nemesis", "NodeLike", "Step",
    "UnknownFault", "draw",
]  # fmt: skip

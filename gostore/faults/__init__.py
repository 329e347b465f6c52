"""Faults: their vocabulary, and the nemesis that draws schedules of them from a seed."""

from gostore.faults.nemesis import PROFILES, Nemesis, Step, draw
from gostore.faults.vocabulary import NO_FAULT, Fault, Faults, Link, LinkFault, NodeLike

__all__ = ["NO_FAULT", "PROFILES", "Fault", "Faults", "Link", "LinkFault", "Nemesis", "NodeLike", "Step", "draw"]

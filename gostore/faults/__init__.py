"""Faults: their vocabulary."""

from gostore.faults.vocabulary import NO_FAULT, Fault, Faults, Link, LinkFault, NodeLike

__all__ = ["NO_FAULT", "Fault", "Faults", "Link", "LinkFault", "NodeLike"]

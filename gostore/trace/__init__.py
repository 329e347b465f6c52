"""The journal of events."""

from gostore.trace.journal import Gap, Journal

__all__ = ["Gap", "Journal"]

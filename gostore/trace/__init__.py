"""The journal of events: queries, causality, files, and exports to other viewers."""

from gostore.trace.causality import Causality
from gostore.trace.export import export_perfetto, export_shiviz
from gostore.trace.journal import Gap, Journal

__all__ = ["Causality", "Gap", "Journal", "export_perfetto", "export_shiviz"]

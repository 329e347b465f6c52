"""The journal: what happened, queryable."""

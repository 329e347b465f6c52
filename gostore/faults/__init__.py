"""The fault vocabulary."""

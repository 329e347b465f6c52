"""The process world."""

"""Handles to a cluster that load no node."""

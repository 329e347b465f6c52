"""Containers of nested objects, sharded, replicated, transactional."""

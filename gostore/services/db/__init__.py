"""The database: containers of nested objects, transactions, shards with replicated logs."""

from gostore.services.db.service import DbService

__all__ = ["DbService"]

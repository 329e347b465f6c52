"""The control channel of a node."""

from gostore.services.admin.service import AdminService

__all__ = ["AdminService"]

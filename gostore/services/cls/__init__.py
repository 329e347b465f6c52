"""Membership: who is here, who is in trouble, who decides."""

from gostore.services.cls.admission import Patience
from gostore.services.cls.history import next_incarnation
from gostore.services.cls.service import ClsService

__all__ = ["ClsService", "Patience", "next_incarnation"]

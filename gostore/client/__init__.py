"""Handles to a cluster that load no node. The modules behind the names are loaded when a name is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gostore.client.files import FsHandle
    from gostore.client.objects import DbHandle, TransactionHandle
    from gostore.client.policies import policy_source
    from gostore.client.remote import AdminHandle, Client, connect, connect_at, read_connection
    from gostore.client.watch import Watch

__all__ = [
    "AdminHandle",
    "Client",
    "DbHandle",
    "FsHandle",
    "TransactionHandle",
    "Watch",
    "connect",
    "connect_at",
    "policy_source",
    "read_connection",
]

_HOMES = {
    "AdminHandle": "remote",
    "Client": "remote",
    "DbHandle": "objects",
    "FsHandle": "files",
    "TransactionHandle": "objects",
    "Watch": "watch",
    "connect": "remote",
    "connect_at": "remote",
    "policy_source": "policies",
    "read_connection": "remote",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

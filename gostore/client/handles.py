"""Handles."""

from __future__ import annotations
from collections.abc import Callable
from gostore.client.connection import Connection
from gostore.core.twins import Runner, SyncTwins


class FsHandle(SyncTwins):
    def __init__(self, runner: Runner, connection: Callable[[], Connection], via: str | None = None) -> None:
        self._runner = runner
        self._connection = connection
        self._via = via


class DbHandle(FsHandle):
    pass

"""One write-ahead log and one chunk store per node."""

from __future__ import annotations

from gostore.storage.blobs import BlobStore
from gostore.storage.wal import Record, Wal

__all__ = ["BlobStore", "Record", "Wal"]

"""The record of a cluster in its directory: what is needed to start it again, or to connect to it.

``<path>/cluster.json``, mode 0600, because it holds the secret:
``{"version", "cluster", "secret", "shards", "born", "settings", "nodes": {name: {"host", "ports", "settings"}}}``;
``born``: all nodes were ready once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gostore.core.errors import ConfigError

RECORD = "cluster.json"
RECORD_VERSION = 1


def read_record(root: Path) -> dict[str, Any] | None:
    """The record in a directory, None when there is none. Raises :class:`ConfigError` for one that cannot be used."""
    file = root / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: is damaged: {error}") from None
    found = record.get("version") if isinstance(record, dict) else None
    if found != RECORD_VERSION:
        raise ConfigError(f"{file}: has version {found!r}; this program reads version {RECORD_VERSION}")
    return dict(record)


def write_record(root: Path, record: dict[str, Any], *, durable: bool) -> None:
    """Replace the record as a whole; ``durable``: it survives a power cut."""
    draft = root / f"{RECORD}.new"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"version": RECORD_VERSION, **record}, file, indent=1)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    draft.replace(root / RECORD)
    if durable:
        directory = os.open(root, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

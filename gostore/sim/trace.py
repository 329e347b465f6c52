"""The trace of a run: everything that happens, hashed byte for byte.

Two runs are the same when their hashes are: the hash covers the virtual time and node of every callback, every message
with its bytes, every fault, and every line that a harness adds. It does not cover what a journal collects, so that a
run is the same whoever listens. To find where two runs part, give both a ``sink`` and compare the lines.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

# Hashing in large pieces is several times faster than one call for each entry.
_FLUSH_BYTES = 1 << 16

_mark = struct.Struct("<di").pack
_message = struct.Struct("<dciiI").pack


class Trace:
    """Collects what happens. ``sink``, if given, is called with a readable line for each entry (slow: for debugging).

    ``entries`` counts them; ``messages`` counts the network's deliveries and drops among them.
    """

    __slots__ = ("_buffer", "_hash", "_sink", "entries", "messages")

    def __init__(self, sink: Callable[[str], None] | None = None) -> None:
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._sink = sink
        self.entries = 0
        self.messages = 0

    def callback(self, time_s: float, node: int, callback: object) -> None:
        """A callback is about to run on the node with this index."""
        self.entries += 1
        self._buffer += _mark(time_s, node)
        if self._sink is not None:
            self._sink(f"{time_s:.9f} n{node} call {_name(callback)}")

    def message(self, time_s: float, kind: bytes, source: int, target: int, data: bytes) -> None:
        """Something of the network: ``kind`` is one byte, source and target are the indices of hosts."""
        self.entries += 1
        self.messages += 1
        buffer = self._buffer
        buffer += _message(time_s, kind, source, target, len(data))
        buffer += data
        if len(buffer) > _FLUSH_BYTES:
            self.flush()
        if self._sink is not None:
            digest = hashlib.sha256(data).hexdigest()[:12]
            self._sink(f"{time_s:.9f} {kind.decode()} h{source}->h{target} {len(data)} bytes {digest}")

    def add(self, time_s: float, text: str) -> None:
        """A fault, or anything else that must be the same in two runs."""
        self.entries += 1
        data = text.encode("utf-8", "surrogatepass")
        self._buffer += _message(time_s, b"#", 0, 0, len(data)) + data
        if len(self._buffer) > _FLUSH_BYTES:
            self.flush()
        if self._sink is not None:
            self._sink(f"{time_s:.9f} # {text}")

    def flush(self) -> None:
        """Hash what is buffered, so that memory stays bounded; the scheduler calls it now and then."""
        self._hash.update(self._buffer)
        self._buffer.clear()

    @property
    def sha256(self) -> str:
        """The hash of everything so far, in hexadecimal."""
        self.flush()
        return self._hash.hexdigest()


def _name(callback: object) -> str:
    """The callback without an address in it, so that the lines of two runs compare."""
    owner = getattr(callback, "__self__", None)
    name = getattr(callback, "__qualname__", type(callback).__name__)
    get_name = getattr(owner, "get_name", None)
    return f"{name} {get_name()}" if callable(get_name) else str(name)

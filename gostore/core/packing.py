"""The one way to msgpack: a packer that is kept packs twice as fast as ``msgpack.packb``, which makes one each time."""

from __future__ import annotations

from typing import Any

import msgpack

_packer = msgpack.Packer(use_bin_type=True, autoreset=True)


def pack(value: Any) -> bytes:
    """``value`` as msgpack. Raises ``TypeError``, ``ValueError`` or ``OverflowError`` for what cannot be packed."""
    try:
        packed: bytes = _packer.pack(value)
    except BaseException:  # raised again: only what was packed so far must not stand before the next value
        _packer.reset()
        raise
    return packed

"""Packed values: an object rests as msgpack bytes and is unpacked only for as long as somebody looks inside."""

from __future__ import annotations

from gostore.core.errors import TooLarge
from gostore.core.keyvalue import Operation, Path, Value
from gostore.core.values import MISSING, add_at, delete_at, get_at, pack, set_at, unpack


def read_packed(packed: bytes | None, path: Path) -> tuple[Value, bool]:
    """(value at ``path``, whether anything is there). Raises ``WrongType``."""
    if packed is None:
        return None, False
    value = get_at(unpack(packed), path)
    return (None, False) if value is MISSING else (value, True)


def evaluate(
    packed: bytes | None, operation: Operation, path: Path, operand: bytes, size_bytes_max: int
) -> bytes | None:
    """The packed object after one write, None when it is gone; a pure function of its arguments.

    ``operand``: the packed value of the write. Raises ``WrongType``, ``BadRequest`` (a sum beyond 64 bits) and
    ``TooLarge``.
    """
    if not path:
        if operation == "set":
            if len(operand) > size_bytes_max:
                raise TooLarge(f"the value has {len(operand)} bytes packed; at most {size_bytes_max} are allowed")
            return operand
        if operation == "delete":
            return None
    if packed is None and operation == "delete":
        return None
    root = None if packed is None else unpack(packed)
    if operation == "set":
        root = set_at(root, path, unpack(operand))
    elif operation == "delete":
        root = delete_at(root, path)
    else:
        root = add_at(root, path, unpack(operand))
    return pack(root, size_bytes_max)

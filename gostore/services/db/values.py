"""Packed values: an object rests as msgpack bytes and is unpacked only for as long as somebody looks inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gostore.core.errors import TooLarge
from gostore.core.keyvalue import Operation, Path, Value
from gostore.core.values import (
    MISSING,
    add_at,
    check_path,
    check_value,
    delete_at,
    get_at,
    pack_checked,
    padding,
    set_at,
    unpack,
)

EVALUATED_SIZE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bytes of objects that one transaction may change inside. Larger: more at once; smaller: shorter stops of all others.

A few operations of some bytes can name places in many large objects, and all replicas do nothing else meanwhile.
"""

Step = tuple[Operation, Path, bytes]
"""One write to an object: what to do, where, and the packed value."""


class Room:
    """How much the writes of one transaction may still unpack and create, whatever becomes of it."""

    __slots__ = ("_left", "_size_bytes_max")

    def __init__(self, size_bytes_max: int) -> None:
        self._left = self._size_bytes_max = max(EVALUATED_SIZE_BYTES_MAX, size_bytes_max)

    def take(self, size_bytes: int) -> None:
        """Raises ``TooLarge``."""
        self._left -= size_bytes
        if self._left < 0:
            raise TooLarge(
                f"a transaction that writes to places inside objects of more than {self._size_bytes_max} bytes in "
                "all: make several of it"
            )


def read_packed(packed: bytes | None, path: Path) -> tuple[Value, bool]:
    """(value at ``path``, whether anything is there). Raises ``WrongType``."""
    if packed is None:
        return None, False
    value = get_at(unpack(packed), path)
    return (None, False) if value is MISSING else (value, True)


def replace(operation: Operation, operand: bytes, size_bytes_max: int) -> bytes | None:
    """The packed object after a ``set`` or ``delete`` of the whole. Raises ``TooLarge``."""
    if operation == "delete":
        return None
    if len(operand) > size_bytes_max:
        raise TooLarge(f"the value has {len(operand)} bytes packed; at most {size_bytes_max} are allowed")
    return operand


def evaluate(packed: bytes | None, steps: Sequence[Step], size_bytes_max: int, room: Room) -> bytes | None:
    """The packed object after some writes, None when it is gone. What it comes to is a function of the arguments.

    The same as one after the other, but that the size is checked at the end: it is unpacked for the first step that
    looks inside, and packed after the last, so that many steps cost little more than one. What is stored was checked
    when it came; only what a step adds is looked at. Raises ``WrongType``, ``BadRequest`` (a sum beyond 64 bits, a path
    or a nesting that cannot be) and ``TooLarge``.
    """
    root: Value = None
    unpacked = False  # then ``root`` is the object, and ``packed`` is not
    for operation, path, operand in steps:
        if not path and operation != "add":
            packed, unpacked = replace(operation, operand, size_bytes_max), False
            continue
        if not unpacked:
            if packed is None and operation == "delete":
                continue
            root, unpacked = None, True
            if packed is not None:
                room.take(len(packed))
                root = unpack(packed)
        if path:
            check_path(path)
        if operation == "delete":
            root = delete_at(root, path)
            continue
        if path and (nulls := padding(root, path)):
            if nulls > size_bytes_max:  # each has a byte, packed
                raise TooLarge(f"the value has more than {nulls} bytes packed; at most {size_bytes_max} are allowed")
            room.take(nulls)
        value = unpack(operand)
        root = set_at(root, path, value) if operation == "set" else add_at(root, path, value)
        check_value(value, len(path))  # a sum is nested as deep as what was added
    return pack_checked(root, size_bytes_max) if unpacked else packed

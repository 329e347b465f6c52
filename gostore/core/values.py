"""Nested values and the places inside them.

A path of accessors walks from the root of a value inwards: a name into a map, a number into an array. Writing creates
what is missing on the way (a number makes an array, a name a map); a null counts as missing, because that is what fills
the gaps of an array. Meeting anything else of the wrong kind raises ``WrongType``, which says where and what was met.

Values travel and rest packed (msgpack); :func:`pack` is the one gate through which a value enters the system. What
went through it needs no second look: :func:`pack_checked`.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgpack

from gostore.core import packing
from gostore.core.errors import BadRequest, TooLarge, WrongType
from gostore.core.keyvalue import Path, Value

DEPTH_MAX = 64
"""Nesting of a value and length of a path. More would let a small value exhaust the stack of whoever walks it."""

ARRAY_INDEX_MAX = 65_535
"""The greatest number a path may hold: writing there fills the array with nulls up to it."""

INT_MIN: Final = -(1 << 63)
INT_MAX: Final = (1 << 64) - 1


class Missing:
    """The type of :data:`MISSING`: nothing is at this place."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing()


def kind_of(value: Value) -> str:
    """What a value is, in the words of the error messages."""
    if value is None:
        return "null"
    for kinds, name in _KIND_NAMES:
        if isinstance(value, kinds):
            return name
    return type(value).__name__


_KIND_NAMES: Final[tuple[tuple[Any, str], ...]] = (
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a float"),
    (str, "a string"),
    ((bytes, bytearray, memoryview), "bytes"),
    ((list, tuple), "an array"),
    (dict, "a map"),
)


def describe_path(path: Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path) or "the root"


def check_path(path: Path) -> None:
    """Raises ``BadRequest`` for a path that no value can have."""
    if len(path) > DEPTH_MAX:
        raise BadRequest(f"a path of {len(path)} accessors; at most {DEPTH_MAX} are allowed")
    for part in path:
        if isinstance(part, int) and not 0 <= part <= ARRAY_INDEX_MAX:
            raise BadRequest(f"accessor {part}: array positions go from 0 to {ARRAY_INDEX_MAX}")


def _wrong(met: Value, path: Path, depth: int) -> WrongType:
    part = path[depth]
    wanted = "an array" if isinstance(part, int) else "a map"
    return WrongType(f"accessor {part!r} needs {wanted}, but {describe_path(path[:depth])} is {kind_of(met)}")


def get_at(root: Value, path: Path) -> Value:
    """What is at ``path``, or :data:`MISSING`. Raises ``WrongType`` where an accessor does not fit what it meets."""
    value = root
    for depth, part in enumerate(path):
        if value is None:
            return MISSING
        if isinstance(part, str) and isinstance(value, dict):
            if part not in value:
                return MISSING
            value = value[part]
        elif isinstance(part, int) and isinstance(value, list):
            if part >= len(value):
                return MISSING
            value = value[part]
        else:
            raise _wrong(value, path, depth)
    return value


def _parent(root: Value, path: Path) -> tuple[Value, dict[str, Value] | list[Value]]:
    """The (possibly new) root, and the map or array that holds the last accessor; makes what is missing."""
    holder: list[Value] = [root]  # so that the root itself is a place like any other
    place: int | str = 0
    container: Any = holder
    for depth, part in enumerate(path):
        value = container[place]
        wanted: type = list if isinstance(part, int) else dict
        if value is None:
            value = container[place] = wanted()
        elif not isinstance(value, wanted):
            raise _wrong(value, path, depth)
        if isinstance(part, int):
            value.extend([None] * (part + 1 - len(value)))
        elif depth < len(path) - 1:
            value.setdefault(part, None)
        container, place = value, part
    return holder[0], container


def padding(root: Value, path: Path) -> int:
    """How many nulls :func:`set_at` would fill arrays with in front of what it puts at ``path`` or on the way there."""
    value = root
    for depth, part in enumerate(path):
        if value is None:
            return sum(rest for rest in path[depth:] if isinstance(rest, int))
        if isinstance(part, int) and isinstance(value, list):
            if part >= len(value):
                return sum(rest for rest in path[depth:] if isinstance(rest, int)) - len(value)
            value = value[part]
        elif isinstance(part, str) and isinstance(value, dict):
            value = value.get(part)
        else:
            return 0  # it will be refused
    return 0


def set_at(root: Value, path: Path, value: Value) -> Value:
    """The root with ``value`` at ``path``. ``root`` itself is changed: give it a private copy (an unpacked one)."""
    if not path:
        return value
    root, container = _parent(root, path)
    container[path[-1]] = value  # type: ignore[index]
    return root


def delete_at(root: Value, path: Path) -> Value:
    """The root without what is at ``path``; absent is fine. Later items of an array move up. Changes ``root``."""
    if not path:
        return None
    container = get_at(root, path[:-1])
    if container is MISSING or container is None:
        return root
    part = path[-1]
    if isinstance(part, str) and isinstance(container, dict):
        container.pop(part, None)
    elif isinstance(part, int) and isinstance(container, list):
        if part < len(container):
            del container[part]
    else:
        raise _wrong(container, path, len(path) - 1)
    return root


def is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def add_at(root: Value, path: Path, amount: Value) -> Value:
    """The root with ``amount`` added to the number at ``path`` (missing and null count as 0). Changes ``root``.

    Raises ``WrongType`` where no number stands, ``BadRequest`` when the sum leaves 64 bits or is no number.
    """
    if not is_number(amount):
        raise WrongType(f"add takes a number, not {kind_of(amount)}")
    present = get_at(root, path)
    if present is MISSING or present is None:
        present = 0
    if not is_number(present):
        raise WrongType(f"add needs a number, but {describe_path(path)} is {kind_of(present)}")
    total = present + amount
    if isinstance(total, int) and not INT_MIN <= total <= INT_MAX:
        raise BadRequest(f"add at {describe_path(path)}: {present} + {amount} does not fit 64 bits")
    if isinstance(total, float) and math.isnan(total):
        raise BadRequest(f"add at {describe_path(path)}: {present} + {amount} is not a number (NaN)")
    return set_at(root, path, total)


def check_value(value: Value, depth: int = 0) -> None:
    """Raises ``BadRequest`` for what cannot be stored inside ``depth`` arrays and maps.

    One level at a time, so that depth is bounded by the loop and not by the stack.
    """
    if type(value) in (str, bytes) and depth < DEPTH_MAX:
        return
    level: list[Value] = [value]
    while level:
        depth += 1
        if depth > DEPTH_MAX:
            raise BadRequest(f"the value is nested more than {DEPTH_MAX} deep")
        deeper: list[Value] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise BadRequest(f"the keys of a map are strings, not {kind_of(key)}: {key!r:.50}")
                deeper.extend(item.values())
            elif isinstance(item, (list, tuple)):
                deeper.extend(item)
            elif isinstance(item, int) and not INT_MIN <= item <= INT_MAX:
                raise BadRequest("an integer of the value is not within -2^63 to 2^64 - 1")
            elif isinstance(item, float) and math.isnan(item):
                raise BadRequest("not a number (NaN) cannot be stored: it does not even equal itself")
            elif item is not None and not isinstance(item, (bool, int, float, str, bytes, bytearray, memoryview)):
                raise BadRequest(
                    f"a {type(item).__name__} cannot be stored; values are null, booleans, integers, floats, strings, "
                    "bytes, arrays and maps"
                )
        level = deeper


def pack(value: Value, size_bytes_max: int) -> bytes:
    """The packed form. Raises ``BadRequest`` for what cannot be stored, ``TooLarge`` above ``size_bytes_max``."""
    check_value(value)
    return pack_checked(value, size_bytes_max)


def pack_checked(value: Value, size_bytes_max: int) -> bytes:
    """As :func:`pack`, for a value whose parts passed :func:`check_value`: it costs several times what packing does."""
    try:
        packed = packing.pack(value)
    except UnicodeEncodeError as error:
        raise BadRequest(f"a string of the value is not valid UTF-8: {error.reason}") from None
    except (ValueError, OverflowError) as error:
        raise TooLarge(f"the value cannot be packed: {error}") from None
    if len(packed) > size_bytes_max:
        raise TooLarge(f"the value has {len(packed)} bytes packed; at most {size_bytes_max} are allowed")
    return packed


def private_copy(value: Value) -> Value:
    """A copy as :func:`unpack` would make it, of a value that passed :func:`check_value`."""
    if isinstance(value, dict):
        return {key: private_copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [private_copy(item) for item in value]
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    return value


def unpack(packed: bytes) -> Value:
    """A fresh copy of a value that :func:`pack` made."""
    return msgpack.unpackb(packed, raw=False, strict_map_key=True)


def check_text(name: str, text: str, size_bytes_max: int) -> None:
    """Raises ``BadRequest`` for a key or name that is empty or not UTF-8, ``TooLarge`` for one that is too long."""
    if not text:
        raise BadRequest(f"{name} is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} is not valid UTF-8: {error.reason}") from None
    if size > size_bytes_max:
        raise TooLarge(f"{name} has {size} bytes of UTF-8; at most {size_bytes_max} are allowed")

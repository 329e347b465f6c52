"""Paths: absolute, normalised, never above the root.

The one written form of a path is ``/`` for the root, and otherwise ``/name/name`` with no empty name, no ``.``, no
``..`` and no blank (U+0020) at either end of a name. Whatever leads to the same place is brought into this form:
doubled and final slashes, ``.``, ``..`` and surrounding blanks disappear. A ``..`` that would climb above the root is
refused rather than clamped, because its author meant another place than the one he would get.

Names are what UTF-8 can write, without NUL; they are compared by code point, so two spellings that Unicode calls
equivalent are two names. All functions raise :class:`~gostore.core.errors.BadRequest`.
"""

from __future__ import annotations

from typing import Final

from gostore.core.errors import BadRequest

ROOT: Final = "/"

NAME_SIZE_BYTES_MAX: Final = 255
"""UTF-8. What common file systems allow, so that a tree can be copied out again; well under db's limit of a key."""

PATH_SIZE_BYTES_MAX: Final = 4096
"""UTF-8, of the written form; the default of the setting ``fs.path_size_bytes_max``."""


def parts(path: str, size_bytes_max: int = PATH_SIZE_BYTES_MAX) -> tuple[str, ...]:
    """The names from the root to ``path``; ``()`` for the root itself."""
    if not isinstance(path, str):
        raise BadRequest(f"path = {path!r:.100}: expected a string")
    # Four bytes a character at most; the exact limit below counts what is left after normalising.
    if len(path) > 4 * size_bytes_max:
        raise BadRequest(f"the path has {len(path)} characters; allowed are {size_bytes_max} bytes")
    if not path.strip(" ").startswith("/"):
        raise BadRequest(f"path = {path!r:.100}: expected an absolute path, one that begins with '/'")
    if "\0" in path:
        raise BadRequest(f"path = {path!r:.100}: a path contains no NUL")
    found: list[str] = []
    for part in path.split("/"):
        name = part.strip(" ")
        if name in {"", "."}:
            continue
        if name == "..":
            if not found:
                raise BadRequest(f"path = {path!r:.100} leads above the root")
            found.pop()
            continue
        found.append(name)
    _check_sizes(path, found, size_bytes_max)
    return tuple(found)


def _check_sizes(path: str, names: list[str], size_bytes_max: int) -> None:
    total = 0
    for name in names:
        try:
            size = len(name.encode("utf-8"))
        except UnicodeEncodeError:
            raise BadRequest(f"path = {path!a:.100}: the name {name!a:.100} cannot be written in UTF-8") from None
        if size > NAME_SIZE_BYTES_MAX:
            raise BadRequest(f"the name {name!r:.60}... has {size} bytes; allowed are {NAME_SIZE_BYTES_MAX}")
        total += size + 1
    if total > size_bytes_max:
        raise BadRequest(f"path = {path!r:.60}... has {total} bytes; allowed are {size_bytes_max}")


def normalise(path: str, size_bytes_max: int = PATH_SIZE_BYTES_MAX) -> str:
    """The written form of ``path``. Idempotent."""
    return join(parts(path, size_bytes_max))


def from_bytes(raw: bytes, size_bytes_max: int = PATH_SIZE_BYTES_MAX) -> str:
    """The written form of a path that came as bytes (in a URL, say), which must be UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"path = {raw[:100]!r}: it is not UTF-8") from None
    return normalise(text, size_bytes_max)


def join(names: tuple[str, ...]) -> str:
    """The written form of a sequence of names that :func:`parts` made."""
    return "/" + "/".join(names)


def child(path: str, name: str) -> str:
    """The path of an entry of the directory ``path`` (in its written form)."""
    return f"/{name}" if path == ROOT else f"{path}/{name}"

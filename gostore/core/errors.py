"""Every error that can cross the wire or reach a user.

An error says what went wrong, whether the operation *surely did not happen* (``definite``) or may have happened, now
or later (``indefinite``), and what to do next. Each class has a ``code`` by which it travels.
"""

from __future__ import annotations

from typing import Any, ClassVar


class GoStoreError(Exception):
    """Base of all. ``definite`` is true when the operation surely had no effect."""

    code: ClassVar[str] = "error"
    definite: bool = True

    def __init__(self, message: str, *, definite: bool | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        if definite is not None:
            self.definite = definite

    def to_wire(self) -> list[Any]:
        return [self.code, self.message, self.definite, self.details]


class Timeout(GoStoreError):
    """No answer in time: the operation may or may not have happened."""

    code = "timeout"
    definite = False


class Forgotten(GoStoreError):
    """The callee restarted or dropped the record of this request: it is not run again (at most once)."""

    code = "forgotten"
    definite = False


class Unreachable(GoStoreError):
    """The peer is unknown or refused the connection before anything was sent."""

    code = "unreachable"


class Unavailable(GoStoreError):
    """Too few replicas, no master yet, node not ready or overloaded: try again later or elsewhere."""

    code = "unavailable"


class NotOwner(GoStoreError):
    """This node does not hold what was asked for; ``details['owner']`` names who does, when it is known."""

    code = "not_owner"


class Fenced(GoStoreError):
    """The caller acts on an old epoch, term or generation; it must refresh its view."""

    code = "fenced"


class UnknownService(GoStoreError):
    code = "unknown_service"


class UnknownFunction(GoStoreError):
    code = "unknown_function"


class BadRequest(GoStoreError):
    """The arguments are wrong; the message names which, its value and what is allowed."""

    code = "bad_request"


class TooLarge(GoStoreError):
    code = "too_large"


class NotFound(GoStoreError):
    code = "not_found"


class AlreadyExists(GoStoreError):
    code = "already_exists"


class NotEmpty(GoStoreError):
    code = "not_empty"


class NotADirectory(GoStoreError):
    code = "not_a_directory"


class IsADirectory(GoStoreError):
    code = "is_a_directory"


class Conflict(GoStoreError):
    """A transaction read something that has changed since, or is locked: run it again."""

    code = "conflict"


class Compacted(GoStoreError):
    """A watch cannot go on from where it is: the changes after that are no longer kept. Read again, and watch anew."""

    code = "compacted"


class WrongType(GoStoreError):
    """An accessor does not fit the value it meets (a name into an array, say)."""

    code = "wrong_type"


class Corrupt(GoStoreError):
    """Stored bytes do not match their checksum."""

    code = "corrupt"


class PolicyError(GoStoreError):
    """A policy (a student's class in a slot) raised or returned nonsense; the message shows its line."""

    code = "policy"


class Unauthorized(GoStoreError):
    code = "unauthorized"


class ConfigError(GoStoreError):
    """A setting is wrong; the message names the field, its value and what is allowed."""

    code = "config"


class NotSupported(GoStoreError):
    """This world (processes or simulation) cannot do that."""

    code = "not_supported"


class InternalError(GoStoreError):
    """A bug in the callee; the effect is unknown."""

    code = "internal"
    definite = False


def _all_errors() -> dict[str, type[GoStoreError]]:
    found: dict[str, type[GoStoreError]] = {}
    todo: list[type[GoStoreError]] = [GoStoreError]
    while todo:
        cls = todo.pop()
        found.setdefault(cls.code, cls)  # of a class and its heirs without a code of their own, the class
        todo.extend(cls.__subclasses__())
    return found


def error_from_wire(wire: Any) -> GoStoreError:
    """The error that :meth:`GoStoreError.to_wire` described; an unknown code becomes a plain ``GoStoreError``."""
    match wire:
        case [str(code), str(message), bool(definite), dict(details)]:
            cls = _all_errors().get(code, GoStoreError)
            error = cls(message, definite=definite)
            error.details = details
            return error
    return InternalError(f"the peer answered with an error that cannot be read: {wire!r:.200}")

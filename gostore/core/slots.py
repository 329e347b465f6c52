"""The registry of policy slots: every idea taught is a small class that can be replaced.

A slot is declared by the module that owns it (its protocol and its default live there), e.g.
``gostore.cluster.ring`` declares ``placement``. A policy arrives as :class:`PolicySource` (a student's source text and
class name) and is compiled by :func:`load_policy`. Code is accepted on the authenticated control channel only; that
is the business of whoever calls :func:`load_policy`.
"""

from __future__ import annotations

import linecache
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gostore.core.errors import PolicyError


@dataclass(frozen=True, slots=True)
class Slot:
    """A replaceable part.

    ``methods``: the names that a policy class must define. ``check``: a conformance test that is given the class and
    raises ``AssertionError`` or ``PolicyError`` with a message for the student; it runs before a policy is installed.
    """

    name: str
    default: type
    methods: tuple[str, ...]
    check: Callable[[type], None]
    doc: str


SLOTS: dict[str, Slot] = {}


def declare_slot(slot: Slot) -> Slot:
    """Register a slot. Raises ``ValueError`` when another one has its name."""
    if slot.name in SLOTS and SLOTS[slot.name] != slot:
        raise ValueError(f"slot {slot.name!r} is declared twice")
    SLOTS[slot.name] = slot
    return slot


@dataclass(frozen=True, slots=True)
class PolicySource:
    """A policy as it travels: the text that defines it and the name of the class in that text.

    ``prelude``: how many lines stand before the class (imports and helpers that it uses); ``first_line``: the line of
    the student's own cell or file where the class begins, so that errors name the line that the student sees.
    """

    name: str
    source: str
    prelude: int = 0
    first_line: int = 1

    def to_wire(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source, "prelude": self.prelude, "first_line": self.first_line}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PolicySource:
        match wire:
            case {"name": str(name), "source": str(source), "prelude": int(prelude), "first_line": int(first_line)}:
                return cls(name, source, prelude, first_line)
            case {"name": str(name), "source": str(source)}:
                return cls(name, source)
        raise ValueError(f"not a policy: {wire!r:.200}; expected name and source")

    @property
    def filename(self) -> str:
        return f"<policy {self.name}>"


def describe_failure(error: BaseException, policy: PolicySource) -> str:
    """One line on what went wrong in a policy, with the line number and text in the student's source."""
    lines = policy.source.splitlines()
    number: int | None = None
    if isinstance(error, SyntaxError) and error.filename == policy.filename:
        number = error.lineno
    else:
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == policy.filename:
                number = frame.lineno
    what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    if number is None or not 1 <= number <= len(lines):
        return f"{policy.name}: {what}"
    text = lines[number - 1].rstrip()
    if number <= policy.prelude:
        return f"{policy.name}, in what it uses: {what}\n    | {text}"
    shown = number - policy.prelude + policy.first_line - 1
    return f"{policy.name}, line {shown}: {what}\n    {shown} | {text}"


def load_policy(slot_name: str, policy: PolicySource) -> type:
    """Compile a policy, check that it fits its slot, and return its class.

    Raises :class:`PolicyError` (definite) that names slot and class and shows the line at fault.
    """
    slot = SLOTS.get(slot_name)
    if slot is None:
        raise PolicyError(f"there is no slot {slot_name!r}; the slots are {', '.join(sorted(SLOTS))}")
    # Tracebacks print the student's own lines.
    linecache.cache[policy.filename] = (
        len(policy.source),
        None,
        policy.source.splitlines(keepends=True),
        policy.filename,
    )
    # A module of its own, known by name: dataclasses look there for what their annotations mean.
    module = types.ModuleType(f"policy_{policy.name}")
    sys.modules[module.__name__] = module
    try:
        exec(compile(policy.source, policy.filename, "exec"), vars(module))
        cls = vars(module).get(policy.name)
        if not isinstance(cls, type):
            raise PolicyError(f"the source of {policy.name} defines no class of that name")
        missing = [name for name in slot.methods if not callable(getattr(cls, name, None))]
        if missing:
            raise PolicyError(f"{policy.name} does not fit the slot {slot_name!r}: it lacks {', '.join(missing)}")
        slot.check(cls)
    except PolicyError:
        raise
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
            raise
        raise PolicyError(f"slot {slot_name!r}: {describe_failure(error, policy)}") from error
    return cls

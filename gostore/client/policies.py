"""A class from a notebook cell, as source text that defines it anywhere.

A policy runs inside every node, far from the notebook that it was written in. ``policy_source`` takes the text of the
class and puts before it what the class uses from around it: imports, helper functions and classes of the notebook (and
what those use), plain constants. What cannot travel (an open file, an array) is an error that names it,
here, and not a ``NameError`` there.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import inspect
import linecache
import math
import symtable
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from gostore.core.errors import PolicyError
from gostore.core.slots import PolicySource, load_policy

SOURCE_SIZE_BYTES_MAX = 1024 * 1024
"""A policy with all that it uses; larger is refused before it is sent."""

CHECK_LINES_MAX = 3_000_000
"""Lines that a policy may run while it is checked, about two seconds: an endless loop is an error and not a wait."""

_FUTURE = "from __future__ import annotations"
_CONSTANTS = (bool, int, str, bytes, type(None), type(Ellipsis))


def policy_source(cls: type) -> PolicySource:
    """The class as it travels. Raises :class:`PolicyError` that names what cannot."""
    if not isinstance(cls, type):
        raise PolicyError(f"{cls!r:.100} is not a class; give the class itself, e.g. placement=MyRing")
    collector = _Collector(cls)
    text, first_line = collector.source_of(cls)
    collector.uses(cls, text)
    prelude = "".join(f"{part}\n" for part in (_FUTURE, *sorted(collector.imports), *collector.definitions))
    source = prelude + text
    if len(source.encode()) > SOURCE_SIZE_BYTES_MAX:
        raise PolicyError(
            f"{cls.__name__} and what it uses are {len(source):,} characters; "
            f"at most {SOURCE_SIZE_BYTES_MAX:,} can travel"
        )
    return PolicySource(cls.__name__, source, prelude.count("\n"), first_line)


def checked_policy(slot: str, cls: type) -> PolicySource:
    """The same, compiled from its text and put through the slot's conformance check, before anything is started.

    Raises :class:`PolicyError` that names the line at fault.
    """
    importlib.import_module("gostore.cluster.ring")  # declares the slot `placement`
    source = policy_source(cls)
    with _bounded_lines(source):
        load_policy(slot, source)
    return source


@contextlib.contextmanager
def _bounded_lines(source: PolicySource) -> Iterator[None]:
    """Let this thread run at most :data:`CHECK_LINES_MAX` lines of the policy; the one after raises where it stands."""
    left, before = CHECK_LINES_MAX, sys.gettrace()

    def count(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise TimeoutError(f"it is still running after {CHECK_LINES_MAX:,} lines: does this loop end?")
        return count

    def enter(frame: types.FrameType, event: str, argument: Any) -> Any:
        return count if frame.f_code.co_filename == source.filename else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


class _Collector:
    """Gathers what a class needs to stand alone: ``imports`` and ``definitions``, the latter before their users."""

    def __init__(self, policy: type) -> None:
        self._policy = policy
        self._seen: dict[str, object] = {policy.__name__: policy}
        self.imports: dict[str, None] = {}
        self.definitions: list[str] = []

    def source_of(self, thing: Any) -> tuple[str, int]:
        """(text, its first line in the cell or file)."""
        try:
            lines, first_line = _class_lines(thing) if isinstance(thing, type) else inspect.getsourcelines(thing)
        except (OSError, TypeError, SyntaxError):
            raise PolicyError(
                f"the source of {thing.__name__} cannot be found; define it in a notebook cell or a file, "
                "not by exec or at a plain prompt"
            ) from None
        text = textwrap.dedent("".join(lines))
        return text if text.endswith("\n") else text + "\n", max(first_line, 1)

    def uses(self, thing: Any, text: str) -> None:
        """Gather the globals (and closed-over names) that the definition ``text`` of ``thing`` needs."""
        around = _names_around(thing)
        for name in _free_names(text, thing.__name__):
            if name in around:
                self._add(name, around[name], thing.__name__)
            elif not hasattr(builtins, name):
                raise PolicyError(f"{thing.__name__} uses {name!r}, which is not defined; define it before the class")

    def _add(self, name: str, value: object, user: str) -> None:
        if name in self._seen:
            if self._seen[name] is value:
                return
            raise PolicyError(f"two different things named {name!r} are used by {self._policy.__name__}; rename one")
        self._seen[name] = value
        literal = _literal(value)
        if isinstance(value, types.ModuleType):
            self._import(f"import {value.__name__} as {name}", value.__name__, user, name)
        elif literal is not None:
            self.definitions.append(f"{name} = {literal}")
        elif isinstance(value, (type, types.FunctionType)) and _is_local(value):
            if value.__name__ != name:
                raise PolicyError(
                    f"{user} uses {name!r}, which is {value.__name__} under another name; write `def {name}`"
                )
            text, _ = self.source_of(value)
            self.uses(value, text)
            self.definitions.append(text.rstrip("\n"))
        else:
            self._import_from(name, value, user)

    def _import_from(self, name: str, value: object, user: str) -> None:
        module = getattr(value, "__module__", None)
        original = getattr(value, "__name__", None)
        known = sys.modules.get(module) if isinstance(module, str) else None
        if not isinstance(original, str) or getattr(known, original, None) is not value:
            raise PolicyError(
                f"{user} uses {name!r}, a {type(value).__name__}, which cannot travel to the nodes; "
                "make it inside the class, or use a module, a function, a class or a plain constant"
            )
        self._import(f"from {module} import {original} as {name}", str(module), user, name)

    def _import(self, line: str, module: str, user: str, name: str) -> None:
        if not _is_importable(module):
            raise PolicyError(f"{user} uses {name!r} of the module {module!r}, which the nodes cannot import")
        self.imports[line] = None


def _is_importable(module: str) -> bool:
    """Whether another process with our search path finds it: being imported here is not enough."""
    top = module.partition(".")[0]
    if top == "__main__":
        return False
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        if find_spec is not None and find_spec(top, None) is not None:
            return True
    return False


def _is_local(value: Any) -> bool:
    """Whether its source must travel: things of a notebook, of a script, or made inside a function."""
    return "<locals>" in value.__qualname__ or not _is_importable(value.__module__)


def _literal(value: Any) -> str | None:
    """Source text of a plain constant, None when it is none."""
    kind = type(value)
    if kind in _CONSTANTS:
        return repr(value)
    if kind is float:
        return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
    if kind is dict:
        parts = [(_literal(key), _literal(item)) for key, item in value.items()]
        whole = [f"{key}: {item}" for key, item in parts if key is not None and item is not None]
        return "{" + ", ".join(whole) + "}" if len(whole) == len(value) else None
    if kind in (tuple, list, set, frozenset):
        items = [item for item in map(_literal, value) if item is not None]
        listed = f"[{', '.join(items)}]"
        return None if len(items) != len(value) else listed if kind is list else f"{kind.__name__}({listed})"
    return None


def _class_lines(cls: type) -> tuple[list[str], int]:
    """Lines of a class and the number of the first, by way of its methods.

    ``inspect`` looks for the file of a class's module, and a notebook has none; the code of a method names its cell.
    """
    for function in _functions_of(cls):
        code = function.__code__
        if function.__qualname__.startswith(f"{cls.__qualname__}."):
            found = _find_class(linecache.getlines(code.co_filename, function.__globals__), cls, code.co_firstlineno)
            if found is not None:
                return found
    if cls.__module__ != "__main__" or hasattr(sys.modules["__main__"], "__file__"):
        return inspect.getsourcelines(cls)
    # A class without methods, in a notebook: the newest cell that defines it.
    for entry in reversed(list(linecache.cache.values())):
        found = _find_class(entry[2], cls, None) if len(entry) == 4 else None
        if found is not None:
            return found
    raise OSError


def _find_class(lines: list[str], cls: type, inside: int | None) -> tuple[list[str], int] | None:
    """The definition of a class in a text, decorators included; ``inside``: a line that it must hold."""
    if not any(cls.__name__ in line for line in lines):
        return None
    for node in ast.walk(ast.parse("".join(lines))):
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__ and node.end_lineno is not None:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if inside is None or first <= inside <= node.end_lineno:
                return lines[first - 1 : node.end_lineno], first
    return None


def _names_around(thing: Any) -> dict[str, object]:
    """Name -> value of what stands around a definition: its module's globals and the variables it closes over."""
    functions = [thing] if isinstance(thing, types.FunctionType) else _functions_of(thing)
    around: dict[str, object] = dict(vars(sys.modules[thing.__module__])) if thing.__module__ in sys.modules else {}
    for function in functions:
        around.update(function.__globals__)
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                around[name] = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    if isinstance(thing, type):
        # Bases may be defined beside the class, in a function that has returned.
        around.update({base.__name__: base for base in thing.__bases__ if base.__name__ not in around})
    return around


def _functions_of(cls: type) -> list[types.FunctionType]:
    found: list[types.FunctionType] = []
    for value in vars(cls).values():
        inner = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if isinstance(inner, types.FunctionType):
            found.append(inspect.unwrap(inner))
    return found


def _free_names(text: str, name: str) -> list[str]:
    """The names that a definition takes from around it when it is made or runs; sorted.

    Seen as a module of its own, whatever a scope in it refers to as a global is free. Annotations are left out: with
    the first line of the prelude they are never evaluated.
    """
    tree = _WithoutAnnotations().visit(ast.parse(text))
    free: dict[str, None] = {}
    scopes = [symtable.symtable(ast.unparse(tree), "<policy>", "exec")]
    while scopes:
        scope = scopes.pop()
        scopes.extend(scope.get_children())
        module = scope.get_type() == "module"
        for symbol in scope.get_symbols():
            if symbol.is_referenced() and symbol.is_global() and not (module and symbol.is_assigned()):
                free[symbol.get_name()] = None
    return sorted(found for found in free if found != name and not found.startswith("__"))


class _WithoutAnnotations(ast.NodeTransformer):
    """In the nodes annotations are strings, so what they name need not exist."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant("")
        return node

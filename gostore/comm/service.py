"""Services and their remote functions, declared with decorators and typed.

    @service("echo")
    class Echo:
        @remote
        async def twice(self, call: Call, text: str, times: int = 2) -> str:
            return text * times

``endpoint.register(Echo())`` makes ``echo.twice`` callable by every peer that knows the cluster's secret. What is wrong
with a declaration is an exception where it is declared; what is wrong with a request is an answer that says so: a
frame is never dropped because of a misspelt name.

A call is awaited; the callbacks of the original (``OnResponse``, ``OnError``, ``OnTimeout``) are what stands after
``await``, in ``except GoStoreError`` and in ``except Timeout``.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from gostore.core.address import Address
from gostore.core.errors import BadRequest

if TYPE_CHECKING:
    from gostore.comm.endpoint import Endpoint

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])

ROUTE_SIZE_BYTES_MAX: Final = 127
_SERVICE = "__gostore_service__"
_REMOTE = "__gostore_remote__"
_SCALARS: Final = (int, float, str, bytes, bool, list, dict)


@dataclass(slots=True)
class Reply:
    """An answer: a msgpack-able value, and raw data beside it."""

    value: Any = None
    data: bytes | memoryview = b""


class Redirect(Exception):
    """Raised by :meth:`Call.redirect`; comm forwards the request."""

    def __init__(self, to: str) -> None:
        super().__init__(to)
        self.to = to


class Call:
    """The request that a handler works on.

    ``source``, ``source_address``: who asked first (not a redirecting node). ``data``: raw bytes beside the arguments.
    ``deadline_s``: loop time at which the caller stops waiting. ``epoch``: the source's view, 0 when it has none.
    """

    __slots__ = ("data", "deadline_s", "endpoint", "epoch", "finished", "source", "source_address")

    def __init__(
        self, source: str, source_address: Address, data: bytes, deadline_s: float, endpoint: Endpoint, epoch: int
    ) -> None:
        self.source = source
        self.source_address = source_address
        self.data = data
        self.deadline_s = deadline_s
        self.endpoint = endpoint
        self.epoch = epoch
        self.finished = False

    def redirect(self, to: str) -> NoReturn:
        """Let the member ``to`` answer: its answer goes straight to the source, not through this node.

        A handler that wants the answer itself (the original's "answer to the middle") awaits
        ``call.endpoint.call(to, ...)`` instead.
        """
        raise Redirect(to)


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""The request that the running task works on; calls made meanwhile inherit its deadline."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a remote function; ``kinds`` are the exact types it takes, None for any."""

    name: str
    kinds: frozenset[type] | None
    text: str
    required: bool


class Function:
    """A remote function: its name, and its check of arguments, prepared once. ``waits``: it is a coroutine function."""

    __slots__ = ("_kinds", "_required", "name", "parameters", "run", "waits")

    def __init__(self, name: str, parameters: tuple[Parameter, ...], run: Callable[..., Any]) -> None:
        self.name = name
        self.parameters = parameters
        self.run = run
        self.waits = inspect.iscoroutinefunction(run)
        self._kinds = tuple(parameter.kinds for parameter in parameters)
        self._required = sum(parameter.required for parameter in parameters)

    def check(self, arguments: Any) -> None:
        """Raises :class:`BadRequest` that names the argument."""
        if not isinstance(arguments, list):
            raise BadRequest(f"{self.name}: the arguments are no list")
        if not self._required <= len(arguments) <= len(self._kinds):
            takes = ", ".join(f"{p.name}: {p.text}{'' if p.required else ' (optional)'}" for p in self.parameters)
            raise BadRequest(f"{self.name} takes ({takes}); {len(arguments)} arguments were given")
        for kinds, argument in zip(self._kinds, arguments, strict=False):
            if kinds is not None and type(argument) not in kinds:
                self._refuse(arguments)

    def _refuse(self, arguments: list[Any]) -> NoReturn:
        for parameter, argument in zip(self.parameters, arguments, strict=False):
            if parameter.kinds is not None and type(argument) not in parameter.kinds:
                raise BadRequest(
                    f"{self.name}: {parameter.name} = {argument!r:.100} is {type(argument).__name__}; "
                    f"expected {parameter.text}"
                )
        raise AssertionError("every argument fits")


def remote(function: F) -> F:
    """Make a method ``f(self, call, ...)`` of a service callable by peers.

    It is a coroutine function; or a plain one that returns None, for casts that come often: it runs at once, without a
    task of its own. Raises ``TypeError`` when it is neither, or a parameter has no annotation or one that cannot be
    checked: allowed are int, float, str, bytes, bool, list, dict (their elements are not checked), Any, and unions of
    these and None.
    """
    name = getattr(function, "__name__", repr(function))
    if name.startswith("_") or not name.isascii():
        raise TypeError(f"remote function {name}: a name that peers call is ASCII and starts with a letter")
    setattr(function, _REMOTE, _parameters(name, function))
    return function


def service(name: str) -> Callable[[C], C]:
    """Class decorator: its :func:`remote` methods (also inherited ones) form the service ``name``.

    Raises ``TypeError`` when there are none, or the name is not a short ASCII identifier.
    """
    if not name.isascii() or not name.isidentifier():
        raise TypeError(f"service name {name!r} must be an ASCII identifier")

    def decorate(cls: C) -> C:
        functions = [key for key in dir(cls) if hasattr(getattr(cls, key), _REMOTE)]
        if not functions:
            raise TypeError(f"service {name!r}: {cls.__name__} has no method with @remote")
        for key in functions:
            if len(f"{name}.{key}") > ROUTE_SIZE_BYTES_MAX:
                raise TypeError(f"{name}.{key}: longer than {ROUTE_SIZE_BYTES_MAX} characters")
        setattr(cls, _SERVICE, name)
        return cls

    return decorate


def functions_of(instance: object) -> tuple[str, dict[str, Function]]:
    """The name and the remote functions of a service object. Raises ``TypeError`` when its class has no @service."""
    cls = type(instance)
    name = getattr(cls, _SERVICE, None)
    if name is None:
        raise TypeError(f"{cls.__name__} is no service: decorate it with @service(name)")
    found = {}
    for key in sorted(dir(cls)):
        parameters = getattr(getattr(cls, key), _REMOTE, None)
        if parameters is not None:
            found[key] = Function(f"{name}.{key}", parameters, getattr(instance, key))
    return name, found


def _parameters(name: str, function: Callable[..., Any]) -> tuple[Parameter, ...]:
    returns = inspect.get_annotations(function).get("return", "anything")
    if not inspect.iscoroutinefunction(function) and returns not in ("None", None):
        raise TypeError(f"remote function {name} must be `async def`, or return None")
    signature = list(inspect.signature(function).parameters.values())
    if len(signature) < 2:
        raise TypeError(f"remote function {name} takes (self, call, ...)")
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise TypeError(f"remote function {name}: {error}; its annotations must be imported at run time") from None
    found = []
    for parameter in signature[2:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise TypeError(f"remote function {name}: {parameter} is not a plain positional parameter")
        if parameter.name not in hints:
            raise TypeError(f"remote function {name}: parameter {parameter.name!r} has no annotation")
        hint = hints[parameter.name]
        text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
        try:
            kinds = _kinds(hint)
        except TypeError:
            raise TypeError(
                f"remote function {name}: {parameter.name}: {text} cannot be checked; allowed are "
                f"{', '.join(kind.__name__ for kind in _SCALARS)}, Any, and unions of these and None"
            ) from None
        text = text.removeprefix("typing.")
        found.append(Parameter(parameter.name, kinds, text, parameter.default is parameter.empty))
    return tuple(found)


def _kinds(hint: Any) -> frozenset[type] | None:
    if hint is Any or hint is object:
        return None
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [_kinds(option) for option in typing.get_args(hint)]
        return None if None in options else frozenset().union(*[option for option in options if option is not None])
    if hint is type(None):
        return frozenset((type(None),))
    kind = typing.get_origin(hint) or hint
    if kind not in _SCALARS:
        raise TypeError
    # msgpack gives exact types; an int is a fine float, and a bool is no number.
    return frozenset((float, int)) if kind is float else frozenset((kind,))

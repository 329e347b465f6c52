"""Declarations fail loudly, arguments are checked by name."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from gostore.comm import Call, remote, service
from gostore.comm.service import Function, functions_of
from gostore.core.errors import BadRequest


@service("all")
class Everything:
    @remote
    async def f(
        self,
        call: Call,
        a: int,
        b: float,
        c: str | None,
        d: list[int],
        e: dict[str, Any],
        f: Any,
        g: bool,
        h: bytes = b"",
        i: Optional[int] = None,  # noqa: UP045 - the old spelling must be understood
    ) -> None: ...


@service("heir")
class Heir(Everything):
    @remote
    async def more(self, call: Call) -> None: ...


def function() -> Function:
    return functions_of(Everything())[1]["f"]


GOOD = [1, 2.0, None, [1], {"k": 1}, object(), True]


@pytest.mark.parametrize(
    "arguments", [GOOD, [*GOOD, b"x"], [*GOOD, b"x", 5], [1, 2, "s", [], {}, None, False, b"", None]]
)
def test_good_arguments(arguments: list[Any]) -> None:
    function().check(arguments)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, True, "a = True is bool; expected int"),
        (0, "1", "a = '1' is str; expected int"),
        (1, "x", "b = 'x' is str; expected float"),
        (1, True, "b = True is bool"),
        (2, 5, r"c = 5 is int; expected str \| None"),
        (3, {}, r"d = {} is dict; expected list\[int\]"),
        (4, [], r"e = \[\] is list; expected dict"),
        (6, 1, "g = 1 is int; expected bool"),
    ],
)
def test_a_bad_argument_is_named(at: int, value: Any, says: str) -> None:
    arguments = list(GOOD)
    arguments[at] = value
    with pytest.raises(BadRequest, match=f"all.f: {says}"):
        function().check(arguments)


@pytest.mark.parametrize("arguments", [[], GOOD[:-1], [*GOOD, b"", None, 1]])
def test_a_wrong_number_of_arguments_shows_the_signature(arguments: list[Any]) -> None:
    with pytest.raises(BadRequest, match=r"all.f takes \(a: int, b: float"):
        function().check(arguments)


def test_arguments_must_be_a_list() -> None:
    with pytest.raises(BadRequest):
        function().check({"a": 1})


def test_services_inherit() -> None:
    name, functions = functions_of(Heir())
    assert name == "heir"
    assert [found.name for found in functions.values()] == ["heir.f", "heir.more"]


def test_what_is_no_service() -> None:
    with pytest.raises(TypeError, match="@service"):
        functions_of(object())


def test_a_remote_function_is_async_or_answers_nothing() -> None:
    for returns in (int, "int", Any):

        def f(self: Any, call: Call) -> None: ...

        f.__annotations__["return"] = returns
        with pytest.raises(TypeError, match="must be `async def`, or return None"):
            remote(f)

    def without(self, call): ...  # type: ignore[no-untyped-def]

    with pytest.raises(TypeError, match="must be `async def`, or return None"):
        remote(without)


def test_a_plain_function_does_not_wait() -> None:
    @service("plain")
    class Plain:
        @remote
        def at_once(self, call: Call) -> None: ...

        @remote
        async def in_a_task(self, call: Call) -> None: ...

    _, functions = functions_of(Plain())
    assert {name: function.waits for name, function in functions.items()} == {"at_once": False, "in_a_task": True}


def test_a_parameter_needs_an_annotation() -> None:
    with pytest.raises(TypeError, match="'a' has no annotation"):

        @remote
        async def f(self: Any, call: Call, a) -> None: ...  # type: ignore[no-untyped-def]


def test_an_annotation_must_be_checkable() -> None:
    with pytest.raises(TypeError, match=r"a: .*cannot be checked"):

        @remote
        async def f(self: Any, call: Call, a: tuple[int, int]) -> None: ...


def test_no_variable_arguments() -> None:
    with pytest.raises(TypeError, match="not a plain positional parameter"):

        @remote
        async def f(self: Any, call: Call, *a: int) -> None: ...


def test_a_handler_takes_the_call() -> None:
    with pytest.raises(TypeError, match="takes"):

        @remote
        async def f(self: Any) -> None: ...


def test_private_names_are_no_remote_functions() -> None:
    with pytest.raises(TypeError, match="_f"):

        @remote
        async def _f(self: Any, call: Call) -> None: ...


def test_a_service_needs_a_name_and_functions() -> None:
    with pytest.raises(TypeError, match="identifier"):
        service("no good")
    with pytest.raises(TypeError, match="no method with @remote"):

        @service("empty")
        class Empty: ...

from __future__ import annotations

import pytest

from gostore.core import errors
from gostore.core.address import Address


def every_error() -> list[type[errors.GoStoreError]]:
    return [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.GoStoreError)]


def test_codes_are_unique() -> None:
    codes = [error.code for error in every_error()]
    assert len(set(codes)) == len(codes) > 20


@pytest.mark.parametrize("cls", every_error())
def test_an_error_crosses_the_wire_unchanged(cls: type[errors.GoStoreError]) -> None:
    sent = cls("the message", owner="n2")
    got = errors.error_from_wire(sent.to_wire())
    assert type(got) is cls
    assert (got.message, got.definite, got.details) == ("the message", cls.definite, {"owner": "n2"})


def test_whether_an_operation_happened_is_never_guessed() -> None:
    # The errors after which it may have happened; everything else promises that it did not.
    assert sorted(e.code for e in every_error() if not e.definite) == ["forgotten", "internal", "timeout"]


@pytest.mark.parametrize("wire", [None, 7, ["timeout"], ["timeout", 1, True, {}]])
def test_an_unreadable_error_is_indefinite(wire: object) -> None:
    assert errors.error_from_wire(wire).definite is False


def test_an_unknown_code_keeps_message_and_definiteness() -> None:
    got = errors.error_from_wire(["from_the_future", "m", False, {}])
    assert (type(got), got.message, got.definite) == (errors.GoStoreError, "m", False)


def test_addresses_cross_the_wire() -> None:
    address = Address("127.0.0.1", 1, 65535)
    assert Address.from_wire(address.to_wire()) == address
    for wire in (None, ["h", 1], ["h", 1, 65536], ["h", -1, 1], [1, 1, 1]):
        with pytest.raises(ValueError, match="not an address"):
            Address.from_wire(wire)


def test_an_heir_without_a_code_of_its_own_does_not_take_the_place_of_its_class() -> None:
    class Special(errors.NotFound):
        pass

    assert type(errors.error_from_wire(Special("gone").to_wire())) is errors.NotFound

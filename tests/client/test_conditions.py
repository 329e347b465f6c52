"""What a testbed waits for, on made-up statuses."""

from __future__ import annotations

from typing import Any

import pytest

from gostore.client.conditions import describe, not_at_epoch, not_ready, not_seen_as, not_settled
from gostore.core.errors import Timeout


def status(
    members: str, *, state: str = "online", epoch: int = 7, master: str | None = "a", unsettled: Any = ()
) -> Any:
    """``members``: ``"a b -c"``, of which c is offline."""
    seen = {name.strip("-"): {"state": "offline" if name.startswith("-") else "online"} for name in members.split()}
    return {"state": state, "epoch": epoch, "master": master, "members": seen, "unsettled": list(unsettled)}


def test_ready_when_all_agree() -> None:
    assert not_ready({"a": status("a b"), "b": status("a b")}) == []
    assert not_ready({"a": status("a b -c"), "b": status("a b -c")}) == []  # c does not run


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Timeout("x"), "does not answer (timeout)"),
        (status("a b", state="joining"), "is joining"),
        (status("a b", epoch=6), "is at epoch 6, others at 7"),
        (status("-a b"), "does not see a online"),
        (status("b"), "does not see a online"),
        (status("a b", master=None), "knows no master"),
    ],
)
def test_what_is_missing_is_named(broken: Any, reason: str) -> None:
    assert not_ready({"a": status("a b"), "b": broken}) == [("b", reason)]
    assert not_settled({"a": status("a b"), "b": broken}, []) == [("b", reason)]


def test_settled_when_the_gone_are_gone_and_no_work_is_left() -> None:
    fine = {"a": status("a b -c"), "b": status("a b -c")}
    assert not_settled(fine, ["c"]) == []
    late = {"a": status("a b c"), "b": status("a b -c", unsettled=["repairs 3 chunks"])}
    assert not_settled(late, ["c"]) == [("a", "still thinks that c is online"), ("b", "repairs 3 chunks")]


def test_opinions_and_epochs() -> None:
    statuses = {"a": status("a b -c"), "b": status("a b c", epoch=6), "c": Timeout("x")}
    assert not_seen_as("c", "offline")(statuses) == [("b", "thinks that c is online")]
    assert not_seen_as("d", "offline")(statuses)[1] == ("a", "thinks that d is unknown")
    assert not_at_epoch(6)(statuses) == [("c", "does not answer (timeout)")]
    assert not_at_epoch(7)(statuses) == [("c", "does not answer (timeout)"), ("b", "is at epoch 6")]


def test_a_long_list_is_cut() -> None:
    missing = [(f"n{number}", "is joining") for number in range(4)]
    assert describe(missing, 2) == "n0 is joining; n1 is joining; and 2 more"
    assert describe(missing[:1]) == "n0 is joining"

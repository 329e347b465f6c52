from __future__ import annotations

import pytest

from gostore.core.events import CATEGORIES, KINDS, SCHEMA, Event, Events, current_cause


def bus() -> Events:
    stamps = iter(range(1, 1000))
    return Events("n1", stamp=lambda: next(stamps), time_s=lambda: 1.5)


def test_every_kind_has_a_known_category_and_distinct_fields() -> None:
    for kind, (category, fields) in KINDS.items():
        assert category in CATEGORIES, kind
        assert len(set(fields)) == len(fields), kind


def test_every_kind_and_field_has_a_meaning() -> None:
    for kind, (_, meaning, fields) in SCHEMA.items():
        assert meaning.endswith("."), kind
        for name, (unit, words) in fields.items():
            assert unit, f"{kind}.{name}"
            assert words, f"{kind}.{name}"
            assert (unit == "s") == name.endswith("_s"), f"{kind}.{name}"
            assert (unit == "bytes") == (name in ("bytes", "size", "torn_bytes")), f"{kind}.{name}"


def test_a_send_is_named_by_the_number_that_travels() -> None:
    fields = {name: "" for name in KINDS["send"][1]} | {"message": 17}
    assert Event("n1", 5, "send", 1, 0.0, None, fields).id == ("n1", -17)
    assert Event("n1", 5, "recv", 1, 0.0, None, fields).id == ("n1", 5)


def test_nothing_is_published_when_nobody_listens() -> None:
    assert bus().publish("view", epoch=1, online=[]) == 0


def test_sequence_numbers_have_no_gap_and_events_carry_their_cause() -> None:
    events, seen = bus(), []
    end = events.subscribe(seen.append)
    token = current_cause.set(("n2", 7))
    try:
        events.publish("view", epoch=1, online=["n1"])
    finally:
        current_cause.reset(token)
    events.publish("suspect", member="n3", incarnation=1, cause=("n1", 1), stamp=700)
    end()
    assert events.publish("view", epoch=2, online=[]) == 0
    assert [event.seq for event in seen] == [1, 2]
    assert [event.cause for event in seen] == [("n2", 7), ("n1", 1)]
    assert [event.stamp for event in seen] == [1, 700]
    assert seen[0].category == "cls"
    assert [Event.from_wire(event.to_wire()) for event in seen] == seen


def test_a_misspelt_event_is_an_error() -> None:
    events = bus()
    events.subscribe(lambda event: None)
    with pytest.raises(KeyError):
        events.publish("veiw", epoch=1)
    with pytest.raises(ValueError, match="epoch"):
        events.publish("view", epoch=1, onlin=[])


@pytest.mark.parametrize(
    "wire", [None, [], ["n1", 1, "nonsense", 1, 1.0, None, {}], ["n1", "1", "view", 1, 1.0, None, {}]]
)
def test_foreign_events_are_refused(wire: object) -> None:
    with pytest.raises(ValueError, match="not an event"):
        Event.from_wire(wire)


def test_a_subscriber_is_given_its_categories_and_the_others_cost_no_number() -> None:
    events, cls, everything = bus(), [], []
    events.subscribe(cls.append, ["cls"])
    assert (events.active, events.messages) == (True, False)
    assert events.publish("drop", peer="n2", reason="tag", bytes=1) == 0
    end = events.subscribe(everything.append)
    assert events.messages
    events.publish("drop", peer="n2", reason="tag", bytes=1)
    events.publish("view", epoch=1, online=[])
    end()
    assert not events.messages
    assert [event.kind for event in cls] == ["view"]
    assert [event.seq for event in everything] == [1, 2]
    with pytest.raises(ValueError, match="masage"):
        events.subscribe(cls.append, ["masage"])

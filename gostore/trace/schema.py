"""The schema of events for people: ``docs/events.md``, made of :data:`gostore.core.events.SCHEMA`."""

from __future__ import annotations

from typing import Final

from gostore.core.events import CATEGORIES, SCHEMA

_HEAD: Final = """\
# Events

Everything that happens in a cluster is an event: messages, changes of state, faults. Both worlds publish the same
kinds with the same fields; `cluster.journal` collects them. This page is made of `gostore/core/events.py`
(`pytest tests/trace/test_schema.py --rewrite` writes it).

## What every event has

| | |
|---|---|
| `node` | who published it; `testbed` for faults that strike from outside |
| `seq` | its number on the node, without a gap, from 1 in every life of the node; it counts what somebody listened to |
| `kind` | one of those below; it has a category |
| `stamp` | hybrid logical clock: milliseconds since 1970, then 16 bits of counter; not before the stamp of its cause |
| `time_s` | the clock of the node's event loop, in seconds; virtual in the simulated world |
| `id` | (node, number): the number is `seq`, and for a `send` minus the number of the message |
| `cause` | the id of the event that made this one happen: of a `recv` its `send`, of a reaction its `recv`; or none |
| `data` | the fields of the kind |

A send is named by the number of its message because that number travels with the message, whether or not anybody
listens: so listening, to little or to much, changes no byte on the wire. For the same reason an event reads the
node's clock and does not advance it; several events of a node may share a stamp, and `seq` orders them. (An event of
a wall clock that is then set back may have a later stamp than the next ones. The queries know: `journal.causality()`
lets program order and causes win.)

The testbed always collects the categories `cls`, `repair`, `fault` and `policy`; `cluster.watch("message", "db", "fs",
"storage", messages_a_s=-1)` adds the others, with every message.

## Units

`node` is a node's name and `nodes` a list of them; `bytes` and `count` are whole numbers; `number` names something, or
grows; `s` is seconds; `word` is one of a few words and `text` is for people; `name`, `path`, `key` and `hash` are
strings, `keys` a list of them; `map` is a dictionary.
"""


def events_document() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    for category in CATEGORIES:
        parts.append(f"## Category `{category}`\n")
        for kind, (own, meaning, fields) in SCHEMA.items():
            if own == category:
                rows = [f"| `{name}` | {unit} | {words} |" for name, (unit, words) in fields.items()]
                parts.append(
                    "\n".join([f"### `{kind}`\n", f"{meaning}\n", "| field | unit | |", "|---|---|---|", *rows, ""])
                )
    return "\n".join(parts)

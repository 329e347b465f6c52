"""Who belongs to a group, and what a majority of it is. Pure.

Membership changes by *joint consensus* (Ongaro, Ousterhout: "In Search of an Understandable Consensus Algorithm", 2014,
section 6), and not one server at a time. Why: a replica that moves is exchanged in one change, without a moment with an
even number of voters, in which one failure more would stop the group; any set of masters can follow any other after a
disaster; and there is one mechanism, whose safety does not hang on the sizes of two majorities (the rule for single
servers had a hole, see Ongaro's note of 2015 to raft-dev). The price is a second entry per change.

A change of voters is two entries. With the first, which names the new ``voters`` and the old ones as ``outgoing``,
every decision needs a majority of both. When it is committed the leader appends the second, without ``outgoing``. A
configuration is in force at a replica as soon as it stands in its log, committed or not, and no longer when the entry
is truncated. A change that touches only learners decides nothing and is one entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgpack

MEMBERS_MAX: Final = 64
"""Names in one configuration; every one of them is sent every entry by the leader."""


def _majority(voters: Iterable[str], numbers: Mapping[str, int]) -> int:
    """The largest number that a majority of the voters has reached; who is missing has reached 0."""
    reached = sorted((numbers.get(name, 0) for name in voters), reverse=True)
    return reached[len(reached) // 2]


@dataclass(frozen=True, slots=True)
class Configuration:
    """``voters`` decide; ``learners`` only follow. ``outgoing``: the voters before, while a change is under way.

    The order of the names is kept: it is the caller's order of preference. One that is voter before and learner after
    a change is in ``outgoing`` and in ``learners``. No voters at all: this replica was told of no group yet.
    """

    voters: tuple[str, ...] = ()
    learners: tuple[str, ...] = ()
    outgoing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ``ValueError`` when a name is twice where it can be once, or there are too many."""
        deciding = (*self.voters, *self.learners)
        if len(dict.fromkeys(deciding)) != len(deciding) or len(dict.fromkeys(self.outgoing)) != len(self.outgoing):
            raise ValueError(f"a name stands twice: voters {self.voters}, learners {self.learners}")
        if len(self.members) > MEMBERS_MAX:
            raise ValueError(f"{len(self.members)} members; at most {MEMBERS_MAX}")
        if not self.voters and (self.learners or self.outgoing):
            raise ValueError("a group without voters cannot decide anything")

    @property
    def joint(self) -> bool:
        return bool(self.outgoing)

    @property
    def members(self) -> tuple[str, ...]:
        """Everybody, each once: voters, those who were, learners."""
        return tuple(dict.fromkeys((*self.voters, *self.outgoing, *self.learners)))

    def is_voter(self, name: str) -> bool:
        """Whether its vote counts, in either half."""
        return name in self.voters or name in self.outgoing

    def reached(self, numbers: Mapping[str, int]) -> int:
        """The largest number that a quorum has reached: of indices, rounds or anything that only grows from 0."""
        number = _majority(self.voters, numbers) if self.voters else 0
        return min(number, _majority(self.outgoing, numbers)) if self.outgoing else number

    def won(self, votes: Mapping[str, bool]) -> bool:
        """Whether a quorum said yes."""
        return self.reached({name: 1 for name, vote in votes.items() if vote}) == 1

    def lost(self, votes: Mapping[str, bool]) -> bool:
        """Whether no quorum can say yes any more."""
        possible = {name: int(votes.get(name, True)) for name in self.members}
        return self.reached(possible) == 0

    def begin(self, voters: tuple[str, ...], learners: tuple[str, ...]) -> Configuration:
        """The first entry of a change to these; raises ``ValueError`` for what cannot be one."""
        if sorted(voters) == sorted(self.voters):
            return Configuration(voters, learners)
        return Configuration(voters, learners, self.voters)

    def end(self) -> Configuration:
        """The second entry of a change."""
        return Configuration(self.voters, self.learners)

    def __str__(self) -> str:
        parts = {"voters": self.voters, "outgoing": self.outgoing, "learners": self.learners}
        return " ".join(f"{what} {','.join(names)}" for what, names in parts.items() if names) or "nobody"

    def to_wire(self) -> list[Any]:
        return [list(self.voters), list(self.learners), list(self.outgoing)]

    @classmethod
    def from_wire(cls, wire: Any) -> Configuration:
        """Raises ``ValueError`` on anything that :meth:`to_wire` did not make."""
        match wire:
            case [[*voters], [*learners], [*outgoing]] if all(
                isinstance(name, str) and name for name in (*voters, *learners, *outgoing)
            ):
                return cls(tuple(voters), tuple(learners), tuple(outgoing))
        raise ValueError(f"not a configuration: {wire!r:.200}")

    def pack(self) -> bytes:
        """The payload of an entry of kind ``CONFIGURATION``."""
        payload: bytes = msgpack.packb(self.to_wire(), use_bin_type=True)
        return payload

    @classmethod
    def unpack(cls, payload: bytes) -> Configuration:
        """Raises ``ValueError`` on anything that :meth:`pack` did not make."""
        try:
            wire = msgpack.unpackb(payload)
        except Exception as error:
            raise ValueError(f"not a configuration: {payload!r:.100}") from error
        return cls.from_wire(wire)


NOBODY: Final = Configuration()
"""Of a replica that was told of no group yet."""

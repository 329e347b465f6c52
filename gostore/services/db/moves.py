"""How the replicas of a shard's group move to where the ring wants them: one at a time. Pure.

The group's committed configuration is the authority on who holds a shard; the ring only says who should. A replica
that comes is first a *learner*; when it has caught up it takes, in one change, the place of one that goes. So there are
never fewer voters than before on the way, and never more than one copy more is being made for a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from gostore.cluster.members import GLOBAL_RING, NodeState
from gostore.cluster.view import View
from gostore.consensus.configuration import Configuration

KEPT: Final = (NodeState.OFFLINE, NodeState.CONNECTING, NodeState.DISCONNECTING)
"""States of a voter that keeps its seat while the ring has nobody else for it: it may come back."""


class Move(NamedTuple):
    """A change of the members; ``comes``, ``goes``: whom it is about, for people."""

    voters: tuple[str, ...]
    learners: tuple[str, ...]
    comes: str | None
    goes: str | None


def plan(view: View, owners: tuple[str, ...], voters: Sequence[str]) -> tuple[str, ...]:
    """Who should vote: the owners on the ring, and, where these are too few, those who may come back.

    A group of three of which one is down would gain nothing by becoming one of two: it needs two either way. ``owners``
    are empty when the ring cannot be asked; then everybody stays.
    """
    if not owners:
        return tuple(voters)
    places = view.rings[GLOBAL_RING].replicas - len(owners)
    kept = [
        name
        for name in voters
        if name not in owners and (member := view.members.get(name)) is not None and member.state in KEPT
    ]
    return (*owners, *kept[: max(0, places)])


def next_move(
    configuration: Configuration,
    planned: tuple[str, ...],
    me: str,
    online: Sequence[str],
    caught_up: Callable[[str], bool],
) -> Move | None:
    """The next change on the way to ``planned``, for the leader ``me``; None: arrived, or a learner is catching up.

    Of those who go, the ones that are down go first, and the leader last.
    """
    voters, learners = configuration.voters, configuration.learners
    missing = [name for name in planned if name not in voters]
    surplus = sorted((name for name in voters if name not in planned), key=lambda name: (name in online, name == me))

    def ordered(names: Sequence[str]) -> tuple[str, ...]:
        return (*(name for name in planned if name in names), *(name for name in names if name not in planned))

    if missing:
        comes = next((name for name in missing if name in learners and caught_up(name)), None)
        if comes is not None:
            goes = surplus[0] if surplus and len(voters) >= len(planned) else None
            after = [name for name in (*voters, comes) if name != goes]
            return Move(ordered(after), (), comes, goes)
        if any(name in learners for name in missing):
            return None
        comes = next((name for name in missing if name in online), None)
        if comes is not None:
            return Move(voters, (comes,), comes, None)
    elif surplus:
        return Move(ordered([name for name in voters if name != surplus[0]]), (), None, surplus[0])
    if learners and not any(name in learners for name in missing):
        return Move(voters, (), None, learners[0])
    return None

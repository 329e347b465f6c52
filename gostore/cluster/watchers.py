"""Watchers: who wants to know when the view changes.

They are called synchronously, in the order in which they came, once per change of the view and in the order of the
epochs: a service never sees an older view after a newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gostore.cluster.members import MemberChange, NodeState
from gostore.cluster.view import View

Watcher = Callable[[View, View, Sequence[MemberChange]], None]
"""``(old view, new view, changes of members)``; the changes may be empty (a new policy)."""

MemberWatcher = Callable[[MemberChange, View], None]


class Watchers:
    """The watchers of one node. ``report`` is told of one that raises; the others are called all the same."""

    def __init__(self, report: Callable[[BaseException], None]) -> None:
        self._report = report
        self._watchers: dict[int, Watcher] = {}
        self._next = 0

    def watch(self, callback: Watcher) -> Callable[[], None]:
        """Call ``callback`` on every change from now on; returns the function that ends it."""
        self._next += 1
        key = self._next
        self._watchers[key] = callback

        def unwatch() -> None:
            self._watchers.pop(key, None)

        return unwatch

    def on(self, state: NodeState, callback: MemberWatcher) -> Callable[[], None]:
        """Call ``callback`` whenever a member enters ``state`` (joining, connecting, online, ...)."""

        def watcher(_old: View, new: View, changes: Sequence[MemberChange]) -> None:
            for change in changes:
                if change.state_changed and change.new.state is state:
                    callback(change, new)

        return self.watch(watcher)

    def notify(self, old: View, new: View, changes: Sequence[MemberChange]) -> None:
        for callback in tuple(self._watchers.values()):
            try:
                callback(old, new, changes)
            except Exception as error:
                self._report(error)

    def __len__(self) -> int:
        return len(self._watchers)

"""Clusters of real processes on this machine.

Light on purpose: the first thing a launch does is to start the zygote, which boots while the rest is imported here.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gostore.launch.processes import ProcessCluster


def launch(
    nodes: int | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    name: str = "gostore",
    secret: str | None = None,
    placement: type | None = None,
    policies: Mapping[str, type] | None = None,
    timeout_s: float = 60.0,
    **settings: Any,
) -> ProcessCluster:
    """A cluster of real processes on this machine; start it with ``async with``, ``with``, ``await`` or start_sync().

    ``nodes``: how many (5 for a new cluster). ``path``: a directory that keeps the data; an existing cluster in it is
    started again. Without a path the data are in a temporary directory that goes with the cluster. ``secret``: of at
    least 16 characters; made up by default. ``placement``: a class for this slot, e.g. from a notebook cell;
    ``policies``: the same for other slots. ``settings``: of every node, such as ``db={"shards": 8}``. ``timeout_s``:
    for the start.

    Raises :class:`~gostore.core.errors.ConfigError` and :class:`~gostore.core.errors.PolicyError`.
    """
    if not hasattr(os, "fork"):
        from gostore.core.errors import NotSupported

        raise NotSupported("a cluster of processes needs fork(), which this system lacks; on Windows use WSL")
    from gostore.core.errors import ConfigError
    from gostore.launch.place import Place

    if path is not None and not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path = {path!r}: expected the name of a directory")

    place = Place(path)
    place.boot()
    try:
        from gostore.launch.processes import ProcessCluster
        from gostore.testbed import check_arguments

        check_arguments(timeout_s=timeout_s, policies=policies)
        slots = {**(policies or {}), **({"placement": placement} if placement is not None else {})}
        return ProcessCluster(
            place, nodes, name=name, secret=secret, policies=slots, timeout_s=timeout_s, settings=settings
        )
    except BaseException:
        place.abandon()
        raise


class _Callable(types.ModuleType):
    """``gs.launch`` is this package as soon as anything in it is imported; calling it launches all the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> ProcessCluster:
        return launch(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

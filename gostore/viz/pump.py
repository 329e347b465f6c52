"""A thread that calls a function again and again: the view's heartbeat.

The view has to move while the notebook's own thread is busy in a cell, and while the cluster's client thread waits for
a dead node; so it has threads of its own. No node ever loads this module.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 5.0


class Pump:
    """Calls ``work`` every ``interval_s`` seconds, or after :meth:`nudge`, until :meth:`stop`.

    After each call it rests ``rest_s``: a storm of nudges makes it no faster than that.

    What ``work`` raises is logged, and the pump goes on. The thread is a daemon: it never keeps a kernel alive.
    """

    def __init__(self, work: Callable[[], None], *, interval_s: float, name: str, rest_s: float = 0.0) -> None:
        self._work = work
        self._rest_s = rest_s
        self._interval_s = interval_s
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def nudge(self) -> None:
        """Work now rather than at the end of the interval."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread and wait for it, unless it is the caller. Safe to call twice."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(STOP_TIMEOUT_S)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait(self._interval_s)
            self._wake.clear()
            if self._stopped.is_set():
                return
            try:
                self._work()
            except Exception:
                log.exception("the view's thread %s", self._thread.name)
            self._stopped.wait(self._rest_s)

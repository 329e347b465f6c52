"""A child process that ends with its parent, also when the parent is killed and when the child is stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

PR_SET_PDEATHSIG = 1
STATUS_ORPHANED = 71


def _libc_prctl() -> Any:
    """prctl of Linux, loaded once in the parent, so that a forked child only calls it."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        import ctypes

        return ctypes.CDLL(None, use_errno=True).prctl
    except (ImportError, OSError, AttributeError):
        return None


_prctl = _libc_prctl()


def die_with_parent(parent: int, life_fd: int) -> None:
    """Tie this process to its parent, whose process id was taken before the fork.

    ``life_fd``: the reading end of a pipe whose writing end only the parent holds; its end is the sign where the kernel
    cannot do it. (That needs a thread that runs: a stopped child ends when it is continued.)
    """
    if _prctl is not None and _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0:
        # The parent may have died before the kernel was asked.
        if os.getppid() != parent:
            os._exit(STATUS_ORPHANED)
        os.close(life_fd)
        return
    threading.Thread(target=_wait_for_end, args=(life_fd,), name="lifeline", daemon=True).start()


def _wait_for_end(life_fd: int) -> None:
    while os.read(life_fd, 1):
        pass
    os._exit(STATUS_ORPHANED)

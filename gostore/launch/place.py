"""Where a cluster lives: its directory, and the zygote that was started for it.

<path>/cluster.json   see ``gostore.client.record``
<path>/lock           held while it runs
<path>/zygote.log     what the launcher printed
<path>/<node>/        the data of one node, and its node.log
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from pathlib import Path

from gostore.core.errors import ConfigError
from gostore.launch.spawn import NODE_ENTRY, start_zygote

END_TIMEOUT_S = 15.0


class Place:
    """A directory for one cluster, temporary without a path. :meth:`boot` comes first, before heavy imports."""

    def __init__(self, path: str | os.PathLike[str] | None, *, entry: str = NODE_ENTRY) -> None:
        self.temporary = path is None
        self.root = _temporary() if path is None else Path(path).absolute()
        self.begun_s = time.monotonic()
        self._entry = entry
        self._lock = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def zygote_log(self) -> Path:
        return self.root / "zygote.log"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "boot() was not called"
        return self._process

    def boot(self) -> None:
        """Take the directory and start its zygote. Raises :class:`ConfigError` when it is in use or cannot be used."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._process = start_zygote(
                self.zygote_log, entry=self._entry, remove=self.root if self.temporary else None
            )
        except OSError as error:
            self.leave()
            if isinstance(error, BlockingIOError):
                what = "a cluster runs there already; stop it, or take another path"
            else:
                what = f"{error.strerror}; expected a directory that can be read and written"
            raise ConfigError(f"path = {str(self.root)!r}: {what}") from None

    def abandon(self) -> None:
        """End a zygote that was never spoken to, wait for it, and leave."""
        if self._process is not None and self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.leave()

    def leave(self) -> None:
        """Give the directory up, and remove it when it was temporary. May be called again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self.temporary:
            import shutil

            shutil.rmtree(self.root, ignore_errors=True)


def _temporary() -> Path:
    """A new directory for this user alone. (``tempfile`` does the same, after importing a dozen modules.)"""
    root = Path(os.environ.get("TMPDIR") or "/tmp", f"gostore-{os.urandom(8).hex()}")  # noqa: S108
    try:
        root.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"{root}: cannot be made: {error.strerror}; set TMPDIR, or give a path") from None
    return root

"""Starts the zygote. Imports little on purpose: this runs before anything else is loaded, so that both boot at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NODE_ENTRY = "gostore.node:main_in_child"

# The root of this very package comes first if it is not found anyway: a notebook may have it from a path of its own.
_BOOT = (
    "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "from gostore.launch.zygote import main; main()"
)


def start_zygote(log: Path, *, entry: str = NODE_ENTRY, remove: Path | None = None) -> subprocess.Popen[bytes]:
    """Start the zygote in a session of its own and return at once.

    ``log``: file for what it prints. ``remove``: directory that it removes when it ends. Raises ``OSError``.
    """
    root = str(Path(__file__).resolve().parents[2])
    # -P: a `random.py` in the working directory is the user's, not ours. The user's own modules come last.
    options = {
        "owner": os.getpid(),
        "entry": entry,
        "remove": None if remove is None else str(remove),
        "path": [os.path.abspath(place) for place in sys.path if os.path.isdir(place or ".")],
    }
    command = [sys.executable, "-P", "-c", _BOOT, root, json.dumps(options)]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            bufsize=0,
            start_new_session=True,
        )

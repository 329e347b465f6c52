"""What the zygote runs in tests that are about processes, not about nodes."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

from gostore.config import NodeConfig
from gostore.core.errors import ConfigError


def main(config: NodeConfig, sockets: dict[str, socket.socket], ready_fd: int) -> int:
    """Behaves as the ``cluster`` setting says: any name is a well-behaved node, some are not."""
    print(f"{config.name} speaks", flush=True)
    if config.cluster == "refuses":
        os.write(ready_fd, json.dumps({"error": ConfigError("ring.replicas = 9: no").to_wire()}).encode() + b"\n")
        return 1
    if config.cluster == "crashes":
        raise RuntimeError("a bug in the node")
    if config.cluster == "exits":
        sys.exit(3)
    report = {
        "open": sorted(os.listdir("/dev/fd"), key=int),
        "session": os.getsid(0),
        "ports": {name: bound.getsockname()[1] for name, bound in sockets.items()},
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
    os.write(ready_fd, json.dumps({"ready": report}).encode() + b"\n")
    while True:
        signal.pause()

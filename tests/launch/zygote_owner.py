"""Owns a zygote with one child until it is killed: ``zygote_owner.py DIRECTORY FORKS``; prints the process ids."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gostore.launch.spawn import start_zygote

directory, forks = Path(sys.argv[1]), sys.argv[2] == "True"
zygote = start_zygote(directory / "zygote.log", entry="trivial_node:main")
assert zygote.stdin is not None
assert zygote.stdout is not None


def ask(**request: Any) -> None:
    zygote.stdin.write(json.dumps(request).encode() + b"\n")


ask(id=1, do="bind", node="n1", host="127.0.0.1", tcp=0, udp=0, rest=-1)
config = {"name": "n1", "secret": "x" * 16, "data_dir": str(directory / "n1")}
ask(id=2, do="start", node="n1", config=config)
messages: list[dict[str, Any]] = []
text = b""
while not any(message.get("event") == "ready" for message in messages):
    text += os.read(zygote.stdout.fileno(), 65536)
    messages = [json.loads(line) for line in text.split(b"\n")[:-1]]
node = next(message["pid"] for message in messages if message.get("id") == 2)
child = os.fork() if forks else 0
if child or not forks:
    print(zygote.pid, node, child, flush=True)
time.sleep(60)

"""Owns a cluster of little nodes and ends in the way that it is told: ``cluster_owner.py HOW``; prints process ids."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gostore.launch.place import Place
from gostore.launch.processes import ProcessCluster

how = sys.argv[1]
place = Place(None, entry="little_node:main")
place.boot()
cluster = ProcessCluster(place, 3)
cluster.start_sync()
cluster.nodes["n3"].pause_sync()
print(place.root, place.process.pid, *cluster.pids(), flush=True)

if how == "exception":
    raise RuntimeError("something else went wrong")
if how == "exit":
    sys.exit(3)
if how == "fork":
    # What a fork does with its copy of the cluster is no concern of the cluster.
    if (child := os.fork()) == 0:
        del cluster
        sys.exit(0)
    os.waitpid(child, 0)
    print(cluster.call_sync("n1", "admin", "table")[0], flush=True)
if how == "interrupt":
    try:
        print("waiting", flush=True)
        cluster.wait_until_sync(lambda statuses: [("n1", "never is")], "blessed", 60.0)
    except KeyboardInterrupt:
        cluster.nodes["n3"].resume_sync()
        cluster.wait_ready_sync()
        print(cluster, flush=True)
if how == "killed":
    time.sleep(60)

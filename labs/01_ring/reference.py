"""The reference solution of lab 01: consistent hashing with virtual nodes.

Karger and others: "Consistent Hashing and Random Trees" (STOC 1997); virtual nodes as in Dynamo (SOSP 2007),
section 4.2.
"""

import bisect
import hashlib


def token(data):
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


class MyRing:
    def __init__(self, nodes, replicas, tokens_per_node=32):
        self.replicas = min(replicas, len(nodes))
        self.points = sorted(
            (token(f"{name}/{number}".encode()), name)
            for name, weight in nodes.items()
            for number in range(max(1, round(weight * tokens_per_node)))
        )

    def owners(self, key):
        start = bisect.bisect_right(self.points, (token(key), ""))
        found = []
        for step in range(len(self.points)):
            name = self.points[(start + step) % len(self.points)][1]
            if name not in found:
                found.append(name)
                if len(found) == self.replicas:
                    break
        return tuple(found)

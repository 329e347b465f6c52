"""Lessons in a whole cluster, simulated: what a student would do in a notebook, and what can be relied on.

What is printed holds for every seed, or changes seldom: states, who holds what, and what the journal says, without
times and with what several nodes say alike in one line.

Commands:

``start 5 seed=7``               nodes n1 to n5
``write /a some text``           a small file; ``size=BYTES`` instead of a text: a large one; ``via=n1``: through n1
``read /a``                      ``via=n1``
``delete /a``
``holders /a``                   which nodes hold the file's chunks
``put k 5``, ``get k``           an object; ``via=n1``
``kill n2``, ``power_cut n2``, ``pause n2``, ``resume n2``, ``restart n2``
``partition n1,n2 | n3,n4,n5``, ``one_way n1 | n2,n3``, ``isolate n1``, ``loss 0.2``, ``slow_disk n2 0.5``, ``heal``
``power_cut n2 during 20``       twenty files are being written meanwhile
``join``                         one more node; how many of 300 keys have another first owner
``wait settled``, ``wait ready``, ``wait n2 offline``; ``timeout=SECONDS``
``pass 5``                       so many seconds of virtual time
``states``                       what the cluster thinks of its nodes
``views``                        whom each node thinks online
``check``                        are all files whole?
``events kind...``               what the journal has of these kinds since the last time
"""

from __future__ import annotations

import asyncio

import pytest

from gostore.core.errors import GoStoreError, Timeout
from gostore.sim import simulate

KEYS = [f"key-{number}" for number in range(300)]
FAULTS = ("kill", "power_cut", "pause", "resume", "restart", "isolate")
DAMAGE = ("lost", "corrupt", "under_replicated", "orphans", "dangling")


class Lab:
    def __init__(self) -> None:
        self.cluster = None
        self.position = 0

    def start(self, nodes: int, seed: int) -> str:
        self.cluster = simulate(nodes, seed=seed, db={"shards": 4})
        self.cluster.start_sync()
        self.cluster.watch_sync("storage")
        self.cluster.db.create_container_sync("objects")
        self.position = self.cluster.events.position
        return self.states()

    def states(self) -> str:
        by_state: dict[str, list[str]] = {}
        for name, node in self.cluster.nodes.items():
            by_state.setdefault(node.state, []).append(name)
        return "\n".join(f"{state}: {' '.join(names)}" for state, names in by_state.items())

    def views(self) -> str:
        views: dict[str, list[str]] = {}
        for name, node in self.cluster.nodes.items():
            if node.life.answers:
                members = self.cluster.call_sync(name, "admin", "status")["members"]
                online = sorted(other for other, facts in members.items() if facts["state"] == "online")
                views.setdefault(" ".join(online), []).append(name)
        return "\n".join(f"{' '.join(names)}: {online} are online" for online, names in views.items())

    def wait(self, what: list[str], timeout_s: float) -> str:
        try:
            match what:
                case ["settled"]:
                    self.cluster.wait_settled_sync(timeout_s)
                case ["ready"]:
                    self.cluster.wait_ready_sync(timeout_s)
                case [node, state]:
                    self.cluster.wait_state_sync(node, state, timeout_s)
        except Timeout:
            return f"not {what[-1]} after {timeout_s:g} s"
        return self.states()

    def write(self, path: str, words: list[str], options: dict[str, str]) -> str:
        content = bytes(i % 251 for i in range(int(options["size"]))) if "size" in options else " ".join(words).encode()
        self.cluster.fs.write_sync(path, content, via=options.get("via"))
        return f"{len(content)} bytes are stored"

    def read(self, path: str, via: str | None) -> str:
        content = self.cluster.fs.read_sync(path, via=via)
        return content.decode() if len(content) < 100 else f"{len(content)} bytes"

    def holders(self, path: str) -> str:
        found = self.cluster.locate_file_sync(path)["chunks"]
        return (
            "\n".join(f"chunk {number}: {' '.join(sorted(chunk['held']))}" for number, chunk in enumerate(found, 1))
            or "it is small: it lives in its header, in the database"
        )

    def cut_power_during(self, name: str, count: int) -> str:
        """Files are being written when the machine loses its power; which of them were acknowledged?"""
        cluster, acknowledged = self.cluster, []

        async def write(number: int) -> None:
            path = f"/during/{number}"
            try:
                await cluster.fs.write(path, f"text {number}")
            except GoStoreError:
                return
            acknowledged.append(number)
            if len(acknowledged) == count // 2:
                await cluster.faults.power_cut(name)

        async def both() -> list[int]:
            async with asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(write(number))
            await cluster.wait_settled()
            return [n for n in acknowledged if await cluster.fs.read(f"/during/{n}") != f"text {n}".encode()]

        wrong = cluster.run(both())
        assert len(acknowledged) >= count // 2
        return f"of those that were acknowledged, {len(wrong) or 'none'} {'are' if wrong else 'is'} lost or wrong"

    def join(self) -> str:
        before = [self.cluster.locate_sync(key)["owners"][0] for key in KEYS]
        node = self.cluster.add_node_sync()
        self.cluster.wait_settled_sync()
        after = [self.cluster.locate_sync(key)["owners"][0] for key in KEYS]
        moved = [new for old, new in zip(before, after, strict=True) if old != new]
        others = [new for new in moved if new != node.name]
        return (
            f"{node.name} is here; {len(moved)} of {len(KEYS)} keys have another first owner\n"
            f"{'all of them' if not others else len(moved) - len(others)} moved to {node.name}"
        )

    def check(self) -> str:
        found = self.cluster.fs.check_sync()
        damage = [f"{found[what]} {what.replace('_', ' ')}" for what in DAMAGE if found[what]]
        count = f"{found['files']} file" + ("" if found["files"] == 1 else "s")
        return f"{count}: {', '.join(damage) or 'all whole'}"

    def events(self, kinds: list[str]) -> str:
        """What was said, in the order in which it was first said, with who said it."""
        said: dict[str, list[str]] = {}
        start = self.position - self.cluster.events.forgotten
        for event in list(self.cluster.events)[start:]:
            if event.kind in kinds and (text := told(event.kind, event.data)):
                said.setdefault(text, []).append(event.node)
        self.position = self.cluster.events.position
        lines = []
        for text, nodes in said.items():
            names = sorted(dict.fromkeys(nodes))
            lines.append(text if names == ["testbed"] else f"{text}   ({' '.join(names)})")
        return "\n".join(lines) or "nothing"


def told(kind: str, data: dict) -> str:
    match kind:
        case "member":
            return f"{data['member']} is {data['state']}"
        case "master":
            return "there is a new master"
        case "suspect":
            return f"{data['member']} is suspected"
        case "refute":
            return "I am alive!"
        case "chunk_copied":
            return "I copy chunks that I should hold"
        case "wal_recovered":
            return "I recover my log"
        case "fault":
            return f"fault: {data['fault']}"
    raise ValueError(f"events of kind {kind} are not told here")


def reason(error: GoStoreError) -> str:
    """A refusal, without what depends on the moment."""
    return f"{error.code}, {'it surely did not happen' if error.definite else 'it may have happened'}"


@pytest.fixture
def lab():
    lab = Lab()
    yield lab
    if lab.cluster is not None:
        lab.cluster.stop_sync()


def test_cluster(scenario, transcript, lab):
    def handle(step):
        options, via = step.options, step.options.get("via")
        if step.name == "start":
            return lab.start(int(step.args[0]), int(options["seed"]))
        faults = lab.cluster.faults
        try:
            match step.name, step.args:
                case "write", [path, *words]:
                    return lab.write(path, words, options)
                case "read", [path]:
                    return lab.read(path, via)
                case "delete", [path]:
                    lab.cluster.fs.delete_sync(path)
                case "holders", [path]:
                    return lab.holders(path)
                case "put", [key, value]:
                    lab.cluster.db.set_sync("objects", key, int(value), via=via)
                case "get", [key]:
                    return str(lab.cluster.db.get_sync("objects", key, via=via))
                case "power_cut", [node, "during", count]:
                    return lab.cut_power_during(node, int(count))
                case word, [node] if word in FAULTS:
                    getattr(faults, f"{word}_sync")(node)
                case "partition" | "one_way", [*groups]:
                    sides = [side.split(",") for side in groups if side != "|"]
                    faults.partition_sync(*sides, one_way=step.name == "one_way")
                case "loss", [probability]:
                    faults.loss_sync(float(probability))
                case "slow_disk", [node, seconds]:
                    faults.slow_disk_sync(node, float(seconds))
                case "heal", []:
                    faults.heal_sync()
                case "join", []:
                    return lab.join()
                case "wait", what:
                    return lab.wait(what, float(options.get("timeout", 60)))
                case "pass", [seconds]:
                    lab.cluster.sleep_sync(float(seconds))
                case "views", []:
                    return lab.views()
                case "states", []:
                    return lab.states()
                case "check", []:
                    return lab.check()
                case "events", kinds:
                    return lab.events(kinds)
                case _:
                    raise ValueError(f"no such command: {step.name} {step.args}")
        except GoStoreError as error:
            return reason(error)
        return "ok"

    transcript(scenario, handle)

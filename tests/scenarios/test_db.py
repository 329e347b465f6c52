"""Scenarios of the database's pure core: transactions in a shard, sessions, and transactions across shards.

Commands (values are numbers; all objects are in one container; ``shard=S`` on any of them, else shard 0):

``put a=1 b=2``                the objects are there, by one commit
``begin t``                    a transaction takes its snapshot
``get t a``, ``list t a/``     it reads an object; all keys with a prefix
``set t a 5``, ``add t a 5``   it writes, for itself
``delete t a``
``commit t``                   its reads and writes go into the log, and are judged when that entry is applied;
                               ``request=ann/1``: under a client's request number, ``repeated=yes``: once more
``coordinate t``               the first of several shards validates, locks, and becomes the coordinator
``prepare t ID``               another shard validates and locks, for the transaction with this id
``decide ID commit``           (or ``abort``) at the coordinator the decision, elsewhere its execution
``forget ID``                  the coordinator need not know it any more
``drop``                       the container is dropped
``state``                      the objects with their versions, and the transactions that hold locks
"""

from __future__ import annotations

from gostore.core.errors import GoStoreError
from gostore.core.keyvalue import PointRead, RangeRead, prefix_end
from gostore.core.values import pack, unpack
from gostore.services.db.machine import ShardMachine, pack_command, unpack_command

SIZE = 1 << 20
CONTAINER = "c"


class Transaction:
    """What a client keeps of a transaction in one shard."""

    def __init__(self, machine: ShardMachine) -> None:
        self.machine = machine
        self.snapshot = machine.applied
        self.reads: list[PointRead | RangeRead] = []
        self.writes: list[list] = []

    def get(self, key: str) -> str:
        stored = self.machine.store.read(CONTAINER, key, self.snapshot)
        self.reads.append(PointRead(CONTAINER, key, 0 if stored is None else stored.version))
        return f"{key} is absent" if stored is None else f"{key} = {unpack(stored.packed)}, version {stored.version}"

    def list(self, prefix: str) -> str:
        end = prefix_end(prefix)
        rows = list(self.machine.store.scan(CONTAINER, prefix, end, self.snapshot))
        newest = max((row.version for row in rows), default=0)
        self.reads.append(RangeRead(CONTAINER, prefix, end, self.machine.shard, len(rows), newest))
        return "\n".join(f"{row.key} = {unpack(row.packed)}, version {row.version}" for row in rows) or "nothing"

    def write(self, operation: str, key: str, value: int | None) -> str:
        self.writes.append([operation, CONTAINER, key, [], pack(value, SIZE)])
        return "ok"

    def to_wire(self) -> tuple[list, list]:
        return [read.to_wire() for read in self.reads], self.writes


class Database:
    def __init__(self) -> None:
        self.shards: dict[int, ShardMachine] = {}
        self.transactions: dict[str, Transaction] = {}

    def shard(self, number: int) -> ShardMachine:
        return self.shards.setdefault(number, ShardMachine(number, SIZE))

    def apply(self, machine: ShardMachine, *command) -> str:
        """Through the log's own format, as on every replica."""
        index = machine.applied + 1
        outcome = machine.apply(unpack_command(pack_command(command)), index)
        return f"entry {index}: {said(outcome)}"

    def state(self, machine: ShardMachine) -> str:
        lines = [f"{row.key} = {unpack(row.packed)}, version {row.version}" for row in machine.store.rows(CONTAINER)]
        for name, prepared in machine.prepared.items():
            reads = [read.key if isinstance(read, PointRead) else f"{read.start}*" for read in prepared.reads]
            writes = [key for _, key in prepared.values]
            lines.append(
                f"{name} holds locks: read {' '.join(reads) or 'nothing'}, written {' '.join(writes) or 'nothing'}"
            )
        for name, entry in machine.coordinated.items():
            decided = {None: "pending", True: "committed", False: "aborted"}[entry.committed]
            lines.append(f"{name} of shards {' '.join(map(str, entry.shards))} is {decided}")
        return "\n".join(lines) or "nothing"


def said(outcome: list) -> str:
    match outcome:
        case ["ok", _]:
            return "ok"
        case ["conflict", _, key, why, lock]:
            return f"conflict, {key} {why}".replace(",  ", ", it ") + (": try again when it is gone" if lock else "")
        case ["error", code, message]:
            return f"{code}: {message}"
        case ["begun", name]:
            return f"begun, its id is {name}"
        case ["pending", name]:
            return f"pending, it is being driven as {name}"
        case ["decided", commit, at]:
            done = "" if at else ", and there is nothing to do here"
            return ("committed" if commit else "aborted") + done
        case ["dropped", _]:
            return "the container was dropped"
        case ["forgotten"]:
            return "forgotten: nobody knows whether it was executed"
    raise AssertionError(outcome)


def request(options: dict[str, str]) -> list | None:
    if "request" not in options:
        return None
    client, _, sequence = options["request"].partition("/")
    return [client, int(sequence), options.get("repeated") == "yes"]


def test_db(scenario, transcript):
    db = Database()

    def handle(step):
        machine = db.shard(int(step.options.get("shard", 0)))
        try:
            match step.name, step.args:
                case "put", []:
                    values = {key: int(value) for key, value in step.options.items() if key != "shard"}
                    writes = [["set", CONTAINER, key, [], pack(value, SIZE)] for key, value in values.items()]
                    return db.apply(machine, "commit", None, [], writes)
                case "begin", [name]:
                    db.transactions[name] = Transaction(machine)
                    return f"snapshot of index {machine.applied}"
                case "get", [name, key]:
                    return db.transactions[name].get(key)
                case "list", [name, prefix]:
                    return db.transactions[name].list(prefix)
                case "set" | "add", [name, key, value]:
                    return db.transactions[name].write(step.name, key, int(value))
                case "delete", [name, key]:
                    return db.transactions[name].write("delete", key, None)
                case "commit", [name]:
                    reads, writes = db.transactions[name].to_wire()
                    return db.apply(machine, "commit", request(step.options), reads, writes)
                case "coordinate", [name]:
                    reads, writes = db.transactions[name].to_wire()
                    return db.apply(machine, "begin", request(step.options), reads, writes, [0, 1], 1)
                case "prepare", [name, transaction]:
                    reads, writes = db.transactions[name].to_wire()
                    return db.apply(machine, "prepare", transaction, 0, reads, writes)
                case "decide", [transaction, "commit" | "abort" as decision]:
                    return db.apply(machine, "decide", transaction, decision == "commit")
                case "forget", [transaction]:
                    return db.apply(machine, "forget", transaction)
                case "drop", []:
                    return db.apply(machine, "drop", CONTAINER)
                case "state", []:
                    return db.state(machine)
        except GoStoreError as error:
            return f"{error.code}: {error.message}"
        raise ValueError(f"no such command: {step.name} {step.args}")

    transcript(scenario, handle)

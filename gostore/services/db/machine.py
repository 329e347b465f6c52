"""The state machine of one shard: what the entries of its log mean.

Pure and deterministic: ``apply(command, index)`` depends on the commands before it and on nothing else, so that every
replica that applies the same log holds the same state, to the byte (:meth:`ShardMachine.digest`). It never raises for
what a client, or a node with a mistake, may have sent: what raises here stops all replicas, and again at every start.
The outcome says what happened. Commands and outcomes are msgpack arrays:

=========================================================  ============================================================
command                                                    outcome
=========================================================  ============================================================
``["commit", request, reads, writes]``: a transaction of   ``["ok", index]``, ``["conflict", container, key, why,
this shard alone                                           lock]``, ``["error", code, message]``, ``["dropped",
                                                           container]``, ``["forgotten"]``
``["commits", [[request, reads, writes], ...]]``: several   ``["each", [outcome, ...]]``, as above
of them, one after the other
``["begin", request, reads, writes, shards,                as above, with ``["begun", id]`` instead of ``["ok"]``;
generation]``: the first shard of several validates,       ``["pending", id]`` when the request was repeated and the
locks, and becomes their coordinator                       decision is not there yet
``["prepare", id, shard, reads, writes]``: another shard   ``["ok", index]`` or a refusal as above
validates and locks, on behalf of the coordinator
``["decide", id, commit]``: at the coordinator the         ``["decided", commit, index]``: the one that stands
decision itself, at the others its execution               (index 0: nothing was prepared here, or it is done)
``["forget", id]``: it was aborted, or every shard has      ``["ok", index]``
executed it
``["drop", container]``                                    ``["ok", index]``
=========================================================  ============================================================

*commits* are transactions of several tasks, or clients, that came together: an entry for all costs each replica less
than one for each. They are as atomic as if each had its own entry, no more; but what they write has one version, the
index. So no two of them may write the same object (:func:`.shard.apart`): who knows the version of its own write would
take the other one's for it.

Sessions. A request id is ``[client, sequence, repeated, settled below]``. The outcome of a request is kept and given
again, so that a request that is in the log twice is executed once. What its client waits for no longer (*settled
below*) is not kept; it is refused as ``["forgotten"]``, for an attempt may come late, even the first one: from a node
that stood still, say, while another one served the second. Memory is bounded: of a client that does not say what it
waits for, the last :data:`SESSION_OUTCOMES_MAX` outcomes, and the :data:`SESSIONS_MAX` clients heard last; a request
whose outcome may have been dropped is refused as well, and never guessed at. (Logs of the first version have no
*settled below*.)

A shard that coordinates is a client too, at the shards that take part: its requests are the transactions, their
sequence numbers the indices of their ``begin``. What was executed is remembered like that, so that a ``prepare`` that
comes late, while the coordinator still answers "committed", is refused and not executed a second time.

Two-phase commit (Gray, "Notes on Data Base Operating Systems", 1978; with logged participants and coordinator as in
Corbett et al., "Spanner", OSDI 2012, section 4.2.1). A transaction's id is (coordinator shard, generation, index of its
``begin``): no other ever has it. The decision is an entry of the coordinator's log; ``commit`` can only be decided
while the ``begin`` is pending, and ``commit`` is forgotten only after every shard has executed it. Hence a coordinator
that does not know an id can answer "aborted" with certainty, so that it need not remember what it aborted (presumed
abort: Mohan, Lindsay and Obermarck, "Transaction management in the R* distributed database management system", TODS
1986), and a pending one can be aborted by an entry of the log: no lock stays for ever.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
from xxhash import xxh3_64

from gostore.core import packing
from gostore.core.errors import BadRequest, Corrupt, GoStoreError, NotSupported, TooLarge
from gostore.core.keyvalue import OPERATIONS, RangeRead, Read, path_from_wire, read_from_wire
from gostore.services.db.mvcc import Row, Store
from gostore.services.db.transaction import Clash, LockTable, Place, find_clash
from gostore.services.db.values import Room, Step, evaluate, replace

SESSIONS_MAX: Final = 1024
"""Clients remembered per shard. A client is a node, or a notebook that talks to one."""

SESSION_OUTCOMES_MAX: Final = 512
"""Outcomes kept in a shard for a client that does not say which ones it waits for."""

SESSION_OPEN_MAX: Final = 65_536
"""Outcomes kept for one that says it, from the oldest that it waits for on: what may overtake that one."""

PREPARED_MAX: Final = 1024
"""Transactions across shards that may hold locks in one shard; more are refused as a conflict."""

DROPPED_MAX: Final = 4096
"""Dropped containers remembered, so that a node that has not heard of it cannot write into one."""

ADMITTED: Final = ".admitted"
DROPS: Final = "drops"
"""The container of those that are taken for alive by a shard that may have forgotten dropped ones, and the object in it
that every drop writes; see :mod:`gostore.services.db.drops`."""

RANGE_KEYS_MAX: Final = 1024 * 1024
"""Objects in the ranges that one transaction read in one shard: each is looked at again while nothing else happens.

As many as a transaction of 1024 scans can have read.
"""

COMMANDS: Final = ("commit", "commits", "begin", "prepare", "decide", "forget", "drop")
"""Those of this release. A later format of a command has another name."""

SNAPSHOT_FORMAT: Final = 1
SNAPSHOT_PIECE_SIZE_BYTES: Final = 256 * 1024
"""About this much is packed, sent and written at a time."""

Outcome = list[Any]
_ROW_OVERHEAD_BYTES: Final = 16


pack_command: Final[Callable[[Sequence[Any]], bytes]] = packing.pack


_TRANSACTION: Final = re.compile(r"[0-9]{1,18}\.[0-9]{1,18}\.[0-9]{1,18}")  # so that each number fits 64 bits
_UNREADABLE: Final = (
    "the transaction cannot be read: expected arrays of reads and of writes, each write "
    "['set' | 'delete' | 'add', container, key, path, packed value]"
)


def is_transaction_id(transaction: Any) -> bool:
    return isinstance(transaction, str) and _TRANSACTION.fullmatch(transaction) is not None


def is_request(request: Any) -> bool:
    """Whether it is a request id as it stands in the log."""
    match request:
        case [str(), int(), bool()] | [str(), int(), bool(), int()]:
            return True
    return False


def is_sound(command: Sequence[Any]) -> bool:
    """Whether all but its reads and writes, which are examined when it is executed, is what it should be."""
    match command:
        case ["commits", items]:
            return isinstance(items, list) and all(isinstance(item, list) and len(item) == 3 for item in items)
        case ["begin", _, _, _, shards, generation]:
            return isinstance(shards, list) and all(isinstance(one, int) for one in [*shards, generation])
        case ["prepare", transaction, coordinator, _, _]:
            return is_transaction_id(transaction) and isinstance(coordinator, int)
        case ["decide", transaction, commit]:
            return is_transaction_id(transaction) and isinstance(commit, bool)
        case ["forget", transaction]:
            return is_transaction_id(transaction)
        case ["drop", container]:
            return isinstance(container, str)
    return True


def unpack_command(payload: bytes) -> list[Any]:
    command: list[Any] = msgpack.unpackb(payload, raw=False)
    return command


@dataclass(slots=True)
class Prepared:
    """A transaction across shards that passed validation here and holds its locks. ``values``: what it will write."""

    coordinator: int
    index: int
    reads: list[Read]
    values: dict[Place, bytes | None]


@dataclass(slots=True)
class Coordinated:
    """A transaction that this shard coordinates; ``committed``: None while it is pending."""

    shards: list[int]
    request: list[Any] | None
    index: int
    committed: bool | None = None


@dataclass(slots=True)
class _Session:
    outcomes: OrderedDict[int, Outcome] = field(default_factory=OrderedDict)
    dropped: int = -1
    """What was not executed up to this sequence number never will be; nor is its outcome known any more."""

    def settle(self, below: int) -> None:
        """The client waits for nothing below this number."""
        self.dropped = below - 1
        while self.outcomes and next(iter(self.outcomes)) < below:
            self.outcomes.popitem(last=False)


def _as_request(transaction: str, coordinator: int) -> tuple[str, int]:
    """The client and the sequence number under which a shard that takes part remembers it.

    The generation is no part of it: every change of a leader would add a client, and push another one out.
    """
    return f"shard {coordinator}", int(transaction.rpartition(".")[2])


def _bad_request(message: str) -> Outcome:
    return ["error", BadRequest.code, message]


class ShardMachine:
    """See the page above. ``value_size_bytes_max`` must be the same on all nodes."""

    def __init__(self, shard: int, value_size_bytes_max: int) -> None:
        self.shard = shard
        self.store = Store()
        self.locks = LockTable()
        self.prepared: dict[str, Prepared] = {}
        self.coordinated: dict[str, Coordinated] = {}
        self.applied = 0
        self._value_size_bytes_max = value_size_bytes_max
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._sessions_dropped = False
        self._dropped: OrderedDict[str, int] = OrderedDict()

    # applying

    def apply(self, command: Sequence[Any], index: int) -> Outcome:
        """Execute one entry of the log; indices grow by one."""
        self.applied = index
        match command:
            case ["commit", request, reads, writes]:
                return self._once(request, self._commit, reads, writes, index)
            case _ if not is_sound(command):
                return _bad_request(f"{command[0]}: its arguments are not what they should be")
            case ["commits", items]:
                commit, once = self._commit, self._once
                return ["each", [once(request, commit, reads, writes, index) for request, reads, writes in items]]
            case ["begin", request, reads, writes, shards, generation]:
                return self._once(request, self._begin, request, reads, writes, shards, generation, index)
            case ["prepare", transaction, coordinator, reads, writes]:
                if transaction in self.prepared:
                    return ["ok", self.prepared[transaction].index]
                if self._was_executed(transaction, coordinator):
                    return ["conflict", *Clash("", "", "was decided already", lock=False)]
                return self._prepare(transaction, coordinator, reads, writes, index)
            case ["decide", transaction, commit]:
                return self._decide(transaction, commit, index)
            case ["forget", transaction]:
                self.coordinated.pop(transaction, None)
                return ["ok", index]
            case ["drop", container]:
                self._dropped[container] = index
                while len(self._dropped) > DROPPED_MAX:
                    self._dropped.popitem(last=False)
                self.store.drop(container, index)
                return ["ok", index]
        # An entry that this node cannot read must stop it, and not be skipped: others may have applied it.
        if isinstance(command, list) and command and isinstance(command[0], str) and command[0] not in COMMANDS:
            raise NotSupported(
                f"shard {self.shard}: entry {index} is a command {command[0]!r:.40}, which this release does not know: "
                "run the release that wrote it, on all nodes"
            )
        raise Corrupt(f"shard {self.shard}: entry {index} is no command: {command!r:.100}")

    def skip(self, index: int) -> None:
        """An entry that is the replication's own."""
        self.applied = index

    def _once(self, request: Any, execute: Callable[..., Outcome], *args: Any) -> Outcome:
        if request is None:
            return execute(*args)
        if not is_request(request):
            return _bad_request(f"{request!r:.100} is no request id")
        client, sequence, repeated, *settled = request
        session = self._sessions.get(client)
        if session is None:
            if repeated and self._sessions_dropped:
                return ["forgotten"]
            session = self._sessions[client] = _Session()
            if len(self._sessions) > SESSIONS_MAX:
                self._sessions.popitem(last=False)
                self._sessions_dropped = True
        self._sessions.move_to_end(client)
        if settled and settled[0] > session.dropped + 1:
            session.settle(settled[0])
        known = session.outcomes.get(sequence)
        if known is not None:
            return known
        if sequence <= session.dropped and (repeated or settled):
            # Also one that does not say that it is repeated: an attempt after it may have come before it.
            return ["forgotten"]
        outcome = execute(*args)
        if outcome[0] == "dropped":
            # Whoever asks again may mean a new container of that name, or has admitted this one.
            return outcome
        # Whoever repeats a request that is being driven must wait for it, and not drive it a second time.
        session.outcomes[sequence] = ["pending", outcome[1]] if outcome[0] == "begun" else outcome
        if len(session.outcomes) > (SESSION_OPEN_MAX if settled and settled[0] else SESSION_OUTCOMES_MAX):
            session.dropped = max(session.dropped, session.outcomes.popitem(last=False)[0])
        return outcome

    def outcome_of(self, client: str, sequence: int) -> Outcome | None:
        """The outcome that is kept for a request."""
        session = self._sessions.get(client)
        return None if session is None else session.outcomes.get(sequence)

    def is_dropped(self, container: str) -> bool:
        """Whether it was dropped, or may have been: whoever knows better admits it."""
        if container in self._dropped:
            return True
        if len(self._dropped) < DROPPED_MAX or container.startswith("."):  # none is forgotten; the system's own
            return False
        return bool(self.store.version(ADMITTED, DROPS)) and not self.store.version(ADMITTED, container)

    def _examine(self, reads: Any, writes: Any) -> tuple[list[Read], dict[Place, bytes | None]] | Outcome:
        """The reads and the new values of a transaction that may commit now, or the refusal. Changes nothing."""
        try:
            parsed = [read_from_wire(read) for read in reads]
            places = [(container, key) for _, container, key, _, _ in writes]
            if self._dropped:
                for container in dict.fromkeys([read.container for read in parsed] + [place[0] for place in places]):
                    if self.is_dropped(container):
                        return ["dropped", container]
            if parsed or self.locks:
                for read in parsed:
                    if type(read) is RangeRead:
                        self._check_ranges(parsed)
                        break
                clash = find_clash(self.store, self.locks, parsed, places)
                if clash is not None:
                    return ["conflict", *clash]
            return parsed, self._evaluate(writes, places)
        except GoStoreError as error:
            return ["error", error.code, error.message]
        except (ValueError, TypeError, RecursionError):
            # Not their words, which may be others in another release of Python.
            return _bad_request(_UNREADABLE)

    def _check_ranges(self, reads: list[Read]) -> None:
        ranges = [read for read in reads if isinstance(read, RangeRead)]
        keys = sum(self.store.count(read.container, read.start, read.end) for read in ranges)
        if keys > RANGE_KEYS_MAX:
            raise TooLarge(
                f"the ranges that the transaction read have {keys} objects in shard {self.shard}; at most "
                f"{RANGE_KEYS_MAX} are allowed: read less in one transaction"
            )

    def _evaluate(self, writes: list[Any], places: list[Place]) -> dict[Place, bytes | None]:
        """What the writes make of their objects."""
        values: dict[Place, bytes | None] = {}
        inside: dict[Place, list[Step]] = {}
        limit = self._value_size_bytes_max
        for write, place in zip(writes, places, strict=True):
            operation, container, key, path, operand = write
            if not (type(container) is type(key) is str and type(operand) is bytes and type(write) is list):
                raise BadRequest(_UNREADABLE)
            if operation == "set" and not path and not inside and len(operand) <= limit:
                values[place] = operand  # most often
            elif operation in ("set", "delete") and not path and place not in inside:
                values[place] = replace(operation, operand, limit)
            elif operation in OPERATIONS:
                if place not in values:
                    values[place] = self._packed(place)
                inside.setdefault(place, []).append((operation, path_from_wire(path), operand))
            else:
                raise BadRequest(_UNREADABLE)
        if inside:
            room = Room(limit)
            for place, steps in inside.items():
                values[place] = evaluate(values[place], steps, limit, room)
        return values

    def _packed(self, place: Place) -> bytes | None:
        stored = self.store.current(*place)
        return None if stored is None else stored.packed

    def _commit(self, reads: Any, writes: Any, index: int) -> Outcome:
        examined = self._examine(reads, writes)
        if isinstance(examined, list):
            return examined
        for (container, key), packed in examined[1].items():
            self.store.write(container, key, packed, index)
        return ["ok", index]

    # two-phase commit

    def _begin(self, request: Any, reads: Any, writes: Any, shards: list[int], generation: int, index: int) -> Outcome:
        transaction = f"{self.shard}.{generation}.{index}"
        outcome = self._prepare(transaction, self.shard, reads, writes, index)
        if outcome[0] != "ok":
            return outcome
        self.coordinated[transaction] = Coordinated(list(shards), request, index)
        return ["begun", transaction]

    def _prepare(self, transaction: str, coordinator: int, reads: Any, writes: Any, index: int) -> Outcome:
        if len(self.prepared) >= PREPARED_MAX:
            return ["conflict", *Clash("", "", f"{PREPARED_MAX} transactions across shards wait already", lock=True)]
        examined = self._examine(reads, writes)
        if isinstance(examined, list):
            return examined
        parsed, values = examined
        self.locks.acquire(transaction, parsed, values)
        self.prepared[transaction] = Prepared(coordinator, index, parsed, values)
        return ["ok", index]

    def _decide(self, transaction: str, commit: bool, index: int) -> Outcome:
        coordinated = self.coordinated.get(transaction)
        if coordinated is not None:
            if coordinated.committed is not None:
                return ["decided", coordinated.committed, index]
            coordinated.committed = commit
            self._settle_session(coordinated, index)
        prepared = self.prepared.pop(transaction, None)
        if prepared is None:
            # A coordinator that forgot it, or a shard that executed it already (or refused to prepare).
            return ["decided", commit and coordinated is not None, index if coordinated is not None else 0]
        self.locks.release(transaction)
        if coordinated is None:
            self._once([*_as_request(transaction, prepared.coordinator), False], list, ["decided", commit, index])
        if commit:
            for (container, key), packed in prepared.values.items():
                if container not in self._dropped:  # since it was prepared: nothing would ever remove it again
                    self.store.write(container, key, packed, index, prepared.index)
        return ["decided", commit, index]

    def _was_executed(self, transaction: str, coordinator: int) -> bool:
        """Whether it was prepared here and decided; also where that may have been dropped from memory."""
        client, sequence = _as_request(transaction, coordinator)
        session = self._sessions.get(client)
        return session is not None and (sequence <= session.dropped or sequence in session.outcomes)

    def _settle_session(self, coordinated: Coordinated, index: int) -> None:
        if coordinated.request is None:
            return
        client, sequence, *_ = coordinated.request
        session = self._sessions.get(client)
        if session is None or sequence not in session.outcomes:
            return
        if coordinated.committed:
            session.outcomes[sequence] = ["ok", index]
        else:
            session.outcomes[sequence] = ["conflict", *Clash("", "", "was refused by another shard", lock=False)]

    # snapshots

    def snapshot(self) -> Iterator[bytes]:
        """The whole state as a stream of bounded pieces. It is that of this call, whatever is applied meanwhile."""
        rows = {container: self.store.rows(container) for container in self.store.containers()}
        header = ["header", SNAPSHOT_FORMAT, self.shard, self.applied, self._sessions_dropped]
        small: list[list[Any]] = [["dropped", container, index] for container, index in self._dropped.items()]
        small += [
            ["session", client, session.dropped, list(session.outcomes.items())]
            for client, session in self._sessions.items()
        ]
        small += [
            [
                "prepared", transaction, entry.coordinator, entry.index, [read.to_wire() for read in entry.reads],
                [[*place, packed] for place, packed in entry.values.items()],
            ]
            for transaction, entry in self.prepared.items()
        ]  # fmt: skip
        small += [
            ["coordinated", transaction, entry.shards, entry.request, entry.index, entry.committed]
            for transaction, entry in self.coordinated.items()
        ]
        return _pieces(header, rows, small)

    def digest(self) -> str:
        """Of the whole state: equal on replicas that applied the same entries."""
        hasher = xxh3_64()
        for piece in self.snapshot():
            hasher.update(piece)
        return hasher.hexdigest()


def _pieces(header: list[Any], rows: dict[str, list[Row]], small: list[list[Any]]) -> Iterator[bytes]:
    packer = msgpack.Packer(use_bin_type=True)
    parts: list[bytes] = []
    size = records = 0
    for record in _records(header, rows, small):
        parts.append(packer.pack(record))
        records += 1
        size += len(parts[-1])
        if size >= SNAPSHOT_PIECE_SIZE_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    parts.append(packer.pack(["end", records]))
    yield b"".join(parts)


def _records(header: list[Any], rows: dict[str, list[Row]], small: list[list[Any]]) -> Iterator[list[Any]]:
    yield header
    yield from small
    for container, all_rows in rows.items():
        batch: list[Row] = []
        size = 0
        for row in all_rows:
            batch.append(row)
            size += len(row.key) + len(row.packed) + _ROW_OVERHEAD_BYTES
            if size >= SNAPSHOT_PIECE_SIZE_BYTES:
                yield ["rows", container, batch]
                batch, size = [], 0
        if batch:
            yield ["rows", container, batch]


class Restorer:
    """Rebuilds a machine from the pieces of :meth:`ShardMachine.snapshot`, in their order."""

    def __init__(self, shard: int, value_size_bytes_max: int) -> None:
        self._machine = ShardMachine(shard, value_size_bytes_max)
        self._records = 0
        self._ended = False

    def add(self, piece: bytes) -> None:
        """Raises ``Corrupt`` for what is no piece of a snapshot of this shard, ``NotSupported`` for another format."""
        unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=0)
        unpacker.feed(piece)
        try:
            for record in unpacker:
                self._take(record)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise Corrupt(f"shard {self._machine.shard}: a snapshot cannot be read: {error}") from error

    def finish(self) -> ShardMachine:
        """The machine. Raises ``Corrupt`` when pieces are missing."""
        if not self._ended:
            raise Corrupt(f"shard {self._machine.shard}: the snapshot ends early")
        self._machine.store.forget_history(self._machine.applied)
        return self._machine

    def _take(self, record: Any) -> None:
        machine = self._machine
        match record:
            case ["header", int(version), int(shard), int(applied), bool(sessions_dropped)]:
                if version != SNAPSHOT_FORMAT:
                    raise NotSupported(
                        f"a snapshot of shard {shard} has format version {version}; this release reads version "
                        f"{SNAPSHOT_FORMAT}: run the release that wrote it, on all nodes"
                    )
                if shard != machine.shard:
                    raise ValueError(f"it is of shard {shard}")
                machine.applied = applied
                machine._sessions_dropped = sessions_dropped
            case ["rows", str(container), [*rows]]:
                machine.store.load(container, [Row(*row) for row in rows])
            case ["dropped", str(container), int(index)]:
                machine._dropped[container] = index
            case ["session", str(client), int(dropped), [*outcomes]]:
                machine._sessions[client] = _Session(OrderedDict((s, outcome) for s, outcome in outcomes), dropped)
            case ["prepared", str(transaction), int(coordinator), int(index), [*reads], [*values]]:
                parsed = [read_from_wire(read) for read in reads]
                places = {(container, key): packed for container, key, packed in values}
                machine.locks.acquire(transaction, parsed, places)
                machine.prepared[transaction] = Prepared(coordinator, index, parsed, places)
            case ["coordinated", str(transaction), [*shards], request, int(index), committed]:
                machine.coordinated[transaction] = Coordinated(shards, request, index, committed)
            case ["end", int(records)]:
                if records != self._records:
                    raise ValueError(f"{self._records} of {records} records are there")
                self._ended = True
            case _:
                raise ValueError(f"unknown record {record!r:.100}")
        self._records += 1

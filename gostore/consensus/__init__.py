"""Consensus: one Raft core for every group of a node. A driver performs what it hands out.

A driver of one group, without batching over groups::

    raft = Raft(name, restored, storage, PROFILES["lan"], env.rng, loop.time())
    raft.campaign(loop.time())                # the first on the preference list of a fresh group

    async def work():                         # after every input: receive, propose, read, timeout, persisted, ...
        while (ready := raft.ready(loop.time())) is not None:
            send(ready.messages)              # may go before the sync
            write(ready.hard_state, ready.chunks, ready.truncate_from, ready.entries)
            if ready.chunks and ready.chunks[-1].done:
                machine.restore(chunks)       # those of this snapshot, collected since its number 0
            for entry in ready.committed:
                outcome = machine.apply(entry)  # resolves the waiter of (entry.index, entry.term), if there is one
            for read in ready.reads:
                ...                           # resolves the waiter of read.context
            if ready.must_sync:
                await wal.sync()              # other groups, and other work of this one, may go on meanwhile
            send(ready.messages_synced)
            raft.persisted(ready.number, loop.time())
        timer.set(raft.deadline_s)            # raft.timeout(loop.time()) then

A driver that does not wait for the sync takes the next Ready meanwhile, writes it behind the first, and reports both in
order. See :class:`Ready` for the rules, :class:`Raft` for the inputs, and :class:`Restored` for the start.
"""

from gostore.consensus.configuration import Configuration
from gostore.consensus.messages import (
    COMMAND,
    CONFIGURATION,
    NOOP,
    ORIGIN,
    Chunk,
    Entry,
    Message,
    Point,
    message_from_wire,
)
from gostore.consensus.raft import Raft
from gostore.consensus.ready import (
    CANDIDATE,
    FOLLOWER,
    LEADER,
    PRECANDIDATE,
    HardState,
    ReadState,
    Ready,
    Restored,
    Snapshot,
    Status,
    Storage,
)
from gostore.consensus.tunables import CHUNK_SIZE_BYTES_MAX, PROFILES, Tunables

__all__ = [
    "CANDIDATE",
    "CHUNK_SIZE_BYTES_MAX",
    "COMMAND",
    "CONFIGURATION",
    "FOLLOWER",
    "LEADER",
    "NOOP",
    "ORIGIN",
    "PRECANDIDATE",
    "PROFILES",
    "Chunk",
    "Configuration",
    "Entry",
    "HardState",
    "Message",
    "Point",
    "Raft",
    "ReadState",
    "Ready",
    "Restored",
    "Snapshot",
    "Status",
    "Storage",
    "Tunables",
    "message_from_wire",
]

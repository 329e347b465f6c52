"""The constants of a group: times in seconds, sizes in bytes, counts without a unit. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * 1024

CHUNK_SIZE_BYTES_MAX: Final = 1 * MIB
"""Of one chunk of a snapshot; what is larger is refused on arrival, and a snapshot that yields it is a bug."""

APPEND_ENTRIES_MAX: Final = 4096
"""In one message; what has more is refused on arrival, so it bounds ``append_entries_max`` of everybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunables:
    """A dead leader is replaced within about ``election_timeout_s x (1 .. 2)`` and three synced round trips."""

    election_timeout_s: float
    """Silence of the leader after which a follower may stand; each waits for a random time between this and twice
    this. Also: the time for which a vote is refused after a word of the leader, a leader may lead without a quorum, a
    transfer may take, and a forwarded read may wait. At least ten times a round trip with its sync (Raft, 5.6)."""
    heartbeat_s: float
    """The leader's word while there is nothing to say. Several should fit into ``election_timeout_s``, so that one
    lost message starts no election. Heartbeats stand on the multiples of this, so that those of all groups of a node
    are sent in one turn and share their packets."""
    retry_s: float
    """An append or a chunk without an answer is sent again after this, looked at with every heartbeat. Above the
    slowest usual sync, or what is only slow is sent twice."""
    quiet_after_s: float
    """With nothing to do for so long, and everybody up to date, the group goes quiet. Shorter: less idle load;
    longer: fewer wakings. Infinity: never."""
    append_size_bytes_max: int = 256 * KIB
    """Payloads in one message (one larger entry goes alone)."""
    append_entries_max: int = 1024
    inflight_messages_max: int = 32
    """Appends to one follower that are not answered; beyond, it waits."""
    inflight_size_bytes_max: int = 4 * MIB
    """Their payloads together. At least the bandwidth times the round trip with its sync."""
    uncommitted_size_bytes_max: int = 16 * MIB
    """Payloads that a leader has taken and not committed; beyond, proposals are refused."""
    entry_size_bytes_max: int = 8 * MIB
    """One payload."""
    committed_size_bytes_max: int = 1 * MIB
    """Payloads handed out for application at a time, which bounds the turn."""
    cache_entries_max: int = 1024
    """Entries kept in memory though they are applied and synced; older ones are read from the log for a follower that
    lags."""
    cache_size_bytes_max: int = 512 * KIB
    reads_max: int = 4096
    """Reads that wait for their index; beyond, they are refused."""
    learner_lag_entries_max: int = 256
    """A learner that lacks at most so many entries may become a voter: few enough to be made up for in a moment."""

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for times that cannot work together."""
        if not 0 < self.heartbeat_s < self.election_timeout_s:
            raise ValueError(
                f"heartbeat_s is {self.heartbeat_s}, election_timeout_s {self.election_timeout_s}: "
                "the first must be above 0 and below the second"
            )
        if not 0 < self.append_entries_max <= APPEND_ENTRIES_MAX:
            raise ValueError(f"append_entries_max is {self.append_entries_max}: it must be 1 to {APPEND_ENTRIES_MAX}")


PROFILES: Final[dict[str, Tunables]] = {
    # Loopback and labs: synced round trips of a millisecond or two.
    "fast": Tunables(election_timeout_s=0.5, heartbeat_s=0.125, retry_s=0.25, quiet_after_s=0.3),
    # Real networks and busy disks.
    "lan": Tunables(election_timeout_s=1.0, heartbeat_s=0.2, retry_s=0.5, quiet_after_s=1.0),
}

"""One Raft core, many groups."""

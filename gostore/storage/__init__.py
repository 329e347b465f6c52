"""One write-ahead log and one chunk store per node."""

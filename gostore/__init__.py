"""GoStore: learn, teach and research distributed systems from a notebook."""

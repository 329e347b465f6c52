"""The control channel of a node."""

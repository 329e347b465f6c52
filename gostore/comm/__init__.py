"""The RPC core: packets and frames over UDP and TCP."""

"""What is derived from a cluster's secret."""

from __future__ import annotations

from hashlib import blake2b


def rest_token(secret: str) -> str:
    """The bearer token of the REST interface: who knows it cannot compute the secret."""
    return blake2b(b"rest", key=secret.encode()[:64], digest_size=20).hexdigest()

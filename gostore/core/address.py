"""Where an endpoint can be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """One endpoint: small frames go to its UDP port, large ones to its TCP port."""

    host: str
    tcp_port: int
    udp_port: int

    def to_wire(self) -> list[Any]:
        return [self.host, self.tcp_port, self.udp_port]

    @classmethod
    def from_wire(cls, wire: Any) -> Address:
        """Raises ``ValueError`` when ``wire`` is not ``[host, tcp_port, udp_port]``."""
        match wire:
            case [str(host), int(tcp), int(udp)] if 0 <= tcp <= 65535 and 0 <= udp <= 65535:
                return cls(host, tcp, udp)
        raise ValueError(f"not an address: {wire!r}; expected [host, tcp_port, udp_port]")

    def __str__(self) -> str:
        return f"{self.host}:{self.tcp_port}/{self.udp_port}"

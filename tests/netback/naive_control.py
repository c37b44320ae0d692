"""What the control ring does, said once more in plain Python: the twin of netback.control and netback.hashing."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from rings import netif
from rings.netif import HASH_IPV4, HASH_IPV4_TCP, HASH_IPV6, HASH_IPV6_TCP

ALL = HASH_IPV4 | HASH_IPV4_TCP | HASH_IPV6 | HASH_IPV6_TCP
OKAY, NOT_SUPPORTED, INVALID, OVERFLOW = range(4)
Answer = tuple[int, int]


def toeplitz(key: bytes, data: bytes) -> int:
    """As netif.h says it in words: both are shift registers."""
    register = int.from_bytes(key.ljust(len(data) + 4, b"\0")[: len(data) + 4], "big")
    bits = len(data) * 8
    value = 0
    for k in range(bits):
        if data[k // 8] >> (7 - k % 8) & 1:
            value ^= register >> (bits - k) & 0xFFFFFFFF
    return value


@dataclass
class Vif:
    """What one guest has set. `page` of a request is what is behind its gref, None if nothing is."""

    queues: int
    algorithm: int = netif.HASH_ALGORITHM_NONE
    types: int = 0
    key: bytes = b""
    mapping: list[int] = field(default_factory=list)

    def request(self, kind: int, data: tuple[int, int, int], page: bytes | None) -> Answer:
        """(status, data) of the response."""
        match kind:
            case netif.CTRL_SET_HASH_ALGORITHM:
                if data[0] not in (netif.HASH_ALGORITHM_NONE, netif.HASH_ALGORITHM_TOEPLITZ):
                    return INVALID, 0
                self.algorithm = data[0]
            case netif.CTRL_GET_HASH_FLAGS:
                return (OKAY, ALL) if self.algorithm else (NOT_SUPPORTED, 0)
            case netif.CTRL_SET_HASH_FLAGS:
                if data[0] > ALL or not self.algorithm:
                    return INVALID, 0
                self.types = data[0]
            case netif.CTRL_SET_HASH_KEY:
                if data[1] > 40:
                    return OVERFLOW, 0
                if data[1] and page is None:
                    return INVALID, 0
                self.key = (page or b"")[: data[1]]
            case netif.CTRL_GET_HASH_MAPPING_SIZE:
                return OKAY, 128
            case netif.CTRL_SET_HASH_MAPPING_SIZE:
                if data[0] > 128:
                    return INVALID, 0
                self.mapping = [0] * data[0]
            case netif.CTRL_SET_HASH_MAPPING:
                _, size, offset = data
                if size > 128:
                    return OVERFLOW, 0
                if offset + size > len(self.mapping) or (size and page is None):
                    return INVALID, 0
                entries = struct.unpack_from(f"<{size}I", page or b"")
                if any(entry >= self.queues for entry in entries):
                    return INVALID, 0
                self.mapping[offset : offset + size] = entries
            case _:
                return NOT_SUPPORTED, 0
        return OKAY, 0

    def hash(self, version: int, ip: bytes, ports: bytes | None) -> Answer | None:
        """(type, hash) of a packet with this IP header; `ports` are those of TCP."""
        tcp, plain = (HASH_IPV4_TCP, HASH_IPV4) if version == 4 else (HASH_IPV6_TCP, HASH_IPV6)
        addresses = ip[12:20] if version == 4 else ip[8:40]
        if version and ports is not None and self.types & tcp:
            return tcp, toeplitz(self.key, addresses + ports)
        if version and self.types & plain:
            return plain, toeplitz(self.key, addresses)
        return None

    def steer(self, found: Answer | None, said: Answer | None, flow: int) -> tuple[int, Answer | None]:
        """The queue of a packet, and what the guest is told of it.

        `found` is its hash(), `said` what its sender says, `flow` what we make of it unasked.
        """
        free = (flow if said is None else said[1]) % self.queues
        if not self.algorithm:
            return free, None
        if not self.types:
            return free, said
        value = 0 if found is None else found[1]
        queue = self.mapping[value % len(self.mapping)] if self.mapping else value % self.queues
        return queue, said if found is None else found

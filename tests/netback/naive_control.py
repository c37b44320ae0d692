"""What the control ring does, said once more in plain Python: the twin of netback.control and netback.hashing."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from rings import netif
from rings.netif import HASH_IPV4, HASH_IPV4_TCP, HASH_IPV6, HASH_IPV6_TCP
from tests.rings.naive_toeplitz import toeplitz

ALL = HASH_IPV4 | HASH_IPV4_TCP | HASH_IPV6 | HASH_IPV6_TCP
OKAY, NOT_SUPPORTED, INVALID, OVERFLOW = range(4)
Answer = tuple[int, int]


def mappable(gref: int) -> bool:
    """Of the grefs of these tests, those that a guest has granted."""
    return gref % 8 != 7


@dataclass
class Vif:
    """What one guest has set. `page` of a request is what is behind its gref, None if nothing is."""

    queues: int
    algorithm: int = netif.HASH_ALGORITHM_NONE
    types: int = 0
    key: bytes = b""
    mapping: list[int] = field(default_factory=list)
    limit: int = 512
    staged: dict[tuple[int, int], int] = field(default_factory=dict)  # (queue, gref) -> its flags

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
            case netif.CTRL_GET_GREF_MAPPING_SIZE:
                return (OKAY, self.limit) if data[0] < self.queues else (INVALID, 0)
            case netif.CTRL_ADD_GREF_MAPPING | netif.CTRL_DEL_GREF_MAPPING:
                if data[0] >= self.queues:
                    return INVALID, 0
                if not self.limit:
                    return NOT_SUPPORTED, 0
                if data[2] > 512 or (data[2] and page is None):
                    return INVALID, 0
                entries = list(struct.iter_unpack("<IHH", (page or b"")[: data[2] * 8]))
                return (self.add if kind == netif.CTRL_ADD_GREF_MAPPING else self.delete)(data[0], entries)
            case _:
                return NOT_SUPPORTED, 0
        return OKAY, 0

    def add(self, queue: int, entries: list[tuple[int, int, int]]) -> Answer:
        wanted = {(queue, gref): flags for gref, flags, _ in entries}
        there = sum(q == queue for q, _ in self.staged)
        wrong = any(flags > 1 or not mappable(gref) for gref, flags, _ in entries)
        twice = len(wanted) < len(entries) or wanted.keys() & self.staged.keys()
        if wrong or twice or there + len(wanted) > self.limit:
            return INVALID, 0
        self.staged |= wanted
        return OKAY, 0

    def delete(self, queue: int, entries: list[tuple[int, int, int]]) -> Answer:
        """`statuses` are those of the list then; `writable` says whether the guest can be told."""
        before = dict(self.staged)
        found = [self.staged.pop((queue, gref), None) for gref, _, _ in entries]
        self.statuses = [INVALID if flags is None else OKAY for flags in found]
        if entries and not self.writable:
            self.staged = before
            return INVALID, 0
        return OKAY, self.statuses.count(OKAY)

    statuses: list[int] = field(default_factory=list)
    writable: bool = True

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

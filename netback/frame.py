"""A frame's headers -> what a switch wants to know of it. Pure: looks at PACKET.data only, total over arbitrary bytes.

A frame whose headers are longer than HEAD is sent on like any other, but is no TCP to us.
"""

from __future__ import annotations

import numpy as np

from rings.atomics import i64, load16, load32, store16
from rings.frame import checksum_at, headers, ip_at, l4_at, ones_sum, version_of
from rings.jit import inline, kernel
from rings.vnet import CSUM_VALID

from .records import packet_at


@inline
def mac_at(at: int) -> int:
    """Six bytes as a number, the first lowest: its bit 0 says that it is a group's."""
    return i64(load32(at)) | i64(load16(at + 4)) << 32


@inline
def mix(hash: int, value: int) -> int:
    """A hash of 32 bits, and 32 more bits in it (the finalizer of MurmurHash3, once a value)."""
    h = (hash ^ value) & 0xFFFFFFFF
    h = (h ^ h >> 16) * 0x45D9F3B & 0xFFFFFFFF
    return h ^ h >> 16


@kernel
def _flow(pa: int) -> int:
    packet = packet_at(pa)
    data = packet["data"]
    version, ip = packet["l3"], data + packet["ip"]
    if version == 0:
        return mix(mix(i64(load32(data)), i64(load32(data + 4))), i64(load32(data + 8)))
    at, words = (ip + 12, 2) if version == 4 else (ip + 8, 8)
    hash = version
    for k in range(words):
        hash = mix(hash, i64(load32(at + k * 4)))
    return mix(hash, i64(load32(data + packet["l4"]))) if packet["l4"] != 0 else hash


@inline
def flow_of(pa: int) -> int:
    """A hash, 32 bits, of who talks to whom: of addresses and ports, as far as parse() has found these. Made when it is
    asked for, which is once."""
    packet = packet_at(pa)
    if packet["hash"] < 0:
        packet["hash"] = _flow(pa)
    return packet["hash"]


@kernel
def parse(pa: int) -> None:
    """Fill in src, dst, l3, ip, l4 and csum_at from the `have` >= 14 private bytes of a packet."""
    packet = packet_at(pa)
    data = packet["data"]
    found = headers(data, packet["have"])
    packet["dst"], packet["src"] = mac_at(data), mac_at(data + 6)
    packet["l3"], packet["l4"], packet["csum_at"] = version_of(found), l4_at(found), checksum_at(found)
    packet["ip"] = ip_at(found)
    packet["hash"] = -1


@kernel
def fill_checksum(pa: int) -> None:
    """Complete a blank checksum: what stands there is the sum of the pseudo-header. All bytes are private, l4 is known.

    In UDP a sum of 0 is sent as ones, as 0 says that there is none (RFC 768).
    """
    packet = packet_at(pa)
    at = packet["data"] + packet["l4"]
    total = ones_sum(at, packet["size"] - packet["l4"], 0) ^ 0xFFFF
    if total == 0 and packet["csum_at"] == packet["l4"] + 6:
        total = i64(0xFFFF)
    store16(packet["data"] + packet["csum_at"], np.uint16(total))
    packet["csum"] = CSUM_VALID

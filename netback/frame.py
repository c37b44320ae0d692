"""A frame's headers -> what a switch wants to know of it. Pure: looks at PACKET.data only, total over arbitrary bytes.

Ethernet with up to two tags, IPv4 and IPv6 with their extension headers, TCP and UDP. What stands beyond the private
bytes is not looked for: a frame whose headers are longer than HEAD is sent on like any other, but is no TCP to us.
"""

from __future__ import annotations

import numpy as np

from rings.atomics import i64, load8, load16, load32, store16
from rings.jit import inline, kernel

from .records import CSUM_VALID, packet_at

_ETHERNET, _TAG = 14, 4
_IPV4, _IPV6, _VLAN, _QINQ = 0x0800, 0x86DD, 0x8100, 0x88A8
_TCP, _UDP = 6, 17
_HOP_BY_HOP, _ROUTING, _OPTIONS = 0, 43, 60
_MOST_EXTENSIONS = 6


@inline
def _byte(at: int) -> int:
    return i64(load8(at))


@inline
def _be16(at: int) -> int:
    return i64(load8(at)) << 8 | i64(load8(at + 1))


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
def _transport(pa: int, protocol: int, at: int) -> None:
    """TCP or UDP from byte `at` on, if all of its header is there."""
    packet = packet_at(pa)
    if protocol == _TCP and at + 20 <= packet["have"]:
        packet["l4"], packet["csum_at"] = at, at + 16
    elif protocol == _UDP and at + 8 <= packet["have"]:
        packet["l4"], packet["csum_at"] = at, at + 6
    if packet["l4"] != 0:
        packet["hash"] = mix(packet["hash"], i64(load32(packet["data"] + at)))


@kernel
def _ipv4(pa: int, at: int) -> None:
    packet = packet_at(pa)
    ip = packet["data"] + at
    length = (_byte(ip) & 15) * 4
    if _byte(ip) >> 4 != 4 or length < 20 or at + length > packet["have"]:
        return
    packet["l3"] = 4
    packet["hash"] = mix(mix(i64(4), i64(load32(ip + 12))), i64(load32(ip + 16)))
    if _be16(ip + 6) & 0x3FFF == 0:  # neither a fragment nor the first of some
        _transport(pa, _byte(ip + 9), at + length)


@kernel
def _ipv6(pa: int, at: int) -> None:
    packet = packet_at(pa)
    ip = packet["data"] + at
    if _byte(ip) >> 4 != 6:
        return
    packet["l3"] = 6
    hash = i64(6)
    for k in range(8):
        hash = mix(hash, i64(load32(ip + 8 + k * 4)))
    packet["hash"] = hash
    following = _byte(ip + 6)
    at += 40
    for _ in range(_MOST_EXTENSIONS):
        if following != _HOP_BY_HOP and following != _ROUTING and following != _OPTIONS:
            break
        if at + 8 > packet["have"]:
            return
        following, at = _byte(packet["data"] + at), at + (_byte(packet["data"] + at + 1) + 1) * 8
    _transport(pa, following, at)


@kernel
def parse(pa: int) -> None:
    """Fill in src, dst, l3, l4, csum_at and hash from the `have` >= 14 private bytes of a packet."""
    packet = packet_at(pa)
    data, have = packet["data"], packet["have"]
    packet["dst"], packet["src"] = mac_at(data), mac_at(data + 6)
    packet["l3"], packet["l4"], packet["csum_at"] = 0, 0, 0
    packet["hash"] = mix(mix(i64(load32(data)), i64(load32(data + 4))), i64(load32(data + 8)))
    at = i64(_ETHERNET)
    for _ in range(2):
        kind = _be16(data + at - 2)
        if (kind == _VLAN or kind == _QINQ) and at + _TAG <= have:
            at += _TAG
    kind = _be16(data + at - 2)
    if kind == _IPV4 and at + 20 <= have:
        _ipv4(pa, at)
    elif kind == _IPV6 and at + 40 <= have:
        _ipv6(pa, at)


@kernel
def ones_sum(at: int, size: int, start: int) -> int:
    """`start` and the 16-bit words of `size` bytes, in the order in which they lie in memory, added with carry around
    (RFC 1071): 16 bits."""
    total = i64(start)
    for k in range(size >> 2):
        total += i64(load32(at + k * 4))
    at += size & ~3
    if size & 2 != 0:
        total += i64(load16(at))
        at += 2
    if size & 1 != 0:
        total += _byte(at)
    for _ in range(4):
        total = (total & 0xFFFF) + (total >> 16)
    return total


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

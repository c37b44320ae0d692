"""Where the headers of an Ethernet frame are: for both ends, as a blank checksum on the ring does not say where it is.

Ethernet with up to two tags, IPv4 and IPv6 with their extension headers, TCP and UDP. Total over arbitrary bytes; what
stands beyond the bytes that are there is not looked for.
"""

from __future__ import annotations

from .atomics import i64, load8, load16, load32
from .jit import inline, kernel

ETHERNET = 14
_TAG = 4
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
def version_of(found: int) -> int:
    """Of what headers() says: 4 or 6, 0 if it is neither."""
    return found >> 48


@inline
def ip_at(found: int) -> int:
    """... where that header begins."""
    return found >> 32 & 0xFFFF


@inline
def l4_at(found: int) -> int:
    """... where TCP or UDP begins, 0 if it does not."""
    return found >> 16 & 0xFFFF


@inline
def checksum_at(found: int) -> int:
    """... and where its checksum is."""
    return found & 0xFFFF


@kernel
def _transport(ip: int, protocol: int, at: int, have: int) -> int:
    """TCP or UDP from byte `at` on, if all of its header is there."""
    if protocol == _TCP and at + 20 <= have:
        return ip | at << 16 | at + 16
    if protocol == _UDP and at + 8 <= have:
        return ip | at << 16 | at + 6
    return ip


@kernel
def _ipv4(data: int, at: int, have: int) -> int:
    ip = data + at
    length = (_byte(ip) & 15) * 4
    if _byte(ip) >> 4 != 4 or length < 20 or at + length > have:
        return i64(0)
    found = i64(4) << 48 | at << 32
    if _be16(ip + 6) & 0x3FFF != 0:  # a fragment, or the first of some
        return found
    return _transport(found, _byte(ip + 9), at + length, have)


@kernel
def _ipv6(data: int, at: int, have: int) -> int:
    ip = data + at
    if _byte(ip) >> 4 != 6:
        return i64(0)
    found = i64(6) << 48 | at << 32
    following = _byte(ip + 6)
    at += 40
    for _ in range(_MOST_EXTENSIONS):
        if following != _HOP_BY_HOP and following != _ROUTING and following != _OPTIONS:
            break
        if at + 8 > have:
            return found
        following, at = _byte(data + at), at + (_byte(data + at + 1) + 1) * 8
    return _transport(found, following, at, have)


@kernel
def headers(data: int, have: int) -> int:
    """What the `have` bytes at `data`, 14 to 65535, begin with: for version_of, ip_at, l4_at and checksum_at."""
    at = i64(ETHERNET)
    for _ in range(2):
        kind = _be16(data + at - 2)
        if (kind == _VLAN or kind == _QINQ) and at + _TAG <= have:
            at += _TAG
    kind = _be16(data + at - 2)
    if kind == _IPV4 and at + 20 <= have:
        return _ipv4(data, at, have)
    if kind == _IPV6 and at + 40 <= have:
        return _ipv6(data, at, have)
    return i64(0)


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

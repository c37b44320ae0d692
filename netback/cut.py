"""A packet of many segments (GSO) -> its segments, one by one. Pure: looks at private bytes only, total over them.

As Linux has it (net/ipv4/tcp_offload.c, tcp_gso_segment; inet_gso_segment, ipv6_gso_segment): each segment has all
headers; its IP length and, in IPv4, its id, which is one more each time, and the header's checksum; its sequence
number; FIN and PSH of the last only, CWR of the first only. The checksum of TCP is made anew from the addresses: what
stands there is of the whole packet, and some guests leave the length out of it.
"""

from __future__ import annotations

import numpy as np

from rings.atomics import copy_bytes, i64, load8, store8, store16
from rings.frame import checksum_at, ip_at, l4_at, ones_sum, version_of
from rings.jit import inline, kernel
from rings.netif import GSO_TCPV4, GSO_TCPV6

_TCP, _UDP, _TCP_HEADER, _IPV6_HEADER = 6, 17, 20, 40
_FIN_PSH, _CWR = 0x09, 0x80


@inline
def _be16(at: int) -> int:
    return i64(load8(at)) << 8 | i64(load8(at + 1))


@inline
def _put_be16(at: int, value: int) -> None:
    store8(at, np.uint8(value >> 8 & 0xFF))
    store8(at + 1, np.uint8(value & 0xFF))


@kernel
def header_size(data: int, size: int, found: int, gso_type: int) -> int:
    """Bytes of headers of a packet with `size` bytes at `data`; 0 if it is not of its GSO type, and cannot be cut.

    `found` is what rings.frame.headers says of it.
    """
    l4 = l4_at(found)
    if l4 == 0 or checksum_at(found) != l4 + 16:
        return i64(0)
    if gso_type != (GSO_TCPV4 if version_of(found) == 4 else GSO_TCPV6):
        return i64(0)
    length = (i64(load8(data + l4 + 12)) >> 4) * 4
    if length < _TCP_HEADER or l4 + length > size:
        return i64(0)
    return l4 + length


@inline
def count_segments(size: int, header: int, gso_size: int) -> int:
    """How many segments there are, at least one; all but the last have gso_size > 0 bytes behind their headers."""
    return max((size - header + gso_size - 1) // gso_size, i64(1))


@kernel
def _put_lengths(out: int, found: int, l4_size: int, k: int) -> None:
    """Of the IP header, which is a copy of the whole packet's."""
    ip, l4 = out + ip_at(found), out + l4_at(found)
    if version_of(found) == 4:
        _put_be16(ip + 2, l4 - ip + l4_size)
        _put_be16(ip + 4, _be16(ip + 4) + k)
        store16(ip + 10, np.uint16(0))
        store16(ip + 10, np.uint16(ones_sum(ip, l4 - ip, 0) ^ 0xFFFF))
    else:
        _put_be16(ip + 4, l4 - ip - _IPV6_HEADER + l4_size)


@inline
def _pseudo_header(out: int, found: int, l4_size: int, protocol: int) -> int:
    """The sum of RFC 9293 and RFC 8200 over addresses, protocol and length; in the order of memory."""
    start = i64(protocol << 8) + (l4_size >> 8 & 0xFF) + ((l4_size & 0xFF) << 8)
    ip = out + ip_at(found)
    return ones_sum(ip + 12, 8, start) if version_of(found) == 4 else ones_sum(ip + 8, 32, start)


@kernel
def put_segment(out: int, data: int, size: int, found: int, header: int, gso_size: int, k: int, blank: int) -> int:
    """Write segment k of a packet to `out`, header + gso_size bytes at the most; how many they are.

    Its checksum is blank, which is the sum of the pseudo-header alone, or complete.
    """
    start = header + k * gso_size
    n = min(size - start, gso_size)
    copy_bytes(out, data, header)
    copy_bytes(out + header, data + start, n)
    l4 = l4_at(found)
    l4_size = header - l4 + n
    _put_lengths(out, found, l4_size, k)
    sequence = (_be16(out + l4 + 4) << 16 | _be16(out + l4 + 6)) + k * gso_size
    _put_be16(out + l4 + 4, sequence >> 16)
    _put_be16(out + l4 + 6, sequence)
    flags = i64(load8(out + l4 + 13))
    if start + n < size:
        flags &= ~_FIN_PSH
    if k > 0:
        flags &= ~_CWR
    store8(out + l4 + 13, np.uint8(flags & 0xFF))
    total = i64(_pseudo_header(out, found, l4_size, _TCP))
    if blank == 0:
        store16(out + l4 + 16, np.uint16(0))
        total = ones_sum(out + l4, l4_size, total) ^ 0xFFFF
    store16(out + l4 + 16, np.uint16(total))
    return header + n


@kernel
def make_blank(data: int, size: int, found: int) -> None:
    """Have the sum of the pseudo-header, and nothing more, stand for the checksum of a packet of `size` bytes: whatever
    stands there. `found` says where TCP or UDP is."""
    l4, at = l4_at(found), checksum_at(found)
    protocol = _TCP if at == l4 + 16 else _UDP
    store16(data + at, np.uint16(_pseudo_header(data, found, size - l4, protocol)))

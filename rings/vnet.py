"""struct virtio_net_hdr: what a TAP or a packet socket says of a packet, for what the rings say of it, and back.

Linux, include/uapi/linux/virtio_net.h; in front of each packet of a TAP with IFF_VNET_HDR, or of a packet socket with
PACKET_VNET_HDR. The records that these kernels fill in or read have fields size, csum (CSUM_*), gso_size and gso_type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .atomics import i64, load8, records, store16, store32, zero_bytes
from .frame import ETHERNET, checksum_at, headers, l4_at, ones_sum, version_of
from .jit import inline, kernel
from .netif import GSO_TCPV4, GSO_TCPV6

VNET_HEADER = np.dtype(
    [
        ("flags", "u1"),
        ("gso_type", "u1"),
        ("hdr_len", "u2"),
        ("gso_size", "u2"),
        ("csum_start", "u2"),
        ("csum_offset", "u2"),
    ]
)
"""10 bytes, in the order of the machine."""
VNET_SIZE = VNET_HEADER.itemsize

CSUM_NONE, CSUM_VALID, CSUM_BLANK = range(3)
"""Nothing is known of a packet's checksum; it has been looked at; only that of the pseudo-header is there."""

_NEEDS_CSUM, _DATA_VALID = 1, 2
_GSO_NONE, _GSO_TCPV4, _GSO_TCPV6, _GSO_ECN = 0, 1, 4, 0x80
_SCTP_OFFSET = 8
"""Where SCTP has its checksum, and no other protocol that leaves one blank: it is another (RFC 9260, appendix A)."""
_CRC32C = 0x82F63B78


@inline
def _header(at: int) -> Any:
    return records(at, 1, VNET_HEADER)[0]


@inline
def from_vnet(at: int, frame: Any, size: int) -> bool:
    """Fill in a record from the header at `at`, which stands before `size` bytes. False: it is of segments that no ring
    knows, as UDP's, and none of its receivers would take it for what it is."""
    header = _header(at)
    flags, gso = i64(header["flags"]), i64(header["gso_type"]) & ~_GSO_ECN
    frame["size"], frame["csum"] = size, CSUM_NONE
    if flags & _NEEDS_CSUM != 0:
        frame["csum"] = CSUM_BLANK
    elif flags & _DATA_VALID != 0:
        frame["csum"] = CSUM_VALID
    frame["gso_size"], frame["gso_type"] = 0, 0
    if gso == _GSO_TCPV4 or gso == _GSO_TCPV6:
        frame["gso_size"] = i64(header["gso_size"])
        frame["gso_type"] = GSO_TCPV4 if gso == _GSO_TCPV4 else GSO_TCPV6
    return gso == _GSO_NONE or frame["gso_size"] != 0


@inline
def is_elsewhere(at: int, data: int, have: int) -> bool:
    """Whether the checksum that the header at `at` says to be blank is another than headers() finds in the bytes at
    `data`: of a packet within this one, or of no TCP or UDP. On a ring nothing says where it is."""
    header = _header(at)
    found = headers(data, have)
    l4 = l4_at(found)
    return l4 == 0 or i64(header["csum_start"]) != l4 or i64(header["csum_offset"]) != checksum_at(found) - l4


@kernel
def _crc32c(at: int, size: int) -> int:
    crc = i64(0xFFFFFFFF)
    for k in range(size):
        crc ^= i64(load8(at + k))
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC32C if crc & 1 != 0 else 0)
    return crc ^ 0xFFFFFFFF


@kernel
def complete(at: int, data: int, size: int) -> bool:
    """Make the checksum complete that the header at `at` says to be blank: all `size` bytes are at `data`. False if it
    is not among them. As Linux's skb_checksum_help, a sum of 0 is sent as ones."""
    start, offset = i64(_header(at)["csum_start"]), i64(_header(at)["csum_offset"])
    there = start + offset
    if there + (4 if offset == _SCTP_OFFSET else 2) > size:
        return False
    if offset == _SCTP_OFFSET:
        store32(data + there, np.uint32(0))
        store32(data + there, np.uint32(_crc32c(data + start, size - start)))
        return True
    total = ones_sum(data + start, size - start, 0) ^ 0xFFFF
    store16(data + there, np.uint16(total if total != 0 else 0xFFFF))
    return True


@kernel
def put_vnet(at: int, data: int, size: int, csum: int, gso_size: int) -> bool:
    """Write the header for the `size` bytes at `data`. False for a packet that a kernel could make nothing of: a blank
    checksum, and no TCP or UDP to be seen."""
    header = _header(at)
    zero_bytes(at, VNET_SIZE)
    if csum == CSUM_VALID:
        header["flags"] = _DATA_VALID
    if csum != CSUM_BLANK:
        return True
    found = headers(data, min(size, 0xFFFF)) if size >= ETHERNET else i64(0)
    l4 = l4_at(found)
    if l4 == 0:
        return False
    header["flags"] = _NEEDS_CSUM
    header["csum_start"], header["csum_offset"] = l4, checksum_at(found) - l4
    if gso_size != 0:
        header["gso_type"] = _GSO_TCPV4 if version_of(found) == 4 else _GSO_TCPV6
        header["gso_size"] = gso_size
        header["hdr_len"] = l4 + (i64(load8(data + l4 + 12)) >> 4) * 4
        return checksum_at(found) - l4 == 16  # TCP
    return True

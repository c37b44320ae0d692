"""struct virtio_net_hdr: what a TAP or a packet socket says of a packet, for what the rings say of it, and back.

Linux, include/uapi/linux/virtio_net.h; in front of each packet of a TAP with IFF_VNET_HDR, or of a packet socket with
PACKET_VNET_HDR. The records that these kernels fill in or read have fields size, csum (CSUM_*), gso_size and gso_type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .atomics import i64, load8, records, zero_bytes
from .frame import ETHERNET, checksum_at, headers, l4_at, version_of
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
_GSO_TCPV4, _GSO_TCPV6, _GSO_ECN = 1, 4, 0x80


@inline
def _header(at: int) -> Any:
    return records(at, 1, VNET_HEADER)[0]


@inline
def from_vnet(at: int, frame: Any, size: int) -> None:
    """Fill in a record from the header at `at`, which stands before `size` bytes."""
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

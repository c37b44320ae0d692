"""The block protocol as Xen's public/io/blkif.h and protocols.h declare it, in both of its layouts.

Natural alignment (x86_64, arm: "64") and i386 packing ("32"), where a uint64_t is aligned to 4. The structs
stand below once, in C; the dtypes are computed from them, and checked against Debian's headers by
tests/rings.

All sectors, and first_sect and last_sect, are of 512 bytes whatever `sector-size` says: Xen 4.20's blkif.h
and Linux. (4.17's text says otherwise; nobody's Linux guest ever did it.)
"""

from __future__ import annotations

import platform

import numpy as np

from .atomics import copy_bytes, store32, store64
from .cstruct import dtypes
from .jit import inline
from .vdev import vdev_name as vdev_name
from .vdev import vdev_number as vdev_number

OP_READ, OP_WRITE, OP_WRITE_BARRIER, OP_FLUSH_DISKCACHE = 0, 1, 2, 3
OP_RESERVED_1, OP_DISCARD, OP_INDIRECT = 4, 5, 6
RSP_OKAY, RSP_ERROR, RSP_EOPNOTSUPP = 0, -1, -2
DISCARD_SECURE = 1 << 0
VDISK_CDROM, VDISK_REMOVABLE, VDISK_READONLY = 1, 2, 4

SECTOR_SIZE = 512
"""Bytes in the protocol's unit, see above."""
SECTORS_PER_PAGE = 8
MAX_SEGMENTS = 11
"""BLKIF_MAX_SEGMENTS_PER_REQUEST: segments in a request itself."""
MAX_INDIRECT_PAGES = 8
"""BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST."""
SEGMENTS_PER_INDIRECT_PAGE = 512
MAX_INDIRECT_SEGMENTS = MAX_INDIRECT_PAGES * SEGMENTS_PER_INDIRECT_PAGE
MAX_RING_PAGE_ORDER = 4
"""XENBUS_MAX_RING_GRANT_ORDER of Linux: sixteen pages."""

_STRUCTS = """
typedef uint16_t blkif_vdev_t;
typedef uint64_t blkif_sector_t;
typedef uint32_t grant_ref_t;

struct blkif_request_segment {
    grant_ref_t gref;
    uint8_t first_sect, last_sect;
};

struct blkif_request {
    uint8_t operation;
    uint8_t nr_segments;
    blkif_vdev_t handle;
    uint64_t id;
    blkif_sector_t sector_number;
    struct blkif_request_segment seg[11];
};

struct blkif_request_discard {
    uint8_t operation;
    uint8_t flag;
    blkif_vdev_t handle;
    uint64_t id;
    blkif_sector_t sector_number;
    uint64_t nr_sectors;
};

struct blkif_request_indirect {
    uint8_t operation;
    uint8_t indirect_op;
    uint16_t nr_segments;
    uint64_t id;
    blkif_sector_t sector_number;
    blkif_vdev_t handle;
    grant_ref_t indirect_grefs[8];
    %s
};

struct blkif_response {
    uint64_t id;
    uint8_t operation;
    int16_t status;
};
"""
_NAMES = (
    "blkif_request_segment",
    "blkif_request",
    "blkif_request_discard",
    "blkif_request_indirect",
    "blkif_response",
)

SEGMENT, REQUEST_64, DISCARD_64, INDIRECT_64, RESPONSE_64 = dtypes(_STRUCTS % "", *_NAMES)
_, REQUEST_32, DISCARD_32, INDIRECT_32, RESPONSE_32 = dtypes(_STRUCTS % "uint64_t pad;", *_NAMES, pack=4)

ABI_64, ABI_32 = 64, 32
"""Natural alignment (x86_64, arm) and i386 packing. What our own kernels work in ("native") is ABI_64."""
REQUEST = {ABI_64: REQUEST_64, ABI_32: REQUEST_32}
DISCARD = {ABI_64: DISCARD_64, ABI_32: DISCARD_32}
INDIRECT = {ABI_64: INDIRECT_64, ABI_32: INDIRECT_32}
RESPONSE = {ABI_64: RESPONSE_64, ABI_32: RESPONSE_32}

ENTRY_SIZE_64, ENTRY_SIZE_32 = 112, 108
"""Bytes in a slot: the largest of its union, which is the request for reading and writing."""
RESPONSE_SIZE_64, RESPONSE_SIZE_32 = 16, 12
ENTRY_SIZE = {ABI_64: ENTRY_SIZE_64, ABI_32: ENTRY_SIZE_32}
assert (REQUEST_64.itemsize, REQUEST_32.itemsize) == (ENTRY_SIZE_64, ENTRY_SIZE_32), "ABI error"
assert (RESPONSE_64.itemsize, RESPONSE_32.itemsize) == (RESPONSE_SIZE_64, RESPONSE_SIZE_32), "ABI error"

# protocols.h, the values of the key `protocol`
PROTOCOL_X86_32, PROTOCOL_X86_64, PROTOCOL_ARM = "x86_32-abi", "x86_64-abi", "arm-abi"
PROTOCOL_NATIVE = PROTOCOL_X86_64 if platform.machine() in ("x86_64", "AMD64") else PROTOCOL_ARM
_ABIS = {PROTOCOL_X86_32: ABI_32, PROTOCOL_X86_64: ABI_64, PROTOCOL_ARM: ABI_64}

# Keys in xenstore, as blkif.h's long comment lists them. Written by the back end:
KEY_MAX_RING_PAGE_ORDER = "max-ring-page-order"
KEY_MAX_QUEUES = "multi-queue-max-queues"
KEY_MAX_INDIRECT_SEGMENTS = "feature-max-indirect-segments"
KEY_FLUSH = "feature-flush-cache"
KEY_BARRIER = "feature-barrier"
KEY_PERSISTENT = "feature-persistent"  # both ends
KEY_DISCARD = "feature-discard"
KEY_DISCARD_GRANULARITY = "discard-granularity"
KEY_DISCARD_ALIGNMENT = "discard-alignment"
KEY_DISCARD_SECURE = "discard-secure"
KEY_SECTORS = "sectors"
KEY_SECTOR_SIZE = "sector-size"
KEY_PHYSICAL_SECTOR_SIZE = "physical-sector-size"
KEY_INFO = "info"
# Written by the front end:
KEY_RING_PAGE_ORDER = "ring-page-order"
KEY_RING_REF = "ring-ref"
KEY_EVENT_CHANNEL = "event-channel"
KEY_NUM_QUEUES = "multi-queue-num-queues"
KEY_PROTOCOL = "protocol"
KEY_LARGE_SECTOR_SIZE = "feature-large-sector-size"  # deprecated by 4.20; for the compatibility switch only


def abi_of(protocol: str | None, machine: str | None = None) -> int:
    """The ABI that a front end's `protocol` key asks for. Raises ValueError for one that is not known.

    Without the key it is x86_32 on x86, whatever the guest's width: the header says "native", but Linux, QEMU
    and tapback all do this, and 64-bit front ends write the key.
    """
    if protocol is None:
        return ABI_32 if (machine or platform.machine()) in ("x86_64", "AMD64", "i386", "i686") else ABI_64
    try:
        return _ABIS[protocol]
    except KeyError:
        raise ValueError(f"protocol {protocol!r} is not one of {', '.join(_ABIS)}") from None


@inline
def to_native(dst: int, src: int) -> None:
    """A request of the x86_32 ABI (108 private bytes at src) as a native one (112 bytes at dst).

    In i386 packing `id` follows at 4 where C otherwise pads to 8, and nothing after it moves relative to it:
    so for reads, writes, discards and indirect requests alike all is shifted by four bytes. Total: any bytes
    will do.
    """
    copy_bytes(dst, src, 4)
    store32(dst + 4, np.uint32(0))
    copy_bytes(dst + 8, src + 4, ENTRY_SIZE_32 - 4)


@inline
def from_native(dst: int, src: int) -> None:
    """The inverse of `to_native`, for a front end that speaks x86_32: 112 bytes at src to 108 at dst."""
    copy_bytes(dst, src, 4)
    copy_bytes(dst + 4, src + 8, ENTRY_SIZE_32 - 4)


@inline
def put_response_64(slot: int, id: int, operation: int, status: int) -> None:
    """struct blkif_response, all 16 bytes of it: padding left as it was tells a guest too much (XSA-216)."""
    store64(slot, id)
    store64(slot + 8, (operation & 0xFF) | (status & 0xFFFF) << 16)


@inline
def put_response_32(slot: int, id: int, operation: int, status: int) -> None:
    """The same for x86_32, all 12 bytes; in halves, since the slot is aligned to 4 only."""
    store32(slot, np.uint32(id & 0xFFFFFFFF))
    store32(slot + 4, np.uint32((id >> 32) & 0xFFFFFFFF))
    store32(slot + 8, np.uint32((operation & 0xFF) | (status & 0xFFFF) << 16))


@inline
def put_response(slot: int, abi: int, id: int, operation: int, status: int) -> None:
    """One response in either ABI."""
    if abi == ABI_64:
        put_response_64(slot, id, operation, status)
    else:
        put_response_32(slot, id, operation, status)

"""The block backend's records: one DISK a device, one BLK_REQ for each request that can be in flight."""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.worker.records import (
    INLINE_SEGMENTS,
    POLICIES,
    POLICY_COPY,
    POLICY_MAP,
    POLICY_PERSISTENT,
    REQ,
    SEGMENT,
)
from rings.atomics import records
from rings.jit import inline

# What a request turned out to be; also the index into STATS.kinds.
K_READ, K_WRITE, K_FLUSH, K_BARRIER, K_DISCARD, K_SECURE, K_REJECT = range(7)
KIND_NAMES = ("read", "write", "flush", "barrier", "discard", "secure discard", "rejected")

MAX_QUEUES = 32

DISK = np.dtype(
    [
        # What a request may ask for; all that `request` looks at.
        ("sectors", "i8"),  # 512-byte units; live resize changes it
        ("sector_mask", "i8"),  # logical sector size / 512 - 1: alignment in 512-byte units
        ("unit_shift", "i8"),  # compatibility: the frontend counts in units of 512 << unit_shift; normally 0
        ("max_segments", "i8"),  # of an indirect request; 0: none are offered
        ("readonly", "i8"),
        ("can_flush", "i8"),
        ("can_barrier", "i8"),
        ("can_discard", "i8"),
        ("can_secure", "i8"),
        # What is behind it.
        ("store", "i8"),  # storage.STORE_*
        ("fd", "i8"),
        ("memory", "i8"),  # address of a memory: store
        ("skip_flush", "i8"),  # cache=unsafe: a flush is answered at once
        ("chunk", "i8"),  # what suits the store best, see storage.uring
        ("abi", "i8"),  # rings.blkif.ABI_*
        # What spans the queues: a hold. Its owner alone may take requests.
        ("hold_by", "i8"),  # address of the RING that holds, or 0
        ("hold_epoch", "i8"),
        ("handed_over", "i8"),  # the process ends, and leaves the guest to the next one
        ("n_rings", "i8"),
        ("rings", "i8", (MAX_QUEUES,)),  # addresses of RINGs
    ],
    align=True,
)

BLK_REQ = np.dtype(
    [
        ("head", "i8", (REQ.itemsize // 8,)),  # a REQ
        ("id", "i8"),  # of the guest, as it came
        ("operation", "i8"),  # as the response must name it: an indirect request answers its inner operation
        ("kind", "i8"),
        ("status", "i8"),  # BLKIF_RSP_*
        ("sector", "i8"),  # 512-byte units
        ("nr_sectors", "i8"),
        ("indirect", "i8"),  # number of segments in its indirect pages; 0: it is direct
        ("stage", "i8"),  # of a request that takes several I/Os
        ("moved", "i8"),  # bytes that are done
        ("retries", "i8"),
        ("own_segs", "u1", (INLINE_SEGMENTS * SEGMENT.itemsize,)),
        ("own_ops", "i8", (INLINE_SEGMENTS * 4,)),  # GRANT_OP
        ("own_iov", "i8", (INLINE_SEGMENTS * 2,)),  # IOVEC
    ],
    align=True,
)
SEGS_AT: int = BLK_REQ.fields["own_segs"][1]  # type: ignore[index]
OPS_AT: int = BLK_REQ.fields["own_ops"][1]  # type: ignore[index]
IOV_AT: int = BLK_REQ.fields["own_iov"][1]  # type: ignore[index]
HOLD_BY_AT: int = DISK.fields["hold_by"][1]  # type: ignore[index]
HOLD_EPOCH_AT: int = DISK.fields["hold_epoch"][1]  # type: ignore[index]


@inline
def disk_at(da: int) -> Any:
    """The DISK at an address."""
    return records(da, 1, DISK)[0]


@inline
def blk_at(qa: int) -> Any:
    """The BLK_REQ at an address; its head is a REQ."""
    return records(qa, 1, BLK_REQ)[0]


def disk_policy(asked: str, front_persistent: bool, *, unmap_too_late: bool = False) -> int:
    """POLICY_*: the operator's choice; persistent only with a frontend that keeps its grants, too.

    `unmap_too_late`: a page may still be mapped for a moment after direct I/O has completed and we have unmapped it. A
    frontend that is answered then finds its grant in use, and Linux's gives up the disk: such pages are copied.
    """
    policy = POLICIES[asked]
    if policy == POLICY_PERSISTENT and not front_persistent:
        policy = POLICY_MAP
    return POLICY_COPY if policy == POLICY_MAP and unmap_too_late else policy

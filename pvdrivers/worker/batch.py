"""Grant operations in batches: one call of the seam for the pages of many requests, each with a status of its own.

WORKER.ops has room for max_ops of them. A call is a system call or more on the real Xen, so nothing here is done one by
one: operations are added to the batch, which goes when it is full and once more at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import GRANT_OP, SEAM
from rings.atomics import call, i64, records
from rings.jit import inline, kernel

from .marks import req_at, ring_at, stats_at, worker_at
from .records import SEGMENT

OP_SIZE = GRANT_OP.itemsize
_SEGMENT_SIZE = SEGMENT.itemsize
_I8 = np.dtype(np.int64)


@inline
def op_at(ops: int, k: int) -> Any:
    """GRANT_OP k of an array."""
    return records(ops + k * OP_SIZE, 1, GRANT_OP)[0]


@inline
def segment_at(segs: int, k: int) -> Any:
    """SEGMENT k of an array."""
    return records(segs + k * _SEGMENT_SIZE, 1, SEGMENT)[0]


@inline
def seam_of(wa: int) -> Any:
    """The SEAM of a worker."""
    return records(worker_at(wa)["seam"], 1, SEAM)[0]


@kernel
def map_batch(wa: int, n: int) -> None:
    """Map the n operations of the worker's batch."""
    if n > 0:
        seam = seam_of(wa)
        call(seam["grant_map"], seam["grant_ctx"], worker_at(wa)["ops"], n, 0)


@kernel
def unmap_batch(wa: int, ops: int, n: int) -> None:
    """Unmap the handles of n operations, which need not be the worker's: the control thread has its own."""
    if n > 0:
        seam = seam_of(wa)
        call(seam["grant_unmap"], seam["grant_ctx"], ops, n, 0)


@inline
def add_unmap(wa: int, ops: int, most: int, n: int, handle: int) -> int:
    """One handle more in a batch of n with room for `most`; how many are in it now."""
    if n == most:
        unmap_batch(wa, ops, n)
        n = i64(0)
    op_at(ops, n)["handle"] = handle
    return n + 1


@kernel
def copy_batch(wa: int, n: int) -> None:
    """Make the n copies of the worker's batch. Where one fails its request has failed, and no other."""
    if n == 0:
        return
    w = worker_at(wa)
    seam = seam_of(wa)
    call(seam["grant_copy"], seam["grant_ctx"], w["ops"], n, 0)
    owners = records(w["owners"], n, _I8)
    for k in range(n):
        req = req_at(owners[k])
        stats = stats_at(ring_at(req["ring"])["stats"])
        stats["grants_copied"] += 1
        status = i64(op_at(w["ops"], k)["status"])
        if status != 0:
            req["failed"] = status
            stats["map_failures"] += 1


@kernel
def add_copies(wa: int, qa: int, n: int, flags: int) -> int:
    """A request's segments, to or from its bounce pages, behind n copies in the batch; how many are in it now."""
    w = worker_at(wa)
    req = req_at(qa)
    domid = ring_at(req["ring"])["domid"]
    owners = records(w["owners"], w["max_ops"], _I8)
    for k in range(req["nseg"]):
        if n == w["max_ops"]:
            copy_batch(wa, n)
            n = i64(0)
        seg = segment_at(req["segs"], k)
        op = op_at(w["ops"], n)
        op["address"] = op_at(req["ops"], k)["address"]
        op["gref"], op["domid"], op["flags"] = seg["gref"], domid, flags
        op["offset"], op["length"] = seg["offset"], seg["length"]
        owners[n] = qa
        n += 1
    return n

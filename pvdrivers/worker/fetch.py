"""Small things that stand in pages of the guest and are read once, such as descriptors of segments.

A ring with persistent grants keeps these pages too, as Linux does: then it takes no grant operation. Else it is a copy.
"""

from __future__ import annotations

from rings.atomics import call, copy_bytes, copy_in, i64
from rings.jit import inline, kernel

from .batch import OP_SIZE, op_at, seam_of, unmap_batch
from .cache import HELD_PERSISTENT, NO_HANDLE, keep
from .marks import ring_at, stats_at, worker_at
from .persistent import entry_at, lookup, put_back
from .records import POLICY_PERSISTENT

_READ = 0x4000  # GRANT_OP.flags: it is here already


@inline
def _read_kept(wa: int, ra: int, op_address: int) -> bool:
    """Read from a page that the ring has kept; False if it has not."""
    op = op_at(op_address, 0)
    ca = ring_at(ra)["cache"]
    entry = lookup(ca, i64(op["gref"]), worker_at(wa)["now"])
    if entry < 0:
        return False
    copy_in(op["address"], entry_at(ca, entry)["address"] + i64(op["offset"]), i64(op["length"]))
    put_back(ca, entry)
    stats_at(ring_at(ra)["stats"])["persistent_hits"] += 1
    return True


@kernel
def _read_mapped(wa: int, ra: int, n: int, maps: int) -> None:
    """Map the pages of those of n operations that are not read yet, at `maps`; read, and keep the pages."""
    w = worker_at(wa)
    ring = ring_at(ra)
    m = i64(0)
    for k in range(n):
        op = op_at(w["ops"], k)
        if op["flags"] & _READ == 0:
            mapped = op_at(maps, m)
            mapped["gref"], mapped["domid"], mapped["flags"] = op["gref"], op["domid"], 0
            m += 1
    if m == 0:
        return
    seam = seam_of(wa)
    call(seam["grant_map"], seam["grant_ctx"], maps, m, 0)
    m = i64(0)
    unmaps = i64(0)  # handles, at the start of the same operations: there are fewer than were looked at
    for k in range(n):
        op = op_at(w["ops"], k)
        if op["flags"] & _READ != 0:
            continue
        mapped = op_at(maps, m)
        m += 1
        if mapped["status"] != 0:
            ring["fetch_copies"] = 1  # read only, say, or there is no room: it is not tried at each request
            continue
        copy_in(op["address"], mapped["address"] + i64(op["offset"]), i64(op["length"]))
        op["flags"] |= _READ
        stats_at(ring["stats"])["grants_mapped"] += 1
        own = i64(mapped["handle"])
        old = keep(wa, ra, mapped)
        if mapped["flags"] & HELD_PERSISTENT != 0:
            put_back(ring["cache"], mapped["handle"])
            own = i64(NO_HANDLE)
        for handle in (old, own):
            if handle != NO_HANDLE:
                op_at(maps, unmaps)["handle"] = handle
                unmaps += 1
    unmap_batch(wa, maps, unmaps)


@kernel
def fetch(wa: int, ra: int, n: int) -> None:
    """Carry out n copies out of pages of the guest, which are the first of the worker's batch; sets their status.

    The other half of the batch has to be free: n is at most max_ops / 2.
    """
    w = worker_at(wa)
    ring = ring_at(ra)
    rest = w["ops"] + n * OP_SIZE
    for k in range(n):
        op_at(w["ops"], k)["status"] = 0
    if ring["policy"] == POLICY_PERSISTENT and ring["fetch_copies"] == 0:
        for k in range(n):
            if _read_kept(wa, ra, w["ops"] + k * OP_SIZE):
                op_at(w["ops"], k)["flags"] |= _READ
        _read_mapped(wa, ra, n, rest)
    copies = i64(0)
    for k in range(n):
        if op_at(w["ops"], k)["flags"] & _READ == 0:
            copy_bytes(rest + copies * OP_SIZE, w["ops"] + k * OP_SIZE, OP_SIZE)
            copies += 1
    if copies == 0:
        return
    seam = seam_of(wa)
    call(seam["grant_copy"], seam["grant_ctx"], rest, copies, 0)
    stats_at(ring["stats"])["grants_copied"] += copies
    copies = i64(0)
    for k in range(n):
        op = op_at(w["ops"], k)
        if op["flags"] & _READ == 0:
            op["status"] = op_at(rest, copies)["status"]
            copies += 1

"""Getting at the guest's pages, for a whole pass in one call, and letting go of them before the guest is answered.

Three policies, the operator's choice per device:

    map          map each page for the request, unmap it before the response (a Linux frontend reclaims it at once)
    persistent   keep what was mapped (bounded, least recently used goes first); the frontend reuses its pages
    copy         nothing is ever mapped: data goes through bounce pages of ours by grant copy

A page that cannot be had fails its request alone: REQ.failed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import GRANT_OP, OP_READONLY, OP_TO_GUEST, SEAM
from rings.atomics import call, copy_bytes, i64, records
from rings.jit import inline, kernel

from .marks import mark_ready, req_at, ring_address, ring_at, stats_at, worker_at
from .persistent import cache_at, entry_at, evict, insert, lookup, put_back
from .records import IOVEC, POLICY_COPY, POLICY_PERSISTENT, RING_ACTIVE, SEGMENT

_OP_SIZE = GRANT_OP.itemsize
_SEGMENT_SIZE = SEGMENT.itemsize
_IOVEC_SIZE = IOVEC.itemsize
_I4 = np.dtype(np.int32)
_I8 = np.dtype(np.int64)
_NO_HANDLE = -1
HELD_PERSISTENT = 0x8000  # GRANT_OP.flags: `handle` is an entry of the ring's cache


@inline
def op_at(ops: int, k: int) -> Any:
    """GRANT_OP k of an array."""
    return records(ops + k * _OP_SIZE, 1, GRANT_OP)[0]


@inline
def segment_at(segs: int, k: int) -> Any:
    """SEGMENT k of an array."""
    return records(segs + k * _SEGMENT_SIZE, 1, SEGMENT)[0]


@inline
def _seam(wa: int) -> Any:
    return records(worker_at(wa)["seam"], 1, SEAM)[0]


@inline
def pop_block(wa: int) -> int:
    """A free BLOCK, or 0."""
    w = worker_at(wa)
    if w["blocks_n"] == 0:
        return 0
    w["blocks_n"] -= 1
    return i64(records(w["blocks_free"], w["blocks_n"] + 1, _I8)[w["blocks_n"]])


@inline
def push_block(wa: int, block: int) -> None:
    """Give a BLOCK back."""
    w = worker_at(wa)
    records(w["blocks_free"], w["blocks_n"] + 1, _I8)[w["blocks_n"]] = block
    w["blocks_n"] += 1


@inline
def _pop_bounce(wa: int) -> int:
    w = worker_at(wa)
    w["bounce_n"] -= 1
    return w["bounce"] + i64(records(w["bounce_free"], w["bounce_n"] + 1, _I4)[w["bounce_n"]]) * 4096


@inline
def _push_bounce(wa: int, address: int) -> None:
    w = worker_at(wa)
    records(w["bounce_free"], w["bounce_n"] + 1, _I4)[w["bounce_n"]] = (address - w["bounce"]) >> 12
    w["bounce_n"] += 1


@kernel
def wake_starved(wa: int) -> None:
    """Blocks or bounce pages came back: rings that waited for them are served again.

    Not always the same one first, for that one may take all there is.
    """
    w = worker_at(wa)
    w["starved"] = 0
    first = w["starved_first"]
    found = False
    for k in range(w["top_ring"]):
        i = (first + k) % w["top_ring"]
        ra = ring_address(w, i)
        ring = ring_at(ra)
        if ring["state"] == RING_ACTIVE and ring["blocked"] != 0:
            mark_ready(wa, ra)
            if not found:
                found = True
                w["starved_first"] = i + 1


@inline
def _spare_op(wa: int) -> int:
    """The op behind the batch, for one page outside of it: the batch itself may be in use."""
    w = worker_at(wa)
    return w["ops"] + w["max_ops"] * _OP_SIZE


@kernel
def _unmap_handle(wa: int, handle: int, at: int) -> None:
    seam = _seam(wa)
    op_at(at, 0)["handle"] = handle
    call(seam["grant_unmap"], seam["grant_ctx"], at, 1, 0)


@kernel
def _map_batch(wa: int, first: int, last: int, n: int) -> None:
    """Map the n operations of the batch, and give each request of pass_reqs[first:last] its own."""
    w = worker_at(wa)
    seam = _seam(wa)
    if n > 0:
        call(seam["grant_map"], seam["grant_ctx"], w["ops"], n, 0)
    reqs = records(w["pass_reqs"], last, _I8)
    at = i64(0)
    for i in range(first, last):
        req = req_at(reqs[i])
        ra = req["ring"]
        ring = ring_at(ra)
        stats = stats_at(ring["stats"])
        if req["nseg"] == 0 or req["held"] == 0:
            continue
        for k in range(req["nseg"]):
            mine = op_at(req["ops"], k)
            if mine["flags"] & HELD_PERSISTENT != 0:
                continue
            copy_bytes(req["ops"] + k * _OP_SIZE, w["ops"] + at * _OP_SIZE, _OP_SIZE)
            at += 1
            status = i64(mine["status"])
            if status != 0:
                mine["handle"] = _NO_HANDLE
                req["failed"] = status
                stats["map_failures"] += 1
                continue
            stats["grants_mapped"] += 1
            if ring["policy"] == POLICY_PERSISTENT:
                _keep(wa, ra, mine)


@inline
def _keep(wa: int, ra: int, op: Any) -> None:
    """Put a page just mapped into the ring's cache. If all there are in use it stays the request's own."""
    w = worker_at(wa)
    ring = ring_at(ra)
    ca = ring["cache"]
    # The same gref twice in one pass was missed twice: the second stays the request's own.
    entry = lookup(ca, i64(op["gref"]), w["now"])
    if entry >= 0:
        put_back(ca, entry)
        return
    if cache_at(ca)["free"] < 0:
        old = evict(ca, i64(0x7FFFFFFFFFFFFFFF))
        if old < 0:
            return
        _unmap_handle(wa, old, _spare_op(wa))
    entry = insert(ca, i64(op["gref"]), op["address"], op["handle"], w["now"])
    if entry >= 0:
        op["handle"] = entry
        op["flags"] |= HELD_PERSISTENT
    stats_at(ring["stats"])["persistent_held"] = cache_at(ca)["used"]


@kernel
def _acquire_map(wa: int, n: int) -> None:
    """Map what pass_reqs[:n] need and the caches do not have, in as few calls as fit."""
    w = worker_at(wa)
    reqs = records(w["pass_reqs"], n, _I8)
    first = i64(0)
    count = i64(0)
    for i in range(n):
        req = req_at(reqs[i])
        if req["nseg"] == 0:
            continue
        ring = ring_at(req["ring"])
        if count + req["nseg"] > w["max_ops"]:
            _map_batch(wa, first, i, count)
            first, count = i64(i), i64(0)
        req["held"] = 1
        persistent = ring["policy"] == POLICY_PERSISTENT
        flags = 0 if persistent or req["to_guest"] != 0 else OP_READONLY
        for k in range(req["nseg"]):
            gref = i64(segment_at(req["segs"], k)["gref"])
            mine = op_at(req["ops"], k)
            mine["flags"] = 0
            if persistent:
                entry = lookup(ring["cache"], gref, w["now"])
                if entry >= 0:
                    mine["handle"] = entry
                    mine["address"] = entry_at(ring["cache"], entry)["address"]
                    mine["flags"] = HELD_PERSISTENT
                    mine["status"] = 0
                    stats_at(ring["stats"])["persistent_hits"] += 1
                    continue
            op = op_at(w["ops"], count)
            op["gref"], op["domid"], op["flags"] = gref, ring["domid"], flags
            count += 1
    _map_batch(wa, first, n, count)


@kernel
def copy_segments(wa: int, qa: int, to_guest: int) -> None:
    """Grant-copy between a request's segments and its bounce pages; sets REQ.failed."""
    w = worker_at(wa)
    seam = _seam(wa)
    req = req_at(qa)
    ring = ring_at(req["ring"])
    stats = stats_at(ring["stats"])
    done = i64(0)
    while done < req["nseg"]:
        n = min(req["nseg"] - done, w["max_ops"])
        for k in range(n):
            seg = segment_at(req["segs"], done + k)
            op = op_at(w["ops"], k)
            op["address"] = op_at(req["ops"], done + k)["address"]
            op["gref"], op["domid"] = seg["gref"], ring["domid"]
            op["offset"], op["length"] = seg["offset"], seg["length"]
            op["flags"] = OP_TO_GUEST if to_guest != 0 else 0
        call(seam["grant_copy"], seam["grant_ctx"], w["ops"], n, 0)
        for k in range(n):
            status = i64(op_at(w["ops"], k)["status"])
            if status != 0:
                req["failed"] = status
                stats["map_failures"] += 1
        stats["grants_copied"] += n
        done += n


@inline
def reserve_bounce(wa: int, pages: int) -> bool:
    """Set so many bounce pages aside for this pass. False if they are not free: the request stays on the ring."""
    w = worker_at(wa)
    if w["bounce_n"] - w["bounce_reserved"] < pages:
        return False
    w["bounce_reserved"] += pages
    return True


@inline
def _acquire_bounce(wa: int, qa: int) -> None:
    """One bounce page a segment, and for a write the data in it. They were reserved."""
    req = req_at(qa)
    for k in range(req["nseg"]):
        op_at(req["ops"], k)["address"] = _pop_bounce(wa)
    req["bounced"] = req["nseg"]
    req["held"] = 1
    if req["to_guest"] == 0:
        copy_segments(wa, qa, 0)


@inline
def _build_iov(qa: int, bounced: bool) -> None:
    """The request's memory as iovecs; neighbours in address become one."""
    req = req_at(qa)
    n = i64(0)
    end = i64(-1)
    for k in range(req["nseg"]):
        seg = segment_at(req["segs"], k)
        base = op_at(req["ops"], k)["address"] + (0 if bounced else i64(seg["offset"]))
        length = i64(seg["length"])
        if base == end:
            v = records(req["iov"] + (n - 1) * _IOVEC_SIZE, 1, IOVEC)[0]
            v["length"] += length
        else:
            v = records(req["iov"] + n * _IOVEC_SIZE, 1, IOVEC)[0]
            v["base"], v["length"] = base, length
            n += 1
        end = base + length
    req["n_iov"] = n


@kernel
def acquire(wa: int, ra: int, n: int) -> None:
    """Get the pages of pass_reqs[:n], all of ring `ra`, and build their iovecs. A request with nseg 0 needs none."""
    w = worker_at(wa)
    reqs = records(w["pass_reqs"], n, _I8)
    copying = ring_at(ra)["policy"] == POLICY_COPY
    if copying:
        for i in range(n):
            if req_at(reqs[i])["nseg"] > 0:
                _acquire_bounce(wa, reqs[i])
        w["bounce_reserved"] = 0
    else:
        _acquire_map(wa, n)
    for i in range(n):
        req = req_at(reqs[i])
        if req["nseg"] > 0 and req["failed"] == 0:
            _build_iov(reqs[i], copying)


@kernel
def release(wa: int, qa: int) -> None:
    """Let go of a request's pages: unmap what is its own, put back what is the cache's, free bounce and block."""
    w = worker_at(wa)
    req = req_at(qa)
    if req["held"] != 0:
        req["held"] = 0
        if req["bounced"] > 0:
            for k in range(req["bounced"]):
                _push_bounce(wa, op_at(req["ops"], k)["address"])
            req["bounced"] = 0
        else:
            seam = _seam(wa)
            ca = ring_at(req["ring"])["cache"]
            n = i64(0)
            for k in range(req["nseg"]):
                op = op_at(req["ops"], k)
                if op["flags"] & HELD_PERSISTENT != 0:
                    put_back(ca, op["handle"])
                elif op["handle"] != _NO_HANDLE:
                    op_at(w["ops"], n)["handle"] = op["handle"]
                    n += 1
                    if n == w["max_ops"]:
                        call(seam["grant_unmap"], seam["grant_ctx"], w["ops"], n, 0)
                        n = i64(0)
            if n > 0:
                call(seam["grant_unmap"], seam["grant_ctx"], w["ops"], n, 0)
    if req["block"] != 0:
        push_block(wa, req["block"])
        req["block"] = 0
    if w["starved"] != 0:
        wake_starved(wa)


@kernel
def drop_cache(wa: int, ra: int, not_used_since: int, op: int) -> int:
    """Unmap the ring's persistent pages last used before that (ns), but for those in use; how many.

    `op` is the address of a GRANT_OP to work with: the worker's own, or the control thread's.
    """
    ca = ring_at(ra)["cache"]
    n = i64(0)
    if ca == 0:
        return n
    while True:
        handle = evict(ca, not_used_since)
        if handle < 0:
            break
        _unmap_handle(wa, handle, op)
        n += 1
    stats_at(ring_at(ra)["stats"])["persistent_held"] = cache_at(ca)["used"]
    return n


@inline
def purge_cache(wa: int, ra: int) -> None:
    """Once a second at most: let go of persistent pages that were not used for a while (Linux: 60 s)."""
    ring = ring_at(ra)
    now = worker_at(wa)["now"]
    if ring["cache"] != 0 and now - ring["purged"] > 1_000_000_000:
        ring["purged"] = now
        drop_cache(wa, ra, now - ring["keep_ns"], _spare_op(wa))

"""Getting at the guest's pages, for a whole pass in one call, and letting go of them before the guest is answered.

Three policies, the operator's choice per device:

    map          map each page for the request, unmap it before the response (a Linux frontend reclaims it at once)
    persistent   keep what was mapped (bounded, least recently used goes first); the frontend reuses its pages
    copy         nothing is ever mapped: data goes through bounce pages of ours by grant copy

A page that cannot be had fails its request alone: REQ.failed. Where Xen has no room for more mappings nothing fails:
the request is copied, and so is all that its ring takes after it, until it is tried again: after a minute, then later.
"""

from __future__ import annotations

import numpy as np

from pvdrivers.iovec import iovec_at, put_iovec
from pvdrivers.platform import OP_READONLY, OP_TO_GUEST, GNTST_no_device_space, GNTST_no_space
from rings.atomics import copy_bytes, i64, records
from rings.jit import inline, kernel

from .batch import OP_SIZE, add_copies, add_unmap, copy_batch, map_batch, op_at, segment_at, unmap_batch
from .cache import FOREVER, HELD_PERSISTENT, NO_HANDLE, drop_cache, keep
from .marks import mark_limited, req_at, ring_at, stats_at, worker_at
from .persistent import cache_at, entry_at, lookup, put_back
from .pools import free_bounce, pop_bounce, push_block, push_bounce, wake_starved
from .records import POLICY_COPY, POLICY_PERSISTENT

RETRY_NS, RETRY_MOST_NS = 60_000_000_000, 3_600_000_000_000
"""The first wait before a ring that has had no room maps again, and the longest."""
SPARE = 4096
"""Bounce pages that are free for a try: if it fails, no request may fail for its sake."""
_I8 = np.dtype(np.int64)


@inline
def _is_limit(status: int) -> bool:
    """Xen is out of maptrack (no_space since 4.16, before it no_device_space), or the kernel of what it needs."""
    return status == GNTST_no_space or status == GNTST_no_device_space


@kernel
def _map_requests(wa: int, first: int, last: int, n: int) -> None:
    """Map the n operations of the batch, and give each request of pass_reqs[first:last] its own."""
    w = worker_at(wa)
    map_batch(wa, n)
    reqs = records(w["pass_reqs"], last, _I8)
    at = i64(0)
    evicted = i64(0)  # handles, at the start of the batch: there are fewer than operations that were looked at
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
            copy_bytes(req["ops"] + k * OP_SIZE, w["ops"] + at * OP_SIZE, OP_SIZE)
            at += 1
            status = i64(mine["status"])
            if status != 0:
                mine["handle"] = NO_HANDLE
                req["failed"] = status
                if not _is_limit(status):
                    stats["map_failures"] += 1
                continue
            stats["grants_mapped"] += 1
            if ring["policy"] == POLICY_PERSISTENT:
                old = keep(wa, ra, mine)
                if old != NO_HANDLE:
                    op_at(w["ops"], evicted)["handle"] = old
                    evicted += 1
    unmap_batch(wa, w["ops"], evicted)


@kernel
def _acquire_map(wa: int, n: int) -> None:
    """Map what pass_reqs[:n] need and the caches do not have, in as few calls as fit."""
    w = worker_at(wa)
    reqs = records(w["pass_reqs"], n, _I8)
    first = i64(0)
    count = i64(0)
    for i in range(n):
        req = req_at(reqs[i])
        if req["nseg"] == 0 or req["copied"] != 0:
            continue
        ring = ring_at(req["ring"])
        if count + req["nseg"] > w["max_ops"]:
            _map_requests(wa, first, i, count)
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
    _map_requests(wa, first, n, count)


@inline
def _bounce(wa: int, qa: int, copies: int) -> int:
    """Bounce pages for one request, one a segment; the data of a write joins the batch. How many are in it now."""
    req = req_at(qa)
    for k in range(req["nseg"]):
        op_at(req["ops"], k)["address"] = pop_bounce(wa)
    req["bounced"] = req["nseg"]
    ring_at(req["ring"])["bounced"] += req["nseg"]
    req["held"] = 1
    return add_copies(wa, qa, copies, 0) if req["to_guest"] == 0 else copies


@kernel
def _acquire_bounce(wa: int, n: int) -> None:
    """Bounce pages for those of pass_reqs[:n] that are copied, and for writes the data in them. They were reserved."""
    w = worker_at(wa)
    reqs = records(w["pass_reqs"], n, _I8)
    copies = i64(0)
    for i in range(n):
        req = req_at(reqs[i])
        if req["nseg"] > 0 and req["copied"] != 0:
            copies = _bounce(wa, reqs[i], copies)
    copy_batch(wa, copies)
    w["bounce_reserved"] = 0


@inline
def _copy_for_now(wa: int, ra: int) -> None:
    """Copy what the ring takes, until it is tried again: twice as late as the last time, if that was not long ago."""
    ring = ring_at(ra)
    now = worker_at(wa)["now"]
    recent = ring["retry_ns"] > 0 and now - ring["retry_at"] < RETRY_MOST_NS
    ring["retry_ns"] = min(ring["retry_ns"] * 2, i64(RETRY_MOST_NS)) if recent else i64(RETRY_NS)
    ring["retry_at"] = now + ring["retry_ns"]
    ring["mapping"] = ring["policy"]
    ring["policy"] = POLICY_COPY


@inline
def try_to_map(wa: int, ra: int) -> None:
    """Have a ring that had no room map what it takes from now on, if it is time to try."""
    ring = ring_at(ra)
    if ring["limit"] != 0 and ring["policy"] == POLICY_COPY:
        if worker_at(wa)["now"] >= ring["retry_at"] and free_bounce(wa) >= SPARE:
            ring["policy"] = ring["mapping"]
            ring["fetch_copies"] = 0


@kernel
def _fall_back(wa: int, ra: int, n: int) -> None:
    """Xen had no room to map some of pass_reqs[:n]: these are copied instead, and all that the ring takes after them.

    Without bounce pages for it a request fails. What the ring has in its cache goes, that others have room.
    """
    w = worker_at(wa)
    ring = ring_at(ra)
    reqs = records(w["pass_reqs"], n, _I8)
    limit = i64(0)
    unmaps = i64(0)
    mapped = False
    for i in range(n):
        req = req_at(reqs[i])
        if req["nseg"] > 0 and _is_limit(req["failed"]):
            limit = i64(req["failed"])
            unmaps = _let_go(wa, reqs[i], unmaps)
        elif req["nseg"] > 0 and req["copied"] == 0 and req["failed"] == 0:
            mapped = True
    if limit == 0:
        if mapped:
            mark_limited(ra, i64(0))
        return
    unmap_batch(wa, w["ops"], unmaps)
    stats = stats_at(ring["stats"])
    copies = i64(0)
    for i in range(n):
        req = req_at(reqs[i])
        if req["nseg"] == 0 or not _is_limit(req["failed"]):
            continue
        if free_bounce(wa) >= req["nseg"]:  # beyond its share if need be: it is taken, and would fail
            req["failed"] = 0
            stats["fallbacks"] += 1
            copies = _bounce(wa, reqs[i], copies)
        else:
            stats["map_failures"] += 1
    copy_batch(wa, copies)
    _copy_for_now(wa, ra)
    drop_cache(wa, ra, i64(FOREVER), w["ops"], w["max_ops"])
    mark_limited(ra, limit)


@kernel
def copy_back(wa: int, qa: int) -> None:
    """What was read into bounce pages, to the guest: of a request and those that follow by REQ.next. Sets failed."""
    copies = i64(0)
    while qa != 0:
        req = req_at(qa)
        if req["bounced"] > 0 and req["to_guest"] != 0 and req["res"] >= 0 and req["failed"] == 0:
            copies = add_copies(wa, qa, copies, OP_TO_GUEST)
        qa = req["next"]
    copy_batch(wa, copies)


@inline
def _build_iov(qa: int) -> None:
    """The request's memory as iovecs; neighbours in address become one."""
    req = req_at(qa)
    bounced = req["bounced"] > 0
    n = i64(0)
    end = i64(-1)
    for k in range(req["nseg"]):
        seg = segment_at(req["segs"], k)
        base = op_at(req["ops"], k)["address"] + (0 if bounced else i64(seg["offset"]))
        length = i64(seg["length"])
        if base == end:
            v = iovec_at(req["iov"], n - 1)
            v["length"] += length
        else:
            put_iovec(req["iov"], n, base, length)
            n += 1
        end = base + length
    req["n_iov"] = n


@kernel
def acquire(wa: int, ra: int, n: int) -> None:
    """Get the pages of pass_reqs[:n], all of ring `ra`, and build their iovecs. A request with nseg 0 needs none."""
    w = worker_at(wa)
    reqs = records(w["pass_reqs"], n, _I8)
    if ring_at(ra)["policy"] != POLICY_COPY:
        _acquire_map(wa, n)
        _fall_back(wa, ra, n)
    _acquire_bounce(wa, n)
    for i in range(n):
        req = req_at(reqs[i])
        if req["nseg"] > 0 and req["failed"] == 0:
            _build_iov(reqs[i])


@inline
def _let_go(wa: int, qa: int, n: int) -> int:
    """The pages of one request: those of its own join n in the batch of unmaps; how many are in it now."""
    w = worker_at(wa)
    req = req_at(qa)
    if req["held"] == 0:
        return n
    req["held"] = 0
    if req["bounced"] > 0:
        for k in range(req["bounced"]):
            push_bounce(wa, op_at(req["ops"], k)["address"])
        ring_at(req["ring"])["bounced"] -= req["bounced"]
        req["bounced"] = 0
        return n
    ca = ring_at(req["ring"])["cache"]
    for k in range(req["nseg"]):
        op = op_at(req["ops"], k)
        if op["flags"] & HELD_PERSISTENT != 0:
            put_back(ca, op["handle"])
        elif op["handle"] != NO_HANDLE:
            n = add_unmap(wa, w["ops"], w["max_ops"], n, op["handle"])
    return n


@kernel
def release(wa: int, qa: int) -> None:
    """Let go of the pages of a request and of those of its ring that follow by REQ.next.

    When this returns what was their own is unmapped, what is the cache's put back; bounce pages and blocks are free.
    """
    w = worker_at(wa)
    ra = req_at(qa)["ring"]
    ring = ring_at(ra)
    n = i64(0)
    while qa != 0:
        req = req_at(qa)
        n = _let_go(wa, qa, n)
        ring["pages"] -= req["pages"]
        req["pages"] = 0
        if req["block"] != 0:
            push_block(wa, ra, req["block"])
            req["block"] = 0
        qa = req["next"]
    unmap_batch(wa, w["ops"], n)
    if ring["limit"] != 0 and ring["cache"] != 0 and cache_at(ring["cache"])["used"] > 0:
        drop_cache(wa, ra, i64(FOREVER), w["ops"], w["max_ops"])  # these were in use when the others went
    if w["starved"] != 0:
        wake_starved(wa)

"""The worker's two entries into the block backend, per ring and pass.

    step      take requests to private memory, plan, acquire pages, start the I/O
    finish    what the store gave back: release the pages, journal the outcome, respond, notify
"""

from __future__ import annotations

from errno import EOPNOTSUPP

import numpy as np

from pvdrivers.storage.uring import is_done
from pvdrivers.worker.cache import purge_cache
from pvdrivers.worker.events import notify as notify_guest
from pvdrivers.worker.grants import acquire, copy_back, release, try_to_map
from pvdrivers.worker.histogram import bucket_of
from pvdrivers.worker.journal import (
    STEP_COMPLETED,
    STEP_DONE,
    STEP_FREED,
    STEP_NOTIFIED,
    STEP_PUSHED,
    STEP_PUT,
    STEP_SUBMITTED,
    checkpoint,
    commit_done,
    commit_free,
    push_free,
    record_of,
)
from pvdrivers.worker.marks import complete, mark_failed, mark_ready, req_at, ring_at, stats_at, take_done, worker_at
from pvdrivers.worker.records import RING_DEAD
from rings.atomics import i64, records
from rings.blkif import RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, put_response
from rings.jit import inline, kernel, seam_function
from rings.ring import RING_END, advance_prod, push, slot

from .barrier import abandon, drive, held_by, release_hold, tell_holder
from .disk import DEEP_CHUNK, DONE, advance, set_chunk, start, submit_first
from .records import K_BARRIER, K_READ, K_REJECT, blk_at, disk_at
from .take import fetch_indirect, take

_I8 = np.dtype(np.int64)


@inline
def _start_one(wa: int, ra: int, qa: int) -> None:
    req = req_at(qa)
    blk = blk_at(qa)
    if blk["kind"] == K_REJECT:
        complete(qa, 0)
    elif req["failed"] != 0:
        complete(qa, -1)
    elif blk["kind"] == K_BARRIER:
        ring_at(ra)["waiting"] = qa
        drive(wa, ra, ring_at(ra)["device"])
    else:
        start(wa, qa, ring_at(ra)["device"])


@seam_function
def step(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step: take, plan, acquire, submit. 1 if more may be pending."""
    ring = ring_at(ra)
    da = ring["device"]
    if abandoned != 0:
        abandon(wa, ra, da)
        return 0
    purge_cache(wa, ra)
    try_to_map(wa, ra)
    if ring["waiting"] != 0:
        drive(wa, ra, da)
        return 0
    if disk_at(da)["handed_over"] != 0:
        ring["blocked"] = 1  # what is on the ring is for the next process
        return 0
    holder = held_by(da)
    # What a dead predecessor had taken counts as in flight: the holder waits for it, as it did then.
    if holder != 0 and holder != ra and ring["replay_head"] == 0:
        ring["blocked"] = 1
        tell_holder(ra, da)
        return 0
    if ring["barrier"] != 0:
        ring["blocked"] = 1
        return 0
    n = take(wa, ra, budget)
    if n == 0:
        return 0
    w = worker_at(wa)
    chunk = set_chunk(w["uring"], ra)
    reqs = records(w["pass_reqs"], n, _I8)
    fetch_indirect(wa, ra, n)
    for i in range(n):
        req = req_at(reqs[i])
        blk = blk_at(reqs[i])
        req["to_guest"] = 1 if blk["kind"] == K_READ else 0
        req["nbytes"] = blk["nr_sectors"] << 9 if req["nseg"] > 0 else 0
        if blk["kind"] == K_REJECT or req["failed"] != 0:
            req["nseg"] = 0
    acquire(wa, ra, n)
    for i in range(n):
        _start_one(wa, ra, reqs[i])
        # A disk that does nothing starts now, not when the chunk is full. A single I/O goes in with the wait.
        if i == 0 and n > 1 and w["inflight"] == 1 and chunk < DEEP_CHUNK and not is_done(w["uring"]):
            submit_first(w["uring"], ra)
    checkpoint(w, STEP_SUBMITTED)
    return 1 if n == budget or ring["replay_head"] != 0 else 0


@inline
def _outcome(qa: int) -> int:
    """BLKIF_RSP_* of a request that is done."""
    blk = blk_at(qa)
    req = req_at(qa)
    if blk["kind"] == K_REJECT:
        return i64(blk["status"])
    if req["failed"] != 0:
        return i64(RSP_ERROR)
    if req["res"] == -EOPNOTSUPP:
        return i64(RSP_EOPNOTSUPP)
    return i64(RSP_OKAY) if req["res"] >= 0 else i64(RSP_ERROR)


@inline
def _count(ra: int, qa: int, status: int, now: int) -> None:
    """One request more in the counters and in the histogram of its kind."""
    stats = stats_at(ring_at(ra)["stats"])
    blk = blk_at(qa)
    req = req_at(qa)
    kind = blk["kind"]
    stats["kinds"][kind] += 1
    if status != RSP_OKAY:
        stats["errors"] += 1
        if status == RSP_ERROR and kind != K_REJECT:
            mark_failed(ra, req["failed"], req["res"], blk["sector"] * 512, req["nbytes"])
    elif kind == K_READ:
        stats["bytes_read"] += req["nbytes"]
    else:
        stats["bytes_written"] += req["nbytes"]
    row = kind if kind < 2 else 2
    stats["hist"][row][bucket_of(now - req["taken"])] += 1


@inline
def _reversed_list(first: int) -> int:
    """Tests: the same requests, last first."""
    out = i64(0)
    while first != 0:
        req = req_at(first)
        following = req["next"]
        req["next"] = out
        out = first
        first = following
    return out


@kernel
def _gather(wa: int, ra: int) -> int:
    """Of what the store gave back, the requests that are done; linked by REQ.next."""
    ring = ring_at(ra)
    da = ring["device"]
    head = i64(0)
    tail = i64(0)
    qa = take_done(ra)
    while qa != 0:
        req = req_at(qa)
        following = req["next"]
        blk = blk_at(qa)
        finished = blk["kind"] == K_REJECT or req["failed"] != 0
        if not finished:
            finished = advance(wa, qa, da) == DONE
        if finished:
            req["next"] = 0
            if tail != 0:
                req_at(tail)["next"] = qa
            else:
                head = qa
            tail = qa
        qa = following
    return head


@inline
def _respond(ra: int, qa: int, status: int) -> None:
    ring = ring_at(ra)
    e = records(ring["end"], 1, RING_END)[0]
    blk = blk_at(qa)
    put_response(slot(ring["end"], e["prod_pvt"]), disk_at(ring["device"])["abi"], blk["id"], blk["operation"], status)
    advance_prod(ring["end"], 1)


@seam_function
def finish(wa: int, ra: int, _b: int, _c: int) -> int:
    """RING.finish: release the pages, journal the outcomes, respond, push once, notify if asked, free the records."""
    w = worker_at(wa)
    ring = ring_at(ra)
    da = ring["device"]
    head = _gather(wa, ra)
    if head == 0:
        return 0
    copy_back(wa, head)
    release(wa, head)
    if w["reverse"] != 0:
        head = _reversed_list(head)
    checkpoint(w, STEP_COMPLETED)
    alive = ring["state"] != RING_DEAD
    e = records(ring["end"], 1, RING_END)[0]
    qa = head
    while qa != 0:
        req = req_at(qa)
        status = _outcome(qa)
        record = record_of(ring, req["index"])
        if alive:
            commit_done(record, status, e["prod_pvt"])
            checkpoint(w, STEP_DONE)
            _respond(ra, qa, status)
            checkpoint(w, STEP_PUT)
        _count(ra, qa, status, w["now"])
        qa = req["next"]
    if alive:
        notify = push(ring["end"])
        checkpoint(w, STEP_PUSHED)
        stats = stats_at(ring["stats"])
        if notify:
            notify_guest(wa, ra)
            stats["notify_sent"] += 1
        else:
            stats["notify_saved"] += 1
        checkpoint(w, STEP_NOTIFIED)
    qa = head
    while qa != 0:
        req = req_at(qa)
        following = req["next"]
        commit_free(record_of(ring, req["index"]))
        push_free(ring, req["index"])
        ring["inflight"] -= 1
        if ring["barrier"] == qa:
            release_hold(ra, da)
        qa = following
    checkpoint(w, STEP_FREED)
    if ring["waiting"] != 0 or ring["throttled"] != 0:
        ring["throttled"] = 0
        mark_ready(wa, ra)
    if held_by(da) != 0:
        tell_holder(ra, da)
    return 0


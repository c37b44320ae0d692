"""The worker's two entries into the block backend, per ring and pass.

    step      take requests to private memory, plan, acquire pages, start the I/O
    finish    what the store gave back: release the pages, journal the outcome, respond, notify
"""

from __future__ import annotations

from errno import EOPNOTSUPP

import numpy as np

from pvdrivers.platform import SEAM
from pvdrivers.worker.grants import (
    acquire,
    copy_segments,
    op_at,
    pop_block,
    purge_cache,
    release,
    reserve_bounce,
)
from pvdrivers.worker.histogram import bucket_of
from pvdrivers.worker.journal import (
    PAYLOAD_AT,
    STEP_COMPLETED,
    STEP_CONSUMED,
    STEP_DONE,
    STEP_FREED,
    STEP_NOTIFIED,
    STEP_PUSHED,
    STEP_PUT,
    STEP_SUBMITTED,
    STEP_TAKEN,
    checkpoint,
    commit_consumed,
    commit_done,
    commit_free,
    commit_taken,
    pop_free,
    push_free,
    record_of,
)
from pvdrivers.worker.marks import (
    complete,
    mark_dead,
    mark_ready,
    req_at,
    ring_at,
    stats_at,
    take_done,
    worker_at,
)
from pvdrivers.worker.records import (
    BLOCK_IOV_AT,
    BLOCK_OPS_AT,
    POLICY_COPY,
    RING_DEAD,
    V_OVERFLOW,
)
from rings.atomics import call, copy_in, i64, records
from rings.blkif import (
    ABI_64,
    ENTRY_SIZE_32,
    ENTRY_SIZE_64,
    INDIRECT_64,
    OP_INDIRECT,
    RSP_EOPNOTSUPP,
    RSP_ERROR,
    RSP_OKAY,
    put_response,
    to_native,
)
from rings.jit import inline, kernel, seam_function
from rings.ring import CORRUPT, RING_END, advance_prod, available, push, slot
from rings.ring import advance as advance_cons

from .barrier import abandon, drive, held_by, release_hold, tell_holder
from .disk import DONE, advance, set_chunk, start
from .records import IOV_AT, K_BARRIER, K_READ, K_REJECT, OPS_AT, SEGS_AT, blk_at, disk_at
from .request import check_segments, plan

_I8 = np.dtype(np.int64)
_PAGE = 4096
_GREFS_AT: int = INDIRECT_64.fields["indirect_grefs"][1]  # type: ignore[index]
_GREF = np.dtype(np.uint32)


@inline
def _copy_request(w: int, da: int, from_slot: int, payload: int) -> None:
    """The slot's bytes to private memory, once, in the native layout."""
    if disk_at(da)["abi"] == ABI_64:
        copy_in(payload, from_slot, ENTRY_SIZE_64)
    else:
        scratch = worker_at(w)["scratch"]
        copy_in(scratch, from_slot, ENTRY_SIZE_32)
        to_native(payload, scratch)


@inline
def _prepare(wa: int, ra: int, qa: int, index: int, payload: int) -> bool:
    """Reserve what the request needs; False if it has to stay on the ring for now."""
    ring = ring_at(ra)
    op = records(payload, 1, INDIRECT_64)[0]
    indirect = i64(op["operation"]) == OP_INDIRECT
    # As offered, whatever the request says: `plan` rejects more.
    pages = min(i64(op["nr_segments"]), disk_at(ring["device"])["max_segments"]) if indirect else i64(11)
    if indirect and worker_at(wa)["blocks_n"] == 0:
        return False
    if ring["policy"] == POLICY_COPY and not reserve_bounce(wa, pages):
        return False
    block = pop_block(wa) if indirect else i64(0)
    req = req_at(qa)
    req["ring"], req["index"], req["taken"] = ra, index, worker_at(wa)["now"]
    req["failed"] = 0
    req["nseg"] = 0
    req["held"] = 0
    req["bounced"] = 0
    req["block"] = block
    if indirect:
        req["segs"], req["ops"], req["iov"] = block, block + BLOCK_OPS_AT, block + BLOCK_IOV_AT
    else:
        req["segs"], req["ops"], req["iov"] = qa + SEGS_AT, qa + OPS_AT, qa + IOV_AT
    blk = blk_at(qa)
    blk["moved"] = 0
    blk["retries"] = 0
    return True


@inline
def _plan_one(qa: int, da: int, payload: int) -> None:
    """Plan; what needs no pages has nseg 0, what is still in indirect pages too."""
    req = req_at(qa)
    n = plan(payload, qa, da, req["segs"])
    req["nseg"] = n if n > 0 else 0


@kernel
def _take_replays(wa: int, ra: int, budget: int) -> int:
    """Requests that a dead predecessor had taken: planned anew from the journal's copy, nothing is on the ring."""
    w = worker_at(wa)
    ring = ring_at(ra)
    reqs = records(w["pass_reqs"], w["budget"], _I8)
    n = i64(0)
    while n < budget and ring["replay_head"] != 0:
        qa = ring["replay_head"]
        req = req_at(qa)
        following = req["next"]
        payload = record_of(ring, req["index"]) + PAYLOAD_AT
        if not _prepare(wa, ra, qa, req["index"], payload):
            w["starved"] = 1
            break
        ring["replay_head"] = following
        _plan_one(qa, ring["device"], payload)
        stats_at(ring["stats"])["replayed"] += 1
        reqs[n] = qa
        n += 1
        if blk_at(qa)["kind"] == K_BARRIER:
            break
    return n


@kernel
def _take(wa: int, ra: int, budget: int) -> int:
    """Move up to `budget` requests from the ring into records and into pass_reqs; how many. Stops after a barrier."""
    w = worker_at(wa)
    ring = ring_at(ra)
    ring["blocked"] = 0
    if ring["replay_head"] != 0:
        n = _take_replays(wa, ra, budget)
        ring["blocked"] = 1 if n == 0 else 0
        ring["inflight"] += 0  # they count since they were linked
        return n
    n = available(ring["end"])
    if n == CORRUPT:
        mark_dead(ra, V_OVERFLOW)
        return 0
    n = min(n, budget)
    e = records(ring["end"], 1, RING_END)[0]
    cons = e["cons"]
    reqs = records(w["pass_reqs"], w["budget"], _I8)
    taken = i64(0)
    while taken < n and ring["free_n"] > 0:
        index = pop_free(ring)
        record = record_of(ring, index)
        payload = record + PAYLOAD_AT
        qa = ring["reqs"] + index * ring["req_size"]
        _copy_request(wa, ring["device"], slot(ring["end"], cons + taken), payload)
        if not _prepare(wa, ra, qa, index, payload):
            push_free(ring, index)
            ring["blocked"] = 1
            w["starved"] = 1
            break
        commit_taken(record, (cons + taken) & 0xFFFFFFFF, w["now"])
        _plan_one(qa, ring["device"], payload)
        reqs[taken] = qa
        taken += 1
        if blk_at(qa)["kind"] == K_BARRIER:
            break
    checkpoint(w, STEP_TAKEN)
    advance_cons(ring["end"], taken)
    commit_consumed(ring, e["cons"])
    ring["inflight"] += taken
    if taken > 0:
        checkpoint(w, STEP_CONSUMED)
    return taken


@kernel
def _fetch_indirect(wa: int, ra: int, n: int) -> None:
    """Copy the indirect pages of this pass, in one call, and check the segments in the copies."""
    w = worker_at(wa)
    ring = ring_at(ra)
    seam = records(w["seam"], 1, SEAM)[0]
    reqs = records(w["pass_reqs"], n, _I8)
    ops = i64(0)
    for i in range(n):
        blk = blk_at(reqs[i])
        if blk["kind"] == K_REJECT or blk["indirect"] == 0:
            continue
        req = req_at(reqs[i])
        grefs = records(record_of(ring, req["index"]) + PAYLOAD_AT + _GREFS_AT, 8, _GREF)
        left = blk["indirect"] * 8
        page = i64(0)
        while left > 0:
            op = op_at(w["ops"], ops)
            op["address"] = req["block"] + page * _PAGE
            op["gref"], op["domid"], op["flags"] = grefs[page], ring["domid"], 0
            op["offset"], op["length"] = 0, min(left, _PAGE)
            left -= _PAGE
            page += 1
            ops += 1
    if ops == 0:
        return
    call(seam["grant_copy"], seam["grant_ctx"], w["ops"], ops, 0)
    stats_at(ring["stats"])["grants_copied"] += ops
    at = i64(0)
    for i in range(n):
        blk = blk_at(reqs[i])
        if blk["kind"] == K_REJECT or blk["indirect"] == 0:
            continue
        pages = (blk["indirect"] * 8 + _PAGE - 1) // _PAGE
        failed = i64(0)
        for k in range(pages):
            if op_at(w["ops"], at + k)["status"] != 0:
                failed = i64(op_at(w["ops"], at + k)["status"])
        at += pages
        req = req_at(reqs[i])
        if failed != 0:
            req["failed"] = failed
            stats_at(ring["stats"])["map_failures"] += 1
            continue
        got = check_segments(reqs[i], ring["device"], req["segs"], blk["indirect"], req["segs"])
        req["nseg"] = got if got > 0 else 0


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
        abandon(ra, da)
        return 0
    purge_cache(wa, ra)
    if ring["waiting"] != 0:
        drive(wa, ra, da)
        return 0
    holder = held_by(da)
    if holder != 0 and holder != ra:
        ring["blocked"] = 1
        tell_holder(ra, da)
        return 0
    if ring["barrier"] != 0:
        ring["blocked"] = 1
        return 0
    n = _take(wa, ra, budget)
    if n == 0:
        return 0
    w = worker_at(wa)
    set_chunk(w["uring"], disk_at(da)["chunk"])
    reqs = records(w["pass_reqs"], n, _I8)
    _fetch_indirect(wa, ra, n)
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
    """Of what the store gave back, the requests that are done, with their pages let go of; linked by REQ.next."""
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
            if req["bounced"] > 0 and req["to_guest"] != 0 and req["res"] >= 0 and req["failed"] == 0:
                copy_segments(wa, qa, 1)
            release(wa, qa)
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
    """RING.finish: journal the outcomes, respond, push once, notify if asked to, free the records."""
    w = worker_at(wa)
    ring = ring_at(ra)
    da = ring["device"]
    head = _gather(wa, ra)
    if head == 0:
        return 0
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
            seam = records(w["seam"], 1, SEAM)[0]
            call(seam["event_notify"], seam["event_ctx"], ring["port"], 0, 0)
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
    if ring["waiting"] != 0:
        mark_ready(wa, ra)
    if held_by(da) != 0:
        tell_holder(ra, da)
    return 0


"""Requests leave the ring: to private memory, into the journal, through the checks. Nothing is executed yet."""

from __future__ import annotations

import numpy as np

from pvdrivers.worker.batch import op_at
from pvdrivers.worker.fair import allowance, note_taken
from pvdrivers.worker.fetch import fetch
from pvdrivers.worker.journal import (
    PAYLOAD_AT,
    STEP_CONSUMED,
    STEP_TAKEN,
    checkpoint,
    commit_consumed,
    commit_taken,
    pop_free,
    push_free,
    record_of,
)
from pvdrivers.worker.marks import mark_dead, req_at, ring_at, stats_at, worker_at
from pvdrivers.worker.pools import may_have_block, pop_block, reserve_bounce
from pvdrivers.worker.records import BLOCK_IOV_AT, BLOCK_OPS_AT, POLICY_COPY, V_OVERFLOW
from rings.atomics import copy_in, i64, records
from rings.blkif import (
    ABI_64,
    ENTRY_SIZE_32,
    ENTRY_SIZE_64,
    INDIRECT_64,
    MAX_SEGMENTS,
    OP_INDIRECT,
    REQUEST_64,
    to_native,
)
from rings.jit import inline, kernel
from rings.ring import CORRUPT, RING_END, available, slot
from rings.ring import advance as advance_cons

from .records import IOV_AT, K_BARRIER, K_REJECT, OPS_AT, SEGS_AT, blk_at, disk_at
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
    if indirect:
        pages = min(i64(op["nr_segments"]), disk_at(ring["device"])["max_segments"])
    else:
        pages = min(i64(records(payload, 1, REQUEST_64)[0]["nr_segments"]), MAX_SEGMENTS)
    if indirect and not may_have_block(wa, ra):
        return False
    copied = ring["policy"] == POLICY_COPY or ring["pages"] + pages > ring["pages_limit"]
    if copied and not reserve_bounce(wa, ra, pages):
        return False
    block = pop_block(wa, ra) if indirect else i64(0)
    req = req_at(qa)
    req["ring"], req["index"], req["taken"] = ra, index, worker_at(wa)["now"]
    req["failed"] = 0
    req["nseg"] = 0
    req["held"] = 0
    req["bounced"] = 0
    req["copied"] = 1 if copied else 0
    req["pages"] = 0 if copied else pages
    ring["pages"] += req["pages"]
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
def take(wa: int, ra: int, budget: int) -> int:
    """Move up to `budget` requests from the ring into records and into pass_reqs; how many. Stops after a barrier."""
    w = worker_at(wa)
    ring = ring_at(ra)
    ring["blocked"] = 0
    if ring["replay_head"] != 0:
        n = _take_replays(wa, ra, budget)
        ring["blocked"] = 1 if n == 0 else 0
        return n
    n = available(ring["end"])
    if n == CORRUPT:
        mark_dead(ra, V_OVERFLOW)
        return 0
    if n > 0:
        n = min(n, budget, allowance(wa, ra))
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
    note_taken(ra, taken)
    if taken > 0:
        checkpoint(w, STEP_CONSUMED)
    return taken


@kernel
def fetch_indirect(wa: int, ra: int, n: int) -> None:
    """Read the indirect pages of this pass, all at once, and check the segments in what was read."""
    w = worker_at(wa)
    ring = ring_at(ra)
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
    fetch(wa, ra, ops)
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

"""The compiled request and response path of blkfront. Every kernel takes the address of a QUEUE.

What a backend writes is a response of sixteen bytes and a producer index, and neither is believed: the response
is copied, its id has to be one of ours that is in flight, its operation has to be the one asked for, and the pages
have to be given back before they are used again. These are the checks of Linux's hardened blkfront (xen-blkfront.c,
blkif_interrupt); after any failure there is a V_* in QUEUE.violation, and the disk is out of use.
"""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import EPOLL_EVENT, epoll_wait, eventfd_take
from pvdrivers.worker.histogram import bucket_of
from rings.atomics import (
    call,
    copy_bytes,
    load8,
    load16,
    load32,
    load64,
    load_acquire64,
    records,
    store32,
    store64,
    zero_bytes,
)
from rings.blkif import (
    ABI_64,
    DISCARD_64,
    INDIRECT_64,
    MAX_SEGMENTS,
    OP_DISCARD,
    OP_FLUSH_DISKCACHE,
    OP_INDIRECT,
    OP_READ,
    OP_WRITE,
    OP_WRITE_BARRIER,
    REQUEST_64,
    RESPONSE_SIZE_32,
    RESPONSE_SIZE_64,
    RSP_EOPNOTSUPP,
    RSP_OKAY,
    SEGMENT,
    from_native,
)
from rings.bounds import page_span
from rings.jit import inline, kernel
from rings.ring import CORRUPT, final_check, push, put, take

from .blkfront_records import (
    BATCH,
    COMPLETION,
    HIST_BUCKETS,
    IO,
    KIND_OTHER,
    KIND_READ,
    KIND_WRITE,
    NO_ROOM,
    QUEUE,
    SHADOW,
    SHADOW_PAGE,
    STARTED,
    TOO_BIG,
    V_ID,
    V_NONE,
    V_NOT_IN_FLIGHT,
    V_OPERATION,
    V_OVERFLOW,
    V_STILL_MAPPED,
)

_PAGE = 4096
_EIO, _EOPNOTSUPP = 5, 95
_READONLY = 1 << 16  # in the last argument of offer_grant
_SHADOW_SIZE, _SHADOW_PAGE_SIZE = SHADOW.itemsize, SHADOW_PAGE.itemsize
_COMPLETION_SIZE, _IO_SIZE, _EPOLL_EVENT_SIZE = COMPLETION.itemsize, IO.itemsize, EPOLL_EVENT.itemsize
_MESSAGE_32 = REQUEST_64.itemsize  # where the packed copy stands, behind the native one
_INDIRECT_GREFS = 28  # offset of indirect_grefs
_SEGMENTS = 24  # offset of seg
_OWN_PAGE, _REGISTERED = -1, -2  # SHADOW_PAGE.page of what is not of the pool


@inline
def _take_page(qa: int) -> int:
    """A page of the pool. The caller has looked whether there is one."""
    q = records(qa, 1, QUEUE)[0]
    q["pool_n"] -= 1
    return int(load32(q["pool_free"] + q["pool_n"] * 4))


@inline
def _give_page(qa: int, page: int) -> None:
    q = records(qa, 1, QUEUE)[0]
    store32(q["pool_free"] + q["pool_n"] * 4, np.uint32(page))
    q["pool_n"] += 1


@inline
def _grant(qa: int, frame: int, mode: int) -> int:
    """Offer `frame` under an unused gref; `mode` is 0 or _READONLY."""
    q = records(qa, 1, QUEUE)[0]
    q["grefs_n"] -= 1
    gref = int(load32(q["grefs"] + q["grefs_n"] * 4))
    call(q["offer_grant"], q["offer_ctx"], gref, frame, q["domid"] | mode)
    q["granted_pages"] += 1
    return gref


@inline
def _grant_pool_page(qa: int, page: int, mode: int) -> int:
    """The gref of a page of the pool: its own, or one for this request."""
    q = records(qa, 1, QUEUE)[0]
    if q["granted"]:
        return int(load32(q["pool_grefs"] + page * 4))
    return _grant(qa, load64(q["pool_frames"] + page * 8), mode)


@inline
def _note_page(at: int, gref: int, page: int) -> None:
    shadow = records(at, 1, SHADOW_PAGE)[0]
    shadow["gref"] = gref
    shadow["page"] = page


@inline
def _fill(qa: int, page: int, source: int, nbytes: int, writing: bool) -> None:
    """Data on its way out, or an empty page for data on its way in: nothing else of ours is to be read in it."""
    q = records(qa, 1, QUEUE)[0]
    at = q["pool"] + page * _PAGE
    if writing:
        copy_bytes(at, source, nbytes)
        if q["untrusted"] and nbytes < _PAGE:
            zero_bytes(at + nbytes, _PAGE - nbytes)
    elif q["untrusted"]:
        zero_bytes(at, _PAGE)
    q["bounced_pages"] += 1


@inline
def _segment(at: int, gref: int, first: int, last: int) -> None:
    segment = records(at, 1, SEGMENT)[0]
    segment["gref"] = gref
    segment["first_sect"] = first
    segment["last_sect"] = last


@kernel
def _segments(qa: int, ioa: int, notes: int, direct: int, bounce: bool) -> int:
    """Grant the pages of an IO and describe them, at `direct` or in indirect pages; grants taken."""
    q = records(qa, 1, QUEUE)[0]
    io = records(ioa, 1, IO)[0]
    address, left, frames = io["address"], io["sectors"] << 9, io["frames"]
    writing = io["op"] != OP_READ
    mode = _READONLY if writing else 0  # the backend reads what we write
    offset = 0 if bounce else address & (_PAGE - 1)
    count = page_span(offset, left)
    taken = 0
    table = 0
    for i in range(count):
        at = direct + i * 8
        if count > MAX_SEGMENTS:
            if i & 511 == 0:
                list_page = _take_page(qa)
                gref = _grant_pool_page(qa, list_page, _READONLY)
                _note_page(notes + taken * _SHADOW_PAGE_SIZE, gref, list_page)
                taken += 1
                store32(q["message"] + _INDIRECT_GREFS + (i >> 9) * 4, np.uint32(gref))
                table = q["pool"] + list_page * _PAGE
                if q["untrusted"]:
                    zero_bytes(table, _PAGE)
            at = table + (i & 511) * 8
        nbytes = min(_PAGE - offset, left)
        if bounce:
            page = _take_page(qa)
            _fill(qa, page, address, nbytes, writing)
            gref = _grant_pool_page(qa, page, mode)
        else:
            frame = load64(frames + i * 8)
            page = _OWN_PAGE if frame >= 0 else _REGISTERED
            gref = _grant(qa, frame, mode) if frame >= 0 else -frame
        _note_page(notes + taken * _SHADOW_PAGE_SIZE, gref, page)
        taken += 1
        # The pad bytes of a segment are zero: in the request they were cleared, in an indirect page they are here.
        store64(at, 0)
        _segment(at, gref, offset >> 9, ((offset + nbytes) >> 9) - 1)
        address += nbytes
        left -= nbytes
        offset = 0
    return taken


@kernel
def start(qa: int, ioa: int, now: int) -> int:
    """Put one IO on the ring, unpublished: STARTED; NO_ROOM, and nothing done; or TOO_BIG, and nothing done."""
    q = records(qa, 1, QUEUE)[0]
    io = records(ioa, 1, IO)[0]
    op = io["op"]
    carries = op in (OP_READ, OP_WRITE, OP_WRITE_BARRIER)
    bounce = q["bounce"] != 0 or io["frames"] == 0 or io["address"] & 511 != 0
    count = 0
    if carries:
        count = page_span(0 if bounce else io["address"] & (_PAGE - 1), io["sectors"] << 9)
    if count > q["max_segments"] or (op == OP_WRITE_BARRIER and count > MAX_SEGMENTS):
        return TOO_BIG
    lists = (count + 511) >> 9 if count > MAX_SEGMENTS else 0
    if q["free_n"] == 0 or q["pool_n"] < lists + (count if bounce else 0):
        return NO_ROOM
    if q["grefs_n"] < (0 if q["granted"] else lists) + (0 if q["granted"] and bounce else count):
        return NO_ROOM
    q["free_n"] -= 1
    slot = int(load32(q["free"] + q["free_n"] * 4))
    shadow_at = q["shadow"] + slot * _SHADOW_SIZE
    shadow = records(shadow_at, 1, SHADOW)[0]
    q["sequence"] += 1
    io["sequence"] = q["sequence"]
    copy_bytes(shadow_at, ioa, _IO_SIZE)
    shadow["generation"] = (shadow["generation"] + 1) & 0xFFFFFFFF
    shadow["in_flight"] = 1
    shadow["started"] = now
    shadow["segments"] = count
    shadow["bounced"] = 1 if bounce and count > 0 else 0

    message = q["message"]
    zero_bytes(message, _MESSAGE_32)
    notes = q["shadow_pages"] + slot * q["max_pages"] * _SHADOW_PAGE_SIZE
    shadow["pages"] = _segments(qa, ioa, notes, message + _SEGMENTS, bounce) if count > 0 else 0
    if lists > 0:
        indirect = records(message, 1, INDIRECT_64)[0]
        indirect["operation"] = OP_INDIRECT
        indirect["indirect_op"] = op
        indirect["nr_segments"] = count
        indirect["handle"] = q["handle"]
        indirect["sector_number"] = io["sector"]
    elif op == OP_DISCARD:
        discard = records(message, 1, DISCARD_64)[0]
        discard["operation"] = OP_DISCARD
        discard["flag"] = io["flags"]
        discard["handle"] = q["handle"]
        discard["sector_number"] = io["sector"]
        discard["nr_sectors"] = io["sectors"]
    else:
        request = records(message, 1, REQUEST_64)[0]
        request["operation"] = op
        request["nr_segments"] = count
        request["handle"] = q["handle"]
        request["sector_number"] = io["sector"]
    # The id stands at the same place in all of them: slot below, generation above.
    store32(message + 8, np.uint32(slot))
    store32(message + 12, np.uint32(shadow["generation"]))
    if q["abi"] != ABI_64:
        from_native(message + _MESSAGE_32, message)
        message += _MESSAGE_32
    put(q["end"], message)
    return STARTED


@kernel
def kick(qa: int) -> bool:
    """Publish what was started; True if the backend had to be woken."""
    q = records(qa, 1, QUEUE)[0]
    notify: bool = push(q["end"])
    if notify:
        call(q["event_notify"], q["event_ctx"], q["port"], 0, 0)
    return notify


@kernel
def start_all(qa: int, ios: int, count: int, now: int) -> int:
    """Start and publish IO[count] in order, as far as there is room; how many. Too big ones end it as well."""
    started = 0
    while started < count:
        if start(qa, ios + started * _IO_SIZE, now) != STARTED:
            break
        started += 1
    if started > 0:
        kick(qa)
    return started


@inline
def _violated(qa: int, what: int, value: int) -> int:
    q = records(qa, 1, QUEUE)[0]
    if q["violation"] == V_NONE:
        q["violation"] = what
        q["violation_value"] = value
    return -1


@kernel
def _release(qa: int, slot: int, okay: bool) -> int:
    """Take back the pages of an answered request, and its data with them; 0, or -1 for a grant still in use."""
    q = records(qa, 1, QUEUE)[0]
    shadow = records(q["shadow"] + slot * _SHADOW_SIZE, 1, SHADOW)[0]
    notes = q["shadow_pages"] + slot * q["max_pages"] * _SHADOW_PAGE_SIZE
    reading = okay and shadow["bounced"] != 0 and shadow["io"]["op"] == OP_READ
    indirect = shadow["pages"] != shadow["segments"]
    address, left = shadow["io"]["address"], shadow["io"]["sectors"] << 9
    segment = shadow["segments"]
    # Backwards, so that the stack gives the same pages in the same order again: side by side, as they were made.
    for i in range(shadow["pages"] - 1, -1, -1):
        note = records(notes + i * _SHADOW_PAGE_SIZE, 1, SHADOW_PAGE)[0]
        page = int(note["page"])
        gref = int(note["gref"])
        if not (q["granted"] and page >= 0) and page != _REGISTERED:
            if call(q["offer_end"], q["offer_ctx"], gref, 0, 0) != 0:
                return _violated(qa, V_STILL_MAPPED, gref)
            store32(q["grefs"] + q["grefs_n"] * 4, np.uint32(gref))
            q["grefs_n"] += 1
        lists = indirect and i % 513 == 0  # a page of descriptors; the 512 pages that it describes follow
        segment -= 0 if lists else 1
        if page >= 0:
            if reading and not lists:
                done = segment * _PAGE
                copy_bytes(address + done, q["pool"] + page * _PAGE, min(_PAGE, left - done))
            _give_page(qa, page)
    return 0


@kernel
def reap(qa: int, out: int, limit: int, now: int) -> int:
    """Take up to `limit` (at most BATCH) responses as COMPLETIONs; how many, or -1: QUEUE.violation says why."""
    q = records(qa, 1, QUEUE)[0]
    stride = RESPONSE_SIZE_64 if q["abi"] == ABI_64 else RESPONSE_SIZE_32
    if q["violation"] != V_NONE:
        return -1
    n = take(q["end"], q["responses"], stride, min(limit, BATCH))
    if n == CORRUPT:
        return _violated(qa, V_OVERFLOW, 0)
    for i in range(n):
        at = q["responses"] + i * stride
        slot = int(load32(at))
        generation = int(load32(at + 4))
        if slot >= q["slots"]:
            return _violated(qa, V_ID, slot)
        shadow = records(q["shadow"] + slot * _SHADOW_SIZE, 1, SHADOW)[0]
        if shadow["in_flight"] == 0 or shadow["generation"] != generation:
            return _violated(qa, V_NOT_IN_FLIGHT, slot)
        op = shadow["io"]["op"]
        if int(load8(at + 8)) != op:  # of an indirect request the inner one
            return _violated(qa, V_OPERATION, int(load8(at + 8)))
        status = int(load16(at + 10))
        okay = status == RSP_OKAY
        if _release(qa, slot, okay) != 0:
            return -1
        shadow["in_flight"] = 0
        store32(q["free"] + q["free_n"] * 4, np.uint32(slot))
        q["free_n"] += 1

        done = records(out + i * _COMPLETION_SIZE, 1, COMPLETION)[0]
        done["tag"] = shadow["io"]["tag"]
        done["op"] = op
        done["latency"] = now - shadow["started"]
        done["status"] = 0 if okay else -_EOPNOTSUPP if status == RSP_EOPNOTSUPP & 0xFFFF else -_EIO
        q["errors"] += 0 if okay else 1
        kind = KIND_READ if op == OP_READ else KIND_WRITE if op == OP_WRITE else KIND_OTHER
        q["requests"][kind] += 1
        if op != OP_FLUSH_DISKCACHE and okay:
            q["bytes"][kind] += shadow["io"]["sectors"] << 9
        bucket = q["hist"] + (kind * HIST_BUCKETS + bucket_of(now - shadow["started"])) * 8
        store64(bucket, load64(bucket) + 1)
    return int(n)


@kernel
def arm(qa: int) -> int:
    """Before sleeping: responses that wait after all, 0 (the next one wakes us), or -1: a violation."""
    n = final_check(records(qa, 1, QUEUE)[0]["end"])
    return _violated(qa, V_OVERFLOW, 0) if n == CORRUPT else int(n)


@kernel
def wait(qa: int, timeout_ms: int) -> int:
    """Sleep until the backend or wake_fd wakes us; how many of the two did, or -errno (-EINTR: back to Python)."""
    q = records(qa, 1, QUEUE)[0]
    if load_acquire64(qa) != 0:  # QUEUE.stop, the first field
        return 0
    n = epoll_wait(q["epoll"], q["epoll_events"], 4, timeout_ms)
    if n <= 0:
        return n
    for i in range(n):
        event = records(q["epoll_events"] + i * _EPOLL_EVENT_SIZE, 1, EPOLL_EVENT)[0]
        if int(event["data"] & 0xFFFFFFFF) == q["wake_fd"]:
            eventfd_take(q["wake_fd"])
            continue
        call(q["event_deliver"], q["event_ctx"], q["token"], 0, 0)
        # Delivery masks a port, so a backend that keeps ringing cannot keep us in this loop.
        while call(q["event_next"], q["event_ctx"], 0, 0, 0) >= 0:
            q["wakeups"] += 1
        call(q["event_unmask"], q["event_ctx"], q["port"], 0, 0)
    return n


ARGUMENTS = {
    "start_all": "(int64, int64, int64, int64)",
    "reap": "(int64, int64, int64, int64)",
    "arm": "(int64,)",
    "wait": "(int64, int64)",
}
"""What Python calls, and with what, for warm()."""

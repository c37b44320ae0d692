"""What blkfront's kernels work on: plain records in private memory. Addresses are int64, counts are int64."""

from __future__ import annotations

import numpy as np

IO = np.dtype(
    [
        ("op", "i8"),  # blkif.OP_*: read, write, barrier, flush or discard
        ("flags", "i8"),  # discard: blkif.DISCARD_SECURE
        ("sector", "i8"),  # of 512 bytes, as everywhere in the protocol
        ("sectors", "i8"),
        ("address", "i8"),  # of the data
        ("frames", "i8"),  # address of i8[]: each page's frame, or -gref if it is registered; 0: cannot be granted
        ("tag", "i8"),  # the caller's own, handed back with the completion
        ("sequence", "i8"),  # set by start(): the order in which requests are queued again
    ],
    align=True,
)
"""One request as the caller says it; no larger than what one request on the ring can carry."""

COMPLETION = np.dtype(
    [
        ("tag", "i8"),
        ("status", "i8"),  # 0 or -errno
        ("op", "i8"),
        ("latency", "i8"),  # ns
    ],
    align=True,
)

SHADOW = np.dtype(
    [
        ("io", IO),
        ("in_flight", "i8"),
        ("generation", "i8"),  # of this slot, 32 bits: part of the id, so that no response counts twice
        ("started", "i8"),  # ns
        ("segments", "i8"),
        ("pages", "i8"),  # grants taken: segments and indirect pages
        ("bounced", "i8"),  # the data went through pages of the pool
    ],
    align=True,
)
"""What we know of a request in flight. The shared ring is never asked."""

SHADOW_PAGE = np.dtype([("gref", "u4"), ("page", "i4")], align=True)
"""One grant of a request, and the page of the pool behind it (-1: the caller's own page; -2: a registered one)."""

HIST_BUCKETS = 256
KIND_READ, KIND_WRITE, KIND_OTHER = 0, 1, 2
KINDS = 3

QUEUE = np.dtype(
    [
        ("stop", "i8"),  # shared with the control thread: whoever is in a kernel on this queue is to leave it
        ("end", "i8"),  # address of the RING_END
        ("abi", "i8"),
        ("domid", "i8"),  # of the backend
        ("handle", "i8"),  # the device's number, 16 bits of it
        ("slots", "i8"),  # requests that may be in flight: the entries of the ring
        ("shadow", "i8"),  # address of SHADOW[slots]
        ("shadow_pages", "i8"),  # address of SHADOW_PAGE[slots * max_pages]
        ("max_pages", "i8"),
        ("max_segments", "i8"),  # in one request; more than 11 go by indirect descriptors
        ("free", "i8"),  # i4 stack of free slots
        ("free_n", "i8"),
        ("grefs", "i8"),  # u4 stack of unused grefs, for grants that last as long as a request
        ("grefs_n", "i8"),
        ("pool", "i8"),  # address of our own pages: for bounced data and for indirect descriptors
        ("pool_frames", "i8"),  # i8[]: the frame of each
        ("pool_grefs", "i8"),  # u4[]: the gref of each, where they are granted once and for all
        ("pool_free", "i8"),  # i4 stack of free pages; last in, first out keeps the backend's working set small
        ("pool_n", "i8"),
        ("granted", "i8"),  # pool pages are granted once and for all (persistent grants; a static platform)
        ("bounce", "i8"),  # all data goes through the pool
        ("untrusted", "i8"),  # ... and nothing of ours may be in a page that is granted, but what is meant
        ("message", "i8"),  # scratch: one request of 112 bytes, then one of 108
        ("responses", "i8"),  # scratch: BATCH responses
        ("sequence", "i8"),
        ("violation", "i8"),  # V_*, once the backend has broken the protocol
        ("violation_value", "i8"),
        ("port", "i8"),
        ("token", "i8"),  # for event_deliver
        ("epoll", "i8"),  # descriptor to wait on: our port's, edge-triggered, and wake_fd
        ("epoll_events", "i8"),  # scratch: EPOLL_EVENT[4]
        ("wake_fd", "i8"),  # eventfd: something for the waiting thread to look at
        ("event_ctx", "i8"),  # from here on: the platform's JIT seam
        ("event_notify", "i8"),
        ("event_deliver", "i8"),
        ("event_next", "i8"),
        ("event_unmask", "i8"),
        ("offer_ctx", "i8"),
        ("offer_grant", "i8"),
        ("offer_end", "i8"),
        ("hist", "i8"),  # address of u8[KINDS][HIST_BUCKETS]: latencies
        ("requests", "i8", (KINDS,)),
        ("bytes", "i8", (KINDS,)),
        ("errors", "i8"),
        ("wakeups", "i8"),
        ("bounced_pages", "i8"),
        ("granted_pages", "i8"),
    ],
    align=True,
)

BATCH = 64
"""Responses taken at once."""

# What start() says.
STARTED = 1
NO_ROOM = 0  # no free slot, gref or page: again after a completion
TOO_BIG = -1  # more segments than a request can carry: the caller has to split it

# QUEUE.violation
V_NONE = 0
V_OVERFLOW = 1
V_ID = 2
V_NOT_IN_FLIGHT = 3
V_OPERATION = 4
V_STILL_MAPPED = 5
VIOLATIONS = {
    V_OVERFLOW: "response producer index beyond the requests in flight",
    V_ID: "response with an id that was never used ({value:#x})",
    V_NOT_IN_FLIGHT: "response to a request that is not in flight (slot {value})",
    V_OPERATION: "response has the wrong operation ({value})",
    V_STILL_MAPPED: "request answered while its grant {value} is still mapped",
}

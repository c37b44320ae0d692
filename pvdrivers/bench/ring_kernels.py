"""The two loops of `pvdrivers bench ring`: what peers/ring_peer.c does, with rings/ring.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.syscalls import eventfd_add, eventfd_take
from rings.atomics import cycles, load64, pause, records, store64
from rings.blkif import (
    ENTRY_SIZE_64,
    MAX_SEGMENTS,
    OP_FLUSH_DISKCACHE,
    OP_READ,
    REQUEST_64,
    RESPONSE_64,
    RESPONSE_SIZE_64,
    RSP_ERROR,
    RSP_OKAY,
    put_response_64,
)
from rings.jit import inline, kernel
from rings.ring import (
    RING_END,
    advance_prod,
    final_check,
    push,
    push_quiet,
    slot,
    take,
)

POLL, SLEEP = 0, 1
STAMPS = 1024
"""Requests that can be told apart; more than a ring has slots."""
BUCKETS, BUCKET_NS = 100_000, 10
FAILED = -1
BATCH = 64
"""Messages that `take` copies at once: 7 KiB, which stay in the first cache."""


@kernel
def now() -> int:
    """The cycle counter."""
    return cycles()


@inline
def relax() -> None:
    """Between two looks at an index that has not moved: two pauses.

    A look that comes while the peer is about to write takes the cache line away from it. One pause is 10 % slower
    here at depth 1; three are slower again. The C peer has one, as is usual, and gains nothing by a second.
    """
    pause()
    pause()


@kernel
def front(
    end: int,
    depth: int,
    total: int,
    mode: int,
    own_event: int,
    peer_event: int,
    ns_per_tick: float,
    stamps: int,
    latency: int,
    inbox: int,
) -> int:
    """Send `total` requests, never more than `depth` unanswered; ticks that it took, or FAILED.

    `stamps` is int64[STAMPS], `latency` int64[BUCKETS], `inbox` room for BATCH messages.
    """
    e = records(end, 1, RING_END)[0]
    sent = received = 0
    began = cycles()
    while received < total:
        n = min(depth - (sent - received), total - sent)
        if n > 0:
            t = cycles()
            first = e["prod_pvt"]
            for i in range(n):
                id = (first + i) & (STAMPS - 1)
                q = records(slot(end, first + i), 1, REQUEST_64)[0]
                q["operation"] = OP_READ
                q["nr_segments"] = 1
                q["handle"] = 51712
                q["id"] = id
                q["sector_number"] = (sent + i) * 8
                q["seg"][0]["gref"] = id + 8
                q["seg"][0]["first_sect"] = 0
                q["seg"][0]["last_sect"] = 7
                store64(stamps + id * 8, t)
            advance_prod(end, n)
            sent += n
            if mode == POLL:
                push_quiet(end)
            elif push(end):
                eventfd_add(peer_event, 1)
        n = take(end, inbox, RESPONSE_SIZE_64, BATCH)
        if n < 0:
            return FAILED
        if n == 0:
            if mode == POLL:
                relax()
            elif final_check(end) == 0:
                eventfd_take(own_event)
            continue
        t = cycles()
        for i in range(n):
            r = records(inbox + i * RESPONSE_SIZE_64, 1, RESPONSE_64)[0]
            id = np.int64(r["id"])
            if r["status"] != RSP_OKAY or id < 0 or id >= STAMPS:
                return FAILED
            at: Any = np.int64((t - load64(stamps + id * 8)) * ns_per_tick) // BUCKET_NS
            if at > BUCKETS - 1:
                at = BUCKETS - 1
            bucket = latency + at * 8
            store64(bucket, load64(bucket) + 1)
        received += n
    return cycles() - began


@kernel
def back(end: int, total: int, mode: int, own_event: int, peer_event: int, inbox: int) -> int:
    """Check and answer `total` requests; 0, or FAILED. `inbox` is room for BATCH messages."""
    e = records(end, 1, RING_END)[0]
    done = 0
    while done < total:
        n = take(end, inbox, ENTRY_SIZE_64, BATCH)
        if n < 0:
            return FAILED
        if n == 0:
            if mode == POLL:
                relax()
            elif final_check(end) == 0:
                eventfd_take(own_event)
            continue
        first = e["prod_pvt"]
        for i in range(n):
            q = records(inbox + i * ENTRY_SIZE_64, 1, REQUEST_64)[0]
            nr = q["nr_segments"]
            status = RSP_OKAY
            if q["operation"] > OP_FLUSH_DISKCACHE or nr < 1 or nr > MAX_SEGMENTS:
                status = RSP_ERROR
            for j in range(min(nr, MAX_SEGMENTS)):
                s = q["seg"][np.uintp(j)]
                if s["last_sect"] > 7 or s["first_sect"] > s["last_sect"]:
                    status = RSP_ERROR
            put_response_64(slot(end, first + i), q["id"], q["operation"], status)
        advance_prod(end, n)
        done += n
        if mode == POLL:
            push_quiet(end)
        elif push(end):
            eventfd_add(peer_event, 1)
    return 0

"""One ring, two ends: Xen's public/io/ring.h as a record and a dozen small kernels.

Request and response directions are one structure seen from two sides, so both ends are the same record with
the addresses exchanged. What differs is who may speak unasked, and that is one number, `credit`: a back end
grants its peer `nr_ents` messages, a front end grants none (a response needs a request). Then for either end

    legal      available <= credit + (prod_pvt - cons)
    room       nr_ents - credit - (prod_pvt - cons)

An end is private memory, never shared: a peer that could write nr_ents could make us write anywhere (sDDF
#200). Every kernel takes the address of a RING_END; indices run freely modulo 2**32 and are kept as int64. No
kernel looks at a message in a slot: `take` copies it out, and only the copy is to be believed (XSA-155).
"""

# mypy: disable-error-code=no-any-return
from __future__ import annotations

import numpy as np

from .atomics import (
    compiler_barrier,
    copy_bytes,
    copy_in,
    distance,
    full_barrier,
    load_acquire32,
    load_once32,
    records,
    signed_distance,
    store_once32,
    store_release32,
    zero_bytes,
)
from .jit import inline, kernel

__all__ = [
    "CORRUPT",
    "HEADER_SIZE",
    "PAGE_SIZE",
    "RING_END",
    "advance",
    "advance_prod",
    "available",
    "back_end",
    "copy_message",
    "final_check",
    "format_page",
    "front_end",
    "push",
    "push_quiet",
    "put",
    "ring_entries",
    "room",
    "slot",
    "take",
    "unanswered",
]

CORRUPT = -1
"""The peer's producer index is one that no honest peer writes. The ring is dead; see `available`."""

PAGE_SIZE = 4096
"""Bytes in a page of a ring, whatever the page size of the host (XEN_PAGE_SHIFT 12 in ring.h)."""

HEADER_SIZE = 64
"""Bytes before the first slot: four indices and padding (ring.h, DEFINE_RING_TYPES)."""

_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = 0, 4, 8, 12
_MAX_ENTRIES = 1 << 30  # more than any ring; keeps every sum of indices small

RING_END = np.dtype(
    [
        ("slots", np.int64),  # address of slot 0
        ("prod", np.int64),  # address of the producer index that we write
        ("prod_event", np.int64),  # address of the event index that our peer writes: wake it then
        ("peer_prod", np.int64),  # address of the producer index that our peer writes
        ("peer_event", np.int64),  # address of the event index that we write
        ("nr_ents", np.int64),  # slots, a power of two
        ("entry_size", np.int64),  # bytes in a slot
        ("credit", np.int64),  # messages that the peer may send unasked: nr_ents at a back end, else 0
        ("prod_pvt", np.int64),  # next slot that we fill; runs ahead of what is published
        ("pushed", np.int64),  # what we published last
        ("cons", np.int64),  # next message of the peer that we take
        ("notify_sent", np.int64),  # pushes that woke the peer
        ("notify_saved", np.int64),  # pushes that found the peer awake
    ],
    align=True,
)
"""One end of a ring. Private. Addresses and counts; the three indices are numbers from 0 to 2**32 - 1.

The peer can write `prod` too, for the page is shared; so what we published is remembered in `pushed`, not
read.
"""


def ring_entries(size: int, entry_size: int) -> int:
    """Slots in a ring of `size` bytes (pages x 4096), rounded down to a power of two; 0 if not one fits.

    __RING_SIZE. A request of 112 bytes gives 32 slots in one page, where 36 would fit.
    """
    fit = (size - HEADER_SIZE) // entry_size if size > HEADER_SIZE else 0
    return 1 << (fit.bit_length() - 1) if fit else 0


@kernel
def format_page(sring: int) -> None:
    """SHARED_RING_INIT: no messages, each side wants to be woken by the first. Only a front end does this.

    A back end that formatted would wipe out requests that an early front end has put already.
    """
    zero_bytes(sring, HEADER_SIZE)
    store_once32(sring + _REQ_EVENT, np.uint32(1))
    store_release32(sring + _RSP_EVENT, np.uint32(1))


@inline
def _attach(end: int, sring: int, nr_ents: int, entry_size: int) -> int:
    """What both ends have in common; 0, or CORRUPT for indices or a size that cannot be."""
    if nr_ents <= 0 or nr_ents > _MAX_ENTRIES or nr_ents & (nr_ents - 1) != 0 or entry_size <= 0:
        return CORRUPT
    e = records(end, 1, RING_END)[0]
    e["slots"] = sring + HEADER_SIZE
    e["nr_ents"] = nr_ents
    e["entry_size"] = entry_size
    e["notify_sent"] = 0
    e["notify_saved"] = 0
    if distance(load_acquire32(sring + _REQ_PROD), load_acquire32(sring + _RSP_PROD)) > nr_ents:
        return CORRUPT
    return 0


@kernel
def front_end(end: int, sring: int, nr_ents: int, entry_size: int) -> int:
    """FRONT_RING_ATTACH at the indices that are in the page; 0, or CORRUPT if they are absurd.

    On a page just formatted this is FRONT_RING_INIT. On a live one no response counts as taken by us that the
    back end has published: whoever remembers better sets end["cons"].
    """
    status = _attach(end, sring, nr_ents, entry_size)
    e = records(end, 1, RING_END)[0]
    e["prod"], e["prod_event"] = sring + _REQ_PROD, sring + _REQ_EVENT
    e["peer_prod"], e["peer_event"] = sring + _RSP_PROD, sring + _RSP_EVENT
    e["credit"] = 0
    e["prod_pvt"] = load_acquire32(sring + _REQ_PROD)
    e["pushed"] = e["prod_pvt"]
    e["cons"] = load_acquire32(sring + _RSP_PROD)
    return status


@kernel
def back_end(end: int, sring: int, nr_ents: int, entry_size: int) -> int:
    """BACK_RING_ATTACH(rsp_prod), as Linux does it: live indices are honoured; 0, or CORRUPT if absurd.

    All that has no response yet will be taken (again). A caller with a journal knows which of it the process
    before took already, and sets end["cons"].
    """
    status = _attach(end, sring, nr_ents, entry_size)
    e = records(end, 1, RING_END)[0]
    e["prod"], e["prod_event"] = sring + _RSP_PROD, sring + _RSP_EVENT
    e["peer_prod"], e["peer_event"] = sring + _REQ_PROD, sring + _REQ_EVENT
    e["credit"] = nr_ents
    e["prod_pvt"] = load_acquire32(sring + _RSP_PROD)
    e["pushed"] = e["prod_pvt"]
    e["cons"] = e["prod_pvt"]
    return status


@inline
def available(end: int) -> int:
    """Messages that wait for us, or CORRUPT. RING_HAS_UNCONSUMED_* and RING_*_PROD_OVERFLOW in one.

    A hostile producer index would otherwise make us take slots that hold our own unread output, or for ever.
    One load only, for the check must be of the value that is used.
    """
    e = records(end, 1, RING_END)[0]
    cons = e["cons"]
    # Pairs with the release in the peer's push: who sees the index sees the messages.
    n = distance(load_acquire32(e["peer_prod"]), cons)
    if n == 0:
        return 0
    return n if n <= e["credit"] + signed_distance(e["prod_pvt"], cons) else CORRUPT


@inline
def slot(end: int, index: int) -> int:
    """The address of the slot of a free-running index. RING_GET_REQUEST, RING_GET_RESPONSE."""
    e = records(end, 1, RING_END)[0]
    return e["slots"] + (index & (e["nr_ents"] - 1)) * e["entry_size"]


@inline
def copy_message(end: int, index: int, out: int) -> None:
    """RING_COPY_REQUEST, RING_COPY_RESPONSE: the slot of `index`, entry_size bytes, to private memory."""
    e = records(end, 1, RING_END)[0]
    size = e["entry_size"]
    copy_in(out, e["slots"] + (index & (e["nr_ents"] - 1)) * size, size)


@inline
def advance(end: int, n: int) -> None:
    """`n` messages have been taken: cons += n. The caller has checked n <= available."""
    e = records(end, 1, RING_END)[0]
    e["cons"] = (e["cons"] + n) & 0xFFFFFFFF


@inline
def take(end: int, out: int, stride: int, limit: int) -> int:
    """Copy up to `limit` messages out, `stride` bytes apart, and advance; how many, or CORRUPT.

    The loop of RING_COPY_* over all that is there. Of each message stride bytes are copied, but no more than
    entry_size: the responses in a ring of requests are short.
    """
    n = available(end)
    if n <= 0:
        return n
    n = min(n, limit)
    if n <= 0:
        return 0
    e = records(end, 1, RING_END)[0]
    slots, size, mask, cons = e["slots"], e["entry_size"], e["nr_ents"] - 1, e["cons"]
    if stride <= size:
        # The caller's stride is a constant once inlined, and so becomes a handful of vector moves. The first
        # message is taken before the loop, for it is often the only one, and then what a loop costs to set up
        # is to be seen.
        copy_bytes(out, slots + (cons & mask) * size, stride)
        for i in range(1, n):
            copy_bytes(out + i * stride, slots + ((cons + i) & mask) * size, stride)
    else:
        for i in range(n):
            copy_bytes(out + i * stride, slots + ((cons + i) & mask) * size, size)
    compiler_barrier()  # that of copy_in, once for the batch
    e["cons"] = (cons + n) & 0xFFFFFFFF
    return n


@inline
def room(end: int) -> int:
    """Slots that we may fill. At a front end RING_FREE_REQUESTS; at a back end what it owes responses for."""
    e = records(end, 1, RING_END)[0]
    return e["nr_ents"] - e["credit"] - signed_distance(e["prod_pvt"], e["cons"])


@inline
def unanswered(end: int) -> int:
    """Requests that have no response: put by a front end, or taken by a back end, and not answered."""
    e = records(end, 1, RING_END)[0]
    ahead = signed_distance(e["prod_pvt"], e["cons"])
    return ahead if e["credit"] == 0 else -ahead


@inline
def advance_prod(end: int, n: int) -> None:
    """`n` messages have been written in place: prod_pvt += n. The peer sees them after the next push."""
    e = records(end, 1, RING_END)[0]
    e["prod_pvt"] = (e["prod_pvt"] + n) & 0xFFFFFFFF


@inline
def put(end: int, message: int) -> None:
    """Copy one message of entry_size bytes into the next slot. The caller has seen room(end) > 0."""
    e = records(end, 1, RING_END)[0]
    copy_bytes(slot(end, e["prod_pvt"]), message, e["entry_size"])
    advance_prod(end, 1)


@inline
def push_quiet(end: int) -> None:
    """RING_PUSH_*: publish, and wake nobody. For a peer that polls."""
    e = records(end, 1, RING_END)[0]
    # Release: the peer sees the messages before the index. Pairs with the acquire in `available`.
    store_release32(e["prod"], np.uint32(e["prod_pvt"]))
    e["pushed"] = e["prod_pvt"]


@inline
def push(end: int) -> bool:
    """RING_PUSH_*_AND_CHECK_NOTIFY: publish; True if the peer asked to be woken by one of these messages."""
    e = records(end, 1, RING_END)[0]
    new = e["prod_pvt"]
    fresh = distance(new, e["pushed"])
    e["pushed"] = new
    # Release: the peer sees the messages before the index. Pairs with the acquire in `available`.
    store_release32(e["prod"], np.uint32(new))
    # The peer sees the index before we look at its event. Pairs with the barrier in `final_check`: of the two
    # of us, at least one sees what the other has written, and so no wake-up is lost.
    full_barrier()
    notify = distance(new, load_once32(e["prod_event"])) < fresh
    if notify:
        e["notify_sent"] += 1
    else:
        e["notify_saved"] += 1
    return notify


@inline
def final_check(end: int) -> int:
    """RING_FINAL_CHECK_FOR_*, before sleeping: messages that wait after all, 0 (now sleep), or CORRUPT.

    Sets our event to cons + 1: the very next message is to wake us.
    """
    n = available(end)
    if n != 0:
        return n
    e = records(end, 1, RING_END)[0]
    store_once32(e["peer_event"], np.uint32((e["cons"] + 1) & 0xFFFFFFFF))
    # The peer sees the event before we look once more. Pairs with the barrier in `push`.
    full_barrier()
    return available(end)

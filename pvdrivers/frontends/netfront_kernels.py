"""The compiled path of netfront. Every kernel takes the address of a QUEUE.

Pages are granted once, when the rings are made, and packets are copied into and out of them: nothing is granted or
taken back on the way, and a backend sees nothing of ours but packets. Of what it writes nothing is believed: a response
is copied, its id has to be one that is in flight, its bytes have to be in the page. After any failure there is a V_* in
QUEUE.violation, and the interface is out of use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.syscalls import EPOLL_EVENT, epoll_wait, eventfd_take
from rings.atomics import (
    call,
    copy_bytes,
    copy_in,
    i64,
    load8,
    load32,
    load64,
    load_acquire64,
    records,
    store8,
    store32,
    store64,
    zero_bytes,
)
from rings.jit import inline, kernel
from rings.netif import (
    EXTRA_FLAG_MORE,
    EXTRA_GSO,
    EXTRA_HASH,
    EXTRA_NONE,
    EXTRA_XDP,
    GSO,
    RSP_NULL,
    RSP_OKAY,
    RX_ENTRY_SIZE,
    RX_RESPONSE,
    TX_ENTRY_SIZE,
    TX_RESPONSE,
    XDP,
    RXF_csum_blank,
    RXF_data_validated,
    RXF_extra_info,
    RXF_more_data,
    TXF_csum_blank,
    TXF_data_validated,
    TXF_extra_info,
    TXF_more_data,
    hash_extra,
    known_hash,
)
from rings.ring import CORRUPT, RING_END, advance, advance_prod, available, final_check, push, room, slot
from rings.vnet import CSUM_BLANK, CSUM_NONE, CSUM_VALID

from .netfront_records import (
    BUFFER,
    FRAME,
    MOST_BYTES,
    NO_ROOM,
    QUEUE,
    RX,
    SLOTS,
    STARTED,
    TOO_BIG,
    TX,
    V_CHAIN,
    V_EXTRA,
    V_ID,
    V_NONE,
    V_OVERFLOW,
    V_RANGE,
)

_PAGE = 4096
NO_ID = 0xFFFF
"""Of a slot that holds an extra."""
_FRAME_SIZE, _EPOLL_EVENT_SIZE = FRAME.itemsize, EPOLL_EVENT.itemsize


@inline
def queue_at(qa: int) -> Any:
    """The QUEUE at an address."""
    return records(qa, 1, QUEUE)[0]


@inline
def frame_at(at: int) -> Any:
    """The FRAME at an address."""
    return records(at, 1, FRAME)[0]


@kernel
def _violated(qa: int, what: int, value: int) -> int:
    q = queue_at(qa)
    if q["violation"] == V_NONE:
        q["violation"], q["violation_value"] = what, value
    return -1


@inline
def put_tx(qa: int, gref: int, flags: int, id: int, size: int) -> None:
    """One request, written as two stores and one: gref and offset 0 with flags, then id and size."""
    q = queue_at(qa)
    at = slot(q["tx_end"], records(q["tx_end"], 1, RING_END)[0]["prod_pvt"])
    store32(at, np.uint32(gref))
    store32(at + 4, np.uint32(flags << 16))
    store32(at + 8, np.uint32(id | size << 16))
    advance_prod(q["tx_end"], 1)


@inline
def _put_extra(qa: int, extra: int) -> None:
    """struct netif_extra_info in the place of a request."""
    q = queue_at(qa)
    at = slot(q["tx_end"], records(q["tx_end"], 1, RING_END)[0]["prod_pvt"])
    store64(at, extra)
    store32(at + 8, np.uint32(NO_ID))
    advance_prod(q["tx_end"], 1)


@kernel
def start(qa: int, data: int, fa: int) -> int:
    """Put one packet on the ring, unpublished: STARTED; NO_ROOM, and nothing done; or TOO_BIG, and nothing done. With
    `data` 0 its bytes are in the pages already that are the next ones to be used."""
    q = queue_at(qa)
    frame = frame_at(fa)
    size = frame["size"]
    pages = (size + _PAGE - 1) // _PAGE
    if size <= 0 or size > MOST_BYTES or (pages > 1 and q["sg"] == 0):
        return i64(TOO_BIG)
    extras = i64(frame["gso_size"] != 0) + i64(frame["hash_type"] != 0)
    if q["free_n"] < pages or room(q["tx_end"]) < pages + extras:
        return i64(NO_ROOM)
    first = i64(TXF_extra_info) if extras != 0 else i64(0)
    if frame["csum"] == CSUM_BLANK:
        first |= TXF_csum_blank | TXF_data_validated
    elif frame["csum"] == CSUM_VALID:
        first |= TXF_data_validated
    for k in range(pages):
        q["free_n"] -= 1
        page = i64(load32(q["free"] + q["free_n"] * 4))
        store8(q["in_flight"] + page, np.uint8(1))
        n = min(size - k * _PAGE, _PAGE)
        at = q["tx_pages"] + page * _PAGE
        if data != 0:
            copy_bytes(at, data + k * _PAGE, n)
        if q["untrusted"] != 0 and n < _PAGE:
            zero_bytes(at + n, _PAGE - n)
        flags = i64(TXF_more_data) if k + 1 < pages else i64(0)
        # The first says how large the packet is, the others what they have of it.
        put_tx(qa, i64(load32(q["grefs"] + page * 4)), flags | (first if k == 0 else 0), page, size if k == 0 else n)
        if k == 0 and frame["gso_size"] != 0:
            more = EXTRA_FLAG_MORE << 8 if extras > 1 else 0
            _put_extra(qa, EXTRA_GSO | more | frame["gso_size"] << 16 | frame["gso_type"] << 32)
        if k == 0 and frame["hash_type"] != 0:
            _put_extra(qa, hash_extra(frame["hash_type"] << 32 | (frame["hash"] & 0xFFFFFFFF)))
    q["sent"] += 1
    q["bytes_sent"] += size
    return i64(STARTED)


@kernel
def kick(qa: int) -> None:
    """Publish what was started, and wake the backend if it asked for it."""
    q = queue_at(qa)
    if push(q["tx_end"]):
        call(q["event_notify"], q["event_ctx"], q["tx_port"], 0, 0)


@kernel
def reap(qa: int) -> int:
    """Take back the pages of packets that were sent: how many slots were answered, or -1 for a violation."""
    q = queue_at(qa)
    if q["violation"] != V_NONE:
        return i64(-1)
    n = available(q["tx_end"])
    if n == CORRUPT:
        return i64(_violated(qa, V_OVERFLOW, 0))
    cons = records(q["tx_end"], 1, RING_END)[0]["cons"]
    for k in range(n):
        copy_in(q["tx_message"], slot(q["tx_end"], cons + k), 4)
        response = records(q["tx_message"], 1, TX_RESPONSE)[0]
        status, page = i64(response["status"]), i64(response["id"])
        if status == RSP_NULL:
            continue
        if page >= SLOTS or load8(q["in_flight"] + page) == 0:
            return i64(_violated(qa, V_ID, page))
        store8(q["in_flight"] + page, np.uint8(0))
        store32(q["free"] + q["free_n"] * 4, np.uint32(page))
        q["free_n"] += 1
        if page == q["amended"]:
            q["amended"], q["answer"] = -1, status
        elif status != RSP_OKAY:
            q["tx_errors"] += 1
    advance(q["tx_end"], n)
    return i64(n)


@kernel
def send_all(qa: int, data: int, fa: int, count: int) -> int:
    """Send `count` packets, BUFFER bytes apart, each with its FRAME: how many were sent, in order. The next one has no
    room, or is too big; -1 for a violation."""
    if reap(qa) < 0:
        return i64(-1)
    sent = i64(0)
    while sent < count and start(qa, data + sent * BUFFER, fa + sent * _FRAME_SIZE) == STARTED:
        sent += 1
    if sent > 0:
        kick(qa)
    return sent


@inline
def _post(qa: int, page: int) -> None:
    """Let the backend have a page of the rx ring. Its id is the slot that it stands in, as everybody expects."""
    q = queue_at(qa)
    prod = records(q["rx_end"], 1, RING_END)[0]["prod_pvt"]
    gref = i64(load32(q["grefs"] + (SLOTS + page) * 4))
    store64(slot(q["rx_end"], prod), page | gref << 32)
    advance_prod(q["rx_end"], 1)


@kernel
def post_all(qa: int) -> None:
    """All pages of a fresh rx ring."""
    q = queue_at(qa)
    for page in range(SLOTS):
        if q["untrusted"] != 0:
            zero_bytes(q["rx_pages"] + page * _PAGE, _PAGE)
        _post(qa, page)
    if push(q["rx_end"]):
        call(q["event_notify"], q["event_ctx"], q["rx_port"], 0, 0)


@inline
def _rx_slot(qa: int, k: int) -> int:
    """The k-th response that waits, copied: its address."""
    q = queue_at(qa)
    cons = records(q["rx_end"], 1, RING_END)[0]["cons"]
    copy_in(q["message"], slot(q["rx_end"], cons + k), RX_ENTRY_SIZE)
    return q["message"]


@kernel
def _take_extras(qa: int, fa: int, k: int, n: int) -> int:
    """The extras from response k on; the first response behind them, -1 for a violation."""
    q = queue_at(qa)
    more = True
    while more:
        if k == n:
            return i64(_violated(qa, V_EXTRA, 0))
        extra = records(_rx_slot(qa, k), 1, GSO)[0]
        kind = i64(extra["type"])
        if kind == EXTRA_NONE or kind > EXTRA_XDP:
            return i64(_violated(qa, V_EXTRA, kind))
        if kind == EXTRA_GSO:
            frame_at(fa)["gso_size"], frame_at(fa)["gso_type"] = i64(extra["size"]), i64(extra["gso_type"])
        elif kind == EXTRA_XDP:
            q["headroom"] = i64(records(q["message"], 1, XDP)[0]["headroom"])
        elif kind == EXTRA_HASH:
            known = known_hash(load64(q["message"]))  # the copy
            frame_at(fa)["hash_type"], frame_at(fa)["hash"] = known >> 32, known & 0xFFFFFFFF
        more = i64(extra["flags"]) & EXTRA_FLAG_MORE != 0
        k += 1
    return k


@kernel
def _take_packet(qa: int, data: int, fa: int, n: int) -> int:
    """The packet that begins with the first of n >= 1 responses: how many are of it, -1 for a violation."""
    q = queue_at(qa)
    frame = frame_at(fa)
    frame["size"], frame["csum"], frame["gso_size"], frame["gso_type"] = 0, CSUM_NONE, 0, 0
    frame["hash_type"], frame["hash"], q["headroom"] = 0, 0, 0
    cons = records(q["rx_end"], 1, RING_END)[0]["cons"]
    k = i64(0)
    bad = False
    more = True
    while more:
        if k == n:
            return i64(_violated(qa, V_CHAIN, BUFFER))
        response = records(_rx_slot(qa, k), 1, RX_RESPONSE)[0]
        flags, status, offset = i64(response["flags"]), i64(response["status"]), i64(response["offset"])
        more = flags & RXF_more_data != 0
        page = (cons + k) & (SLOTS - 1)  # not what the response says: its place says which page it was
        first = k == 0
        k += 1
        if first:
            if flags & RXF_csum_blank != 0:
                frame["csum"] = CSUM_BLANK
            elif flags & RXF_data_validated != 0:
                frame["csum"] = CSUM_VALID
            if flags & RXF_extra_info != 0:
                k = i64(_take_extras(qa, fa, k, n))
                if k < 0:
                    return i64(-1)
        # With headroom each response counts it as bytes of its own, and has offset 0 (Linux, xenvif_rx_data_slot).
        size = status - q["headroom"]
        if status < 0:
            bad = True
        elif offset + status > _PAGE or size < 0:
            return i64(_violated(qa, V_RANGE, offset + status))
        elif frame["size"] + size > BUFFER:
            return i64(_violated(qa, V_CHAIN, BUFFER))
        else:
            copy_bytes(data + frame["size"], q["rx_pages"] + page * _PAGE + offset + q["headroom"], size)
            frame["size"] += size
    if bad:
        frame["size"] = 0
        q["rx_errors"] += 1
    return k


@kernel
def receive_all(qa: int, data: int, fa: int, count: int) -> int:
    """Take up to `count` packets, to BUFFER bytes each; how many, or -1 for a violation. Their pages go back."""
    q = queue_at(qa)
    if q["violation"] != V_NONE:
        return i64(-1)
    n = available(q["rx_end"])
    if n == CORRUPT:
        return i64(_violated(qa, V_OVERFLOW, 0))
    got = i64(0)
    while got < count and n > 0:
        fa_now = fa + got * _FRAME_SIZE
        took = _take_packet(qa, data + got * BUFFER, fa_now, n)
        if took < 0:
            return i64(-1)
        cons = records(q["rx_end"], 1, RING_END)[0]["cons"]
        advance(q["rx_end"], took)
        for k in range(took):
            _post(qa, (cons + k) & (SLOTS - 1))
        n -= took
        if frame_at(fa_now)["size"] > 0:
            q["received"] += 1
            q["bytes_received"] += frame_at(fa_now)["size"]
            got += 1
    # Whether or not the last of them was good: the backend wants its pages.
    if push(q["rx_end"]):
        call(q["event_notify"], q["event_ctx"], q["rx_port"], 0, 0)
    return got


@kernel
def arm(qa: int, what: int) -> int:
    """Before sleeping: ask to be woken by the next packet (RX), the next answer (TX). Above 0 if one is there after
    all, -1 for a violation."""
    q = queue_at(qa)
    n = final_check(q["rx_end"]) if what & RX != 0 else 0
    m = final_check(q["tx_end"]) if what & TX != 0 else 0
    if n == CORRUPT or m == CORRUPT:
        return i64(_violated(qa, V_OVERFLOW, 0))
    return i64(n + m)


@kernel
def wait(qa: int, timeout_ms: int) -> int:
    """Sleep until the backend or wake_fd wakes us; how many did, or -errno (-EINTR: back to Python)."""
    q = queue_at(qa)
    if load_acquire64(qa) != 0:  # QUEUE.stop, the first field
        return i64(0)
    n = epoll_wait(q["epoll"], q["epoll_events"], 4, timeout_ms)
    if n <= 0:
        return i64(n)
    for i in range(n):
        event = records(q["epoll_events"] + i * _EPOLL_EVENT_SIZE, 1, EPOLL_EVENT)[0]
        if i64(event["data"] & 0xFFFFFFFF) == q["wake_fd"]:
            eventfd_take(q["wake_fd"])
    for i in range(2):
        call(q["event_deliver"], q["event_ctx"], q["tokens"][i], 0, 0)
    # Delivery masks a port, so a backend that keeps ringing cannot keep us in this loop (XSA-391).
    while call(q["event_next"], q["event_ctx"], 0, 0, 0) >= 0:
        q["wakeups"] += 1
    call(q["event_unmask"], q["event_ctx"], q["tx_port"], 0, 0)
    if q["rx_port"] != q["tx_port"]:
        call(q["event_unmask"], q["event_ctx"], q["rx_port"], 0, 0)
    return i64(n)


ARGUMENTS = {
    "send_all": "(int64, int64, int64, int64)",
    "receive_all": "(int64, int64, int64, int64)",
    "post_all": "(int64,)",
    "reap": "(int64,)",
    "arm": "(int64, int64)",
    "wait": "(int64, int64)",
}
"""What Python calls, and with what, for warm()."""

assert TX_ENTRY_SIZE == 12

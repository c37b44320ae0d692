"""The packet generator's loop: senders and receivers on the rings of any number of vifs, in one kernel on one core.

What DPDK's testpmd does in its mode flowgen: headers are written into buffers that are granted already, and what comes
is taken off the ring and its buffer given back. The buffers are the load's own, as many as the working set that was
asked for, and are used one after the other; so a packet is written by the guest as far as its headers, and copied by
the switch alone. Of what is received nothing is read but a stamp now and then, or all headers, or every byte (LOOK_*).
"""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import clock_monotonic, epoll_wait
from pvdrivers.worker.histogram import bucket_of
from rings.atomics import (
    call,
    copy_bytes,
    i64,
    load32,
    load64,
    load_acquire64,
    pause,
    prefetch,
    records,
    store16,
    store32,
    store64,
)
from rings.jit import inline, kernel
from rings.netif import (
    EXTRA_FLAG_MORE,
    EXTRA_GSO,
    RXF_extra_info,
    RXF_more_data,
    TXF_csum_blank,
    TXF_data_validated,
    TXF_extra_info,
    TXF_more_data,
)
from rings.ring import CORRUPT, RING_END, advance, advance_prod, available, push, room, slot, unanswered

from .net_load_records import (
    FLOW,
    LOOK_ALL,
    LOOK_SAMPLE,
    PAGE_STEP,
    RECEIVER,
    SENDER,
    STAMPS,
    flow_at,
    load_at,
    receiver_at,
    sender_at,
)
from .netfront_kernels import arm, queue_at, wait
from .netfront_records import RX, SLOTS, TX

# What run() says.
SLICE = 1
DRAINED = 0
VIOLATED = -1

_PAGE = 4096
_BATCH = 32
_LOST_NS = 20_000_000
_SLEEP_MS = 2
_MOST_PAGES = 1 << 24
_FLOW_SIZE, _SENDER_SIZE, _RECEIVER_SIZE = FLOW.itemsize, SENDER.itemsize, RECEIVER.itemsize
_I8 = np.dtype(np.int64)


@kernel
def fill(pages: int, count: int) -> None:
    """What stands in pages that are sent."""
    for p in range(count):
        for w in range(_PAGE // 8):
            store64(pages + p * _PAGE + w * 8, p * PAGE_STEP + w)


@kernel
def word_sum(at: int, count: int) -> int:
    """Sum of `count` words."""
    words = records(at, count, _I8)
    total = i64(0)
    for w in range(count):
        total += words[w]
    return total


@kernel
def expected_sum(first: int, size: int, skip: int) -> int:
    """What word_sum() gives of all whole words of a packet behind its first `skip` bytes, a multiple of 8 in its first
    page, which is page `first`."""
    total = i64(0)
    page = i64(first)
    start = i64(skip // 8)
    left = size // 8
    while left > 0:
        n = min(left, _PAGE // 8)
        if n > start:
            total += (n - start) * page * PAGE_STEP + (start + n - 1) * (n - start) // 2
        left -= n
        start = i64(0)
        page += 1
    return total


@inline
def _take_answers(sa: int) -> int:
    """Responses on the tx ring: how many, -1 for a violation."""
    sender = sender_at(sa)
    end = queue_at(sender["queue"])["tx_end"]
    n = available(end)
    if n == CORRUPT:
        return i64(-1)
    cons = records(end, 1, RING_END)[0]["cons"]
    for k in range(n):
        status = i64(load32(slot(end, cons + k))) >> 16 & 0xFFFF
        if status > 1:  # neither OKAY nor NULL, which is the answer to an extra
            sender["errors"] += 1
    advance(end, n)
    sender["answered"] += n
    return n


@inline
def _put(end: int, gref: int, flags: int, size: int) -> None:
    prod = records(end, 1, RING_END)[0]["prod_pvt"]
    at = slot(end, prod)
    store32(at, np.uint32(gref))
    store32(at + 4, np.uint32(flags << 16))
    store32(at + 8, np.uint32((prod & (SLOTS - 1)) | size << 16))
    advance_prod(end, 1)


@inline
def _stamp(sa: int, at: int, now: int) -> None:
    """Headers, number, time, and the page: what a guest's stack writes into each packet."""
    sender = sender_at(sa)
    copy_bytes(at, sender["template"], sender["head"])
    store16(at + 34, np.uint16(sender["number"] % sender["streams"] + 1024))  # the source port, in whatever order
    left = sender["size"] - sender["head"]
    at += sender["head"]
    if left >= 8:
        store64(at, sender["number"])
    if left >= 16:
        store64(at + 8, now)
    if left >= STAMPS:
        store64(at + 16, sender["next"])


@kernel
def _send(sa: int, now: int) -> int:
    """Put as many packets as there is room for, and publish them: how many."""
    sender = sender_at(sa)
    flow = flow_at(sender["flow"])
    q = queue_at(sender["queue"])
    end = q["tx_end"]
    size = sender["size"]
    pages = (size + _PAGE - 1) // _PAGE
    extra = 1 if sender["gso_size"] != 0 else 0
    first = i64(TXF_extra_info | TXF_csum_blank | TXF_data_validated) if extra != 0 else i64(0)
    n = i64(0)
    while n < _BATCH and room(end) >= pages + extra:
        if flow["limit"] != 0 and flow["on_way"] + pages + extra > flow["limit"]:
            break
        if sender["next"] + pages > sender["n_pages"]:
            sender["next"] = 0  # a packet's pages lie in a row, and a page has headers always or never
        _stamp(sa, sender["pages"] + sender["next"] * _PAGE, now)
        for k in range(pages):
            gref = -i64(load64(sender["grefs"] + sender["next"] * 8))
            sender["next"] += 1
            more = i64(TXF_more_data) if k + 1 < pages else i64(0)
            _put(end, gref, (first if k == 0 else 0) | more, size if k == 0 else min(size - k * _PAGE, _PAGE))
            if k == 0 and extra != 0:
                at = slot(end, records(end, 1, RING_END)[0]["prod_pvt"])
                store64(at, EXTRA_GSO | sender["gso_size"] << 16 | sender["gso_type"] << 32)
                advance_prod(end, 1)
        sender["number"] += 1
        if flow["on_way"] == 0:
            flow["busy_at"] = now
        flow["on_way"] += pages + extra
        n += 1
    flow["sent"] += n
    if n > 0 and push(end):
        call(q["event_notify"], q["event_ctx"], q["tx_port"], 0, 0)
    return n


@inline
def _fetch(page: int) -> None:
    """Have the beginning of a page brought here, while the one before it is read: from there on the processor sees by
    itself what is wanted."""
    for line in range(16):
        prefetch(page + line * 64)


@inline
def _give_page(ra: int, index: int) -> None:
    """The next page of the load goes into a slot of the rx ring."""
    receiver = receiver_at(ra)
    end = queue_at(receiver["queue"])["rx_end"]
    page = receiver["next"]
    receiver["next"] = page + 1 if page + 1 < receiver["n_pages"] else 0
    store64(receiver["at"] + index * 8, receiver["pages"] + page * _PAGE)
    gref = -i64(load64(receiver["grefs"] + page * 8))
    store64(slot(end, records(end, 1, RING_END)[0]["prod_pvt"]), index | gref << 32)
    advance_prod(end, 1)


@kernel
def _look_at(la: int, ra: int, at: int, size: int, now: int) -> None:
    """A packet's stamp."""
    if size >= receiver_at(ra)["head"] + 16:
        taken = now - i64(load64(at + receiver_at(ra)["head"] + 8))
        if taken >= 0:
            bucket = load_at(la)["hist"] + bucket_of(taken) * 8
            store64(bucket, i64(load64(bucket)) + 1)


@kernel
def _check(ra: int, at: int, size: int) -> None:
    """All of a packet has been summed: is that what was sent?"""
    receiver = receiver_at(ra)
    skip = (receiver["head"] + STAMPS + 7) & ~7
    if size <= skip:
        return
    first = i64(load64(at + receiver["head"] + 16))
    if first < 0 or first > _MOST_PAGES or receiver["sum"] != expected_sum(first, size, skip):
        receiver["wrong"] += 1


@kernel
def _receive(la: int, ra: int, now: int) -> int:
    """Take what has come, and give pages for it: how many packets, -1 for a violation."""
    receiver = receiver_at(ra)
    flow = flow_at(receiver["flow"])
    q = queue_at(receiver["queue"])
    end = q["rx_end"]
    n = available(end)
    if n == CORRUPT:
        return i64(-1)
    if n == 0:
        return i64(0)
    look = receiver["look"]
    cons = i64(records(end, 1, RING_END)[0]["cons"])
    head = i64(0)  # address of the packet's first page
    size = i64(0)
    packets = i64(0)
    nbytes = i64(0)
    extras = False
    more = False
    for k in range(n):
        index = (cons + k) & (SLOTS - 1)
        response = i64(load64(slot(end, cons + k)))  # one load: a copy
        page = i64(load64(receiver["at"] + index * 8))
        _give_page(ra, index)
        if extras:
            extras = response >> 8 & EXTRA_FLAG_MORE != 0
        else:
            flags, status = response >> 32 & 0xFFFF, response >> 48
            more = flags & RXF_more_data != 0
            if head == 0:
                head, size, receiver["sum"] = page, 0, 0
            extras = flags & RXF_extra_info != 0
            if status < 0 or status > _PAGE:
                receiver["errors"] += 1
                status = i64(0)
            if look == LOOK_ALL:
                if k + 1 < n:
                    _fetch(i64(load64(receiver["at"] + (cons + k + 1 & (SLOTS - 1)) * 8)))
                skip = (receiver["head"] + STAMPS + 7) & ~7 if page == head else 0
                if status > skip:
                    receiver["sum"] += word_sum(page + skip, (status - skip) // 8)
            size += status
        if more or extras:
            continue
        if look != LOOK_SAMPLE or packets == 0:
            _look_at(la, ra, head, size, now)
        if look == LOOK_ALL:
            _check(ra, head, size)
        packets += 1
        nbytes += size
        head = i64(0)
    advance(end, n)
    flow["on_way"] -= n
    flow["received"] += packets
    flow["received_bytes"] += nbytes
    flow["busy_at"] = now
    if push(end):
        call(q["event_notify"], q["event_ctx"], q["rx_port"], 0, 0)
    return packets


@kernel
def _all_answered(la: int, flow: int) -> bool:
    """Whether all that was sent has been answered: by one flow, or by any (0)."""
    load = load_at(la)
    for i in range(load["n_senders"]):
        sender = sender_at(load["senders"] + i * _SENDER_SIZE)
        if (flow == 0 or sender["flow"] == flow) and unanswered(queue_at(sender["queue"])["tx_end"]) != 0:
            return False
    return True


@kernel
def _give_up(la: int, now: int) -> None:
    """Of flows by which nothing has come for a while, and of which all has been answered: what is still on its way is
    lost. Others go on meanwhile, and would else have this one stand still."""
    load = load_at(la)
    load["looked_at"] = now
    for i in range(load["n_flows"]):
        flow = flow_at(load["flows"] + i * _FLOW_SIZE)
        if flow["limit"] == 0 or flow["on_way"] <= 0 or now - flow["busy_at"] < _LOST_NS:
            continue
        if _all_answered(la, load["flows"] + i * _FLOW_SIZE):
            flow["lost"] += flow["on_way"]
            flow["on_way"] = 0


@kernel
def _sleep(la: int) -> int:
    """Until a packet or an answer comes, or 2 ms are over; below 0: a signal, or a violation."""
    load = load_at(la)
    there = i64(0)
    for i in range(load["n_senders"]):
        n = arm(sender_at(load["senders"] + i * _SENDER_SIZE)["queue"], i64(TX))
        if n < 0:
            return i64(-2)
        there += n
    for i in range(load["n_receivers"]):
        n = arm(receiver_at(load["receivers"] + i * _RECEIVER_SIZE)["queue"], i64(RX))
        if n < 0:
            return i64(-2)
        there += n
    if there > 0:
        return i64(0)
    load["sleeps"] += 1
    if epoll_wait(load["epoll"], load["epoll_events"], 4, _SLEEP_MS) < 0:
        return i64(-1)
    for i in range(load["n_senders"]):
        wait(sender_at(load["senders"] + i * _SENDER_SIZE)["queue"], i64(0))
    for i in range(load["n_receivers"]):
        wait(receiver_at(load["receivers"] + i * _RECEIVER_SIZE)["queue"], i64(0))
    return i64(0)


@kernel
def run(la: int, until: int) -> int:
    """Work until CLOCK_MONOTONIC is `until` ns, or a drained load has all its answers: SLICE, DRAINED or VIOLATED."""
    load = load_at(la)
    idle = i64(0)
    while True:
        now = clock_monotonic()
        if now >= until:
            return SLICE
        draining = load_acquire64(la) != 0  # LOAD.drain, the first field
        if now - load["looked_at"] > _LOST_NS:
            _give_up(la, now)
        done = i64(0)
        for i in range(load["n_senders"]):
            sa = load["senders"] + i * _SENDER_SIZE
            n = _take_answers(sa)
            if n < 0:
                return VIOLATED
            done += n
            if not draining:
                done += _send(sa, now)
        for i in range(load["n_receivers"]):
            n = _receive(la, load["receivers"] + i * _RECEIVER_SIZE, clock_monotonic())
            if n < 0:
                return VIOLATED
            done += n
        if done != 0:
            idle = i64(0)
            load["busy_at"] = now
            continue
        if draining and now - load["busy_at"] > _LOST_NS and _all_answered(la, i64(0)):
            return DRAINED
        if idle < load["spin"]:
            idle += 1
            pause()
            continue
        idle = i64(0)
        n = _sleep(la)
        if n == -1:
            return SLICE  # a signal: Python's handlers run
        if n < 0:
            return VIOLATED


ARGUMENTS = {
    "run": "(int64, int64)",
    "fill": "(int64, int64)",
}
"""What Python calls, and with what, for warm()."""

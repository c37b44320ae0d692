"""A packet into the receiving guest's pages: one copy, from page to page, in batches.

A packet takes slots of the receiver's rx ring in order, one for each 4096 bytes and one for what is said of its
segments, and each is answered in its own place (Linux's netfront does not look at the id). The first bytes come from
our private copy, so that what the receiver gets is what the switch has looked at (XSA-155); the others are copied from
the sender's granted page straight into the receiver's, and neither is ever mapped.

Who has no room on its ring has the packet wait, as a private copy in bounded memory of that ring (see `waiting` and
`drain`), and loses what finds no room there. The sender is answered whatever becomes of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import OP_BETWEEN, OP_TO_GUEST
from pvdrivers.worker.batch import OP_SIZE, op_at, seam_of
from pvdrivers.worker.marks import mark_dead, mark_due, mark_ready, ring_at, stats_at, worker_at
from pvdrivers.worker.records import RING_ACTIVE, V_OVERFLOW
from rings.atomics import call, copy_in, i64, load16, records, store64
from rings.jit import inline, kernel
from rings.netif import (
    EXTRA_GSO,
    RSP_ERROR,
    RX_ENTRY_SIZE,
    RX_REQUEST,
    RXF_csum_blank,
    RXF_data_validated,
    RXF_extra_info,
    RXF_more_data,
    put_rx_response,
)
from rings.ring import CORRUPT, RING_END, available, slot

from .limit import charge, is_free
from .records import (
    ACCEPTS_CSUM4,
    ACCEPTS_CSUM6,
    ACCEPTS_SG,
    CSUM_BLANK,
    CSUM_NONE,
    MAX_DELIVERIES,
    MAX_SLOTS,
    MOST_BYTES,
    N_DROPPED,
    N_FAILED,
    N_RECEIVED,
    N_UNSUPPORTED,
    delivery_at,
    fragment_at,
    packet_at,
    port_at,
    switch_at,
)
from .waiting import keep, rx_queue_at

_I8 = np.dtype(np.int64)
_PAGE = 4096
MOST_COPIES = MAX_SLOTS + MOST_BYTES // _PAGE + 1
"""Of a packet: a new one begins with each fragment, with each page, and where the private bytes end."""


@kernel
def _sender_lacks(wa: int, swa: int, k: int) -> bool:
    """Whether it is the sender's page that copy k of the batch could not have: asked for one byte of it."""
    op = op_at(worker_at(wa)["ops"], k)
    if i64(op["flags"]) & OP_BETWEEN == 0:
        return False
    other = op["address"]
    probe = op_at(switch_at(swa)["scratch"], 0)
    probe["address"], probe["flags"], probe["length"] = switch_at(swa)["scratch"] + OP_SIZE, 0, 1
    probe["gref"], probe["domid"], probe["offset"] = other & 0xFFFFFFFF, other >> 48 & 0xFFFF, other >> 32 & 0xFFFF
    seam = seam_of(wa)
    call(seam["grant_copy"], seam["grant_ctx"], switch_at(swa)["scratch"], 1, 0)
    return probe["status"] != 0


@kernel
def _undo(swa: int, d: int) -> None:
    """A page was missing: the slots of that packet say so, each for itself."""
    delivery = delivery_at(swa, d)
    end = ring_at(delivery["ring"])["end"]
    for k in range(delivery["slots"]):
        at = slot(end, delivery["first"] + k)
        put_rx_response(at, i64(load16(at)), 0, 0, RSP_ERROR)  # an id that is the guest's own, for itself


@kernel
def flush(wa: int, swa: int) -> None:
    """Make the copies of the batch; packets that lack a page are answered as errors, to him who has not granted it."""
    w = worker_at(wa)
    sw = switch_at(swa)
    n = sw["n_ops"]
    sw["n_ops"], sw["cut_at"] = 0, 0
    if n == 0:
        return
    seam = seam_of(wa)
    failed = call(seam["grant_copy"], seam["grant_ctx"], w["ops"], n, 0)
    if failed == 0:
        return
    owners = records(w["owners"], n, _I8)
    for k in range(n):
        if op_at(w["ops"], k)["status"] == 0:
            continue
        delivery = delivery_at(swa, owners[k])
        if delivery["kept"] != 0:  # it waits, and its sender has not all of it
            packet_at(delivery["kept"])["status"] = RSP_ERROR
            packet_at(delivery["packet"])["status"] = RSP_ERROR
            continue
        if delivery["slots"] == 0:
            continue  # told already
        stats = stats_at(ring_at(delivery["ring"])["stats"])
        _undo(swa, owners[k])
        delivery["slots"] = 0
        stats["kinds"][N_RECEIVED] -= 1
        stats["kinds"][N_FAILED] += 1
        if _sender_lacks(wa, swa, k):
            packet_at(delivery["packet"])["status"] = RSP_ERROR


@kernel
def begin(swa: int) -> None:
    """A new pass: nothing is on its way."""
    sw = switch_at(swa)
    sw["n_ops"], sw["n_deliveries"], sw["cut_at"] = 0, 0, 0


@inline
def _open_page(swa: int, ra: int, nbytes: int, flags: int) -> None:
    """Take the next slot of the receiver, and answer it: `nbytes` will be in its page."""
    end = ring_at(ra)["end"]
    e = records(end, 1, RING_END)[0]
    sw = switch_at(swa)
    at = slot(end, e["cons"])
    copy_in(sw["scratch"], at, RX_ENTRY_SIZE)
    request = records(sw["scratch"], 1, RX_REQUEST)[0]
    sw["page"], sw["page_at"] = i64(request["gref"]), 0
    put_rx_response(at, i64(request["id"]), 0, flags, nbytes)
    e["cons"] = (e["cons"] + 1) & 0xFFFFFFFF
    e["prod_pvt"] = e["cons"]


@inline
def _put_extra(swa: int, ra: int, pa: int) -> None:
    """A slot that says what the segments are; the page behind it stays as it is."""
    end = ring_at(ra)["end"]
    e = records(end, 1, RING_END)[0]
    packet = packet_at(pa)
    # struct netif_extra_info: type, flags, then size, and the type of the segments
    store64(slot(end, e["cons"]), EXTRA_GSO | packet["gso_size"] << 16 | packet["gso_type"] << 32)
    e["cons"] = (e["cons"] + 1) & 0xFFFFFFFF
    e["prod_pvt"] = e["cons"]


@inline
def _copy(wa: int, swa: int, ra: int, address: int, length: int, flags: int) -> None:
    """One copy more, to where the receiver's page is empty; what is on its way is owned by the last delivery."""
    w = worker_at(wa)
    sw = switch_at(swa)
    n = sw["n_ops"]
    op = op_at(w["ops"], n)
    op["address"], op["flags"] = address, OP_TO_GUEST | flags
    op["gref"], op["domid"], op["offset"], op["length"] = sw["page"], ring_at(ra)["domid"], sw["page_at"], length
    records(w["owners"], w["max_ops"], _I8)[n] = sw["n_deliveries"] - 1
    sw["n_ops"] = n + 1
    sw["page_at"] += length


@inline
def _flags(packet: Any, more: bool) -> int:
    flags = i64(RXF_more_data) if more else i64(0)
    if packet["csum"] != CSUM_NONE:
        flags |= RXF_data_validated
    if packet["csum"] == CSUM_BLANK:
        flags |= RXF_csum_blank
    if packet["gso_size"] != 0:
        flags |= RXF_extra_info
    return flags


@kernel
def _fill_pages(wa: int, swa: int, pa: int, ra: int) -> None:
    """The bytes of a packet, page by page: first those that are private, then what its fragments still have."""
    sw = switch_at(swa)
    packet = packet_at(pa)
    size, have = packet["size"], packet["have"]
    done = i64(0)
    fragment = i64(0)  # the one that byte `done` is in, and
    start = i64(0)  # ... where in the packet that begins
    while done < size:
        if done & (_PAGE - 1) == 0:
            left = min(size - done, _PAGE)
            more = done + left < size
            if done == 0:
                _open_page(swa, ra, left, _flags(packet, more))
                if packet["gso_size"] != 0:
                    _put_extra(swa, ra, pa)
            else:
                _open_page(swa, ra, left, RXF_more_data if more else 0)
        room = _PAGE - sw["page_at"]
        if done < have:
            n = min(have - done, room)
            _copy(wa, swa, ra, packet["data"] + done, n, 0)
        else:
            while start + i64(fragment_at(pa, fragment)["length"]) <= done:
                start += i64(fragment_at(pa, fragment)["length"])
                fragment += 1
            piece = fragment_at(pa, fragment)
            n = min(start + i64(piece["length"]) - done, room)
            offset = i64(piece["offset"]) + done - start
            _copy(wa, swa, ra, i64(piece["gref"]) | offset << 32 | packet["domid"] << 48, n, OP_BETWEEN)
        done += n


@inline
def _accepted(packet: Any, accepts: int) -> bool:
    """Whether a receiver takes packets of this kind."""
    if packet["size"] > _PAGE and accepts & ACCEPTS_SG == 0:
        return False
    if packet["gso_size"] != 0 and accepts & (8 << packet["gso_type"]) == 0:
        return False
    if packet["csum"] == CSUM_BLANK:
        return accepts & (ACCEPTS_CSUM6 if packet["l3"] == 6 else ACCEPTS_CSUM4) != 0
    return True


@inline
def slots_of(pa: int) -> int:
    """Slots that a packet takes of a receiver's ring."""
    packet = packet_at(pa)
    return (packet["size"] + _PAGE - 1) // _PAGE + (1 if packet["gso_size"] != 0 else 0)


@inline
def _new_delivery(wa: int, swa: int, pa: int, ra: int) -> Any:
    sw = switch_at(swa)
    # All copies of a packet are in one batch: when one fails all of its slots are there to be changed.
    if sw["n_deliveries"] == MAX_DELIVERIES or sw["n_ops"] + MOST_COPIES > worker_at(wa)["max_ops"]:
        flush(wa, swa)
        sw["n_deliveries"] = 0
    delivery = delivery_at(swa, sw["n_deliveries"])
    sw["n_deliveries"] += 1
    delivery["ring"], delivery["packet"], delivery["kept"] = ra, pa, 0
    return delivery


@kernel
def place(wa: int, swa: int, pa: int, ra: int, need: int) -> None:
    """Put a packet on a receiver's ring, which has `need` buffers for it."""
    ring = ring_at(ra)
    delivery = _new_delivery(wa, swa, pa, ra)
    delivery["slots"], delivery["first"] = need, records(ring["end"], 1, RING_END)[0]["cons"]
    _fill_pages(wa, swa, pa, ra)
    stats = stats_at(ring["stats"])
    stats["kinds"][N_RECEIVED] += 1
    stats["bytes_written"] += packet_at(pa)["size"]
    mark_due(wa, ra)


@kernel
def _have_wait(wa: int, swa: int, pa: int, ra: int) -> int:
    """Keep a packet until there are buffers for it, or credit: 0 if there is no room for it."""
    w = worker_at(wa)
    sw = switch_at(swa)
    ring = ring_at(ra)
    packet = packet_at(pa)
    kept = i64(keep(ring["priv"], pa, w["now"] + port_at(ring["device"])["drain_ns"]))
    if kept == 0:
        stats_at(ring["stats"])["kinds"][N_DROPPED] += 1
        return i64(0)
    if rx_queue_at(ring["priv"])["count"] == 1:
        mark_ready(wa, ra)  # to see to it that the wait ends
    if packet["have"] == packet["size"]:
        return i64(1)
    delivery = _new_delivery(wa, swa, pa, ra)
    delivery["slots"], delivery["kept"] = 0, kept
    start = i64(0)
    for f in range(packet["fragments"]):
        fragment = fragment_at(pa, f)
        length = i64(fragment["length"])
        skip = max(packet["have"] - start, 0)
        if skip < length:
            op = op_at(w["ops"], sw["n_ops"])
            op["address"], op["flags"] = packet_at(kept)["data"] + start + skip, 0
            op["gref"], op["domid"] = fragment["gref"], packet["domid"]
            op["offset"], op["length"] = i64(fragment["offset"]) + skip, length - skip
            records(w["owners"], w["max_ops"], _I8)[sw["n_ops"]] = sw["n_deliveries"] - 1
            sw["n_ops"] += 1
        start += length
    return i64(1)


@kernel
def to_guest(wa: int, swa: int, pa: int, porta: int) -> int:
    """Deliver a packet to the guest behind a port, by the queue that its flow belongs to, now or later.

    1 if so; 0 if it is lost, and the next one like it would be.
    """
    port = port_at(porta)
    packet = packet_at(pa)
    queues = port["n_out"]
    if queues == 0:
        return i64(0)
    ra = port["out"][packet["hash"] % queues]
    ring = ring_at(ra)
    if ring["state"] != RING_ACTIVE:
        return i64(0)
    stats = stats_at(ring["stats"])
    if not _accepted(packet, port["accepts"]):
        stats["kinds"][N_UNSUPPORTED] += 1
        return i64(0)
    need = i64(slots_of(pa))
    n = available(ring["end"])
    if n == CORRUPT:
        mark_dead(ra, V_OVERFLOW)
        return i64(0)
    if port["stalled"] != 0:
        stats["kinds"][N_DROPPED] += 1
        return i64(0)
    limit = port["to_guest"]
    q = rx_queue_at(ring["priv"])
    if n < need or q["count"] > 0 or not is_free(limit, worker_at(wa)["now"]):
        return i64(_have_wait(wa, swa, pa, ra))
    charge(limit, q["index"], packet["size"])
    place(wa, swa, pa, ra, need)
    return i64(1)

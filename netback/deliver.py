"""A packet into the receiving guest's pages: one copy, from page to page, in batches.

A packet takes slots of the receiver's rx ring in order, one for each page that it fills and one for each thing that is
said of it, and each is answered in its own place (Linux's netfront does not look at the id). The first bytes come from
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
from rings.atomics import call, copy_bytes, copy_in, i64, load16, load_once32, prefetch_to_write, records
from rings.jit import inline, kernel
from rings.netif import (
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
from rings.vnet import CSUM_BLANK, CSUM_NONE

from .answers import answer_at
from .captured import capture_received
from .extras import count_extras, put_extras
from .gather import gather
from .limit import may_pass
from .records import (
    ACCEPTS_CSUM4,
    ACCEPTS_CSUM6,
    ACCEPTS_SG,
    MAX_DELIVERIES,
    MAX_SLOTS,
    MOST_BYTES,
    MOST_HEADROOM,
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
from .staging import page_of
from .waiting import keep, rx_queue_at

_I8 = np.dtype(np.int64)
_PAGE = 4096
_AHEAD = 8
_GREF_AT: int = RX_REQUEST.fields["gref"][1]  # type: ignore[index]
MOST_COPIES = MAX_SLOTS + MOST_BYTES // (_PAGE - MOST_HEADROOM) + 1
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
    for k in range(delivery["slots"]):
        at = answer_at(delivery["ring"], delivery["first"] + k)
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
def _fetch_ahead(ra: int, headroom: int) -> None:
    """Have brought here what is to be written some slots from now: the page, where it is mapped, and the slots. Another
    core has used them, and stores that wait for that would hold up all that come after. A hint: what stands in a slot
    may be anything by now."""
    end = ring_at(ra)["end"]
    cons = records(end, 1, RING_END)[0]["cons"]
    prefetch_to_write(slot(end, cons + 2 * _AHEAD))
    gref = i64(load_once32(slot(end, cons + _AHEAD) + _GREF_AT))
    page = page_of(rx_queue_at(ring_at(ra)["priv"])["stage"], gref, 1)
    if page != 0:
        prefetch_to_write(page + headroom)


@inline
def _open_page(swa: int, ra: int, headroom: int, nbytes: int, flags: int) -> None:
    """Take the next slot of the receiver, and answer it: `nbytes` will be in its page, behind so much headroom.

    A response counts that as bytes of its own, from offset 0 on, and only the extra says what it is: as Linux has it
    (xenvif_rx_data_slot).
    """
    end = ring_at(ra)["end"]
    e = records(end, 1, RING_END)[0]
    sw = switch_at(swa)
    copy_in(sw["scratch"], slot(end, e["cons"]), RX_ENTRY_SIZE)
    request = records(sw["scratch"], 1, RX_REQUEST)[0]
    sw["page"], sw["page_at"] = i64(request["gref"]), headroom
    sw["page_in"] = page_of(rx_queue_at(ring_at(ra)["priv"])["stage"], sw["page"], 1)
    _fetch_ahead(ra, headroom)
    put_rx_response(answer_at(ra, e["cons"]), i64(request["id"]), 0, flags, headroom + nbytes)
    e["cons"] = (e["cons"] + 1) & 0xFFFFFFFF
    e["prod_pvt"] = e["cons"]


@inline
def _copy(wa: int, swa: int, ra: int, address: int, length: int, flags: int) -> None:
    """One copy more, to where the receiver's page is empty; what is on its way is owned by the last delivery.

    From memory of ours to a page that is mapped it is made at once.
    """
    w = worker_at(wa)
    sw = switch_at(swa)
    stats = stats_at(ring_at(ra)["stats"])
    if sw["page_in"] != 0 and flags & OP_BETWEEN == 0:
        copy_bytes(sw["page_in"] + sw["page_at"], address, length)
        sw["page_at"] += length
        stats["persistent_hits"] += 1
        return
    stats["grants_copied"] += 1
    n = sw["n_ops"]
    op = op_at(w["ops"], n)
    op["address"], op["flags"] = address, OP_TO_GUEST | flags
    op["gref"], op["domid"], op["offset"], op["length"] = sw["page"], ring_at(ra)["domid"], sw["page_at"], length
    records(w["owners"], w["max_ops"], _I8)[n] = sw["n_deliveries"] - 1
    sw["n_ops"] = n + 1
    sw["page_at"] += length


@inline
def _flags(packet: Any, more: bool, extras: int) -> int:
    flags = i64(RXF_more_data) if more else i64(0)
    if packet["csum"] != CSUM_NONE:
        flags |= RXF_data_validated
    if packet["csum"] == CSUM_BLANK:
        flags |= RXF_csum_blank
    if extras != 0:
        flags |= RXF_extra_info
    return flags


@kernel
def _fill_pages(wa: int, swa: int, pa: int, ra: int, headroom: int, extras: int) -> None:
    """The bytes of a packet, page by page: first those that are private, then what its fragments still have."""
    packet = packet_at(pa)
    size, have = packet["size"], packet["have"]
    done = i64(0)
    fragment = i64(0)  # the one that byte `done` is in, and
    start = i64(0)  # ... where in the packet that begins
    room = i64(0)  # in the page
    while done < size:
        if room == 0:
            left = min(size - done, _PAGE - headroom)
            more = done + left < size
            if done == 0:
                _open_page(swa, ra, headroom, left, _flags(packet, more, extras))
                if extras != 0:
                    put_extras(ra, pa, headroom)
            else:
                _open_page(swa, ra, headroom, left, RXF_more_data if more else 0)
            room = _PAGE - headroom
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
            # Only where both are mapped: Xen copies by grefs, or from pages that are our own.
            if piece["page"] != 0 and switch_at(swa)["page_in"] != 0:
                _copy(wa, swa, ra, piece["page"] + offset, n, 0)
            else:
                _copy(wa, swa, ra, i64(piece["gref"]) | offset << 32 | packet["domid"] << 48, n, OP_BETWEEN)
        done += n
        room -= n


@inline
def takes_blank(packet: Any, accepts: int) -> bool:
    """Whether a receiver takes a packet of this kind with a blank checksum."""
    return accepts & (ACCEPTS_CSUM6 if packet["l3"] == 6 else ACCEPTS_CSUM4) != 0


@inline
def accepted(packet: Any, accepts: int, pages: int) -> bool:
    """Whether a receiver takes packets of this kind, which would fill so many pages."""
    if pages > 1 and accepts & ACCEPTS_SG == 0:
        return False
    if packet["gso_size"] != 0 and accepts & (8 << packet["gso_type"]) == 0:
        return False
    return packet["csum"] != CSUM_BLANK or takes_blank(packet, accepts)


@inline
def pages_of(packet: Any, headroom: int) -> int:
    """Pages that a packet fills, of a receiver who wants so much free in each."""
    if headroom == 0:
        return (packet["size"] + _PAGE - 1) >> 12  # most have none, and a division takes as long as much of the rest
    return (packet["size"] + _PAGE - headroom - 1) // (_PAGE - headroom)


@inline
def slots_of(pa: int, headroom: int) -> int:
    """Slots that it takes of the receiver's ring."""
    return pages_of(packet_at(pa), headroom) + count_extras(pa, headroom)


@inline
def new_delivery(wa: int, swa: int, pa: int, ra: int) -> Any:
    """The next DELIVERY of the batch: `kept` and `slots` are for the caller. `ra` is 0 if it is kept, and no ring's."""
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
def place(wa: int, swa: int, pa: int, ra: int, headroom: int) -> None:
    """Put a packet on a receiver's ring, which has buffers for it: as many as slots_of() says."""
    ring = ring_at(ra)
    delivery = new_delivery(wa, swa, pa, ra)
    delivery["slots"], delivery["first"] = slots_of(pa, headroom), records(ring["end"], 1, RING_END)[0]["cons"]
    _fill_pages(wa, swa, pa, ra, headroom, i64(count_extras(pa, headroom)))
    stats = stats_at(ring["stats"])
    stats["kinds"][N_RECEIVED] += 1
    stats["bytes_written"] += packet_at(pa)["size"]
    if port_at(ring["device"])["capture"] != 0:
        capture_received(wa, ra, pa)
    mark_due(wa, ra)


@kernel
def _have_wait(wa: int, swa: int, pa: int, ra: int) -> int:
    """Keep a packet until there are buffers for it, or credit: 0 if there is no room for it."""
    ring = ring_at(ra)
    packet = packet_at(pa)
    kept = i64(keep(ring["priv"], pa, worker_at(wa)["now"] + port_at(ring["device"])["drain_ns"]))
    if kept == 0:
        stats_at(ring["stats"])["kinds"][N_DROPPED] += 1
        return i64(0)
    if rx_queue_at(ring["priv"])["count"] == 1:
        mark_ready(wa, ra)  # to see to it that the wait ends
    if packet["have"] == packet["size"]:
        return i64(1)
    gather_kept(wa, swa, pa, kept, ra, ring["stats"])
    return i64(1)


@kernel
def gather_kept(wa: int, swa: int, pa: int, kept: int, ra: int, stats: int) -> None:
    """Have the bytes of a packet that are not private put to where a copy of it is kept, by the batch. If one cannot be
    had, PACKET.status of both says so."""
    w, sw = worker_at(wa), switch_at(swa)
    delivery = new_delivery(wa, swa, pa, ra)
    delivery["slots"], delivery["kept"] = 0, kept
    first = sw["n_ops"]
    sw["n_ops"] = gather(wa, pa, packet_at(kept)["data"], packet_at(pa)["size"], first)
    stats_at(stats)["grants_copied"] += sw["n_ops"] - first
    owners = records(w["owners"], w["max_ops"], _I8)
    for k in range(first, sw["n_ops"]):
        owners[k] = sw["n_deliveries"] - 1


@kernel
def to_guest(wa: int, swa: int, pa: int, ra: int) -> int:
    """Deliver a packet to the guest behind an rx ring, which is this worker's, now or later.

    1 if so; 0 if it is lost, and the next one like it would be.
    """
    packet = packet_at(pa)
    ring = ring_at(ra)
    if ring["state"] != RING_ACTIVE:
        return i64(0)
    port = port_at(ring["device"])
    stats = stats_at(ring["stats"])
    headroom = port["headroom"]
    if not accepted(packet, port["accepts"], pages_of(packet, headroom)):
        stats["kinds"][N_UNSUPPORTED] += 1
        return i64(0)
    need = i64(slots_of(pa, headroom))
    n = available(ring["end"])
    if n == CORRUPT:
        mark_dead(ra, V_OVERFLOW)
        return i64(0)
    if port["stalled"] != 0:
        stats["kinds"][N_DROPPED] += 1
        return i64(0)
    limit = port["to_guest"]
    q = rx_queue_at(ring["priv"])
    if n < need or q["count"] > 0 or not may_pass(limit, q["index"], packet["size"], worker_at(wa)["now"]):
        return i64(_have_wait(wa, swa, pa, ra))
    # Buffers may still be lacking for one that has been given up; but as in Linux, who takes what comes is not stalled.
    q["lacking"] = q["since"] = 0
    place(wa, swa, pa, ra, headroom)
    return i64(1)

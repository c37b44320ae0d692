"""The worker's entries into the network backend, per ring and pass.

    step_tx    what the guest sends: take, plan, copy the first bytes, forward, respond
    step_rx    where the guest takes packets: nothing is taken from here, see `deliver`
    finish     either ring: push what this pass has answered, notify once

Nothing is in flight from one pass to the next: a packet is taken, copied and answered within a visit. So nothing but
the answers (see `answers`) has a journal; who comes after a process that died begins at rsp_prod, and what was not
answered is sent, perhaps again.
"""

from __future__ import annotations

from pvdrivers.worker.events import notify
from pvdrivers.worker.fair import note_taken
from pvdrivers.worker.journal import STEP_COMPLETED, STEP_NOTIFIED, STEP_PUSHED, checkpoint
from pvdrivers.worker.marks import mark_dead, mark_due, mark_ready, ring_at, stats_at, worker_at
from pvdrivers.worker.records import RING_DEAD, V_CLASS
from rings.atomics import copy_in, i64, prefetch, prefetch_to_write, records
from rings.frame import headers, l4_at
from rings.jit import inline, kernel, seam_function
from rings.netif import (
    RSP_NULL,
    RSP_OKAY,
    TX_ENTRY_SIZE,
    TX_REQUEST,
    TXF_csum_blank,
    TXF_data_validated,
    put_tx_response,
)
from rings.ring import RING_END, advance, advance_prod, push, slot
from rings.vnet import CSUM_BLANK, CSUM_NONE, CSUM_VALID

from .answers import answer_at, settle
from .captured import capture_sent
from .control_ring import do_job
from .cut import make_blank
from .drain import drain
from .forward import fetch, forward, packet_of
from .limit import charge, end_turn, has_credit, may_begin
from .multicast import BUSY, amend
from .records import (
    BATCH,
    HEAD,
    N_REFUSED,
    N_SENT,
    P_CONTROL,
    P_FATAL,
    P_SEND,
    fragment_at,
    packet_at,
    port_at,
    switch_at,
)
from .request import plan
from .serving import to_serve
from .staging import page_of
from .table import join
from .waiting import rx_queue_at

_IN_A_LINE = 64 // TX_ENTRY_SIZE


@inline
def _take(ra: int, slots: int, n: int) -> None:
    """Private copies of the next n requests, in a row: at most two pieces of the ring."""
    end = ring_at(ra)["end"]
    e = records(end, 1, RING_END)[0]
    first = min(n, e["nr_ents"] - (e["cons"] & (e["nr_ents"] - 1)))
    for k in range(0, min(first, BATCH), _IN_A_LINE):  # to be answered there; another core has them
        prefetch_to_write(slot(end, e["cons"] + k))
    copy_in(slots, slot(end, e["cons"]), first * TX_ENTRY_SIZE)
    if n > first:
        copy_in(slots + first * TX_ENTRY_SIZE, slot(end, e["cons"] + first), (n - first) * TX_ENTRY_SIZE)


@inline
def _prepare(pa: int, ra: int) -> None:
    """Behind `plan`: where its pages are, what of it is to be private, and what is known of its checksum."""
    packet = packet_at(pa)
    packet["domid"], packet["stage"] = ring_at(ra)["domid"], rx_queue_at(ring_at(ra)["priv"])["stage"]
    packet["have"], packet["want"] = 0, min(packet["size"], HEAD)
    packet["csum"] = CSUM_NONE
    if packet["flags"] & TXF_csum_blank != 0 or packet["gso_size"] != 0:
        packet["csum"] = CSUM_BLANK
    elif packet["flags"] & TXF_data_validated != 0:
        packet["csum"] = CSUM_VALID
    for f in range(packet["fragments"]):
        fragment = fragment_at(pa, f)
        fragment["page"] = page_of(packet["stage"], i64(fragment["gref"]), 0)
        if f == 0 and fragment["page"] != 0:  # for when all are there: the core that has written it is far away
            prefetch(fragment["page"] + i64(fragment["offset"]))


@kernel
def _make_blank(pa: int) -> None:
    """The checksum of segments (GSO) is blank, but who does not say so has anything there: as Linux's netback
    (checksum_setup)."""
    packet = packet_at(pa)
    if packet["verdict"] != P_SEND or packet["status"] != 0:
        return
    if packet["gso_size"] != 0 and packet["flags"] & TXF_csum_blank == 0:
        found = headers(packet["data"], packet["have"])
        if l4_at(found) != 0:
            make_blank(packet["data"], packet["size"], found)


@kernel
def _respond(ra: int, swa: int, pa: int) -> None:
    """One response a slot, in order: the packet's status, or that there was an extra."""
    packet = packet_at(pa)
    end = ring_at(ra)["end"]
    e = records(end, 1, RING_END)[0]
    stats = stats_at(ring_at(ra)["stats"])
    for k in range(packet["slots"]):
        extra = k > 0 and k <= packet["extras"]
        request = records(switch_at(swa)["slots"] + (packet["at"] + k) * TX_ENTRY_SIZE, 1, TX_REQUEST)[0]
        at = answer_at(ra, e["prod_pvt"])
        put_tx_response(at, i64(request["id"]), RSP_NULL if extra else packet["status"])
        advance_prod(end, 1)
    if packet["status"] == RSP_OKAY:
        stats["kinds"][N_SENT] += 1
        stats["bytes_read"] += packet["size"] if packet["verdict"] == P_SEND else 0
    else:
        stats["kinds"][N_REFUSED] += 1


@kernel
def _publish(wa: int, ra: int) -> None:
    """Put what is answered into the slots, push, and notify if the guest asked for it."""
    ring = ring_at(ra)
    e = records(ring["end"], 1, RING_END)[0]
    if e["prod_pvt"] == e["pushed"]:
        return
    prefetch_to_write(e["prod"])  # another core has it: the push, and the barrier in it, would wait for that
    settle(wa, ra)
    notifies = push(ring["end"])
    checkpoint(worker_at(wa), STEP_PUSHED)
    stats = stats_at(ring["stats"])
    if notifies:
        notify(wa, ra)
        stats["notify_sent"] += 1
    else:
        stats["notify_saved"] += 1
    checkpoint(worker_at(wa), STEP_NOTIFIED)


@seam_function
def step_tx(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step of a tx ring. 1 if more may be pending."""
    ring = ring_at(ra)
    porta = ring["device"]
    port = port_at(porta)
    if abandoned != 0:
        return 0
    n = i64(to_serve(ra))
    if n < 0:
        return 0
    q = rx_queue_at(ring["priv"])
    if q["lacking"] != 0:
        mark_ready(wa, q["rx"])  # where both have one event channel it may be about that one
    if n == 0:
        return 0
    if not may_begin(wa, port["from_guest"], q["index"], ra):
        ring["blocked"] = 1
        return 0
    swa = ring["local"]
    sw = switch_at(swa)
    _take(ra, sw["slots"], n)
    packets = i64(0)
    at = i64(0)
    fault = i64(0)
    bare = False
    while packets < min(budget, BATCH) and at < n and fault == 0 and has_credit(port["from_guest"]):
        pa = packet_of(swa, packets)
        packet = packet_at(pa)
        took = plan(pa, sw["slots"] + at * TX_ENTRY_SIZE, n - at)
        if packet["verdict"] == P_FATAL:
            fault = i64(packet["fault"])
            break
        if packet["verdict"] == P_CONTROL:
            packet["status"] = amend(porta, packet["mcast"], packet["mcast_addr"])
            if packet["status"] == BUSY:
                break
        elif packet["verdict"] == P_SEND:
            charge(port["from_guest"], q["index"], packet["size"])
        packet["at"] = at
        _prepare(pa, ra)
        if packet["gso_size"] != 0 and packet["flags"] & TXF_csum_blank == 0:
            bare = True
        if port["capture"] != 0:
            packet["want"] = packet["size"]
        at += took
        packets += 1
    end_turn(port["from_guest"], q["index"], 1 if at < n else 0)
    stats_at(ring["stats"])["grants_copied"] += fetch(wa, swa, packets)
    if port["capture"] != 0:
        for k in range(packets):
            capture_sent(wa, ra, packet_of(swa, k))
    if bare:
        for k in range(packets):
            _make_blank(packet_of(swa, k))
    forward(wa, swa, porta, packets, ring["stats"])
    for k in range(packets):
        _respond(ra, swa, packet_of(swa, k))
    checkpoint(worker_at(wa), STEP_COMPLETED)
    advance(ring["end"], at)
    note_taken(ra, packets)
    if fault != 0:
        _publish(wa, ra)  # what came before it is as good as any
        mark_dead(ra, V_CLASS + fault)
        return 0
    mark_due(wa, ra)
    return 1 if at < n else 0


@seam_function
def step_rx(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step of an rx ring: its requests are buffers, and stay until there is something for them. It is served when
    something waits for them."""
    ring = ring_at(ra)
    ring["blocked"] = 1
    porta = ring["device"]
    if abandoned == 0:
        join(ring["local"], porta, worker_at(wa)["now"])
        if rx_queue_at(ring["priv"])["stage"] != 0:
            do_job(wa, rx_queue_at(ring["priv"])["stage"], ring["domid"])
        if port_at(porta)["handed_over"] == 0:
            drain(wa, ring["local"], ra)
    return 0


@seam_function
def finish(wa: int, ra: int, _b: int, _c: int) -> int:
    """RING.finish: what this pass has answered is published at once."""
    if ring_at(ra)["state"] != RING_DEAD:
        _publish(wa, ra)
    return 0


assert P_SEND == 0

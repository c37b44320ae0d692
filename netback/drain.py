"""The rx ring of a guest that has had too few buffers: what waits for them, for how long, and when it is given up.

As Linux's netback (drivers/net/xen-netback/rx.c), and its rules after XSA-392:

    drain     what has waited for rx_drain_timeout_msecs is dropped: 10 s, or 30 ms for a guest that does not say when
              it posts a buffer (no feature-rx-notify)
    stall     where the next packet has lacked buffers for rx_stall_timeout_msecs, however many there are that do not
              do: 60 s, never without feature-rx-notify, and anew with each packet that is delivered. Then the vif
              has no carrier, and what is sent to it is dropped at once, until there are as many as were lacking.
"""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import eventfd_add
from pvdrivers.worker.alarm import wake_at
from pvdrivers.worker.marks import mark_dead, mark_ready, ring_at, stats_at, worker_at
from pvdrivers.worker.records import V_OVERFLOW
from rings.atomics import fetch_add64, full_barrier, i64, records, store_once32
from rings.jit import inline, kernel
from rings.ring import CORRUPT, RING_END, available

from .deliver import accepted, begin, flush, pages_of, place, slots_of
from .limit import charge, end_turn, has_credit, may_begin, wait_no_more
from .records import BATCH, N_EXPIRED, N_UNSUPPORTED, STALLED_AT, packet_at, port_at
from .waiting import first_of, following, let_go, rx_queue_at

POLL_NS = 1_000_000
"""How often buffers are looked for of a guest that does not say when it posts them."""


@kernel
def _give_up(ra: int, now: int) -> None:
    """Drop what has waited for too long."""
    qa = ring_at(ra)["priv"]
    q = rx_queue_at(qa)
    while q["count"] > 0 and packet_at(first_of(qa))["until"] <= now:
        let_go(qa)
        stats_at(ring_at(ra)["stats"])["kinds"][N_EXPIRED] += 1


@kernel
def _deliver(wa: int, swa: int, ra: int) -> int:
    """Deliver what waits, as far as there are buffers and credit; slots that the next packet lacks, 0 if none does."""
    ring = ring_at(ra)
    qa = ring["priv"]
    q = rx_queue_at(qa)
    port = port_at(ring["device"])
    la, headroom = port["to_guest"], port["headroom"]
    lacking = i64(0)
    done = i64(0)
    kept = first_of(qa)
    begin(swa)
    while done < min(q["count"], BATCH):
        packet = packet_at(kept)
        if packet["status"] == 0 and not accepted(packet, port["accepts"], pages_of(packet, headroom)):
            stats_at(ring["stats"])["kinds"][N_UNSUPPORTED] += 1  # by now: it wants more headroom than before
        elif packet["status"] == 0:  # or its sender had not all of it
            need = i64(slots_of(kept, headroom))
            n = available(ring["end"])
            if n == CORRUPT:
                mark_dead(ra, V_OVERFLOW)
                break
            if n < need:
                lacking = need
                break
            if not has_credit(la):
                break
            charge(la, q["index"], packet["size"])
            place(wa, swa, kept, ra, headroom)
        done += 1
        kept = following(qa, kept)
    flush(wa, swa)  # before their memory is somebody else's
    for _ in range(done):
        let_go(qa)
    if done > 0:
        q["since"] = 0
    return lacking


@inline
def _ask(ra: int, slots: int) -> bool:
    """Have the guest wake us when so many buffers are there. True if they are already."""
    end = ring_at(ra)["end"]
    e = records(end, 1, RING_END)[0]
    store_once32(e["peer_event"], np.uint32((e["cons"] + slots) & 0xFFFFFFFF))
    # The guest sees the event before we look once more; as rings.ring.final_check.
    full_barrier()
    return available(end) >= slots


@kernel
def _say_stalled(wa: int, ra: int, stalled: int) -> None:
    ring = ring_at(ra)
    ring["stalled"] = stalled
    # Rings of other workers may stall, too.
    fetch_add64(ring["device"] + STALLED_AT, 1 if stalled != 0 else -1)
    eventfd_add(worker_at(wa)["alert_fd"], 1)


@kernel
def _lacks(wa: int, ra: int) -> None:
    """So many buffers are lacking as RX_QUEUE.lacking says: wait for them, and for how long."""
    ring = ring_at(ra)
    qa = ring["priv"]
    q = rx_queue_at(qa)
    port = port_at(ring["device"])
    now = worker_at(wa)["now"]
    if _ask(ra, q["lacking"]):
        q["lacking"] = q["since"] = 0
        if ring["stalled"] != 0:
            _say_stalled(wa, ra, i64(0))
        mark_ready(wa, ra)
        return
    if q["since"] == 0:
        q["since"] = now
    if port["stall_ns"] != 0 and ring["stalled"] == 0:
        if now - q["since"] >= port["stall_ns"]:
            _say_stalled(wa, ra, i64(1))
        else:
            wake_at(wa, ra, q["since"] + port["stall_ns"])
    if ring["stalled"] != 0:
        _give_up(ra, i64(1) << 62)
    if q["count"] > 0:
        wake_at(wa, ra, packet_at(first_of(qa))["until"])
        if port["notifies"] == 0:
            wake_at(wa, ra, now + POLL_NS)


@kernel
def drain(wa: int, swa: int, ra: int) -> None:
    """A visit to an rx ring: deliver what waits, or see to it that there is another visit in time."""
    ring = ring_at(ra)
    qa = ring["priv"]
    q = rx_queue_at(qa)
    la = port_at(ring["device"])["to_guest"]
    if q["count"] > 0:
        _give_up(ra, worker_at(wa)["now"])
    if q["count"] == 0:
        wait_no_more(wa, la, q["index"], ra)
    else:
        q["lacking"] = 0
        if may_begin(wa, la, q["index"], ra):
            q["lacking"] = _deliver(wa, swa, ra)
            end_turn(la, q["index"], 1 if q["count"] > 0 and q["lacking"] == 0 else 0)
            if q["count"] > 0 and q["lacking"] == 0:
                mark_ready(wa, ra)  # for its next turn, or batch
        else:
            wake_at(wa, ra, packet_at(first_of(qa))["until"])
    if q["lacking"] != 0:
        _lacks(wa, ra)

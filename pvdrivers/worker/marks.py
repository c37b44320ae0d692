"""Small moves between the worker's lists. Intrusive lists of addresses: no allocation, no lock, no search."""

from __future__ import annotations

from typing import Any

from pvdrivers.syscalls import eventfd_add
from rings.atomics import i64, records, store_release64
from rings.jit import inline, kernel

from .records import REQ, RING, RING_ACTIVE, RING_DEAD, STATS, WORKER

_RING_STATE_AT = 0
_RING_SIZE = RING.itemsize


@inline
def worker_at(wa: int) -> Any:
    """The WORKER record at an address."""
    return records(wa, 1, WORKER)[0]


@inline
def ring_at(ra: int) -> Any:
    """The RING record at an address."""
    return records(ra, 1, RING)[0]


@inline
def req_at(qa: int) -> Any:
    """The REQ head of a request at an address."""
    return records(qa, 1, REQ)[0]


@inline
def stats_at(sa: int) -> Any:
    """The STATS record at an address."""
    return records(sa, 1, STATS)[0]


@inline
def ring_address(w: Any, index: int) -> int:
    """The address of ring `index` of a worker."""
    return w["rings"] + index * _RING_SIZE


@kernel
def mark_ready(wa: int, ra: int) -> None:
    """Something may be pending on this ring: it is served in this pass, after those that came before it."""
    w = worker_at(wa)
    ring = ring_at(ra)
    if ring["ready"] != 0 or ring["state"] != RING_ACTIVE:
        return
    ring["ready"] = 1
    ring["next_ready"] = 0
    if w["ready_tail"] != 0:
        ring_at(w["ready_tail"])["next_ready"] = ra
    else:
        w["ready_head"] = ra
    w["ready_tail"] = ra


@inline
def pop_ready(wa: int) -> int:
    """The ring that has waited longest, or 0."""
    w = worker_at(wa)
    ra = w["ready_head"]
    if ra != 0:
        ring = ring_at(ra)
        w["ready_head"] = ring["next_ready"]
        if w["ready_head"] == 0:
            w["ready_tail"] = 0
        ring["ready"] = 0
    return ra


@inline
def mark_active(wa: int, ra: int) -> None:
    """This ring's events are not armed: it has to be looked at before the worker may sleep."""
    ring = ring_at(ra)
    if ring["active"] == 0:
        w = worker_at(wa)
        ring["active"] = 1
        ring["next_active"] = w["active_head"]
        w["active_head"] = ra


@kernel
def mark_due(wa: int, ra: int) -> None:
    """This ring has something to finish: in this pass, once, whatever comes to it until then."""
    ring = ring_at(ra)
    if ring["due"] == 0:
        w = worker_at(wa)
        ring["due"] = 1
        ring["next_done"] = w["done_head"]
        w["done_head"] = ra


@kernel
def complete(qa: int, res: int) -> None:
    """The store gave a request back: bytes, or -errno. Its ring is finished in this pass."""
    req = req_at(qa)
    req["res"] = res
    req["next"] = 0
    ra = req["ring"]
    ring = ring_at(ra)
    if ring["done_tail"] != 0:
        req_at(ring["done_tail"])["next"] = qa
        ring["done_tail"] = qa
        return
    ring["done_head"] = qa
    ring["done_tail"] = qa
    mark_due(ring["worker"], ra)


@inline
def take_done(ra: int) -> int:
    """All requests of this ring that the store gave back: the first, linked by REQ.next; 0 if there are none."""
    ring = ring_at(ra)
    qa = ring["done_head"]
    ring["done_head"] = 0
    ring["done_tail"] = 0
    return qa


@kernel
def mark_limited(ra: int, status: int) -> None:
    """Xen had no room for a map, GNTST_*, or has some again, 0: the control thread hears of it, once a ring."""
    ring = ring_at(ra)
    if (ring["limit"] == 0) != (status == 0):
        ring["limit"] = status
        stats_at(ring["stats"])["copying"] = 0 if status == 0 else 1
        eventfd_add(worker_at(ring["worker"])["alert_fd"], 1)


@kernel
def mark_failed(ra: int, gntst: int, res: int, at: int, nbytes: int) -> None:
    """A request failed, by the store or by a page of the guest. The control thread hears of it at powers of two."""
    ring = ring_at(ra)
    ring["failures"] += 1
    if ring["failures"] & (ring["failures"] - 1) == 0:
        ring["failed_gntst"], ring["failed_res"] = gntst, res
        ring["failed_at"], ring["failed_bytes"] = at, nbytes
        eventfd_add(worker_at(ring["worker"])["alert_fd"], 1)


@kernel
def mark_dead(ra: int, violation: int) -> None:
    """The peer broke the protocol: nothing more is taken from this ring, and the control thread hears of it."""
    ring = ring_at(ra)
    if ring["state"] != RING_ACTIVE:
        return
    ring["violation"] = violation
    stats_at(ring["stats"])["violations"] += 1
    # Release: who sees the state sees the reason.
    store_release64(ra + _RING_STATE_AT, i64(RING_DEAD))
    eventfd_add(worker_at(ring["worker"])["alert_fd"], 1)


@kernel
def mark_lost(ra: int, error: int) -> None:
    """A descriptor of a class's own is no good any more, -errno, or is again, 0: the control thread hears of it."""
    ring = ring_at(ra)
    if ring["lost"] != error:
        ring["lost"] = error
        eventfd_add(worker_at(ring["worker"])["alert_fd"], 1)

"""A guest with one request in flight is not to wait behind another's hundred.

The budget of a visit is fair about the processor; it is not about a disk, where all that is in flight stands in one
line. So when a ring that asks for little is about, rings that ask for much are held to a few requests in flight
between them. Where all ask for much, or nobody else asks, nothing is held back and the disk runs as deep as it can.

A ring is *light* if it had something in flight lately and never more than LIGHT requests. Looked at once a window.
"""

from __future__ import annotations

from rings.atomics import i64
from rings.jit import inline, kernel

from .marks import ring_address, ring_at, worker_at
from .records import RING_ACTIVE

WINDOW_NS = 1_000_000
LIGHT = 2
NO_LIMIT = 1 << 30


@kernel
def _look(wa: int) -> None:
    """Who was light, who was heavy in the window that ends; the limit for the heavy ones in the next."""
    w = worker_at(wa)
    light = i64(0)
    heavy = i64(0)
    for i in range(w["top_ring"]):
        ring = ring_at(ring_address(w, i))
        if ring["state"] != RING_ACTIVE:
            continue
        if ring["peak"] > LIGHT:
            heavy += 1
        elif ring["peak"] > 0 or ring["last_peak"] > 0:
            light += 1
        # Two windows: between two requests of a light ring there may be one without any.
        ring["last_peak"] = ring["peak"]
        ring["peak"] = ring["inflight"]
    w["heavy_limit"] = max(LIGHT, w["fair_depth"] // heavy) if light > 0 and heavy > 0 else NO_LIMIT


@inline
def look_around(wa: int) -> None:
    """Once a pass; does something once a window, and only with more than one ring."""
    w = worker_at(wa)
    if w["fair_depth"] > 0 and w["now"] - w["window"] > WINDOW_NS:
        w["window"] = w["now"]
        _look(wa)


@inline
def allowance(wa: int, ra: int) -> int:
    """How many requests this ring may take now. With none, `finish` has it served again: some are in flight."""
    w = worker_at(wa)
    ring = ring_at(ra)
    left = w["heavy_limit"] - ring["inflight"]
    if left <= 0:
        ring["throttled"] = 1
        ring["blocked"] = 1
        return i64(0)
    return left


@inline
def note_taken(ra: int, n: int) -> None:
    """`n` requests were taken: remember the most that were in flight."""
    ring = ring_at(ra)
    worker_at(ring["worker"])["taken"] += n
    if ring["inflight"] > ring["peak"]:
        ring["peak"] = ring["inflight"]

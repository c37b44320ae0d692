"""What the requests of a worker share: blocks for many segments, and bounce pages. Who finds none stays on the ring."""

from __future__ import annotations

import numpy as np

from rings.atomics import i64, records
from rings.jit import inline, kernel

from .marks import mark_ready, ring_address, ring_at, worker_at
from .records import RING_ACTIVE

_I4 = np.dtype(np.int32)
_I8 = np.dtype(np.int64)


@inline
def pop_block(wa: int) -> int:
    """A free BLOCK, or 0."""
    w = worker_at(wa)
    if w["blocks_n"] == 0:
        return 0
    w["blocks_n"] -= 1
    return i64(records(w["blocks_free"], w["blocks_n"] + 1, _I8)[w["blocks_n"]])


@inline
def push_block(wa: int, block: int) -> None:
    """Give a BLOCK back."""
    w = worker_at(wa)
    records(w["blocks_free"], w["blocks_n"] + 1, _I8)[w["blocks_n"]] = block
    w["blocks_n"] += 1


@inline
def reserve_bounce(wa: int, pages: int) -> bool:
    """Set so many bounce pages aside for this pass. False if they are not free: the request stays on the ring."""
    w = worker_at(wa)
    if w["bounce_n"] - w["bounce_reserved"] < pages:
        return False
    w["bounce_reserved"] += pages
    return True


@inline
def pop_bounce(wa: int) -> int:
    """The address of a bounce page that was reserved."""
    w = worker_at(wa)
    w["bounce_n"] -= 1
    return w["bounce"] + i64(records(w["bounce_free"], w["bounce_n"] + 1, _I4)[w["bounce_n"]]) * 4096


@inline
def push_bounce(wa: int, address: int) -> None:
    """Give a bounce page back."""
    w = worker_at(wa)
    records(w["bounce_free"], w["bounce_n"] + 1, _I4)[w["bounce_n"]] = (address - w["bounce"]) >> 12
    w["bounce_n"] += 1


@kernel
def wake_starved(wa: int) -> None:
    """Blocks or bounce pages came back: rings that waited for them are served again.

    Not always the same one first, for that one may take all there is.
    """
    w = worker_at(wa)
    w["starved"] = 0
    first = w["starved_first"]
    found = False
    for k in range(w["top_ring"]):
        i = (first + k) % w["top_ring"]
        ra = ring_address(w, i)
        ring = ring_at(ra)
        if ring["state"] == RING_ACTIVE and ring["blocked"] != 0:
            mark_ready(wa, ra)
            if not found:
                found = True
                w["starved_first"] = i + 1

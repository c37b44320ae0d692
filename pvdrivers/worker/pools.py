"""What the requests of a worker share: blocks for many segments, and bounce pages. Who finds none stays on the ring.

A store that never answers keeps what its requests have. So there is a limit for each ring, and none may have more than
an eighth of what is free then: dozens of dead stores leave enough for the others. The last of each pool
(WORKER.*_kept) is for rings that have nothing of it, one request at a time.
"""

from __future__ import annotations

import numpy as np

from rings.atomics import i64, records
from rings.jit import inline, kernel

from .marks import mark_ready, ring_address, ring_at, worker_at
from .records import RING_ACTIVE

RING_BOUNCE = 1024
"""Bounce pages that a ring may have, 4 MiB of data; a request that is larger than that has them alone."""
RING_BLOCKS = 128
_SHARE = 8
_I4 = np.dtype(np.int32)
_I8 = np.dtype(np.int64)


@inline
def _may_have(wa: int, ra: int, wanted: int, held: int, most: int, free: int, kept: int) -> bool:
    """Whether a ring that has `held` of a pool may have `wanted` more. If not, it is served again when it may."""
    if held == 0:
        if wanted <= free:
            return True
        worker_at(wa)["starved"] = 1
        return False
    if wanted + held <= min(most, (free - kept) // _SHARE):
        return True
    ring_at(ra)["throttled"] = 1  # what it has comes back, or its store is dead: it is not woken for others' sake
    return False


@inline
def may_have_block(wa: int, ra: int) -> bool:
    """Whether pop_block may be called. If not, the request stays on the ring."""
    w = worker_at(wa)
    return _may_have(wa, ra, i64(1), ring_at(ra)["blocks"], i64(RING_BLOCKS), w["blocks_n"], w["blocks_kept"])


@inline
def pop_block(wa: int, ra: int) -> int:
    """A free BLOCK for a ring that may have it."""
    w = worker_at(wa)
    w["blocks_n"] -= 1
    ring_at(ra)["blocks"] += 1
    return i64(records(w["blocks_free"], w["blocks_n"] + 1, _I8)[w["blocks_n"]])


@inline
def push_block(wa: int, ra: int, block: int) -> None:
    """Give a BLOCK of a ring back."""
    w = worker_at(wa)
    records(w["blocks_free"], w["blocks_n"] + 1, _I8)[w["blocks_n"]] = block
    w["blocks_n"] += 1
    ring_at(ra)["blocks"] -= 1


@inline
def free_bounce(wa: int) -> int:
    """Bounce pages that are neither in use nor set aside."""
    w = worker_at(wa)
    return w["bounce_n"] - w["bounce_reserved"]


@inline
def reserve_bounce(wa: int, ra: int, pages: int) -> bool:
    """Set so many bounce pages aside for this pass, which is of one ring. If not, the request stays on the ring."""
    w = worker_at(wa)
    held = ring_at(ra)["bounced"] + w["bounce_reserved"]
    if not _may_have(wa, ra, pages, held, i64(RING_BOUNCE), free_bounce(wa), w["bounce_kept"]):
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

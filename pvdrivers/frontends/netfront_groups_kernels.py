"""A request that joins or leaves a group. See netfront_kernels, which sends and reaps it."""

from __future__ import annotations

import numpy as np

from rings.atomics import i64, load32, records, store8, store32, store64
from rings.jit import kernel
from rings.netif import TXF_extra_info
from rings.ring import RING_END, advance_prod, room, slot

from .netfront_kernels import NO_ID, kick, put_tx, queue_at, reap
from .netfront_records import NO_ANSWER


@kernel
def amend(qa: int, kind: int, mac: int) -> int:
    """Ask to join or leave a group: EXTRA_MCAST_ADD or _DEL behind a request of no bytes. 1; 0 if there is no room, and
    -1 for a violation. reap() finds the answer."""
    q = queue_at(qa)
    if reap(qa) < 0:
        return i64(-1)
    if q["free_n"] == 0 or room(q["tx_end"]) < 2:
        return i64(0)
    q["free_n"] -= 1
    page = i64(load32(q["free"] + q["free_n"] * 4))
    store8(q["in_flight"] + page, np.uint8(1))
    put_tx(qa, i64(load32(q["grefs"] + page * 4)), TXF_extra_info, page, 0)
    at = slot(q["tx_end"], records(q["tx_end"], 1, RING_END)[0]["prod_pvt"])
    store64(at, kind | mac << 16)
    store32(at + 8, np.uint32(NO_ID))
    advance_prod(q["tx_end"], 1)
    q["amended"], q["answer"] = page, NO_ANSWER
    kick(qa)
    return i64(1)


ARGUMENTS = {"amend": "(int64, int64, int64)"}
"""What Python calls, and with what, for warm()."""

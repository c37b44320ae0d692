"""What has come to a shard from the others: the entries of its worker. Its inbox is a ring to the loop (see `link`)."""

from __future__ import annotations

from pvdrivers.worker.marks import ring_at
from rings.atomics import i64
from rings.jit import kernel, seam_function

from .forward import deliver_arrived, packet_of
from .link import collect, has_more, heard, inbox_at, let_go
from .records import BATCH, HEADROOM, STRIDE, packet_at, switch_at


@kernel
def _take_some(wa: int, swa: int, ia: int, most: int) -> int:
    """Deliver up to `most` packets of all links. 1 if more are there."""
    sw, inbox = switch_at(swa), inbox_at(ia)
    shards = sw["shards"]
    n = i64(0)
    for k in range(shards):
        la = inbox["links"][(inbox["turn"] + k) % shards]
        if la != 0:
            n = i64(collect(la, sw["packets"], n, most))
    inbox["turn"] = (inbox["turn"] + 1) % shards
    deliver_arrived(wa, swa, n)
    for k in range(n):
        packet_at(packet_of(swa, k))["data"] = sw["data"] + k * STRIDE + HEADROOM
    more = 0
    for k in range(shards):
        la = inbox["links"][k]
        if la != 0:
            let_go(la)
            if has_more(la):
                more = 1
    return more


@seam_function
def step_inbox(wa: int, ra: int, budget: int, abandoned: int) -> int:
    """RING.step of an inbox. 1 if more may be there."""
    ring = ring_at(ra)
    if abandoned != 0:
        return 0
    swa, ia = ring["local"], ring["priv"]
    sw = switch_at(swa)
    heard(ia, ring["end"])
    more = 1
    for _ in range(sw["shards"] - 1):  # as much for each other shard as a ring of a guest gets
        if more != 0:
            more = _take_some(wa, swa, ia, min(budget, BATCH))
    return more


@seam_function
def finish_inbox(wa: int, ra: int, _b: int, _c: int) -> int:
    """RING.finish: nothing is left to be done."""
    return 0

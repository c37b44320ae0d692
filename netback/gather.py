"""Bytes of a packet from its sender's pages to private memory."""

from __future__ import annotations

from pvdrivers.worker.batch import op_at
from pvdrivers.worker.marks import stats_at, worker_at
from rings.atomics import copy_in, i64
from rings.jit import kernel

from .records import fragment_at, packet_at
from .staging import stage_at


@kernel
def gather(wa: int, pa: int, to: int, want: int, n: int) -> int:
    """Have bytes `have` to `want` of a packet at `to` + `have`, behind the first: copies put into the batch as number
    `n` and following; what the number is behind them. From pages that are mapped they are made at once."""
    packet = packet_at(pa)
    start = i64(0)
    for f in range(packet["fragments"]):
        fragment = fragment_at(pa, f)
        length = i64(fragment["length"])
        skip = max(packet["have"] - start, 0)
        take = min(length, want - start) - skip
        there = fragment["page"] if take > 0 else i64(0)
        if there != 0:
            copy_in(to + start + skip, there + i64(fragment["offset"]) + skip, take)
            stats_at(stage_at(packet["stage"])["stats"])["persistent_hits"] += 1
        elif take > 0:
            op = op_at(worker_at(wa)["ops"], n)
            op["address"], op["flags"] = to + start + skip, 0
            op["gref"], op["domid"] = fragment["gref"], packet["domid"]
            op["offset"], op["length"] = i64(fragment["offset"]) + skip, take
            n += 1
        start += length
    return n

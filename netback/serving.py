"""Whether a ring of a vif is to be served."""

from __future__ import annotations

from pvdrivers.worker.marks import mark_dead, ring_at
from pvdrivers.worker.records import V_OVERFLOW
from rings.atomics import i64
from rings.jit import inline
from rings.ring import CORRUPT, available

from .records import port_at


@inline
def to_serve(ra: int) -> int:
    """How many requests are on a ring of a vif; -1 if none is to be served, as the process ends or the ring is dead."""
    ring = ring_at(ra)
    ring["blocked"] = port_at(ring["device"])["handed_over"]  # then what is on the ring is for the next process
    if ring["blocked"] != 0:
        return i64(-1)
    n = available(ring["end"])
    if n == CORRUPT:
        mark_dead(ra, V_OVERFLOW)
        return i64(-1)
    return n

"""A nap instead of a sleep: where each wake-up costs system calls, requests of a deep queue are let come together.

A guest that keeps many requests going and is slower than we are would have us woken for each: a wait, an event to take,
to let in again, and one to send, all for one request. So after a pass the rings of such guests stay unarmed, and the
worker waits for a moment without them: for as long as the guest needs, at its rate, for half of what it can still put.
Then it finds that half on the ring, in one visit, with no event at all; a completion ends the nap before that. A guest
with few requests is not made to wait, and its ring is armed meanwhile.

A guest may be waiting as well: for answers, before it puts more. So there is no nap for a ring with nothing in flight:
nothing of ours would end it. And where a nap ends with all on the ring that the guest keeps going, nobody knows for how
long it has been there: that tells nothing of the guest's rate, but that the nap was too long.

How deep a guest's queue is it says itself: rsp_event stands behind the last response that it has consumed. If that is
a lie, it is the liar who waits.
"""

from __future__ import annotations

from typing import Any

from pvdrivers.syscalls import clock_monotonic, cycle_counter
from rings.atomics import i64, load_once32, records
from rings.jit import inline, kernel
from rings.ring import RING_END

from .marks import ring_at, worker_at
from .records import RING_ACTIVE

DEEP = 8
"""From so many requests on that a guest keeps going it is worth it to wait for more."""
LEAST_NS = 20_000
"""A shorter nap than this takes longer than it says."""
_LONGEST_NS = 1 << 40
"""Between two readings of the clock of which the second says how fast the counter goes: times 2**20 it is a number."""


@inline
def depth(ra: int) -> int:
    """How many requests the guest behind a ring keeps going: put there, and the response not consumed yet."""
    ring = ring_at(ra)
    e: Any = records(ring["end"], 1, RING_END)[0]
    n = (i64(load_once32(e["peer_prod"])) - i64(load_once32(e["prod_event"])) + 1) & 0xFFFFFFFF
    return n if n <= ring["nr_ents"] else i64(0)


@inline
def is_deep(ra: int) -> bool:
    """Whether a ring may stay unarmed for a nap: it is deep, and something in flight will end the nap."""
    ring = ring_at(ra)
    return ring["state"] == RING_ACTIVE and ring["blocked"] == 0 and ring["inflight"] > 0 and depth(ra) >= DEEP


@inline
def _room(ra: int) -> int:
    """How many requests its guest can still put before it has to wait for an answer."""
    ring = ring_at(ra)
    e: Any = records(ring["end"], 1, RING_END)[0]
    unanswered = (i64(load_once32(e["peer_prod"])) - e["pushed"]) & 0xFFFFFFFF
    # What it keeps going at the most, lately: it may do with less from now on.
    ring["deepest"] = max(depth(ra), ring["deepest"] - ((ring["deepest"] + 15) >> 4))
    return max(ring["deepest"] - unanswered, i64(0))


@kernel
def nap_length(wa: int) -> int:
    """Nanoseconds to wait for requests to come together, 0: not at all. Once after each pass that did something."""
    w = worker_at(wa)
    if w["nap_ns"] == 0:
        return i64(0)
    room = i64(-1)
    ra = w["active_head"]
    while ra != 0:
        if is_deep(ra):
            room = max(room, _room(ra))
        ra = ring_at(ra)["next_active"]
    taken = w["taken"] - w["nap_taken"]
    if taken > 0:
        gap = min((w["now"] - w["nap_at"]) // taken, w["nap_ns"])
        if w["napped"] != 0 and room == 0:
            gap = i64(0)  # the nap was too long
        # A mean over some passes; a pause of the guest counts for no more than the longest nap.
        w["gap_ns"] += (gap - w["gap_ns"]) >> 2
        w["nap_taken"], w["nap_at"] = w["taken"], w["now"]
    w["napped"] = 0
    if room <= 0 or w["gap_ns"] * 2 > w["nap_ns"]:
        return i64(0)  # nothing comes, or so slowly that not even two would come together
    length = min(w["nap_ns"], room * w["gap_ns"] >> 1)
    if length < LEAST_NS:
        return i64(0)
    w["napped"] = 1
    return length


@kernel
def now_ns(wa: int) -> int:
    """CLOCK_MONOTONIC, or near it: where reading it is a system call (Xen's clock source often is), the processor's
    counter stands in between two readings that are at most a tenth of a second apart. Each says how fast that goes."""
    w = worker_at(wa)
    if w["cycle_scale"] == 0:
        return clock_monotonic()
    cycles = cycle_counter()
    passed = cycles - w["cycle_at"]
    if passed < 0 or passed >= w["cycle_limit"]:
        now = i64(clock_monotonic())
        took = now - w["cycle_ns"]
        if passed > 0 and took < _LONGEST_NS:
            w["cycle_scale"] = (took << 20) // passed
        w["cycle_ns"], w["cycle_at"] = now, cycles
        passed = i64(0)
    # Never backwards: latencies are differences.
    return max(w["now"], w["cycle_ns"] + (passed * w["cycle_scale"] >> 20))

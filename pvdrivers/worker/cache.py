"""The cache of a ring with persistent grants: what comes in when it was mapped, and what goes."""

from __future__ import annotations

from typing import Any

from rings.atomics import i64
from rings.jit import inline, kernel

from .batch import add_unmap, unmap_batch
from .marks import ring_at, stats_at, worker_at
from .persistent import cache_at, evict, insert, lookup, put_back

NO_HANDLE = -1
FOREVER = 0x7FFFFFFFFFFFFFFF
HELD_PERSISTENT = 0x8000  # GRANT_OP.flags: `handle` is an entry of the ring's cache


@inline
def keep(wa: int, ra: int, op: Any) -> int:
    """Put a page just mapped into the ring's cache. If all there are in use it stays the request's own.

    The handle of a page that had to go for it, for the caller to unmap, or NO_HANDLE.
    """
    ring = ring_at(ra)
    ca = ring["cache"]
    now = worker_at(wa)["now"]
    old = i64(NO_HANDLE)
    # The same gref twice in one pass was missed twice: the second stays the request's own.
    entry = lookup(ca, i64(op["gref"]), now)
    if entry >= 0:
        put_back(ca, entry)
        return old
    if cache_at(ca)["free"] < 0:
        old = evict(ca, i64(FOREVER))
    entry = insert(ca, i64(op["gref"]), op["address"], op["handle"], now)
    if entry >= 0:
        op["handle"] = entry
        op["flags"] |= HELD_PERSISTENT
    stats_at(ring["stats"])["persistent_held"] = cache_at(ca)["used"]
    return old


@kernel
def drop_cache(wa: int, ra: int, not_used_since: int, ops: int, most: int) -> int:
    """Unmap the ring's persistent pages last used before that (ns), but for those in use; how many.

    `ops` is the address of GRANT_OP[most] to work with: the worker's own, or the control thread's.
    """
    ca = ring_at(ra)["cache"]
    dropped = i64(0)
    if ca == 0:
        return dropped
    n = i64(0)
    while True:
        handle = evict(ca, not_used_since)
        if handle < 0:
            break
        n = add_unmap(wa, ops, most, n, handle)
        dropped += 1
    unmap_batch(wa, ops, n)
    stats_at(ring_at(ra)["stats"])["persistent_held"] = cache_at(ca)["used"]
    return dropped


@inline
def purge_cache(wa: int, ra: int) -> None:
    """Once a second at most: let go of persistent pages that were not used for a while (Linux: 60 s)."""
    w = worker_at(wa)
    ring = ring_at(ra)
    if ring["cache"] != 0 and w["now"] - ring["purged"] > 1_000_000_000:
        ring["purged"] = w["now"]
        drop_cache(wa, ra, w["now"] - ring["keep_ns"], w["ops"], w["max_ops"])

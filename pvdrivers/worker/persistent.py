"""Persistent grants of one ring: gref -> mapped page, bounded, the least recently used goes first.

A hash of chains over a fixed array of entries, doubly linked by age. Entries in use are never dropped. The guest
cannot take a persistent grant back while we have it mapped; it learns of that when it tries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import i64, records
from rings.jit import inline, kernel

PERSISTENT_CACHE = np.dtype(
    [
        ("heads", "i8"),  # address of i4[n_heads]
        ("n_heads", "i8"),  # a power of two
        ("entries", "i8"),  # address of ENTRY[bound]
        ("bound", "i8"),
        ("used", "i8"),  # entries in the table
        ("newest", "i8"),  # index, -1 none
        ("oldest", "i8"),
        ("free", "i8"),  # head of the free list, by ENTRY.chain
    ],
    align=True,
)
ENTRY = np.dtype(
    [
        ("address", "i8"),
        ("handle", "i8"),
        ("last_used", "i8"),  # ns
        ("gref", "u4"),
        ("users", "i4"),  # requests in flight that use it
        ("chain", "i4"),
        ("newer", "i4"),
        ("older", "i4"),
        ("pad", "i4"),
    ],
    align=True,
)
_I4 = np.dtype(np.int32)
_ENTRY_SIZE = ENTRY.itemsize


@inline
def cache_at(ca: int) -> Any:
    """The PERSISTENT_CACHE at an address."""
    return records(ca, 1, PERSISTENT_CACHE)[0]


@inline
def entry_at(ca: int, index: int) -> Any:
    """Entry `index` of a cache."""
    return records(cache_at(ca)["entries"] + index * _ENTRY_SIZE, 1, ENTRY)[0]


@inline
def _head_index(c: Any, gref: int) -> int:
    # 29 bits by 32: a signed product that overflows is undefined in a kernel as it is in C (numba emits nsw).
    return ((gref * 0x1E3779B1) >> 8) & (c["n_heads"] - 1)


@kernel
def format_cache(ca: int) -> None:
    """Make it empty. heads, n_heads, entries and bound are set."""
    c = cache_at(ca)
    heads = records(c["heads"], c["n_heads"], _I4)
    for i in range(c["n_heads"]):
        heads[i] = -1
    for i in range(c["bound"]):
        entry_at(ca, i)["chain"] = i + 1 if i + 1 < c["bound"] else -1
    c["used"] = 0
    c["newest"] = -1
    c["oldest"] = -1
    c["free"] = 0 if c["bound"] > 0 else -1


@inline
def _unlink_age(ca: int, index: int) -> None:
    c = cache_at(ca)
    e = entry_at(ca, index)
    newer, older = i64(e["newer"]), i64(e["older"])
    if newer >= 0:
        entry_at(ca, newer)["older"] = older
    else:
        c["newest"] = older
    if older >= 0:
        entry_at(ca, older)["newer"] = newer
    else:
        c["oldest"] = newer


@inline
def _link_newest(ca: int, index: int) -> None:
    c = cache_at(ca)
    e = entry_at(ca, index)
    e["newer"] = -1
    e["older"] = c["newest"]
    if c["newest"] >= 0:
        entry_at(ca, c["newest"])["newer"] = index
    else:
        c["oldest"] = index
    c["newest"] = index


@kernel
def lookup(ca: int, gref: int, now: int) -> int:
    """The entry of a gref, now the newest and with one user more; -1 if it is not mapped."""
    c = cache_at(ca)
    index = i64(records(c["heads"], c["n_heads"], _I4)[_head_index(c, gref)])
    while index >= 0:
        e = entry_at(ca, index)
        if i64(e["gref"]) == gref:
            e["users"] += 1
            e["last_used"] = now
            if c["newest"] != index:
                _unlink_age(ca, index)
                _link_newest(ca, index)
            return index
        index = i64(e["chain"])
    return i64(-1)


@kernel
def insert(ca: int, gref: int, address: int, handle: int, now: int) -> int:
    """Keep a page that was just mapped, with one user; its entry, or -1 if there is no room (see `evict`)."""
    c = cache_at(ca)
    index = i64(c["free"])
    if index < 0:
        return i64(-1)
    e = entry_at(ca, index)
    c["free"] = i64(e["chain"])
    heads = records(c["heads"], c["n_heads"], _I4)
    h = _head_index(c, gref)
    e["gref"], e["address"], e["handle"] = gref, address, handle
    e["users"], e["last_used"] = 1, now
    e["chain"] = heads[h]
    heads[h] = index
    _link_newest(ca, index)
    c["used"] += 1
    return index


@inline
def put_back(ca: int, index: int) -> None:
    """One user less."""
    entry_at(ca, index)["users"] -= 1


@kernel
def evict(ca: int, not_used_since: int) -> int:
    """Drop the oldest entry without a user, if it was last used before `not_used_since` (ns); its handle, or -1.

    The caller unmaps the handle.
    """
    c = cache_at(ca)
    index = i64(c["oldest"])
    while index >= 0:
        e = entry_at(ca, index)
        if i64(e["last_used"]) >= not_used_since:
            return i64(-1)
        if e["users"] == 0:
            break
        index = i64(e["newer"])
    if index < 0:
        return i64(-1)
    e = entry_at(ca, index)
    heads = records(c["heads"], c["n_heads"], _I4)
    h = _head_index(c, i64(e["gref"]))
    if i64(heads[h]) == index:
        heads[h] = e["chain"]
    else:
        at = i64(heads[h])
        while i64(entry_at(ca, at)["chain"]) != index:
            at = i64(entry_at(ca, at)["chain"])
        entry_at(ca, at)["chain"] = e["chain"]
    _unlink_age(ca, index)
    e["chain"] = c["free"]
    c["free"] = index
    c["used"] -= 1
    return i64(e["handle"])

"""Staging grants (netif.h, "Static Grants"): pages of a guest that it has asked to have kept mapped, by their grefs.

A table for each queue: what its packets and its buffers name is looked up here, and where both ends of a copy are in
our memory it is a memcpy of the worker's, which takes no grant operation. Pure kernels over a table in private memory;
only the worker of the queue calls them. An entry without an address is being mapped and is found by nobody else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.atomics import i64, records
from rings.jit import inline, kernel

from .control_records import MOST_STAGED

HEADS = 1024
_NONE = -1
_I4 = np.dtype(np.int32)

STAGED = np.dtype(
    [
        ("gref", "i8"),
        ("address", "i8"),  # of the page; 0 while it is being mapped
        ("handle", "i8"),
        ("writable", "i8"),
        ("leaving", "i8"),  # the guest has asked for its end
        ("next", "i8"),  # in its chain, or of the free ones; -1 ends it
    ],
    align=True,
)
STAGE = np.dtype(
    [
        ("limit", "i8"),  # entries that are offered
        ("used", "i8"),
        ("free", "i8"),  # the first that is
        ("stats", "i8"),  # address of the STATS of its queue
        ("worker", "i8"),  # ... and of the WORKER of that, which alone may look at this or change it
        ("job", "i8"),  # address of a CONTROL with a request about it, 0 none; the one word that two workers write
        ("heads", "i4", (HEADS,)),
        ("entries", STAGED, (MOST_STAGED,)),
    ],
    align=True,
)
"""The table of one queue."""
STAGE_SIZE = STAGE.itemsize
JOB_AT: int = STAGE.fields["job"][1]  # type: ignore[index]
_HEADS_AT: int = STAGE.fields["heads"][1]  # type: ignore[index]
_ENTRIES_AT: int = STAGE.fields["entries"][1]  # type: ignore[index]
_STAGED_SIZE = STAGED.itemsize


@inline
def stage_at(at: int) -> Any:
    """The STAGE at an address."""
    return records(at, 1, STAGE)[0]


@inline
def staged_at(sa: int, k: int) -> Any:
    """STAGED k of a STAGE."""
    return records(sa + _ENTRIES_AT + k * _STAGED_SIZE, 1, STAGED)[0]


@inline
def _heads(sa: int) -> Any:
    return records(sa + _HEADS_AT, HEADS, _I4)


@inline
def _chain(gref: int) -> int:
    return (gref * 0x9E3779B1 & 0xFFFFFFFF) >> 22


@kernel
def format_stage(sa: int, limit: int) -> None:
    """An empty table for `limit` <= MOST_STAGED grefs."""
    stage = stage_at(sa)
    stage["limit"], stage["used"], stage["free"] = limit, 0, 0 if limit > 0 else _NONE
    heads = _heads(sa)
    for k in range(HEADS):
        heads[k] = _NONE
    for k in range(limit):
        staged_at(sa, k)["next"] = k + 1 if k + 1 < limit else _NONE


@inline
def find(sa: int, gref: int) -> int:
    """The entry of a gref, -1 if there is none."""
    k = i64(_heads(sa)[_chain(gref)])
    while k >= 0 and staged_at(sa, k)["gref"] != gref:
        k = i64(staged_at(sa, k)["next"])
    return k


@kernel
def page_of(sa: int, gref: int, write: int) -> int:
    """Where the page behind a gref is mapped, 0 if it is not, or not to be written to. `sa` may be 0: no table."""
    if sa == 0 or stage_at(sa)["used"] == 0:
        return i64(0)
    k = find(sa, gref)
    if k < 0 or (write != 0 and staged_at(sa, k)["writable"] == 0):
        return i64(0)
    return i64(staged_at(sa, k)["address"])


@kernel
def insert(sa: int, gref: int, writable: int) -> int:
    """A new entry, without an address yet; -1 if the gref has one, or there is no room."""
    stage = stage_at(sa)
    if stage["free"] < 0 or find(sa, gref) >= 0:
        return i64(-1)
    k = i64(stage["free"])
    entry = staged_at(sa, k)
    stage["free"] = entry["next"]
    stage["used"] += 1
    heads = _heads(sa)
    entry["gref"], entry["address"], entry["handle"] = gref, 0, _NONE
    entry["writable"], entry["leaving"], entry["next"] = writable, 0, heads[_chain(gref)]
    heads[_chain(gref)] = k
    return k


@kernel
def remove(sa: int, gref: int) -> int:
    """Take the entry of a gref out: its handle, which the caller unmaps; -1 if it has none."""
    k = find(sa, gref)
    if k < 0:
        return i64(-1)
    stage, entry, heads = stage_at(sa), staged_at(sa, k), _heads(sa)
    at = i64(heads[_chain(gref)])
    if at == k:
        heads[_chain(gref)] = entry["next"]
    else:
        while staged_at(sa, at)["next"] != k:
            at = i64(staged_at(sa, at)["next"])
        staged_at(sa, at)["next"] = entry["next"]
    handle = i64(entry["handle"])
    entry["address"] = 0
    entry["next"] = stage["free"]
    stage["free"] = k
    stage["used"] -= 1
    return handle


@kernel
def take_one(sa: int) -> int:
    """Take any entry out: its handle; -1 if there is none."""
    heads = _heads(sa)
    for c in range(HEADS):
        if heads[c] >= 0:
            return remove(sa, i64(staged_at(sa, i64(heads[c]))["gref"]))
    return i64(-1)

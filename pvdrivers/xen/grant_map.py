"""A batch of maps on gntdev, with a status for each page.

gntdev maps all of a batch or nothing, and does not say what was wrong. So after a failure it is asked of all pages at
once, by a copy of a byte out of each, which has a status of its own; those that are in order are mapped again. If that
fails as well there is no room, and what fits is mapped; or some of them may only be read. Then these are looked for by
halves, but not for ever: a guest with many of them is at fault, and must not have its worker make a call for each.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import (
    OP_KEEP,
    OP_READONLY,
    PAGE_SIZE,
    GNTST_general_error,
    GNTST_no_space,
    GNTST_okay,
    GNTST_permission_denied,
)
from pvdrivers.syscalls import ioctl
from rings.atomics import i64, records
from rings.jit import inline, kernel

from .devices import COPY_REQUEST, COPY_SEGMENT, IOCTL_GNTDEV_GRANT_COPY, GNTCOPY_source_gref
from .grant_window import HANDLE_TAG, TAG_SHIFT, ctx_of, hide, map_refs, op_of, put_ref

KEPT_TOGETHER = 16
"""Pages in a mapping of those that are kept: they are unmapped one by one, as they have not been used for long."""
MOST_TRIES = 64
"""Mappings tried after a failure. Five pages that may only be read are found in 4096."""
_SEGMENT_SIZE = COPY_SEGMENT.itemsize
_PROBE_AT = 32
_KIND = OP_READONLY | OP_KEEP
_I4 = np.dtype(np.int32)


@inline
def _index(ctx: Any, k: int) -> int:
    """Which operation the k-th that is to be mapped is."""
    return i64(records(ctx["order"], ctx["most"], _I4)[k])


@kernel
def _map_part(ctx_at: int, ops: int, first: int, n: int, readonly: int) -> bool:
    """Map n operations of the order, side by side; all of them or none."""
    ctx = ctx_of(ctx_at)
    for k in range(n):
        put_ref(ctx, k, op_of(ops, _index(ctx, first + k)))
    slot = map_refs(ctx_at, n, readonly)
    if slot < 0:
        return False
    for k in range(n):
        op = op_of(ops, _index(ctx, first + k))
        op["address"] = ctx["window"] + (slot + k) * PAGE_SIZE
        op["handle"] = i64(HANDLE_TAG) << TAG_SHIFT | slot + k
        op["status"] = GNTST_okay
    return True


@kernel
def _probe(ctx_at: int, ops: int, first: int, n: int) -> int:
    """Set the status of n operations of the order by a copy of a byte out of each page: how many are in order, which
    come first from now on."""
    ctx = ctx_of(ctx_at)
    order = records(ctx["order"], ctx["most"], _I4)
    for k in range(n):
        op = op_of(ops, i64(order[first + k]))
        segment = records(ctx["request"] + k * _SEGMENT_SIZE, 1, COPY_SEGMENT)[0]
        segment["source"] = i64(op["gref"]) | (i64(op["domid"]) << 48)
        segment["dest"] = ctx["small"] + _PROBE_AT
        segment["len"], segment["flags"], segment["status"] = 1, GNTCOPY_source_gref, GNTST_general_error
    request = records(ctx["small"], 1, COPY_REQUEST)[0]
    request["count"], request["segments"] = n, ctx["request"]
    failed = ioctl(ctx["fd"], IOCTL_GNTDEV_GRANT_COPY, ctx["small"]) < 0
    good = i64(0)
    for k in range(n):
        i = i64(order[first + k])
        status = i64(records(ctx["request"] + k * _SEGMENT_SIZE, 1, COPY_SEGMENT)[0]["status"])
        op_of(ops, i)["status"] = GNTST_general_error if failed else status
        if not failed and status == GNTST_okay:
            order[first + k] = order[first + good]
            order[first + good] = i
            good += 1
    return good


@kernel
def _only_readable(ctx_at: int, ops: int, first: int, n: int) -> bool:
    """Whether n operations that cannot be mapped together can be to read from, and so are not short of room."""
    if not _map_part(ctx_at, ops, first, n, 1):
        return False
    ctx = ctx_of(ctx_at)
    hide(ctx_at, i64(op_of(ops, _index(ctx, first))["handle"]) & 0xFFFF_FFFF, n)
    return True


@kernel
def _map_halves(ctx_at: int, ops: int, first: int, n: int) -> int:
    """Map those of n operations of the order that may be written to, looking for the others: how many failed."""
    ctx = ctx_of(ctx_at)
    for k in range(n):
        op = op_of(ops, _index(ctx, first + k))
        op["address"], op["handle"], op["status"] = 0, -1, GNTST_permission_denied
    failed = i64(0)
    at = i64(0)
    bad = i64(n)  # from `at` to there is one at least, or nobody knows: n + 1
    tries = i64(0)
    while at < n and tries < MOST_TRIES:
        if bad - at == 1:
            failed += 1
            at = bad
            bad = i64(n + 1)
            continue
        tries += 1
        size = n - at if bad > n else (bad - at + 1) >> 1
        if _map_part(ctx_at, ops, first + at, size, 0):
            at += size
        else:
            bad = at + size
    return failed + n - at


@kernel
def _map_what_fits(ctx_at: int, ops: int, first: int, n: int, readonly: int) -> int:
    """Map n operations of the order in small parts, as far as there is room: how many there was none for."""
    at = i64(0)
    while at < n and _map_part(ctx_at, ops, first + at, min(n - at, i64(KEPT_TOGETHER)), readonly):
        at += min(n - at, i64(KEPT_TOGETHER))
    ctx = ctx_of(ctx_at)
    for k in range(at, n):
        op_of(ops, _index(ctx, first + k))["status"] = GNTST_no_space
    return n - at


@kernel
def _map_some(ctx_at: int, ops: int, first: int, n: int, readonly: int) -> int:
    """Map n operations of the order: how many failed."""
    if _map_part(ctx_at, ops, first, n, readonly):
        return i64(0)
    good = _probe(ctx_at, ops, first, n)
    if good == 0 or (good < n and _map_part(ctx_at, ops, first, good, readonly)):
        return n - good
    if readonly == 0 and _only_readable(ctx_at, ops, first, good):
        return n - good + _map_halves(ctx_at, ops, first, good)
    return n - good + _map_what_fits(ctx_at, ops, first, good, readonly)


@kernel
def map_kind(ctx_at: int, ops: int, n: int, kind: int) -> int:
    """Map those operations of n that have these of the flags OP_READONLY and OP_KEEP: how many failed."""
    ctx = ctx_of(ctx_at)
    order = records(ctx["order"], ctx["most"], _I4)
    count = i64(0)
    for i in range(n):
        op = op_of(ops, i)
        if i64(op["flags"]) & _KIND == kind:
            op["address"], op["handle"], op["status"] = 0, -1, GNTST_general_error
            order[count] = i
            count += 1
    together = count
    if ctx["single"] != 0:
        together = i64(1)
    elif kind & OP_KEEP != 0:
        together = i64(KEPT_TOGETHER)
    failed = i64(0)
    first = i64(0)
    while first < count:
        part = min(together, count - first)
        failed += _map_some(ctx_at, ops, first, part, kind & OP_READONLY)
        first += part
    return failed

"""A batch of maps on gntdev, with a status for each page.

gntdev maps all of a batch or nothing, and does not say what was wrong. So after a failure it is asked of all pages at
once, by a copy of a byte out of each, which has a status of its own; those that are in order are mapped again, in one
mapping. If that fails as well, each domain's are mapped for themselves: one guest's trouble is not another's. Where
that fails, too, there is no room, and what fits is mapped; or a guest has granted pages to read from only, which a copy
out of them does not tell. Those are looked for by halves, but not for ever: no guest is to have a call for each.
"""

from __future__ import annotations

import numpy as np

from pvdrivers.platform import (
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
from .grant_window import HANDLE_TAG, TAG_SHIFT, TOGETHER, ctx_of, hide, map_refs, op_of, put_ref

A_PART = 16
"""Pages that are mapped together where there is no room for all."""
MOST_TRIES = 64
"""Mappings that are tried to find pages of one guest which may only be read. One of 256 takes up to seventeen."""
_SEGMENT_SIZE = COPY_SEGMENT.itemsize
_PROBE_AT = 32
_I4 = np.dtype(np.int32)


@inline
def _index(ctx_at: int, k: int) -> int:
    """Which operation the k-th that is to be mapped is."""
    ctx = ctx_of(ctx_at)
    return i64(records(ctx["order"], ctx["most"], _I4)[k])


@kernel
def _map_part(ctx_at: int, ops: int, first: int, n: int, readonly: int) -> bool:
    """Map n operations of the order, side by side; all of them or none."""
    ctx = ctx_of(ctx_at)
    for k in range(n):
        put_ref(ctx, k, op_of(ops, _index(ctx_at, first + k)))
    slot = map_refs(ctx_at, n, readonly)
    if slot < 0:
        return False
    for k in range(n):
        op = op_of(ops, _index(ctx_at, first + k))
        op["address"] = ctx["window"] + (slot + k) * PAGE_SIZE
        op["handle"] = i64(HANDLE_TAG) << TAG_SHIFT | slot + k
        op["status"] = GNTST_okay
    return True


@kernel
def _probe(ctx_at: int, ops: int, n: int) -> int:
    """Set the status of n operations of the order by a copy of a byte out of each page: how many are in order, which
    come first from now on."""
    ctx = ctx_of(ctx_at)
    order = records(ctx["order"], ctx["most"], _I4)
    for k in range(n):
        op = op_of(ops, i64(order[k]))
        segment = records(ctx["request"] + k * _SEGMENT_SIZE, 1, COPY_SEGMENT)[0]
        segment["source"] = i64(op["gref"]) | (i64(op["domid"]) << 48)
        segment["dest"] = ctx["small"] + _PROBE_AT
        segment["len"], segment["flags"], segment["status"] = 1, GNTCOPY_source_gref, GNTST_general_error
    request = records(ctx["small"], 1, COPY_REQUEST)[0]
    request["count"], request["segments"] = n, ctx["request"]
    asked = ioctl(ctx["fd"], IOCTL_GNTDEV_GRANT_COPY, ctx["small"]) >= 0
    good = i64(0)
    for k in range(n):
        i = i64(order[k])
        status = i64(records(ctx["request"] + k * _SEGMENT_SIZE, 1, COPY_SEGMENT)[0]["status"])
        op_of(ops, i)["status"] = status if asked else i64(GNTST_general_error)
        if asked and status == GNTST_okay:
            order[k] = order[good]
            order[good] = i
            good += 1
    return good


@kernel
def _only_readable(ctx_at: int, ops: int, first: int, n: int) -> bool:
    """Whether n operations that cannot be mapped together can be to read from, and so are not short of room."""
    if not _map_part(ctx_at, ops, first, n, 1):
        return False
    hide(ctx_at, i64(op_of(ops, _index(ctx_at, first))["handle"]) & 0xFFFF_FFFF, n)
    return True


@kernel
def _fail(ctx_at: int, ops: int, first: int, n: int, status: int) -> int:
    """n operations of the order are not mapped, for this reason: how many, so n."""
    for k in range(n):
        op = op_of(ops, _index(ctx_at, first + k))
        op["address"], op["handle"], op["status"] = 0, -1, status
    return n


@kernel
def _map_halves(ctx_at: int, ops: int, first: int, n: int) -> int:
    """Map those of n operations of the order that may be written to, looking for the others: how many failed."""
    failed = i64(0)
    at = i64(0)
    bad = i64(n + 1)  # from `at` to there is one at least; n + 1: nobody knows
    tries = i64(0)
    while at < n and tries < MOST_TRIES:
        if bad - at == 1:
            denied = _only_readable(ctx_at, ops, first + at, 1)
            failed += _fail(ctx_at, ops, first + at, 1, i64(GNTST_permission_denied) if denied else i64(GNTST_no_space))
            at = bad
            bad = i64(n + 1)
            continue
        tries += 1
        size = n - at if bad > n else (bad - at + 1) >> 1
        if _map_part(ctx_at, ops, first + at, size, 0):
            at += size
        else:
            bad = at + size
    return failed + _fail(ctx_at, ops, first + at, n - at, i64(GNTST_permission_denied))


@kernel
def _map_what_fits(ctx_at: int, ops: int, first: int, n: int, readonly: int) -> int:
    """Map n operations of the order in small parts, as far as there is room: how many there was none for."""
    at = i64(0)
    size = i64(A_PART)
    while at < n and size > 0:
        size = min(size, n - at)
        if _map_part(ctx_at, ops, first + at, size, readonly):
            at += size
        else:
            size = i64(1) if size > 1 else i64(0)
    return _fail(ctx_at, ops, first + at, n - at, i64(GNTST_no_space))


@kernel
def _domain_first(ctx_at: int, ops: int, first: int, n: int) -> int:
    """Of n operations of the order, have those of the first one's domain come first: how many those are."""
    ctx = ctx_of(ctx_at)
    order = records(ctx["order"], ctx["most"], _I4)
    domid = op_of(ops, i64(order[first]))["domid"]
    same = i64(0)
    for k in range(n):
        i = i64(order[first + k])
        if op_of(ops, i)["domid"] == domid:
            order[first + k] = order[first + same]
            order[first + same] = i
            same += 1
    return same


@kernel
def _map_domain(ctx_at: int, ops: int, first: int, n: int, readonly: int) -> int:
    """Map n operations of the order, all of one domain: how many failed."""
    if _map_part(ctx_at, ops, first, n, readonly):
        return i64(0)
    if readonly == 0 and _only_readable(ctx_at, ops, first, n):
        return _map_halves(ctx_at, ops, first, n)
    return _map_what_fits(ctx_at, ops, first, n, readonly)


@kernel
def _map_some(ctx_at: int, ops: int, n: int, readonly: int) -> int:
    """Map the n operations of the order: how many failed."""
    if _map_part(ctx_at, ops, 0, n, readonly):
        return i64(0)
    good = _probe(ctx_at, ops, n)
    failed = n - good
    if good == 0 or (failed > 0 and _map_part(ctx_at, ops, 0, good, readonly)):
        return failed
    first = i64(0)
    while first < good:
        part = _domain_first(ctx_at, ops, first, good - first)
        failed += _map_domain(ctx_at, ops, first, part, readonly)
        first += part
    return failed


@kernel
def map_kind(ctx_at: int, ops: int, n: int, readonly: int) -> int:
    """Map those operations of n that are read only, or those that are not: how many failed."""
    ctx = ctx_of(ctx_at)
    order = records(ctx["order"], ctx["most"], _I4)
    together = i64(1) if ctx["single"] != 0 else i64(TOGETHER)
    failed = i64(0)
    count = i64(0)
    for i in range(n):
        op = op_of(ops, i)
        if i64(op["flags"]) & OP_READONLY == readonly:
            op["address"], op["handle"], op["status"] = 0, -1, GNTST_general_error
            order[count] = i
            count += 1
            if count == together:
                failed += _map_some(ctx_at, ops, count, readonly)
                count = i64(0)
    return failed + (_map_some(ctx_at, ops, count, readonly) if count > 0 else i64(0))

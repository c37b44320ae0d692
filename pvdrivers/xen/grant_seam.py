"""The seam functions of grants on /dev/xen/gntdev: a batch is a handful of system calls, whatever its size.

    map     see grant_map
    unmap   see grant_window
    copy    GRANT_COPY, 16 pages a hypercall inside

Each worker has a context of its own: a descriptor, a window of address space that nothing else is ever mapped into,
and scratch. Only the worker maps and copies; unmapping is for anybody who has a handle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import (
    OP_BETWEEN,
    OP_READONLY,
    OP_TO_GUEST,
    PAGE_SIZE,
    GNTST_bad_copy_arg,
    GNTST_bad_handle,
    GNTST_general_error,
    GNTST_okay,
)
from pvdrivers.syscalls import ioctl
from rings.atomics import i64, load_acquire32, records
from rings.jit import inline, kernel, seam_function

from .devices import (
    COPY_REQUEST,
    COPY_SEGMENT,
    IOCTL_GNTDEV_GRANT_COPY,
    GNTCOPY_dest_gref,
    GNTCOPY_source_gref,
)
from .grant_map import map_kind
from .grant_window import HANDLE_TAG, SLOT_MAPPED, TAG_SHIFT, ctx_of, hide, op_of

_SEGMENT_SIZE = COPY_SEGMENT.itemsize
_I4 = np.dtype(np.int32)


@seam_function
def grant_map(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_map: -> how many failed."""
    return map_kind(ctx_at, ops, n, 0) + map_kind(ctx_at, ops, n, OP_READONLY)


@inline
def _slot_of(ctx: Any, handle: int) -> int:
    """The slot of a handle, -1 if it is none."""
    slot = handle & 0xFFFF_FFFF
    if handle >> TAG_SHIFT != HANDLE_TAG or handle >> 32 & 0xFFFF != 0 or slot >= ctx["pages"]:
        return i64(-1)
    if load_acquire32(ctx["state"] + slot * 4) != SLOT_MAPPED:
        return i64(-1)
    return slot


@seam_function
def grant_unmap(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_unmap: -> how many failed. The handle becomes -1, so that a second time is an error."""
    ctx = ctx_of(ctx_at)
    failed = i64(0)
    i = i64(0)
    while i < n:
        slot = _slot_of(ctx, i64(op_of(ops, i)["handle"]))
        run = i64(1)
        if slot >= 0:
            while i + run < n and _slot_of(ctx, i64(op_of(ops, i + run)["handle"])) == slot + run:
                run += 1
        status = i64(GNTST_bad_handle)
        if slot >= 0:
            status = GNTST_okay if hide(ctx_at, slot, run) == 0 else i64(GNTST_general_error)
        for k in range(run):
            op = op_of(ops, i + k)
            op["status"], op["handle"] = status, -1
        if status != GNTST_okay:
            failed += run
        i += run
    return failed


@inline
def _put_segment(ctx: Any, k: int, op: Any, i: int) -> None:
    segment = records(ctx["request"] + k * _SEGMENT_SIZE, 1, COPY_SEGMENT)[0]
    granted = i64(op["gref"]) | (i64(op["offset"]) << 32) | (i64(op["domid"]) << 48)
    # With OP_BETWEEN the address is packed as the ioctl wants it.
    between = i64(op["flags"]) & OP_BETWEEN != 0
    if i64(op["flags"]) & OP_TO_GUEST != 0:
        segment["source"], segment["dest"] = op["address"], granted
        segment["flags"] = GNTCOPY_dest_gref | (GNTCOPY_source_gref if between else 0)
    else:
        segment["source"], segment["dest"] = granted, op["address"]
        segment["flags"] = GNTCOPY_source_gref | (GNTCOPY_dest_gref if between else 0)
    segment["len"], segment["status"] = op["length"], GNTST_general_error
    records(ctx["order"], ctx["most"], _I4)[k] = i


@kernel
def _copy_segments(ctx_at: int, ops: int, n: int) -> int:
    """Copy the n segments of the request: how many failed; -errno if gntdev took none or not all of them."""
    ctx = ctx_of(ctx_at)
    request = records(ctx["small"], 1, COPY_REQUEST)[0]
    request["count"], request["segments"] = n, ctx["request"]
    result = ioctl(ctx["fd"], IOCTL_GNTDEV_GRANT_COPY, ctx["small"])
    if result < 0:
        return result
    failed = i64(0)
    order = records(ctx["order"], ctx["most"], _I4)
    for k in range(n):
        status = i64(records(ctx["request"] + k * _SEGMENT_SIZE, 1, COPY_SEGMENT)[0]["status"])
        op_of(ops, i64(order[k]))["status"] = status
        if status != GNTST_okay:
            failed += 1
    return failed


@inline
def _beyond_page(op: Any) -> bool:
    length = i64(op["length"])
    if i64(op["flags"]) & OP_BETWEEN != 0 and (op["address"] >> 32 & 0xFFFF) + length > PAGE_SIZE:
        return True
    return i64(op["offset"]) + length > PAGE_SIZE


@seam_function
def grant_copy(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_copy: -> how many failed."""
    ctx = ctx_of(ctx_at)
    failed = i64(0)
    count = i64(0)
    for i in range(n):
        op = op_of(ops, i)
        if _beyond_page(op):
            op["status"] = GNTST_bad_copy_arg
            failed += 1
            continue
        op["status"] = GNTST_okay
        if op["length"] != 0:
            _put_segment(ctx, count, op, i)
            count += 1
    if count == 0:
        return failed
    result = _copy_segments(ctx_at, ops, count)
    if result >= 0:
        return failed + result
    # A local address that is not there, say, ends the call: each alone, then.
    for i in range(n):
        op = op_of(ops, i)
        if op["status"] == GNTST_bad_copy_arg or op["length"] == 0:
            continue
        _put_segment(ctx, 0, op, i)
        result = _copy_segments(ctx_at, ops, 1)
        if result < 0:
            op["status"] = GNTST_general_error
            failed += 1
        else:
            failed += result
    return failed

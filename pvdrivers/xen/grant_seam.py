"""The seam functions of grants on /dev/xen/gntdev: a batch is a handful of system calls, whatever its size.

    map     MAP_GRANT_REF, mmap, UNMAP_GRANT_REF: the last only has gntdev forget the index; the mapping keeps the
            grants (drivers/xen/gntdev.c: the vma holds a reference), so that an unmap is one call on the address
    unmap   mmap of nothing over a run of pages that are side by side
    copy    GRANT_COPY, 16 pages a hypercall inside

gntdev maps all of a batch or nothing and does not say what was wrong: after a failure each page is tried alone, and
asked for its status by a copy of one byte, which has one.

Each worker has a context of its own: a descriptor, a window of address space that nothing else is ever mapped into,
and scratch. Only the worker maps and copies; unmapping is for anybody who has a handle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import (
    GRANT_OP,
    OP_BETWEEN,
    OP_READONLY,
    OP_TO_GUEST,
    PAGE_SIZE,
    GNTST_bad_copy_arg,
    GNTST_bad_handle,
    GNTST_general_error,
    GNTST_no_space,
    GNTST_okay,
    GNTST_permission_denied,
)
from pvdrivers.syscalls import (
    ENOMEM,
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_READ_WRITE,
    ioctl,
    madvise,
    mmap,
)
from rings.atomics import i64, load_acquire32, records, store_release32
from rings.jit import inline, kernel, seam_function

from .devices import (
    COPY_REQUEST,
    COPY_SEGMENT,
    IOCTL_GNTDEV_GRANT_COPY,
    IOCTL_GNTDEV_MAP_GRANT_REF,
    IOCTL_GNTDEV_UNMAP_GRANT_REF,
    MAP_REF,
    MAP_REQUEST,
    UNMAP_REQUEST,
    GNTCOPY_dest_gref,
    GNTCOPY_source_gref,
)

GRANT_CTX = np.dtype(
    [
        ("fd", "i8"),  # of gntdev
        ("window", "i8"),  # address space for `pages` mappings
        ("pages", "i8"),
        ("state", "i8"),  # u4[pages]: SLOT_*
        ("cursor", "i8"),  # where the next run of free slots is looked for
        ("request", "i8"),  # scratch: MAP_REQUEST with MAP_REF[most], or COPY_SEGMENT[most]
        ("order", "i8"),  # scratch: i4[most], which operation each of them is
        ("small", "i8"),  # scratch: 64 bytes for the other ioctls, and the byte that a probe copies
        ("most", "i8"),  # operations in a batch
        ("single", "i8"),  # 1: never more than a page in a mapping, as it cannot be unmapped in part (not PV)
    ],
    align=True,
)
SLOT_FREE, SLOT_MAPPED, SLOT_LOST, SLOT_TAKEN = 0, 1, 2, 3
"""Lost: it cannot be unmapped. Taken: somebody else's memory is there by now."""
TOGETHER = 256
"""Pages in one mapping, at the most. One that has all addresses of a huge page in it (512 pages, aligned) must never be
unmapped in part: Linux first splits the huge page that might be there, and tells of all of its addresses
(mm/huge_memory.c: vma_adjust_trans_huge, __split_huge_pmd), whereupon gntdev unmaps all grants there, under way or not
(drivers/xen/gntdev.c: gntdev_invalidate). Traced in Linux 6.1: writes of other requests ended with EFAULT."""
HANDLE_TAG = 0x5B
_TAG_SHIFT = 48
_OP_SIZE = GRANT_OP.itemsize
_HEAD = MAP_REQUEST.itemsize
_REF_SIZE = MAP_REF.itemsize
_SEGMENT_SIZE = COPY_SEGMENT.itemsize
_PROBE_AT = 32
_I4 = np.dtype(np.int32)


@inline
def _op(ops: int, i: int) -> Any:
    return records(ops + i * _OP_SIZE, 1, GRANT_OP)[0]


@inline
def _ctx(at: int) -> Any:
    return records(at, 1, GRANT_CTX)[0]


@kernel
def find_run(ctx_at: int, n: int) -> int:
    """The first of `n` free slots in a row, next fit; -1 if there is no such run."""
    ctx = _ctx(ctx_at)
    at = i64(ctx["cursor"])
    run = i64(0)
    for _ in range(ctx["pages"] + n):
        if at >= ctx["pages"]:
            at = i64(0)
            run = i64(0)
        # Acquire: who sees a slot free sees it unmapped, by whatever thread.
        if load_acquire32(ctx["state"] + at * 4) == SLOT_FREE:
            run += 1
        else:
            run = i64(0)
        at += 1
        if run == n:
            ctx["cursor"] = at
            return at - n
    return i64(-1)


@inline
def _mark(ctx: Any, slot: int, n: int, state: int) -> None:
    for i in range(n):
        store_release32(ctx["state"] + (slot + i) * 4, state)


@inline
def _put_ref(ctx: Any, k: int, op: Any, i: int) -> None:
    ref = records(ctx["request"] + _HEAD + k * _REF_SIZE, 1, MAP_REF)[0]
    ref["domid"], ref["ref"] = op["domid"], op["gref"]
    records(ctx["order"], ctx["most"], _I4)[k] = i


@kernel
def _map_refs(ctx_at: int, n: int, readonly: int) -> int:
    """Map the n refs of the request side by side: the first slot, or -errno with nothing mapped."""
    ctx = _ctx(ctx_at)
    slot = find_run(ctx_at, n)
    if slot < 0:
        return -ENOMEM
    request = records(ctx["request"], 1, MAP_REQUEST)[0]
    request["count"] = n
    result = ioctl(ctx["fd"], IOCTL_GNTDEV_MAP_GRANT_REF, ctx["request"])
    if result < 0:
        return result
    at = ctx["window"] + slot * PAGE_SIZE
    protection = PROT_READ if readonly != 0 else PROT_READ_WRITE
    result = mmap(at, n * PAGE_SIZE, protection, MAP_SHARED | MAP_FIXED, ctx["fd"], i64(request["index"]))
    forget = records(ctx["small"], 1, UNMAP_REQUEST)[0]
    forget["index"], forget["count"] = request["index"], n
    ioctl(ctx["fd"], IOCTL_GNTDEV_UNMAP_GRANT_REF, ctx["small"])
    if result >= 0:
        _mark(ctx, slot, n, SLOT_MAPPED)
        return slot
    # The kernel took away what was there before it found that it could not map: close the hole, unless somebody else
    # has been given that address meanwhile. Then it is theirs for good.
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    if mmap(at, n * PAGE_SIZE, PROT_NONE, flags, -1, 0) != at:
        _mark(ctx, slot, n, SLOT_TAKEN)
    return result


@inline
def _mapped(ctx: Any, op: Any, slot: int) -> None:
    op["address"] = ctx["window"] + slot * PAGE_SIZE
    op["handle"] = i64(HANDLE_TAG) << _TAG_SHIFT | slot
    op["status"] = GNTST_okay


@kernel
def hide(ctx_at: int, slot: int, n: int) -> int:
    """Unmap n slots in a row: 0, or -errno."""
    ctx = _ctx(ctx_at)
    at = ctx["window"] + slot * PAGE_SIZE
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    if mmap(at, n * PAGE_SIZE, PROT_NONE, flags, -1, 0) == at:
        _mark(ctx, slot, n, SLOT_FREE)
        return 0
    # To split a mapping takes one more of them than vm.max_map_count may allow; to empty it takes none.
    result = madvise(at, n * PAGE_SIZE, MADV_DONTNEED)
    _mark(ctx, slot, n, SLOT_LOST)
    return result


@kernel
def _copy_status(ctx_at: int, op_at: int) -> int:
    """What a copy of the page's first byte says of the grant: GNTST_*."""
    ctx = _ctx(ctx_at)
    op = records(op_at, 1, GRANT_OP)[0]
    segment = records(ctx["request"], 1, COPY_SEGMENT)[0]
    segment["source"] = i64(op["gref"]) | (i64(op["domid"]) << 48)
    segment["dest"] = ctx["small"] + _PROBE_AT
    segment["len"], segment["flags"], segment["status"] = 1, GNTCOPY_source_gref, GNTST_general_error
    request = records(ctx["small"], 1, COPY_REQUEST)[0]
    request["count"], request["segments"] = 1, ctx["request"]
    if ioctl(ctx["fd"], IOCTL_GNTDEV_GRANT_COPY, ctx["small"]) < 0:
        return GNTST_general_error
    return i64(segment["status"])


@kernel
def _why(ctx_at: int, op_at: int, readonly: int) -> int:
    """Why one page could not be mapped: GNTST_*. no_space if it is not the grant's fault."""
    ctx = _ctx(ctx_at)
    op = records(op_at, 1, GRANT_OP)[0]
    status = _copy_status(ctx_at, op_at)
    if status != GNTST_okay:
        return status
    if readonly == 0:
        _put_ref(ctx, 0, op, 0)
        slot = _map_refs(ctx_at, 1, 1)
        if slot >= 0:
            hide(ctx_at, slot, 1)
            return GNTST_permission_denied
    return GNTST_no_space


@kernel
def _map_alone(ctx_at: int, op_at: int, readonly: int) -> int:
    """Map one page; its status."""
    ctx = _ctx(ctx_at)
    op = records(op_at, 1, GRANT_OP)[0]
    slot = i64(-1)
    for _ in range(2):  # once more, in case that it was a moment's want
        if slot < 0:
            _put_ref(ctx, 0, op, 0)
            slot = _map_refs(ctx_at, 1, readonly)
    if slot >= 0:
        _mapped(ctx, op, slot)
    else:
        op["status"] = _why(ctx_at, op_at, readonly)
    return i64(op["status"])


@kernel
def _map_together(ctx_at: int, ops: int, count: int, readonly: int) -> int:
    """Map the `count` operations of the request, in one mapping if that can be; how many failed."""
    ctx = _ctx(ctx_at)
    order = records(ctx["order"], ctx["most"], _I4)
    slot = _map_refs(ctx_at, count, readonly) if count == 1 or ctx["single"] == 0 else i64(-1)
    failed = i64(0)
    if slot >= 0:
        for k in range(count):
            _mapped(ctx, _op(ops, i64(order[k])), slot + k)
    else:
        for k in range(count):  # what _map_alone writes to the order is its first, which is behind us
            if _map_alone(ctx_at, ops + i64(order[k]) * _OP_SIZE, readonly) != GNTST_okay:
                failed += 1
    return failed


@kernel
def _map_kind(ctx_at: int, ops: int, n: int, readonly: int) -> int:
    """Map those operations of n that are read only, or those that are not; how many failed."""
    ctx = _ctx(ctx_at)
    failed = i64(0)
    count = i64(0)
    for i in range(n):
        op = _op(ops, i)
        if i64(op["flags"]) & OP_READONLY == readonly:
            op["address"], op["handle"], op["status"] = 0, -1, GNTST_general_error
            _put_ref(ctx, count, op, i)
            count += 1
            if count == TOGETHER:
                failed += _map_together(ctx_at, ops, count, readonly)
                count = i64(0)
    return failed + (_map_together(ctx_at, ops, count, readonly) if count > 0 else i64(0))


@seam_function
def grant_map(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_map: -> how many failed."""
    return _map_kind(ctx_at, ops, n, 0) + _map_kind(ctx_at, ops, n, OP_READONLY)


@inline
def _slot_of(ctx: Any, handle: int) -> int:
    """The slot of a handle, -1 if it is none."""
    slot = handle & 0xFFFF_FFFF
    if handle >> _TAG_SHIFT != HANDLE_TAG or handle >> 32 & 0xFFFF != 0 or slot >= ctx["pages"]:
        return i64(-1)
    if load_acquire32(ctx["state"] + slot * 4) != SLOT_MAPPED:
        return i64(-1)
    return slot


@seam_function
def grant_unmap(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_unmap: -> how many failed. The handle becomes -1, so that a second time is an error."""
    ctx = _ctx(ctx_at)
    failed = i64(0)
    i = i64(0)
    while i < n:
        slot = _slot_of(ctx, i64(_op(ops, i)["handle"]))
        run = i64(1)
        if slot >= 0:
            while i + run < n and _slot_of(ctx, i64(_op(ops, i + run)["handle"])) == slot + run:
                run += 1
        status = i64(GNTST_bad_handle)
        if slot >= 0:
            status = GNTST_okay if hide(ctx_at, slot, run) == 0 else i64(GNTST_general_error)
        for k in range(run):
            op = _op(ops, i + k)
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
    ctx = _ctx(ctx_at)
    request = records(ctx["small"], 1, COPY_REQUEST)[0]
    request["count"], request["segments"] = n, ctx["request"]
    result = ioctl(ctx["fd"], IOCTL_GNTDEV_GRANT_COPY, ctx["small"])
    if result < 0:
        return result
    failed = i64(0)
    order = records(ctx["order"], ctx["most"], _I4)
    for k in range(n):
        status = i64(records(ctx["request"] + k * _SEGMENT_SIZE, 1, COPY_SEGMENT)[0]["status"])
        _op(ops, i64(order[k]))["status"] = status
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
    ctx = _ctx(ctx_at)
    failed = i64(0)
    count = i64(0)
    for i in range(n):
        op = _op(ops, i)
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
        op = _op(ops, i)
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

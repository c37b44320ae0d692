"""The seam functions of grants: batches for the mapper, one grant at a time for the granter.

Signature and meaning are those of SEAM in pvdrivers/platform.py. Contexts are addresses of GRANT_CTX, for the
mapper, and of OFFER_CTX.
"""

from __future__ import annotations

import numpy as np

from pvdrivers.platform import (
    GRANT_OP,
    OP_BETWEEN,
    OP_READONLY,
    OP_TO_GUEST,
    PAGE_SIZE,
    GNTST_bad_copy_arg,
    GNTST_bad_handle,
    GNTST_no_space,
    GNTST_okay,
)
from rings.atomics import (
    compare_exchange16,
    copy_bytes,
    load32,
    load_once16,
    prefetch,
    prefetch_to_write,
    records,
    store32,
    store_release32,
)
from rings.jit import inline, seam_function

from .grant_kernels import (
    ENTRY_SIZE,
    FOREIGN,
    GRANT_CTX,
    HANDLE_TAG,
    MOST_FOREIGN,
    PAGE_SHIFT,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
    GTF_writing,
    foreign_at,
    hide,
    leave_handle,
    page_of,
    pin,
    pin_op,
    show,
    slot_of,
    take_handle,
    unpin,
)

OP_SIZE = GRANT_OP.itemsize
_EBUSY, _EINVAL = 16, 22
_LINE, _LINES = 64, 4
_LONG = 2048  # bytes of a copy that is slower for it: the processor asks early enough by itself
_TOGETHER = 32  # copies

OFFER_CTX = np.dtype(
    [
        ("grants", "i8"),  # our own grant table
        ("entries", "i8"),
        ("pages", "i8"),  # size of our memory
    ],
    align=True,
)
"""What a granter knows of itself."""


@inline
def map_one(ctx_at: int, ctx, op) -> None:  # type: ignore[no-untyped-def]
    """Pin a page and say where it is; in strict mode it becomes accessible there."""
    op["address"] = 0
    readonly = np.int64(op["flags"]) & OP_READONLY
    if not take_handle(ctx_at, ctx):
        op["handle"] = -1
        op["status"] = GNTST_no_space
        return
    slot = pin_op(ctx, op, readonly)
    if slot < 0:
        leave_handle(ctx_at, ctx)
        return
    f = records(foreign_at(ctx, slot), 1, FOREIGN)[0]
    gref = np.int64(op["gref"])
    frame = np.int64(load32(f["frames"] + gref * 4))
    if ctx["strict"] != 0:
        if show(ctx_at, f, frame, readonly) < 0:
            unpin(ctx, f, gref, readonly)
            leave_handle(ctx_at, ctx)
            op["handle"] = -1
            op["status"] = GNTST_no_space
            return
    window = f["ro"] if readonly != 0 else f["rw"]
    op["address"] = window + (frame << PAGE_SHIFT)


@inline
def unmap_handle(ctx_at: int, ctx, handle: int, windows: int) -> int:  # type: ignore[no-untyped-def]
    """Undo a map (`windows` 1) or a pin (0). Returns GNTST_*."""
    slot = (handle >> 33) & 0x7FFF
    gref = handle & 0xFFFF_FFFF
    readonly = (handle >> 32) & 1
    if handle >> 48 != HANDLE_TAG or slot >= MOST_FOREIGN:
        return GNTST_bad_handle
    f = records(foreign_at(ctx, slot), 1, FOREIGN)[0]
    if gref >= f["entries"]:
        return GNTST_bad_handle
    frame = np.int64(load32(f["frames"] + gref * 4))
    status = unpin(ctx, f, gref, readonly)
    if status == GNTST_okay and windows != 0:
        leave_handle(ctx_at, ctx)
        if ctx["strict"] != 0:
            hide(ctx_at, f, frame, readonly)
    return status


@inline
def _bytes_at(ctx, slot: int, gref: int, offset: int) -> int:  # type: ignore[no-untyped-def]
    """Where the bytes of a pinned page are."""
    f = records(foreign_at(ctx, slot), 1, FOREIGN)[0]
    return f["alias"] + (np.int64(load32(f["frames"] + gref * 4)) << PAGE_SHIFT) + offset


@inline
def _pin_page(ctx, domid: int, gref: int, offset: int, length: int, readonly: int) -> int:  # type: ignore[no-untyped-def]
    """Pin the page of one side of a copy, and have the first lines of a short one brought here. GNTST_*."""
    slot = page_of(ctx, domid, gref)
    if slot < 0:
        return slot
    status = pin(ctx, records(foreign_at(ctx, slot), 1, FOREIGN)[0], gref, readonly)
    if status == GNTST_okay and length < _LONG:
        at = _bytes_at(ctx, slot, gref, offset)
        for k in range(min((length + _LINE - 1) // _LINE, _LINES)):
            if readonly != 0:
                prefetch(at + k * _LINE)
            else:
                prefetch_to_write(at + k * _LINE)
    return status


@inline
def _unpin_page(ctx, domid: int, gref: int, readonly: int) -> None:  # type: ignore[no-untyped-def]
    unpin(ctx, records(foreign_at(ctx, slot_of(ctx, domid)), 1, FOREIGN)[0], gref, readonly)


@inline
def _page_at(ctx, domid: int, gref: int, offset: int) -> int:  # type: ignore[no-untyped-def]
    """Where bytes of a page are that is pinned."""
    return _bytes_at(ctx, slot_of(ctx, domid), gref, offset)


@inline
def _pin_both(ctx, op) -> None:  # type: ignore[no-untyped-def]
    """Pin what a copy is from and to: OP.status. Nothing is pinned if that is no GNTST_okay."""
    readonly = 1 if np.int64(op["flags"]) & OP_TO_GUEST == 0 else 0
    domid, gref = np.int64(op["domid"]), np.int64(op["gref"])
    offset, length = np.int64(op["offset"]), np.int64(op["length"])
    other = op["address"]
    between = np.int64(op["flags"]) & OP_BETWEEN != 0
    if offset + length > PAGE_SIZE or (between and (other >> 32 & 0xFFFF) + length > PAGE_SIZE):
        op["status"] = GNTST_bad_copy_arg
        return
    status = _pin_page(ctx, domid, gref, offset, length, readonly)
    if status == GNTST_okay and between:
        status = _pin_page(
            ctx, other >> 48 & 0xFFFF, other & 0xFFFF_FFFF, other >> 32 & 0xFFFF, length, 1 - readonly
        )  # fmt: skip
        if status != GNTST_okay:
            _unpin_page(ctx, domid, gref, readonly)
    op["status"] = status


@inline
def _copy(ctx, op) -> None:  # type: ignore[no-untyped-def]
    """The copy of an op whose pages are pinned."""
    here = _page_at(ctx, np.int64(op["domid"]), np.int64(op["gref"]), np.int64(op["offset"]))
    there = op["address"]
    if np.int64(op["flags"]) & OP_BETWEEN != 0:
        there = _page_at(ctx, there >> 48 & 0xFFFF, there & 0xFFFF_FFFF, there >> 32 & 0xFFFF)
    if np.int64(op["flags"]) & OP_TO_GUEST != 0:
        copy_bytes(here, there, np.int64(op["length"]))
    else:
        copy_bytes(there, here, np.int64(op["length"]))


@inline
def _unpin_both(ctx, op) -> None:  # type: ignore[no-untyped-def]
    readonly = 1 if np.int64(op["flags"]) & OP_TO_GUEST == 0 else 0
    _unpin_page(ctx, np.int64(op["domid"]), np.int64(op["gref"]), readonly)
    if np.int64(op["flags"]) & OP_BETWEEN != 0:
        _unpin_page(ctx, op["address"] >> 48 & 0xFFFF, op["address"] & 0xFFFF_FFFF, 1 - readonly)


@seam_function
def grant_map(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_map: -> how many failed."""
    ctx = records(ctx_at, 1, GRANT_CTX)[0]
    failed = 0
    for i in range(n):
        op = records(ops + i * OP_SIZE, 1, GRANT_OP)[0]
        map_one(ctx_at, ctx, op)
        if op["status"] != GNTST_okay:
            failed += 1
    return failed


@seam_function
def grant_unmap(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_unmap: -> how many failed. The handle becomes -1, so that a second time is an error."""
    ctx = records(ctx_at, 1, GRANT_CTX)[0]
    failed = 0
    for i in range(n):
        op = records(ops + i * OP_SIZE, 1, GRANT_OP)[0]
        status = unmap_handle(ctx_at, ctx, op["handle"], 1)
        op["status"] = status
        op["handle"] = -1
        if status != GNTST_okay:
            failed += 1
    return failed


@seam_function
def grant_copy(ctx_at: int, ops: int, n: int, c: int) -> int:
    """SEAM.grant_copy: -> how many failed. A copy out of a page needs no permission to write.

    Some at a time: pin, copy, unpin. A locked instruction waits until all that was stored before it has arrived, so
    between two copies it would have the second wait for the first. What other cores have written is asked for early.
    """
    ctx = records(ctx_at, 1, GRANT_CTX)[0]
    failed = 0
    for first in range(0, n, _TOGETHER):
        last = min(first + _TOGETHER, n)
        for i in range(first, last):
            _pin_both(ctx, records(ops + i * OP_SIZE, 1, GRANT_OP)[0])
        for i in range(first, last):
            op = records(ops + i * OP_SIZE, 1, GRANT_OP)[0]
            if op["status"] == GNTST_okay:
                _copy(ctx, op)
        for i in range(first, last):
            op = records(ops + i * OP_SIZE, 1, GRANT_OP)[0]
            if op["status"] == GNTST_okay:
                _unpin_both(ctx, op)
            else:
                failed += 1
    return failed


@seam_function
def grant_pin(ctx_at: int, ops: int, n: int, c: int) -> int:
    """Pin without a window: `address` becomes the frame. For the Python seam, which maps side by side."""
    ctx = records(ctx_at, 1, GRANT_CTX)[0]
    failed = 0
    for i in range(n):
        op = records(ops + i * OP_SIZE, 1, GRANT_OP)[0]
        slot = pin_op(ctx, op, np.int64(op["flags"]) & OP_READONLY)
        if slot < 0:
            failed += 1
        else:
            f = records(foreign_at(ctx, slot), 1, FOREIGN)[0]
            op["address"] = np.int64(load32(f["frames"] + np.int64(op["gref"]) * 4))
    return failed


@seam_function
def grant_unpin(ctx_at: int, ops: int, n: int, c: int) -> int:
    """Undo grant_pin: -> how many failed."""
    ctx = records(ctx_at, 1, GRANT_CTX)[0]
    failed = 0
    for i in range(n):
        op = records(ops + i * OP_SIZE, 1, GRANT_OP)[0]
        status = unmap_handle(ctx_at, ctx, op["handle"], 0)
        op["status"] = status
        op["handle"] = -1
        if status != GNTST_okay:
            failed += 1
    return failed


@seam_function
def offer_grant(ctx_at: int, gref: int, frame: int, to: int) -> int:
    """SEAM.offer_grant: `to` is domid | readonly << 16. 0, -EINVAL, or -EBUSY while the entry is mapped."""
    ctx = records(ctx_at, 1, OFFER_CTX)[0]
    if gref < 0 or gref >= ctx["entries"] or frame < 0 or frame >= ctx["pages"]:
        return -_EINVAL
    entry = ctx["grants"] + gref * ENTRY_SIZE
    if np.int64(load_once16(entry)) & (GTF_reading | GTF_writing) != 0:
        return -_EBUSY
    flags = GTF_permit_access
    if (to >> 16) & 1 != 0:
        flags |= GTF_readonly
    store32(entry + 4, frame)
    # Pairs with load_acquire32 in claim_entry(): who sees the flags sees the frame.
    store_release32(entry, flags | (to & 0xFFFF) << 16)
    return 0


@seam_function
def offer_end(ctx_at: int, gref: int, b: int, c: int) -> int:
    """SEAM.offer_end: 0, or -EBUSY while it is mapped. Linux, gnttab_end_foreign_access_ref_v1."""
    ctx = records(ctx_at, 1, OFFER_CTX)[0]
    if gref < 0 or gref >= ctx["entries"]:
        return -_EINVAL
    entry = ctx["grants"] + gref * ENTRY_SIZE
    for _ in range(1000):
        flags = np.int64(load_once16(entry))
        if flags & (GTF_reading | GTF_writing) != 0:
            return -_EBUSY
        if np.int64(compare_exchange16(entry, flags, 0)) == flags:
            return 0
    return -_EBUSY

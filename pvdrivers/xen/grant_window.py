"""A window of address space that pages of guests are mapped into by gntdev, and nothing else ever is.

    map     MAP_GRANT_REF, mmap, UNMAP_GRANT_REF: the last only has gntdev forget the index; the mapping keeps the
            grants (drivers/xen/gntdev.c: the vma holds a reference), so that an unmap is one call on the address
    unmap   mmap of nothing over a run of pages that are side by side

A process has at most vm.max_map_count mappings. Of pages of a guest it takes two each at worst, one being the hole
beside it. At that limit any of these calls may fail, and what is there afterwards is found out by _left and find_run:
slots that could not be used then can be when there is room again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import GRANT_OP, PAGE_SIZE
from pvdrivers.syscalls import (
    EEXIST,
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
    is_mapped,
    is_readable,
    madvise,
    mmap,
    munmap,
)
from rings.atomics import i64, load_acquire32, records, store_release32
from rings.jit import inline, kernel

from .devices import (
    IOCTL_GNTDEV_MAP_GRANT_REF,
    IOCTL_GNTDEV_UNMAP_GRANT_REF,
    MAP_REF,
    MAP_REQUEST,
    UNMAP_REQUEST,
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
SLOT_FREE, SLOT_MAPPED, SLOT_LOST, SLOT_TAKEN, SLOT_HOLE = 0, 1, 2, 3, 4
"""Lost: it could not be unmapped yet. Hole: nothing was there, and it could not be reserved anew yet, so that by now
memory of somebody else may be there. Taken: it is. Only what is reserved is free, for we map over it (MAP_FIXED)."""
TOGETHER = 256
"""Pages in one mapping, at the most. One that has all addresses of a huge page in it (512 pages, aligned) must never be
unmapped in part: Linux first splits the huge page that might be there, and tells of all of its addresses
(mm/huge_memory.c: vma_adjust_trans_huge, __split_huge_pmd), whereupon gntdev unmaps all grants there, under way or not
(drivers/xen/gntdev.c: gntdev_invalidate). Traced in Linux 6.1: writes of other requests ended with EFAULT."""
HANDLE_TAG = 0x5B
TAG_SHIFT = 48
_OP_SIZE = GRANT_OP.itemsize
_HEAD = MAP_REQUEST.itemsize
_REF_SIZE = MAP_REF.itemsize


@inline
def op_of(ops: int, i: int) -> Any:
    """A GRANT_OP of a batch."""
    return records(ops + i * _OP_SIZE, 1, GRANT_OP)[0]


@inline
def ctx_of(at: int) -> Any:
    """The GRANT_CTX there."""
    return records(at, 1, GRANT_CTX)[0]


@inline
def _mark(ctx: Any, slot: int, n: int, state: int) -> None:
    for i in range(n):
        store_release32(ctx["state"] + (slot + i) * 4, state)


@inline
def _reserve(at: int, n: int, fixed: int) -> int:
    """Have n pages be address space without access: `at`, or -errno."""
    return mmap(at, n * PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0)


@kernel
def _clear(at: int, n: int) -> int:
    """Have nothing but the reservation at n pages of ours: the state that their slots are in then."""
    if _reserve(at, n, MAP_FIXED) == at:
        return SLOT_FREE
    # With one mapping more than vm.max_map_count, as Linux lets it come to, it maps nothing any more, not even where
    # that makes them fewer; but it unmaps what need not be split.
    if munmap(at, n * PAGE_SIZE) != 0:
        return SLOT_LOST
    return SLOT_FREE if _reserve(at, n, MAP_FIXED_NOREPLACE) == at else SLOT_HOLE


@kernel
def _again(at: int, state: int) -> int:
    """The state of a slot that was lost or a hole when we last looked."""
    if state == SLOT_LOST:
        return _clear(at, 1)
    result = _reserve(at, 1, MAP_FIXED_NOREPLACE)
    if result == at:
        return SLOT_FREE
    return SLOT_TAKEN if result == -EEXIST else SLOT_HOLE


@kernel
def find_run(ctx_at: int, n: int) -> int:
    """The first of `n` free slots in a row, next fit; -1 if there is no such run."""
    ctx = ctx_of(ctx_at)
    at = i64(ctx["cursor"])
    run = i64(0)
    hope = True  # one that is not to be had yet tells of the others: a call for each would be many
    for _ in range(ctx["pages"] + n):
        if at >= ctx["pages"]:
            at = i64(0)
            run = i64(0)
        # Acquire: who sees a slot free sees it unmapped, by whatever thread.
        state = i64(load_acquire32(ctx["state"] + at * 4))
        if hope and (state == SLOT_LOST or state == SLOT_HOLE):
            state = i64(_again(ctx["window"] + at * PAGE_SIZE, state))
            _mark(ctx, at, 1, state)
            hope = state == SLOT_FREE
        if state == SLOT_FREE:
            run += 1
        else:
            run = i64(0)
        at += 1
        if run == n:
            ctx["cursor"] = at
            return at - n
    return i64(-1)


@inline
def put_ref(ctx: Any, k: int, op: Any) -> None:
    """Have the k-th ref of the request be that of `op`."""
    ref = records(ctx["request"] + _HEAD + k * _REF_SIZE, 1, MAP_REF)[0]
    ref["domid"], ref["ref"] = op["domid"], op["gref"]


@kernel
def _left(at: int, result: int) -> int:
    """The state of a free slot after a mapping over it has failed with this result, and it could not be reserved anew.

    Where gntdev refuses, Linux has taken away the reservation before: a hole, or somebody else has been given that
    address meanwhile, and it is theirs for good. But with too many mappings Linux itself refuses, and has taken nothing
    away. That is ENOMEM, as is want of memory later on: then what can be read is not ours.
    """
    if not is_mapped(at, PAGE_SIZE):
        return SLOT_HOLE
    return SLOT_FREE if result == -ENOMEM and not is_readable(at) else SLOT_TAKEN


@kernel
def map_refs(ctx_at: int, n: int, readonly: int) -> int:
    """Map the n refs of the request side by side: the first slot, or -errno with nothing mapped."""
    ctx = ctx_of(ctx_at)
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
    if _reserve(at, n, MAP_FIXED_NOREPLACE) != at:
        for k in range(n):
            _mark(ctx, slot + k, 1, _left(at + k * PAGE_SIZE, result))
    return result


@kernel
def hide(ctx_at: int, slot: int, n: int) -> int:
    """Unmap n slots in a row: 0, or -errno."""
    ctx = ctx_of(ctx_at)
    at = ctx["window"] + slot * PAGE_SIZE
    state = _clear(at, n)
    # What cannot be taken away, as it is a part of a mapping, can be emptied.
    result = madvise(at, n * PAGE_SIZE, MADV_DONTNEED) if state == SLOT_LOST else i64(0)
    _mark(ctx, slot, n, state)
    return result

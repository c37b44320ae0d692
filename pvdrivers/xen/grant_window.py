"""A window of address space that pages of guests are mapped into by gntdev, and nothing else ever is.

    map     MAP_GRANT_REF, mmap, UNMAP_GRANT_REF: the last only has gntdev forget the index; the mapping keeps the
            grants (drivers/xen/gntdev.c: the vma holds a reference), so that an unmap is one call on the address
    unmap   mmap of nothing over a run of pages that are side by side
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import GRANT_OP, PAGE_SIZE
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
SLOT_FREE, SLOT_MAPPED, SLOT_LOST, SLOT_TAKEN = 0, 1, 2, 3
"""Lost: it cannot be unmapped. Taken: somebody else's memory is there by now."""
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


@kernel
def find_run(ctx_at: int, n: int) -> int:
    """The first of `n` free slots in a row, next fit; -1 if there is no such run."""
    ctx = ctx_of(ctx_at)
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
def put_ref(ctx: Any, k: int, op: Any) -> None:
    """Have the k-th ref of the request be that of `op`."""
    ref = records(ctx["request"] + _HEAD + k * _REF_SIZE, 1, MAP_REF)[0]
    ref["domid"], ref["ref"] = op["domid"], op["gref"]


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
    # The kernel took away what was there before it found that it could not map: close the hole, unless somebody else
    # has been given that address meanwhile. Then it is theirs for good.
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    if mmap(at, n * PAGE_SIZE, PROT_NONE, flags, -1, 0) != at:
        _mark(ctx, slot, n, SLOT_TAKEN)
    return result


@kernel
def hide(ctx_at: int, slot: int, n: int) -> int:
    """Unmap n slots in a row: 0, or -errno."""
    ctx = ctx_of(ctx_at)
    at = ctx["window"] + slot * PAGE_SIZE
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    if mmap(at, n * PAGE_SIZE, PROT_NONE, flags, -1, 0) == at:
        _mark(ctx, slot, n, SLOT_FREE)
        return 0
    # To split a mapping takes one more of them than vm.max_map_count may allow; to empty it takes none.
    result = madvise(at, n * PAGE_SIZE, MADV_DONTNEED)
    _mark(ctx, slot, n, SLOT_LOST)
    return result

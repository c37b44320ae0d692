"""Grants at the speed of memory: pin and unpin. grant_seam.py has the batches built of them.

The granting domain's table holds the version-1 entries of xen/include/public/grant_table.h. Beside it is the
active table (wire.py, ACTIVE_*), which the granting domain cannot reach: who has a gref mapped, and how often.
A mapper pins in this order, so that whatever it has done when it dies can be undone by its owner field alone:

    active word: 0 -> owner | BUSY            nobody else may touch entry and word now
    entry:       flags |= GTF_reading [| GTF_writing], if it lets us in
    active word: owner | counts               release: the entry is set before the count is seen
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pvdrivers.platform import (
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_bad_handle,
    GNTST_bad_page,
    GNTST_eagain,
    GNTST_general_error,
    GNTST_no_space,
    GNTST_okay,
)
from pvdrivers.syscalls import PROT_NONE, PROT_READ, PROT_READ_WRITE, mprotect, sched_yield
from rings.atomics import (
    compare_exchange32,
    compare_exchange64,
    fetch_add64,
    fetch_and16,
    load16,
    load32,
    load_acquire32,
    load_acquire64,
    pause,
    records,
    store32,
    store_release32,
    store_release64,
)
from rings.jit import inline

i64: Any = np.int64  # makes small unsigned numbers safe to calculate with, compiled or not

# grant_table.h
GTF_type_mask = 3
GTF_permit_access = 1
GTF_readonly = 1 << 2
GTF_reading = 1 << 3
GTF_writing = 1 << 4
GTF_sub_page = 1 << 8

ENTRY_SIZE = 8  # grant_entry_v1: u16 flags, u16 domid, u32 frame
PAGE_SHIFT = 12
DOMIDS = 32768  # the domids below DOMID_FIRST_RESERVED, rounded up
MOST_FOREIGN = 1024

# The active word, see wire.py.
_WRITER_SHIFT = 16
_WRITER = 1 << _WRITER_SHIFT
_COUNTS = 0xFFFF_FFFF
_BUSY = 1 << 62
# A holder of BUSY has some nanoseconds of work left, unless its core was taken away in the middle of it.
_TRIES = 1_000_000
_TRIES_BEFORE_YIELD = 256

HANDLE_TAG = 0x5A

FOREIGN = np.dtype(
    [
        ("grants", "i8"),  # the domain's grant table
        ("active", "i8"),
        ("entries", "i8"),  # grefs in both; 0: this record is not in use
        ("pages", "i8"),  # size of its memory
        ("frames", "i8"),  # u32 for each gref, ours: the frame that was pinned
        ("rw", "i8"),  # its memory, for writable maps
        ("ro", "i8"),  # its memory, for read-only maps
        ("alias", "i8"),  # its memory, for copies; the same as rw unless strict
        ("shown", "i8"),  # strict: two u32 for each frame, how often it is shown in rw and in ro
    ],
    align=True,
)
"""What a mapper knows of a granting domain: addresses in its own space."""
FOREIGN_SIZE = FOREIGN.itemsize

GRANT_CTX = np.dtype(
    [
        ("owner", "i8"),  # handle id << 32, as in the active word
        ("domid", "i8"),  # the domid that entries must name
        ("strict", "i8"),
        ("slots", "i8"),  # u16 for each domid: 1 + index of its FOREIGN record, or 0
        ("foreign", "i8"),  # MOST_FOREIGN records
        ("lock", "i8"),  # strict: held while `shown` and the page protections change
        ("limit", "i8"),  # tests: pages that may be mapped at once, as Xen's maptrack limits it; 0 any number
        ("live", "i8"),  # ... and are, by the JIT seam
    ],
    align=True,
)


@inline
def take(at: int, owner: int) -> int:
    """Make the active word at an address ours and BUSY. Returns its counts, or -1 if it is another handle's."""
    for i in range(_TRIES):
        word = load_acquire64(at)
        if word != 0 and (word & ~(_COUNTS | _BUSY)) != owner:
            return -1
        if word & _BUSY == 0:
            if compare_exchange64(at, word, word & _COUNTS | owner | _BUSY) == word:
                return word & _COUNTS
        pause()
        if i % _TRIES_BEFORE_YIELD == _TRIES_BEFORE_YIELD - 1:
            sched_yield()
    return -1


@inline
def leave(at: int, owner: int, counts: int) -> None:
    """Store new counts and end BUSY."""
    # Pairs with load_acquire64 in take(): what was done to the entry is seen before the word is free.
    if counts == 0:
        store_release64(at, 0)
    else:
        store_release64(at, owner | counts)


@inline
def claim_entry(entry: int, domid: int, readonly: int) -> int:
    """Set GTF_reading or GTF_reading|GTF_writing in an entry that lets `domid` in; GNTST_okay or general_error.

    xen/common/grant_table.c, _set_status_v1: tried five times while the granting domain changes the entry.
    """
    for _ in range(5):
        word = i64(load_acquire32(entry))  # pairs with store_release32 in offer(): the frame is there
        if word & (GTF_type_mask | GTF_sub_page) != GTF_permit_access or word >> 16 != domid:
            return GNTST_general_error
        use = GTF_reading
        if readonly == 0:
            if word & GTF_readonly != 0:
                return GNTST_general_error
            use = GTF_reading | GTF_writing
        if i64(compare_exchange32(entry, word, word | use)) == word:
            return GNTST_okay
    return GNTST_general_error


@inline
def hold(ctx, f, gref: int, readonly: int) -> int:  # type: ignore[no-untyped-def]
    """Take hold of the page behind a gref, whose active word stays BUSY until let_go(); its frame is then in
    f['frames']. Returns the counts for let_go(), or GNTST_*, which is below 0.

    Who holds one may not wait for another: two workers that copy to and fro would wait for each other.
    """
    at = f["active"] + gref * 8
    counts = take(at, ctx["owner"])
    if counts < 0:
        return GNTST_eagain
    if counts != 0 and (readonly != 0 or counts >= _WRITER):
        return counts
    entry = f["grants"] + gref * ENTRY_SIZE
    status = claim_entry(entry, ctx["domid"], readonly)
    if status == GNTST_okay and counts == 0:
        frame = i64(load32(entry + 4))
        if frame >= f["pages"]:
            fetch_and16(entry, 0xFFFF ^ (GTF_reading | GTF_writing))
            status = GNTST_bad_page
        else:
            store32(f["frames"] + gref * 4, frame)
    if status != GNTST_okay:
        leave(at, ctx["owner"], counts)
        return status
    return counts


@inline
def let_go(ctx, f, gref: int, readonly: int, counts: int) -> None:  # type: ignore[no-untyped-def]
    """End hold(), as far as those that are left in `counts` do not need it."""
    done = 0
    if readonly == 0 and counts < _WRITER:
        done |= GTF_writing
    if counts == 0:
        done |= GTF_reading
    if done != 0:
        fetch_and16(f["grants"] + gref * ENTRY_SIZE, 0xFFFF ^ done)
    leave(f["active"] + gref * 8, ctx["owner"], counts)


@inline
def pin(ctx, f, gref: int, readonly: int) -> int:  # type: ignore[no-untyped-def]
    """Take hold of the page behind a gref; its frame is then in f['frames']. GNTST_*."""
    counts = hold(ctx, f, gref, readonly)
    if counts < 0:
        return counts
    shift = 0 if readonly != 0 else _WRITER_SHIFT
    if (counts >> shift) & 0xFFFF == 0xFFFF:
        leave(f["active"] + gref * 8, ctx["owner"], counts)
        return GNTST_no_space
    leave(f["active"] + gref * 8, ctx["owner"], counts + (1 << shift))
    return GNTST_okay


@inline
def unpin(ctx, f, gref: int, readonly: int) -> int:  # type: ignore[no-untyped-def]
    """Let go of a page. GNTST_okay, or GNTST_bad_handle if it was not pinned in this way by us."""
    at = f["active"] + gref * 8
    owner = ctx["owner"]
    counts = take(at, owner)
    if counts < 0:
        return GNTST_bad_handle
    shift = 0 if readonly != 0 else _WRITER_SHIFT
    if (counts >> shift) & 0xFFFF == 0:
        leave(at, owner, counts)
        return GNTST_bad_handle
    let_go(ctx, f, gref, readonly, counts - (1 << shift))
    return GNTST_okay


_LOCK_OFFSET: int = GRANT_CTX.fields["lock"][1]  # type: ignore[index]
_LIVE_OFFSET: int = GRANT_CTX.fields["live"][1]  # type: ignore[index]


@inline
def take_handle(ctx_at: int, ctx) -> bool:  # type: ignore[no-untyped-def]
    """Room for one mapping more; only where a test has set a limit is there ever none."""
    if ctx["limit"] == 0:
        return True
    if i64(fetch_add64(ctx_at + _LIVE_OFFSET, 1)) < ctx["limit"]:
        return True
    fetch_add64(ctx_at + _LIVE_OFFSET, -1)
    return False


@inline
def leave_handle(ctx_at: int, ctx) -> None:  # type: ignore[no-untyped-def]
    """One mapping less."""
    if ctx["limit"] != 0:
        fetch_add64(ctx_at + _LIVE_OFFSET, -1)


@inline
def _lock(ctx_at: int) -> None:
    at = ctx_at + _LOCK_OFFSET
    while i64(compare_exchange32(at, 0, 1)) != 0:
        pause()


@inline
def _unlock(ctx_at: int) -> None:
    store_release32(ctx_at + _LOCK_OFFSET, 0)


@inline
def show(ctx_at: int, f, frame: int, readonly: int) -> int:  # type: ignore[no-untyped-def]
    """Strict mode: make a page of a window accessible. 0 or -errno."""
    count_at = f["shown"] + frame * 8 + (4 if readonly != 0 else 0)
    window = f["ro"] if readonly != 0 else f["rw"]
    _lock(ctx_at)
    result = i64(0)
    shown = i64(load32(count_at))
    if shown == 0:
        result = mprotect(window + (frame << PAGE_SHIFT), 1 << PAGE_SHIFT,
                          PROT_READ if readonly != 0 else PROT_READ_WRITE)  # fmt: skip
    if result == 0:
        store32(count_at, shown + 1)
    _unlock(ctx_at)
    return result


@inline
def hide(ctx_at: int, f, frame: int, readonly: int) -> None:  # type: ignore[no-untyped-def]
    """Strict mode: the last unmap of a page takes the access away, so that a later use faults."""
    count_at = f["shown"] + frame * 8 + (4 if readonly != 0 else 0)
    window = f["ro"] if readonly != 0 else f["rw"]
    _lock(ctx_at)
    shown = i64(load32(count_at)) - 1
    if shown == 0:
        mprotect(window + (frame << PAGE_SHIFT), 1 << PAGE_SHIFT, PROT_NONE)
    store32(count_at, shown)
    _unlock(ctx_at)


@inline
def slot_of(ctx, domid: int) -> int:  # type: ignore[no-untyped-def]
    """The index of a domain's FOREIGN record, -1 if it was not prepared."""
    if domid >= DOMIDS:
        return -1
    return i64(load16(ctx["slots"] + domid * 2)) - 1


@inline
def foreign_at(ctx, slot: int) -> int:  # type: ignore[no-untyped-def]
    """The address of a FOREIGN record."""
    return ctx["foreign"] + slot * FOREIGN_SIZE


@inline
def page_of(ctx, domid: int, gref: int) -> int:  # type: ignore[no-untyped-def]
    """The slot of the domain that a page is of; GNTST_*, which is below 0, if there is no such page."""
    slot = slot_of(ctx, domid)
    if slot < 0:
        return GNTST_bad_domain
    return slot if gref < records(foreign_at(ctx, slot), 1, FOREIGN)[0]["entries"] else GNTST_bad_gntref


@inline
def pin_op(ctx, op, readonly: int) -> int:  # type: ignore[no-untyped-def]
    """pin() for one GRANT_OP: fills in handle and status. Returns the slot, or -1."""
    gref = i64(op["gref"])
    op["handle"] = -1
    slot = page_of(ctx, i64(op["domid"]), gref)
    op["status"] = slot
    if slot >= 0:
        op["status"] = pin(ctx, records(foreign_at(ctx, slot), 1, FOREIGN)[0], gref, readonly)
    if op["status"] < 0:
        return -1
    op["handle"] = (HANDLE_TAG << 48) | (slot << 33) | (readonly << 32) | gref
    return slot

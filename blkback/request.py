"""Bytes from a guest -> a checked plan. Pure: no memory but its arguments, no I/O, total over arbitrary bytes.

Every rule of blkif.h that a frontend can break stands here and nowhere else. Works on private copies only, in the
native layout. What a plan says has been checked; nothing behind it looks at the guest's bytes again.

Follows Linux (drivers/block/xen-blkback/blkback.c: dispatch_rw_block_io, xen_blkbk_parse_indirect,
dispatch_discard_io) where implementations differ:

    an operation that is not known, or not offered       EOPNOTSUPP
    no segments, but for a flush or a barrier            ERROR
    more segments than offered                           ERROR
    last_sect < first_sect, or beyond the page           ERROR
    a write to a read-only disk                          ERROR
    beyond the end of the disk, or wrapping              ERROR
    not a multiple of the logical sector size            ERROR
"""

from __future__ import annotations

from pvdrivers.worker.records import SEGMENT
from rings.atomics import i64, records
from rings.blkif import (
    DISCARD_64,
    DISCARD_SECURE,
    INDIRECT_64,
    MAX_SEGMENTS,
    OP_DISCARD,
    OP_FLUSH_DISKCACHE,
    OP_INDIRECT,
    OP_READ,
    OP_WRITE,
    OP_WRITE_BARRIER,
    REQUEST_64,
    RSP_EOPNOTSUPP,
    RSP_ERROR,
    RSP_OKAY,
    SECTORS_PER_PAGE,
)
from rings.blkif import SEGMENT as WIRE_SEGMENT
from rings.bounds import in_range
from rings.jit import inline, kernel

from .records import (
    K_BARRIER,
    K_DISCARD,
    K_FLUSH,
    K_READ,
    K_REJECT,
    K_SECURE,
    K_WRITE,
    blk_at,
    disk_at,
)

_SEGMENT_SIZE = SEGMENT.itemsize


@inline
def _reject(qa: int, status: int) -> None:
    blk = blk_at(qa)
    blk["kind"] = K_REJECT
    blk["status"] = status


@inline
def _kind_of(operation: int) -> int:
    if operation == OP_READ:
        return K_READ
    if operation == OP_WRITE:
        return K_WRITE
    if operation == OP_FLUSH_DISKCACHE:
        return K_FLUSH
    if operation == OP_WRITE_BARRIER:
        return K_BARRIER
    return K_REJECT


@inline
def _scaled(value: int, shift: int) -> int:
    """Units of the frontend as 512-byte units; -1 for what is absurd in either."""
    value = i64(value)
    if value < 0 or value > (i64(1) << (62 - shift)):
        return i64(-1)
    return value << shift


@kernel
def check_segments(qa: int, da: int, wire: int, nseg: int, segs: int) -> int:
    """Check `nseg` wire segments (a private copy at `wire`, which may be `segs` itself) against disk and sector.

    Fills SEGMENT[nseg] at `segs`, and nr_sectors. Returns nseg, or -1 after rejecting the request.
    """
    blk = blk_at(qa)
    disk = disk_at(da)
    shift = disk["unit_shift"]
    last_unit = (SECTORS_PER_PAGE >> shift) - 1
    total = i64(0)
    misaligned = i64(0)
    for k in range(nseg):
        seg = records(wire + k * _SEGMENT_SIZE, 1, WIRE_SEGMENT)[0]
        gref, first, last = i64(seg["gref"]), i64(seg["first_sect"]), i64(seg["last_sect"])
        if last > last_unit or first > last:  # or we would read beyond the guest's page
            _reject(qa, RSP_ERROR)
            return -1
        units = (last - first + 1) << shift
        out = records(segs + k * _SEGMENT_SIZE, 1, SEGMENT)[0]
        out["gref"] = gref
        out["offset"] = (first << shift) << 9
        out["length"] = units << 9
        misaligned |= units & disk["sector_mask"]
        total += units
    if not in_range(blk["sector"], total, disk["sectors"]):
        _reject(qa, RSP_ERROR)
        return -1
    if nseg > 0 and (misaligned | (blk["sector"] & disk["sector_mask"])) != 0:
        _reject(qa, RSP_ERROR)
        return -1
    blk["nr_sectors"] = total
    return nseg


@inline
def _plan_discard(request: int, qa: int, da: int) -> None:
    """struct blkif_request_discard. The secure flag is "ignored if discard-secure=0"."""
    blk = blk_at(qa)
    disk = disk_at(da)
    d = records(request, 1, DISCARD_64)[0]
    blk["operation"] = OP_DISCARD
    blk["sector"] = _scaled(i64(d["sector_number"]), disk["unit_shift"])
    blk["nr_sectors"] = _scaled(i64(d["nr_sectors"]), disk["unit_shift"])
    if disk["can_discard"] == 0:
        _reject(qa, RSP_EOPNOTSUPP)
    elif (
        disk["readonly"] != 0
        or not in_range(blk["sector"], blk["nr_sectors"], disk["sectors"])
        or ((blk["sector"] | blk["nr_sectors"]) & disk["sector_mask"]) != 0
    ):
        _reject(qa, RSP_ERROR)
    elif disk["can_secure"] != 0 and i64(d["flag"]) & DISCARD_SECURE != 0:
        blk["kind"] = K_SECURE
    else:
        blk["kind"] = K_DISCARD


@inline
def _plan_indirect(request: int, qa: int, da: int) -> int:
    """struct blkif_request_indirect: what can be checked before its pages are here. Returns -1, or 0 if rejected."""
    blk = blk_at(qa)
    disk = disk_at(da)
    r = records(request, 1, INDIRECT_64)[0]
    inner = i64(r["indirect_op"])
    nseg = i64(r["nr_segments"])
    blk["operation"] = inner
    blk["sector"] = _scaled(i64(r["sector_number"]), disk["unit_shift"])
    if disk["max_segments"] == 0:
        _reject(qa, RSP_EOPNOTSUPP)
    elif (
        (inner != OP_READ and inner != OP_WRITE)
        or nseg == 0
        or nseg > disk["max_segments"]  # as offered: the reserve was made for no more
        or (inner == OP_WRITE and disk["readonly"] != 0)
    ):
        _reject(qa, RSP_ERROR)
    else:
        blk["kind"] = _kind_of(inner)
        blk["indirect"] = nseg
        return -1
    return 0


@kernel
def plan(request: int, qa: int, da: int, segs: int) -> int:
    """What one request (112 private bytes, native layout) asks for, into BLK_REQ: kind, status, sector, nr_sectors.

    Returns the number of checked segments now at `segs` (0 for none), or -1 for an indirect request, whose
    `indirect` segments are still in the guest's pages: copy them, then `check_segments`.
    """
    blk = blk_at(qa)
    disk = disk_at(da)
    r = records(request, 1, REQUEST_64)[0]
    operation = i64(r["operation"])
    blk["id"] = i64(r["id"])
    blk["operation"] = operation
    blk["status"] = RSP_OKAY
    blk["nr_sectors"] = 0
    blk["indirect"] = 0
    if operation == OP_DISCARD:
        _plan_discard(request, qa, da)
        return 0
    if operation == OP_INDIRECT:
        return _plan_indirect(request, qa, da)
    kind = _kind_of(operation)
    nseg = i64(r["nr_segments"])
    if (
        kind == K_REJECT
        or (kind == K_FLUSH and disk["can_flush"] == 0)
        or (kind == K_BARRIER and disk["can_barrier"] == 0)
    ):
        _reject(qa, RSP_EOPNOTSUPP)
        return 0
    if nseg > MAX_SEGMENTS or (nseg == 0 and (kind == K_READ or kind == K_WRITE)):
        _reject(qa, RSP_ERROR)
        return 0
    if disk["readonly"] != 0 and (kind == K_WRITE or (nseg > 0 and kind != K_READ)):
        _reject(qa, RSP_ERROR)
        return 0
    blk["kind"] = kind
    if nseg == 0:
        blk["sector"] = 0  # a bare flush or barrier may carry anything there: Linux sends 0, Windows does not
        return 0
    blk["sector"] = _scaled(i64(r["sector_number"]), disk["unit_shift"])
    n = check_segments(qa, da, request + _SEG_AT, nseg, segs)
    return n if n > 0 else 0


_SEG_AT: int = REQUEST_64.fields["seg"][1]  # type: ignore[index]

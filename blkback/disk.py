"""What is behind a queue: I/O on a store. A request may take several I/Os; `advance` is what comes after each.

    read, write      READ(V) or WRITE(V), again for the rest when it came back short
    flush            fdatasync, then the data if it has any (Linux: REQ_PREFLUSH)
    barrier          with the whole device at rest: fdatasync, the data, fdatasync
    discard          fallocate(PUNCH_HOLE | KEEP_SIZE), on a block device a discard
    secure discard   zeros written over all of it, fdatasync, then the discard
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EIO
from typing import Any

from pvdrivers.iovec import IOVEC_SIZE, iovec_at
from pvdrivers.storage.constants import PUNCH_HOLE, STORE_FILE, STORE_MEMORY
from pvdrivers.storage.uring import (
    IORING_OP_READ,
    IORING_OP_READV,
    IORING_OP_WRITE,
    IORING_OP_WRITEV,
    is_done,
    queue_fallocate,
    queue_fsync,
    queue_nop,
    queue_rw,
    submit,
)
from pvdrivers.storage.uring_layout import ring_at as uring_at
from pvdrivers.worker.marks import complete, req_at, ring_at, worker_at
from pvdrivers.worker.records import ZERO_BYTES
from rings.atomics import copy_bytes, i64, zero_bytes
from rings.jit import inline, kernel

from .records import K_BARRIER, K_DISCARD, K_FLUSH, K_READ, K_SECURE, blk_at, disk_at

_MAX_RETRIES = 64
_IOV_MAX = 1024  # the kernel refuses more (EINVAL); an indirect request may have 4096 segments

# BLK_REQ.stage: what is under way.
S_DATA = 0
S_FLUSH_BEFORE = 1
S_FLUSH_AFTER = 2
S_ZERO = 3
S_DISCARD = 4

DEEP_CHUNK = 32  # DISK.chunk of stores that are not a device
QUICK, PROBE = 8, 64
DONE = 1
UNDER_WAY = 0


@inline
def set_chunk(u: int, ra: int) -> int:
    """How many I/Os of this ring are handed over at once, from here on: what suits the store.

    All of them, if the store has an I/O done before the call comes back: it cannot run dry, a ram disk say, and calls
    are all there is to save. That is looked at again now and then.
    """
    ring = ring_at(ra)
    chunk = i64(disk_at(ring["device"])["chunk"])
    if ring["quick"] >= QUICK:
        ring["quick"] = ring["quick"] + 1 if ring["quick"] < QUICK + PROBE else i64(QUICK - 1)
        chunk = i64(DEEP_CHUNK)
    uring_at(u)["chunk"] = chunk
    return chunk


@inline
def submit_first(u: int, ra: int) -> None:
    """Have a disk that does nothing begin, while we look at what else there is; and see how long that takes it."""
    submit(u)
    ring_at(ra)["quick"] = ring_at(ra)["quick"] + 1 if is_done(u) else i64(0)


@inline
def _copy_memory(qa: int, at: int, reading: bool) -> None:
    """A memory: store: the data itself, now."""
    req = req_at(qa)
    for k in range(req["n_iov"]):
        v = iovec_at(req["iov"], k)
        if reading:
            copy_bytes(v["base"], at, v["length"])
        else:
            copy_bytes(at, v["base"], v["length"])
        at += v["length"]


@inline
def _zero_memory(qa: int) -> None:
    req = req_at(qa)
    for k in range(req["n_iov"]):
        v = iovec_at(req["iov"], k)
        zero_bytes(v["base"], v["length"])


@inline
def _queue(wa: int, qa: int, rc: int) -> None:
    """It is the ring's now, or was refused for want of memory: then it failed."""
    if rc == 0:
        worker_at(wa)["inflight"] += 1
    else:
        complete(qa, rc)


@kernel
def _start_data(wa: int, qa: int, da: int) -> None:
    """The part of a read's or write's data that is still to be moved."""
    w = worker_at(wa)
    disk = disk_at(da)
    req = req_at(qa)
    blk = blk_at(qa)
    blk["stage"] = S_DATA
    reading = blk["kind"] == K_READ
    offset = (blk["sector"] << 9) + blk["moved"]
    if disk["store"] == STORE_FILE:
        if req["n_iov"] == 1:
            v = iovec_at(req["iov"], 0)
            op = IORING_OP_READ if reading else IORING_OP_WRITE
            _queue(wa, qa, queue_rw(w["uring"], op, disk["fd"], v["base"], v["length"], offset, qa))
        else:
            op = IORING_OP_READV if reading else IORING_OP_WRITEV
            n_iov = min(req["n_iov"], _IOV_MAX)  # the rest follows, as after any short I/O
            _queue(wa, qa, queue_rw(w["uring"], op, disk["fd"], req["iov"], n_iov, offset, qa))
        return
    if disk["store"] == STORE_MEMORY:
        _copy_memory(qa, disk["memory"] + offset, reading)
    elif reading and req["bounced"] > 0:
        _zero_memory(qa)  # or the guest would get what the bounce pages have of another
    complete(qa, req["nbytes"] - blk["moved"])


@kernel
def _start_flush(wa: int, qa: int, da: int, stage: int) -> None:
    disk = disk_at(da)
    blk_at(qa)["stage"] = stage
    if disk["store"] == STORE_FILE and disk["skip_flush"] == 0:
        _queue(wa, qa, queue_fsync(worker_at(wa)["uring"], disk["fd"], 1, qa))
    else:
        complete(qa, 0)


@kernel
def _start_discard(wa: int, qa: int, da: int) -> None:
    disk = disk_at(da)
    blk = blk_at(qa)
    blk["stage"] = S_DISCARD
    offset, length = blk["sector"] << 9, blk["nr_sectors"] << 9
    if disk["store"] == STORE_FILE and length > 0:
        u = worker_at(wa)["uring"]
        _queue(wa, qa, queue_fallocate(u, disk["fd"], PUNCH_HOLE, offset, length, qa))
        return
    if disk["store"] == STORE_MEMORY:
        # A piece a pass: the whole of a large disk at once would hold up every other guest of this worker.
        n = min(length - blk["moved"], ZERO_BYTES)
        zero_bytes(disk["memory"] + offset + blk["moved"], n)
        blk["moved"] += n
        if blk["moved"] < length:
            _queue(wa, qa, queue_nop(worker_at(wa)["uring"], qa))
            return
    complete(qa, 0)


@kernel
def _start_zero(wa: int, qa: int, da: int) -> None:
    """The next piece of zeros of a secure discard."""
    w = worker_at(wa)
    disk = disk_at(da)
    blk = blk_at(qa)
    blk["stage"] = S_ZERO
    left = (blk["nr_sectors"] << 9) - blk["moved"]
    if disk["store"] == STORE_FILE and left > 0:
        n = min(left, ZERO_BYTES)
        offset = (blk["sector"] << 9) + blk["moved"]
        _queue(wa, qa, queue_rw(w["uring"], IORING_OP_WRITE, disk["fd"], w["zero"], n, offset, qa))
    else:
        complete(qa, left)


@kernel
def start(wa: int, qa: int, da: int) -> None:
    """Begin a planned request whose pages are here. Its I/Os end in `complete`, at once or later."""
    blk = blk_at(qa)
    kind = blk["kind"]
    if kind == K_FLUSH or kind == K_BARRIER:
        _start_flush(wa, qa, da, S_FLUSH_BEFORE)
    elif kind == K_DISCARD:
        _start_discard(wa, qa, da)
    elif kind == K_SECURE:
        _start_zero(wa, qa, da)
    else:
        _start_data(wa, qa, da)


@inline
def _skip(req: Any, n: int) -> None:
    """The first n bytes of the iovecs are done."""
    while n > 0 and req["n_iov"] > 0:
        v = iovec_at(req["iov"], 0)
        if n < v["length"]:
            v["base"] += n
            v["length"] -= n
            return
        n -= v["length"]
        req["iov"] += IOVEC_SIZE
        req["n_iov"] -= 1


@kernel
def advance(wa: int, qa: int, da: int) -> int:
    """An I/O of this request ended with REQ.res: DONE with the outcome in REQ.res (0 or -errno), or UNDER_WAY."""
    req = req_at(qa)
    blk = blk_at(qa)
    res = req["res"]
    stage = blk["stage"]
    if res == -EAGAIN or res == -EINTR:
        blk["retries"] += 1
        if blk["retries"] > _MAX_RETRIES:
            return DONE
        if stage == S_DATA:
            _start_data(wa, qa, da)
        elif stage == S_ZERO:
            _start_zero(wa, qa, da)
        elif stage == S_DISCARD:
            _start_discard(wa, qa, da)
        else:
            _start_flush(wa, qa, da, stage)
        return UNDER_WAY
    if res < 0:
        return DONE
    if stage == S_DATA:
        blk["moved"] += res
        if blk["moved"] < req["nbytes"]:
            if res == 0:  # the file ends here: it was truncated under us
                req["res"] = -EIO
                return DONE
            _skip(req, res)
            _start_data(wa, qa, da)
            return UNDER_WAY
        if blk["kind"] == K_BARRIER:
            _start_flush(wa, qa, da, S_FLUSH_AFTER)
            return UNDER_WAY
    elif stage == S_FLUSH_BEFORE:
        if req["nseg"] > 0:
            _start_data(wa, qa, da)
            return UNDER_WAY
    elif stage == S_ZERO:
        blk["moved"] += res
        if blk["moved"] < blk["nr_sectors"] << 9:
            if res == 0:
                req["res"] = -EIO
                return DONE
            _start_zero(wa, qa, da)
        else:
            _start_flush(wa, qa, da, S_FLUSH_AFTER)
        return UNDER_WAY
    elif stage == S_DISCARD and disk_at(da)["store"] == STORE_MEMORY and blk["moved"] < blk["nr_sectors"] << 9:
        _start_discard(wa, qa, da)
        return UNDER_WAY
    elif stage == S_FLUSH_AFTER and blk["kind"] == K_SECURE:
        blk["moved"] = 0
        _start_discard(wa, qa, da)
        return UNDER_WAY
    req["res"] = i64(0)
    return DONE

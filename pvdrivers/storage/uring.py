"""io_uring, driven from compiled code: set up once by Python, then queued, submitted and reaped without it.

All kernels take `u`, the address of a URING record (`Uring.address`), and return 0 or a count, or -errno.
One thread submits and reaps: the one that called `enable`. User data is any int64 but -1.

Submission is in chunks (`Uring(chunk=)`): a queue_* that finds that many SQEs pending enters the kernel with them
first; so a last chunk goes in with the wait. A real disk completes in bursts and runs dry if it is fed in bursts, so 4
is best there; for the page cache 32 is.

Completions are counted by `peek` (no system call) or `reap` (one, if the kernel has work to finish for us
or something is pending), read at `cqe(u, k)`, k from 0, and given back by `advance`. When the completion
queue overflows, the kernel keeps the rest (IORING_FEAT_NODROP) until `reap` or `wait` finds room for them.

A queue_* returns -EAGAIN only when the kernel is short of memory; on the software ring, when more requests are under
way than there is room for completions.

Sources: io_uring_setup(2), io_uring_enter(2), include/uapi/linux/io_uring.h.
"""

from __future__ import annotations

import errno
from typing import Final

from pvdrivers.syscalls import NR_IO_URING_ENTER, NR_IO_URING_REGISTER, syscall
from rings.atomics import distance, load_acquire32, load_once32, records, store_release32, zero_bytes
from rings.jit import inline, kernel

from .software_ring import add_poll, collect, publish, remove_poll, wait_software
from .uring_layout import (
    CQE,
    EPOLLET,
    EPOLLIN,
    GETEVENTS_ARG,
    GETEVENTS_ARG_SIZE,
    IORING_CQE_F_MORE,
    IORING_ENTER_EXT_ARG,
    IORING_ENTER_GETEVENTS,
    IORING_FSYNC_DATASYNC,
    IORING_OP_FALLOCATE,
    IORING_OP_FSYNC,
    IORING_OP_NOP,
    IORING_OP_POLL_ADD,
    IORING_OP_POLL_REMOVE,
    IORING_OP_READ,
    IORING_OP_READV,
    IORING_OP_WRITE,
    IORING_OP_WRITEV,
    IORING_POLL_ADD_MULTI,
    IORING_SQ_CQ_OVERFLOW,
    IORING_SQ_TASKRUN,
    KIND_THREADS,
    SQE,
    URING,
    ring_at,
)
from .uring_setup import Uring

__all__ = [
    "CQE",
    "IORING_CQE_F_MORE",
    "IORING_OP_NOP",
    "IORING_OP_READ",
    "IORING_OP_READV",
    "IORING_OP_WRITE",
    "IORING_OP_WRITEV",
    "URING",
    "Uring",
    "advance",
    "cqe",
    "enable",
    "is_done",
    "next_sqe",
    "peek",
    "queue_fallocate",
    "queue_fsync",
    "queue_nop",
    "queue_poll",
    "queue_poll_remove",
    "queue_poll_unread",
    "queue_rw",
    "reap",
    "sqe_room",
    "submit",
    "wait",
]

_REGISTER_ENABLE_RINGS: Final = 12
_NEEDS_ENTER: Final = IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW
_POLL_EVENTS: Final = EPOLLIN | EPOLLET
_EAGAIN: Final = errno.EAGAIN
_EINTR: Final = errno.EINTR
_ETIME: Final = errno.ETIME


@kernel
def enable(u: int) -> int:
    """Make the calling thread the one that submits. 0, or -errno (-EBADFD: enabled before)."""
    r = ring_at(u)
    if r["kind"] == KIND_THREADS:
        return 0
    return int(syscall(NR_IO_URING_REGISTER, r["fd"], _REGISTER_ENABLE_RINGS, 0, 0, 0, 0))


@inline
def peek(u: int) -> int:
    """How many completions are ready to be read."""
    r = ring_at(u)
    # Pairs with the kernel's release of the tail: the CQEs below it are written.
    return int(distance(load_acquire32(r["cq_tail"]), load_once32(r["cq_head"])))


@inline
def cqe(u: int, k: int) -> int:
    """The address of the k-th ready completion (a CQE record), 0 <= k < peek(u)."""
    r = ring_at(u)
    return int(r["cqes"] + ((load_once32(r["cq_head"]) + k) & r["cq_mask"]) * 16)


@inline
def advance(u: int, n: int) -> int:
    """Give the first `n` completions back; their addresses are void from now on."""
    r = ring_at(u)
    # Release: we have read the CQEs before the kernel may write over them.
    store_release32(r["cq_head"], (load_once32(r["cq_head"]) + n) & 0xFFFFFFFF)
    return 0


@inline
def is_done(u: int) -> bool:
    """Whether the kernel has something finished, be it not among the ready completions yet."""
    return bool(peek(u) > 0 or load_once32(ring_at(u)["sq_flags"]) & IORING_SQ_TASKRUN != 0)


@inline
def sqe_room(u: int) -> int:
    """How many SQEs are free."""
    r = ring_at(u)
    # Pairs with the kernel's release of the head: it has read the SQEs below it.
    return int(r["sq_mask"] + 1 - distance(r["tail"], load_acquire32(r["sq_head"])))


@kernel
def _enter(u: int, complete: int, flags: int, argument: int, size: int) -> int:
    """io_uring_enter(2) with all that is pending. SQEs consumed, or -errno."""
    r = ring_at(u)
    store_release32(r["sq_tail"], r["tail"])
    r["enters"] += 1
    n: int = syscall(NR_IO_URING_ENTER, r["fd"], r["pending"], complete, flags, argument, size)
    if n > 0:
        r["pending"] -= n
        if r["pending"] == 0:
            r["joined"] = 0
    return n


@kernel
def submit(u: int) -> int:
    """Give the kernel all that is pending, without waiting. 0, or -errno (-EAGAIN: short of memory, try later)."""
    r = ring_at(u)
    if r["kind"] == KIND_THREADS:
        if r["pending"] > 0:
            publish(u)
        return 0
    while r["pending"] > 0:
        n: int = _enter(u, 0, 0, 0, 0)
        if n < 0:
            return n
        if n == 0:
            return -_EAGAIN
    return 0


@kernel
def _flush(u: int) -> int:
    """One pass through the kernel, in both directions, without waiting."""
    r = ring_at(u)
    if r["kind"] == KIND_THREADS:
        submit(u)
        return int(collect(u, 0))
    return int(_enter(u, 0, IORING_ENTER_GETEVENTS, 0, 0))


@inline
def reap(u: int) -> int:
    """Submit what is pending, let the kernel finish what waits for this thread, and count the ready
    completions.

    No system call is made when neither is there. Errors of submission are left for `submit` and `wait` to
    report.
    """
    r = ring_at(u)
    if r["pending"] > 0 or load_once32(r["sq_flags"]) & _NEEDS_ENTER != 0:
        _flush(u)
    return int(peek(u))


@kernel
def wait(u: int, timeout_ns: int) -> int:
    """Submit everything, then wait until a completion is ready or the time is over; negative waits for ever.

    Returns how many completions are ready (0: the time is over, or a false alarm), or -errno. -EINTR means that a
    signal may have come: go back to Python, whose handlers have not run yet.
    """
    r = ring_at(u)
    if r["kind"] == KIND_THREADS:
        submit(u)
        status: int = wait_software(u, timeout_ns)
        return status if status < 0 else int(peek(u))
    n: int = peek(u)
    if n > 0 and r["pending"] == 0:
        return n
    flags, argument, size = IORING_ENTER_GETEVENTS, 0, 0
    if timeout_ns >= 0:
        r["seconds"] = timeout_ns // 1_000_000_000
        r["nanoseconds"] = timeout_ns % 1_000_000_000
        flags, argument, size = flags | IORING_ENTER_EXT_ARG, u + GETEVENTS_ARG, GETEVENTS_ARG_SIZE
    while True:
        took: int = _enter(u, 1, flags, argument, size)
        if took == -_EINTR:
            return took
        n = peek(u)
        if n > 0 or took == -_ETIME:
            return n
        if took < 0:
            return took
        if r["pending"] == 0:
            # The kernel reports what it consumed, and so hides a signal or a timeout that ended the wait.
            return -_EINTR if took > 0 else 0
        if took == 0:
            return -_EAGAIN


@inline
def next_sqe(u: int) -> int:
    """The address of a zeroed SQE, or 0 if the queue is full."""
    r = ring_at(u)
    if sqe_room(u) == 0 and (submit(u) != 0 or sqe_room(u) == 0):
        return 0
    at: int = r["sqes"] + (r["tail"] & r["sq_mask"]) * 64
    zero_bytes(at, 64)
    return at


@inline
def _next_of_chunk(u: int) -> int:
    """next_sqe(), for what fills a chunk: one that is full goes first. `submit` or `wait` sees an error there."""
    r = ring_at(u)
    if r["pending"] - r["joined"] >= r["chunk"]:
        submit(u)
    at: int = next_sqe(u)
    return at


@inline
def _queued(u: int) -> int:
    """Count the SQE that was just filled."""
    r = ring_at(u)
    r["tail"] = (r["tail"] + 1) & 0xFFFFFFFF
    r["pending"] += 1
    return 0


@inline
def queue_nop(u: int, user_data: int) -> int:
    """Nothing, completed with 0: for measurements. 0, or -EAGAIN if the queue is full."""
    at = _next_of_chunk(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"] = IORING_OP_NOP
    s["user_data"] = user_data
    status: int = _queued(u)
    return status


@inline
def queue_rw(u: int, opcode: int, fd: int, addr: int, length: int, offset: int, user_data: int) -> int:
    """IORING_OP_READ or WRITE: `length` bytes at `addr`; READV or WRITEV: `length` iovecs there. `offset`
    in bytes.

    Completes with the bytes moved - fewer at the end of a file - or -errno. 0, or -EAGAIN if the queue is
    full.
    """
    at = _next_of_chunk(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"], s["fd"], s["off"] = opcode, fd, offset
    s["addr"], s["len"], s["user_data"] = addr, length, user_data
    status: int = _queued(u)
    return status


@inline
def queue_fsync(u: int, fd: int, datasync: int, user_data: int) -> int:
    """fsync(2), or fdatasync(2) with `datasync` 1. It covers only what has completed before it is submitted."""
    at = _next_of_chunk(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"] = IORING_OP_FSYNC
    s["fd"] = fd
    if datasync != 0:
        s["op_flags"] = IORING_FSYNC_DATASYNC
    s["user_data"] = user_data
    status: int = _queued(u)
    return status


@inline
def queue_fallocate(u: int, fd: int, mode: int, offset: int, length: int, user_data: int) -> int:
    """fallocate(2) with FALLOC_FL_* in `mode`; bytes. On a block device a hole discards or zeroes."""
    at = _next_of_chunk(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"] = IORING_OP_FALLOCATE
    s["fd"] = fd
    s["off"] = offset
    s["addr"] = length  # sic: io_uring has the length there, and the mode in `len`
    s["len"] = mode
    s["user_data"] = user_data
    status: int = _queued(u)
    return status


@inline
def queue_poll(u: int, fd: int, user_data: int) -> int:
    """Report each time `fd` becomes readable, until removed: one completion an edge, so an eventfd need not
    be read.

    A completion without IORING_CQE_F_MORE in its flags was the last (res: -ECANCELED, an error, or the
    queue was full): queue the poll again. What was already readable is reported at once.
    """
    status: int = _queue_poll(u, fd, user_data, IORING_POLL_ADD_MULTI)
    return status


@inline
def queue_poll_unread(u: int, fd: int, user_data: int) -> int:
    """Report that `fd` is readable, be that new or not, for a descriptor that is read each time.

    A completion without IORING_CQE_F_MORE was the last: queue the poll again, and read.
    """
    status: int = _queue_poll(u, fd, user_data, 0)
    return status


@kernel
def _queue_poll(u: int, fd: int, user_data: int, kind: int) -> int:
    r = ring_at(u)
    if r["kind"] == KIND_THREADS:
        return int(add_poll(u, fd, user_data, EPOLLET if kind == IORING_POLL_ADD_MULTI else 0))
    at = _next_of_chunk(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"] = IORING_OP_POLL_ADD
    s["fd"] = fd
    s["len"] = kind
    s["op_flags"] = _POLL_EVENTS
    s["user_data"] = user_data
    status: int = _queued(u)
    return status


@inline
def queue_poll_remove(u: int, fd: int, poll_user_data: int, user_data: int) -> int:
    """End the poll of `fd` queued with `poll_user_data`: that completes with -ECANCELED, this with 0 or -ENOENT."""
    r = ring_at(u)
    if r["kind"] == KIND_THREADS:
        return int(remove_poll(u, fd, poll_user_data, user_data))
    at = _next_of_chunk(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"] = IORING_OP_POLL_REMOVE
    s["fd"] = -1
    s["addr"] = poll_user_data
    s["user_data"] = user_data
    status: int = _queued(u)
    return status

"""A device's descriptor on an io_uring: read when there is something, written to as the kernel is entered anyway.

For devices that can be polled and never make a writer wait, opened O_NONBLOCK. Not on the software ring.

While a read is queued nobody else may read that descriptor. A read that the kernel begins again, as there was
something, and that finds nothing, is given to a thread of the kernel, which to Linux 6.1 tries for ever, with all of a
processor (io_uring/io_uring.c: io_arm_poll_handler takes a request once, io_wq_submit_work repeats on -EAGAIN).
"""

from __future__ import annotations

import errno
from typing import Final

from rings.atomics import distance, load_acquire32, records
from rings.jit import inline

from .uring import next_sqe
from .uring_layout import (
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_READ,
    IORING_OP_WRITE,
    IOSQE_CQE_SKIP_SUCCESS,
    SQE,
    ring_at,
)

_EAGAIN: Final = errno.EAGAIN


@inline
def _joined(u: int) -> int:
    """Count the SQE that was just filled: it goes with whatever enters next, and fills no chunk. Its index."""
    r = ring_at(u)
    at: int = r["tail"]
    r["tail"] = (at + 1) & 0xFFFFFFFF
    r["pending"] += 1
    r["joined"] += 1
    return at


@inline
def queue_read(u: int, fd: int, addr: int, length: int, user_data: int) -> int:
    """Read once: what there is, or as soon as there is something. 0, or -EAGAIN if the queue is full."""
    at = next_sqe(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"], s["fd"] = IORING_OP_READ, fd
    s["addr"], s["len"], s["user_data"] = addr, length, user_data
    _joined(u)
    return 0


@inline
def queue_cancel(u: int, read_user_data: int, user_data: int) -> int:
    """End the read of that user_data: it completes with -ECANCELED, if it has not completed, and this with whatever.

    0, or -EAGAIN if the queue is full.
    """
    at = next_sqe(u)
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"], s["fd"] = IORING_OP_ASYNC_CANCEL, -1
    s["addr"], s["user_data"] = read_user_data, user_data
    _joined(u)
    return 0


@inline
def queue_write_quiet(u: int, fd: int, addr: int, length: int, user_data: int) -> int:
    """Write as the kernel is entered next, and complete only if that fails.

    The SQE's index for `consumed`, or -EAGAIN if the queue is full or the kernel cannot be quiet.
    """
    r = ring_at(u)
    at = next_sqe(u) if r["quiet"] != 0 else 0
    if at == 0:
        return -_EAGAIN
    s = records(at, 1, SQE)[0]
    s["opcode"], s["flags"], s["fd"] = IORING_OP_WRITE, IOSQE_CQE_SKIP_SUCCESS, fd
    s["addr"], s["len"], s["user_data"] = addr, length, user_data
    return int(_joined(u))


@inline
def consumed(u: int, index: int) -> bool:
    """Whether the kernel has taken the SQE of that index, one of the latest 2**31."""
    n = distance(load_acquire32(ring_at(u)["sq_head"]), index)
    return 0 < n <= 0x80000000

"""The bytes of io_uring: records, opcodes and flags, as in Linux include/uapi/linux/io_uring.h.

URING is our own: all that a kernel needs to know about one ring, at one address. The software ring
(software_ring.py) has the same queues in the same layout, so the code on the worker's side is the same for
both.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from rings.atomics import records
from rings.jit import inline

IORING_OP_NOP: Final = 0
IORING_OP_READV: Final = 1
IORING_OP_WRITEV: Final = 2
IORING_OP_FSYNC: Final = 3
IORING_OP_POLL_ADD: Final = 6
IORING_OP_POLL_REMOVE: Final = 7
IORING_OP_ASYNC_CANCEL: Final = 14
IORING_OP_FALLOCATE: Final = 17
IORING_OP_READ: Final = 22
IORING_OP_WRITE: Final = 23

IOSQE_CQE_SKIP_SUCCESS: Final = 1 << 6
IORING_FSYNC_DATASYNC: Final = 1
IORING_POLL_ADD_MULTI: Final = 1
IORING_CQE_F_MORE: Final = 2
IORING_ENTER_GETEVENTS: Final = 1
IORING_ENTER_EXT_ARG: Final = 8
IORING_SQ_CQ_OVERFLOW: Final = 2
IORING_SQ_TASKRUN: Final = 4

EPOLLIN: Final = 1
EPOLLET: Final = 1 << 31

KIND_IO_URING: Final = 1
KIND_THREADS: Final = 2

SQE: Final = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "u2"),
        ("fd", "i4"),
        ("off", "i8"),
        ("addr", "i8"),
        ("len", "u4"),
        ("op_flags", "u4"),  # fsync_flags, poll32_events, rw_flags, ...
        ("user_data", "i8"),
        ("rest", "u8", (3,)),
    ],
    align=True,
)
"""struct io_uring_sqe, 64 bytes."""

CQE: Final = np.dtype([("user_data", "i8"), ("res", "i4"), ("flags", "u4")], align=True)
"""struct io_uring_cqe, 16 bytes. `res`: bytes moved, poll events, 0, or -errno."""

URING: Final = np.dtype(
    [
        ("kind", "i8"),  # KIND_*
        ("fd", "i8"),  # io_uring's, or the software ring's epoll instance
        ("sq_head", "i8"),  # addresses of the shared 32-bit words
        ("sq_tail", "i8"),
        ("sq_flags", "i8"),
        ("cq_head", "i8"),
        ("cq_tail", "i8"),
        ("sqes", "i8"),  # address of the array of SQE
        ("cqes", "i8"),  # address of the array of CQE
        ("sq_mask", "i8"),
        ("cq_mask", "i8"),
        ("tail", "i8"),  # next SQE to fill; the kernel sees it when we enter
        ("pending", "i8"),  # SQEs filled and not yet consumed
        ("chunk", "i8"),  # enter as soon as so many are pending, those apart that
        ("joined", "i8"),  # ... go with whatever enters next
        ("enters", "i8"),  # system calls made, for statistics
        ("quiet", "i8"),  # 1: the kernel knows IOSQE_CQE_SKIP_SUCCESS (Linux 5.17)
        ("sigmask", "i8"),  # struct io_uring_getevents_arg, 24 bytes
        ("sigmask_size", "u4"),
        ("arg_pad", "u4"),
        ("arg_timeout", "i8"),
        ("seconds", "i8"),  # struct __kernel_timespec
        ("nanoseconds", "i8"),
        # The software ring only.
        ("threads", "i8"),  # how many; with 0 a request is executed where it is submitted
        ("events", "i8"),  # address of MAX_POLL_EVENTS epoll_event records
        ("scratch", "i8"),  # address of room for one SQE, for threads = 0
        ("done_fd", "i8"),  # eventfd in the epoll set: there are completions
        ("work", "u4"),  # futex: counts submissions
        ("sleepers", "u4"),  # threads that sleep on `work`, or are about to
        ("cq_lock", "u4"),
        ("waiting", "u4"),  # the worker sleeps in epoll, or is about to
        ("stop", "u4"),
        ("pad", "u4"),
    ],
    align=True,
)
"""All that kernels know about one ring. Only the thread that submits uses it, but for the software ring's words."""

GETEVENTS_ARG: Final[int] = URING.fields["sigmask"][1]  # type: ignore[index]
GETEVENTS_ARG_SIZE: Final = 24
TIMESPEC: Final[int] = URING.fields["seconds"][1]  # type: ignore[index]


@inline
def ring_at(u: int) -> Any:
    """The URING record at an address."""
    return records(u, 1, URING)[0]

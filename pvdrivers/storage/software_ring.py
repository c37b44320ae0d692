"""The io_uring of the poor: the same queues in the same memory, served by a few threads of our own.

For hosts that refuse io_uring. Each thread lives in `serve`, one compiled function without the GIL: it
takes an SQE (many consumers: compare-exchange on the head), executes it by the system call of the same
name, and posts a CQE (many producers: a small lock). Polls of event fds need no thread: they are in an
epoll set, and the worker's wait is epoll_wait; a thread that completes something while the worker sleeps
writes an eventfd in the same set.

    worker                                     thread
    fill SQEs, store_release sq_tail           head = sq_head; copy SQE; compare_exchange sq_head
    work += 1; wake if sleepers                nothing there: w = work; sleepers += 1; futex_wait(work, w)
    waiting = 1; full_barrier; CQEs? epoll     post CQE, store_release cq_tail; full_barrier; waiting? eventfd
"""

from __future__ import annotations

import errno
import platform
from typing import Final

import numpy as np

from pvdrivers.syscalls import (
    EPOLL_EVENT,
    epoll_wait,
    eventfd_add,
    fallocate,
    fdatasync,
    fsync,
    futex_wait,
    futex_wake,
    pread,
    preadv,
    pwrite,
    pwritev,
    sched_yield,
    syscall,
)
from rings.atomics import (
    compare_exchange32,
    copy_in,
    distance,
    exchange32,
    fetch_add32,
    full_barrier,
    load64,
    load_acquire32,
    load_once32,
    pause,
    records,
    store64,
    store_once32,
    store_release32,
)
from rings.jit import inline, kernel

from .uring_layout import (
    CQE,
    EPOLLIN,
    IORING_CQE_F_MORE,
    IORING_FSYNC_DATASYNC,
    IORING_OP_FALLOCATE,
    IORING_OP_FSYNC,
    IORING_OP_NOP,
    IORING_OP_READ,
    IORING_OP_READV,
    IORING_OP_WRITE,
    IORING_OP_WRITEV,
    SQE,
    URING,
    ring_at,
)

_NR_EPOLL_CTL: Final = 233 if platform.machine() in ("x86_64", "amd64", "AMD64") else 21
_EPOLL_CTL_ADD: Final = 1
_EPOLL_CTL_DEL: Final = 2

MAX_POLL_EVENTS: Final = 32
"""Event fds reported by one epoll_wait, and completions kept free for them: threads never fill the last ones."""

DONE: Final = -1
"""The user data of the threads' eventfd in the epoll set."""

_EVENT_SIZE: Final = EPOLL_EVENT.itemsize
_EVENT_DATA: Final[int] = EPOLL_EVENT.fields["data"][1]  # type: ignore[index]
_WORK: Final[int] = URING.fields["work"][1]  # type: ignore[index]
_SLEEPERS: Final[int] = URING.fields["sleepers"][1]  # type: ignore[index]
_CQ_LOCK: Final[int] = URING.fields["cq_lock"][1]  # type: ignore[index]
_WAITING: Final[int] = URING.fields["waiting"][1]  # type: ignore[index]
_STOP: Final[int] = URING.fields["stop"][1]  # type: ignore[index]
_EAGAIN: Final = errno.EAGAIN
_EINTR: Final = errno.EINTR
_EINVAL: Final = errno.EINVAL
_ECANCELED: Final = errno.ECANCELED


@inline
def _lock(word: int) -> None:
    """A lock for some ten instructions; who holds it may have lost its core, so yield soon."""
    spins = 0
    while compare_exchange32(word, np.uint32(0), np.uint32(1)) != 0:
        spins += 1
        if spins < 64:
            pause()
        else:
            sched_yield()


@kernel
def post(u: int, user_data: int, res: int, flags: int, keep: int) -> int:
    """Append a completion, leaving `keep` free for others. 0, or -EAGAIN if there is no room.

    A thread (keep > 0) waits until the worker has made room, or is gone; the worker cannot wait for itself.
    """
    r = ring_at(u)
    limit = r["cq_mask"] + 1 - keep
    _lock(u + _CQ_LOCK)
    while distance(load_once32(r["cq_tail"]), load_acquire32(r["cq_head"])) >= limit:
        store_release32(u + _CQ_LOCK, np.uint32(0))
        if keep == 0 or load_acquire32(u + _STOP) != 0:
            return -_EAGAIN
        sched_yield()
        _lock(u + _CQ_LOCK)
    tail = load_once32(r["cq_tail"])
    c = records(r["cqes"] + (tail & r["cq_mask"]) * 16, 1, CQE)[0]
    c["user_data"] = user_data
    c["res"] = res
    c["flags"] = flags
    # Release, twice: the worker sees the CQE before the tail, and the next producer the tail before the lock.
    store_release32(r["cq_tail"], np.uint32((tail + 1) & 0xFFFFFFFF))
    store_release32(u + _CQ_LOCK, np.uint32(0))
    return 0


@kernel
def execute(at: int) -> int:
    """Do what the SQE at an address says: the result as a CQE has it."""
    s = records(at, 1, SQE)[0]
    opcode = s["opcode"]
    while True:
        if opcode == IORING_OP_READ:
            result = pread(s["fd"], s["addr"], s["len"], s["off"])
        elif opcode == IORING_OP_WRITE:
            result = pwrite(s["fd"], s["addr"], s["len"], s["off"])
        elif opcode == IORING_OP_READV:
            result = preadv(s["fd"], s["addr"], s["len"], s["off"])
        elif opcode == IORING_OP_WRITEV:
            result = pwritev(s["fd"], s["addr"], s["len"], s["off"])
        elif opcode == IORING_OP_FSYNC:
            if s["op_flags"] & IORING_FSYNC_DATASYNC != 0:
                result = fdatasync(s["fd"])
            else:
                result = fsync(s["fd"])
        elif opcode == IORING_OP_FALLOCATE:
            result = fallocate(s["fd"], s["len"], s["off"], s["addr"])
        elif opcode == IORING_OP_NOP:
            result = 0
        else:
            result = -_EINVAL
        if result != -_EINTR:
            return int(result)


@kernel
def step(u: int, scratch: int) -> int:
    """Take one SQE into 64 bytes at `scratch`, execute it and post the result. 1, or 0 if there was none."""
    r = ring_at(u)
    while True:
        head = load_acquire32(r["sq_head"])
        # Pairs with the release in `publish`: the SQEs below the tail are written.
        if head == load_acquire32(r["sq_tail"]):
            return 0
        copy_in(scratch, r["sqes"] + (head & r["sq_mask"]) * 64, 64)
        # Nobody took it meanwhile, so the copy is whole: the worker fills a slot again only after the head
        # has passed.
        if compare_exchange32(r["sq_head"], head, np.uint32((head + 1) & 0xFFFFFFFF)) == head:
            break
    result = execute(scratch)
    post(u, records(scratch, 1, SQE)[0]["user_data"], result, 0, MAX_POLL_EVENTS)
    # Either we see that the worker waits, or it sees the CQE before it sleeps.
    full_barrier()
    if load_once32(u + _WAITING) != 0 and exchange32(u + _WAITING, np.uint32(0)) != 0:
        eventfd_add(r["done_fd"], 1)
    return 1


@kernel
def serve(u: int, scratch: int) -> int:
    """The life of one thread: until `stop`."""
    while load_acquire32(u + _STOP) == 0:
        work = load_acquire32(u + _WORK)
        if step(u, scratch) == 0:
            fetch_add32(u + _SLEEPERS, np.uint32(1))
            # A submission after `work` was read changes it, and the futex returns at once.
            futex_wait(u + _WORK, work, -1)
            fetch_add32(u + _SLEEPERS, np.uint32(0xFFFFFFFF))
    return 0


@kernel
def wake_all(u: int) -> int:
    """Have every thread look at `stop`."""
    fetch_add32(u + _WORK, np.uint32(1))
    return int(futex_wake(u + _WORK, 1 << 30))


@kernel
def run_here(u: int) -> int:
    """Without threads: execute what is published, as long as there is room for the results. 0."""
    r = ring_at(u)
    limit = r["cq_mask"] + 1 - MAX_POLL_EVENTS
    while distance(load_once32(r["cq_tail"]), load_once32(r["cq_head"])) < limit:
        if step(u, r["scratch"]) == 0:
            break
    return 0


@kernel
def publish(u: int) -> int:
    """What io_uring_enter does for submission: give all that is pending to the threads. 0."""
    r = ring_at(u)
    pending = r["pending"]
    store_release32(r["sq_tail"], np.uint32(r["tail"]))
    r["pending"] = 0
    r["enters"] += 1
    if r["threads"] == 0:
        return int(run_here(u))
    fetch_add32(u + _WORK, np.uint32(1))  # a full barrier, too: the tail is seen before we look for sleepers
    sleepers = int(load_once32(u + _SLEEPERS))
    if sleepers > 0:
        futex_wake(u + _WORK, min(sleepers, pending))
    return 0


@kernel
def collect(u: int, timeout_ms: int) -> int:
    """epoll_wait(2): a completion for each event fd that became readable. 0, or -errno."""
    r = ring_at(u)
    if r["threads"] == 0:
        run_here(u)
    used = distance(load_acquire32(r["cq_tail"]), load_once32(r["cq_head"]))
    room = min(MAX_POLL_EVENTS, r["cq_mask"] + 1 - used)
    if room <= 0:
        return 0
    n = epoll_wait(r["fd"], r["events"], room, timeout_ms)
    if n < 0:
        return int(n)
    for k in range(n):
        user_data = load64(r["events"] + k * _EVENT_SIZE + _EVENT_DATA)
        if user_data != DONE:
            post(u, user_data, EPOLLIN, IORING_CQE_F_MORE, 0)
    return 0


@kernel
def wait_software(u: int, timeout_ns: int) -> int:
    """`uring.wait`, once everything is submitted: 0 or -errno. Timeouts are rounded up to milliseconds."""
    r = ring_at(u)
    if r["threads"] == 0:
        run_here(u)
    store_once32(u + _WAITING, np.uint32(1))
    full_barrier()  # pairs with the one in `step`
    timeout_ms = 0
    if load_acquire32(r["cq_tail"]) == load_once32(r["cq_head"]):
        timeout_ms = -1 if timeout_ns < 0 else (timeout_ns + 999_999) // 1_000_000
    status = collect(u, timeout_ms)
    store_once32(u + _WAITING, np.uint32(0))
    return int(status)


@kernel
def epoll_add(u: int, fd: int, data: int, how: int) -> int:
    """Put `fd` into the epoll set. `how`: EPOLLET, or 0: reported as long as it is readable. 0 or -errno."""
    r = ring_at(u)
    e = records(r["events"], 1, EPOLL_EVENT)[0]
    e["events"] = EPOLLIN | how
    store64(r["events"] + _EVENT_DATA, data)
    return int(syscall(_NR_EPOLL_CTL, r["fd"], _EPOLL_CTL_ADD, fd, r["events"], 0, 0))


@kernel
def add_poll(u: int, fd: int, user_data: int, how: int) -> int:
    """Begin a poll, see epoll_add(). 0, or -EAGAIN: no room for the completion that tells of a failure."""
    status = epoll_add(u, fd, user_data, how)
    if status < 0:
        return int(post(u, user_data, status, 0, 0))
    return 0


@kernel
def remove_poll(u: int, fd: int, poll_user_data: int, user_data: int) -> int:
    """Take `fd` out of the epoll set, complete its poll as cancelled, and this. 0, or -EAGAIN: no room."""
    r = ring_at(u)
    if distance(load_acquire32(r["cq_tail"]), load_once32(r["cq_head"])) + 2 > r["cq_mask"] + 1:
        return -_EAGAIN
    status = syscall(_NR_EPOLL_CTL, r["fd"], _EPOLL_CTL_DEL, fd, r["events"], 0, 0)
    if status == 0:
        post(u, poll_user_data, -_ECANCELED, 0, 0)
    return int(post(u, user_data, status, 0, 0))

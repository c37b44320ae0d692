"""The threads of the software ring (software_ring.py): made, started and ended from Python."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from typing import Any, Final

import numpy as np

from pvdrivers.syscalls import EPOLL_EVENT
from rings.jit import JIT, compile_for

from .software_ring import DONE, MAX_POLL_EVENTS, epoll_add, serve, wake_all
from .uring_layout import CQE, EPOLLET, IORING_SQ_TASKRUN, KIND_THREADS, SQE

_LINE: Final = 64
JOIN_SECONDS: Final = 10.0
"""How long threads have to end: all of a process together, as who stops a service does not wait for each."""

_abandoned: list[object] = []
"""Memory that a thread stuck in a system call may still write to: kept until the process ends."""


def address(buffer: Any) -> int:
    """Where a writable buffer is in memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Arena:
    """Zeroed memory that does not move, given out in whole cache lines."""

    def __init__(self, *sizes: int) -> None:
        self._bytes = np.zeros(sum(-(-n // _LINE) * _LINE for n in sizes) + _LINE, np.uint8)
        self._base = int(self._bytes.ctypes.data)
        self._next = -(-self._base // _LINE) * _LINE

    def take(self, n: int) -> int:
        """The address of `n` bytes."""
        at = self._next
        self._next += -(-n // _LINE) * _LINE
        assert self._next <= self._base + len(self._bytes), "the sizes given at first do not hold this"
        return at

    def view(self, at: int, dtype: np.dtype[Any]) -> Any:
        """The record at an address in this memory."""
        first = at - self._base
        return self._bytes[first : first + dtype.itemsize].view(dtype)[0]


class ThreadPool:
    """Queues in memory, an epoll set, and threads that serve them. Fills the URING record `r` at `address`."""

    def __init__(self, r: Any, address: int, entries: int, cq_entries: int, threads: int) -> None:
        cq_entries = 1 << max(2 * MAX_POLL_EVENTS, cq_entries - 1).bit_length()
        # Submission empties the kernel's queue and not this one; who never has more under way than there is room for
        # completions shall not find it full.
        entries = max(cq_entries, 1 << max(0, entries - 1).bit_length())
        # With the JIT off there is no true compare-exchange, and no use in threads under the GIL.
        threads = threads if JIT else 0
        words = [4] * 5
        parts = [entries * SQE.itemsize, cq_entries * CQE.itemsize, MAX_POLL_EVENTS * EPOLL_EVENT.itemsize]
        scratch = [SQE.itemsize] * (threads + 1)
        self._memory = Arena(*words, *parts, *scratch)
        self._address = address
        self._record = r
        self._threads: list[threading.Thread] = []
        self._fds: list[int] = []
        take = self._memory.take
        for name in ("sq_head", "sq_tail", "sq_flags", "cq_head", "cq_tail"):
            r[name] = take(4)
        r["sqes"], r["cqes"], r["events"] = (take(n) for n in parts)
        r["sq_mask"], r["cq_mask"] = entries - 1, cq_entries - 1
        # "The kernel has work for you": makes every reap look at the epoll set.
        ctypes.c_uint32.from_address(int(r["sq_flags"])).value = IORING_SQ_TASKRUN
        r["kind"] = KIND_THREADS
        r["threads"] = threads
        r["scratch"] = take(SQE.itemsize)
        warm()  # here and now, not when the first request comes
        self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        r["done_fd"] = self._fds[0]
        self._epoll = select.epoll()
        r["fd"] = self._epoll.fileno()
        if epoll_add(address, self._fds[0], DONE, EPOLLET) != 0:
            raise OSError("the eventfd of the threads cannot be polled")
        for n in range(threads):
            thread = threading.Thread(target=self._run, args=(take(SQE.itemsize),), name=f"io-{n}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run(self, scratch: int) -> None:
        # Signals are for the threads that can act on them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        serve(self._address, scratch)

    def end(self) -> None:
        """Have the threads end, each after the request that it executes now; what is still queued is not executed."""
        self._record["stop"] = 1
        wake_all(self._address)

    def close(self, deadline: float | None = None) -> None:
        """End the threads, and wait for them until then (monotonic); by default for a few seconds."""
        self.end()
        if deadline is None:
            deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            _abandoned.append((self._memory, self._record))
        else:
            self._epoll.close()
            for fd in self._fds:
                os.close(fd)


def warm() -> None:
    """Compile what the threads and those who make them call."""
    compile_for(epoll_add, 4)
    compile_for(serve, 2)
    compile_for(wake_all, 1)

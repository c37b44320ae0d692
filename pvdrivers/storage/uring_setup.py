"""Setting an io_uring up, from Python: system calls through libc, then three shared mappings.

The ring is made disabled (IORING_SETUP_R_DISABLED), so that the control thread can make it and the worker,
by `enable`, become the one thread that the kernel lets submit (SINGLE_ISSUER), which is what makes
DEFER_TASKRUN possible: completions are then posted when the worker asks, and never by interrupting it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from contextlib import suppress
from typing import Final, Literal

from pvdrivers.closing import Closing
from pvdrivers.errors import PlatformError
from pvdrivers.syscalls import NR_IO_URING_REGISTER, NR_IO_URING_SETUP

from .software_pool import Arena, ThreadPool, address
from .uring_layout import KIND_IO_URING, TIMESPEC, URING

_CQSIZE: Final = 1 << 3
_CLAMP: Final = 1 << 4
_R_DISABLED: Final = 1 << 6
_SUBMIT_ALL: Final = 1 << 7  # Linux 5.18: a bad SQE fails alone
_COOP_TASKRUN: Final = 1 << 8  # 5.19: no interrupt when we are running anyway
_TASKRUN_FLAG: Final = 1 << 9  # 5.19
_SINGLE_ISSUER: Final = 1 << 12  # 6.0
_DEFER_TASKRUN: Final = 1 << 13  # 6.1
_ALWAYS: Final = _CQSIZE | _CLAMP | _R_DISABLED
# Best first; the kernel says EINVAL to a flag that it does not know.
_FLAG_SETS: Final = (
    _ALWAYS | _SUBMIT_ALL | _TASKRUN_FLAG | _SINGLE_ISSUER | _DEFER_TASKRUN,
    _ALWAYS | _SUBMIT_ALL | _TASKRUN_FLAG | _COOP_TASKRUN,
    _ALWAYS | _SUBMIT_ALL,
    _ALWAYS,
)

_FEAT_SINGLE_MMAP: Final = 1 << 0
_FEAT_NODROP: Final = 1 << 1
_FEAT_EXT_ARG: Final = 1 << 8
_FEAT_RSRC_TAGS: Final = 1 << 10  # stands for 5.13, the first kernel with multishot poll
_FEAT_CQE_SKIP: Final = 1 << 11  # 5.17: done without it
_FEATURES: Final = _FEAT_SINGLE_MMAP | _FEAT_NODROP | _FEAT_EXT_ARG | _FEAT_RSRC_TAGS

_OFF_SQ_RING: Final = 0
_OFF_SQES: Final = 0x10000000
_REGISTER_FILES: Final = 2
_REGISTER_ENABLE_RINGS: Final = 12
_REGISTER_IOWQ_MAX_WORKERS: Final = 19
MOST_WAITING: Final = 2048
"""Blocking I/Os that one submitting thread has under way at once, each in a thread of the kernel's while it lasts."""

# struct io_uring_params: 10 words (sq_entries, cq_entries, flags, ..., features at 5, ...), then sq_off,
# then cq_off.
_PARAMS: Final = struct.Struct("=10I 8IQ 8IQ")

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long


def _syscall(nr: int, *args: int) -> int:
    """A system call: its result; raises OSError."""
    result: int = _LIBC.syscall(ctypes.c_long(nr), *(ctypes.c_long(a) for a in args))
    if result == -1:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e))
    return result


def why_refused(e: OSError) -> str:
    """What an operator can do about an io_uring that cannot be set up."""
    if e.errno == errno.EPERM:
        return "io_uring is forbidden here (sysctl kernel.io_uring_disabled, or a seccomp filter)"
    if e.errno == errno.ENOSYS:
        return "this kernel has no io_uring, or a seccomp filter hides it"
    if e.errno == errno.ENOMEM:
        return "no locked memory for an io_uring (ulimit -l, before Linux 5.12)"
    return f"io_uring cannot be set up: {e.strerror}"


class Uring(Closing):
    """One ring of requests to the kernel, and one of completions. Give `address` to the kernels of `uring`.

    `kind` is "io_uring", or "threads" for the software ring; then `reason` says why. Made by any thread;
    the one that is to submit calls the kernel `enable` (or the method) first. Raises PlatformError if it
    cannot be made.

    `keep`: a descriptor that the kernel lets go of with the ring, so after the last request, should this process end.
    """

    def __init__(
        self,
        entries: int = 256,
        cq_entries: int = 4096,
        software: bool = False,
        chunk: int = 4,
        threads: int = 4,
        *,
        keep: int = -1,
    ) -> None:
        self.kind: Literal["io_uring", "threads"] = "threads" if software else "io_uring"
        self.reason = "asked for" if software else ""
        self.flags = 0
        # The record must not move, and should begin a cache line.
        self._memory = Arena(URING.itemsize)
        self.address = self._memory.take(URING.itemsize)
        self._record = self._memory.view(self.address, URING)
        self._record["chunk"] = chunk
        self._maps: list[mmap.mmap] = []
        self._fd = -1
        self._pool: ThreadPool | None = None
        try:
            if software:
                self._pool = ThreadPool(self._record, self.address, entries, cq_entries, threads)
            else:
                self._set_up(entries, cq_entries)
                self._let_many_wait()
                if keep >= 0:  # the threads of a software ring have it for as long as they are at a request
                    files = bytearray(struct.pack("=i", keep))
                    _syscall(NR_IO_URING_REGISTER, self._fd, _REGISTER_FILES, address(files), 1)
        except OSError as e:
            self.close()
            raise PlatformError(why_refused(e)) from e
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        entries: int = 256,
        cq_entries: int = 4096,
        software: bool | None = None,
        chunk: int = 4,
        threads: int = 4,
        *,
        keep: int = -1,
    ) -> Uring:
        """With `software` None: an io_uring, or the software ring where that is refused."""
        if software is not None:
            return cls(entries, cq_entries, software, chunk, threads, keep=keep)
        try:
            return cls(entries, cq_entries, False, chunk, threads, keep=keep)
        except PlatformError as e:
            ring = cls(entries, cq_entries, True, chunk, threads)
            ring.reason = str(e)
            return ring

    def _set_up(self, entries: int, cq_entries: int) -> None:
        for flags in _FLAG_SETS:
            params = bytearray(_PARAMS.pack(0, cq_entries, flags, *[0] * 25))
            try:
                self._fd = _syscall(NR_IO_URING_SETUP, entries, address(params))
            except OSError as e:
                if e.errno == errno.EINVAL and flags != _FLAG_SETS[-1]:
                    continue
                raise
            break
        p = _PARAMS.unpack(params)
        self.flags = flags
        if p[5] & _FEATURES != _FEATURES:
            raise OSError(
                errno.ENOSYS, f"io_uring of this kernel is too old (features {p[5]:#x}; Linux 5.13 is needed)"
            )
        sq_entries, cq_entries = p[0], p[1]
        # Of struct io_sqring_offsets and io_cqring_offsets.
        sq_head, sq_tail, sq_mask, _, sq_flags, _, sq_array = p[10:17]
        cq_head, cq_tail, cq_mask, _, _, cqes = p[19:25]
        rings = mmap.mmap(self._fd, max(sq_array + 4 * sq_entries, cqes + 16 * cq_entries), offset=_OFF_SQ_RING)
        self._maps.append(rings)
        sqes = mmap.mmap(self._fd, 64 * sq_entries, offset=_OFF_SQES)
        self._maps.append(sqes)
        base = address(rings)
        r = self._record
        r["kind"] = KIND_IO_URING
        r["fd"] = self._fd
        r["sq_head"], r["sq_tail"], r["sq_flags"] = base + sq_head, base + sq_tail, base + sq_flags
        r["cq_head"], r["cq_tail"], r["cqes"] = base + cq_head, base + cq_tail, base + cqes
        r["sqes"] = address(sqes)
        (r["sq_mask"],) = struct.unpack_from("=I", rings, sq_mask)
        (r["cq_mask"],) = struct.unpack_from("=I", rings, cq_mask)
        r["arg_timeout"] = self.address + TIMESPEC
        r["quiet"] = bool(p[5] & _FEAT_CQE_SKIP)
        # SQEs are used in order: entry i of the indirection is i, once and for all.
        struct.pack_into(f"={sq_entries}I", rings, sq_array, *range(sq_entries))

    def _let_many_wait(self) -> None:
        """Of what blocks, buffered writes and flushes, Linux has four a processor under way and has the rest stand in
        line, whatever their files: one store that hangs would hold up all others of the ring."""
        counts = bytearray(struct.pack("=2I", MOST_WAITING, 0))
        with suppress(OSError):  # before Linux 5.15 it is as it is
            _syscall(NR_IO_URING_REGISTER, self._fd, _REGISTER_IOWQ_MAX_WORKERS, address(counts), 2)

    def enable(self) -> None:
        """Make the calling thread the one that submits (a worker calls the kernel of this name instead)."""
        if self.kind == "io_uring":
            _syscall(NR_IO_URING_REGISTER, self._fd, _REGISTER_ENABLE_RINGS, 0, 0)

    @property
    def deferred(self) -> bool:
        """Whether the kernel finishes requests only while it is entered (Linux 6.1), and touches no buffer else."""
        return bool(self.flags & _DEFER_TASKRUN)

    @property
    def enters(self) -> int:
        """System calls made so far."""
        return int(self._record["enters"])

    def end(self) -> None:
        """Have threads of ours, if there are any, take up nothing more. Goes before close(), which waits for them."""
        if self._pool is not None:
            self._pool.end()

    def close(self, deadline: float | None = None) -> None:
        """Take it down. What is under way goes on in the kernel: wait for it first, or keep its buffers.

        `deadline`: until then (monotonic) threads of ours are waited for."""
        if self._pool is not None:
            self._pool.close(deadline)
            self._pool = None
        for m in self._maps:
            m.close()
        self._maps.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

"""System calls for kernels: the one file that is both compiled and talks to the operating system.

A system call made here is the instruction itself: no libc, no errno, no GIL. It returns what the kernel does,
-errno on failure. Blocking calls come back with -EINTR when a signal arrives; the signal handlers of Python
only run once the compiled function has returned to Python, so it should. Addresses are int64.

Numbers: Linux arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h.
Under NUMBA_DISABLE_JIT=1 libc's syscall(2) is called through ctypes: same names, same results.
"""

from __future__ import annotations

import errno
import platform
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rings.atomics import load64, store64
from rings.jit import NUMBA, inline

_X86: Final = platform.machine() in ("x86_64", "amd64", "AMD64")
_ARM: Final = platform.machine() in ("aarch64", "arm64")


def _nr(x86: int, arm: int) -> int:
    return x86 if _X86 else arm


CYCLES: Final = _X86
"""Whether cycle_counter() may be used here."""

NR_READ: Final = _nr(0, 63)
NR_WRITE: Final = _nr(1, 64)
NR_MMAP: Final = _nr(9, 222)
NR_MPROTECT: Final = _nr(10, 226)
NR_MUNMAP: Final = _nr(11, 215)
NR_RT_SIGPROCMASK: Final = _nr(14, 135)
NR_PREAD: Final = _nr(17, 67)
NR_PWRITE: Final = _nr(18, 68)
NR_PREADV: Final = _nr(295, 69)
NR_PWRITEV: Final = _nr(296, 70)
NR_READV: Final = _nr(19, 65)
NR_WRITEV: Final = _nr(20, 66)
NR_IOCTL: Final = _nr(16, 29)
NR_RECVMSG: Final = _nr(47, 212)
NR_SCHED_YIELD: Final = _nr(24, 124)
NR_MSYNC: Final = _nr(26, 227)
NR_MADVISE: Final = _nr(28, 233)
NR_GETPID: Final = _nr(39, 172)
NR_KILL: Final = _nr(62, 129)
NR_FSYNC: Final = _nr(74, 82)
NR_FDATASYNC: Final = _nr(75, 83)
NR_FUTEX: Final = _nr(202, 98)
NR_PPOLL: Final = _nr(271, 73)
NR_EPOLL_PWAIT: Final = _nr(281, 22)
NR_FALLOCATE: Final = _nr(285, 47)
NR_IO_URING_SETUP: Final = 425
NR_IO_URING_ENTER: Final = 426
NR_IO_URING_REGISTER: Final = 427

EAGAIN: Final = errno.EAGAIN
EBUSY: Final = errno.EBUSY
EEXIST: Final = errno.EEXIST
EFAULT: Final = errno.EFAULT
EINTR: Final = errno.EINTR
EINVAL: Final = errno.EINVAL
ENOMEM: Final = errno.ENOMEM

FUTEX_WAIT, FUTEX_WAKE = 0, 1

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_READ_WRITE: Final = 3
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000
MADV_DONTNEED: Final = 4
MS_ASYNC: Final = 1

EPOLL_EVENT: Final = np.dtype([("events", "u4"), ("data", "u8")], align=not _X86)
"""struct epoll_event: packed to 12 bytes on x86-64, 16 bytes elsewhere."""

POLLFD: Final = np.dtype([("fd", "i4"), ("events", "i2"), ("revents", "i2")])
"""struct pollfd, 8 bytes."""

if TYPE_CHECKING:

    def syscall(nr: int, a: int, b: int, c: int, d: int, e: int, f: int) -> int: ...
    def _scratch16() -> int: ...
    def _clock_gettime(clock: int, addr: int) -> int: ...
    def cycle_counter() -> int: ...

elif NUMBA:
    import llvmlite.binding as _llvm
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    _llvm.initialize_native_asmparser()  # inline assembly aborts the process without it

    _I32, _I64 = ir.IntType(32), ir.IntType(64)
    if _X86:
        # The instruction itself destroys rcx (return address) and r11 (flags).
        _INSTRUCTION = "syscall"
        _CONSTRAINTS = "={rax},{rax},{rdi},{rsi},{rdx},{r10},{r8},{r9},~{rcx},~{r11},~{memory}"
    elif _ARM:
        _INSTRUCTION = "svc #0"
        _CONSTRAINTS = "={x0},{x8},{x0},{x1},{x2},{x3},{x4},{x5},~{memory},~{cc}"
    else:
        raise ImportError(f"machine {platform.machine()}: system calls are written for x86-64 and arm64 only")

    @intrinsic
    def syscall(typingctx: Any, nr: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
        """System call `nr` with six arguments. Returns its result, or -errno."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            fnty = ir.FunctionType(_I64, [_I64] * 7)
            return builder.asm(fnty, _INSTRUCTION, _CONSTRAINTS, list(args), True)

        return types.int64(*[types.int64] * 7), codegen

    @intrinsic
    def _scratch16(typingctx: Any) -> Any:
        """The address of 16 bytes on the stack of the caller's frame."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(_I64, 2)), _I64)

        return types.int64(), codegen

    @intrinsic
    def _clock_gettime(typingctx: Any, clock: Any, addr: Any) -> Any:
        """libc's clock_gettime, which answers from the vDSO without entering the kernel."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            fnty = ir.FunctionType(_I32, [_I32, _I64.as_pointer()])
            fn = cgutils.get_or_insert_function(builder.module, fnty, "clock_gettime")
            return builder.call(fn, [args[0], builder.inttoptr(args[1], _I64.as_pointer())])

        return types.int32(types.int32, types.int64), codegen

    @intrinsic
    def cycle_counter(typingctx: Any) -> Any:
        """The processor's cycle counter (rdtsc). On arm64 user space may not have it: see CYCLES."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            fnty = ir.FunctionType(_I64, [])
            return builder.call(builder.module.declare_intrinsic("llvm.readcyclecounter", (), fnty), [])

        return types.int64(), codegen

else:
    import ctypes
    import threading

    _LIBC = ctypes.CDLL(None, use_errno=True)
    _LIBC.syscall.restype = ctypes.c_long

    class _Scratch(threading.local):
        def __init__(self) -> None:
            self.buffer = (ctypes.c_int64 * 2)()

    _SCRATCH = _Scratch()

    def syscall(nr: int, a: int, b: int, c: int, d: int, e: int, f: int) -> int:
        """The plain twin."""
        result: int = _LIBC.syscall(*(ctypes.c_long(int(x)) for x in (nr, a, b, c, d, e, f)))
        return result if result != -1 else -ctypes.get_errno()

    def _scratch16() -> int:
        return ctypes.addressof(_SCRATCH.buffer)

    def _clock_gettime(clock: int, addr: int) -> int:
        seconds, nanoseconds = divmod(time.clock_gettime_ns(clock), 1_000_000_000)
        store64(addr, seconds)
        store64(addr + 8, nanoseconds)
        return 0

    def cycle_counter() -> int:
        return time.perf_counter_ns()


@inline
def clock_monotonic() -> int:
    """CLOCK_MONOTONIC in nanoseconds; about 20 ns."""
    at = _scratch16()
    _clock_gettime(1, at)
    now: int = load64(at) * 1_000_000_000 + load64(at + 8)
    return now


@inline
def read(fd: int, addr: int, n: int) -> int:
    """read(2): bytes read, 0 at the end, or -errno."""
    return syscall(NR_READ, fd, addr, n, 0, 0, 0)


@inline
def write(fd: int, addr: int, n: int) -> int:
    """write(2): bytes written, or -errno."""
    return syscall(NR_WRITE, fd, addr, n, 0, 0, 0)


@inline
def eventfd_add(fd: int, value: int) -> int:
    """Add `value` to an eventfd: 8, or -errno (-EAGAIN: its counter is full, so it is readable anyway)."""
    at = _scratch16()
    store64(at, value)
    return syscall(NR_WRITE, fd, at, 8, 0, 0, 0)


@inline
def eventfd_take(fd: int) -> int:
    """Read an eventfd: its counter, now zero; or -errno (-EAGAIN: it was zero)."""
    at = _scratch16()
    n = syscall(NR_READ, fd, at, 8, 0, 0, 0)
    if n == 8:
        n = load64(at)
    return n


@inline
def readv(fd: int, iovecs: int, count: int) -> int:
    """readv(2) into `count` IOVEC records at an address: bytes read, or -errno."""
    return syscall(NR_READV, fd, iovecs, count, 0, 0, 0)


@inline
def writev(fd: int, iovecs: int, count: int) -> int:
    """writev(2) from `count` IOVEC records at an address: bytes written, or -errno."""
    return syscall(NR_WRITEV, fd, iovecs, count, 0, 0, 0)


@inline
def pread(fd: int, addr: int, n: int, offset: int) -> int:
    """pread(2): bytes read, or -errno."""
    return syscall(NR_PREAD, fd, addr, n, offset, 0, 0)


@inline
def pwrite(fd: int, addr: int, n: int, offset: int) -> int:
    """pwrite(2): bytes written, or -errno."""
    return syscall(NR_PWRITE, fd, addr, n, offset, 0, 0)


@inline
def preadv(fd: int, iovecs: int, count: int, offset: int) -> int:
    """preadv(2) into `count` IOVEC records at an address: bytes read, or -errno."""
    return syscall(NR_PREADV, fd, iovecs, count, offset, 0, 0)


@inline
def pwritev(fd: int, iovecs: int, count: int, offset: int) -> int:
    """pwritev(2) from `count` IOVEC records at an address: bytes written, or -errno."""
    return syscall(NR_PWRITEV, fd, iovecs, count, offset, 0, 0)


@inline
def fsync(fd: int) -> int:
    """fsync(2): 0 or -errno."""
    return syscall(NR_FSYNC, fd, 0, 0, 0, 0, 0)


@inline
def fdatasync(fd: int) -> int:
    """fdatasync(2): 0 or -errno."""
    return syscall(NR_FDATASYNC, fd, 0, 0, 0, 0, 0)


@inline
def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2); `mode` is FALLOC_FL_*. 0 or -errno."""
    return syscall(NR_FALLOCATE, fd, mode, offset, length, 0, 0)


@inline
def ioctl(fd: int, request: int, argument: int) -> int:
    """ioctl(2): its result, or -errno."""
    return syscall(NR_IOCTL, fd, request, argument, 0, 0, 0)


@inline
def ioctl32(fd: int, request: int, value: int) -> int:
    """ioctl(2) whose argument is a structure of one 32-bit number: its result, or -errno."""
    at = _scratch16()
    store64(at, value)
    return syscall(NR_IOCTL, fd, request, at, 0, 0, 0)


@inline
def mmap(addr: int, n: int, protection: int, flags: int, fd: int, offset: int) -> int:
    """mmap(2): the address, or -errno."""
    return syscall(NR_MMAP, addr, n, protection, flags, fd, offset)


@inline
def munmap(addr: int, n: int) -> int:
    """munmap(2): 0 or -errno."""
    return syscall(NR_MUNMAP, addr, n, 0, 0, 0, 0)


@inline
def is_mapped(addr: int, n: int) -> bool:
    """Whether there is something at every page from `addr` on; it is not touched. msync(2) of MS_ASYNC does no more."""
    return syscall(NR_MSYNC, addr, n, MS_ASYNC, 0, 0, 0) == 0


@inline
def is_readable(addr: int) -> bool:
    """Whether 8 bytes there can be read. rt_sigprocmask(2) has read its mask before it sees that `how` is none."""
    return syscall(NR_RT_SIGPROCMASK, -1, addr, 0, 8, 0, 0) != -EFAULT


@inline
def mprotect(addr: int, n: int, protection: int) -> int:
    """mprotect(2) of whole pages: 0 or -errno."""
    return syscall(NR_MPROTECT, addr, n, protection, 0, 0, 0)


@inline
def madvise(addr: int, n: int, advice: int) -> int:
    """madvise(2): 0 or -errno."""
    return syscall(NR_MADVISE, addr, n, advice, 0, 0, 0)


@inline
def getpid() -> int:
    """The process id."""
    return syscall(NR_GETPID, 0, 0, 0, 0, 0, 0)


@inline
def kill(pid: int, signal: int) -> int:
    """kill(2): 0 or -errno."""
    return syscall(NR_KILL, pid, signal, 0, 0, 0, 0)


@inline
def sched_yield() -> int:
    """Let another thread have the core."""
    return syscall(NR_SCHED_YIELD, 0, 0, 0, 0, 0, 0)


@inline
def poll(pollfds: int, count: int, timeout_ns: int) -> int:
    """poll(2) on `count` POLLFD records; a negative timeout waits for ever. How many are ready, or -errno."""
    at = _scratch16()
    if timeout_ns < 0:
        return syscall(NR_PPOLL, pollfds, count, 0, 0, 8, 0)
    store64(at, timeout_ns // 1_000_000_000)
    store64(at + 8, timeout_ns % 1_000_000_000)
    return syscall(NR_PPOLL, pollfds, count, at, 0, 8, 0)


@inline
def epoll_wait(epfd: int, events: int, count: int, timeout_ms: int) -> int:
    """epoll_wait(2) into `count` EPOLL_EVENT records; -1 waits for ever. How many, or -errno."""
    return syscall(NR_EPOLL_PWAIT, epfd, events, count, timeout_ms, 0, 8)


@inline
def futex_wait(addr: int, expected: int, timeout_ns: int) -> int:
    """Sleep while the 32-bit word at `addr` is `expected`. 0, -EAGAIN (it is not), -ETIMEDOUT or -EINTR.

    A negative timeout waits for ever. The futex is not private: the word may be in memory of two processes.
    """
    at = _scratch16()
    if timeout_ns < 0:
        return syscall(NR_FUTEX, addr, FUTEX_WAIT, expected, 0, 0, 0)
    store64(at, timeout_ns // 1_000_000_000)
    store64(at + 8, timeout_ns % 1_000_000_000)
    return syscall(NR_FUTEX, addr, FUTEX_WAIT, expected, at, 0, 0)


@inline
def futex_wake(addr: int, count: int) -> int:
    """Wake up to `count` sleepers on the word at `addr`: how many there were, or -errno."""
    return syscall(NR_FUTEX, addr, FUTEX_WAKE, count, 0, 0, 0)


@inline
def io_uring_enter(fd: int, submit: int, complete: int, flags: int, argument: int, size: int) -> int:
    """io_uring_enter(2): requests consumed, or -errno."""
    return syscall(NR_IO_URING_ENTER, fd, submit, complete, flags, argument, size)


assert sys.maxsize == 2**63 - 1, "addresses are 64 bits wide here"

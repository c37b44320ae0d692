"""Who else uses an image: flock, QEMU's byte-range locks, and the fence that a dead process leaves behind.

All of them are taken on the very file description that does the I/O. The kernel lets go of them with its
last reference to the description - and an I/O still under way holds one. So the lock of a killed process
goes exactly when the last of its writes has landed: waiting for it is the drain.

    flock              LOCK_EX by a writer, LOCK_SH by readers and by mode w! QEMU's bytes       100 + p:
    permission p is in use; 200 + p: p is not shared with others (block/file-posix.c) the fence          one
    byte at 2**62 + hash(identity of the device), so that readers of one image have one each

Where a file system has no locks (NFS without lockd, say), the fence is in a file of the run directory instead, on a
description that the I/O's io_uring holds: see Fence.

The locks belong to the file name's inode: the same disk under two device nodes is kept apart by O_EXCL alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from pvdrivers.errors import DeviceBusyError, PlatformError, StoreError

__all__ = ["DrainingError", "Fence", "Locks", "Patience", "Trouble", "fence_offset", "holders"]

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")
_UNSUPPORTED: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})

# QEMU include/block/block-common.h and block/file-posix.c.
PERM_CONSISTENT_READ: Final = 0
PERM_WRITE: Final = 1
PERM_WRITE_UNCHANGED: Final = 2
PERM_RESIZE: Final = 3
RAW_LOCK_PERM_BASE: Final = 100
RAW_LOCK_SHARED_BASE: Final = 200
_PERM_NAMES: Final = {0: "consistent read", 1: "write", 2: "write unchanged", 3: "resize"}

_SETTLE_S: Final = 0.5
"""udev locks a block device for a moment after each change; somebody else's lock is believed after this time."""
_ALIVE_S: Final = 2.0
"""A process that is being killed still counts as running for a while; this long it may."""

_HINT: Final = "end that, or share the image by mode=r for all or by mode=w!"

_PF_EXITING: Final = 0x4  # proc(5), stat, field 9 (flags); include/linux/sched.h
_SIGKILL_BIT: Final = 1 << (9 - 1)


class DrainingError(DeviceBusyError):
    """The I/O of a process that has ended is still under way. Try again later; nothing else is wrong."""


def fence_offset(identity: str) -> int:
    """Where the fence of a device is: far beyond any image, one byte for each identity (of 2**40)."""
    return (1 << 62) + int.from_bytes(hashlib.sha256(identity.encode()).digest()[:5], "big")


def _ofd(fd: int, command: int, kind: int, start: int) -> int:
    """One byte of an open file description lock; returns l_type afterwards. Raises OSError."""
    raw = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0))
    return int(_FLOCK.unpack(raw)[0])


def byte_is_locked(fd: int, start: int) -> bool:
    """Does another description hold any lock on this byte?"""
    return _ofd(fd, F_OFD_GETLK, fcntl.F_WRLCK, start) != fcntl.F_UNLCK


class Trouble(NamedTuple):
    """A lock that we cannot have: what people call it, and what /proc does."""

    text: str
    kind: str  # FLOCK or OFDLCK
    byte: int = 0

    def is_this(self, kind: str, start: str, end: str) -> bool:
        """Is it the lock of a line in /proc/locks?"""
        if kind != self.kind:
            return False
        return kind == "FLOCK" or int(start) <= self.byte <= (self.byte if end == "EOF" else int(end))


def holders(fd: int, trouble: Trouble) -> list[int]:
    """The processes that hold a lock on the file behind `fd`, apart from `fd` itself, as far as we may look.

    /proc/locks has no process for an OFD lock, and that of a flock may have ended; so the fdinfo of all
    processes is asked first: proc(5).
    """
    st = os.fstat(fd)
    where = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    own = f"/proc/{os.getpid()}/fdinfo/{fd}"
    found: set[int] = set()
    for name in glob.glob("/proc/[0-9]*/fdinfo/*"):
        with contextlib.suppress(OSError), open(name) as info:
            for line in info:
                words = line.split()
                # lock: 1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF
                if len(words) == 9 and words[0] == "lock:" and words[6] == where and name != own:
                    if trouble.is_this(words[2], words[7], words[8]):
                        found.add(int(name.split("/")[2]))
    if not found:
        with contextlib.suppress(OSError), open("/proc/locks") as locks:
            for line in locks:
                words = line.split()
                if len(words) == 8 and words[5] == where and words[4] != "-1":
                    if trouble.is_this(words[1], words[6], words[7]):
                        found.add(int(words[4]))
    return sorted(found)


def _running(pid: int) -> bool:
    """Is there such a process, and is it not about to end? One that was killed stays until its I/O has ended."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            words = f.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/status") as f:
            pending = [int(line.split()[1], 16) for line in f if line.startswith(("SigPnd:", "ShdPnd:"))]
    except OSError:
        return False
    killed = any(mask & _SIGKILL_BIT for mask in pending)
    return words[0] not in "ZX" and not int(words[6]) & _PF_EXITING and not killed


class Patience:
    """How long to wait for a lock: a moment for anyone, until the deadline for a predecessor that has ended."""

    def __init__(self, recover: bool, timeout: float) -> None:
        self.recover = recover
        self.start = time.monotonic()
        self.timeout = timeout
        self._asked = self.start
        self._running = False
        self._pause = 0.005

    def more(self, running: Callable[[], bool] = lambda: False) -> bool:
        """Wait a little and return True, or return False when the time is over.

        `running`: does a live process hold it? Asked once a second; then there is nothing to wait for.
        """
        now = time.monotonic()
        limit = self.timeout if self.recover else _SETTLE_S
        if now - self._asked >= 1.0:
            self._asked = now
            self._running = running()
        if self._running:
            limit = min(limit, _ALIVE_S)
        if now - self.start >= limit:
            return False
        time.sleep(min(self._pause, self.start + limit - now))
        self._pause = min(self._pause * 1.5, 0.1)
        return True


class Fence:
    """Of a process: RUN_DIR/fence, with a byte for each of its devices whose file system has no locks.

    Every io_uring of the process has this description registered, and the kernel lets go of that when the last request
    of a ring has ended, long after the process: so the lock of a byte goes when nothing of the device's can land any
    more, nor of others that the process had. Tried with slow writes: the process was gone after 0.02 s, this lock after
    3.63 s, with the one on the description of the I/O itself.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "fence"
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            hint = "the run directory has to be writable, with room"
            raise PlatformError(f"{self.path}: cannot be made: {e.strerror}; {hint}") from e


class Locks:
    """All locks of one store, on `fd`, and where that can have none, on the fence of the process. The former live as
    long as the description does."""

    def __init__(self, fd: int, path: str, identity: str, *, mode: str, process: Fence | None = None) -> None:
        self.fd = fd
        self.path = path
        self.mode = mode
        self.fence = fence_offset(identity)
        self.fenced = True
        """False where there is no lock: then nobody can tell when a dead process's I/O has ended."""
        self.process_fence = False
        """It is that of the process."""
        self._process = process
        self._or_else = "or somebody else has the file open, QEMU say, which `lsof` tells"

    def acquire(self, patience: Patience) -> None:
        """Take them all. Raises DeviceBusyError, DrainingError (only when recovering), or StoreError."""
        self._take(patience, self._take_fence)
        self._take(patience, self._take_flock)
        qemu = self.fenced
        self._take(patience, self._take_qemu)
        self.fenced = qemu  # without QEMU's bytes a restart is still safe
        if not qemu and self._process is not None:
            self._take_elsewhere(self._process, patience)

    def _take_elsewhere(self, process: Fence, patience: Patience) -> None:
        there = Locks(process.fd, str(process.path), "", mode="w")
        there.fence = self.fence
        there._or_else = (
            f"{self.path} has no locks of its own. Where you know that nothing lands there any more: rm {process.path},"
            " and restart the service"
        )
        there._take(patience, there._take_fence)
        self.fenced = self.process_fence = there.fenced

    def release(self) -> None:
        """The store is closed, nothing of it is under way: give back what `fd` does not take with it."""
        if self.process_fence:
            assert self._process is not None
            self.process_fence = False
            _ofd(self._process.fd, F_OFD_SETLK, fcntl.F_UNLCK, self.fence)

    def wait_for_others(self, patience: Patience) -> bool:
        """Is there a lock of somebody else's? Then wait a little. Raises as `acquire` does."""
        trouble = self._take_fence() or self._take_flock()
        if trouble is None:
            return patience.more()
        self._give_up_unless(patience, trouble)
        return True

    def _take(self, patience: Patience, step: Callable[[], Trouble | None]) -> None:
        while True:
            try:
                trouble = step()
            except OSError as e:
                if e.errno not in _UNSUPPORTED:
                    raise StoreError(f"{self.path}: locks cannot be taken: {e.strerror}") from e
                self.fenced = False
                return
            if trouble is None:
                return
            self._give_up_unless(patience, trouble)

    def _running_holders(self, trouble: Trouble) -> list[int]:
        return [pid for pid in holders(self.fd, trouble) if _running(pid)]

    def _give_up_unless(self, patience: Patience, trouble: Trouble) -> None:
        """Wait a little. Raises DeviceBusyError or DrainingError when it has been long enough."""
        if patience.more(lambda: bool(self._running_holders(trouble))):
            return
        running = self._running_holders(trouble)
        if running:
            names = " and ".join(_name(pid) for pid in running)
            raise DeviceBusyError(f"{self.path}: in use: {trouble.text} is held by {names}; {_HINT}")
        if patience.recover:
            raise DrainingError(
                f"{self.path}: {trouble.text} is still held, by no process that may be seen from here: I/O of one that"
                f" has ended is under way, and the disk waits until that has landed; {self._or_else}"
            )
        raise DeviceBusyError(
            f"{self.path}: in use: {trouble.text} is held, by no process that can be seen from here; {_HINT}"
        )

    def _take_fence(self) -> Trouble | None:
        trouble = Trouble("the lock of this very device (the fence)", "OFDLCK", self.fence)
        # A read lock is all that a read-only description may take; so ask first.
        if byte_is_locked(self.fd, self.fence):
            return trouble
        writable = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        try:
            _ofd(self.fd, F_OFD_SETLK, fcntl.F_WRLCK if writable else fcntl.F_RDLCK, self.fence)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return trouble
            raise
        return None

    def _take_flock(self) -> Trouble | None:
        kind = fcntl.LOCK_EX if self.mode == "w" else fcntl.LOCK_SH
        try:
            fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return Trouble("a lock of the whole file (flock)", "FLOCK")
            raise
        return None

    def _take_qemu(self) -> Trouble | None:
        """As raw_apply_lock_bytes and raw_check_lock_bytes do it: say what we do, then look at the others."""
        used = [PERM_CONSISTENT_READ]
        unshared = [PERM_WRITE, PERM_RESIZE]
        if self.mode != "r":
            used += [PERM_WRITE, PERM_WRITE_UNCHANGED]
        if self.mode == "w!":
            unshared = []
        ours = [RAW_LOCK_PERM_BASE + p for p in used] + [RAW_LOCK_SHARED_BASE + p for p in unshared]
        for byte in ours:
            _ofd(self.fd, F_OFD_SETLK, fcntl.F_RDLCK, byte)
        for perm in used:
            if byte_is_locked(self.fd, RAW_LOCK_SHARED_BASE + perm):
                text = f"QEMU's lock against others' \"{_PERM_NAMES[perm]}\""
                return Trouble(text, "OFDLCK", RAW_LOCK_SHARED_BASE + perm)
        for perm in unshared:
            if byte_is_locked(self.fd, RAW_LOCK_PERM_BASE + perm):
                return Trouble(f'QEMU\'s lock "{_PERM_NAMES[perm]}"', "OFDLCK", RAW_LOCK_PERM_BASE + perm)
        return None


def _name(pid: int) -> str:
    if pid == os.getpid():
        return "this process, for another disk"
    try:
        with open(f"/proc/{pid}/comm") as f:
            return f"process {pid} ({f.read().strip()})"
    except OSError:
        return f"process {pid}"

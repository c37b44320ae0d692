"""Files and block devices: opened once, with the flags and the locks that the I/O needs, and asked what
they can do.

What happens when a file changes under a guest: a read past the new end of a truncated file is short (0
bytes at the end) - the backend answers it as an I/O error - and a write there makes the file longer again,
with a hole. A block device that shrank or vanished answers EIO or ENOSPC. The other requests go on.
`refresh_size` sees either change.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from typing import Final

from pvdrivers.errors import ConfigError, DeviceBusyError, StoreError

from .constants import PUNCH_HOLE, STORE_FILE
from .locks import Fence, Locks, Patience
from .store import Store
from .uri import MAX_SIZE, DiskSpec, size_text

__all__ = ["FileStore"]

# include/uapi/linux/fs.h
BLKGETSIZE64: Final = 0x80081272
BLKSSZGET: Final = 0x1268
BLKPBSZGET: Final = 0x127B
BLKROGET: Final = 0x125E

# statx(2): Linux 6.1 tells what O_DIRECT wants.
_STATX_DIOALIGN: Final = 0x2000
_AT_EMPTY_PATH: Final = 0x1000
_STATX_SIZE: Final = 256
_DIO_MEM_ALIGN: Final = 152  # offset of stx_dio_mem_align, then stx_dio_offset_align

# include/uapi/linux/magic.h, and the file systems' own sources.
_TMPFS_MAGIC: Final = 0x01021994
_OVER_NETWORK: Final = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
    0x00C36400: "Ceph",
    0x01021997: "9p",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x0BD00BD0: "Lustre",
}
"""File systems that send the pages of a request themselves, and may do so again after it was answered; with O_DIRECT
those are the guest's. xl-disk-configuration(5), direct-io-safe: whether it is known to do no harm."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)

_MAX_MEMORY_ALIGNMENT: Final = 512
"""A segment of a guest begins at a multiple of 512 bytes: what wants more cannot take it as it is."""


class FileStore(Store):
    """A regular file or a block device."""

    kind = STORE_FILE

    def __init__(self, spec: DiskSpec, identity: str, patience: Patience, fence: Fence | None = None) -> None:
        self.path = spec.path
        st = _look(spec)
        self.block = stat.S_ISBLK(st.st_mode)
        self.fd = self._open(spec, identity, patience)
        self.locks = Locks(self.fd, self.path, identity, mode=spec.mode, process=fence)
        try:
            # io_uring answers EAGAIN instead of waiting for a file that is not blocking.
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            st = os.fstat(self.fd)
            if stat.S_ISBLK(st.st_mode) != self.block:
                raise StoreError(f"{self.path}: was replaced while it was opened; try again")
            self.locks.acquire(patience)
            super().__init__(spec, self._measure())
            self._geometry(spec, st)
            self._direct(spec)
            self._abilities(spec, st)
        except BaseException:
            self.locks.release()
            os.close(self.fd)
            raise

    def _open(self, spec: DiskSpec, identity: str, patience: Patience) -> int:
        flags = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # nonblocking: should it be a FIFO by now
        flags |= os.O_RDONLY if spec.readonly else os.O_RDWR
        if self.block and spec.mode == "w":
            flags |= os.O_EXCL  # held by mounts, device-mapper, md and other careful programs
        if spec.cache == "writethrough":
            flags |= os.O_DSYNC
        direct = os.O_DIRECT if spec.direct != "no" else 0
        while True:
            try:
                return os.open(self.path, flags | direct)
            except OSError as e:
                if e.errno == errno.EINVAL and direct and spec.direct == "auto":
                    direct = 0
                elif not (e.errno == errno.EBUSY and self._held_by_backend(identity, patience)):
                    raise _refused(e, spec) from e

    def _held_by_backend(self, identity: str, patience: Patience) -> bool:
        """Exclusive use is refused: wait a little if a backend has it, dead or alive; False if a mount does.

        Raises DeviceBusyError or DrainingError when it has been long enough.
        """
        probe = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return Locks(probe, self.path, identity, mode="w").wait_for_others(patience)
        finally:
            os.close(probe)

    def _measure(self) -> int:
        """The size in bytes."""
        if not self.block:
            return os.fstat(self.fd).st_size
        size: int = struct.unpack("Q", fcntl.ioctl(self.fd, BLKGETSIZE64, bytes(8)))[0]
        return size

    def _geometry(self, spec: DiskSpec, st: os.stat_result) -> None:
        self._device_sector = 512
        if self.block:
            self._device_sector = _ioctl_int(self.fd, BLKSSZGET)
            self.sector_size = spec.sector_size or self._device_sector
            self.physical_sector_size = max(self.sector_size, _ioctl_int(self.fd, BLKPBSZGET))
            if not spec.readonly and _ioctl_int(self.fd, BLKROGET):
                raise StoreError(f"{self.path}: the device is read only; use mode=r, or blockdev --setrw")
        if self.size == 0:
            raise StoreError(f"{self.path}: is empty; give it a size: truncate -s 10G {self.path}")
        unit = self.sector_size
        if self.size % unit:
            hint = "sector_size=512" if self.size % 512 == 0 else f"truncate -s %{unit} {self.path}"
            raise StoreError(f"{self.path}: {self.size} bytes is no multiple of the sector size, {unit}; use {hint}")
        if self.size > MAX_SIZE:
            raise StoreError(f"{self.path}: {self.size} bytes is more than the largest disk, {size_text(MAX_SIZE)}")

    def _direct(self, spec: DiskSpec) -> None:
        """Is O_DIRECT, if we have it, possible for every request that a guest may make?"""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        asks = spec.direct == "auto" and not spec.direct_io_safe and not self.block
        self._sent_by = _OVER_NETWORK.get(_file_system(self.fd), "") if asks else ""
        if flags & os.O_DIRECT and not self._sent_by:
            memory, offset = _direct_alignment(self.fd, self._device_sector)
            if 0 < offset <= self.sector_size and memory <= _MAX_MEMORY_ALIGNMENT:
                self.direct = True
                self.submit_chunk = 32 if _file_system(self.fd) == _TMPFS_MAGIC else 4
                return
            if spec.direct == "yes":
                limit = (
                    f"it wants offsets in {offset} and addresses in {memory} bytes" if offset else "not on this file"
                )
                raise ConfigError(
                    f"disk {spec.uri!r}: option direct=yes: {limit}; use direct=auto"
                    + (f", or sector_size={offset}" if self.sector_size < offset <= 4096 else "")
                )
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False

    def _abilities(self, spec: DiskSpec, st: os.stat_result) -> None:
        self.can_flush = spec.cache != "writethrough" and not spec.readonly
        self.flush_is_needed = spec.cache == "writeback" and not spec.readonly
        if self.readonly or not spec.discard:
            return
        if self.block:
            self._block_discard(st)
        else:
            self.discard_granularity = st.st_blksize
            # A hole beyond the end changes nothing; a file system that cannot says EOPNOTSUPP.
            self.can_discard = _punch(self.fd, -(-self.size // 4096) * 4096, 4096)
        self.can_secure_discard = self.can_discard and spec.secure_discard
        if not self.can_discard:
            self.discard_granularity = 0

    def _block_discard(self, st: os.stat_result) -> None:
        """From sysfs; a partition's queue is that of its disk."""
        base = f"/sys/dev/block/{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}"
        queue = f"{base}/queue" if os.path.isdir(f"{base}/queue") else f"{base}/../queue"
        self.can_discard = _sysfs(f"{queue}/discard_max_bytes") > 0
        self.discard_granularity = max(self.sector_size, _sysfs(f"{queue}/discard_granularity"))
        self.discard_alignment = _sysfs(f"{base}/discard_alignment") % self.discard_granularity

    def refresh_size(self) -> bool:
        """Whole sectors of what is there now. Raises StoreError if the device is gone."""
        try:
            size = self._measure()
        except OSError as e:
            raise StoreError(f"{self.path}: size cannot be read: {e.strerror}; is the device gone?") from e
        size -= size % self.sector_size
        changed = size != self.size
        self.size = size
        return changed

    def _traits(self) -> list[str]:
        out = [f"sectors of {self.sector_size}", "direct" if self.direct else "buffered"]
        if self._sent_by:
            out[-1] += f" (on {self._sent_by}, without direct-io-safe)"
        if self.block:
            out.insert(0, "block device")
        if self.can_discard:
            out.append("discard")
        if not self.locks.fenced:
            out.append("no locks here, so a restart waits for nothing")
        elif self.locks.process_fence:
            out.append("no locks here, so a restart waits by those of the run directory")
        return out

    def close(self, *, final: bool = False) -> None:
        if self.fd >= 0:
            self.locks.release()
            os.close(self.fd)
            self.fd = -1


def _look(spec: DiskSpec) -> os.stat_result:
    """stat, before anything is opened: opening a tape or a FIFO does things."""
    try:
        st = os.stat(spec.path)
    except OSError as e:
        raise _refused(e, spec) from e
    if stat.S_ISDIR(st.st_mode):
        raise StoreError(f"{spec.path}: is a directory; a disk is a file or a block device")
    if not stat.S_ISREG(st.st_mode) and not stat.S_ISBLK(st.st_mode):
        raise StoreError(f"{spec.path}: is neither a file nor a block device")
    return st


def _refused(e: OSError, spec: DiskSpec) -> Exception:
    """The error for an operator, of an open(2) or stat(2) that failed."""
    path = spec.path
    if e.errno == errno.ENOENT:
        hint = (
            f"truncate -s 10G {path} makes an empty disk" if os.path.isdir(os.path.dirname(path)) else "check the path"
        )
        return StoreError(f"{path}: there is no such file; {hint}")
    if e.errno == errno.EROFS or (e.errno in (errno.EACCES, errno.EPERM) and not spec.readonly and _readable(path)):
        return StoreError(f"{path}: can be read but not written ({e.strerror}); use mode=r, or change its permissions")
    if e.errno in (errno.EACCES, errno.EPERM):
        return StoreError(f"{path}: {e.strerror} for user {os.geteuid()}; change its permissions or its directory's")
    if e.errno == errno.EBUSY:
        return DeviceBusyError(
            f"{path}: in use: the kernel refuses exclusive use (O_EXCL): it is mounted, swap,"
            " part of a volume, or open in another backend; unmount it, or share it by mode=r or mode=w!"
        )
    if e.errno == errno.EINVAL and spec.direct == "yes":
        return ConfigError(f"disk {spec.uri!r}: option direct=yes: this file system has no O_DIRECT; use direct=auto")
    if e.errno in (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
        return StoreError(f"{path}: {e.strerror}; there is no device, or no medium in it")
    return StoreError(f"{path}: cannot be opened: {e.strerror}")


def _readable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _file_system(fd: int) -> int:
    """Its magic number; 0 if it has none. Of a block device that is devtmpfs's, which is tmpfs's. statfs(2)."""
    buffer = (ctypes.c_long * 32)()
    return int(buffer[0]) & 0xFFFFFFFF if _LIBC.fstatfs(fd, buffer) == 0 else 0


def _ioctl_int(fd: int, request: int) -> int:
    value: int = struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0]
    return value


def _sysfs(path: str) -> int:
    try:
        with open(path) as f:
            return int(f.read())
    except (OSError, ValueError):
        return 0


def _punch(fd: int, offset: int, length: int) -> bool:
    """fallocate(2) of a hole: did it work?"""
    fallocate = _LIBC.fallocate64 if hasattr(_LIBC, "fallocate64") else _LIBC.fallocate
    arguments = (fd, PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length))
    return bool(fallocate(*arguments) == 0)


def _direct_alignment(fd: int, device_sector: int) -> tuple[int, int]:
    """What O_DIRECT wants of addresses, and of offsets and lengths, in bytes; (0, 0) if it is impossible.

    statx tells since Linux 6.1; before, and where the file system does not say, a read is tried.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if hasattr(_LIBC, "statx") and _LIBC.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) == 0:
        (mask,) = struct.unpack_from("I", buffer, 0)
        if mask & _STATX_DIOALIGN:
            memory, offset = struct.unpack_from("II", buffer, _DIO_MEM_ALIGN)
            return (memory, offset) if memory and offset else (0, 0)
    with mmap.mmap(-1, 8192) as page:
        for align in (512, 4096):
            if align < device_sector:
                continue
            view = memoryview(page)[align : 2 * align]
            try:
                os.preadv(fd, [view], 0)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise StoreError(f"cannot be read: {e.strerror}") from e
            else:
                return align, align
            finally:
                view.release()
    return 0, 0

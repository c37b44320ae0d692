"""What a disk is made of, opened: a file or block device, memory, or nothing at all.

A Store is plain numbers, for the worker reads and writes it from compiled code: `fd` through io_uring,
`address` by copying. `open_store` checks all that can be checked before a guest is let in, and each refusal
is one error that says what, where, which limit and what next.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Final

from pvdrivers.closing import Closing
from pvdrivers.errors import ConfigError, StoreError

from .constants import STORE_FILE, STORE_MEMORY, STORE_NULL
from .locks import DrainingError, Fence, Locks, Patience
from .software_pool import address
from .uri import DiskSpec, size_text

__all__ = [
    "STORE_FILE",
    "STORE_MEMORY",
    "STORE_NULL",
    "DrainingError",
    "MemoryStore",
    "NullStore",
    "Store",
    "open_store",
    "place_of",
]

DRAIN_TIMEOUT: Final = 30.0


class Store(Closing):
    """What the worker and the backend need to know of one open store. The defaults are those of `null:`."""

    kind: int = STORE_NULL
    fd: int = -1
    address: int = 0
    """Where a memory store is mapped; 0 for others."""
    direct: bool = False
    """I/O goes past the page cache: offset and length in `sector_size`, addresses in 512 bytes."""
    physical_sector_size: int = 512
    can_flush: bool = True
    flush_is_needed: bool = False
    """False: a flush may be answered without asking the store (null, memory, cache=unsafe)."""
    can_discard: bool = False
    can_secure_discard: bool = False
    discard_granularity: int = 0
    discard_alignment: int = 0
    submit_chunk: int = 32
    """What is best for Uring(chunk=): 4 for a disk, 32 for memory and the page cache."""

    def __init__(self, spec: DiskSpec, size: int) -> None:
        self.spec = spec
        self.size = size
        self.readonly = spec.readonly
        self.sector_size = spec.sector_size or 512
        self.physical_sector_size = self.sector_size

    @property
    def sectors(self) -> int:
        """Size in units of 512 bytes, whatever `sector_size` is: the unit of blkif."""
        return self.size // 512

    def refresh_size(self) -> bool:
        """Look how large the store is now; True if that has changed."""
        return False

    def describe(self) -> str:
        """One line for people."""
        what = ", ".join(["read only" if self.readonly else "writable", *self._traits()])
        return f"{self.spec.uri or self.spec.path}: {size_text(self.size)}, {what}"

    def _traits(self) -> list[str]:
        return [f"sectors of {self.sector_size}"]

    def close(self, *, final: bool = False) -> None:
        """Let go of it. `final`: the device is gone for good, so what was made for it is erased."""


class NullStore(Store):
    """Nothing: writes vanish; reads leave the guest's page as it is, or copy zeros. For measuring everything else."""

    def __init__(self, spec: DiskSpec) -> None:
        super().__init__(spec, spec.size)
        self.can_discard = spec.discard and not spec.readonly
        self.can_secure_discard = self.can_discard and spec.secure_discard
        self.discard_granularity = self.sector_size


class MemoryStore(Store):
    """A file in the run directory (tmpfs), mapped: it outlives a killed backend, and a final close erases it.

    All of it is allocated at once. A sparse file would be found to have no room only by the SIGBUS of a
    guest's write.
    """

    kind = STORE_MEMORY

    def __init__(self, spec: DiskSpec, run_dir: Path, identity: str, recover: bool, patience: Patience) -> None:
        super().__init__(spec, spec.size)
        self.path = run_dir / memory_name(identity)
        self._map: mmap.mmap | None = None
        try:
            self.fd, self._map = self._open(recover, patience)
        except OSError as e:
            raise StoreError(f"{self.path}: memory for {spec.uri}: {e.strerror}; is {run_dir} writable?") from e
        self.address = address(self._map)
        self.can_discard = spec.discard and not spec.readonly
        # What tmpfs frees is gone: there is nothing below it.
        self.can_secure_discard = self.can_discard
        self.discard_granularity = 4096

    def _open(self, recover: bool, patience: Patience) -> tuple[int, mmap.mmap]:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self.path, flags if recover else flags | os.O_CREAT, 0o600)
        except FileNotFoundError:
            raise StoreError(
                f"{self.path}: the contents of {self.spec.uri} are gone with the run directory; attach the disk anew"
            ) from None
        try:
            Locks(fd, str(self.path), str(self.path), mode="w").acquire(patience)
            found = os.fstat(fd).st_size
            if recover and found != self.size:
                raise StoreError(
                    f"{self.path}: has {found} bytes where {self.spec.uri} has {self.size}; attach the disk anew"
                )
            if not recover:
                os.ftruncate(fd, 0)  # what a backend left that was not closed in order
            self._reserve(fd)
            return fd, mmap.mmap(fd, self.size)
        except BaseException:
            os.close(fd)  # and the lock with it: it is tried again
            raise

    def _reserve(self, fd: int) -> None:
        try:
            os.posix_fallocate(fd, 0, self.size)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM, errno.EDQUOT):
                raise
            self.path.unlink(missing_ok=True)
            fs = os.fstatvfs(fd)
            raise StoreError(
                f"{self.path}: no room for {size_text(self.size)} of {self.spec.uri}: {e.strerror};"
                f" {size_text(fs.f_bavail * fs.f_frsize)} are free there: make the disk smaller, or that"
                " file system larger (mount -o remount,size=...), or use another --run-dir"
            ) from e

    def close(self, *, final: bool = False) -> None:
        if self._map is not None:
            if final:
                self.path.unlink(missing_ok=True)
            self._map.close()
            self._map = None
            os.close(self.fd)
            self.fd, self.address = -1, 0


def memory_name(identity: str) -> str:
    """The file of a memory store: readable, and no two identities share one."""
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return f"memory-{re.sub(r'[^A-Za-z0-9-]', '_', identity)[:80]}-{digest}"


def place_of(spec: DiskSpec | None) -> str:
    """Where a disk's bytes are, by whatever name and with whatever options it was asked for. "" if nobody can say: who
    opens it says why."""
    if spec is None:
        return ""
    if not spec.path:
        return f"{spec.scheme}:{size_text(spec.size)}"
    try:
        about = os.stat(spec.path)
    except OSError:
        return ""
    if stat.S_ISBLK(about.st_mode):  # xl's script `block` names one twice, by its number and then by its path
        return f"block:{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}"
    return f"file:{os.path.realpath(spec.path)}"


def open_store(
    spec: DiskSpec,
    *,
    run_dir: str | os.PathLike[str],
    identity: str,
    recover: bool = False,
    timeout: float = DRAIN_TIMEOUT,
    fence: Fence | None = None,
) -> Store:
    """Open what `spec` says, lock it, and find out what it can do.

    `identity` names the device (one string for one virtual disk of one guest): its fence, and the file of a
    memory store. With `recover` the disk was served before by a process that has ended: its I/O is waited
    for, up to `timeout` seconds (0: not at all); a memory store is taken over. `fence` is this process's, for file
    systems without locks: without it, a disk there does not wait.

    Raises StoreError, DeviceBusyError (somebody uses it), DrainingError (the predecessor's I/O is still
    under way: call again), ConfigError (an option that this store cannot have).
    """
    patience = Patience(recover, timeout)
    if spec.scheme == "null":
        return NullStore(spec)
    if spec.scheme == "memory":
        return MemoryStore(spec, Path(run_dir), identity, recover, patience)
    if spec.scheme == "file":
        from .file_store import FileStore

        return FileStore(spec, identity, patience, fence)
    raise ConfigError(f"disk {spec.uri!r}: scheme {spec.scheme!r} cannot be opened")

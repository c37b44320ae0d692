"""A domain as the hypervisor keeps it: memory, grant table, active table, and what its handles have claimed."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import uuid
from collections.abc import Sequence

import numpy as np

from .extents import Extents
from .ports import PortTable
from .wire import ACTIVE_OWNER_SHIFT, MOST_GRANTS, PAGE, RESERVED_GREFS

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_GTF_IN_USE = 0x18  # grant_table.h: GTF_reading (bit 3) | GTF_writing (bit 4)
_GTF_TYPE = 0x03
_GTF_PERMIT_ACCESS = 1
_FALLOC_FL_PUNCH_HOLE = 0x03  # with FALLOC_FL_KEEP_SIZE; linux/falloc.h


class DomainError(Exception):
    """A domain that cannot be made: a positive errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


def available_bytes() -> int:
    """Memory that can be had without swapping: MemAvailable of /proc/meminfo."""
    with open("/proc/meminfo", encoding="ascii") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def _sealed(name: str, size: int, *, now: bool) -> int:
    """A memory file of a fixed size; `now` reserves its pages, so that touching them cannot fail later."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if now:
            os.posix_fallocate(fd, 0, size)
        # A guest that could shrink its memory would kill whoever has it mapped, by SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as e:
        os.close(fd)
        raise DomainError(e.errno or errno.ENOMEM) from e
    return fd


class Domain:
    """One domain. `handles` are the connections that speak for it."""

    def __init__(self, domid: int, pages: int, grants: int) -> None:
        """Raises DomainError: EINVAL for absurd sizes, ENOMEM when there is no room."""
        if not 1 <= pages <= 1 << 28 or not RESERVED_GREFS < grants <= MOST_GRANTS:
            raise DomainError(errno.EINVAL)
        if (pages * PAGE + grants * 16) > available_bytes():
            raise DomainError(errno.ENOMEM)
        self.domid = domid
        self.pages = pages
        self.grants = grants
        self.token = secrets.token_bytes(16)
        self.uuid = str(uuid.uuid4())
        self.handles: set[int] = set()
        self.introduced = False
        self.dying = False
        self.ports = PortTable(domid)
        self.frames = Extents(0, pages)
        self.grefs = Extents(RESERVED_GREFS, grants - RESERVED_GREFS)
        self._claimed_frames: dict[int, list[tuple[int, int]]] = {}
        self._claimed_grefs: dict[int, list[tuple[int, int]]] = {}
        self._limbo: list[int] = []
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        try:
            for name, size, now in (("memory", pages * PAGE, False), ("grants", grants * 8, True),
                                    ("active", grants * 8, True)):  # fmt: skip
                self._fds.append(_sealed(f"dom{domid}-{name}", -(-size // PAGE) * PAGE, now=now))
        except DomainError:
            self.close()
            raise
        self.memory_fd, self.grants_fd, self.active_fd = self._fds
        table, active = self._maps = [mmap.mmap(fd, grants * 8) for fd in (self.grants_fd, self.active_fd)]
        self._flags = np.frombuffer(table, np.dtype("u1"))[0::8]  # the low byte of the flags
        self._domids = np.frombuffer(table, np.dtype("<u2"))[1::4]
        self._active = np.frombuffer(active, np.dtype("<u8"))

    def claim_frames(self, handle: int, count: int) -> int:
        """An extent of frames for this handle, zero-filled; -1 if there is none."""
        return self._claim(self.frames, self._claimed_frames, handle, count)

    def claim_grefs(self, handle: int, count: int) -> int:
        """An extent of grefs for this handle; -1 if there is none."""
        return self._claim(self.grefs, self._claimed_grefs, handle, count)

    def _claim(self, free: Extents, claimed: dict[int, list[tuple[int, int]]], handle: int, count: int) -> int:
        self._collect()
        first = free.claim(count) if count > 0 else -1
        if first >= 0:
            claimed.setdefault(handle, []).append((first, count))
        return first

    def names(self, domid: int) -> bool:
        """Whether some entry of the grant table lets `domid` in."""
        permits = (self._flags & _GTF_TYPE) == _GTF_PERMIT_ACCESS
        return bool((permits & (self._domids == domid)).any())

    def release_pins(self, handles: Sequence[int]) -> None:
        """Undo what dead mappers of this domain's pages have left.

        The plain byte store is enough: only the dead handle could own this entry, and a granting domain that
        keeps the rules does not change an entry's flags while it is in use.
        """
        owners = (self._active >> np.uint64(ACTIVE_OWNER_SHIFT)) & np.uint64((1 << 30) - 1)
        for gref in np.flatnonzero(np.isin(owners, np.array(handles, np.uint64))):
            self._flags[gref] = int(self._flags[gref]) & ~_GTF_IN_USE & 0xFF
            self._active[gref] = 0

    def leave(self, handle: int) -> None:
        """A handle of this domain is gone: its ports, grants and pages are free again, once nobody has them mapped."""
        self.handles.discard(handle)
        if handle in self._claimed_frames or handle in self._claimed_grefs:
            self._limbo.append(handle)
        self._collect()

    def _collect(self) -> None:
        """Free what handles that are gone had claimed; what a backend still has mapped waits for another time."""
        for handle in list(self._limbo):
            grefs = self._claimed_grefs.get(handle, [])
            if any(self._active[first : first + count].any() for first, count in grefs):
                continue
            self._limbo.remove(handle)
            for first, count in self._claimed_grefs.pop(handle, []):
                os.pwrite(self.grants_fd, bytes(count * 8), first * 8)
                self.grefs.release(first, count)
            for first, count in self._claimed_frames.pop(handle, []):
                _punch(self.memory_fd, first * PAGE, count * PAGE)
                self.frames.release(first, count)

    @property
    def mapped(self) -> bool:
        """Whether somebody still has a page of this domain mapped."""
        return bool(self._active.any())

    def close(self) -> None:
        """Drop the hypervisor's hold on the memory; a mapper keeps what it has until it unmaps it."""
        if self._maps:
            del self._flags, self._domids, self._active  # the maps cannot be closed while there are views
        for memory in self._maps:
            memory.close()
        for fd in self._fds:
            os.close(fd)
        self._maps.clear()
        self._fds.clear()


def _punch(fd: int, offset: int, length: int) -> None:
    """Give pages of a memory file back; they read as zeros afterwards."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(length))
    if result < 0:
        raise OSError(ctypes.get_errno(), "fallocate")

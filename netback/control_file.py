"""The hash that a guest has set, in a file of the run directory (tmpfs), so that the next daemon has it as well.

netfront sets it once, and is not told that a daemon was killed and another one serves it. A page with one line of text
that says whose it is, then HASHES.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from pvdrivers.errors import PvError

from .control_records import HASHES

_HEADER = 4096
_VERSION = 1


class HashFile:
    """HASHES of one vif: `address`. Zeroed, or as a process before this one has left it."""

    def __init__(self, path: Path, incarnation: str, *, recover: bool) -> None:
        """`incarnation` is whose it is: a file of another one is not looked into. Raises PvError without room."""
        tag = f"pvdrivers hash {_VERSION} {HASHES.itemsize} {incarnation}".encode().ljust(_HEADER, b"\0")
        size = _HEADER + HASHES.itemsize
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(path, flags, 0o600)
            try:
                found = recover and os.pread(fd, _HEADER, 0) == tag and os.fstat(fd).st_size == size
                if not found:
                    os.ftruncate(fd, 0)
                os.posix_fallocate(fd, 0, size)  # a full tmpfs is an error here, a SIGBUS later
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except OSError as e:
            raise PvError(f"{path}: no room for {size} bytes ({e.strerror}); free space in the run directory") from e
        self._map[:_HEADER] = tag
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self._bytes.ctypes.data) + _HEADER

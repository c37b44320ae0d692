"""What a guest has told us once and is not asked about again, in a file of the run directory (tmpfs): the next daemon
has it as well.

netfront is not told that a daemon was killed and another one serves it. A page with one line of text that says whose it
is and what, then a record that a worker writes to.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvdrivers.errors import PvError

if TYPE_CHECKING:
    from .backend import Front, VifBackend

_HEADER = 4096


def connection_of(device: VifBackend, said: Front) -> str:
    """A vif's connection in words: no other vif, no later connection and no other guest of that number has the same."""
    uuid = device.context.platform.domain_uuid(device.ident.domid)
    rings = " ".join(f"{q.tx_gref}+{q.rx_gref}+{q.tx_port}+{q.rx_port}" for q in said.queues)
    return f"{device.ident} {uuid} {rings}"


class KeptFile:
    """One `dtype` of one vif: `record`, and its `address`. Zeroed, or as a process before this one has left it."""

    def __init__(self, path: Path, dtype: np.dtype[Any], whose: str, *, recover: bool) -> None:
        """`whose`: what it is, its version and of which connection: a file that says otherwise is not looked into.

        `found`: it was there. Raises PvError without room.
        """
        tag = f"pvdrivers {whose} {dtype.itemsize}".encode().ljust(_HEADER, b"\0")
        size = _HEADER + dtype.itemsize
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(path, flags, 0o600)
            try:
                self.found = recover and os.pread(fd, _HEADER, 0) == tag and os.fstat(fd).st_size == size
                if not self.found:
                    os.ftruncate(fd, 0)
                os.posix_fallocate(fd, 0, size)  # a full tmpfs is an error here, a SIGBUS later
                self._map = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        except OSError as e:
            raise PvError(f"{path}: no room for {size} bytes ({e.strerror}); free space in the run directory") from e
        self._map[:_HEADER] = tag
        self.record = np.frombuffer(self._map, dtype, 1, _HEADER)
        self.address = int(self.record.ctypes.data)

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
KINDS = {"answers": 1, "groups": 1, "hash": 1}
"""What is kept, each in a directory of its name, and the version of what is written there: see `answers`, `groups` and
`control_attach`."""


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

    def close(self) -> None:
        """Unmap it, as no worker knows its address any more. The file stays. Harmless a second time."""
        if hasattr(self, "record"):
            del self.record
            try:
                self._map.close()
            except BufferError:
                pass  # a view is still about; the mapping goes with it


class KeptFiles:
    """Those of one vif, of each kind one at the most."""

    def __init__(self, run_dir: Path, device: str) -> None:
        self._run_dir, self._device = run_dir, device
        self._open: dict[str, KeptFile] = {}

    def _path(self, kind: str) -> Path:
        return self._run_dir / kind / self._device

    def open(self, kind: str, dtype: np.dtype[Any], connection: str, *, recover: bool) -> KeptFile:
        """That of a kind, for a connection in words. Raises PvError without room."""
        file = KeptFile(self._path(kind), dtype, f"{kind} {KINDS[kind]} {connection}", recover=recover)
        self._open[kind] = file
        return file

    def address(self, kind: str) -> int:
        """Of the record that is kept in one that is open."""
        return self._open[kind].address

    def close(self) -> None:
        """Unmap all, and leave them for who comes next. Each has a descriptor, and a device that is gone may lie about
        for long: nothing counts on the collector. Harmless a second time."""
        for file in self._open.values():
            file.close()
        self._open = {}

    def forget(self) -> None:
        """The connection is over: nobody is to find what the guest has set, nor to put its answers."""
        self.close()
        for kind in KINDS:
            self._path(kind).unlink(missing_ok=True)

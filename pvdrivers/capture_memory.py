"""The memory of a capture ring (capture_ring), and how a worker gets to know of it."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable

import numpy as np

from .capture_ring import CAPTURE, DATA_AT, RECORD_SIZE
from .errors import PlatformError
from .worker.control import Worker
from .worker.words import store_word

_ROUND_SECONDS = 5.0


class CaptureMemory:
    """A capture ring for one device: memory that has a file, which another process may map."""

    def __init__(self, size: int, snap: int) -> None:
        """`size` is a power of two. PlatformError if there is not so much memory."""
        self.fd = os.memfd_create("pvdrivers-capture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, DATA_AT + size + RECORD_SIZE)
            # Who has the file cannot have our writes fault.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, DATA_AT + size + RECORD_SIZE)
        except OSError as e:
            os.close(self.fd)
            raise PlatformError(f"capture: no memory for a ring of {size} bytes: {e.strerror}; ask for less") from e
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.record = np.zeros(1, CAPTURE)
        row = self.record[0]
        row["shared"], row["size"], row["snap"] = self._bytes.ctypes.data, size, snap

    @property
    def address(self) -> int:
        """The address of the CAPTURE."""
        return int(self.record.ctypes.data)

    def close(self) -> None:
        """No worker knows it any more."""
        os.close(self.fd)


def point_to(word: int, memory: CaptureMemory | None, workers: Iterable[Worker]) -> None:
    """Set the word by which workers find a capture. With None they do not any more when this returns."""
    store_word(word, 0 if memory is None else memory.address)
    if memory is None:
        for worker in workers:
            worker.come_round(_ROUND_SECONDS)

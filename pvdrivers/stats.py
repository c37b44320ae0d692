"""Counters on disk (tmpfs): one file a device, mapped by its worker, read by anybody who may at any time.

A page of header with a line of JSON about the device, then one STATS record for each queue.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from pvdrivers.errors import PvError
from pvdrivers.worker.records import STATS

HEADER = 4096


class StatsFile:
    """The counters of one device, to write to."""

    def __init__(self, path: Path, about: dict[str, Any], queues: int) -> None:
        """Make the file. Raises PvError when there is no room for it."""
        size = HEADER + queues * STATS.itemsize
        text = json.dumps({**about, "queues": queues, "pid": os.getpid()}).encode()
        if len(text) >= HEADER:
            raise PvError(f"statistics {path}: a description of {len(text)} bytes, the limit is {HEADER - 1}")
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size)
        except OSError as e:
            os.unlink(temporary)
            raise PvError(f"statistics {path}: no room for {size} bytes ({e.strerror})") from e
        finally:
            os.close(fd)
        self._map[: len(text)] = text
        self.path = path
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.queues: np.ndarray = self._bytes[HEADER:].view(STATS)
        os.rename(temporary, path)

    def address(self, queue: int) -> int:
        """The address of the STATS of a queue."""
        return int(self._bytes.ctypes.data) + HEADER + queue * STATS.itemsize

    def remove(self) -> None:
        """The device is gone."""
        self.path.unlink(missing_ok=True)


def read_stats(path: Path) -> tuple[dict[str, Any], np.ndarray] | None:
    """What a device's file says: the description, and a copy of STATS[queues]; None if it is no such file."""
    try:
        data = path.read_bytes()
        about = json.loads(data[:HEADER].rstrip(b"\0"))
    except (OSError, ValueError, RecursionError):
        return None
    queues = about.get("queues") if isinstance(about, dict) else None
    if type(queues) is not int or queues < 1 or len(data) < HEADER + queues * STATS.itemsize:
        return None
    return about, np.frombuffer(data[HEADER:], STATS, queues).copy()

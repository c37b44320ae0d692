"""What this machine copies when it does nothing else: packets' bytes from one half of a working set to the other."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Collection
from typing import Any

import numpy as np

from rings.jit import compile_for

from ..machine import on_cpus
from ..net_kernels import copy_chunks

__all__ = ["Memcpy"]

_STRIDE = 65536  # a packet in pages of its own


class Memcpy:
    """`size` bytes a copy, over `working_set` bytes, source and destination together, on the given cores."""

    def __init__(self, size: int, working_set: int, cpus: Collection[int] | None = None) -> None:
        compile_for(copy_chunks, 6)
        self._size, self._cpus = size, cpus
        self._memory = mmap.mmap(-1, working_set)
        at = np.frombuffer(self._memory, np.uint8)
        at[:] = 1  # pages that were never written are all the same one
        self._src, self._dst = int(at.ctypes.data), int(at.ctypes.data) + working_set // 2
        self._count = working_set // 2 // _STRIDE

    def run(self, seconds: float) -> dict[str, Any]:
        """One run, with the figures that an agent answers."""
        with on_cpus(self._cpus):
            began, cpu = time.monotonic_ns(), sum(os.times()[:2])
            done = copy_chunks(self._dst, self._src, self._size, _STRIDE, self._count, began + int(seconds * 1e9))
            took, spent = (time.monotonic_ns() - began) / 1e9, sum(os.times()[:2]) - cpu
        return {
            "rate": done / took, "requests": done, "seconds": took, "bytes_per_second": done * self._size / took,
            "cpu_us": spent / done * 1e6 if done else None,
        }  # fmt: skip

"""Mappings of files and devices, by address: fixed places and no access are beyond the mmap module."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np

from pvdrivers.errors import PlatformError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

PROT_NONE = 0
READ = mmap.PROT_READ
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10  # linux/mman.h
_MAP_NORESERVE = 0x4000
_FAILED = 2**64 - 1


def _mmap(at: int | None, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    address = _LIBC.mmap(at, size, protection, flags, fd, offset)
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise PlatformError(
            f"cannot map {size} bytes: {os.strerror(number)}; the limits are memory and vm.max_map_count"
        )
    return int(address)


def map_file(fd: int, size: int, protection: int, *, offset: int = 0, at: int | None = None) -> int:
    """Map part of a file, shared; `at` replaces what is mapped there. Returns the address. Raises PlatformError."""
    return _mmap(at, size, protection, mmap.MAP_SHARED | (_MAP_FIXED if at is not None else 0), fd, offset)


def reserve(size: int, *, at: int | None = None) -> int:
    """Address space without access; touching it faults."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if at is not None else 0)
    return _mmap(at, size, PROT_NONE, flags, -1, 0)


def zeros(size: int, *, at: int | None = None) -> int:
    """Private memory, zero until it is touched and without a page until then; `at` replaces what is mapped there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (_MAP_FIXED if at is not None else 0)
    return _mmap(at, size, READ_WRITE, flags, -1, 0)


def unmap(address: int, size: int) -> None:
    """Take a mapping away."""
    _LIBC.munmap(address, size)


def view(address: int, count: int, dtype: Any) -> np.ndarray:
    """An array over memory that somebody else keeps mapped."""
    kind = np.dtype(dtype)
    return np.frombuffer((ctypes.c_char * (count * kind.itemsize)).from_address(address), kind)

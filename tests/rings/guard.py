"""Memory that ends where no memory is: an access one byte behind its end is a segmentation fault.

A kernel has no bounds checks. Fuzzing it over an ordinary array would miss a read that strays into the next
object; here it ends the test run at once.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PAGE = mmap.PAGESIZE


class Guarded:
    """`size` bytes, the last of them the last before an inaccessible page.

    Exact behind the end; before the start there are up to a page of bytes that a stray access may hit unseen,
    which are filled with 0xA5 and looked at by `check`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        pages = -(-size // _PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * _PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        end = first + (1 + pages) * _PAGE
        for page in (first, end):
            if _LIBC.mprotect(page, _PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.address = end - size
        """Of the first byte."""
        self._lead = np.frombuffer(self._map, np.uint8, pages * _PAGE - size, _PAGE)
        self._lead[:] = 0xA5
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, size, self.address - first)
        """The memory as an array."""

    def fill(self, content: bytes) -> Guarded:
        """Put `content` at the start; itself, to be used in an expression."""
        self.bytes[: len(content)] = np.frombuffer(content, np.uint8)
        return self

    def check(self) -> None:
        """Fails if anything before the start was written."""
        assert (self._lead == 0xA5).all(), "written before the start of the buffer"


def guarded(content: bytes) -> Guarded:
    """A guarded buffer of just these bytes."""
    return Guarded(len(content)).fill(content)

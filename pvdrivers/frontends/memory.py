"""Pages of the guest that a backend may be given: the buffers of zero-copy I/O."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from pvdrivers.platform import PAGE_SIZE, GuestPages

__all__ = ["GuestBuffer"]


class GuestBuffer:
    """Zeroed pages of guest memory, contiguous for us. What is read or written from here is not copied on the way.

    `view` is their memory, `address` where it begins, `frames` the guest frame of each page.
    """

    def __init__(self, pages: GuestPages, nbytes: int) -> None:
        """`nbytes` is rounded up to pages. Raises PlatformError when the guest has no room."""
        count = max(1, -(-nbytes // PAGE_SIZE))
        self._pages = pages.alloc(count)
        self.address = self._pages.address
        self.nbytes = count * PAGE_SIZE
        self.frames: NDArray[np.int64] = np.array(self._pages.frames, np.int64)
        self.view = memoryview((ctypes.c_char * self.nbytes).from_address(self.address)).cast("B")

    def frames_at(self, offset: int) -> int:
        """The address of the frame number of the page that byte `offset` is in, as IO.frames wants it."""
        return int(self.frames.ctypes.data) + offset // PAGE_SIZE * self.frames.itemsize

    def free(self) -> None:
        """Give the pages back. The caller knows that no request uses them."""
        self.view.release()
        self._pages.free()

"""Pages of the guest that a backend may be given: the buffers of zero-copy I/O."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from pvdrivers.errors import PlatformError
from pvdrivers.platform import PAGE_SIZE, GuestPages

__all__ = ["GuestBuffer"]


class GuestBuffer:
    """Zeroed pages of guest memory, contiguous for us. What is read or written from here is not copied on the way.

    `view` is their memory, `address` where it begins, `frames` the guest frame of each page. A page is granted for
    each request that uses it and taken back after it; one that is *registered* is granted once and for all, to a
    backend that is trusted with it, as persistent grants are.
    """

    def __init__(self, pages: GuestPages, nbytes: int) -> None:
        """`nbytes` is rounded up to pages. Raises PlatformError when the guest has no room."""
        count = max(1, -(-nbytes // PAGE_SIZE))
        self._pages_of = pages
        self._pages = pages.alloc(count)
        self._grefs: list[int] = []
        self.address = self._pages.address
        self.nbytes = count * PAGE_SIZE
        self.frames: NDArray[np.int64] = np.array(self._pages.frames, np.int64)
        self.view = memoryview((ctypes.c_char * self.nbytes).from_address(self.address)).cast("B")

    def frames_at(self, offset: int) -> int:
        """The address of the frame number of the page that byte `offset` is in, as IO.frames wants it."""
        return int(self.frames.ctypes.data) + offset // PAGE_SIZE * self.frames.itemsize

    def register(self, domid: int) -> None:
        """Grant every page to the backend's domain until `free`. Raises PlatformError when grefs run out."""
        for i, frame in enumerate(self._pages.frames):
            gref = self._pages_of.grant(frame, domid)
            self._grefs.append(gref)
            self.frames[i] = -gref

    def free(self) -> None:
        """Give the pages back; the caller knows that no request uses them. PlatformError if one is still mapped."""
        for gref in self._grefs:
            if not self._pages_of.end(gref):
                raise PlatformError(f"gref {gref} of a registered buffer is still mapped; disconnect its backend first")
        self._grefs = []
        self.view.release()
        self._pages.free()

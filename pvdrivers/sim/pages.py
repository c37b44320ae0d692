"""The granting side: pages and grant references of our own memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import numpy as np

from pvdrivers import windows
from pvdrivers.errors import PlatformError
from pvdrivers.invoke import invoke
from pvdrivers.platform import PAGE_SIZE

from . import grant_seam, wire
from .extents import Extents
from .grant_seam import OFFER_CTX
from .hypercall import HypercallError, Hypercalls

_FRAMES_AT_ONCE = 256
_GREFS_AT_ONCE = 256

_offer_end = invoke(grant_seam.offer_end)
_offer_grant = invoke(grant_seam.offer_grant)


class SimPages:
    """Pages side by side. Implements platform.Pages."""

    def __init__(self, guest: SimGuestPages, address: int, frames: range) -> None:
        self.address = address
        self.frames: Sequence[int] = frames
        self._guest: SimGuestPages | None = guest

    def free(self) -> None:
        """Give the pages back; their grants must have ended. A second time is an error: PlatformError."""
        if self._guest is None:
            raise PlatformError(f"the pages at {self.address:#x} were freed already")
        guest, self._guest = self._guest, None
        guest.release(self.frames)


class SimGuestPages:
    """Implements platform.GuestPages; `ctx` is the context of offer_grant and offer_end."""

    dynamic = True
    sees_mappings = True

    def __init__(self, hypercalls: Hypercalls, memory_fd: int, grants_fd: int) -> None:
        self._xen = hypercalls
        self._lock = threading.Lock()
        self._frames = Extents(0, 0)
        self._dirty: set[int] = set()
        self._free_grefs: list[int] = []
        self._used_grefs: set[int] = set()
        self._size = hypercalls.pages * PAGE_SIZE
        self._base = windows.map_file(memory_fd, self._size, windows.READ_WRITE)
        self._grants_size = hypercalls.grants * 8
        self._ctx = np.zeros(1, OFFER_CTX)
        self._ctx["grants"] = windows.map_file(grants_fd, self._grants_size, windows.READ_WRITE)
        self._ctx["entries"], self._ctx["pages"] = hypercalls.grants, hypercalls.pages
        self.ctx = int(self._ctx.ctypes.data)

    def alloc(self, count: int) -> SimPages:
        """`count` zeroed pages in a row. Raises PlatformError when the domain's memory is used up."""
        if count < 1:
            raise PlatformError(f"{count} pages: at least one")
        with self._lock:
            first = self._frames.claim(count)
            if first < 0:
                self._claim(count)
                first = self._frames.claim(count)
            frames = range(first, first + count)
            if not self._dirty.isdisjoint(frames):
                ctypes.memset(self._base + first * PAGE_SIZE, 0, count * PAGE_SIZE)
            return SimPages(self, self._base + first * PAGE_SIZE, frames)

    def _claim(self, count: int) -> None:
        """Get more frames from the hypervisor: others may be handles of this domain, too."""
        for n in (max(count, _FRAMES_AT_ONCE), count):
            try:
                self._frames.release(self._xen.call(wire.CLAIM_FRAMES, n).values[0], n)
                return
            except HypercallError as e:
                refused = e
        raise PlatformError(
            f"domain {self._xen.domid} has no {count} pages in a row left of its {self._xen.pages}"
            f" ({self._xen.pages // 256} MiB): free some, or give it more with --memory"
        ) from refused

    def release(self, frames: Sequence[int]) -> None:
        """SimPages.free."""
        with self._lock:
            self._dirty.update(frames)
            self._frames.release(frames[0], len(frames))

    def reserve(self, count: int) -> Sequence[int]:
        """`count` unused grefs for SEAM.offer_grant; end() gives each back. Raises PlatformError when none are left."""
        with self._lock:
            while len(self._free_grefs) < count:
                n = max(_GREFS_AT_ONCE, count - len(self._free_grefs))
                self._free_grefs += reversed(self._more_grefs(n))
            taken = [self._free_grefs.pop() for _ in range(count)]
            self._used_grefs.update(taken)
            return taken

    def _more_grefs(self, count: int) -> range:
        while True:
            try:
                first = self._xen.call(wire.CLAIM_GREFS, count).values[0]
                return range(first, first + count)
            except HypercallError as e:
                if count == 1:
                    raise PlatformError(
                        f"domain {self._xen.domid} has no grant reference left of its {self._xen.grants}"
                    ) from e
                count = max(1, count // 2)

    def grant(self, frame: int, domid: int, *, readonly: bool = False) -> int:
        """A new gref that lets `domid` map the page `frame`. Raises PlatformError."""
        gref = self.reserve(1)[0]
        if _offer_grant(self.ctx, gref, frame, domid | readonly << 16) < 0:
            self.end(gref)
            raise PlatformError(f"frame {frame}: domain {self._xen.domid} has {self._xen.pages} pages")
        return gref

    def end(self, gref: int) -> bool:
        """Take a grant back and free its gref. False, and nothing done, while a backend has it mapped."""
        with self._lock:
            if gref not in self._used_grefs:
                raise PlatformError(f"grant reference {gref}: not one of ours")
            if _offer_end(self.ctx, gref, 0, 0) < 0:
                return False
            self._used_grefs.remove(gref)
            self._free_grefs.append(gref)
            return True

    def close(self) -> None:
        """Unmap our own memory; nothing may use it any more."""
        if self._base:
            windows.unmap(self._base, self._size)
            windows.unmap(int(self._ctx["grants"][0]), self._grants_size)
            self._base = 0

"""The granting side: pages of /dev/xen/gntalloc, for our frontends in a guest, or in dom0 against a backend there.

gntalloc grants pages when it makes them, to one domain and for good, and it does not say whether somebody has them
mapped. So memory is plain until one of its pages is granted; then all pages of that allocation become pages of
gntalloc, granted to that domain, with what was in them. A page whose grant ends while it is mapped stays with the
kernel until the backend lets go of it: nothing else is ever put into it (gnttab_end_foreign_access).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import struct
import threading
from collections.abc import Sequence

import numpy as np

from pvdrivers import windows
from pvdrivers.errors import PlatformError
from pvdrivers.platform import PAGE_SIZE

from .devices import (
    ALLOC_REQUEST,
    GNTALLOC,
    GNTALLOC_FLAG_WRITABLE,
    IOCTL_GNTALLOC_ALLOC_GREF,
    IOCTL_GNTALLOC_DEALLOC_GREF,
    IOCTL_GNTALLOC_SET_UNMAP_NOTIFY,
    UNMAP_NOTIFY_CLEAR_BYTE,
    UNMAP_NOTIFY_SEND_EVENT,
    open_device,
)

_LIMIT = "/sys/module/xen_gntalloc/parameters/limit"


class XenPages:
    """Pages side by side. Implements platform.Pages."""

    def __init__(self, guest: XenGuestPages, address: int, frames: range) -> None:
        self.address = address
        self.frames: Sequence[int] = frames
        self.granted: tuple[int, bool] | None = None  # domid, read only
        self.grefs: list[int] = []
        self.live: set[int] = set()  # grefs that were asked for and have not ended
        self.index = 0
        self._guest: XenGuestPages | None = guest

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.frames) * PAGE_SIZE

    def free(self) -> None:
        """Give the pages back, and end what grants there are. A second time is an error: PlatformError."""
        if self._guest is None:
            raise PlatformError(f"the pages at {self.address:#x} were freed already")
        guest, self._guest = self._guest, None
        guest.release(self)


class XenGuestPages:
    """Implements platform.GuestPages."""

    dynamic = False
    sees_mappings = False

    def __init__(self) -> None:
        self._fd = -1
        self._lock = threading.Lock()
        self._next_frame = itertools.count()
        self._by_frame: dict[int, XenPages] = {}
        self._by_gref: dict[int, XenPages] = {}

    def alloc(self, count: int) -> XenPages:
        """`count` zeroed pages in a row. Raises PlatformError when there is no memory."""
        if count < 1:
            raise PlatformError(f"{count} pages: at least one")
        with self._lock:
            first = next(self._next_frame)
            for _ in range(count - 1):
                next(self._next_frame)
            pages = XenPages(self, windows.zeros(count * PAGE_SIZE), range(first, first + count))
            self._by_frame.update(dict.fromkeys(pages.frames, pages))
            return pages

    def reserve(self, count: int) -> Sequence[int]:
        """PlatformError: a gref of gntalloc comes with its page."""
        raise PlatformError("gntalloc has no grant references without pages; grant() pages once and for all")

    def grant(self, frame: int, domid: int, *, readonly: bool = False) -> int:
        """The gref that lets `domid` map the page `frame`. The whole allocation is granted with it.

        Raises PlatformError: for a second domain or another access, or when gntalloc's limit is reached.
        """
        with self._lock:
            pages = self._by_frame.get(frame)
            if pages is None:
                raise PlatformError(f"frame {frame}: not a page of ours")
            if pages.granted is None:
                self._grant_all(pages, domid, readonly)
            elif pages.granted != (domid, readonly):
                raise PlatformError(
                    f"frame {frame} is granted to domain {pages.granted[0]} already, and a page of gntalloc has one"
                    " grant: use pages of their own for each domain and access"
                )
            gref = pages.grefs[frame - pages.frames[0]]
            pages.live.add(gref)
            return gref

    def _grant_all(self, pages: XenPages, domid: int, readonly: bool) -> None:
        if self._fd < 0:
            self._fd = open_device(GNTALLOC)
        n = len(pages.frames)
        request = np.zeros(ALLOC_REQUEST.itemsize + n * 4, np.uint8)
        head = request[:16].view(ALLOC_REQUEST)
        head["domid"], head["count"] = domid, n
        head["flags"] = 0 if readonly else GNTALLOC_FLAG_WRITABLE
        try:
            fcntl.ioctl(self._fd, IOCTL_GNTALLOC_ALLOC_GREF, request.data)
        except OSError as e:
            limit = f"; the limit is {_read(_LIMIT)} for all programs ({_LIMIT}, which can be raised while it runs)"
            text = f"gntalloc: {n} pages for domain {domid}: {e.strerror}{limit if e.errno == errno.ENOSPC else ''}"
            raise PlatformError(text) from e
        index = int(head["index"][0])
        content = ctypes.string_at(pages.address, pages.size)
        windows.map_file(self._fd, pages.size, windows.READ_WRITE, offset=index, at=pages.address)
        if content.strip(b"\0"):
            ctypes.memmove(pages.address, content, pages.size)
        pages.granted, pages.index = (domid, readonly), index
        pages.grefs = [int(gref) for gref in request[16:].view(np.uint32)]
        self._by_gref.update(dict.fromkeys(pages.grefs, pages))

    def on_end(self, gref: int, *, clear: int | None = None, notify: int | None = None) -> None:
        """What the kernel does when this grant ends, be it by our death: clear the byte at offset `clear` of its page,
        and notify our event channel port `notify`. gntalloc.h, IOCTL_GNTALLOC_SET_UNMAP_NOTIFY. Raises PlatformError.
        """
        with self._lock:
            pages = self._by_gref.get(gref)
            if pages is None:
                raise PlatformError(f"grant reference {gref}: not one of ours")
            action = (clear is not None) * UNMAP_NOTIFY_CLEAR_BYTE | (notify is not None) * UNMAP_NOTIFY_SEND_EVENT
            at = pages.index + pages.grefs.index(gref) * PAGE_SIZE + (clear or 0)
            try:
                fcntl.ioctl(self._fd, IOCTL_GNTALLOC_SET_UNMAP_NOTIFY, struct.pack("=QII", at, action, notify or 0))
            except OSError as e:
                raise PlatformError(f"gntalloc: a notification at the end of {gref}: {e.strerror}") from e

    def end(self, gref: int) -> bool:
        """Take a grant back. Always True: whether a backend has the page mapped is not to be learned here; if it has,
        the kernel keeps the page away from everybody until it is unmapped. The content stays, in other memory.
        """
        with self._lock:
            pages = self._by_gref.get(gref)
            if pages is None or gref not in pages.live:
                raise PlatformError(f"grant reference {gref}: not one of ours")
            pages.live.remove(gref)
            if not pages.live:
                self._revoke(pages, keep=True)
            return True

    def _revoke(self, pages: XenPages, *, keep: bool) -> None:
        """All grants of an allocation end: its pages go back to the kernel."""
        if pages.granted is None:
            return
        fcntl.ioctl(self._fd, IOCTL_GNTALLOC_DEALLOC_GREF, struct.pack("=QII", pages.index, len(pages.frames), 0))
        if keep:
            content = ctypes.string_at(pages.address, pages.size)
            windows.zeros(pages.size, at=pages.address)
            ctypes.memmove(pages.address, content, pages.size)
        for gref in pages.grefs:
            self._by_gref.pop(gref, None)
        pages.granted, pages.grefs, pages.live = None, [], set()

    def release(self, pages: XenPages) -> None:
        """XenPages.free."""
        with self._lock:
            self._revoke(pages, keep=False)
            windows.unmap(pages.address, pages.size)
            for frame in pages.frames:
                self._by_frame.pop(frame, None)

    def close(self) -> None:
        """Unmap our pages and end their grants; nothing may use them any more."""
        with self._lock:
            for pages in set(self._by_frame.values()):
                windows.unmap(pages.address, pages.size)
            self._by_frame.clear()
            self._by_gref.clear()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return "unknown"

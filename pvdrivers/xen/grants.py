"""The mapper's side: windows and contexts of gntdev for workers, and the Python seam for rings."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from pvdrivers import windows
from pvdrivers.errors import PlatformError
from pvdrivers.invoke import invoke
from pvdrivers.platform import GRANT_OP, PAGE_SIZE, GNTST_okay

from . import grant_seam
from .devices import (
    GNTDEV,
    IOCTL_GNTDEV_MAP_GRANT_REF,
    IOCTL_GNTDEV_SET_UNMAP_NOTIFY,
    IOCTL_GNTDEV_UNMAP_GRANT_REF,
    MAP_REF,
    MAP_REQUEST,
    UNMAP_NOTIFY_CLEAR_BYTE,
    UNMAP_NOTIFY_SEND_EVENT,
    open_device,
)
from .grant_window import GRANT_CTX, SLOT_HOLE, SLOT_TAKEN

WINDOW_PAGES = 1 << 17
"""Pages that one worker may have mapped at once: more than Xen's default of handles allows all of them."""
MOST_OPS = 4096
"""Operations in a batch: the worker's."""

_LIMIT = "/sys/module/xen_gntdev/parameters/limit"

_grant_map = invoke(grant_seam.grant_map)
_grant_unmap = invoke(grant_seam.grant_unmap)


class Context:
    """A GRANT_CTX with what it points to. One for each worker, and one for the control side."""

    def __init__(self, *, pages: int = WINDOW_PAGES, whole: bool) -> None:
        """`whole`: mappings cannot be undone in part, so none is larger than a page. Raises PlatformError."""
        self.fd = open_device(GNTDEV)
        self._size = pages * PAGE_SIZE
        self._state = np.zeros(pages, np.uint32)
        self._request = np.zeros(MOST_OPS * 24 + 64, np.uint8)
        self._order = np.zeros(MOST_OPS, np.int32)
        self._small = np.zeros(8, np.int64)
        self._record = np.zeros(1, GRANT_CTX)
        try:
            self._window = windows.reserve(self._size)
        except PlatformError:
            os.close(self.fd)
            raise
        row = self._record[0]
        row["fd"], row["window"], row["pages"] = self.fd, self._window, pages
        row["state"], row["request"] = self._state.ctypes.data, self._request.ctypes.data
        row["order"], row["small"], row["most"] = self._order.ctypes.data, self._small.ctypes.data, MOST_OPS
        row["single"] = whole
        self.address = int(self._record.ctypes.data)

    def close(self) -> None:
        """Unmap everything. Harmless a second time."""
        if self.fd >= 0:
            # All but what has, or may have, become somebody else's: the runs between.
            taken = np.flatnonzero(np.isin(self._state, (SLOT_TAKEN, SLOT_HOLE)))
            for first, end in zip([0, *(taken + 1)], [*taken, len(self._state)]):
                if end > first:
                    windows.unmap(self._window + int(first) * PAGE_SIZE, int(end - first) * PAGE_SIZE)
            os.close(self.fd)
            self.fd = -1


class XenMapping:
    """Granted pages, mapped side by side. Implements platform.Mapping."""

    def __init__(self, table: XenGrantTable, address: int, pages: int, index: int) -> None:
        self.address = address
        self.pages = pages
        self._table = table
        self._index: int | None = index

    def on_unmap(self, *, clear: int | None = None, notify: int | None = None) -> None:
        """What the kernel does when these pages are unmapped, be it by our death: clear the byte at offset `clear`,
        and notify our event channel port `notify`. gntdev.h, IOCTL_GNTDEV_SET_UNMAP_NOTIFY. Raises PlatformError.
        """
        action = (clear is not None) * UNMAP_NOTIFY_CLEAR_BYTE | (notify is not None) * UNMAP_NOTIFY_SEND_EVENT
        assert self._index is not None, "unmapped already"
        request = struct.pack("=QII", self._index + (clear or 0), action, notify or 0)
        try:
            fcntl.ioctl(self._table.fd, IOCTL_GNTDEV_SET_UNMAP_NOTIFY, request)
        except OSError as e:
            raise PlatformError(f"gntdev: a notification on unmap, byte {clear}, port {notify}: {e.strerror}") from e

    def unmap(self) -> None:
        """Exactly once; a second time is an error: PlatformError."""
        if self._index is None:
            raise PlatformError(f"the grants at {self.address:#x} were unmapped already")
        index, self._index = self._index, None
        windows.unmap(self.address, self.pages * PAGE_SIZE)
        fcntl.ioctl(self._table.fd, IOCTL_GNTDEV_UNMAP_GRANT_REF, struct.pack("=QII", index, self.pages, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.unmap()


class XenGrantTable:
    """Implements platform.GrantTable."""

    def __init__(self, *, whole: bool) -> None:
        """Raises PlatformError if gntdev cannot be used."""
        self.fd = open_device(GNTDEV)
        self._probe = Context(pages=16, whole=True)
        self._lock = threading.Lock()
        self._whole = whole
        self._workers: list[Context] = []

    def context(self) -> int:
        """A context for the JIT seam of one worker, its address; it lives as long as this table."""
        context = Context(whole=self._whole)
        self._workers.append(context)
        return context.address

    def map(self, domid: int, grefs: Sequence[int], *, readonly: bool = False) -> XenMapping:
        """Map `grefs` of `domid` into one contiguous range. Raises PlatformError naming gref and status."""
        n = len(grefs)
        request = np.zeros(MAP_REQUEST.itemsize + n * MAP_REF.itemsize, np.uint8)
        head, refs = request[:16].view(MAP_REQUEST), request[16:].view(MAP_REF)
        head["count"], refs["domid"], refs["ref"] = n, domid, grefs
        try:
            fcntl.ioctl(self.fd, IOCTL_GNTDEV_MAP_GRANT_REF, request.data)
        except OSError as e:
            limit = _limit()
            hint = f"; it maps at most {limit} at once: raise {_LIMIT}" if limit is not None and n > limit else ""
            raise PlatformError(f"gntdev: {n} grants of domain {domid}: {e.strerror}{hint}") from e
        index = int(head["index"][0])
        try:
            protection = windows.READ if readonly else windows.READ_WRITE
            address = windows.map_file(self.fd, n * PAGE_SIZE, protection, offset=index)
        except PlatformError:
            fcntl.ioctl(self.fd, IOCTL_GNTDEV_UNMAP_GRANT_REF, struct.pack("=QII", index, n, 0))
            raise PlatformError(self._which(domid, grefs, readonly)) from None
        return XenMapping(self, address, n, index)

    def _which(self, domid: int, grefs: Sequence[int], readonly: bool) -> str:
        """What is wrong: each gref is tried alone."""
        with self._lock:
            for gref in grefs:
                op = np.zeros(1, GRANT_OP)
                op["gref"], op["domid"], op["flags"] = gref, domid, readonly
                _grant_map(self._probe.address, op.ctypes.data, 1)
                status = int(op["status"][0])
                if status != GNTST_okay:
                    return f"grant reference {gref} of domain {domid} cannot be mapped: {reason(status)}"
                _grant_unmap(self._probe.address, op.ctypes.data, 1)
        return f"{len(grefs)} grants of domain {domid} cannot be mapped together: {os.strerror(errno.EAGAIN)}"

    def close(self) -> None:
        """Let go of everything that is mapped."""
        for context in (*self._workers, self._probe):
            context.close()
        self._workers.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _limit() -> int | None:
    """How many pages gntdev has in one mapping (Linux before 5.5: in all of a descriptor); None if it does not tell."""
    try:
        return int(Path(_LIMIT).read_text())
    except (OSError, ValueError):
        return None


_REASONS = {
    -1: "a general error (see the kernel's log)",
    -2: "no such domain",
    -3: "no such grant, or it is not for us",
    -7: "Xen has no room for more mappings",
    -8: "it is granted read only",
    -9: "its page is not memory of that domain",
    -13: "Xen has no room for more mappings: raise gnttab_max_maptrack_frames on its command line, or vm.max_map_count",
}


def reason(status: int) -> str:
    """GNTST_* in words."""
    return f"{_REASONS.get(status, 'refused')} (GNTST {status})"

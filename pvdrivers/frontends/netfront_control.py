"""The control ring of a vif on the guest's side: requests of netif.h, one at a time, and what the backend says.

Of what it says nothing is believed: a response is copied, and has to be to the request that is under way.
"""

from __future__ import annotations

import ctypes
import errno
import threading
import time
from typing import Any

import numpy as np

from pvdrivers.errors import PlatformError
from pvdrivers.platform import PAGE_SIZE, EventChannel, Pages, Platform
from rings.jit import compile_for
from rings.netif import (
    CTRL_BUFFER_OVERFLOW,
    CTRL_ENTRY_SIZE,
    CTRL_INVALID_PARAMETER,
    CTRL_NOT_SUPPORTED,
    CTRL_REQUEST,
    CTRL_RESPONSE,
    CTRL_SUCCESS,
)
from rings.ring import CORRUPT, RING_END, format_page, front_end

from . import netfront_control_kernels as kernels
from .lent import Lent

__all__ = ["ControlRing", "warm"]

SLOTS = 128
_ERRORS = {
    CTRL_NOT_SUPPORTED: (errno.EOPNOTSUPP, "not supported"),
    CTRL_INVALID_PARAMETER: (errno.EINVAL, "an invalid parameter"),
    CTRL_BUFFER_OVERFLOW: (errno.EOVERFLOW, "more than the backend has room for"),
}


class ControlRing:
    """A control ring that can be opened, used, closed and opened again. Any thread may ask."""

    def __init__(self, platform: Platform, name: str) -> None:
        self._platform, self._name = platform, name
        self._lock = threading.Lock()
        self._end = np.zeros(1, RING_END)
        self._request, self._response = np.zeros(1, CTRL_REQUEST), np.zeros(1, CTRL_RESPONSE)
        self._events: EventChannel | None = None
        self._port = -1
        self._id = 0
        self._pages: Pages | None = None
        self._grefs: list[int] = []
        self._lent = Lent(platform.pages)
        self.active = False
        self.violation = ""
        """What the backend did that no honest one does; nothing is asked any more."""

    # Opening and closing: the control thread of the vif

    def open(self, domid: int) -> tuple[int, int]:
        """A new, empty ring and a page for what requests name: the ring's gref, and its port."""
        if self._events is None:
            self._events = self._platform.open_events()
        pages = self._platform.pages
        self._pages = pages.alloc(2)
        self._grefs = []
        try:
            for frame in self._pages.frames:
                self._grefs.append(pages.grant(frame, domid))
        except PlatformError:
            for gref in self._grefs:
                pages.end(gref)
            self._pages.free()
            self._pages = None
            raise
        format_page(self._pages.address)
        front_end(self._end.ctypes.data, self._pages.address, SLOTS, CTRL_ENTRY_SIZE)
        self._port = self._events.alloc_unbound(domid)
        self.violation = ""
        return self._grefs[0], self._port

    def activate(self) -> None:
        """The backend is connected, and may be asked."""
        with self._lock:
            self.active = self._pages is not None

    def deactivate(self) -> None:
        """Ask nothing any more; who waits for an answer gets an error within a moment."""
        self.active = False

    def release(self) -> None:
        """Take back page, port and grants. What the backend still has mapped is never used again by anybody."""
        with self._lock:
            lent: list[tuple[list[int], list[Pages]]] = []
            if self._pages is not None and self._events is not None:
                self._events.unbind(self._port)
                lent.append((self._grefs, [self._pages]))
                self._pages, self._grefs = None, []
            self._lent.take_back(*lent)

    @property
    def stuck(self) -> int:
        """Grants that a backend did not give back when it should have."""
        return self._lent.stuck

    def end(self) -> None:
        """It is no more; deactivate() and release() came before."""
        if self._events is not None:
            self._events.close()

    # Asking

    def ask(self, kind: int, *data: int, timeout: float = 5.0) -> int:
        """A request (CTRL_*) with up to three words: the data of its response.

        OSError: EOPNOTSUPP, EINVAL or EOVERFLOW as the backend has it, EIO if there is nobody to ask, ETIMEDOUT.
        """
        with self._lock:
            return self._ask(kind, data, timeout)

    def ask_with(self, kind: int, content: bytes, *data: int | None, timeout: float = 5.0) -> tuple[int, bytes]:
        """The same with a page of which up to 4096 bytes are `content`; its gref is the word that is None.

        The data of the response, and what stands in the page then.
        """
        with self._lock:
            if self._pages is None:
                raise OSError(errno.EIO, f"vif {self._name}: no control ring")
            page = self._pages.address + PAGE_SIZE
            ctypes.memset(page, 0, PAGE_SIZE)
            ctypes.memmove(page, content, min(len(content), PAGE_SIZE))
            got = self._ask(kind, [self._grefs[1] if word is None else word for word in data], timeout)
            return got, ctypes.string_at(page, len(content))

    def _ask(self, kind: int, data: Any, timeout: float) -> int:
        if not self.active or self._events is None:
            raise OSError(errno.EIO, f"vif {self._name}: no control ring, or not connected; {self.violation}")
        self._id = (self._id + 1) & 0xFFFF
        row = self._request[0]
        row["id"], row["type"] = self._id, kind
        row["data"] = [*data, 0, 0, 0][:3]
        end = self._end.ctypes.data
        if kernels.ask(end, self._request.ctypes.data):
            self._events.notify(self._port)
        deadline = time.monotonic() + timeout
        while (got := kernels.answer(end, self._response.ctypes.data)) == 0:
            left = deadline - time.monotonic()
            if left <= 0 or not self.active:
                self.active = False  # an answer that comes after all would be taken for that to another request
                raise TimeoutError(errno.ETIMEDOUT, f"vif {self._name}: no answer to control request {kind}")
            self._events.wait(min(left, 0.1))
        response = self._response[0]
        status = int(response["status"])
        if got == CORRUPT or (int(response["id"]), int(response["type"])) != (self._id, kind):
            self.violation = "an answer on the control ring to what was not asked"
        elif status != CTRL_SUCCESS and status not in _ERRORS:
            self.violation = f"status {status} on the control ring"
        if self.violation:
            self.active = False
            raise OSError(errno.EIO, f"vif {self._name}: the backend sent {self.violation}")
        if status != CTRL_SUCCESS:
            number, text = _ERRORS[status]
            raise OSError(number, f"vif {self._name}: to control request {kind} the backend says: {text}")
        return int(response["data"])


def warm() -> None:
    """Compile what a control ring needs."""
    for name, arguments in kernels.ARGUMENTS.items():
        compile_for(getattr(kernels, name), arguments)

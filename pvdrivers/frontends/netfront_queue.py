"""The two rings of a queue of a vif: their pages, grants and event channels, for senders and receivers to use.

The data path is netfront_kernels; this is what has to be there before, between and after. Senders hold `tx_lock`,
receivers `rx_lock`; the device's control thread, which opens and closes the rings, holds both.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.errors import PlatformError
from pvdrivers.platform import PAGE_SIZE, EventChannel, Pages, Platform
from pvdrivers.syscalls import EPOLL_EVENT
from rings.netif import RX_ENTRY_SIZE, TX_ENTRY_SIZE
from rings.ring import RING_END, format_page, front_end

from . import netfront_kernels as kernels
from .lent import Lent
from .netfront_keys import Ring
from .netfront_records import BUFFER, FRAME, QUEUE, SLOTS, VIOLATIONS

__all__ = ["BATCH", "Queue"]

BATCH = 64
"""Packets that Python hands over, or takes, in one go."""
END = 2.0  # seconds for those that wait to notice that there is nothing to wait for


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Queue:
    """Rings that can be opened, used, closed and opened again."""

    def __init__(self, platform: Platform, index: int) -> None:
        self._platform = platform
        self.index = index
        self.record = np.zeros(1, QUEUE)
        self.at = _address(self.record)
        self._keep: dict[str, Any] = {}  # arrays that the record has addresses of
        self.tx_lock, self.rx_lock = threading.Lock(), threading.Lock()
        self.active = False
        self._stop_lock = threading.Lock()  # of QUEUE.stop and what follows; the last to be taken
        self._open = False  # activate() to deactivate()
        self._interrupts = 0
        self._users = threading.Condition()  # of the next two: end() closes nothing that somebody waits on
        self._waiting = 0
        self._ended = False
        self.buffers = np.zeros((2, BATCH, BUFFER), np.uint8)  # to send from, under tx_lock; to receive into, rx_lock
        self.frames = np.zeros((2, BATCH), FRAME)
        self._events: EventChannel | None = None
        self._sources: list[int] = []
        self._pages: list[Pages] = []
        self._grefs: list[int] = []
        self._lent = Lent(platform.pages)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        q = self.record[0]
        for name in ("tx_end", "rx_end"):
            self._array(name, 1, RING_END)
        self._array("grefs", 2 * SLOTS, np.dtype("u4"))
        self._array("free", SLOTS, np.dtype("i4"))
        self._array("in_flight", SLOTS, np.dtype("u1"))
        self._array("epoll_events", 4, EPOLL_EVENT)
        self._array("message", 64, np.dtype("u1"))
        self._array("tx_message", 64, np.dtype("u1"))
        q["epoll"], q["wake_fd"], q["stop"] = self._epoll.fileno(), self._wake, 1

    def _array(self, name: str, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        array = np.zeros(count, dtype)
        self._keep[name] = array
        self.record[0][name] = _address(array)
        return array

    # Opening and closing: the control thread

    def open(self, domid: int, *, split: bool) -> Ring:
        """New, empty rings for `domid`, and all pages that packets will go through, granted: where the rings are."""
        if self._events is None:
            self._events = self._platform.open_events()
        q, pages = self.record[0], self._platform.pages
        self._pages, self._grefs = [], []
        try:
            # Apart: the backend reads what we send, and can change nothing of it; and what gntalloc gives in one go is
            # granted in one way.
            self._pages.append(pages.alloc(2 + SLOTS))
            self._pages.append(pages.alloc(SLOTS))
            shared, sent = self._pages
            for k, frame in enumerate([*shared.frames[:2], *sent.frames, *shared.frames[2:]]):
                self._grefs.append(pages.grant(frame, domid, readonly=2 <= k < 2 + SLOTS))
        except PlatformError:
            for gref in self._grefs:
                pages.end(gref)
            for some in self._pages:
                some.free()
            self._pages, self._grefs = [], []
            raise
        for k, (name, size) in enumerate((("tx_end", TX_ENTRY_SIZE), ("rx_end", RX_ENTRY_SIZE))):
            format_page(shared.address + k * PAGE_SIZE)
            front_end(q[name], shared.address + k * PAGE_SIZE, SLOTS, size)
        q["tx_pages"], q["rx_pages"] = sent.address, shared.address + 2 * PAGE_SIZE
        self._keep["grefs"][:] = self._grefs[2:]
        self._keep["free"][:] = np.arange(SLOTS)[::-1]
        self._keep["in_flight"][:] = 0
        q["free_n"] = SLOTS
        ports = [self._events.alloc_unbound(domid) for _ in range(2 if split else 1)]
        for port in ports:
            source, token = self._events.source(port)
            if source not in self._sources:
                self._epoll.register(source, select.EPOLLIN | select.EPOLLET)
            self._sources.append(source)
            q["tokens"][len(self._sources) - 1 :] = token
        q["tx_port"], q["rx_port"] = ports[0], ports[-1]
        seam = self._platform.seam(self._events)
        self._keep["seam"] = seam
        for name in seam.dtype.names or ():
            if name in (QUEUE.names or ()):
                q[name] = seam[0][name]
        return Ring(self._grefs[0], self._grefs[1], ports[0], ports[-1])

    def activate(self, *, sg: bool, untrusted: bool) -> None:
        """The backend is connected: give it pages for what it receives."""
        q = self.record[0]
        with self.tx_lock, self.rx_lock:
            q["sg"], q["untrusted"], q["violation"] = sg, untrusted, 0
            q["amended"] = -1
            kernels.post_all(self.at)
            self.active = True
            self._set_stop(open=True)

    def deactivate(self) -> None:
        """Stop using the rings. What is on them is lost, as packets are."""
        self._set_stop(open=False)
        self.wake()
        with self.tx_lock, self.rx_lock:
            self.active = False

    def _set_stop(self, *, open: bool | None = None, interrupts: int = 0) -> None:
        """Nobody may stay in a kernel of a queue that is not open, or that is interrupted: whoever of several says so
        last would else have the others wait for ever."""
        with self._stop_lock:
            self._open = self._open if open is None else open
            self._interrupts += interrupts
            self.record[0]["stop"] = 0 if self._open and self._interrupts == 0 else 1

    def release(self) -> None:
        """Take back rings, ports and grants. What the backend still has mapped is never used again by anybody."""
        q = self.record[0]
        if not self._pages or self._events is None:
            return
        for source in set(self._sources):
            self._epoll.unregister(source)
        self._sources = []
        for port in {int(q["tx_port"]), int(q["rx_port"])}:
            self._events.unbind(port)
        self._lent.take_back((self._grefs, self._pages))
        self._pages, self._grefs = [], []

    @property
    def stuck(self) -> int:
        """Grants that a backend did not give back when it should have."""
        return self._lent.stuck

    def end(self) -> None:
        """The queue is no more; deactivate() and release() came before."""
        deadline = time.monotonic() + END
        with self._users:
            self._ended = True
            while self._waiting and time.monotonic() < deadline:
                os.eventfd_write(self._wake, 1)  # one of them hears of it
                self._users.wait(0.01)
            if self._waiting:
                return  # one that was interrupted at a bad moment never says that it has gone
        if self._events is not None:
            self._events.close()
        self._epoll.close()
        os.close(self._wake)

    def grefs(self) -> tuple[list[int], list[int]]:
        """Of the pages that packets are sent from, the ones that are used most first, and received into."""
        return self._grefs[2 : 2 + SLOTS], self._grefs[2 + SLOTS :]

    # For senders and receivers

    def wake(self) -> None:
        """Let whoever waits on this queue have a look."""
        with self._users:
            if not self._ended:
                os.eventfd_write(self._wake, 1)

    def wait(self, timeout_ms: int) -> None:
        """Sleep, without the locks, until the backend has done something or wake() was called. Not for a queue that
        has ended."""
        with self._users:
            if self._ended:
                return
            self._waiting += 1
        try:
            kernels.wait(self.at, timeout_ms)
        finally:
            with self._users:
                self._waiting -= 1
                self._users.notify_all()

    def watch(self, fd: int) -> None:
        """Wait for this descriptor as well, from now on."""
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def interrupt(self) -> None:
        """Have whoever is in a kernel on this queue come out, and nobody stay in one, until go_on()."""
        self._set_stop(interrupts=1)
        self.wake()

    def go_on(self) -> None:
        """The end of one interrupt()."""
        self._set_stop(interrupts=-1)

    def violation(self) -> str:
        """What the backend did, in words."""
        q = self.record[0]
        return VIOLATIONS[int(q["violation"])].format(value=int(q["violation_value"]))

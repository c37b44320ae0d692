"""One ring of a disk: its pages, grants and event channel, and the thread that waits for responses.

The data path is blkfront_kernels; this is what has to be there before, between and after. Three parties use a
queue: callers that submit; the pump, a thread that waits without the GIL and hands completions out; and the device's
control thread, which opens and closes the ring. `lock` is held by whoever is in a kernel on the queue. A load
generator takes the pump's place (`borrow`), and holds the lock while it runs.
"""

from __future__ import annotations

import collections
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.errors import PlatformError
from pvdrivers.platform import PAGE_SIZE, EventChannel, Pages, Platform
from pvdrivers.syscalls import EPOLL_EVENT
from rings import blkif
from rings.ring import RING_END, format_page, front_end, ring_entries

from . import blkfront_kernels as kernels
from .blkfront_records import (
    BATCH,
    COMPLETION,
    HIST_BUCKETS,
    IO,
    KINDS,
    QUEUE,
    SHADOW,
    SHADOW_PAGE,
    VIOLATIONS,
)
from .lent import Lent

__all__ = ["Queue"]

Done = list[tuple[int, int, int, int]]
"""Completions: (tag, 0 or -errno, operation, ns)."""

_MOST_PAGES = 1408  # in the pool of a queue, if no request needs more: 11 for each entry of a four-page ring
_MOST_GREFS = 2048
_STOP = QUEUE.fields["stop"][1]  # type: ignore[index]
assert _STOP == 0


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Queue:
    """A ring that can be opened, used, closed and opened again. Requests outlive the ring."""

    def __init__(
        self,
        platform: Platform,
        index: int,
        handle: int,
        on_done: Callable[[Done], None],
        on_violation: Callable[[str], None],
    ) -> None:
        self._platform = platform
        self.index = index
        self._on_done = on_done
        self._on_violation = on_violation
        self.record = np.zeros(1, QUEUE)
        self.at = _address(self.record)
        self.hist: NDArray[np.uint64] = np.zeros((KINDS, HIST_BUCKETS), np.uint64)
        self._end = np.zeros(1, RING_END)
        self._keep: dict[str, Any] = {}  # arrays and pages that the record has addresses of
        self._backlog: collections.deque[NDArray[Any]] = collections.deque()
        self._out = np.zeros(BATCH, COMPLETION)
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self._sleeping = threading.Lock()  # held by the pump while it waits in a kernel
        self.active = False
        self.paused = False  # nothing new is started: the backend is closing
        self._ended = False
        self._waking = threading.Lock()  # of the descriptor that wake() writes to
        self.borrowed = False
        self._pump_thread: threading.Thread | None = None
        self._events: EventChannel | None = None
        self._source = -1
        self._ring: Pages | None = None
        self._ring_grefs: list[int] = []
        self._pool: Pages | None = None
        self._pool_grefs: list[int] = []
        self._reserved: Sequence[int] = ()
        self._lent = Lent(platform.pages)
        self._notify_before = [0, 0]  # of rings that are closed
        self.requeued = 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        q = self.record[0]
        q["handle"] = handle & 0xFFFF
        q["end"] = _address(self._end)
        q["hist"] = _address(self.hist)
        q["epoll"], q["wake_fd"] = self._epoll.fileno(), self._wake
        self._array("epoll_events", 4, EPOLL_EVENT)
        self._array("message", 256, np.dtype("u1"))
        self._array("responses", BATCH * blkif.RESPONSE_SIZE_64, np.dtype("u1"))

    def _array(self, name: str, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        array = np.zeros(max(1, count), dtype)
        self._keep[name] = array
        self.record[0][name] = _address(array)
        return array

    # Opening and closing: the control thread

    def open(self, domid: int, order: int, abi: int) -> tuple[list[int], int]:
        """A new, empty ring of 2**order pages for `domid`: its grefs, and the event channel to bind."""
        pages = self._platform.pages
        if self._events is None:
            self._events = self._platform.open_events()
        q = self.record[0]
        self._ring = pages.alloc(1 << order)
        self._ring_grefs = [pages.grant(frame, domid) for frame in self._ring.frames]
        format_page(self._ring.address)
        size = blkif.ENTRY_SIZE[abi]
        slots = ring_entries(PAGE_SIZE << order, size)
        front_end(q["end"], self._ring.address, slots, size)
        port = self._events.alloc_unbound(domid)
        self._source, token = self._events.source(port)
        self._epoll.register(self._source, select.EPOLLIN | select.EPOLLET)
        q["domid"], q["abi"], q["slots"], q["port"], q["token"] = domid, abi, slots, port, token
        seam = self._platform.seam(self._events)
        self._keep["seam"] = seam
        for name in seam.dtype.names or ():
            if name in (QUEUE.names or ()):
                q[name] = seam[0][name]
        return self._ring_grefs, port

    def activate(self, *, granted: bool, bounce: bool, untrusted: bool, max_segments: int) -> None:
        """The backend is connected: get the pages and grefs that requests need, and start what waits."""
        q = self.record[0]
        slots = int(q["slots"])
        lists = -(-max_segments // blkif.SEGMENTS_PER_INDIRECT_PAGE) if max_segments > blkif.MAX_SEGMENTS else 0
        need = max_segments + lists
        q["grefs_n"] = 0
        q["granted"], q["bounce"], q["untrusted"] = granted, bounce or granted, untrusted
        q["max_segments"], q["max_pages"] = max_segments, need
        self._array("shadow", slots, SHADOW)
        self._array("shadow_pages", slots * need, SHADOW_PAGE)
        self._array("free", slots, np.dtype("i4"))[:] = np.arange(slots)[::-1]
        q["free_n"] = slots
        plain = slots * blkif.MAX_SEGMENTS
        self._make_pool(max(min(plain, _MOST_PAGES), need + need // 4), need, granted)
        if not granted:
            self._make_grefs(max(min(plain, _MOST_GREFS), need + need // 4), need)
        q["violation"] = 0
        with self.changed:
            q["stop"] = 0
            self.active, self.paused = True, False
            self.feed()
            if self._pump_thread is None:
                self._pump_thread = threading.Thread(target=self._pump, name=f"blkfront-{self.index}", daemon=True)
                self._pump_thread.start()
            self.changed.notify_all()

    def _make_pool(self, count: int, least: int, granted: bool) -> None:
        """`count` pages of our own, or fewer where there is no room; with `granted` the backend may map them all."""
        pages, q = self._platform.pages, self.record[0]
        domid = int(q["domid"])
        while self._pool is None:
            self._pool_grefs = []
            try:
                self._pool = pages.alloc(count)
                if granted:
                    for frame in self._pool.frames:
                        self._pool_grefs.append(pages.grant(frame, domid))
            except PlatformError:
                for gref in self._pool_grefs:
                    pages.end(gref)
                if self._pool is not None:
                    self._pool.free()
                    self._pool = None
                if count <= least:
                    raise
                count = max(least, count // 2)
        q["pool"] = self._pool.address
        self._array("pool_frames", count, np.dtype("i8"))[:] = self._pool.frames
        self._array("pool_free", count, np.dtype("i4"))[:] = np.arange(count)[::-1]
        self._array("pool_grefs", count, np.dtype("u4"))[: len(self._pool_grefs)] = self._pool_grefs
        q["pool_n"] = count

    def _make_grefs(self, count: int, least: int) -> None:
        """`count` grefs for grants that last as long as a request, or fewer where there are no more."""
        self._reserved = ()
        while not self._reserved:
            try:
                self._reserved = list(self._platform.pages.reserve(count))
            except PlatformError:
                if count <= least:
                    raise
                count = max(least, count // 2)
        self._array("grefs", count, np.dtype("u4"))[:] = self._reserved
        self.record[0]["grefs_n"] = count

    def deactivate(self) -> NDArray[Any]:
        """Stop using the ring: the IO records in flight, oldest first, to be requeued or failed."""
        q = self.record[0]
        q["stop"] = 1
        self.wake()
        with self._sleeping, self.changed:
            was, self.active = self.active, False
            self.changed.notify_all()
            if not was:
                return np.zeros(0, IO)
            shadow = self._keep["shadow"]
            ios: NDArray[Any] = shadow["io"][shadow["in_flight"] != 0]
            shadow["in_flight"] = 0
            return ios[np.argsort(ios["sequence"], kind="stable")]

    def release(self) -> None:
        """Take back ring, port and grants. What the backend still has mapped is never used again by anybody."""
        q = self.record[0]
        with self.changed:
            for i, name in enumerate(("notify_sent", "notify_saved")):
                self._notify_before[i] += int(self._end[0][name])
                self._end[0][name] = 0
            if self._ring is None or self._events is None:
                return
            self._epoll.unregister(self._source)
            self._events.unbind(int(q["port"]))
            # Those that a request holds name pages of callers, so they are ended without freeing anything.
            pool = () if self._pool is None else (self._pool,)
            lent = (list(self._reserved), ()), (self._pool_grefs, pool), (self._ring_grefs, (self._ring,))
            self._ring = self._pool = None
            self._ring_grefs, self._pool_grefs, self._reserved = [], [], ()
        self._lent.take_back(*lent)

    @property
    def stuck(self) -> int:
        """Grants that a backend did not give back when it should have."""
        return self._lent.stuck

    def end(self) -> None:
        """The queue is no more; deactivate() and release() came before."""
        with self.changed:
            self._ended = True
            self.changed.notify_all()
        self.wake()
        if self._pump_thread is not None and self._pump_thread is not threading.current_thread():
            self._pump_thread.join()
        if self._events is not None:
            self._events.close()
        self._epoll.close()
        with self._waking:
            wake, self._wake = self._wake, -1
        os.close(wake)

    # Requests: callers

    def submit(self, ios: NDArray[Any]) -> bool:
        """Start IO records, in order. What finds no room, or no backend, waits here and is started later. False, and
        nothing done, when the queue has ended."""
        with self.lock:
            if self._ended:
                return False
            if self._backlog or self.paused or not self.active:
                self._backlog.append(ios)
                return True
            started = kernels.start_all(self.at, _address(ios), len(ios), time.monotonic_ns())
            if started < len(ios):
                self._backlog.append(ios[started:])
            return True

    def requeue(self, ios: NDArray[Any]) -> None:
        """Put IO records, which an earlier ring left unanswered, before all that waits."""
        with self.lock:
            self.requeued += len(ios)
            if len(ios):
                self._backlog.appendleft(ios)

    def take_backlog(self) -> NDArray[Any]:
        """All that waits, which now is the caller's."""
        with self.lock:
            parts = [np.zeros(0, IO), *self._backlog]
            self._backlog.clear()
        return np.concatenate(parts)

    def feed(self) -> None:
        """Start what waits, as far as there is room."""
        while self._backlog and not self.paused:
            ios = self._backlog.popleft()
            started = kernels.start_all(self.at, _address(ios), len(ios), time.monotonic_ns())
            if started < len(ios):
                self._backlog.appendleft(ios[started:])
                return

    # Completions: the pump

    def wake(self) -> None:
        """Let the thread that waits on this queue have a look."""
        with self._waking:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _pump(self) -> None:
        while True:
            with self.changed:
                while not self._ended and (not self.active or self.borrowed or self.record[0]["stop"]):
                    self.changed.wait()
                if self._ended:
                    return
                n = kernels.reap(self.at, _address(self._out), BATCH, time.monotonic_ns())
                if n > 0:
                    self.feed()
                    done: Done = self._out[:n].tolist()
                elif n == 0:
                    n = kernels.arm(self.at)
                    done = []
                if n < 0:
                    self.active = False
            if n < 0:
                self._on_violation(self.violation())
            elif done:
                self._on_done(done)
            elif n == 0:
                with self._sleeping:
                    kernels.wait(self.at, -1)

    def violation(self) -> str:
        """What the backend did, in words."""
        q = self.record[0]
        return VIOLATIONS[int(q["violation"])].format(value=int(q["violation_value"]))

    def borrow(self) -> None:
        """From here on another thread runs the queue in place of the pump; see `lock` and wait_active()."""
        with self.changed:
            self.borrowed = True
        self.wake()
        with self._sleeping:  # the pump is out of its wait, and does not go in again
            pass

    def give_back(self) -> None:
        """The pump again."""
        with self.changed:
            self.borrowed = False
            self.changed.notify_all()

    def wait_active(self, timeout: float) -> bool:
        """With `lock` held: wait until the ring may be used. False if it may not after `timeout` seconds."""
        return self.changed.wait_for(lambda: self.active and not self.record[0]["stop"], timeout)

    @property
    def in_flight(self) -> int:
        """Requests on the ring now."""
        return int(self.record[0]["slots"] - self.record[0]["free_n"]) if self.active else 0

    @property
    def notifications(self) -> tuple[int, int]:
        """(sent, saved) since the queue was made."""
        end = self._end[0]
        return (
            self._notify_before[0] + int(end["notify_sent"]),
            self._notify_before[1] + int(end["notify_saved"]),
        )

"""A disk of a guest: blkfront, from its directory in xenstore to an orderly close, with a public API.

    disk = Blkfront(platform, devid, queues=2, ring_order=2)
    disk.connect(timeout=10)
    disk.write(0, data); disk.flush(); assert disk.read(0, len(data)) == data
    disk.close()

All methods may be called from several threads. A thread of the device's own follows the backend's state
(pvdrivers.xenbus has the table): when a backend goes and another comes, new rings are built and what was in flight
is queued again; callers notice a delay. A backend that breaks the protocol puts the disk in error: all callers get
OSError(EIO), now and until it is closed. A killed backend that is started again with its journal is not noticed at all.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.platform import Platform
from pvdrivers.worker.histogram import percentile
from rings import blkif
from rings.jit import compile_for

from .blkfront_io import CARRY_DATA, OPERATIONS, Io, Pending, cut, most_bytes, records_of
from .blkfront_keys import revoked
from .blkfront_life import Life
from .blkfront_queue import Done, Queue
from .blkfront_records import KIND_OTHER, KIND_READ, KIND_WRITE
from .memory import GuestBuffer
from .watches import Watches

__all__ = ["Blkfront", "GuestBuffer", "Io"]


class Blkfront(Life):
    """A disk seen from the guest. See the module's text; connect() first."""

    def __init__(
        self,
        platform: Platform,
        devid: int,
        *,
        queues: int | None = 1,
        ring_order: int | None = 0,
        abi: str = "x86_64",
        persistent: bool = True,
        indirect: bool | int = True,
        trusted: bool = True,
        watches: Watches | None = None,
    ) -> None:
        """`queues` and `ring_order` are bounded by what the backend offers; None takes all of it (queues: one a CPU).

        `indirect` bounds the segments of a request; False: only what a plain request carries. `trusted=False`, or the
        key `trusted` = 0, bounces all data. Disks of one platform have to share `watches`, as they share its store.
        """
        super().__init__(
            platform,
            devid,
            queues=queues,
            ring_order=ring_order,
            abi=abi,
            persistent=persistent,
            indirect=indirect,
            trusted=trusted,
            watches=watches,
        )
        self.on_resize: Callable[[int], None] | None = None
        self._pending: dict[int, Pending] = {}
        self._tags = itertools.count(1)
        self._next_queue = itertools.count()
        self._pending_lock = threading.Lock()
        self._flush_op = "flush"

    # Whole operations

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. OSError(EIO) if the disk fails, ValueError for a range that is not on it."""
        buffer = np.empty(length, np.uint8)
        self.submit(Io("read", offset, length, buffer)).result()
        return buffer.tobytes()

    def write(self, offset: int, data: Any) -> None:
        """Write `data`; it is stable after the next flush(). OSError(EROFS) on a read-only disk."""
        self.submit(Io("write", offset, memoryview(data).nbytes, data)).result()

    def flush(self) -> None:
        """All writes that have returned are on stable storage. Without a cache to flush there is nothing to do."""
        self.submit(Io("flush")).result()

    def barrier(self, offset: int = 0, data: Any = b"") -> None:
        """WRITE_BARRIER: earlier writes come before, later ones after; with up to 44 KiB of data, or without.

        OSError(EOPNOTSUPP) if the backend has none.
        """
        self.submit(Io("barrier", offset, memoryview(data).nbytes, data)).result()

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        """The contents are not needed any more; `secure`: and cannot be had back. OSError(EOPNOTSUPP) without."""
        self.submit(Io("discard", offset, length, secure=secure)).result()

    def buffer(self, nbytes: int) -> GuestBuffer:
        """Guest memory for I/O without copies. Raises PlatformError."""
        return GuestBuffer(self.platform.pages, nbytes)

    # One operation, by pieces

    def submit(self, io: Io) -> Future[int]:
        """Start an operation. The future's result is the number of bytes; OSError if it fails, EIO most often.

        Its callbacks run on the thread that takes completions, and are to be short. Raises ValueError, OSError(EROFS)
        or OSError(EOPNOTSUPP) at once for what makes no sense on this disk.
        """
        future: Future[int] = Future()
        if not self._check(io):
            future.set_result(0)
            return future
        tag = next(self._tags)
        whole, keep = records_of(io, tag)
        if io.op == "flush":
            whole[0]["op"] = OPERATIONS[self._flush_op]
        ios = cut(whole, self.max_segments, self.info.sector_size, self.bounces)
        free = [queue for queue in self.queues if not queue.borrowed]
        if not free:
            raise OSError(errno.EBUSY, f"{self.name}: a load generator has all queues")
        pending = Pending(io, future, len(ios), keep=keep)
        with self._pending_lock:
            if self.failure:
                raise OSError(errno.EIO, self.failure)
            self._pending[tag] = pending
        if not free[next(self._next_queue) % len(free)].submit(ios):
            self.queues[0].submit(ios)  # a connection with fewer queues has come between
        if self.failure:  # it may have come between, and found nothing to fail
            self._fail_all()
        return future

    def _check(self, io: Io) -> bool:
        """Whether there is anything to do. Raises for what cannot be done."""
        if io.op not in OPERATIONS:
            raise ValueError(f"operation {io.op!r} is not one of {', '.join(OPERATIONS)}")
        if self.failure or not self.queues:
            raise OSError(errno.EIO, self.failure or f"{self.name}: not connected")
        info = self.info
        if io.op == "flush":
            self._flush_op = "flush" if info.flush else "barrier"
            return info.flush or info.barrier
        if io.offset < 0 or io.length < 0 or io.length > info.size or io.offset > info.size - io.length:
            raise ValueError(f"{self.name}: bytes {io.offset} to {io.offset + io.length} of {info.size}")
        if (io.offset | io.length) % info.sector_size:
            raise ValueError(f"{self.name}: offset and length are multiples of {info.sector_size} bytes")
        if io.op != "read" and info.readonly:
            raise OSError(errno.EROFS, f"{self.name}: {os.strerror(errno.EROFS)}")
        supported = {"barrier": info.barrier, "discard": info.discard}
        if not supported.get(io.op, True) or (io.secure and not info.discard_secure):
            raise OSError(errno.EOPNOTSUPP, f"{self.name}: the backend has no {'secure ' * io.secure}{io.op}")
        most = most_bytes(blkif.MAX_SEGMENTS, info.sector_size)
        if io.op == "barrier" and io.length > most:
            raise ValueError(f"{self.name}: a barrier carries {most} bytes at most, not {io.length}")
        return io.length > 0 or io.op == "barrier"

    def _completed(self, done: Done) -> None:
        """Completions of a queue; on its pump's thread."""
        finished = []
        with self._pending_lock:
            for tag, status, op, _ in done:
                pending = self._pending.get(tag)
                if pending is None:
                    continue
                pending.status = pending.status or status
                pending.pieces -= 1
                if status == -errno.EOPNOTSUPP:
                    self.info = revoked(self.info, op)
                if pending.pieces == 0:
                    finished.append(self._pending.pop(tag))
        for pending in finished:
            _settle(pending, self.name)

    def _fail_all(self) -> None:
        """Every caller gets EIO, or what else the failure is."""
        with self._pending_lock:
            left = list(self._pending.values())
            self._pending.clear()
        for pending in left:
            pending.status = -errno.EIO
            _settle(pending, self.failure or self.name)

    def _outstanding(self) -> bool:
        return bool(self._pending)

    def _resized(self) -> None:
        if self.on_resize is not None:
            self.on_resize(self.info.size)

    def _recut(self, ios: NDArray[Any]) -> NDArray[Any]:
        """Records of an earlier connection, as pieces that this one can carry."""
        pieces = cut(ios, self.max_segments, self.info.sector_size, self.bounces)
        if len(pieces) != len(ios):
            with self._pending_lock:
                tags, before = np.unique(ios["tag"], return_counts=True)
                _, after = np.unique(pieces["tag"], return_counts=True)
                for tag, more in zip(tags.tolist(), (after - before).tolist()):
                    if tag in self._pending:
                        self._pending[tag].pieces += more
        return pieces

    # What went on

    @property
    def requeue_count(self) -> int:
        """Requests that were sent a second time, because a backend went without answering them."""
        return sum(queue.requeued for queue in self.queues)

    def stats(self) -> dict[str, Any]:
        """Counters since the disk was connected: totals, percentiles (us), and the same of each queue."""
        per_queue = [_queue_stats(queue) for queue in self.queues]
        hist = sum((queue.hist.sum(axis=0) for queue in self.queues), np.zeros(1, np.uint64))
        seconds = max(1e-9, time.monotonic() - self.connected_at)
        totals = {
            key: sum(q[key] for q in per_queue)
            for key in (per_queue[0] if per_queue else {})
            if not key.startswith(("p50", "p99"))
        }
        requests = totals.get("reads", 0) + totals.get("writes", 0) + totals.get("others", 0)
        return {
            "state": self.state.name,
            "seconds": seconds,
            "iops": requests / seconds,
            **totals,
            "p50_us": percentile(hist, 0.50) / 1000,
            "p99_us": percentile(hist, 0.99) / 1000,
            "requeues": self.requeue_count,
            "queues": per_queue,
        }


def _queue_stats(queue: Queue) -> dict[str, Any]:
    q = queue.record[0]
    sent, saved = queue.notifications
    hist = queue.hist.sum(axis=0)
    return {
        "reads": int(q["requests"][KIND_READ]),
        "writes": int(q["requests"][KIND_WRITE]),
        "others": int(q["requests"][KIND_OTHER]),
        "bytes_read": int(q["bytes"][KIND_READ]),
        "bytes_written": int(q["bytes"][KIND_WRITE]),
        "errors": int(q["errors"]),
        "notify_sent": sent,
        "notify_saved": saved,
        "wakeups": int(q["wakeups"]),
        "granted_pages": int(q["granted_pages"]),
        "bounced_pages": int(q["bounced_pages"]),
        "stuck_grants": queue.stuck,
        "in_flight": queue.in_flight,
        "p50_us": percentile(hist, 0.50) / 1000,
        "p99_us": percentile(hist, 0.99) / 1000,
    }


def _settle(pending: Pending, what: str) -> None:
    if not pending.future.set_running_or_notify_cancel():
        return
    if pending.status:
        text = f"{what}: {pending.io.op} at {pending.io.offset}: {os.strerror(-pending.status)}"
        pending.future.set_exception(OSError(-pending.status, text))
    else:
        pending.future.set_result(pending.io.length)


def warm(load: bool = True) -> None:
    """Compile all that a disk needs, and its load generator, so that nothing is compiled later. Twice costs nothing."""
    from . import blkfront_kernels

    for name, arguments in blkfront_kernels.ARGUMENTS.items():
        compile_for(getattr(blkfront_kernels, name), arguments)
    if load:
        from . import load_kernels

        for name, arguments in load_kernels.ARGUMENTS.items():
            compile_for(getattr(load_kernels, name), arguments)


assert set(CARRY_DATA) < set(OPERATIONS.values())

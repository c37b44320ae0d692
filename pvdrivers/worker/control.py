"""The Python side of the workers: threads that start and stop, rings that come and go, violations that are told.

A Worker's thread is inside `loop.run` for all of its life. Rings are handed over by filling in a RING record and then
storing its state; an eventfd, the doorbell, has the worker look. Control threads may call everything here at any time.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pvdrivers.errors import LeftInUse, PvError
from pvdrivers.platform import GRANT_OP, Platform
from pvdrivers.storage import software_pool
from pvdrivers.storage.uring import enable
from pvdrivers.storage.uring_setup import Uring
from pvdrivers.syscalls import CYCLES, MAP_NORESERVE
from pvdrivers.thread_names import name_thread
from rings.jit import compile_for

from . import loop
from .fair import NO_LIMIT
from .records import (
    BLOCK_SIZE,
    CALLING_AT,
    RING,
    RING_ACTIVE,
    RING_ATTACHING,
    RING_DEAD,
    RING_DETACHED,
    RING_DETACHING,
    RING_FREE,
    WORKER,
    ZERO_BYTES,
    in_words,
)
from .words import count_cycles, load_word, store_word

MAX_RINGS = 1024
MAX_PORTS = 131072
MAX_OPS = 4096
BUDGET = 32
FAIR_DEPTH = 8
# Address space: what is never used takes no memory. See pools for who may have how much.
BLOCKS_KEPT, BLOCKS = MAX_RINGS, MAX_RINGS + 2048
BOUNCE_KEPT, BOUNCE_PAGES = 1 << 16, 1 << 17
CQ_ENTRIES = 8192
INTERRUPT = signal.SIGUSR2
"""Ends a system call of a worker that a guest holds up; see `events`."""
HELD_UP_S = 0.1
_CALIBRATION_S = 0.005

_left: list[object] = []
"""Workers that rings were left with: kept until the process ends."""


class Memory:
    """Zeroed pages at an address, resident only where they are touched. Keep it alive as long as the address."""

    def __init__(self, size: int) -> None:
        # NORESERVE: a pool that is mostly never touched is not to count as memory that is promised.
        self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self.bytes.ctypes.data)

    def array(self, dtype: Any, count: int, offset: int = 0) -> np.ndarray:
        """`count` items of `dtype` from `offset` bytes on: a view."""
        size = np.dtype(dtype).itemsize * count
        return self.bytes[offset : offset + size].view(dtype)


@dataclass
class RingHandle:
    """A ring that a worker serves. `keep` is whatever must live as long as that."""

    worker: Worker
    index: int
    device: Any
    port: int
    keep: list[Any] = field(default_factory=list)

    @property
    def record(self) -> np.void:
        """The RING record."""
        row: np.void = self.worker.rings[self.index]
        return row

    @property
    def address(self) -> int:
        """The address of the RING record."""
        return int(self.worker.rings.ctypes.data) + self.index * RING.itemsize


class Worker:
    """One data-plane thread with an event channel handle, an io_uring and up to MAX_RINGS rings."""

    def __init__(self, platform: Platform, index: int, alert_fd: int, *, spin_us: int = 0, coalesce_us: int = 0,
                 software: bool = False, keep: int = -1) -> None:  # fmt: skip
        self.index = index
        self.platform = platform
        self.events = platform.open_events()
        self.seam = platform.seam(self.events)
        self.uring = Uring.open(256, CQ_ENTRIES, software=software or None, keep=keep)
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.rings = np.zeros(MAX_RINGS, RING)
        self._record = np.zeros(1, WORKER)
        self._memory: list[Any] = []
        self._handles: dict[int, RingHandle] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._alert_fd = alert_fd
        self._ended = ""
        self._passes = -1  # of the loop, when somebody last looked
        self._fill(alert_fd, spin_us)
        if coalesce_us > 0:
            self._coalesce(coalesce_us)

    def _fill(self, alert_fd: int, spin_us: int) -> None:
        w = self._record[0]
        w["doorbell_fd"], w["alert_fd"] = self.doorbell, alert_fd
        w["event_fd"], w["event_token"] = getattr(self.events, "shared_source", (-1, 0))
        w["uring"] = self.uring.address
        if self.uring.deferred:  # or what it reads could come while the seam is at what it had read before
            w["event_in"], w["event_in_size"] = getattr(self.events, "shared_read", (0, 0))
        w["seam"] = self.seam.ctypes.data
        w["rings"], w["max_rings"] = self.rings.ctypes.data, MAX_RINGS
        w["spin_ns"] = spin_us * 1000
        w["budget"] = BUDGET
        w["fair_depth"], w["heavy_limit"] = FAIR_DEPTH, NO_LIMIT
        ports = self._new(MAX_PORTS * 4).array(np.int32, MAX_PORTS)
        ports[:] = -1
        self._ports = ports
        w["port_ring"], w["max_ports"] = ports.ctypes.data, MAX_PORTS
        w["ops"], w["max_ops"] = self._new(MAX_OPS * GRANT_OP.itemsize).address, MAX_OPS
        w["owners"] = self._new(MAX_OPS * 8).address
        w["pass_reqs"] = self._new(BUDGET * 8).address
        w["scratch"] = self._new(4096).address
        w["zero"] = self._new(ZERO_BYTES).address
        w["bounce"] = self._new(BOUNCE_PAGES * 4096).address
        free = self._new(BOUNCE_PAGES * 4).array(np.int32, BOUNCE_PAGES)
        free[:] = np.arange(BOUNCE_PAGES - 1, -1, -1)  # the first page is on top: few are ever touched
        w["bounce_free"], w["bounce_n"] = free.ctypes.data, BOUNCE_PAGES
        w["bounce_kept"], w["blocks_kept"] = BOUNCE_KEPT, BLOCKS_KEPT
        blocks = self._new(BLOCKS * BLOCK_SIZE)
        stack = self._new(BLOCKS * 8).array(np.int64, BLOCKS)
        stack[:] = blocks.address + np.arange(BLOCKS - 1, -1, -1) * BLOCK_SIZE
        w["blocks_free"], w["blocks_n"] = stack.ctypes.data, BLOCKS
        # Test hooks, see docs/testing.md: die at a step of the journal; answer in reverse order.
        step, _, count = os.environ.get("PVDRIVERS_TEST_KILL", "0").partition(":")
        w["kill_step"], w["kill_count"] = int(step), int(count or 1)
        w["reverse"] = int(os.environ.get("PVDRIVERS_TEST_REVERSE", "0"))

    def _coalesce(self, microseconds: int) -> None:
        """Have the loop nap, see `nap`; and tell the time by the processor, which takes no system call anywhere."""
        w = self._record[0]
        w["nap_ns"] = microseconds * 1000
        if CYCLES:
            before, began = time.monotonic_ns(), count_cycles()
            time.sleep(_CALIBRATION_S)
            after, ended = time.monotonic_ns(), count_cycles()
            if ended > began:
                w["cycle_scale"] = ((after - before) << 20) // (ended - began)
                w["cycle_limit"] = (ended - began) * int(0.1 / _CALIBRATION_S)

    def _new(self, size: int) -> Memory:
        memory = Memory(size)
        self._memory.append(memory)
        return memory

    @property
    def record(self) -> np.void:
        """The WORKER record."""
        row: np.void = self._record[0]
        return row

    @property
    def address(self) -> int:
        """The address of the WORKER record."""
        return int(self._record.ctypes.data)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._main, name=f"worker-{self.index}", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        # Signals are for the control thread; here they would only end a wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {INTERRUPT})
        name_thread(f"worker-{self.index}")
        try:
            enable(self.uring.address)
            loop.run(self.address)
            if not load_word(self.address) and not self.failed:
                self._ended = "its loop has ended"
        except BaseException as e:
            self._ended = repr(e)
            raise
        finally:
            if self.failed:
                os.eventfd_write(self._alert_fd, 1)  # the control thread sleeps, and nobody else would tell it

    def leave(self) -> None:
        """Leave the loop."""
        if self._thread is not None:
            store_word(self.address, 1)
            self.ring_doorbell()
            self._thread.join()
        self.uring.end()

    def stop(self, deadline: float | None = None, *, left: bool = False) -> None:
        """Leave the loop and release everything: the rings have been detached before. Or some are `left`, and may be in
        other threads' hands: then all that these or the kernel may touch is kept until the process ends."""
        self.leave()
        self.uring.close(deadline)
        if left:
            _left.append(self)
            return
        self.events.close()
        os.close(self.doorbell)

    @property
    def gone(self) -> bool:
        """Its thread has run, and does nothing any more."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def can_be_held_up(self) -> bool:
        """Whether a guest can make a call last: it can where a port is a descriptor that its other end has, too."""
        return int(self._record[0]["event_fd"]) < 0

    def interrupt_if_held_up(self) -> None:
        """For the watchdog: a call that a guest makes last is ended."""
        since = load_word(self.address + CALLING_AT)
        thread = self._thread
        if since and thread is not None and time.monotonic_ns() - since > HELD_UP_S * 1e9 and thread.is_alive():
            assert thread.ident is not None
            signal.pthread_kill(thread.ident, INTERRUPT)

    @property
    def failed(self) -> str:
        """Why the loop ended by itself, "" if it did not."""
        error = int(self._record[0]["error"])
        if error:
            return f"worker {self.index}: io_uring: {os.strerror(-error)}"
        return f"worker {self.index}: {self._ended}" if self._ended else ""

    def went_round(self) -> bool:
        """Whether the loop has gone round since the last call, which had it do so."""
        before, self._passes = self._passes, int(self._record[0]["passes"])
        self.ring_doorbell()
        return self._passes != before and not self.failed

    def come_round(self, timeout: float = float("inf")) -> None:
        """Wait until no pass is under way that had begun before; not for a loop that has ended."""
        passes, deadline = int(self._record[0]["passes"]), time.monotonic() + timeout
        while int(self._record[0]["passes"]) - passes < 2 and self._thread is not None and not self.gone:
            if time.monotonic() > deadline:
                return
            self.ring_doorbell()
            time.sleep(0.0002)

    def ring_doorbell(self) -> None:
        """Have the worker look at the states of its rings."""
        os.eventfd_write(self.doorbell, 1)

    def new_ring(self, device: Any, port: int) -> RingHandle:
        """A free RING record, zeroed, with worker, port (-1: none) and event source. PvError if there is none."""
        with self._lock:
            for index in range(MAX_RINGS):
                if index not in self._handles:
                    break
            else:
                raise PvError(f"worker {self.index}: all of its {MAX_RINGS} rings are in use; run more workers")
            handle = RingHandle(self, index, device, port)
            self._handles[index] = handle
            self._record[0]["top_ring"] = max(int(self._record[0]["top_ring"]), index + 1)
        row = handle.record
        self.rings[index] = np.zeros((), RING)
        row["index"], row["worker"], row["port"] = index, self.address, port
        if port < 0 or int(self._record[0]["event_fd"]) >= 0:
            row["event_fd"] = -1
        else:
            row["event_fd"], row["event_token"] = self.events.source(port)
        return handle

    def attach(self, handle: RingHandle) -> None:
        """The record is filled in: the worker serves it from now on."""
        # First: a ring that is served has its port. One that is pending before its ring is served, as it is from
        # being bound on, is let in with the ring.
        if handle.port >= 0:
            self._ports[handle.port] = handle.index
        store_word(handle.address, RING_ATTACHING)
        self.ring_doorbell()

    def drop(self, handle: RingHandle) -> None:
        """Forget a ring that is not served: never attached, or detached. Once only: its place may be another's."""
        with self._lock:
            if self._handles.get(handle.index) is handle:
                self._ports[handle.port : handle.port + 1] = -1  # none, if it has no port
                del self._handles[handle.index]
                store_word(handle.address, RING_FREE)

    def detach(self, handle: RingHandle, timeout: float | None = None) -> bool:
        """Stop taking requests, wait until nothing is in flight, and drop the ring: then True. False if the time was
        over before that. Raises LeftInUse if the worker has ended, and will never say that nothing is in flight."""
        deadline = None if timeout is None else time.monotonic() + timeout
        address = handle.address
        pause = 0.0002
        while self._handles.get(handle.index) is handle:
            gone = self.gone  # first: what the state is after that, it stays
            state = load_word(address)
            if state == RING_DETACHED or state == RING_FREE or self._thread is None:  # None: nothing was ever taken
                self.drop(handle)
                break
            if gone:
                raise LeftInUse(self.failed or f"worker {self.index} has been stopped")
            if state in (RING_ACTIVE, RING_DEAD):
                store_word(address, RING_DETACHING)
                self.ring_doorbell()
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
        return True

    def alerts(self) -> list[tuple[Any, str]]:
        """Rings that died since the last call: their device, and why."""
        found = []
        for handle in self.attached():
            if load_word(handle.address) == RING_DEAD and not handle.record["reported"]:
                handle.record["reported"] = 1
                found.append((handle.device, in_words(handle.device, int(handle.record["violation"]))))
        return found

    def attached(self) -> list[RingHandle]:
        """All its rings."""
        with self._lock:
            return list(self._handles.values())


def warm() -> None:
    """Compile the loop, and what the control threads call."""
    software_pool.warm()
    compile_for(loop.run, 1)
    compile_for(enable, 1)
    compile_for(load_word, 1)
    compile_for(store_word, 2)
    compile_for(count_cycles, 0)

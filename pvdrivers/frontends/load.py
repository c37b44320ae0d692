"""A load for a disk: what to do (Plan), what came of it (Result), and a thread for each queue that does it.

The loop is load_kernels.run; Python looks in ten times a second. A load keeps going over a backend that is killed and
started again, which it does not notice, and over one that goes and comes again, with the requests queued again.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pvdrivers.errors import ConfigError, PvError
from pvdrivers.worker.histogram import percentile

from . import load_kernels as kernels
from .blkfront import Blkfront, warm
from .blkfront_io import most_bytes
from .blkfront_records import BATCH, COMPLETION, HIST_BUCKETS, IO
from .memory import GuestBuffer

__all__ = ["VERIFY", "Ledger", "Load", "Mismatch", "Plan", "Result"]

VERIFY = {"off": kernels.VERIFY_OFF, "stamps": kernels.VERIFY_STAMPS, "all": kernels.VERIFY_ALL}
_SLICE = 0.1  # seconds in the kernel before Python looks in
_RECONNECT = 60.0  # seconds to wait for another backend


@dataclass(frozen=True)
class Plan:
    """What a load does. Sizes and offsets are bytes."""

    block_size: int = 4096
    depth: int = 32  # requests in flight, of each queue
    write_percent: float = 0.0
    random: bool = True
    offset: int = 0  # of the part of the disk that is used
    length: int | None = None  # of it; None: to the end
    verify: str = "off"  # off, stamps (ends of each sector) or all (every byte)
    again_percent: float = 50.0  # verify: writes followed at once by another to the same block
    seconds: float | None = None
    requests: int | None = None  # of all queues together; None: until `seconds` are over, or stop()
    spin: int = 0  # looks at the ring before sleeping
    zero_copy: bool = True  # buffers are guest memory, given to the backend where it is trusted
    registered: bool = False  # ... granted once and for all, not for each request
    seed: int = 1


@dataclass(frozen=True)
class Mismatch:
    """The first sector that was not what it had to be."""

    offset: int  # bytes
    expected_generation: int
    found_sector: int
    found_generation: int
    word: int  # of eight bytes, in the sector

    def __str__(self) -> str:
        if self.found_sector == self.offset // 512 and self.word == 1:
            found = f"generation {self.found_generation}"
        elif self.word == 0 and self.found_sector >= 0:
            found = f"sector {self.found_sector}, generation {self.found_generation}"
        else:
            found = f"different data from byte {self.word * 8} of the sector on"
        return f"offset {self.offset}: expected generation {self.expected_generation}, found {found}"


@dataclass(frozen=True)
class Result:
    """What has been done, by one queue or by all."""

    seconds: float
    requests: int
    nbytes: int
    errors: int
    verified: int  # blocks compared
    mismatches: int
    mismatch: Mismatch | None
    first_error: tuple[int, int] | None  # (errno, offset)
    notify_sent: int
    notify_saved: int
    requeues: int
    hist: NDArray[np.uint64] = field(repr=False)  # latencies, of 256 buckets

    @property
    def iops(self) -> float:
        return self.requests / self.seconds if self.seconds > 0 else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    def latency_us(self, fraction: float) -> float:
        """Microseconds in which this fraction of the requests had an answer."""
        return percentile(self.hist, fraction) / 1000

    @property
    def right(self) -> bool:
        """Whether nothing failed and nothing differed."""
        return self.errors == 0 and self.mismatches == 0


class Ledger:
    """Which generation every block of a range has to have. It outlives loads: one writes, another checks."""

    def __init__(self, size: int, block_size: int = 4096, offset: int = 0, seed: int | None = None) -> None:
        """For `size` bytes from `offset` on. `seed`: 31 bits that tell these stamps from those of another run."""
        if block_size <= 0 or block_size % 512 or offset % 512:
            raise ConfigError(f"block size {block_size} and offset {offset} are multiples of 512")
        self.block_size = block_size
        self.offset = offset
        self.blocks = size // block_size
        self.salt = int.from_bytes(os.urandom(4), "little") & 0x7FFFFFFF if seed is None else seed & 0x7FFFFFFF
        self.generations: NDArray[np.int64] = np.zeros(max(1, self.blocks), np.int64)

    def check(self, block: int, data: Any, whole: bool = True) -> bool:
        """Whether `data` (bytes of whole blocks, from `block` on) is what was written last, where anything was."""
        array = np.frombuffer(data, np.uint8)
        sectors = self.block_size // 512
        for i in range(len(array) // self.block_size):
            generation = int(self.generations[block + i])
            at = int(array.ctypes.data) + i * self.block_size
            sector = self.offset // 512 + (block + i) * sectors
            if generation > 0 and kernels.first_bad(at, sectors, sector, generation, self.salt, whole) >= 0:
                return False
        return True


class _Worker:
    """One queue's share of a load."""

    def __init__(self, disk: Blkfront, index: int, plan: Plan, ledger: Ledger, first: int, blocks: int) -> None:
        self.queue = disk.queues[index]
        self._disk, self._index, self._plan = disk, index, plan
        self.failure = ""
        self._keep: dict[str, Any] = {}
        self.record = np.zeros(1, kernels.LOAD)
        load = self.record[0]
        slot_bytes = -(-plan.block_size // 4096) * 4096
        depth = min(plan.depth, blocks)
        self.buffer = GuestBuffer(disk.platform.pages, depth * slot_bytes)
        if plan.registered and plan.zero_copy:
            self.buffer.register(disk.backend_domid)
        load["queue"] = self.queue.at
        load["depth"], load["free_n"] = depth, depth
        load["block_sectors"] = plan.block_size // 512
        load["first_sector"] = (ledger.offset + first * plan.block_size) // 512
        load["blocks"] = blocks
        load["write_ppm"] = round(plan.write_percent * 10_000)
        load["random"] = plan.random
        load["verify"] = VERIFY[plan.verify]
        load["again_ppm"] = round(plan.again_percent * 10_000) if plan.verify != "off" else 0
        load["spin"] = plan.spin
        load["salt"] = ledger.salt
        load["buffer"], load["slot_bytes"] = self.buffer.address, slot_bytes
        load["frames"] = self.buffer.frames_at(0) if plan.zero_copy else 0
        load["generations"] = ledger.generations[first:].ctypes.data
        load["random_state"] = (plan.seed * 0x9E3779B1 + index * 0x85EBCA77) & 0xFFFFFFFF | 1
        self._array("slots", depth, kernels.SLOT)
        self._array("free", depth, np.dtype("i4"))[:] = np.arange(depth)[::-1]
        self._array("busy", blocks, np.dtype("u1"))
        self._array("io", 1, IO)
        self._array("done", BATCH, COMPLETION)
        self._hist_before = self.queue.hist.copy()
        self._notify_before = self.queue.notifications
        self._requeued_before = self.queue.requeued

    def _array(self, name: str, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        array = self._keep[name] = np.zeros(count, dtype)
        self.record[0][name] = array.ctypes.data
        return array

    def run(self) -> None:
        """Until all is done, or `failure` says why not. On a thread of its own; the kernel runs without the GIL."""
        self.queue.borrow()
        try:
            self._run()
        except Exception as error:  # a thread has nobody to raise it to
            self.failure = f"the load ended: {type(error).__name__}: {error}"
        finally:
            self.queue.give_back()

    def _run(self) -> None:
        at = int(self.record.ctypes.data)
        alone_since = time.monotonic()
        while True:
            with self.queue.lock:
                active = self.queue.wait_active(_SLICE)
                if self._disk.failure or time.monotonic() - alone_since > _RECONNECT:
                    self.failure = self._disk.failure or f"no backend came within {_RECONNECT:g} s"
                    return
                if not active:
                    continue
                if most_bytes(self._disk.max_segments, 512) < self._plan.block_size:
                    self.failure = f"a request of this backend does not carry {self._plan.block_size} bytes"
                    return
                self.queue.feed()
                result = kernels.run(at, time.monotonic_ns() + int(_SLICE * 1e9))
                alone_since = time.monotonic()
            if result == kernels.FINISHED:
                return
            if result == kernels.VIOLATED:
                self._disk.violated(self.queue.violation())
                self.failure = self._disk.failure
                return

    def result(self, seconds: float) -> Result:
        load = self.record[0]
        sent, saved = self.queue.notifications
        mismatch = None
        if load["mismatches"]:
            mismatch = Mismatch(
                int(load["bad_sector"]) * 512,
                int(load["bad_expected"]),
                int(load["bad_found_sector"]),
                int(load["bad_found_generation"]),
                int(load["bad_word"]),
            )
        requests = int(load["completed"])
        return Result(
            seconds=seconds,
            requests=requests,
            nbytes=(requests - int(load["errors"])) * self._plan.block_size,
            errors=int(load["errors"]),
            verified=int(load["verified"]),
            mismatches=int(load["mismatches"]),
            mismatch=mismatch,
            first_error=(-int(load["first_error"]), int(load["first_error_sector"]) * 512) if load["errors"] else None,
            notify_sent=sent - self._notify_before[0],
            notify_saved=saved - self._notify_before[1],
            requeues=self.queue.requeued - self._requeued_before,
            hist=(self.queue.hist - self._hist_before).sum(axis=0),
        )


class Load:
    """A load on all queues of a disk: start(), and wait() for the result; snapshot() meanwhile."""

    def __init__(self, disk: Blkfront, plan: Plan, ledger: Ledger | None = None) -> None:
        """`disk` is connected. Raises ConfigError for a plan that does not fit it."""
        warm()  # or the first to start would measure the compiler
        info = disk.info
        length = info.size - plan.offset if plan.length is None else plan.length
        if plan.verify not in VERIFY:
            raise ConfigError(f"verify {plan.verify!r} is not one of {', '.join(VERIFY)}")
        if plan.block_size % info.sector_size or plan.block_size <= 0 or plan.offset % info.sector_size:
            raise ConfigError(f"block size and offset are multiples of the disk's sector size, {info.sector_size}")
        if plan.offset < 0 or length <= 0 or plan.offset + length > info.size:
            raise ConfigError(f"bytes {plan.offset} to {plan.offset + length} of a disk of {info.size}")
        if plan.block_size > most_bytes(disk.max_segments, info.sector_size):
            raise ConfigError(f"a request carries {most_bytes(disk.max_segments, info.sector_size)} bytes at most")
        if info.readonly and plan.write_percent > 0:
            raise ConfigError(f"disk {disk.name} is read-only")
        self.plan = plan
        self.ledger = Ledger(length, plan.block_size, plan.offset) if ledger is None else ledger
        if (self.ledger.block_size, self.ledger.offset) != (plan.block_size, plan.offset):
            raise ConfigError("the ledger is of another block size or offset")
        blocks = min(length // plan.block_size, self.ledger.blocks)
        count = min(len(disk.queues), blocks)
        if not count:
            raise ConfigError(f"not one block of {plan.block_size} bytes fits")
        share = blocks // count
        self._workers = []
        for i in range(count):
            mine = share if i < count - 1 else blocks - share * i
            worker = _Worker(disk, i, plan, self.ledger, i * share, mine)
            if plan.requests is not None:
                # A share in proportion: with one request a block every block gets exactly one.
                before, after = plan.requests * share * i, plan.requests * (share * i + mine)
                worker.record[0]["most"] = max(1, after // blocks - before // blocks)
            self._workers.append(worker)
        self._threads: list[threading.Thread] = []
        self._timer: threading.Timer | None = None
        self._started = self._finished = 0.0

    def start(self) -> None:
        """Begin; returns at once."""
        self._started = time.monotonic()
        for i, worker in enumerate(self._workers):
            self._threads.append(threading.Thread(target=worker.run, name=f"load-{i}", daemon=True))
            self._threads[-1].start()
        if self.plan.seconds is not None:
            self._timer = threading.Timer(self.plan.seconds, self.stop)
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """Issue no more; what is in flight is waited for."""
        for worker in self._workers:
            worker.record[0]["drain"] = 1
            worker.queue.wake()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def wait(self, timeout: float | None = None) -> Result:
        """The result when all is done. PvError if the disk failed or did not finish within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if self.running:
            raise PvError(f"the load did not end within {timeout} s")
        self._finished = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        result = self.snapshot()
        for worker in self._workers:
            if worker.failure:
                raise PvError(worker.failure)
            worker.buffer.free()
        return result

    def run(self, timeout: float | None = None) -> Result:
        """start() and wait()."""
        self.start()
        return self.wait(timeout)

    def snapshot(self) -> Result:
        """What has been done so far, of all queues together."""
        seconds = (self._finished or time.monotonic()) - self._started
        parts = [worker.result(seconds) for worker in self._workers]
        total = Result(seconds, 0, 0, 0, 0, 0, None, None, 0, 0, 0, np.zeros(HIST_BUCKETS, np.uint64))
        for part in parts:
            total = replace(
                total,
                **{
                    name: getattr(total, name) + getattr(part, name)
                    for name in ("requests", "nbytes", "errors", "verified", "mismatches", "hist")
                    + ("notify_sent", "notify_saved", "requeues")
                },
                mismatch=total.mismatch or part.mismatch,
                first_error=total.first_error or part.first_error,
            )
        return total

    def __str__(self) -> str:
        result = self.snapshot()
        text = f"{result.requests} requests, {result.errors} errors, {result.mismatches} mismatches"
        if result.mismatch:
            text += f"; {result.mismatch}"
        if result.first_error:
            number, offset = result.first_error
            text += f"; first error {errno.errorcode.get(number, number)} at {offset}"
        return text

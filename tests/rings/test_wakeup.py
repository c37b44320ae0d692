"""Two that sleep and wake each other, truly at the same time: whoever is not woken hangs, and the test fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from pvdrivers.bench import ring_kernels as loops
from rings import jit
from rings.blkif import ENTRY_SIZE_64
from rings.ring import RING_END, back_end, format_page, front_end
from tests.rings.ends import WRAP
from tests.rings.guard import Guarded

MESSAGES = 200_000 if jit.JIT else 1500
PATIENCE = 120.0
ENTRIES = 32


class Pair:
    """Both ends in shared memory, and the two loops of the benchmark, which check every message."""

    def __init__(self, start: int) -> None:
        self.memory = Guarded(64 + ENTRIES * ENTRY_SIZE_64)
        self.ends = Guarded(2 * RING_END.itemsize)
        self.scratch = Guarded(8 * (loops.STAMPS + loops.BUCKETS) + 2 * loops.BATCH * ENTRY_SIZE_64)
        format_page(self.memory.address)
        event = (start + 1) % WRAP
        self.memory.bytes[:16].view(np.uint32)[:] = (start, event, start, event)
        self.f, self.b = self.ends.address, self.ends.address + RING_END.itemsize
        assert front_end(self.f, self.memory.address, ENTRIES, ENTRY_SIZE_64) == 0
        assert back_end(self.b, self.memory.address, ENTRIES, ENTRY_SIZE_64) == 0
        self.to_front, self.to_back = os.eventfd(0), os.eventfd(0)
        self.stamps = self.scratch.address
        self.latency = self.stamps + 8 * loops.STAMPS
        self.inbox = self.latency + 8 * loops.BUCKETS
        self.front(1, 0)
        self.back(0)  # compiled, before there are two

    def front(self, depth: int, total: int) -> int:
        fds = self.to_front, self.to_back
        return int(loops.front(self.f, depth, total, loops.SLEEP, *fds, 1.0, self.stamps, self.latency, self.inbox))

    def back(self, total: int) -> int:
        inbox = self.inbox + loops.BATCH * ENTRY_SIZE_64
        return int(loops.back(self.b, total, loops.SLEEP, self.to_back, self.to_front, inbox))

    def notified(self) -> tuple[int, int]:
        records = self.ends.bytes.view(RING_END)
        return int(records[0]["notify_sent"]), int(records[1]["notify_sent"])


@contextmanager
def in_thread(work: Callable[[], int]) -> Iterator[Callable[[], int]]:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()

    def result() -> int:
        thread.join(PATIENCE)
        assert results, "asleep for ever: a wake-up was lost"
        return results[0]

    yield result


@contextmanager
def in_process(work: Callable[[], int]) -> Iterator[Callable[[], int]]:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work()
        finally:
            os._exit(0 if status == 0 else 1)

    def result() -> int:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("asleep for ever: a wake-up was lost")

    yield result


@pytest.mark.parametrize("other", [in_thread, in_process])
@pytest.mark.parametrize("depth", [1, 3, ENTRIES])
def test_nobody_sleeps_for_ever(depth: int, other: Callable[..., Iterator[Callable[[], int]]]) -> None:
    total = MESSAGES // 10 if depth == 1 else MESSAGES
    pair = Pair((-total // 2) % WRAP)  # wraps half-way
    with other(lambda: pair.back(total)) as back, in_thread(lambda: pair.front(depth, total)) as front:
        assert front() >= 0
        assert back() == 0
    assert pair.scratch.bytes[8 * loops.STAMPS :][: 8 * loops.BUCKETS].view(np.int64).sum() == total
    by_front, by_back = pair.notified()
    assert 1 <= by_front <= total
    assert 1 <= by_back <= total
    os.close(pair.to_front)
    os.close(pair.to_back)

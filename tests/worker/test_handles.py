"""Rings that come and go: a handle whose ring was dropped does nothing to who has its place now."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pvdrivers.errors import LeftInUse
from pvdrivers.platform import SEAM
from pvdrivers.worker import pool
from pvdrivers.worker.control import Worker
from pvdrivers.worker.pool import WorkerPool
from pvdrivers.worker.records import RING_ACTIVE, RING_DETACHED, RING_DETACHING, RING_FREE

EVENTS = SimpleNamespace(source=lambda port: (-1, 0), close=lambda: None)
PLATFORM: Any = SimpleNamespace(open_events=lambda: SimpleNamespace(**vars(EVENTS)), seam=lambda _: np.zeros(1, SEAM))


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Its loop does not run."""
    alert = os.eventfd(0)
    made = Worker(PLATFORM, 0, alert, software=True)
    yield made
    made.stop()
    os.close(alert)


@pytest.mark.parametrize("again", ["drop", "detach"])
def test_a_ring_is_dropped_once(worker: Worker, again: str) -> None:
    first = worker.new_ring("first", 7)
    worker.attach(first)
    assert worker.detach(first) and worker.attached() == [] and first.record["state"] == RING_FREE
    second = worker.new_ring("second", 7)
    assert second.index == first.index
    worker.attach(second)
    second.record["state"] = RING_ACTIVE
    getattr(worker, again)(first)
    assert worker.attached() == [second] and second.record["state"] == RING_ACTIVE
    third = worker.new_ring("third", 8)
    assert third.index != second.index
    assert worker._ports[7] == second.index, "its events still find it"
    worker.drop(second)
    assert worker.attached() == [third] and worker._ports[7] == -1


class Thread:
    """A worker's, as the test says whether it runs."""

    alive = True

    def is_alive(self) -> bool:
        return self.alive

    def join(self) -> None: ...


def test_a_ring_that_is_not_detached(worker: Worker) -> None:
    """The time is over, or the worker has ended with what was under way: it is not dropped as if it were."""
    thread: Any = Thread()
    worker._thread = thread
    ring, other = worker.new_ring("one", 7), worker.new_ring("other", 8)
    for handle in (ring, other):
        worker.attach(handle)
        handle.record["state"] = RING_ACTIVE
    assert not worker.detach(ring, timeout=0.01) and ring.record["state"] == RING_DETACHING
    worker.record["error"] = -5
    other.record["state"] = RING_DETACHED  # the last thing that the worker did
    thread.alive = False
    with pytest.raises(LeftInUse, match="worker 0: io_uring: Input/output error"):
        worker.detach(ring)
    assert worker.detach(other) and worker.attached() == [ring] and worker._ports[7] == ring.index


def test_what_is_left_is_not_closed(worker: Worker) -> None:
    """Other threads may be at it until the process ends."""
    thread: Any = Thread()
    worker._thread = thread
    ring = worker.new_ring("one", 7)
    worker.attach(ring)
    ring.record["state"] = RING_ACTIVE
    closed: list[str] = []
    worker.events.close = lambda: closed.append("events")  # type: ignore[method-assign]
    worker.stop(left=True)
    worker.ring_doorbell()
    assert closed == []
    thread.alive = False
    with pytest.raises(LeftInUse, match="worker 0 has been stopped"):
        worker.detach(ring)


@pytest.mark.jit_only("there are no threads of ours")
def test_threads_that_do_not_end_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that never answers has one in each request: who stops the service waits once."""
    monkeypatch.setattr(pool, "JOIN_SECONDS", 1.5)
    workers = WorkerPool(PLATFORM, 3, software=True)
    never = threading.Event()
    for worker in workers.workers[:2]:
        assert worker.uring._pool is not None
        for _ in range(3):
            stuck = threading.Thread(target=never.wait, daemon=True)
            stuck.start()
            worker.uring._pool._threads.append(stuck)
    well = workers.workers[2].uring._pool
    assert well is not None and len(well._threads) > 1
    began = time.monotonic()
    workers.stop()
    assert 1.5 <= time.monotonic() - began < 3.0
    assert not any(thread.is_alive() for thread in well._threads), "told to end before others were waited for"
    never.set()

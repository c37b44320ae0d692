"""Rings that come and go: a handle whose ring was dropped does nothing to who has its place now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pvdrivers.platform import SEAM
from pvdrivers.worker.control import Worker
from pvdrivers.worker.records import RING_ACTIVE, RING_FREE


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Its loop does not run."""
    alert = os.eventfd(0)
    events = SimpleNamespace(source=lambda port: (-1, 0), close=lambda: None)
    platform: Any = SimpleNamespace(open_events=lambda: events, seam=lambda _: np.zeros(1, SEAM))
    made = Worker(platform, 0, alert, software=True)
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

"""A disk's ring is detached, and its place in the worker goes to another before the pages it kept are unmapped."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from blkback import attach
from blkback.backend import QueueState
from pvdrivers.worker.records import RING


@pytest.mark.parametrize("others", [0, 0xBAD], ids=["none", "a cache"])
def test_the_pages_of_the_disk_itself_are_unmapped(monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    rings, dropped = np.zeros(1, RING), []
    rings[0]["cache"], rings[0]["stats"] = 0xCAC4E, 0x57A75

    def detach(handle: Any) -> None:
        rings[0] = np.zeros((), RING)
        rings[0]["cache"] = others  # by who has the place now

    def drop_cache(wa: int, ra: int, not_used_since: int, ops: int, most: int) -> int:
        row = np.frombuffer(ctypes.string_at(ra, RING.itemsize), RING)[0]
        dropped.append((int(row["cache"]), int(row["stats"])))
        return 0

    monkeypatch.setattr(attach, "drop_cache", drop_cache)
    worker: Any = SimpleNamespace(address=1, detach=detach)
    handle: Any = SimpleNamespace(record=rings[0], address=int(rings.ctypes.data))
    state = QueueState(worker, handle=cast(Any, handle))
    attach.detach_queue(state)
    attach.drop_grants(state)
    assert dropped == [(0xCAC4E, 0x57A75)]

"""The kernels of the hot path alone, by pytest-benchmark: `make bench`. In the suite each runs once, untimed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blkback.records import BLK_REQ, DISK, SEGS_AT
from blkback.request import plan
from pvdrivers.worker.histogram import bucket_of
from pvdrivers.worker.persistent import ENTRY, PERSISTENT_CACHE, format_cache, insert, lookup, put_back
from rings import blkif
from rings.jit import kernel
from rings.ring import RING_END, advance, available, back_end, format_page, front_end, push_quiet, put, take

N = 1000
pytestmark = pytest.mark.jit_only("measures machine code")


@kernel
def ring_round_trips(front: int, back: int, message: int, out: int, n: int) -> int:
    """n requests, and as many responses, by both ends in one thread."""
    got = 0
    for _ in range(n):
        put(front, message)
        push_quiet(front)
        take(back, out, 112, 32)
        put(back, message)
        push_quiet(back)
        got += available(front)
        advance(front, 1)
    return got


@kernel
def plans(request: int, req: int, disk: int, n: int) -> int:
    """The same request planned n times."""
    total = 0
    for _ in range(n):
        total += plan(request, req, disk, req + SEGS_AT)
    return total


@kernel
def lookups(cache: int, grefs: int, n: int) -> int:
    """n hits in a cache of persistent grants."""
    total = 0
    for i in range(n):
        entry = lookup(cache, i % grefs, i)
        put_back(cache, entry)
        total += entry
    return total


@kernel
def buckets(n: int) -> int:
    """n latencies to their buckets."""
    total = 0
    for i in range(n):
        total += bucket_of(i * 977)
    return total


def test_ring_round_trip(benchmark: Any) -> None:
    page = np.zeros(4096 + 64, np.uint8)
    address = page.ctypes.data
    front, back = np.zeros(1, RING_END), np.zeros(1, RING_END)
    message = np.zeros(112, np.uint8)
    out = np.zeros(32 * 112, np.uint8)
    format_page(address)
    front_end(front.ctypes.data, address, 32, 112)
    back_end(back.ctypes.data, address, 32, 112)
    args = (front.ctypes.data, back.ctypes.data, message.ctypes.data, out.ctypes.data, N)
    assert benchmark(ring_round_trips, *args) == N


@pytest.mark.parametrize("segments", [1, 11])
def test_plan(benchmark: Any, segments: int) -> None:
    request = np.zeros(1, blkif.REQUEST_64)
    request["nr_segments"] = segments
    request["seg"]["last_sect"] = 7
    disk = np.zeros(1, DISK)
    disk["sectors"] = 1 << 20
    req = np.zeros(1, BLK_REQ)
    assert benchmark(plans, request.ctypes.data, req.ctypes.data, disk.ctypes.data, N) == N * segments


def test_persistent_lookup(benchmark: Any) -> None:
    bound, heads = 1024, 2048
    memory = np.zeros(heads * 4 + bound * ENTRY.itemsize, np.uint8)
    cache = np.zeros(1, PERSISTENT_CACHE)
    cache["heads"], cache["n_heads"] = memory.ctypes.data, heads
    cache["entries"], cache["bound"] = memory.ctypes.data + heads * 4, bound
    format_cache(cache.ctypes.data)
    for gref in range(352):
        insert(cache.ctypes.data, gref, 0, 0, 0)
    assert benchmark(lookups, cache.ctypes.data, 352, N) > 0


def test_histogram_bucket(benchmark: Any) -> None:
    assert benchmark(buckets, N) > 0

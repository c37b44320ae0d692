"""Buckets of latencies: every ns has one, in order; a percentile is never too low, and an eighth too high at most."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers.worker.histogram import bucket_floor, bucket_of, percentile
from pvdrivers.worker.records import HIST_BUCKETS
from rings.jit import kernel

TOP = bucket_floor(HIST_BUCKETS - 1)
times = st.one_of(
    st.integers(0, 64),
    st.integers(0, (1 << 63) - 1),
    st.builds(lambda bit, by: max(0, (1 << bit) + by), st.integers(0, 62), st.integers(-2, 2)),
)


@kernel
def bucket(ns: int) -> int:
    return bucket_of(ns)


@kernel
def count(times: np.ndarray, hist: np.ndarray) -> None:
    for ns in times:
        hist[bucket_of(ns)] += np.uint64(1)


@given(times)
def test_every_time_lies_in_its_bucket(ns: int) -> None:
    b = int(bucket(ns))
    assert 0 <= b < HIST_BUCKETS
    assert bucket_floor(b) <= ns
    if b < HIST_BUCKETS - 1:
        assert ns < bucket_floor(b + 1)
    else:
        assert ns >= TOP


def test_floors_are_the_edges() -> None:
    floors = [bucket_floor(b) for b in range(HIST_BUCKETS + 1)]
    assert floors[:10] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert floors == sorted(set(floors))
    for b in range(1, HIST_BUCKETS):
        assert (bucket(floors[b]), bucket(floors[b] - 1)) == (b, b - 1)
    for b in range(8, HIST_BUCKETS):
        assert floors[b + 1] * 8 <= floors[b] * 9
    assert 16e9 < TOP < 17e9


def test_a_clock_that_went_backwards_is_no_time() -> None:
    assert bucket(-5) == 0


@given(st.lists(st.integers(0, TOP - 1), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]))
def test_percentile_against_the_sorted_list(ns: list[int], fraction: float) -> None:
    hist = np.zeros(HIST_BUCKETS, np.uint64)
    count(np.array(ns, np.int64), hist)
    assert int(hist.sum()) == len(ns)
    true = sorted(ns)[max(1, math.ceil(len(ns) * fraction)) - 1]
    said = percentile(hist, fraction)
    assert true < said <= max(true + 1, true * 9 / 8 + 1)


def test_percentile_of_nothing_and_of_the_last_bucket() -> None:
    hist = np.zeros(HIST_BUCKETS, np.uint64)
    assert math.isnan(percentile(hist, 0.5))
    hist[HIST_BUCKETS - 1] = 3
    assert percentile(hist, 0.5) == bucket_floor(HIST_BUCKETS)

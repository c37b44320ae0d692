"""Latency histograms: eight buckets an octave, so a percentile is too high by an eighth at the most."""

from __future__ import annotations

from typing import Any

import numpy as np

from rings.jit import inline

from .records import HIST_BUCKETS

SUB_BITS = 3


@inline
def bucket_of(ns: int) -> int:
    """The bucket of a latency in ns: exact below 8, then eight to an octave, the last for all above 2**34."""
    if ns < 8:
        return ns if ns > 0 else 0
    v = ns
    msb = 0
    if v >> 32:
        v >>= 32
        msb += 32
    if v >> 16:
        v >>= 16
        msb += 16
    if v >> 8:
        v >>= 8
        msb += 8
    if v >> 4:
        v >>= 4
        msb += 4
    if v >> 2:
        v >>= 2
        msb += 2
    if v >> 1:
        msb += 1
    b = ((msb - SUB_BITS + 1) << SUB_BITS) + ((ns >> (msb - SUB_BITS)) & 7)
    return b if b < HIST_BUCKETS else HIST_BUCKETS - 1


def bucket_floor(bucket: int) -> int:
    """The least ns of a bucket."""
    if bucket < 8:
        return bucket
    return (8 + (bucket & 7)) << ((bucket >> SUB_BITS) - 1)


def percentile(hist: Any, fraction: float) -> float:
    """ns below which `fraction` of the counts lie (upper edge of the bucket); nan if there are none."""
    counts = np.asarray(hist, dtype=np.uint64)
    total = int(counts.sum())
    if not total:
        return float("nan")
    bucket = int(np.searchsorted(np.cumsum(counts), max(1, int(np.ceil(total * fraction)))))
    return float(bucket_floor(bucket + 1))

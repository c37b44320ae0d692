"""The machine's own limit for a network that copies: memcpy over the same working set, and nothing else."""

from __future__ import annotations

from pvdrivers.syscalls import clock_monotonic
from rings.atomics import copy_bytes, i64
from rings.jit import kernel


@kernel
def copy_chunks(dst: int, src: int, chunk: int, stride: int, count: int, until: int) -> int:
    """Copy `chunk` bytes from each of `count` places to its twin, `stride` bytes apart, round and round until
    CLOCK_MONOTONIC is `until` ns; how many were copied."""
    done = i64(0)
    k = i64(0)
    while clock_monotonic() < until:
        copy_bytes(dst + k * stride, src + k * stride, chunk)
        k = k + 1 if k + 1 < count else i64(0)
        done += 1
    return done

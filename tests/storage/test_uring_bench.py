"""How long the kernels take: `make bench`."""

from __future__ import annotations

from typing import Any

import pytest

from pvdrivers.storage import uring
from pvdrivers.storage.uring import IORING_OP_READ, Uring, advance, queue_nop, queue_rw, wait
from rings.jit import kernel

from .driver import Memory

COUNT = 10_000
DEPTH = 32


@kernel
def nops(u: int, count: int, depth: int) -> int:
    """Submit and reap `count` requests that do nothing. How many failed to be queued."""
    sent, done, bad = 0, 0, 0
    while done < count:
        while sent < count and sent - done < depth:
            if queue_nop(u, sent) != 0:
                bad += 1
            sent += 1
        n = wait(u, -1)
        if n > 0:
            advance(u, n)
            done += n
    return bad


@kernel
def reads(u: int, fd: int, memory: int, size: int, count: int, depth: int) -> int:
    """Read 4 KiB blocks in order, around the file. How many failed to be queued."""
    sent, done, bad = 0, 0, 0
    while done < count:
        while sent < count and sent - done < depth:
            at = memory + sent % depth * 4096
            if queue_rw(u, IORING_OP_READ, fd, at, 4096, sent * 4096 % size, sent) != 0:
                bad += 1
            sent += 1
        n = wait(u, -1)
        if n > 0:
            advance(u, n)
            done += n
    return bad


@pytest.mark.jit_only("it measures machine code")
@pytest.mark.parametrize("chunk", [4, 32])
def test_requests_that_do_nothing(benchmark: Any, flavour: str, chunk: int) -> None:
    with Uring(chunk=chunk, software=flavour != "io_uring", threads=4 if flavour == "threads" else 0) as ring:
        uring.enable(ring.address)
        assert benchmark(nops, ring.address, COUNT, DEPTH) == 0


@pytest.mark.jit_only("it measures machine code")
def test_reads_of_the_page_cache(benchmark: Any, ring: Uring, fd: int) -> None:
    memory = Memory(DEPTH * 4096)
    assert benchmark(reads, ring.address, fd, memory.address, 1 << 20, COUNT, DEPTH) == 0

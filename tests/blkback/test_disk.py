"""A request on a real file by io_uring, or what stands in for it: many pieces, and a file that ends too early."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from blkback import disk
from blkback.records import BLK_REQ, DISK, K_READ, K_WRITE
from pvdrivers.iovec import IOVEC
from pvdrivers.storage.constants import STORE_FILE
from pvdrivers.storage.uring import advance, cqe, enable, peek, queue_nop, queue_poll, reap, wait
from pvdrivers.storage.uring_layout import CQE
from pvdrivers.storage.uring_setup import Uring
from pvdrivers.worker.control import Memory
from pvdrivers.worker.records import REQ, RING, RING_ACTIVE, WORKER
from rings.atomics import records
from rings.jit import kernel

EIO = 5
pytestmark = pytest.mark.jit_only("io_uring is driven by compiled code")


@kernel
def first_result(u: int) -> int:
    """The result of the first completion, which is given back."""
    res = records(cqe(u, 0), 1, CQE)[0]["res"]
    advance(u, 1)
    return res


@kernel
def first_of_many(u: int, ra: int, slow_fd: int) -> int:
    """A visit with many I/Os for a disk that does nothing: the chunk they go in."""
    chunk = disk.set_chunk(u, ra)
    if chunk < disk.DEEP_CHUNK:
        if slow_fd >= 0:
            queue_poll(u, slow_fd, 1)
        else:
            queue_nop(u, 1)
        disk.submit_first(u, ra)
        reap(u)
        advance(u, peek(u))
    return chunk


class Bench:
    """One request of `pieces` pieces of 512 bytes, each 512 bytes from the next."""

    def __init__(self, uring: Uring, fd: int, kind: int, pieces: int, sector: int) -> None:
        self.uring = uring
        self.worker, self.ring, self.disk = np.zeros(1, WORKER), np.zeros(1, RING), np.zeros(1, DISK)
        self.worker[0]["uring"] = uring.address
        self.ring[0]["worker"], self.ring[0]["state"] = self.worker.ctypes.data, RING_ACTIVE
        self.disk[0]["store"], self.disk[0]["fd"] = STORE_FILE, fd
        self.memory = Memory(pieces * 1024)
        self.data = self.memory.bytes.reshape(pieces, 1024)
        self.iov = np.zeros(pieces, IOVEC)
        self.iov["base"] = self.memory.address + np.arange(pieces) * 1024
        self.iov["length"] = 512
        self.req = np.zeros(1, BLK_REQ)
        self.head = self.req["head"].view(REQ)[0, 0] if self.req["head"].ndim == 2 else self.req["head"].view(REQ)[0]
        self.head["ring"], self.head["nseg"] = self.ring.ctypes.data, pieces
        self.head["iov"], self.head["n_iov"], self.head["nbytes"] = self.iov.ctypes.data, pieces, pieces * 512
        self.req[0]["kind"], self.req[0]["sector"], self.req[0]["nr_sectors"] = kind, sector, pieces

    def run(self) -> int:
        """The outcome, and how many I/Os it took in self.ios."""
        where = (self.worker.ctypes.data, self.req.ctypes.data, self.disk.ctypes.data)
        disk.start(*where)
        self.ios = 0
        while True:
            while reap(self.uring.address) == 0:
                wait(self.uring.address, 1_000_000_000)
            self.ios += 1
            self.head["res"] = first_result(self.uring.address)
            if disk.advance(*where) == disk.DONE:
                return int(self.head["res"])


@pytest.fixture(params=[False, True], ids=["io_uring", "threads"])
def uring(request: pytest.FixtureRequest) -> Uring:
    opened = Uring.open(64, 256, software=request.param or None)
    enable(opened.address)
    request.addfinalizer(opened.close)
    return opened


def test_more_pieces_than_a_call_may_have(uring: Uring, tmp_path: Path) -> None:
    """IOV_MAX is 1024, an indirect request may have 4096 segments."""
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 22)
    content = np.random.default_rng(7).integers(0, 256, (4096, 512), np.uint8)
    write = Bench(uring, fd, K_WRITE, 4096, 8)
    write.data[:, :512] = content
    assert write.run() == 0 and write.ios == 4
    assert (tmp_path / "image").read_bytes()[4096 : 4096 + 4096 * 512] == content.tobytes()
    read = Bench(uring, fd, K_READ, 4096, 8)
    assert read.run() == 0 and read.ios == 4
    assert (read.data[:, :512] == content).all() and not read.data[:, 512:].any()
    os.close(fd)


def test_a_file_that_was_truncated(uring: Uring, tmp_path: Path) -> None:
    """What is there is read, what is not is an error, and nobody asks for ever."""
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x" * 1000)
    read = Bench(uring, fd, K_READ, 4, 0)
    assert read.run() == -EIO
    assert bytes(read.data[1][:488]) == b"x" * 488
    os.close(fd)


def test_a_store_that_is_done_at_once_is_given_all(tmp_path: Path) -> None:
    """A call for every fourth I/O is for disks that could run dry; the others are asked again now and then."""
    uring = Uring.open(256, 256)
    if uring.kind != "io_uring":
        pytest.skip(uring.reason)
    enable(uring.address)
    ring, device = np.zeros(1, RING), np.zeros(1, DISK)
    ring[0]["device"], device[0]["chunk"] = device.ctypes.data, 4
    never = os.eventfd(0)
    try:
        chunks = [first_of_many(uring.address, ring.ctypes.data, -1) for _ in range(300)]
        assert chunks[: disk.QUICK] == [4] * disk.QUICK
        assert 1 <= chunks[disk.QUICK :].count(4) <= 300 // disk.PROBE
        chunks = [first_of_many(uring.address, ring.ctypes.data, never) for _ in range(3 * disk.PROBE)]
        assert chunks[-disk.PROBE :] == [4] * disk.PROBE
    finally:
        uring.close()
        os.close(never)

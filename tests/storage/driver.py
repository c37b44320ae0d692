"""What the tests of rings share: memory at known addresses, and one request at a time."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
from typing import Any, NamedTuple

from pvdrivers.storage import uring
from pvdrivers.storage.software_pool import address
from pvdrivers.storage.uring import Uring

NEVER = -1
SECOND = 1_000_000_000

FLAVOURS = {
    "io_uring": {},
    "threads": {"software": True},
    "no-threads": {"software": True, "threads": 0},
}
"""One suite for all: the kernel's ring, the software ring, and the software ring that works where it is asked."""


class Completion(NamedTuple):
    user_data: int
    res: int
    flags: int


class Memory:
    """Zeroed pages: `bytes`, and where they are."""

    def __init__(self, size: int) -> None:
        self.bytes = mmap.mmap(-1, size)
        self.address = address(self.bytes)

    def iovecs(self, at: int, pieces: list[tuple[int, int]]) -> int:
        """Write struct iovecs for (offset, length) in this memory to offset `at`; their address."""
        for k, (offset, length) in enumerate(pieces):
            struct.pack_into("QQ", self.bytes, at + 16 * k, self.address + offset, length)
        return self.address + at


def wait(u: int, timeout_ns: int) -> int:
    """uring.wait, again if something else than a signal of ours ended it: a ring closed before does that."""
    n = -errno.EINTR
    for _ in range(10):
        if n != -errno.EINTR:
            break
        n = uring.wait(u, timeout_ns)
    return n


def take_all(u: int) -> list[Completion]:
    """Read and give back all completions that are ready."""
    n = uring.peek(u)
    out = []
    for k in range(n):
        raw = ctypes.string_at(uring.cqe(u, k), 16)
        out.append(Completion(*struct.unpack("=qiI", raw)))
    uring.advance(u, n)
    return out


def take(u: int, count: int) -> list[Completion]:
    """Wait for `count` completions, for ten seconds at most; in the order in which they came."""
    out: list[Completion] = []
    for _ in range(10_000):
        if len(out) >= count:
            break
        n = wait(u, 10 * SECOND)
        assert n >= 0, n
        out += take_all(u)
    assert len(out) == count, out
    return out


def result(u: int, queued: int) -> int:
    """The result of the one request that was just queued (`queued`: what queue_* returned)."""
    assert queued == 0
    (completion,) = take(u, 1)
    return completion.res


def open_ring(flavour: str, **options: Any) -> Uring:
    """A ring of that flavour, enabled for this thread. Skips where the host refuses it."""
    ring = Uring(**{**FLAVOURS[flavour], **options})
    assert uring.enable(ring.address) == 0
    return ring

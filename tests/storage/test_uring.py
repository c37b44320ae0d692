"""The kernels of storage.uring, the same for the kernel's ring and for the software ring."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvdrivers.storage import uring, uring_setup
from pvdrivers.storage.constants import PUNCH_HOLE
from pvdrivers.storage.uring import (
    IORING_CQE_F_MORE,
    IORING_OP_READ,
    IORING_OP_READV,
    IORING_OP_WRITE,
    IORING_OP_WRITEV,
    Uring,
)
from pvdrivers.syscalls import NR_IO_URING_REGISTER

from .driver import NEVER, SECOND, Memory, open_ring, result, take, take_all, wait

UNIT = 512
SIZE = 1 << 16

Operation = tuple[str, int, list[tuple[int, int]]]

piece = st.tuples(st.integers(0, 15), st.integers(1, 8)).map(lambda p: (p[0] * UNIT, p[1] * UNIT))
operation = st.tuples(
    st.sampled_from(["read", "write", "readv", "writev", "fsync", "hole"]),
    st.integers(0, SIZE // UNIT + 4).map(lambda n: n * UNIT),
    st.lists(piece, min_size=1, max_size=4),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(operation, max_size=12), st.integers(0, 1 << 32))
def test_like_naive_reads_and_writes(ring: Uring, tmp_path: Path, ops: list[Operation], seed: int) -> None:
    """Any sequence of requests leaves the bytes that pread and pwrite on a copy leave, and returns what they do."""
    u, mem, random = ring.address, Memory(1 << 16), Random(seed)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(random.randbytes(SIZE) if path is paths[0] else paths[0].read_bytes())
    ours, naive = (os.open(path, os.O_RDWR) for path in paths)
    try:
        for kind, offset, pieces in ops:
            first, length = pieces[0]
            if kind == "read":
                n = result(u, uring.queue_rw(u, IORING_OP_READ, ours, mem.address + first, length, offset, 1))
                assert mem.bytes[first : first + n] == os.pread(naive, length, offset)
            elif kind == "write":
                data = random.randbytes(length)
                mem.bytes[first : first + length] = data
                n = result(u, uring.queue_rw(u, IORING_OP_WRITE, ours, mem.address + first, length, offset, 1))
                assert n == os.pwrite(naive, data, offset)
            elif kind == "readv":
                iov = mem.iovecs(32768, pieces)
                n = result(u, uring.queue_rw(u, IORING_OP_READV, ours, iov, len(pieces), offset, 1))
                buffers = [bytearray(mem.bytes[a : a + n]) for a, n in pieces]
                assert n == os.preadv(naive, buffers, offset)
            elif kind == "writev":
                mem.bytes[:8192] = random.randbytes(8192)
                iov = mem.iovecs(32768, pieces)
                n = result(u, uring.queue_rw(u, IORING_OP_WRITEV, ours, iov, len(pieces), offset, 1))
                assert n == os.pwritev(naive, [mem.bytes[a : a + n] for a, n in pieces], offset)
            elif kind == "fsync":
                assert result(u, uring.queue_fsync(u, ours, offset & 1, 1)) == 0
            else:
                assert result(u, uring.queue_fallocate(u, ours, PUNCH_HOLE, offset, length, 1)) == 0
                inside = max(0, min(length, os.fstat(naive).st_size - offset))
                os.pwrite(naive, bytes(inside), offset)
        assert paths[0].read_bytes() == paths[1].read_bytes()
    finally:
        os.close(ours)
        os.close(naive)


def test_many_reads_under_way_at_once(ring: Uring, fd: int) -> None:
    u, mem = ring.address, Memory(2048 * UNIT)
    got: dict[int, int] = {}
    for n in range(2048):
        status = uring.queue_rw(u, IORING_OP_READ, fd, mem.address + n * UNIT, UNIT, n * UNIT, n)
        assert status == 0
        if n % 100 == 0:
            uring.reap(u)
            got |= {c.user_data: c.res for c in take_all(u)}
    got |= {c.user_data: c.res for c in take(u, 2048 - len(got))}
    assert got == dict.fromkeys(range(2048), UNIT)
    assert mem.bytes[:] == os.pread(fd, 2048 * UNIT, 0)


def test_reads_at_the_end_are_short(ring: Uring, fd: int) -> None:
    u, mem, size = ring.address, Memory(4096), os.fstat(fd).st_size
    assert result(u, uring.queue_rw(u, IORING_OP_READ, fd, mem.address, 4096, size - 512, 1)) == 512
    assert result(u, uring.queue_rw(u, IORING_OP_READ, fd, mem.address, 4096, size, 1)) == 0
    os.ftruncate(fd, size - 512)
    assert result(u, uring.queue_rw(u, IORING_OP_READ, fd, mem.address, 512, size - 512, 1)) == 0


def test_one_fails_the_rest_go_on(ring: Uring, fd: int) -> None:
    """EIO, ENOSPC, EBADF, EFAULT and an opcode that there is not, among good ones."""
    u, mem = ring.address, Memory(4096)
    full, memory_of_ours = os.open("/dev/full", os.O_RDWR), os.open("/proc/self/mem", os.O_RDONLY)
    closed = os.dup(fd)
    os.close(closed)
    try:
        cases = [
            (IORING_OP_WRITE, full, mem.address, -errno.ENOSPC),
            (IORING_OP_READ, memory_of_ours, mem.address, -errno.EIO),
            (IORING_OP_READ, closed, mem.address, -errno.EBADF),
            (IORING_OP_READ, fd, 4096, -errno.EFAULT),
            (77, fd, mem.address, -errno.EINVAL),
        ]
        for n, (opcode, where, at, _) in enumerate(cases):
            assert uring.queue_rw(u, opcode, where, at, 512, 0, n) == 0
            assert uring.queue_rw(u, IORING_OP_READ, fd, mem.address, 512, 0, 100 + n) == 0
        got = {c.user_data: c.res for c in take(u, 2 * len(cases))}
    finally:
        os.close(full)
        os.close(memory_of_ours)
    assert got == {n: c[3] for n, c in enumerate(cases)} | {100 + n: 512 for n in range(len(cases))}


def test_chunks(flavour: str) -> None:
    """Nothing is submitted before more than a chunk is there, or somebody asks."""
    with open_ring(flavour, chunk=4, entries=16) as ring:
        u = ring.address
        room = uring.sqe_room(u)
        assert room >= 16
        for n in range(4):
            uring.queue_nop(u, n)
        assert ring.enters == 0 and uring.peek(u) == 0
        uring.queue_nop(u, 4)
        assert ring.enters == 1 and uring.sqe_room(u) >= 11
        assert sorted(c.user_data for c in take(u, 5)) == [0, 1, 2, 3, 4]
        assert uring.sqe_room(u) == room
        enters = ring.enters
        if flavour == "io_uring":
            assert uring.reap(u) == 0 and ring.enters == enters, "a reap with nothing to do enters the kernel"
        uring.queue_nop(u, 9)
        uring.submit(u)
        assert take(u, 1)[0].user_data == 9


def test_more_may_wait_than_four_a_processor() -> None:
    """The thread that submits has the limit, as the kernel tells it; 0 changes nothing."""
    with open_ring("io_uring") as ring:
        uring.queue_nop(ring.address, 1)
        take(ring.address, 1)
        counts = bytearray(8)
        uring_setup._syscall(NR_IO_URING_REGISTER, ring._fd, 19, uring_setup.address(counts), 2)
        assert int.from_bytes(counts[:4], sys.byteorder) == uring_setup.MOST_WAITING


def test_a_full_submission_queue_submits_itself(flavour: str) -> None:
    with open_ring(flavour, chunk=1000, entries=8) as ring:
        u = ring.address
        for n in range(20):
            assert uring.queue_nop(u, n) == 0
        assert sorted(c.user_data for c in take(u, 20)) == list(range(20))


def test_more_completions_than_room(flavour: str) -> None:
    """None is lost when the completion queue overflows."""
    with open_ring(flavour, chunk=8, entries=8, cq_entries=16) as ring:
        u, count = ring.address, 300
        seen: list[int] = []
        for n in range(count):
            while uring.queue_nop(u, n) != 0:
                uring.reap(u)
                seen += [c.user_data for c in take_all(u)]
        seen += [c.user_data for c in take(u, count - len(seen))]
        assert sorted(seen) == list(range(count))


def test_wait_comes_back_in_time(ring: Uring) -> None:
    start = time.monotonic()
    assert wait(ring.address, 50_000_000) == 0
    assert 0.045 < time.monotonic() - start < 5
    assert wait(ring.address, 0) == 0


def test_wait_comes_back_on_a_signal(ring: Uring) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: got.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        while not got and time.monotonic() < start + 5:
            assert uring.wait(ring.address, 10 * SECOND) == -errno.EINTR
        assert got == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_each_write_of_an_eventfd_is_an_edge(ring: Uring, event: int) -> None:
    """An eventfd is never read, and still every later write is reported; so is what came before the poll."""
    u = ring.address
    os.eventfd_write(event, 1)
    assert uring.queue_poll(u, event, 7) == 0
    for _ in range(5):
        (c,) = take(u, 1)
        assert c.user_data == 7 and c.res & 1 and c.flags & IORING_CQE_F_MORE
        assert wait(u, 20_000_000) == 0, "reported without a write"
        os.eventfd_write(event, 1)
    take(u, 1)


def test_what_is_left_unread_is_reported_again(ring: Uring) -> None:
    """Even if nothing new has come: /dev/xen/evtchn wakes for the first port only, and others come while it is read."""
    fd = os.eventfd(2, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
    try:
        u = ring.address
        assert uring.queue_poll_unread(u, fd, 7) == 0
        for _ in range(2):
            (c,) = take(u, 1)
            assert c.user_data == 7 and c.res & 1
            if c.flags & IORING_CQE_F_MORE == 0:
                uring.queue_poll_unread(u, fd, 7)
            assert os.eventfd_read(fd) == 1
        assert wait(u, 20_000_000) == 0, "nothing is left"
        os.eventfd_write(fd, 1)
        take(u, 1)
    finally:
        os.close(fd)


def test_polls_are_seen_while_other_work_completes(ring: Uring, event: int) -> None:
    u = ring.address
    uring.queue_poll(u, event, -2)
    uring.submit(u)
    os.eventfd_write(event, 1)
    seen = 0
    for n in range(1000):
        uring.queue_nop(u, n)
        wait(u, SECOND)
        seen += sum(c.user_data == -2 for c in take_all(u))
    assert seen == 1


def test_end_of_a_poll(ring: Uring, event: int) -> None:
    u = ring.address
    uring.queue_poll(u, event, 7)
    uring.queue_poll_remove(u, event, 7, 8)
    got = {c.user_data: (c.res, c.flags & IORING_CQE_F_MORE) for c in take(u, 2)}
    assert got == {7: (-errno.ECANCELED, 0), 8: (0, 0)}
    os.eventfd_write(event, 1)
    assert wait(u, 20_000_000) == 0
    assert result(u, uring.queue_poll_remove(u, event, 7, 9)) == -errno.ENOENT
    assert result(u, uring.queue_poll(u, 9999, 7)) == -errno.EBADF


@pytest.mark.jit_only("a thread that waits in plain Python holds up nothing, and proves nothing")
def test_a_write_wakes_a_thread_that_waits_for_ever(flavour: str, event: int) -> None:
    """Made here, used there, as a worker does it."""
    ring = Uring(**({} if flavour == "io_uring" else {"software": True}))  # type: ignore[arg-type]
    got: list[int] = []

    def work() -> None:
        assert uring.enable(ring.address) == 0
        uring.queue_poll(ring.address, event, 7)
        while len(got) < 100:
            assert uring.wait(ring.address, NEVER) >= 0
            got.extend(c.user_data for c in take_all(ring.address))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while thread.is_alive() and time.monotonic() < deadline:
        seen = len(got)
        os.eventfd_write(event, 1)
        while len(got) == seen and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0)
    thread.join(1)
    ring.close()
    assert got[:100] == [7] * 100


def test_no_wake_up_is_missed(ring: Uring) -> None:
    """Bursts of every small size, each waited for: a lost wake-up would be a wait of five seconds."""
    u = ring.address
    for burst in range(2000):
        for n in range(1 + burst % 5):
            assert uring.queue_nop(u, n) == 0
        got = 0
        while got < 1 + burst % 5:
            start = time.monotonic()
            # The software ring may give a false alarm; what must not be is a wait to the end.
            assert wait(u, 5 * SECOND) >= 0 and time.monotonic() - start < 4
            got += len(take_all(u))


@pytest.mark.jit_only("there are no threads")
def test_closing_with_completions_that_nobody_takes() -> None:
    """The threads stand before a full queue then, and must still end."""
    ring = open_ring("threads", entries=8, cq_entries=64, chunk=1)
    for n in range(60):
        uring.queue_nop(ring.address, n)
    time.sleep(0.05)
    start = time.monotonic()
    ring.close()
    assert time.monotonic() - start < 5


def test_only_one_thread_enables(flavour: str) -> None:
    with open_ring(flavour) as ring:
        assert uring.enable(ring.address) == (-errno.EBADFD if flavour == "io_uring" else 0)


@pytest.mark.root
def test_a_full_file_system(ring: Uring, tmp_path: Path) -> None:
    from .host import tmpfs

    with tmpfs(tmp_path / "small", "1M") as where:
        fd = os.open(where / "f", os.O_RDWR | os.O_CREAT)
        try:
            u, mem = ring.address, Memory(1 << 19)
            results = [
                result(u, uring.queue_rw(u, IORING_OP_WRITE, fd, mem.address, 1 << 19, n << 19, n)) for n in range(4)
            ]
            assert results == [1 << 19, 1 << 19, -errno.ENOSPC, -errno.ENOSPC]
            assert result(u, uring.queue_rw(u, IORING_OP_READ, fd, mem.address, 4096, 0, 1)) == 4096
        finally:
            os.close(fd)

"""The window of gntdev's mappings at vm.max_map_count: of the real kernel, with a file in the place of grants.

As in test_gntdev, what needs a gntdev runs with the JIT off, in a process of its own if need be.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from pvdrivers import syscalls, windows
from pvdrivers.invoke import invoke
from pvdrivers.platform import GRANT_OP, PAGE_SIZE, GNTST_no_space, GNTST_okay
from pvdrivers.syscalls import EINVAL, ENOMEM
from pvdrivers.xen import devices, grant_map, grant_seam, grant_window, grants
from pvdrivers.xen.grant_window import (
    GRANT_CTX,
    HANDLE_TAG,
    SLOT_FREE,
    SLOT_HOLE,
    SLOT_LOST,
    SLOT_MAPPED,
    SLOT_TAKEN,
    TAG_SHIFT,
)
from pvdrivers.xen.limits import MAX_MAP_COUNT
from rings.atomics import records
from rings.jit import JIT
from tests.platform.conftest import passes_with_the_jit_off

PAGES, MOST = 1 << 10, 512
LIMIT = int(Path(MAX_MAP_COUNT).read_text())
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

needs_no_jit = pytest.mark.skipif(JIT, reason="in a process of its own, by test_with_the_jit_off")
needs_a_limit = pytest.mark.skipif(LIMIT > 1 << 18, reason=f"so many mappings take long: vm.max_map_count is {LIMIT}")


@pytest.mark.skipif(not JIT, reason="this is that process")
def test_with_the_jit_off() -> None:
    passes_with_the_jit_off(__file__)


@contextmanager
def no_more_mappings(beyond: bool) -> Iterator[None]:
    """This process has as many mappings as it may have, or, `beyond`, the one more that Linux lets it have."""
    at = windows.reserve((LIMIT + 2) * PAGE_SIZE)
    rest: list[int] = []
    try:
        page = 1
        while page < LIMIT and _LIBC.mprotect(at + page * PAGE_SIZE, PAGE_SIZE, mmap.PROT_READ) == 0:
            page += 2
        while not rest or rest[-1] != windows._FAILED:
            prot = (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE)[len(rest) % 2]  # or they would become one
            rest.append(windows._LIBC.mmap(None, PAGE_SIZE, prot, FLAGS, -1, 0))
        rest.pop()
        if not beyond:
            windows.unmap(rest.pop(), PAGE_SIZE)
        yield
    finally:
        windows.unmap(at, (LIMIT + 2) * PAGE_SIZE)
        for at in rest:
            windows.unmap(at, PAGE_SIZE)


class Window:
    """A context whose window is there, and a file in the place of gntdev."""

    def __init__(self) -> None:
        self.file = os.memfd_create("gntdev")
        os.ftruncate(self.file, PAGES * PAGE_SIZE)
        self.window = windows.reserve(PAGES * PAGE_SIZE)
        self.state = np.zeros(PAGES, np.uint32)
        self._rest = [np.zeros(MOST * 24 + 64, np.uint8), np.zeros(MOST, np.int32), np.zeros(8, np.int64)]
        self.ctx = np.zeros(1, GRANT_CTX)
        for name, array in zip(("state", "request", "order", "small"), (self.state, *self._rest)):
            self.ctx[0][name] = array.ctypes.data
        self.ctx[0]["fd"], self.ctx[0]["window"] = self.file, self.window
        self.ctx[0]["pages"], self.ctx[0]["most"] = PAGES, MOST
        self.address = int(self.ctx.ctypes.data)

    def put(self, slot: int, pages: int) -> np.ndarray:
        """A mapping of so many pages, as if it had been made by map_refs; a GRANT_OP for each of them."""
        at = self.window + slot * PAGE_SIZE
        assert windows.map_file(self.file, pages * PAGE_SIZE, windows.READ_WRITE, at=at) == at
        self.state[slot : slot + pages] = SLOT_MAPPED
        ops = np.zeros(pages, GRANT_OP)
        ops["handle"] = HANDLE_TAG << TAG_SHIFT | slot + np.arange(pages)
        return ops

    def unmap(self, ops: np.ndarray) -> None:
        assert grant_unmap(self.address, ops.ctypes.data, len(ops)) == 0

    def map(self, pages: int) -> np.ndarray:
        ops = np.zeros(pages, GRANT_OP)
        grant_seam.grant_map(self.address, ops.ctypes.data, pages, 0)
        return ops

    def find(self, pages: int) -> int:
        return int(grant_window.find_run(self.address, pages))

    def free_within(self, passes: int) -> int:
        """How many slots are free when the window has been looked through so often."""
        for _ in range(passes):
            self.find(PAGES + 1)
        return int((self.state == SLOT_FREE).sum())

    def inodes(self) -> list[int]:
        """What is mapped in the window, a file's number a page: 0 for none."""
        found = [-1] * PAGES
        for line in Path("/proc/self/maps").read_text().splitlines():
            words = line.split()
            first, end = (int(x, 16) - self.window for x in words[0].split("-"))
            for slot in range(max(first // PAGE_SIZE, 0), min(end // PAGE_SIZE, PAGES)):
                found[slot] = int(words[4]) if words[1] != "---p" else 0
        return found

    def close(self) -> None:
        windows.unmap(self.window, PAGES * PAGE_SIZE)
        os.close(self.file)


grant_unmap = invoke(grant_seam.grant_unmap)


@pytest.fixture
def window() -> Iterator[Window]:
    window = Window()
    window.unmap(window.put(0, 1))  # compiled by now
    assert window.find(1) == 0
    yield window
    window.close()


@pytest.fixture
def mapper(window: Window, monkeypatch: pytest.MonkeyPatch) -> Window:
    """With grants to map: all are in order."""

    def ioctl(fd: int, request: int, at: int) -> int:
        if request == devices.IOCTL_GNTDEV_MAP_GRANT_REF:
            records(at, 1, devices.MAP_REQUEST)[0]["index"] = 0
        elif request == devices.IOCTL_GNTDEV_GRANT_COPY:
            head = records(at, 1, devices.COPY_REQUEST)[0]
            records(int(head["segments"]), int(head["count"]), devices.COPY_SEGMENT)["status"] = GNTST_okay
        return 0

    for module in (grant_window, grant_map, grant_seam):
        monkeypatch.setattr(module, "ioctl", ioctl)
    return window


@needs_a_limit
@needs_no_jit
@pytest.mark.parametrize("beyond", [False, True])
def test_no_slot_is_lost_when_nothing_more_can_be_mapped(mapper: Window, beyond: bool) -> None:
    """Linux refuses before it takes anything away."""
    with no_more_mappings(beyond):
        full = [mapper.map(256) for _ in range(3)]
    # Not all three: one or two mappings are left, or the interpreter gives them back.
    assert any((ops["status"] == GNTST_no_space).sum() > 200 for ops in full)
    for ops in full:
        mapper.unmap(ops[ops["status"] == GNTST_okay])
    assert not mapper.state.any() and not any(mapper.inodes())
    assert all((mapper.map(512)["status"] == GNTST_okay).all() for _ in range(2))
    assert all(mapper.inodes())


@needs_a_limit
@pytest.mark.parametrize("beyond", [False, True])
def test_what_is_a_mapping_of_its_own_is_unmapped_whatever_the_limit(window: Window, beyond: bool) -> None:
    single = [window.put(slot, 1) for slot in range(100, 108)]
    run = window.put(200, 256)
    with no_more_mappings(beyond):
        for ops in (*single, run):
            window.unmap(ops)
    assert not any(inode > 0 for inode in window.inodes())
    assert not (window.state == SLOT_LOST).any()
    assert window.free_within(1) == PAGES and not any(window.inodes())


@needs_a_limit
def test_a_part_of_a_mapping_is_unmapped_when_there_is_room_again(window: Window) -> None:
    parts = window.put(0, 256)[1::2]
    with no_more_mappings(beyond=True):
        for i in range(len(parts)):
            window.unmap(parts[i : i + 1])
        assert window.find(PAGES) == -1
    lost = (window.state == SLOT_LOST).sum()
    assert lost > 100 and (window.state == SLOT_MAPPED).sum() == 128
    assert window.free_within(1) == PAGES - 128
    assert [inode > 0 for inode in window.inodes()[:256]] == [True, False] * 128


@contextmanager
def refuses(after: Callable[[int], None], result: int) -> Iterator[None]:
    """gntdev refuses a mapping, for which the reservation was taken away before; `after` that something happens."""

    def refused(at: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        if fd < 0:
            return int(syscalls.mmap(at, size, protection, flags, fd, offset))
        windows.unmap(int(at), int(size))
        after(int(at))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grant_window, "mmap", refused)
        yield


@needs_no_jit
@pytest.mark.parametrize("result", [-EINVAL, -ENOMEM])
def test_memory_of_somebody_else_in_the_hole_is_theirs(mapper: Window, result: int) -> None:
    theirs: list[int] = []

    def take(at: int) -> None:
        if not theirs:
            theirs.append(windows.zeros(2 * PAGE_SIZE, at=at + 7 * PAGE_SIZE))
            ctypes.memset(theirs[0], 0x5A, 2 * PAGE_SIZE)

    with refuses(take, result):
        assert mapper.find(17) == 1  # next fit: the first batch begins behind it
        mapper.map(16)
    slot = (theirs[0] - mapper.window) // PAGE_SIZE
    assert mapper.free_within(1) == PAGES - 2 and (mapper.state[slot : slot + 2] == SLOT_TAKEN).all()
    assert all(mapper.map(1)["status"][0] == GNTST_okay for _ in range(PAGES - 2))
    assert ctypes.string_at(theirs[0], 2 * PAGE_SIZE) == b"\x5a" * 2 * PAGE_SIZE


@needs_a_limit
@needs_no_jit
def test_a_hole_that_cannot_be_closed_is_closed_later(mapper: Window) -> None:
    """gntdev refuses, and there are no more mappings to be had at that very moment; then a page of it is taken."""
    with ExitStack() as stack:

        def fill(at: int) -> None:
            if not holes:
                holes.append(at)
                stack.enter_context(no_more_mappings(beyond=True))

        holes: list[int] = []
        with refuses(fill, -EINVAL):
            mapper.map(256)
    slot = (holes[0] - mapper.window) // PAGE_SIZE
    assert (mapper.state[slot : slot + 256] == SLOT_HOLE).sum() > 200
    theirs = windows.zeros(PAGE_SIZE, at=holes[0] + 9 * PAGE_SIZE)
    ctypes.memset(theirs, 0x5A, PAGE_SIZE)
    assert mapper.free_within(2) == PAGES - 1 and mapper.state[slot + 9] == SLOT_TAKEN
    assert all(mapper.map(1)["status"][0] == GNTST_okay for _ in range(PAGES - 1))
    assert ctypes.string_at(theirs, PAGE_SIZE) == b"\x5a" * PAGE_SIZE


def test_a_context_takes_nothing_of_somebody_else_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants, "open_device", lambda path: os.memfd_create("gntdev"))
    context = grants.Context(pages=16, whole=True)
    for slot, state in ((3, SLOT_TAKEN), (9, SLOT_HOLE)):
        windows.zeros(PAGE_SIZE, at=context._window + slot * PAGE_SIZE)
        context._state[slot] = state
    context.close()
    for slot in (3, 9):
        assert syscalls.is_mapped(context._window + slot * PAGE_SIZE, PAGE_SIZE)
        windows.unmap(context._window + slot * PAGE_SIZE, PAGE_SIZE)

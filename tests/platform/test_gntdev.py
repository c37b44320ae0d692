"""What gntdev is asked for a batch of maps, with a gntdev in Python that counts: of the compiled calls' plain twins.

On Xen the contract tests of the seam say that all this is what the real one does. A system call cannot be put in the
place of another in compiled code, so these run with the JIT off, in a process of their own if need be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pvdrivers.platform import (
    GRANT_OP,
    OP_KEEP,
    OP_READONLY,
    PAGE_SIZE,
    GNTST_bad_gntref,
    GNTST_no_space,
    GNTST_okay,
    GNTST_permission_denied,
)
from pvdrivers.syscalls import EINVAL
from pvdrivers.xen import devices, grant_map, grant_seam, grant_window
from pvdrivers.xen.grant_window import GRANT_CTX
from rings.atomics import records
from rings.jit import JIT

PAGES, MOST, WINDOW = 1 << 10, 512, 1 << 40
DOMID = 7
MAP, UNMAP, COPY = "map", "unmap", "copy"

needs_no_jit = pytest.mark.skipif(JIT, reason="in a process of its own, by test_with_the_jit_off")


@pytest.mark.skipif(not JIT, reason="this is that process")
def test_with_the_jit_off() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class Gntdev:
    """Grants 1 to 511 of one domain are in order, but for `bad` and `readonly` ones; `room` pages may be mapped."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bad: set[int] = set()
        self.readonly: set[int] = set()
        self.room = PAGES
        self.calls: Counter[str] = Counter()
        self.mappings: dict[int, list[int]] = {}  # the first page's slot -> grefs, 0 for one that is unmapped
        self._asked: dict[int, list[int]] = {}
        for module in (grant_window, grant_map, grant_seam):
            if hasattr(module, "ioctl"):
                patch.setattr(module, "ioctl", self.ioctl)
        patch.setattr(grant_window, "mmap", self.mmap)
        self.memory = [np.zeros(PAGES, np.uint32), np.zeros(MOST * 24 + 64, np.uint8), np.zeros(MOST, np.int32)]
        self.small, self.ctx = np.zeros(8, np.int64), np.zeros(1, GRANT_CTX)
        for name, array in zip(("state", "request", "order", "small"), (*self.memory, self.small)):
            self.ctx[0][name] = array.ctypes.data
        self.ctx[0]["window"], self.ctx[0]["pages"], self.ctx[0]["most"] = WINDOW, PAGES, MOST

    def mapped(self) -> list[int]:
        return sorted(gref for grefs in self.mappings.values() for gref in grefs if gref)

    def kernel_pages(self) -> int:
        """Those of a mapping stay until all of it is unmapped."""
        return sum(len(grefs) for grefs in self.mappings.values() if any(grefs))

    def ioctl(self, fd: int, request: int, at: int) -> int:
        if request == devices.IOCTL_GNTDEV_MAP_GRANT_REF:
            self.calls[MAP] += 1
            head = records(at, 1, devices.MAP_REQUEST)[0]
            refs = records(at + devices.MAP_REQUEST.itemsize, int(head["count"]), devices.MAP_REF)
            head["index"] = len(self._asked) * PAGE_SIZE
            self._asked[int(head["index"])] = [int(gref) for gref in refs["ref"]]
        elif request == devices.IOCTL_GNTDEV_GRANT_COPY:
            self.calls[COPY] += 1
            head = records(at, 1, devices.COPY_REQUEST)[0]
            for segment in records(int(head["segments"]), int(head["count"]), devices.COPY_SEGMENT):
                gref = int(segment["source"]) & 0xFFFFFFFF
                segment["status"] = GNTST_bad_gntref if gref in self.bad else GNTST_okay
        return 0

    def mmap(self, at: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        slot, n = (at - WINDOW) // PAGE_SIZE, size // PAGE_SIZE
        if fd < 0:
            for first, grefs in self.mappings.items():
                for k in range(len(grefs)):
                    if slot <= first + k < slot + n:
                        grefs[k] = 0
            return at
        grefs = self._asked[offset]
        refused = self.bad | (self.readonly if protection & 2 else set())
        if refused & set(grefs) or len(self.mapped()) + n > self.room:
            return -EINVAL
        assert slot not in self.mappings or not any(self.mappings[slot])
        self.mappings[slot] = list(grefs)
        return at

    def map(self, grefs: list[int], flags: int = 0) -> np.ndarray:
        """A batch: the operations, each with its status and its handle."""
        ops = np.zeros(len(grefs), GRANT_OP)
        ops["gref"], ops["domid"], ops["flags"] = grefs, DOMID, flags
        failed = grant_seam.grant_map(int(self.ctx.ctypes.data), ops.ctypes.data, len(ops), 0)
        assert failed == (ops["status"] != GNTST_okay).sum()
        held = {int(op["handle"]) & 0xFFFFFFFF: int(op["gref"]) for op in ops if op["status"] == GNTST_okay}
        there = {slot + k: gref for slot, grefs in self.mappings.items() for k, gref in enumerate(grefs) if gref}
        assert held.items() <= there.items()
        return ops

    def unmap(self, ops: np.ndarray) -> None:
        assert grant_seam.grant_unmap(int(self.ctx.ctypes.data), ops.ctypes.data, len(ops), 0) == 0


@pytest.fixture
def gntdev(monkeypatch: pytest.MonkeyPatch) -> Gntdev:
    return Gntdev(monkeypatch)


GREFS = list(range(1, 301))


@needs_no_jit
def test_a_batch_is_one_mapping(gntdev: Gntdev) -> None:
    assert (gntdev.map(GREFS)["status"] == GNTST_okay).all()
    assert gntdev.calls == {MAP: 1}


@needs_no_jit
@pytest.mark.parametrize("flags", [0, OP_KEEP, OP_READONLY])
def test_bad_ones_are_found_by_one_call(gntdev: Gntdev, flags: int) -> None:
    gntdev.bad = {7, 8, 100, 299}
    ops = gntdev.map(GREFS, flags)
    assert {int(op["gref"]) for op in ops if op["status"] == GNTST_bad_gntref} == gntdev.bad
    assert gntdev.mapped() == [gref for gref in GREFS if gref not in gntdev.bad]
    assert gntdev.calls[COPY] <= (3 if flags == OP_KEEP else 1)
    assert gntdev.calls[MAP] <= (len(GREFS) // grant_map.KEPT_TOGETHER + 4 if flags == OP_KEEP else 2)


@needs_no_jit
def test_all_bad(gntdev: Gntdev) -> None:
    gntdev.bad = set(GREFS)
    assert (gntdev.map(GREFS)["status"] == GNTST_bad_gntref).all()
    assert gntdev.calls == {MAP: 1, COPY: 1}


@needs_no_jit
@pytest.mark.parametrize(("readonly", "found"), [({3}, True), ({3, 150, 300}, True), (set(range(1, 301, 2)), False)])
def test_those_that_may_only_be_read_are_looked_for_but_not_for_ever(
    gntdev: Gntdev, readonly: set[int], found: bool
) -> None:
    gntdev.readonly = readonly
    ops = gntdev.map(GREFS)
    denied = {int(op["gref"]) for op in ops if op["status"] == GNTST_permission_denied}
    assert denied == readonly if found else denied > readonly
    assert gntdev.calls[MAP] <= grant_map.MOST_TRIES + 3
    assert len(gntdev.mapped()) == len(GREFS) - len(denied)


@needs_no_jit
def test_without_room_what_fits_is_mapped(gntdev: Gntdev) -> None:
    gntdev.room = 100
    gntdev.bad = {5}
    ops = gntdev.map(GREFS)
    assert (ops["status"][ops["gref"] == 5] == GNTST_bad_gntref).all()
    mapped = len(gntdev.mapped())
    assert 100 - grant_map.KEPT_TOGETHER < mapped <= 100
    assert (ops["status"] == GNTST_no_space).sum() == len(GREFS) - 1 - mapped
    assert gntdev.calls[MAP] < 15


@needs_no_jit
@pytest.mark.parametrize(("flags", "most"), [(OP_KEEP, 16), (0, 300)])
def test_pages_that_are_kept_go_without_many_others(gntdev: Gntdev, flags: int, most: int) -> None:
    """One page of a batch is still in use; those of the kernel that stay for its sake."""
    ops = gntdev.map(GREFS, flags)
    gntdev.unmap(ops[1:])
    assert gntdev.mapped() == [1]
    assert gntdev.kernel_pages() == most


"""What gntdev is asked for a batch of maps, with a gntdev in Python that counts: of the compiled calls' plain twins.

On Xen the contract tests of the seam say that all this is what the real one does. A system call cannot be put in the
place of another in compiled code, so these run with the JIT off, in a process of their own if need be.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pvdrivers.invoke import invoke
from pvdrivers.platform import (
    GRANT_OP,
    OP_READONLY,
    PAGE_SIZE,
    GNTST_bad_gntref,
    GNTST_general_error,
    GNTST_no_space,
    GNTST_okay,
    GNTST_permission_denied,
)
from pvdrivers.syscalls import EINVAL
from pvdrivers.xen import devices, grant_map, grant_seam, grant_window
from pvdrivers.xen.grant_window import GRANT_CTX, TOGETHER
from rings.atomics import records
from rings.jit import JIT
from tests.platform.conftest import passes_with_the_jit_off

PAGES, MOST, WINDOW = 1 << 10, 512, 1 << 40
DOMID, NEIGHBOUR = 7, 8
MAP, COPY = "map", "copy"

needs_no_jit = pytest.mark.skipif(JIT, reason="in a process of its own, by test_with_the_jit_off")


@pytest.mark.skipif(not JIT, reason="this is that process")
def test_with_the_jit_off() -> None:
    passes_with_the_jit_off(__file__)


@pytest.mark.skipif(not JIT, reason="of the compiled code")
def test_compiled_and_without_a_gntdev() -> None:
    """Nothing can be mapped, nothing can be asked: each page says so, and no memory is touched."""
    memory = [np.zeros(PAGES, np.uint32), np.zeros(MOST * 24 + 64, np.uint8), np.zeros(MOST, np.int32)]
    small, ctx = np.zeros(8, np.int64), np.zeros(1, GRANT_CTX)
    for name, array in zip(("state", "request", "order", "small"), (*memory, small)):
        ctx[0][name] = array.ctypes.data
    ctx[0]["fd"], ctx[0]["window"], ctx[0]["pages"], ctx[0]["most"] = -1, WINDOW, PAGES, MOST
    ops = np.zeros(300, GRANT_OP)
    ops["gref"], ops["domid"] = np.arange(300), DOMID
    assert invoke(grant_seam.grant_map)(int(ctx.ctypes.data), ops.ctypes.data, len(ops)) == 300
    assert (ops["status"] == GNTST_general_error).all() and (ops["handle"] == -1).all()
    assert not memory[0].any()


class Gntdev:
    """Every grant is in order, but for those of DOMID that are `bad` or `readonly`; `room` pages may be mapped."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bad: set[int] = set()
        self.readonly: set[int] = set()
        self.room = PAGES
        self.fails = 0  # so many mappings fail for no reason of theirs
        self.calls: Counter[str] = Counter()
        self.there: dict[int, tuple[int, int]] = {}
        """Slot -> domid and gref of what is mapped there."""
        self._asked: dict[int, list[tuple[int, int]]] = {}
        for module in (grant_window, grant_map, grant_seam):
            patch.setattr(module, "ioctl", self.ioctl)
        patch.setattr(grant_window, "mmap", self.mmap)
        self.memory = [np.zeros(PAGES, np.uint32), np.zeros(MOST * 24 + 64, np.uint8), np.zeros(MOST, np.int32)]
        self.small, self.ctx = np.zeros(8, np.int64), np.zeros(1, GRANT_CTX)
        for name, array in zip(("state", "request", "order", "small"), (*self.memory, self.small)):
            self.ctx[0][name] = array.ctypes.data
        self.ctx[0]["window"], self.ctx[0]["pages"], self.ctx[0]["most"] = WINDOW, PAGES, MOST

    def ioctl(self, fd: int, request: int, at: int) -> int:
        if request == devices.IOCTL_GNTDEV_MAP_GRANT_REF:
            self.calls[MAP] += 1
            head = records(at, 1, devices.MAP_REQUEST)[0]
            refs = records(at + devices.MAP_REQUEST.itemsize, int(head["count"]), devices.MAP_REF)
            assert len(refs) <= TOGETHER
            head["index"] = len(self._asked) * PAGE_SIZE
            self._asked[int(head["index"])] = [(int(ref["domid"]), int(ref["ref"])) for ref in refs]
        elif request == devices.IOCTL_GNTDEV_GRANT_COPY:
            self.calls[COPY] += 1
            head = records(at, 1, devices.COPY_REQUEST)[0]
            for segment in records(int(head["segments"]), int(head["count"]), devices.COPY_SEGMENT):
                assert segment["dest"] >= self.small.ctypes.data + 16 and segment["len"] == 1
                domid, gref = int(segment["source"]) >> 48, int(segment["source"]) & 0xFFFFFFFF
                segment["status"] = GNTST_bad_gntref if domid == DOMID and gref in self.bad else GNTST_okay
        return 0

    def mmap(self, at: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
        slots = range((at - WINDOW) // PAGE_SIZE, (at - WINDOW + size) // PAGE_SIZE)
        if fd < 0 or offset not in self._asked:
            for slot in slots:
                self.there.pop(slot, None)
            return at
        wanted = self._asked[offset]
        refused = self.bad | (self.readonly if protection & 2 else set())
        self.fails -= 1
        if self.fails >= 0 or {(DOMID, gref) for gref in refused} & set(wanted):
            return -EINVAL
        if len(self.there) + len(slots) > self.room:
            return -EINVAL
        assert len(slots) == len(wanted) and not self.there.keys() & set(slots)
        self.there.update(zip(slots, wanted))
        return at

    def map(self, grefs: list[int], flags: int = 0, neighbours: int = 0) -> np.ndarray:
        """A batch: the operations, each with its status and its handle; the first of each pair is a neighbour's."""
        ops = np.zeros(len(grefs), GRANT_OP)
        ops["gref"], ops["domid"], ops["flags"] = grefs, DOMID, flags
        ops["domid"][: 2 * neighbours : 2] = NEIGHBOUR
        failed = grant_seam.grant_map(int(self.ctx.ctypes.data), ops.ctypes.data, len(ops), 0)
        good = ops[ops["status"] == GNTST_okay]
        assert failed == len(ops) - len(good)
        held = {int(op["handle"]) & 0xFFFFFFFF: (int(op["domid"]), int(op["gref"])) for op in good}
        assert held == self.there, "what is said to be mapped, and what is"
        assert (good["address"] == WINDOW + (good["handle"] & 0xFFFFFFFF) * PAGE_SIZE).all()
        assert (ops["handle"][ops["status"] != GNTST_okay] == -1).all()
        return ops


@pytest.fixture
def gntdev(monkeypatch: pytest.MonkeyPatch) -> Gntdev:
    return Gntdev(monkeypatch)


GREFS = list(range(1, 301))  # a batch of 256, and one of the rest


def with_status(ops: np.ndarray, status: int) -> set[int]:
    return {int(gref) for gref in ops["gref"][(ops["status"] == status) & (ops["domid"] == DOMID)]}


@needs_no_jit
def test_batches_that_are_in_order(gntdev: Gntdev) -> None:
    ops = gntdev.map(GREFS)
    assert (ops["status"] == GNTST_okay).all()
    assert gntdev.calls == {MAP: 2}
    assert grant_seam.grant_unmap(int(gntdev.ctx.ctypes.data), ops.ctypes.data, len(ops), 0) == 0
    assert gntdev.there == {}


@needs_no_jit
@pytest.mark.parametrize("flags", [0, OP_READONLY])
@pytest.mark.parametrize("bad", [{7}, {7, 8, 100, 299}, set(range(1, 301, 2)), set(GREFS)])
def test_bad_ones_are_found_by_one_call(gntdev: Gntdev, flags: int, bad: set[int]) -> None:
    gntdev.bad = bad
    ops = gntdev.map(GREFS, flags)
    assert with_status(ops, GNTST_bad_gntref) == bad
    assert with_status(ops, GNTST_okay) == set(GREFS) - bad
    assert gntdev.calls[COPY] <= 2 and gntdev.calls[MAP] <= 4


@needs_no_jit
@pytest.mark.parametrize(("readonly", "found"), [({3}, True), ({3, 150, 300}, True), (set(GREFS[::2]), False)])
def test_those_that_may_only_be_read_are_looked_for_but_not_for_ever(
    gntdev: Gntdev, readonly: set[int], found: bool
) -> None:
    gntdev.readonly, gntdev.bad = readonly, {5}
    ops = gntdev.map(GREFS)
    denied = with_status(ops, GNTST_permission_denied)
    assert denied == readonly if found else denied > readonly - {5}
    assert with_status(ops, GNTST_bad_gntref) == {5} and with_status(ops, GNTST_no_space) == set()
    assert gntdev.calls[MAP] <= 2 * (2 * grant_map.MOST_TRIES + 4)


@needs_no_jit
def test_a_neighbour_in_the_batch_loses_nothing(gntdev: Gntdev) -> None:
    """Whatever a guest grants: even where the search is given up, that is for its own pages."""
    gntdev.bad, gntdev.readonly = {2, 4}, set(range(6, 257, 2))
    ops = gntdev.map(GREFS[:256], neighbours=128)
    assert (ops["status"][ops["domid"] == NEIGHBOUR] == GNTST_okay).all()
    assert with_status(ops, GNTST_permission_denied) == gntdev.readonly
    assert gntdev.calls[MAP] <= 2 * grant_map.MOST_TRIES + 6


@needs_no_jit
@pytest.mark.parametrize("room", [0, 1, 100, 299])
@pytest.mark.parametrize("flags", [0, OP_READONLY])
def test_without_room_what_fits_is_mapped(gntdev: Gntdev, room: int, flags: int) -> None:
    gntdev.room, gntdev.bad = room, {5}
    ops = gntdev.map(GREFS, flags)
    assert with_status(ops, GNTST_bad_gntref) == {5}
    assert len(gntdev.there) == room and len(with_status(ops, GNTST_no_space)) == len(GREFS) - 1 - room
    assert gntdev.calls[MAP] <= len(GREFS) // grant_map.A_PART + 2 * (grant_map.A_PART + 5)


@needs_no_jit
def test_a_moments_want_is_no_trouble(gntdev: Gntdev) -> None:
    gntdev.fails = 1
    assert (gntdev.map(GREFS)["status"] == GNTST_okay).all()
    assert gntdev.calls == {MAP: 3, COPY: 1}


@needs_no_jit
def test_page_by_page_where_mappings_are_undone_as_a_whole(gntdev: Gntdev) -> None:
    gntdev.ctx[0]["single"] = 1
    gntdev.bad, gntdev.readonly = {3}, {5}
    ops = gntdev.map(GREFS[:10])
    assert with_status(ops, GNTST_bad_gntref) == {3} and with_status(ops, GNTST_permission_denied) == {5}
    assert len(gntdev.there) == 8
